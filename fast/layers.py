"""Modules and a cache that give a position the same bits whatever other positions are in a pass.

The number of keys that a position is compared with affects how its sums are rounded. So a position
attends to the keys up to the next multiple of CHUNK, and those after it are masked: the number of
keys depends on the position alone, not on what else is in the pass or how long the text may get. A
pass that crosses such a multiple is split into chunks there, for attention only. The number of
positions in a pass affects rounding too: cpu.py pads it to a multiple of four, cuda.py to a fixed
width.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as plain
from kvcache import KVCache, Plan

WIDTH = 16  # positions in a captured pass: on a GPU one position is hardly cheaper than sixteen
CHUNK = 64  # positions: more would read more masked keys, fewer would split more passes
ROWS = 4  # attention takes its queries in fours: on a CPU fewer would get other bits


class Cache(KVCache):
    """The shared cache, with passes split into chunks and padded to a multiple of `pad` positions.

    Padding is written beyond the segment's length, so it is stale from the start.
    """

    def __init__(
        self, model: plain.Llama, exits: tuple[int, ...], max_len: int, pad: int, draft_head=0
    ):
        super().__init__(model, exits, up_to_chunk(max_len + pad - 1), draft_head)
        c = model.config
        self.pad, self.group, self.dim = pad, c.n_heads // c.n_kv_heads, c.dim
        self.layers = list(zip(self.keys, self.values))
        # end: the layers' keys and values before it, and the masks of all rows of the last chunk
        self.views: dict[int, tuple[list[tuple[Tensor, Tensor]], Tensor]] = {}
        # a chunk's positions and the padding after it: every mask is a part of this one
        at = torch.arange(CHUNK + pad + ROWS, device=self.columns.device)
        self.causal = mask(at, self.columns - len(self.columns) + CHUNK, self.group, self.keys)

    def plan(self, first: int, stop: int) -> "ChunkPlan":
        last = stop + -(stop - first) % self.pad
        cuts = [first, *range(up_to_chunk(first + 1), stop, CHUNK), last]
        chunks = []
        for a, b in pairwise(cuts):
            pairs, masks = self.before(up_to_chunk(a + 1))
            row, rows = a % CHUNK * self.group, (b - a) * self.group
            chunks.append((b - a, pairs, masks[row : row + rows + -rows % ROWS]))
        return ChunkPlan(self, self.columns[first:last], chunks)

    def before(self, end: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The layers' keys and values (B, G, end, E) before `end`, and the last chunk's masks."""
        if end not in self.views:
            pairs = zip(self.keys[..., :end, :], self.values[..., :end, :])
            self.views[end] = list(pairs), self.causal[:, -end:]
        return self.views[end]


