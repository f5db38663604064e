"""One model shared by several processes: tensor parallelism (arXiv 1909.08053).

Each process holds some of the heads, with their keys and values, part of the feed-forward, and some
rows of the embedding and of the output matrix; all hold the norms. In a layer the processes add up
the outputs of attention and of the feed-forward; after the output matrix they gather logits. A
process's part is a `Llama` of its own, with fewer heads and a narrower feed-forward, so the cache
and the plain step need no change.

    torchrun --nproc_per_node=2 bench.py        ranks = start(); load(name, ranks=ranks)

All processes have to make the same calls in the same order, and for that the same decisions. These
depend only on logits and random numbers: each logit is computed by one process and copied to all,
and `start` gives them all one seed. This is for inference only: no gradient passes between
processes.

torch.distributed carries the sums. PyTorch's parallelize_module is not used, since it cuts a fused
matrix (queries, keys and values, or gate and up) straight through, and heads only into equal parts.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import model as plain
from fast.modules import replaced
from model import Config

TIMEOUT = timedelta(minutes=10)  # how long to wait for another process, which may still be loading


def start(device: str | None = None, timeout: timedelta = TIMEOUT) -> "Ranks | None":
    """Join the processes that torchrun has started; None if this one is alone.

    device: cpu or cuda; default: a GPU for each process if there are any. From then on only rank 0
    prints. Raises ValueError if there are fewer GPUs than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(f"a GPU for each process: there are {torch.cuda.device_count()}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    with _others():
        dist.init_process_group("nccl" if device != "cpu" else "gloo", timeout=timeout)
        atexit.register(dist.destroy_process_group)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
        seed = torch.randint(2**63 - 1, (1,)).to(device)
        dist.broadcast(seed, 0)
    torch.manual_seed(int(seed))
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end
    return ranks


class Ranks:
    """The processes that share a model, numbered 0 .. size-1, and which of them this one is."""

    whole: Config  # the whole model's shape, known once `share` has been called

    def __init__(self, rank: int, size: int, device: str = "cpu"):
        self.rank, self.size, self.device = rank, size, device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    # ---- who holds what -------------------------------------------------------------------------

    def span(self, n: int, rank: int | None = None) -> tuple[int, int]:
        """Which of n items, first to stop, belong to this process, or to the given rank."""
        rank = self.rank if rank is None else rank
        return n * rank // self.size, n * (rank + 1) // self.size

    def heads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Which query heads and which key/value heads belong to this process, first to stop.

        Query heads go with their key/value head. If there are more processes than key/value heads,
        several processes hold the same one and divide its query heads.
        """
        kv_heads = self.whole.n_kv_heads
        group = self.whole.n_heads // kv_heads
        if self.size <= kv_heads:
            first, stop = self.span(kv_heads)
            return (first * group, stop * group), (first, stop)
        held = [rank * kv_heads // self.size for rank in range(self.size)]  # by each process
        head = held[self.rank]
        first, stop = Ranks(self.rank - held.index(head), held.count(head)).span(group)
        return (head * group + first, head * group + stop), (head, head + 1)

    def cut(self, name: str, parts: Sequence) -> list[Tensor]:
        """This process's rows or columns of the model's parameter of this name.

        parts: the tensors that form the parameter's rows (q, k and v; gate and up; else only one),
        or slices of a safetensors file, of which only the needed part is read.
        """
        c = self.whole
        q, kv = ((a * c.head_dim, b * c.head_dim) for a, b in self.heads())
        ffn, vocab = self.span(c.ffn_dim), self.span(c.vocab_size)
        rows = {"attn.qkv": [q, kv, kv], "mlp.gate_up": [ffn, ffn]}
        rows |= {"embed": [vocab], "head": [vocab]}
        columns = {"attn.out": q, "mlp.down": ffn}
        kind = name.rpartition(".")[0]
        kind = kind if kind in rows else ".".join(kind.split(".")[-2:])
        if kind in columns:
            first, stop = columns[kind]
            return [part[:, first:stop] for part in parts]
        if kind in rows:
            return [part[first:stop] for part, (first, stop) in zip(parts, rows[kind], strict=True)]
        return [part[:] for part in parts]

    def share(self, model: plain.Llama) -> plain.Llama:
        """This process's part of a model, which is consumed. ValueError if not all get a part."""
        c = self.whole = model.config
        group, holders = c.n_heads // c.n_kv_heads, -(-self.size // c.n_kv_heads)
        if self.size > min(c.ffn_dim, c.vocab_size) or holders > group:
            raise ValueError(
                f"{self.size} processes are too many for {c.n_heads} heads on {c.n_kv_heads} of "
                f"keys and values, a feed-forward of {c.ffn_dim} and {c.vocab_size} tokens"
            )
        part: Any = self.share_layers(model)
        (q, q_stop), (kv, kv_stop) = self.heads()
        ffn, ffn_stop = self.span(c.ffn_dim)
        part.config = replace(
            c, n_heads=q_stop - q, n_kv_heads=kv_stop - kv, ffn_dim=ffn_stop - ffn
        )
        part.embed = Embedding(self, *self.cut("embed.weight", [model.embed.weight]))
        part.head = Head(self, *self.cut("head.weight", [model.head.weight]))
        if c.tie_embeddings:
            part.head.weight = part.embed.weight
        return part

    def share_layers(self, module: nn.Module) -> nn.Module:
        """This process's part of the layers in a module (as an exit's head), which is consumed."""
        module = replaced(module, {plain.ExitHead: ExitHead})
        (q, q_stop), (kv, kv_stop) = self.heads()
        for part in module.modules():
            if isinstance(part, plain.Attention):
                E, H, G = part.head_dim, part.heads, part.kv_heads
                for name, rows in part.qkv.named_parameters():
                    cut = self.cut(f"attn.qkv.{name}", rows.detach().split([H * E, G * E, G * E]))
                    setattr(part.qkv, name, fixed(torch.cat(cut)))
                part.out = Summed(self, *self.cut("attn.out.weight", [part.out.weight]))
                part.heads, part.kv_heads = q_stop - q, kv_stop - kv
            elif isinstance(part, plain.SwiGLU):
                first, stop = self.span(part.down.in_features)  # an exit's own may be narrower
                gate, up = part.gate_up.weight.detach().chunk(2)
                part.gate_up.weight = fixed(torch.cat([gate[first:stop], up[first:stop]]))
                part.down = Summed(self, part.down.weight[:, first:stop])
            elif isinstance(part, ExitHead):
                part.ranks = self
        return module

    # ---- communication --------------------------------------------------------------------------

    def sum(self, t: Tensor) -> Tensor:
        """All processes' tensors of this shape, added up in place."""
        with _others():
            dist.all_reduce(t)
        return t

    def gather(self, t: Tensor, n: int) -> Tensor:
        """All processes' parts (..., span(n)) side by side: (..., n), the same bits for all."""
        widths = [stop - first for first, stop in (self.span(n, rank) for rank in range(self.size))]
        t = F.pad(t, (0, max(widths) - t.shape[-1])).contiguous()  # all of one shape
        parts = [torch.empty_like(t) for _ in widths]
        with _others():
            dist.all_gather(parts, t)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths)], dim=-1)


