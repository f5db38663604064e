"""The cache that all levels of a ladder share.

A ladder with exits e_0 < e_1 < ... < e_{K-1} cuts the model's L layers into K+1 segments: segment 0
ends at e_0, segment k goes on from e_{k-1} to e_k, the last one ends at L. The cache holds, by position,

- each layer's keys and values, which any level that runs the layer reads, and those of the blocks that
  trained exit heads may own;
- the hidden states at the end of each segment, from which the next segment starts;
- what the level that ran last hands to its head: the same, or what the exit's own block makes of it;
- for each segment one integer: how many positions it has processed.

Everything is allocated once. Rolling back after a rejection sets integers and copies nothing: what
lies beyond a segment's length is stale, never read, and overwritten when its position comes again.

Memory in bytes, for T positions, s bytes a number, G key/value heads of size E, width D, chunks of C, and
L layers, blocks included:

    s * T * (2 * L * G * E  +  (K + 2) * D  +  2 * C)
             keys, values      hidden          mask
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model import Config

CHUNK = 256  # at most this many positions go through a segment at once: bounds activations and mask


class KVCache:
    """Keys, values, hidden states and segment lengths of one sequence of at most max_len positions."""

    def __init__(
        self,
        config: "Config",
        exits: tuple[int, ...],
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        blocks: tuple[int, ...] = (),
    ):
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.max_len = max_len
        self.slots = {exit: config.n_layers + i for i, exit in enumerate(blocks)}  # where exits' own blocks write
        layers = config.n_layers + len(blocks)
        self.keys = torch.zeros(layers, 1, config.n_kv_heads, max_len, config.head_dim, **kind)
        self.values = torch.zeros_like(self.keys)
        self.hidden = torch.zeros(len(exits) + 1, 1, max_len, config.dim, **kind)
        self.read = torch.zeros(1, max_len, config.dim, **kind)
        self.lengths = [0] * (len(exits) + 1)
        # Row i is 0 up to column max_len-1+i and -inf beyond. A window of it, shifted by the first position,
        # is the causal mask of any chunk, so that no step builds one as long as the context. For max_len 4:
        #     row 0   0 0 0 0 - - - -       start 2, n 2 takes      0 0 0 -
        #     row 1   0 0 0 0 0 - - -       columns 1 .. 4          0 0 0 0
        self._mask = torch.full((CHUNK, 2 * max_len), -torch.inf, **kind).triu(max_len)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (1, G, N, E) at positions start..start+N-1; return views of all up to there."""
        stop = start + k.shape[2]
        self.keys[layer, :, :, start:stop] = k
        self.values[layer, :, :, start:stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def mask(self, start: int, n: int) -> Tensor | None:
        """Additive causal mask (n, start+n) for positions start..start+n-1, as a view.

        None where none is needed: a single position sees all before it, and from position 0 on the mask
        is the plain triangle, which attention makes by itself.
        """
        if n == 1 or start == 0:
            return None
        offset = self.max_len - 1 - start
        return self._mask[:n, offset : offset + start + n]

    def pending(self, segment: int, length: int) -> Iterator[tuple[int, int]]:
        """The positions < length that a segment has not processed, as chunks (start, stop)."""
        for start in range(self.lengths[segment], length, CHUNK):
            yield start, min(start + CHUNK, length)

    def rollback(self, length: int) -> None:
        """Forget what any segment holds at positions >= length."""
        self.lengths = [min(processed, length) for processed in self.lengths]

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors: the formula above."""
        return sum(t.nbytes for t in (self.keys, self.values, self.hidden, self.read, self._mask))
