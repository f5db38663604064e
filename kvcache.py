"""The cache that all levels of a ladder share.

A ladder with exits e_0 < e_1 < ... < e_{K-1} cuts the model's L layers into K+1 segments: segment
0 ends at e_0, segment k goes on from e_{k-1} to e_k, and the last one ends at L. The cache holds

- the keys and values of each layer, and of the blocks that exit heads and a draft head may have,
  by slot;
- the hidden states at each exit, by slot: from these the segment above starts;
- for each segment one integer: how many positions it has processed.

The token at position t lies in slot t, unless a plan says otherwise. Everything is allocated once.
Rolling back after a rejection sets integers and copies nothing: slots beyond a segment's length are
stale. They are masked, and overwritten when their position is processed again.

A sequence takes this many bytes, for T slots, s bytes per number, G key/value heads of size E,
width D, L layers and head blocks, and K exits above depth 0 (counting the full depth if a draft
head reads it):

    s * T * (2 * L * G * E  +  K * D)

This file knows nothing of drafts, acceptance or sampling (hispec.py), and does not run the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Llama

WIDEST = 512  # most positions in a pass; this bounds the size of its activations and its mask


class KVCache:
    """Keys, values, hidden states and segment lengths of `batch` sequences of at most max_len.

    exits: the ladder's depths in layers, ascending; depth 0 has no layers, hence no states.
    draft_head: the exit that a draft head reads, 0 if none does.
    """

    def __init__(
        self,
        model: Llama,
        exits: tuple[int, ...],
        max_len: int,
        draft_head: int = 0,
        batch: int = 1,
    ):
        c, weight = model.config, model.embed.weight
        self.depths = (*exits, c.n_layers)
        self.lengths = [0] * len(self.depths)  # positions that each segment has processed
        self.processed = [0] * len(self.depths)  # the same, including those rolled back since
        blocks = [exit for exit in exits if exit in model.blocks]
        self.block_layers = {exit: c.n_layers + i for i, exit in enumerate(blocks)}
        self.draft_layer = c.n_layers + len(blocks)
        layers = self.draft_layer + (draft_head > 0)
        self.keys = weight.new_zeros(layers, batch, c.n_kv_heads, max_len, c.head_dim)
        self.values = torch.zeros_like(self.keys)
        states = weight.new_zeros(batch, max_len, c.dim)
        kept = {exit for exit in (*exits, draft_head) if exit > 0}
        self.hidden = {exit: torch.zeros_like(states) for exit in kept}
        self.columns = torch.arange(max_len, device=weight.device)

    def plans(self, segment: int, length: int) -> Iterator["Plan"]:
        """The passes that a segment still has to make, over its positions below `length`."""
        for first in range(self.lengths[segment], length, WIDEST):
            yield self.plan(first, min(first + WIDEST, length))

    def plan(self, first: int, stop: int) -> "Plan":
        """The pass over positions first .. stop-1: each has its own slot and sees all before it."""
        positions = self.columns[first:stop]
        return Plan(self, positions, positions, self.columns[:stop] <= positions[:, None])

    def advance(self, segment: int, length: int) -> None:
        """Note that a segment has processed all positions below `length`."""
        self.processed[segment] += length - self.lengths[segment]
        self.lengths[segment] = length

    def rollback(self, length: int) -> None:
        """Forget what any segment holds at positions >= length."""
        self.lengths = [min(n, length) for n in self.lengths]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and hidden states: the formula above times `batch`."""
        return sum(t.nbytes for t in (self.keys, self.values, *self.hidden.values()))


@dataclass
class Plan:
    """One pass of N tokens through some layers: each token's position, slot, and view of the cache.

    Positions and slots are the same for tokens that follow each other. A tree of drafts has
    several tokens at one position, each in its own slot, which only its descendants see. The cache
    must have room for these slots, and to keep a branch, its slots are copied into their positions'
    slots (exercise 8 of the lecture). `hispec.run_plan` runs a plan.
    """

    cache: KVCache
    positions: Tensor  # (N,) in the text; they set RoPE's angles
    slots: Tensor  # (N,) where keys, values and hidden states are written
    mask: Tensor  # (N, S) whether a token may attend to each of the first S slots

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, G, N, E) in a layer's slots; return its first S slots (B, G, S, E)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        S = self.mask.shape[1]
        return keys[:, :, :S], values[:, :, :S]
