"""The cache that all levels of a ladder share.

A ladder with exits e_0 < e_1 < ... < e_{K-1} cuts the model's L layers into K+1 segments: segment
0 ends at e_0, segment k goes on from e_{k-1} to e_k, the last ends at L. The cache holds, by
position,

- each layer's keys and values, and those of the blocks that exits' own heads may have;
- the hidden states at each exit, from which the segment above it starts;
- for each segment one integer: how many positions it has processed.

Everything is allocated once. Rolling back after a rejection sets integers and copies nothing: what
lies beyond a segment's length is stale, masked, and overwritten when its position comes again.

A position attends over the keys up to the next multiple of CHUNK, those ahead of it masked. So how
many keys it is compared with depends on the position alone, not on its company in a pass, nor on
how long the text may get: one thing needed for the same bits whatever the ladder. A pass that
crosses such a multiple falls into parts there, for attention only.

Bytes a sequence, for T positions (rounded up to CHUNK), s bytes a number, G key/value heads of size
E, width D, L layers and blocks of heads, and K exits above depth 0 that any ladder has had:

    s * T * (2 * L * G * E  +  K * D)

The file knows nothing of drafts, acceptance or sampling: that is hispec.py.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama

CHUNK = 64  # positions: more would read more masked keys, fewer would cut more passes
WIDEST = 512  # positions in a pass, which bounds its activations and masks
ROWS = 4  # attention takes its rows in fours: on a CPU fewer would get other bits


class KVCache:
    """Keys, values, hidden states, segment lengths of `batch` sequences of at most max_len.

    exits: the ladder's depths. A pass holds a multiple of `model.pad` positions (operators.py says
    why); what is padded is written beyond the segment's length, and so is stale from the start.
    """

    def __init__(self, model: Llama, exits: tuple[int, ...], max_len: int, batch: int = 1):
        c, weight, self.pad = model.config, model.embed.weight, model.pad
        blocks = [exit for exit in exits if exit in model.blocks]
        self.slots = {exit: c.n_layers + i for i, exit in enumerate(blocks)}  # where blocks write
        room, layers = up_to_chunk(max_len + self.pad - 1), c.n_layers + len(blocks)
        self.group, self.dim = c.n_heads // c.n_kv_heads, c.dim
        self.keys = weight.new_zeros(layers, batch, c.n_kv_heads, room, c.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.layers = list(zip(self.keys, self.values))
        self.views: dict[int, list[tuple[Tensor, Tensor]]] = {}  # end: the layers' keys before it
        self.hidden: dict[int, Tensor] = {}
        self.lengths: list[int] = []
        self.columns = torch.arange(room, device=weight.device)
        self.open(exits)

    def passes(self, segment: int, length: int) -> Iterator[tuple[int, int]]:
        """The positions < length that a segment has not processed, as passes first .. stop-1."""
        for first in range(self.lengths[segment], length, WIDEST):
            yield first, min(first + WIDEST, length)

    def place(self, first: int, stop: int) -> None:
        """Begin a pass over positions first .. stop-1, and padding behind them in the last part."""
        last = stop + -(stop - first) % self.pad
        cuts = [first, *range(up_to_chunk(first + 1), stop, CHUNK), last]
        parts = [(b - a, up_to_chunk(a + 1)) for a, b in pairwise(cuts)]
        self.begin(self.columns[first:last], parts)

    def begin(self, at: Tensor, parts: list[tuple[int, int]]) -> None:
        """Begin a pass over positions `at` (N,), in parts (n, end): n that see keys 0 .. end-1.

        Works out once what every layer of the pass needs: each part's size and a mask (rows, end),
        0 where a row may look and -inf elsewhere. The rows are the query heads that share a key
        head, position by position.
        """
        self.at, self.sizes, self.parts = at, [n for n, _ in parts], []
        for positions, (_, end) in zip(at.split(self.sizes), parts):
            rows = positions.repeat_interleave(self.group)  # (n * H/G,)
            rows = F.pad(rows, (0, -len(rows) % ROWS))  # what is padded sees key 0: no NaN
            ahead = self.columns[:end] > rows[:, None]
            mask = torch.zeros_like(ahead, dtype=self.keys.dtype).masked_fill_(ahead, -torch.inf)
            if end not in self.views:
                self.views[end] = list(zip(self.keys[..., :end, :], self.values[..., :end, :]))
            self.parts.append((self.views[end], mask))

    def write(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Store k, v (B, G, N, E) at the pass's positions.

        Returns what each part of it sees: keys, values (B, G, end, E) and the mask.
        """
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.at, k)
        values.index_copy_(2, self.at, v)
        return [(*seen[layer], mask) for seen, mask in self.parts]

    def run(self, model: Llama, ids: Tensor, start: int, depth: int) -> Tensor:
        """Take one sequence's pass through layers start..depth-1; states (N, D) for `depth`'s head.

        It begins with the tokens ids (N,) at layer 0, elsewhere with the hidden states left there.
        """
        h = self.hidden[start].index_select(1, self.at) if start else model.embed(ids[None])
        h = model.run(h, start, depth, self)  # (1, N, D)
        if depth in self.hidden:
            self.hidden[depth].index_copy_(1, self.at, h)
        return model.read(h, depth, self)[0]

    def rollback(self, length: int) -> None:
        """Forget what any segment holds at positions >= length."""
        self.lengths = [min(processed, length) for processed in self.lengths]

    def open(self, exits: tuple[int, ...]) -> None:
        """Make ready for another text and ladder: nothing of an earlier one is left.

        Not even a NaN, which no mask would hide: 0 x NaN is NaN. An exit whose head owns a block
        has to be among those the cache was made for.
        """
        for t in (self.keys, self.values, *self.hidden.values()):
            t.zero_()
        batch, room = self.keys.shape[1], self.keys.shape[3]
        for exit in exits:
            if exit > 0 and exit not in self.hidden:
                self.hidden[exit] = self.keys.new_zeros(batch, room, self.dim)
        self.lengths = [0] * (len(exits) + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and hidden states: the formula above, for each sequence."""
        return sum(t.nbytes for t in (self.keys, self.values, *self.hidden.values()))


def up_to_chunk(length: int) -> int:
    return -(-length // CHUNK) * CHUNK
