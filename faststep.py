"""The fast step: every pass has the same shape, and on CUDA is one captured graph.

`hispec.step` sends as many positions through a segment as there are. A GPU dislikes that twice: the
host has to launch some twenty small kernels a layer, and the kernels that a library picks for one
width round differently from those it picks for another, so that in bfloat16 a token can depend on
how many drafts were checked beside it. Here a pass always holds WIDTH positions, the missing ones
padded. Then

- what a position yields does not depend on its company: all ladders give the same bits;
- the same kernels run on the same addresses whenever a segment is run, so that CUDA can record them
  once and replay them with one launch; what stands between two attentions is compiled first.

The prompt is read so too, in passes of PROMPT positions, which are the same whatever the ladder.
The loop in hispec.py does not change: `generate(fast=...)` calls a `FixedStep` in place of its
`step`. On a CPU nothing is captured, and padding costs more than it brings: there it serves for
tests.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcache import CHUNK, KVCache
from model import Layer, Llama

WIDTH = 16  # positions in a pass: on a GPU one position is hardly cheaper than sixteen
PROMPT = 256  # and in a pass over the prompt, which nobody wants to wait for
GRAPHS = 256  # captured passes that are kept: the oldest go first
# a mask rules the first out, odd shapes the second; cuDNN's plans depend on the number of keys
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FixedStep:
    """A step for every ladder of one model, on one cache; one generation at a time can use it.

    max_len: the longest sequence, prompt included, in tokens. compiled: whether layers are compiled
    before they are captured, which takes some seconds once.
    """

    def __init__(self, model: Llama, max_len: int, compiled: bool = True):
        self.model, self.max_len = model, max_len
        self.parts = compiled_parts() if compiled else {}
        weight, c = model.embed.weight, model.config
        # padded positions write too: a pass that begins at the last position needs room behind it
        self.cache = KVCache(model, model.blocks, max_len + PROMPT)
        self.first = torch.zeros(1, dtype=torch.long, device=weight.device)  # where a pass begins
        self.ids = self.first.new_zeros(PROMPT)  # and the tokens there
        self.states = weight.new_zeros(PROMPT, c.dim)  # what a segment leaves for the head
        self.out = weight.new_zeros(PROMPT, c.vocab_size)  # the head's logits
        self.captured: dict[tuple[int, ...], Callable] = {}
        self.pool: Any = None  # on CUDA what all captures share
        self.stream: Any = None
        if weight.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(weight.device)
        self.busy = threading.Lock()

    @contextmanager
    def open(self, model: Llama, exits: tuple[int, ...], limit: int) -> Iterator[KVCache]:
        """Lend the cache, emptied, for a sequence of at most `limit` tokens.

        Raises ValueError if this step is not made for it, or another generation is using it.
        """
        if model is not self.model:
            raise ValueError("the step was made for another model")
        weight, keys = model.embed.weight, self.cache.keys
        if weight.dtype != keys.dtype or not {*model.blocks} <= self.cache.slots.keys():
            raise ValueError("the model has got another dtype or other exit heads since")
        if limit > self.max_len:
            raise ValueError(
                f"the step was made for at most {self.max_len} tokens, this may take {limit}"
            )
        if not self.busy.acquire(blocking=False):
            raise ValueError("the step is in use: one generation at a time, or a step for each")
        try:
            self.cache.open(exits)
            with torch.cuda.device_of(self.first), sdpa_kernel(KERNELS):
                yield self.cache
        finally:
            self.busy.release()

    def __call__(
        self, model: Llama, cache: KVCache, depths, tokens: Tensor, length: int, k: int, rows: int
    ) -> Tensor:
        """As `hispec.step`: run segments 0..k over every position < length that each has not seen.

        Returns level k's logits (rows, V) at positions length-rows .. length-1.
        """
        logits = []
        for j, (start, depth) in enumerate(zip((0, *depths), depths[: k + 1])):
            for first, last, width, end in self.passes(cache, j, length) if depth > 0 else ():
                self.first.fill_(first)
                ids = tokens[first : first + width]
                self.ids[: len(ids)] = ids
                self.run(width, start, depth, end)
                if j == k and last > length - rows:
                    self.run(width, depth)
                    # a copy, since the next replay overwrites it
                    logits.append(self.out[max(0, length - rows - first) : last - first].clone())
            cache.lengths[j] = length
        return torch.cat(logits)

    def passes(
        self, cache: KVCache, segment: int, length: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """A segment's passes over positions first .. last-1, their widths, the keys they see.

        A pass holds at most `width` positions, and all of them see the keys 0 .. end-1.
        """
        first = cache.lengths[segment]
        width, span = (WIDTH, CHUNK) if first else (PROMPT, PROMPT)
        while first < length:
            end = (first // span + 1) * span
            last = min(first + width, end, length)
            yield first, last, width, end
            first = last

    def run(self, *key: int) -> None:
        """A pass (width, start, depth, end) through a segment, or (width, depth) through a head.

        Only while the cache is lent: its exits say what a segment has to leave there.
        """
        if key not in self.captured:
            work = partial(self._head if len(key) == 2 else self._segment, *key)
            if len(self.captured) == GRAPHS:
                del self.captured[next(iter(self.captured))]
            self.captured[key] = self.capture(work) if self.pool else work
        self.captured[key]()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a CUDA graph, replayed on the tensors it was captured with."""
        self.stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        known = inspect.signature(torch.cuda.graph.__init__).parameters
        checks: dict[str, Any] = (
            {"check_input_liveness": True} if "check_input_liveness" in known else {}
        )
        with replaced(self.model, self.parts) if self.parts else nullcontext():
            with torch.cuda.stream(self.stream):
                for _ in range(3):  # first aside: compilers and libraries set themselves up
                    work()
            torch.cuda.current_stream().wait_stream(self.stream)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, **checks):
                work()
        # a graph holds addresses, not tensors: what it reads and writes has to be kept
        rows = [head._rows for head in self.model.exit_heads.values()]
        held = [self.cache, self.first, self.ids, self.states, self.out, self.model]
        held += [self.model._rope_table, *rows]

        def replay(held=held) -> None:
            graph.replay()

        return replay

    def _segment(self, width: int, start: int, depth: int, end: int) -> None:
        self.cache.begin(self.first + self.cache.columns[:width], [(width, end)])
        self.states[:width] = self.cache.run(self.model, self.ids[:width], start, depth)

    def _head(self, width: int, depth: int) -> None:
        self.out[:width] = self.model.logits(self.states[:width], depth)


def compiled_parts(backend: str | Callable = "inductor") -> dict[str, Callable]:
    """What a layer does before and after attention, compiled: a program for each width."""
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    return {name: compiled(getattr(Layer, name)) for name in ("before", "after")}


@contextmanager
def replaced(model: Llama, parts: dict[str, Callable]) -> Iterator[None]:
    """While open, every layer, exits' blocks among them, runs these parts in place of its own."""
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    for layer in layers:
        layer.__dict__.update({name: partial(part, layer) for name, part in parts.items()})
    try:
        yield
    finally:
        for layer in layers:
            for name in parts:
                del layer.__dict__[name]
