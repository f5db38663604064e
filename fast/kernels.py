"""All layers of a segment in one Triton kernel, for models whose weights stay in a GPU's cache.

A compiled layer of `tiny` is still about ten kernels, and each waits for the one before it, while
the weights of a layer are only 430 KB in bfloat16. Here one program (a block of threads on one of
the GPU's processors) sends a pass through all layers of a segment: the states stay in its
registers, so that nothing waits but for weights. The captured step uses it with `fused=True`. A
large model needs all processors of a GPU for its weights, and is refused.

Each position is computed by itself in a pass of fixed width, and keys after a position change no
bit of its sums. So a position has the same bits in any pass. The states are rounded to the model's
dtype after every layer, since a deeper level may start from there (the cache holds them so).

Without a GPU the kernel runs in Triton's interpreter: set TRITON_INTERPRET=1 before the import.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import model as plain
from fast.layers import CHUNK, WIDTH, ChunkPlan

LARGEST = 256  # dim of a model whose layers one processor can read in time


class FusedLlama(plain.Llama):
    """A Llama that runs a narrow pass of a ChunkPlan's cache through its layers by one kernel."""

    table: Tensor  # as `weights` has made it of what is listed
    listed: list[int] = []

    def run(self, h: Tensor, first: int, last: int, plan: Any = None) -> Tensor:
        if not isinstance(plan, ChunkPlan) or h.shape[1] != WIDTH:
            return super().run(h, first, last, plan)
        c, cache, out = self.config, plan.cache, torch.empty_like(h)
        angles: Any = self._angles(h, plan)
        launch: Any = _layers
        launch[(1,)](
            h, out, self.weights(), plan.positions, angles.rows, cache.keys, cache.values,
            first, last, cache.keys.stride(0), cache.keys.stride(2), c.norm_eps,
            WIDTH, c.dim, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_dim,
            CHUNK, c.ffn_dim & -c.ffn_dim if c.ffn_dim % 64 else 64, num_warps=8,
        )  # fmt: skip
        return out

    def weights(self) -> Tensor:
        """The addresses of each layer's six weights (n_layers, 6), in the order of their use."""
        names = "attn_norm attn.qkv attn.out mlp_norm mlp.gate_up mlp.down".split()
        modules: Any = (layer.get_submodule(name) for layer in self.layers for name in names)
        listed = [module.weight.data_ptr() for module in modules]
        if listed != self.listed:
            self.listed = listed
            self.table = torch.tensor(listed, device=self.embed.weight.device).view(-1, len(names))
        return self.table


def check_fits(model: plain.Llama) -> None:
    """ValueError if the kernel cannot take the layers of this model, and why."""
    c = model.config
    sizes = {"dim": c.dim, "head_dim": c.head_dim}
    odd = {name: n for name, n in sizes.items() if n & (n - 1) or not 32 <= n <= LARGEST}
    if odd:
        raise ValueError(f"the fused kernel takes powers of two from 32 to {LARGEST}, got {odd}")
    if c.ffn_dim % 16:
        raise ValueError(f"the fused kernel takes an ffn_dim of 16, 32, ..., got {c.ffn_dim}")
    if c.qkv_bias or c.qk_norm:
        raise ValueError("the fused kernel takes no biases and no norms of queries and keys")