class ChunkPlan(Plan):
    """A pass over positions (N,) that each attend to the keys up to the end of their chunk.

    chunks: for each the number of positions, each layer's keys and values up to its end, and the
    mask of those that come after a position.
    """

    cache: Cache

    def __init__(self, cache: Cache, positions: Tensor, chunks: list[tuple[int, list, Tensor]]):
        self.cache, self.positions, self.slots = cache, positions, positions
        self.sizes = [n for n, _, _ in chunks]
        self.seen = [(pairs, mask) for _, pairs, mask in chunks]

    def write_chunks(self, layer: Any, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Store k and v (B, G, N, E); return each chunk's keys, values (B, G, end, E) and mask."""
        keys, values = self.cache.layers[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        return [(*pairs[layer], mask) for pairs, mask in self.seen]


def mask(positions: Tensor, columns: Tensor, group: int, like: Tensor) -> Tensor:
    """What to add to the scores of columns (T,): (N * group, T), with -inf for later columns.

    A row is a query head at one of the positions (N,); `group` of them share a key head.
    """
    ahead = columns > positions.repeat_interleave(group)[:, None]
    return torch.zeros_like(ahead, dtype=like.dtype).masked_fill_(ahead, -torch.inf)


class Layer(plain.Layer):
    """A layer that attends chunk by chunk. `before` and `after` are separate, to be compiled."""

    def forward(self, h: Tensor, rope: Any, plan=None, layer: int | None = None) -> Tensor:
        if not isinstance(plan, ChunkPlan):
            return super().forward(h, rope, plan, layer)
        q, k, v = self.before(h, rope.signed)
        seen = plan.write_chunks(layer, k, v)
        if len(seen) == 1:  # most passes have one chunk
            return self.after(h, attend(q, *seen[0]))
        chunks = zip(q.split(plan.sizes, 1), seen)
        return self.after(h, torch.cat([attend(some, *keys) for some, keys in chunks], 1))

    def before(self, h: Tensor, signed: plain.Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, H, E), keys and values (B, G, N, E) of h (B, N, D)."""
        (B, N, _), attn = h.shape, self.attn
        x = attn.qkv(self.attn_norm(h)).view(B, N, -1, attn.head_dim)  # (B, N, H+2G, E)
        qk, v = x.split([attn.heads + attn.kv_heads, attn.kv_heads], dim=2)
        if not isinstance(attn._modules["q_norm"], nn.Identity):  # an attribute takes longer
            q, k = qk.split([attn.heads, attn.kv_heads], dim=2)
            qk = torch.cat([attn.q_norm(q), attn.k_norm(k)], dim=2)
        q, k = rotate(qk, signed).split([attn.heads, attn.kv_heads], dim=2)
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def after(self, h: Tensor, y: Tensor) -> Tensor:
        """The layer's output (B, N, D) from its input h (B, N, D) and attention's y (B, N, H*E)."""
        h = h + self.attn.out(y)
        return h + self.mlp(self.mlp_norm(h))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (B, N, H*E) of queries (B, N, H, E); mask (N * H/G or more, T) is added to scores.

    Query heads that share a key head become rows of one head, which every fused kernel accepts.
    """
    (B, N, _, E), G = q.shape, k.shape[1]
    q = q.view(B, N, G, -1, E).transpose(1, 2).reshape(B, G, -1, E)
    rows = q.shape[2]  # N * H/G
    if rows < len(mask):
        q = F.pad(q, (0, 0, 0, len(mask) - rows))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, G, rows, E)
    y = y[:, :, :rows] if rows < len(mask) else y
    return y.view(B, G, N, -1, E).transpose(1, 2).reshape(B, N, -1)


class RoPE(plain.RoPE):
    """RoPE by a table, since a cosine's last bits may depend on how many are computed at once."""

    table: Tensor | None = None  # of every position: cos twice, -sin and sin (2, T, 1, E)

    def forward(self, positions: Tensor) -> Any:
        if self.table is None or self.table.device != positions.device:
            with torch.inference_mode(False):  # training may use a table that decoding has built
                every = torch.arange(self.config.max_seq_len, device=positions.device)
                cos, sin = super().forward(every)  # (T, E/2)
                rows = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
                self.table = torch.stack(rows)[:, :, None]
        at = positions.clamp(max=self.config.max_seq_len - 1)  # padding may lie past the context
        return Angles(self.table.index_select(1, at))


class Angles:
    """A pass's cos and sin: iterate for those of the plain layers; `signed` is for these layers."""

    def __init__(self, rows: Tensor):  # (2, N, 1, E)
        self.rows, self.signed = rows, rows.unbind()

    def __iter__(self):
        return iter(self.rows[:, :, 0].chunk(2, dim=-1)[1])  # (N, E/2) each


def rotate(x: Tensor, signed: plain.Rope) -> Tensor:
    """Like model.rotate, in fewer operators: x (B, N, heads, E), cos and signed sin (N, 1, E)."""
    cos, sin = signed
    y = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # even an idle `to` costs a call


def up_to_chunk(length: int) -> int:
    return -(-length // CHUNK) * CHUNK