@contextmanager
def _others() -> Iterator[None]:
    """Reports in one line that another process has ended, or has not answered for too long."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # without advice
        raise ConnectionError(f"no answer from another of the model's processes ({why})") from error


class Summed(nn.Linear):
    """A product whose inputs are divided: each process has some terms of every sum."""

    def __init__(self, ranks: Ranks, weight: Tensor):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.ranks, self.weight = ranks, fixed(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.sum(F.linear(x, self.weight))


class Embedding(nn.Embedding):
    """An embedding whose rows are divided: one process has a token's row, and the others add 0."""

    def __init__(self, ranks: Ranks, weight: Tensor):
        super().__init__(weight.shape[0], weight.shape[1], device="meta")
        self.ranks, self.weight = ranks, fixed(weight)

    def forward(self, ids: Tensor) -> Tensor:
        row = ids - self.ranks.span(self.ranks.whole.vocab_size)[0]
        others = (row < 0) | (row >= len(self.weight))
        h = F.embedding(row.masked_fill(others, 0), self.weight)
        return self.ranks.sum(h.masked_fill(others.unsqueeze(-1), 0))


class Head(nn.Linear):
    """An output layer whose rows are divided; every process gets all logits (..., V)."""

    def __init__(self, ranks: Ranks, weight: Tensor):
        super().__init__(weight.shape[1], ranks.whole.vocab_size, bias=False, device="meta")
        self.ranks, self.weight = ranks, fixed(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.gather(F.linear(x, self.weight), self.out_features)


class ExitHead(plain.ExitHead):
    """An exit's head that reads the rows of its `vocab` from the divided output layer."""

    ranks: Ranks

    def known(self, h: Tensor, head: nn.Linear) -> Tensor:
        if self.vocab is None:
            return head(self.norm(h))
        first, stop = self.ranks.span(head.out_features)
        mine = ((self.vocab >= first) & (self.vocab < stop)).nonzero().squeeze(1)
        some = F.linear(self.norm(h), head.weight[self.vocab[mine] - first])
        # only one process has a number here and all others have 0, so the sum has the same bits
        known = some.new_zeros(*some.shape[:-1], len(self.vocab))
        return self.ranks.sum(known.index_copy(-1, mine, some))


def fixed(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach().contiguous(), requires_grad=False)