@triton.jit
def _layers(
    h_at, out_at, table, positions, angles, keys, values,
    first, last, layer_stride, head_stride, eps,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Send states h (N, D) at positions (N,) through layers first..last-1 to out (N, D).

    It writes keys and values (layer, G, slot, E) at the positions and attends to those up to each.
    """
    dtype = h_at.dtype.element_ty
    exact: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    n, d, t = tl.arange(0, N), tl.arange(0, D), tl.arange(0, T)
    e, half = tl.arange(0, E), tl.arange(0, E // 2)
    position = tl.load(positions + n)
    stop = tl.load(positions + N - 1) + 1  # of the keys that some position attends to
    turn = angles + n[:, None] * E + E // 2 + half[None]
    cos, sin = tl.load(turn).to(exact), tl.load(turn + N * E).to(exact)  # (N, E/2)
    h = tl.load(h_at + n[:, None] * D + d[None]).to(exact)
    slot = position[:, None] * E + half[None]  # where the first half of a key is written
    for layer in range(first, last):
        ours = table + layer * 6
        k_at, v_at = keys + layer * layer_stride, values + layer * layer_stride
        x = _norm(h, ours, eps, dtype, D)
        for g in tl.static_range(G):
            a, b = _rotated(x, ours + 1, (H + g) * E, cos, sin, dtype, D, E)
            tl.store(k_at + g * head_stride + slot, a)
            tl.store(k_at + g * head_stride + slot + E // 2, b)
            v = _product(x, ours + 1, (H + G + g) * E, 0, E, D, D)
            tl.store(v_at + g * head_stride + position[:, None] * E + e[None], v.to(dtype))
        tl.debug_barrier()  # what has been written can be read by all threads
        add = tl.zeros((N, D), exact)
        for head in tl.static_range(H):
            a, b = _rotated(x, ours + 1, head * E, cos, sin, dtype, D, E)
            group = head // (H // G) * head_stride
            most, total = tl.full((N,), -float("inf"), exact), tl.zeros((N,), exact)
            y = tl.zeros((N, E), exact)
            for begin in range(0, stop, T):  # the softmax is built up from one chunk to the next
                column = begin + t
                key = k_at + group + column[None] * E + half[:, None]  # (E/2, T)
                score = _dot(a, tl.load(key)) + _dot(b, tl.load(key + E // 2))
                seen = column[None] <= position[:, None]
                score = tl.where(seen, score.to(exact) * (E**-0.5), -float("inf"))
                higher = tl.maximum(most, tl.max(score, 1))
                less, p = tl.exp(most - higher), tl.exp(score - higher[:, None])
                v = tl.load(v_at + group + column[:, None] * E + e[None])  # (T, E)
                total, most = total * less + tl.sum(p, 1), higher
                y = y * less[:, None] + _dot(p.to(dtype), v)
            add += _product((y / total[:, None]).to(dtype), ours + 2, 0, head * E, D, E, H * E)
        h += add
        x = _norm(h, ours + 3, eps, dtype, D)
        add = tl.zeros((N, D), exact)
        for f in tl.static_range(0, F, BLOCK):
            gate = _product(x, ours + 4, f, 0, BLOCK, D, D)
            up = _product(x, ours + 4, F + f, 0, BLOCK, D, D)
            y = (gate / (1 + tl.exp(-gate)) * up).to(dtype)
            add += _product(y, ours + 5, 0, f, D, BLOCK, F)
        h = (h + add).to(dtype).to(exact)
    tl.store(out_at + n[:, None] * D + d[None], h.to(dtype))


@triton.jit
def _norm(h, weight, eps, dtype: tl.constexpr, D: tl.constexpr):
    """RMSNorm of h (N, D) by the weights (D,) whose address is in the table at `weight`."""
    w = tl.load(tl.load(weight).to(tl.pointer_type(dtype)) + tl.arange(0, D)).to(h.dtype)
    scale = 1 / tl.sqrt(tl.sum(h * h, 1) / D + eps)
    return (h * scale[:, None] * w[None]).to(dtype)


@triton.jit
def _rotated(
    x, qkv, row, cos, sin, dtype: tl.constexpr, D: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Both halves (N, E/2) of the query or key that E rows of qkv make, turned by RoPE."""
    a = _product(x, qkv, row, 0, E // 2, D, D)
    b = _product(x, qkv, row + E // 2, 0, E // 2, D, D)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _product(
    x, weight, row, column, ROWS: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Multiply x (N, K) by the transpose of the part (ROWS, K) of a matrix at a row and column."""
    rows, at = row + tl.arange(0, ROWS), column + tl.arange(0, K)
    matrix = tl.load(weight).to(tl.pointer_type(x.dtype))
    return _dot(x, tl.load(matrix + rows[None] * STRIDE + at[:, None]))


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="ieee")  # float32 as it is, not shortened to TF32
