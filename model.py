"""A Llama-style transformer that can be read at any depth.

It has RMSNorm, rotary positions (RoPE), grouped-query attention and SwiGLU, as in Llama 2 and 3
(arXiv 2302.13971, 2307.09288, 2407.21783), and optionally a bias or two more norms, as in Qwen2 and
Qwen3 (2407.10671, 2505.09388). Two things are added for self-speculation:

- `run` sends hidden states through any range of layers, with or without a cache, so that a deeper
  level can start from what a shallower one has already computed;
- `logits` gives next-token logits at any depth. By default every exit shares the final norm and
  output matrix (LayerSkip, arXiv 2404.16710); an exit may also own an `ExitHead`.

This file knows nothing of drafts, verification or sampling, which are in hispec.py.

Shapes: B sequences, N positions, D = dim, H = query heads, G = key/value heads,
E = head_dim, V = vocab_size.
"""

import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin (N, E/2) of the angles at a pass's positions


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
    head_dim: int = 0  # 0 or None: dim / n_heads; a few checkpoints use another size
    qkv_bias: bool = False  # queries, keys and values have a bias, as in Qwen2
    qk_norm: bool = False  # each head's queries and keys are normed before RoPE, as in Qwen3

    def __post_init__(self):
        counts = "vocab_size dim n_layers n_heads n_kv_heads ffn_dim max_seq_len"
        for name in counts.split():
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
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


class Llama(nn.Module):
    """model(ids) gives the full model's logits, and model(ids, exit=e) those read after layer e."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.exits: tuple[int, ...] = ()  # the trained exits, shallow to deep: the default ladder
        self.fast: Any = None  # a faster step than the plain one, which `generate` then uses
        self.family = ""  # the kind of checkpoint it came from, so that it can be saved as one
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.rope = RoPE(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.exit_heads = nn.ModuleDict()  # str(exit) -> ExitHead, for exits that own one
        self.draft_heads = nn.ModuleDict()  # str(exit) -> DraftHead, by the exit it reads
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # each layer adds two branches to the residual stream, and their sum should not
                # grow with depth
                branch = name.endswith(("attn.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layers) ** 0.5 if branch else 0.02)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, exit: int | None = None) -> Tensor:
        """Logits (B, N, V) for ids (B, N) without a cache, for training and as the tests' oracle.

        exit: how many layers to run, 1..n_layers; None means all. Raises ValueError otherwise.
        """
        depth = self.config.n_layers if exit is None else exit
        if not 1 <= depth <= self.config.n_layers:
            raise ValueError(f"exit must be between 1 and {self.config.n_layers}, got {exit}")
        h = self.run(self.embed(ids), 0, depth)
        return self.logits(self.exit_block(h, depth), depth)

    def run(self, h: Tensor, first: int, last: int, plan=None) -> Tensor:
        """Send h (B, N, D), the input of layer `first`, through layers first..last-1.

        Without a plan, h is the whole sequence. With one (kvcache.Plan), h stands at the plan's
        positions; each layer writes its keys and values to the plan's slots of the cache, and
        attends to what the plan lets it see there.
        """
        rope = self._angles(h, plan)
        for i in range(first, last):
            h = self.layers[i](h, rope, plan, i)
        return h

    def exit_block(self, h: Tensor, exit: int, plan=None) -> Tensor:
        """Send h (B, N, D), the output of layer `exit`, through the exit's own block, if any.

        The block has attention, so with a cache it must run at every position, as the layers do.
        """
        if exit not in self.blocks:
            return h
        block: Any = self.exit_heads[str(exit)].block
        return block(h, self._angles(h, plan), plan, plan and plan.cache.block_layers[exit])

    def logits(self, h: Tensor, exit: int) -> Tensor:
        """Next-token logits (..., V) from h (..., D), the output of `exit_block` for this exit."""
        if str(exit) in self.exit_heads:
            return self.exit_heads[str(exit)](h, self.head)
        return self.head(self.norm(h))

    def draft(self, exit: int, h: Tensor, ids: Tensor, plan=None) -> Tensor:
        """Run the draft head on `exit`: (B, N, D), for `draft_logits`.

        ids (B, N): tokens. h (B, N, D): the exit's state at the position before each of them.
        """
        head: Any = self.draft_heads[str(exit)]
        return head(
            h, self.embed(ids), self._angles(h, plan), plan, plan and plan.cache.draft_layer
        )

    def draft_logits(self, h: Tensor, exit: int) -> Tensor:
        """Next-token logits (..., V) from h (..., D), the output of `draft`."""
        head: Any = self.draft_heads[str(exit)]
        return head.out(h, self.head)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The exits whose heads have a block, with keys and values of its own."""
        return tuple(int(exit) for exit, head in self.exit_heads.items() if head.block is not None)

    def _angles(self, h: Tensor, plan) -> Rope:
        return self.rope(torch.arange(h.shape[1], device=h.device) if not plan else plan.positions)


class Layer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, h: Tensor, rope: Rope, plan=None, layer: int | None = None) -> Tensor:
        h = h + self.attn(self.attn_norm(h), rope, plan, layer)
        return h + self.mlp(self.mlp_norm(h))


