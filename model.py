"""A Llama-style transformer that can be read at any depth.

RMSNorm, rotary positions (RoPE), grouped-query attention and SwiGLU, as in Llama 2 and 3
(arXiv 2302.13971, 2307.09288, 2407.21783). Two things are added for self-speculation:

- `run` sends hidden states through any range of layers, with or without a cache, so a deeper
  level can start from what a shallower one has already computed;
- `read` and `logits` give next-token logits at any depth. By default every exit shares the final
  norm and output matrix (LayerSkip, arXiv 2404.16710); an exit may also own an `ExitHead`.

The file knows nothing of drafts, verification or sampling: that is hispec.py.

Shapes: B sequences, N positions, D = dim, H = query heads, G = key/value heads,
E = head_dim, V = vocab_size.
"""

import math
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from operators import ROWS, Linear, RMSNorm, attend_in_blocks

Rope = tuple[Tensor, ...]  # cos and sin of the positions of a pass, each (N, 1, E)


@dataclass(frozen=True)
class Config:
    """The shape of a Llama. Raises ValueError if the numbers do not fit together."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # = n_heads: multi-head; 1: multi-query; between: grouped-query attention
    ffn_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    tie_embeddings: bool = True
    rope_scaling: "RopeScaling | None" = None
    head_dim: int = 0  # 0 or None: dim / n_heads; a few checkpoints choose it freely

    def __post_init__(self):
        for name in (
            "vocab_size",
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "ffn_dim",
            "max_seq_len",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}"
                )
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if not self.head_dim:
            if self.dim % self.n_heads:
                raise ValueError(f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )


class Cache(Protocol):
    """What the layers ask of a cache in a pass: where it is, what to see, where to write."""

    at: Tensor  # (N,) the pass's positions
    sizes: list[int]  # how many of them each part of the pass holds
    slots: dict[int, int]  # exit -> where its own block keeps keys and values

    # for each part the keys and values it sees, and a mask (rows, T) added to its scores; a row is
    # a query head at a position, then padding
    def write(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]: ...


class Llama(nn.Module):
    """model(ids) gives the full model's logits, model(ids, exit=e) those read after layer e."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.exits: tuple[int, ...] = ()  # the trained exits, shallow to deep: the default ladder
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.exit_heads = nn.ModuleDict()  # str(exit) -> ExitHead, for exits that own one
        self.pad = 1  # the positions of a pass are padded to a multiple of it
        self._rope_table: Tensor | None = None
        self.apply(self._init)

    def _init(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # each layer adds two branches to the residual stream: it shall not grow with depth
            branch = getattr(module, "ends_branch", False)
            std = 0.02 / math.sqrt(2 * self.config.n_layers) if branch else 0.02
            nn.init.normal_(module.weight, std=std)

    def pack(self) -> "Llama":
        """Lay the weights out for inference on a CPU (operators.py).

        train(), to() and load_state_dict() undo it: a weight changed in place before is not seen.
        """
        self.eval()
        for m in self.modules():
            if isinstance(m, RMSNorm):
                m.pack()
        linears = [m for m in self.modules() if isinstance(m, Linear)]
        shared = self.config.tie_embeddings  # the embedding goes on reading the plain matrix
        alike = [m.pack(keep=shared and m is self.head) for m in linears]
        heads: list[Any] = [*self.exit_heads.values()]
        alike += [head.gather(self.head).pack() for head in heads if head.vocab is not None]
        self.pad = 1 if all(alike) else ROWS
        return self

    def train(self, mode: bool = True) -> "Llama":
        self.pad = 1 if mode else self.pad
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        self._apply(lambda t: t)  # other numbers are coming: what was made of the old ones goes
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self.pad = 1
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor, exit: int | None = None) -> Tensor:
        """Logits (B, N, V) for ids (B, N), without a cache: for training, and as the tests' oracle.

        exit: read after this many layers, 1..n_layers; None means all. Raises ValueError otherwise.
        """
        depth = self.config.n_layers if exit is None else exit
        if not 1 <= depth <= self.config.n_layers:
            raise ValueError(f"exit must be between 1 and {self.config.n_layers}, got {exit}")
        return self.logits(self.read(self.run(self.embed(ids), 0, depth), depth), depth)

    def run(self, h: Tensor, first: int, last: int, cache: Cache | None = None) -> Tensor:
        """Send h (B, N, D), the input of layer `first`, through layers first..last-1.

        Without a cache, h is the whole sequence. With one, h stands at the positions `cache.at`;
        each layer writes its keys and values there and attends to all before them.
        """
        rope = self._rope(h, cache)
        for i in range(first, last):
            h = self.layers[i](h, rope, i, cache)
        return h

    def read(self, h: Tensor, exit: int, cache: Cache | None = None) -> Tensor:
        """Send h (B, N, D), as it leaves layer `exit`, through the exit's own block, if it has one.

        The block attends, so with a cache it must see every position, as the layers do.
        """
        if exit not in self.blocks:
            return h
        block: Any = self.exit_heads[str(exit)].block
        return block(h, self._rope(h, cache), 0 if cache is None else cache.slots[exit], cache)

    def logits(self, h: Tensor, exit: int) -> Tensor:
        """Next-token logits (..., V) from h (..., D), as `read` leaves it for this exit."""
        if str(exit) in self.exit_heads:
            return self.exit_heads[str(exit)](h, self.head)
        return self.head(self.norm(h))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The exits whose heads own a block, and so keys and values."""
        return tuple(int(exit) for exit, head in self.exit_heads.items() if head.block is not None)

    def _rope(self, h: Tensor, cache: Cache | None) -> Rope:
        """cos and sin (N, 1, E) for the positions of h (B, N, D), in float32 in any dtype."""
        if self._rope_table is None or self._rope_table.device != h.device:
            with torch.inference_mode(False):  # training may use what decoding has built
                self._rope_table = rope_table(self.config).to(h.device)
        if cache is None:
            return self._rope_table[:, : h.shape[1]].unbind()
        at = cache.at.clamp(max=self.config.max_seq_len - 1)  # padding may lie past the context
        return self._rope_table.index_select(1, at).unbind()


class Layer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, h: Tensor, rope: Rope, slot: int, cache: Cache | None = None) -> Tensor:
        q, k, v = self.before(h, rope)
        return self.after(h, self.attn(q, k, v, slot, cache))

    # what is alike in all layers stands apart from the cache, so that it can be compiled once
    def before(self, h: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(self.attn_norm(h), rope)

    def after(self, h: Tensor, y: Tensor) -> Tensor:
        h = h + self.attn.out(y)
        return h + self.mlp(self.mlp_norm(h))


class Attention(nn.Module):
    """Causal attention in which H / G query heads share a key/value head (arXiv 2305.13245).

    slot says which slice of the cache is this layer's.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        # one product for queries, keys and values: fewer, larger reads
        self.qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, config.dim)
        self.out.ends_branch = True  # type: ignore[assignment]

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, H, E), keys and values (B, G, N, E) of x (B, N, D)."""
        B, N, _ = x.shape
        x = self.qkv(x).view(B, N, -1, self.head_dim)  # (B, N, H+2G, E)
        qk, v = x.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(qk, rope).split([self.heads, self.kv_heads], dim=2)
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slot: int, cache: Cache | None = None
    ) -> Tensor:
        """What the positions see (B, N, H*E), to go through `out`."""
        B, N, _, _ = q.shape
        if cache is None and self.training and q.device.type == "cpu":
            y = attend_in_blocks(q, k, v)
        elif cache is None:
            q = q.transpose(1, 2)  # (B, H, N, E)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2)
        elif len(cache.sizes) == 1:  # most passes are of one part
            y = self._attend(q, *cache.write(slot, k, v)[0])
        else:
            parts = zip(q.split(cache.sizes, 1), cache.write(slot, k, v))
            y = torch.cat([self._attend(part, *seen) for part, seen in parts], 1)
        return y.reshape(B, N, -1)  # from (B, N, H, E)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Query heads that share a key head are rows of it: every fused kernel takes that."""
        B, N, H, E = q.shape
        q = q.view(B, N, self.kv_heads, -1, E).transpose(1, 2).reshape(B, self.kv_heads, -1, E)
        rows = q.shape[2]  # N * H/G
        if rows < len(mask):
            q = F.pad(q, (0, 0, 0, len(mask) - rows))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, G, rows, E)
        y = y[:, :, :rows] if rows < len(mask) else y
        return y.view(B, self.kv_heads, N, -1, E).transpose(1, 2)  # (B, N, G, H/G, E)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim)  # gate and up in one product
        self.down = Linear(config.ffn_dim, config.dim)
        self.down.ends_branch = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ExitHead(nn.Module):
    """An exit's own way from hidden states to logits: a light block, a norm, maybe fewer tokens.

    logits = W[vocab] @ norm(block(h)), with W the model's output matrix; `Llama.read` runs the
    block, which attends, and `forward` does the rest. The block is one more `Layer`, with its own
    keys and values, whose SwiGLU is `width` wide (0: no block); freshly made, it adds nothing.
    `vocab` lists the token ids the exit may draft; every other token gets -inf. That loses nothing,
    since a deeper level verifies, and reads len(vocab) rows of W in place of V. In eval mode these
    rows are gathered once: after a change to W, call train() and eval().

    Raises ValueError if vocab is empty, repeats an id or leaves the vocabulary.
    """

    vocab: Tensor | None

    def __init__(self, config: Config, width: int = 0, vocab: list[int] | None = None):
        super().__init__()
        ids = None
        if vocab is not None:
            # ascending: ties break as in the full row
            ids = torch.tensor(sorted(set(vocab)), dtype=torch.long)
            if len(ids) == 0 or len(ids) < len(vocab) or ids[0] < 0 or ids[-1] >= config.vocab_size:
                raise ValueError(
                    f"vocab must be distinct token ids in 0..{config.vocab_size - 1}, at least one"
                )
        self.vocab_size = config.vocab_size
        self.block = Layer(replace(config, ffn_dim=width)) if width else None
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if self.block is not None:
            nn.init.zeros_(self.block.attn.out.weight)
            nn.init.zeros_(self.block.mlp.down.weight)
        self.register_buffer("vocab", ids)
        self._rows: list[Linear] = []  # a list, so as to be no part of what is saved or trained

    def forward(self, h: Tensor, head: Linear) -> Tensor:
        """Logits (..., V) from h (..., D), as `Llama.read` leaves it, and the output layer."""
        reduced = self.known(h, head)
        if self.vocab is None:
            return reduced
        full = reduced.new_full((*reduced.shape[:-1], self.vocab_size), -math.inf)
        return full.index_copy(-1, self.vocab, reduced)

    def known(self, h: Tensor, head: Linear) -> Tensor:
        """Logits (..., len(vocab)) of the tokens the exit may draft."""
        if self.vocab is None:
            return head(self.norm(h))
        if self.training:  # the matrix may change from step to step: always read it afresh
            return F.linear(self.norm(h), head.weight[self.vocab])
        return self.gather(head)(self.norm(h))

    def gather(self, head: Linear) -> Linear:
        """The rows of the output layer that the exit reads, gathered once in eval mode."""
        if not self._rows and self.vocab is not None:
            # as the RoPE table: a gradient may pass through them later
            with torch.inference_mode(False):
                rows = Linear(head.in_features, len(self.vocab))
                rows.weight = nn.Parameter(head.dense()[self.vocab], requires_grad=False)
                self._rows = [rows]
        return self._rows[0]

    def train(self, mode: bool = True) -> "ExitHead":
        # what `Llama.pack` has laid out stays so in eval mode, as in every Linear
        if mode or not any(rows.packed or rows.turned is not None for rows in self._rows):
            self._rows = []
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._rows = []
        return super()._apply(fn, recurse)


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretch of slow rotary frequencies to longer contexts (arXiv 2407.21783, 3.2)."""

    factor: float  # how much longer than the original context
    low_freq_factor: float  # frequencies of wavelengths above original / low are divided by factor
    high_freq_factor: float  # those of wavelengths below original / high stay; between: a blend
    original_max_seq_len: int  # context length before the stretch, in tokens

    def __post_init__(self):
        numbers = astuple(self)
        if not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in numbers):
            raise ValueError(f"RoPE scaling takes finite numbers above 0, got {numbers}")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"low_freq_factor must be below high_freq_factor, got {numbers[1:3]}")


def rope_table(config: Config) -> Tensor:
    """cos and sin (2, max_seq_len, 1, E) of every position's angles (arXiv 2104.09864), float32.

    The first half of each sin row is negated, so that `rotate` needs no separate sign.
    """
    E = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, E, 2, dtype=torch.float32) / E)  # (E/2,)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s.original_max_seq_len * freq / (2 * math.pi)  # within the original context
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s.factor
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), freq)  # (T, E/2)
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])  # (2, T, E)
    return table.unsqueeze(2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of x (B, N, heads, E) by its position's angle."""
    cos, sin = rope
    y = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # an idle `to` costs a call
