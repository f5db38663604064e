"""What PyTorch's operators do, done faster on a CPU: products, norms, attention in training.

`Linear.pack` changes where the numbers of a weight lie, not the numbers: what is trained and what
is saved is the plain weight. There are two layouts, by size:

- small float32 matrices are transposed in memory: there a call costs more than its work;
- larger ones, and all in bfloat16, are packed by oneDNN, which takes about as long for a few rows
  as for one, and gives a row the same bits however many rows there are. How oneDNN cuts a long sum
  would depend on the number of rows: such a sum is cut here first, always in the same way.

Plain float32 products (MKL's) have the same bits for any number of rows from ROWS on. Passes of a
model that holds some are padded to a multiple of ROWS positions (`Llama.pack`).
"""

import math
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROWS = 4  # the fewest rows that MKL multiplies as it does many
SMALL = 2**18  # weights in float32; below, transposed is faster than packed
NARROW = 16  # outputs; with fewer, transposed gives a row other bits in another place
LONGEST = 1024  # terms in a sum that oneDNN does not cut


class Linear(nn.Linear):
    """x @ weight.T, without a bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.turned: Tensor | None = None  # a small weight's transpose, as it lies in memory
        self.packed: list[Tensor] = []  # in oneDNN's own layout, for `block` inputs each
        self.block = -(-inputs // -(-inputs // LONGEST))  # equal parts of at most LONGEST

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if self.turned is not None and torch.is_inference_mode_enabled():
            return x @ self.turned  # as F.linear, which turns the weight at each call
        if not self.packed:
            return F.linear(x, self.weight)
        if len(self.packed) == 1:
            return product(x, self.packed[0])
        (part, weight), *others = zip(x.split(self.block, dim=-1), self.packed)
        y = product(part, weight)
        for part, weight in others:
            y = product(part, weight, y)
        return y

    def pack(self, keep: bool = False) -> bool:
        """Take the fastest layout for inference; whether any number of rows gives the same bits.

        keep: someone else reads the plain weight too, which otherwise is let go.
        """
        if self.packed:
            return True
        weight = self.weight.detach()
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return weight.device.type != "cpu" or weight.dtype != torch.float64
        if weight.dtype == torch.float32 and weight.numel() < SMALL:
            if len(weight) >= NARROW and not keep:
                self.turned = weight.t().contiguous()
                self.weight.data = self.turned.t()
            return False
        if not can_pack(weight.dtype):
            return weight.dtype != torch.float32
        self.packed = [packed(part) for part in weight.split(self.block, dim=1)]
        if not keep:  # the Parameter stays, empty: an optimizer may hold it
            self.weight.data = weight.new_empty(0)
        return True

    def dense(self) -> Tensor:
        """The plain weight (outputs, inputs)."""
        if self.weight.numel():
            return self.weight.detach().contiguous()
        return torch.cat([part.to_dense() for part in self.packed], dim=1)

    def unpack(self) -> None:
        self.weight.data = self.dense()
        self.turned, self.packed = None, []

    def __getstate__(self) -> dict:
        """What a copy is made of: the plain weight, since oneDNN's own layout cannot be copied."""
        state = {**self.__dict__, "turned": None, "packed": []}
        if not self.weight.numel():
            weight = nn.Parameter(self.dense(), self.weight.requires_grad)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def train(self, mode: bool = True) -> "Linear":
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # another device or dtype has another layout
        self.unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self.unpack()
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        plain = keep_vars and self.weight.numel()
        destination[prefix + "weight"] = self.weight if plain else self.dense()

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.nbytes for part in self.packed) or self.weight.nbytes


def product(x: Tensor, weight: Tensor, to: Tensor | None = None) -> Tensor:
    """x times a packed weight, added to `to` if that is given."""
    if to is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, to, weight, None, "add")


def packed(weight: Tensor) -> Tensor:
    with torch.inference_mode(False):  # so that its gradient-free product may stand in a graph
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's packed products in this dtype."""
    try:
        product(torch.eye(4, dtype=dtype), packed(torch.eye(4, dtype=dtype)))
        return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    Packed, by four operators in place of PyTorch's eight: in a small model calls set the pace.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.packed: tuple[Tensor, Tensor] | None = None  # sqrt(D) * weight, sqrt(D * eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(x)
        weight, least = self.packed  # both in float32 at least
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=least.dtype)
        y = x * weight / torch.hypot(size, least)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # an idle `to` costs a call

    def pack(self) -> None:
        if self.weight.device.type != "cpu":
            return
        weight = self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32))
        D = len(weight)
        self.packed = weight * math.sqrt(D), weight.new_tensor(math.sqrt(D * (self.eps or 0.0)))

    def _load_from_state_dict(self, *args):
        self.packed = None
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> "RMSNorm":
        self.packed = None if mode else self.packed
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.packed = None
        return super()._apply(fn, recurse)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, size: int = 128) -> Tensor:
    """Causal attention (B, N, H, E) of queries (B, N, H, E) to keys and values (B, G, N, E).

    In plain products, `size` queries at a time with the keys up to the last of them: to train on a
    CPU, compiled, this takes half as long as PyTorch's fused kernel and its gradient.
    """
    (B, N, H, E), G = q.shape, k.shape[1]
    q, blocks = (q.transpose(1, 2) * E**-0.5).reshape(B, G, H // G, N, E), []
    for start in range(0, N, size):
        stop = min(start + size, N)
        scores = q[:, :, :, start:stop].reshape(B, G, -1, E) @ k[:, :, :stop].transpose(2, 3)
        ahead = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        scores = scores.view(B, G, -1, stop - start, stop).masked_fill(ahead, -math.inf)
        weights = scores.softmax(-1).view(B, G, -1, stop)  # (B, G, H/G * n, stop)
        blocks.append((weights @ v[:, :, :stop]).view(B, H, stop - start, E))
    return torch.cat(blocks, 2).transpose(1, 2)