class Attention(nn.Module):
    """Causal attention in which H / G query heads share a key/value head (arXiv 2305.13245)."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        # one matrix product for queries, keys and values: fewer and larger reads
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.dim, width, bias=config.qkv_bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(self.head_dim, config.norm_eps) for _ in range(2))
        self.out = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, plan=None, layer: int | None = None) -> Tensor:
        """layer: the index of this layer in the cache."""
        B, N, _ = x.shape
        x = self.qkv(x).view(B, N, -1, self.head_dim).transpose(1, 2)  # (B, H+2G, N, E)
        q, k, v = x.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k, mask = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), None
        if plan is not None:
            k, v = plan.write(layer, k, v)  # (B, G, S, E): with those of earlier passes
            mask = plan.mask  # (N, S)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )  # (B, H, N, E)
        return self.out(y.transpose(1, 2).reshape(B, N, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)  # both in one product
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ExitHead(nn.Module):
    """An exit's own way from hidden states to logits: a block, a norm, and perhaps fewer tokens.

    logits = W[vocab] @ norm(block(h)), where W is the model's output matrix. `Llama.exit_block`
    runs the block, and `forward` does the rest. The block is one more `Layer`, with its own keys
    and values and a SwiGLU `width` wide (0: no block); when freshly made, it adds nothing to h.
    `vocab` lists the token ids that the exit may draft; every other token gets -inf. The final
    output stays exact, since a deeper level verifies, and the exit reads len(vocab) rows of W
    instead of V.

    Raises ValueError if vocab is empty, repeats an id, or has an id outside the vocabulary.
    """

    vocab: Tensor | None

    def __init__(self, config: Config, width: int = 0, vocab: list[int] | None = None):
        super().__init__()
        ids = None
        if vocab is not None:
            # ascending, so that ties break as in the full row
            ids = torch.tensor(sorted(set(vocab)), dtype=torch.long)
            if len(ids) == 0 or len(ids) < len(vocab) or ids[0] < 0 or ids[-1] >= config.vocab_size:
                raise ValueError(
                    f"vocab must be distinct token ids in 0..{config.vocab_size - 1}, at least one"
                )
        self.block = Layer(replace(config, ffn_dim=width)) if width else None
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        if self.block is not None:
            nn.init.zeros_(self.block.attn.out.weight)
            nn.init.zeros_(self.block.mlp.down.weight)
        self.register_buffer("vocab", ids)

    def forward(self, h: Tensor, head: nn.Linear) -> Tensor:
        """Logits (..., V) from h (..., D), the output of `exit_block`, and the output layer."""
        known = self.known(h, head)
        if self.vocab is None:
            return known
        full = known.new_full((*known.shape[:-1], head.out_features), -math.inf)
        return full.index_copy(-1, self.vocab, known)

    def known(self, h: Tensor, head: nn.Linear) -> Tensor:
        """Logits (..., len(vocab)) of the tokens that the exit may draft."""
        if self.vocab is None:
            return head(self.norm(h))
        return F.linear(self.norm(h), head.weight[self.vocab])


class DraftHead(nn.Module):
    """Drafts from the states that a verifying exit has already computed (EAGLE, arXiv 2401.15077).

    x_t = fuse([norm(h_{t-1}) ; norm(embed(token_t))]), where h is the state at the exit, goes
    through one block, which attends to x_0 .. x_t; `out` gives the logits of token t+1. For the
    next draft the block's own output replaces the state h_t, which has not been computed yet. The
    state before the first token is 0.
    `vocab`: as ExitHead's.
    """

    def __init__(self, config: Config, vocab: list[int] | None = None):
        super().__init__()
        self.state_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.token_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.fuse = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = Layer(config)
        self.out = ExitHead(config, vocab=vocab)

    def forward(
        self, h: Tensor, embedded: Tensor, rope: Rope, plan=None, layer: int | None = None
    ) -> Tensor:
        """The head's states, from the exit's states h and embedded tokens, all (B, N, D)."""
        x = self.fuse(torch.cat([self.state_norm(h), self.token_norm(embedded)], dim=-1))
        return self.block(x, rope, plan, layer)


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's way to fit slow rotary frequencies to longer contexts (arXiv 2407.21783, 3.2)."""

    factor: float  # how much longer than the original context
    low_freq_factor: float  # frequencies of wavelengths above original / low are divided by factor
    high_freq_factor: float  # wavelengths below original / high are kept; in between: a blend
    original_max_seq_len: int  # context length before the extension, in tokens

    def __post_init__(self):
        numbers = astuple(self)
        if not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in numbers):
            raise ValueError(f"RoPE scaling takes finite numbers above 0, got {numbers}")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"low_freq_factor must be below high_freq_factor, got {numbers[1:3]}")


class RoPE(nn.Module):
    """The angles by which positions turn queries and keys (arXiv 2104.09864)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def forward(self, positions: Tensor) -> Rope:
        """cos and sin (N, E/2) for positions (N,), in float32 whatever the model's dtype."""
        freq = rope_frequencies(self.config).to(positions.device)
        angle = positions.float()[:, None] * freq  # (N, E/2)
        return angle.cos(), angle.sin()


def rope_frequencies(config: Config) -> Tensor:
    """Return by how many radians each pair of coordinates turns per position, (E/2,)."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    freq = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_seq_len * freq / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling.factor


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of x (B, heads, N, E) by its position's angle."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
