"""Faster products and norms for a model on a CPU.

`Linear.pack` changes where a weight's numbers lie, not the numbers: the plain weight is what is
trained and saved. There are two layouts, by size:

- Small float32 matrices are transposed in memory: for them a call costs more than its work.
- Larger ones, and all in bfloat16, are packed by oneDNN, which takes about as long for a few rows
  as for one, and gives a row the same bits however many rows there are. How oneDNN splits a long
  sum would depend on the number of rows, so such a sum is split here first, always the same way.

Plain float32 products (MKL's) give the same bits for any number of rows from ROWS on, if the rows
begin at multiples of 16 bytes. If a model has such products, its passes are padded to a multiple of
ROWS positions (`PackedStep`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hispec
import model as plain
from fast.layers import Cache, Layer, RoPE
from fast.modules import replaced
from kvcache import KVCache
from model import Llama

ROWS = 4  # the fewest rows that MKL multiplies in the same way as many
SMALL = 2**18  # float32 matrices with fewer weights are faster transposed than packed
NARROW = 16  # with fewer outputs than this, a transposed row's bits depend on its place
LONGEST = 1024  # the most terms in a sum that oneDNN does not split


def prepare(model: Llama) -> "PackedStep":
    """Pack a model on a CPU for inference, in place; `generate` then uses the step returned.

    train(), to() and load_state_dict() undo the packing, and another call of this packs again. A
    change of a weight in place is not noticed.
    """
    pack(model.eval())
    model.fast = PackedStep(model)
    return model.fast


@torch.inference_mode(False)  # a gradient may pass through the tensors made here
def pack(model: Llama) -> None:
    """Put the modules below in place of plain ones, and pack them, unless the model trains."""
    model._modules = replaced(model, KINDS)._modules
    for module in [] if model.training else model.modules():
        if isinstance(module, ExitHead):
            module.gather(model.head)
        elif isinstance(module, Linear):
            # the embedding still reads the plain matrix
            module.pack(keep=model.config.tie_embeddings and module is model.head)
        elif isinstance(module, RMSNorm):
            module.pack()


class PackedStep(hispec.Step):
    """The plain step over packed weights, on a cache that gives the same bits at every width."""

    name = "packed"

    def __init__(self, model: Llama):
        super().__init__(model)
        self.pad = self.pad_outputs = 1  # rows of layers' passes, and of output products

    @contextmanager
    def open(self, exits: tuple[int, ...], max_len: int, draft_head: int = 0) -> Iterator[KVCache]:
        if any(type(module) in KINDS for module in self.model.modules()):  # new heads
            pack(self.model)
        modules: list[Any] = list(self.model.modules())
        linears = [m for m in modules if isinstance(m, Linear)]
        heads = [m for m in modules if isinstance(m, ExitHead)]
        outputs: list[Any] = [self.model.head, *(rows for head in heads for rows in head.rows)]
        self.pad, self.pad_outputs = multiple([*linears, *outputs]), multiple(outputs)
        yield Cache(self.model, exits, max_len, self.pad, draft_head)

    def segment(self, cache: KVCache, tokens: Tensor, j: int, length: int) -> Tensor:
        new = length - cache.lengths[j]  # after them comes padding
        return super().segment(cache, tokens, j, length)[:new]

    def logits(self, states: Tensor, depth: int) -> Tensor:
        n = len(states)
        return super().logits(F.pad(states, (0, 0, 0, -n % self.pad_outputs)), depth)[:n]

    def draft(
        self, cache: KVCache, exit: int, states: Tensor, tokens: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        n, plan = len(tokens), cache.plan(first, first + len(tokens))
        padding = len(plan.slots) - n
        states, tokens = F.pad(states, (0, 0, 0, padding)), F.pad(tokens, (0, padding))
        h = self.model.draft(exit, states, tokens[None], plan)[:, n - 1 : n]
        rows = F.pad(h, (0, 0, 0, self.pad_outputs - 1))
        return h, self.model.draft_logits(rows, exit)[0, :1]


def multiple(linears: Sequence["Linear"]) -> int:
    """Inputs padded to a multiple of this many rows get the same bits from these products."""
    return 1 if all(linear.same_bits for linear in linears) else ROWS


class Packed(nn.Module):
    """A module with another memory layout for inference, until it is trained, moved or loaded."""

    def unpack(self) -> None:
        raise NotImplementedError

    def train(self, mode: bool = True):
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # another device or dtype has another layout
        self.unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self.unpack()
        super()._load_from_state_dict(*args)


class Linear(Packed, nn.Linear):
    """x @ weight.T, plus the bias if there is one."""

    turned: Tensor | None = None  # a small weight's transpose, contiguous
    packed: Sequence[Tensor] = ()  # in oneDNN's own layout, for `block` inputs each
    block = LONGEST

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        bias = self._parameters["bias"]  # a faster look-up than as an attribute
        if not self.packed:
            turned = self.turned if torch.is_inference_mode_enabled() else None
            # the same as F.linear, which transposes the weight at each call
            y = F.linear(x, self.weight) if turned is None else x @ turned
            return y if bias is None else y + bias
        if len(self.packed) == 1:
            return product(x, self.packed[0], bias)
        (block, weight), *others = zip(x.split(self.block, dim=-1), self.packed)
        y = product(block, weight, bias)
        for block, weight in others:
            y = product(block, weight, to=y)
        return y

    def pack(self, keep: bool = False) -> None:
        """Take the fastest layout for inference.

        keep: another module reads the plain weight too, which is otherwise freed.
        """
        weight = self.weight.detach()
        if self.packed or weight.device.type != "cpu":
            return
        if weight.dtype == torch.float32 and weight.numel() < SMALL:
            if len(weight) >= NARROW and not keep:
                self.turned = weight.t().contiguous()
                self.weight.data = self.turned.t()
        elif weight.dtype in (torch.float32, torch.bfloat16) and can_pack(weight.dtype):
            blocks = -(-self.in_features // LONGEST)
            self.block = -(-self.in_features // blocks)
            self.packed = [packed(block) for block in weight.split(self.block, dim=1)]
            if not keep:  # the Parameter stays, empty: an optimizer may hold it
                self.weight.data = weight.new_empty(0)

    @property
    def same_bits(self) -> bool:
        """Whether any number of rows gives the same bits; if not, any number from ROWS on does."""
        plain = self.weight.dtype in (torch.float32, torch.float64)
        return bool(self.packed) or self.weight.device.type != "cpu" or not plain

    def dense(self) -> Tensor:
        """The plain weight (outputs, inputs)."""
        if self.weight.numel():
            return self.weight.detach().contiguous()
        return torch.cat([block.to_dense() for block in self.packed], dim=1)

    def unpack(self) -> None:
        self.weight.data = self.dense()
        self.turned, self.packed = None, ()

    def __getstate__(self) -> dict:
        """The state to copy, with the plain weight, since oneDNN's layout cannot be copied."""
        state = {**self.__dict__, "turned": None, "packed": ()}
        if not self.weight.numel():
            weight = nn.Parameter(self.dense(), self.weight.requires_grad)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not (keep_vars and self.weight.numel()):
            destination[prefix + "weight"] = self.dense()

    @property
    def nbytes(self) -> int:
        """The bytes that a product reads."""
        return sum(block.nbytes for block in self.packed) or self.weight.nbytes


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, to: Tensor | None = None
) -> Tensor:
    """x times a packed weight, plus a bias or `to`, whichever is given."""
    if to is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, to, weight, None, "add")


def packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's packed products in this dtype."""
    try:
        product(torch.eye(4, dtype=dtype), packed(torch.eye(4, dtype=dtype)))
        return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class RMSNorm(Packed, nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    When packed, it takes four operators instead of PyTorch's eight: in small models calls dominate.
    """

    packed: tuple[Tensor, Tensor] | None = None  # sqrt(D) * weight, sqrt(D * eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(x)
        weight, least = self.packed  # both in float32 at least
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=least.dtype)
        y = x * weight / torch.hypot(size, least)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # even an idle `to` costs a call

    def pack(self) -> None:
        if self.weight.device.type != "cpu" or self.weight.dtype == torch.float64:
            return  # in float64, `hypot` rounds a single number differently from several
        weight = self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32))
        D = len(weight)
        self.packed = weight * math.sqrt(D), weight.new_tensor(math.sqrt(D * (self.eps or 0.0)))

    def unpack(self) -> None:
        self.packed = None


class ExitHead(Packed, plain.ExitHead):
    """An exit's head whose rows of the output matrix are gathered once, and packed."""

    rows: Sequence[Linear] = ()  # in a list, so that they are neither saved nor trained

    def gather(self, head: nn.Linear) -> None:
        """Copy the rows that the exit reads from the output layer."""
        if self.rows or self.vocab is None:
            return
        dense = head.dense() if isinstance(head, Linear) else head.weight.detach()
        rows = Linear(head.in_features, len(self.vocab), bias=False, device="meta")
        rows.weight = nn.Parameter(dense[self.vocab], requires_grad=False)
        rows.pack()
        self.rows = [rows]

    def known(self, h: Tensor, head: nn.Linear) -> Tensor:
        return self.rows[0](self.norm(h)) if self.rows else super().known(h, head)

    def unpack(self) -> None:
        self.rows = ()


KINDS: dict[type, type] = {
    nn.Linear: Linear, nn.RMSNorm: RMSNorm, plain.Layer: Layer, plain.RoPE: RoPE,
    plain.ExitHead: ExitHead,
}  # fmt: skip
