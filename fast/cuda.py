"""The fixed step: every pass has the same shape, and on CUDA is one captured graph.

The plain step runs exactly the positions that a segment has not processed. On a GPU that has two
disadvantages. The host has to launch some twenty small kernels per layer. And the kernels that a
library picks for one width round differently from those for another, so that in bfloat16 a token
can depend on how many drafts were checked in the same pass. Here a pass always holds WIDTH
positions, and missing ones are padded. Then

- the result at a position does not depend on the others in the pass: all ladders give the same
  bits;
- the same kernels run on the same addresses whenever a segment is run, so that CUDA can record them
  once and replay them with one launch. The operations between two attentions are compiled first.

The number of keys that a position sees changes its bits too, and a pass may begin anywhere. So
after the prompt all passes of a generation see the same number of keys: KEYS, or the power of two
that holds its text. Keys after a position are masked. The prompt is read in passes of PROMPT
positions, each of which sees the keys up to its own end, so these are the same for every ladder.

On a CPU nothing is captured, and padding costs more than it gains; there the step serves for tests.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hispec
import model as plain
from fast.cpu import ExitHead
from fast.layers import WIDTH, Cache, ChunkPlan, Layer, RoPE, mask
from fast.modules import replaced
from kvcache import KVCache
from model import Llama

PROMPT = 256  # positions in a pass over the prompt, which nobody wants to wait for
KEYS = 512  # that a pass behind the prompt sees at least: so most texts share their graphs
GRAPHS = 256  # captured passes that are kept: the oldest go first
# a mask rules the first out, odd shapes the second; cuDNN's plans depend on the number of keys
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FixedStep(hispec.Step):
    """A step for every ladder of one model, on one cache; one generation at a time can use it.

    max_len: the longest sequence, prompt included, in tokens. compiled: whether layers are compiled
    before they are captured, which takes some seconds once. fused: whether passes behind the prompt
    run all layers of a segment by one kernel; ValueError if the model does not fit it.
    """

    name = "fixed"

    def __init__(self, model: Llama, max_len: int, compiled: bool = True, fused: bool = False):
        super().__init__(model)
        self.max_len, weight, c = max_len, model.embed.weight, model.config
        layer = CompiledLayer if compiled and weight.is_cuda else Layer
        kinds = KINDS | dict.fromkeys((plain.Layer, Layer), layer)
        if fused:
            from fast.kernels import FusedLlama, check_fits

            check_fits(model)
            kinds[Llama] = FusedLlama
        self.variant: Any = replaced(model, kinds)
        variant: Any = self.variant
        for head in variant.modules():
            if isinstance(head, ExitHead):
                head.gather(variant.head)
        self.modules = list(model.modules())
        # padded positions write too: a pass that begins at the last position needs room behind it
        drafts = bool(len(model.draft_heads)) * c.n_layers
        self.cache = ReusedCache(model, model.blocks, max_len + PROMPT, 1, drafts)
        self.end = KEYS  # how many keys a pass behind the prompt sees
        self.first = torch.zeros(1, dtype=torch.long, device=weight.device)  # where a pass begins
        self.ids = self.first.new_zeros(PROMPT)  # and the tokens there
        self.states = weight.new_zeros(PROMPT, c.dim)  # what a segment leaves for the head
        self.out = weight.new_zeros(PROMPT, c.vocab_size)  # the head's logits
        self.captured: dict[tuple, Callable] = {}
        self.addresses: list[int] = []  # of the weights that captured passes read
        self.pool: Any = None  # on CUDA what all captures share
        self.stream: Any = None
        if weight.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(weight.device)
        self.busy = threading.Lock()

    @contextmanager
    def open(self, exits: tuple[int, ...], max_len: int, draft_head: int = 0) -> Iterator[KVCache]:
        """Lend the cache, emptied, for a sequence of at most max_len tokens.

        Raises ValueError if the model has changed, or another generation is using the step.
        """
        weight, keys = self.model.embed.weight, self.cache.keys
        same = weight.dtype == keys.dtype and weight.device == keys.device
        moved = self.addresses and self.addresses != addresses(self.model)
        if moved or not same or list(self.model.modules()) != self.modules:
            raise ValueError("the model has moved, or got another dtype or other exit heads since")
        if max_len > self.max_len:
            raise ValueError(
                f"the step was made for at most {self.max_len} tokens, this may take {max_len}"
            )
        if not self.busy.acquire(blocking=False):
            raise ValueError("the step is in use: one generation at a time, or a step for each")
        try:
            self.cache.empty(exits, draft_head)
            self.end = min(max(KEYS, power_of_two(max_len)), len(self.cache.columns))
            with torch.cuda.device_of(self.first), sdpa_kernel(KERNELS):
                yield self.cache
        finally:
            self.busy.release()

    def run(self, cache: KVCache, tokens: Tensor, length: int, k: int, n: int) -> Tensor:
        for j in range(k):
            for _ in self.passes(cache, tokens, j, length):
                pass  # its states stay in the cache
        logits = []
        for first, last, width in self.passes(cache, tokens, k, length):
            if last > length - n:
                self.replay(width, cache.depths[k])
                # a copy, since the next replay overwrites it
                logits.append(self.out[max(0, length - n - first) : last - first].clone())
        return torch.cat(logits)

    def segment(self, cache: KVCache, tokens: Tensor, j: int, length: int) -> Tensor:
        made = self.passes(cache, tokens, j, length)
        states = [self.states[: last - first].clone() for first, last, _ in made]
        return torch.cat(states) if states else self.states[:0]

    def logits(self, states: Tensor, depth: int) -> Tensor:
        logits = []
        for some in states.split(WIDTH):
            self.states[: len(some)] = some
            self.replay(WIDTH, depth)
            logits.append(self.out[: len(some)].clone())
        return torch.cat(logits)

    def draft(
        self, cache: KVCache, exit: int, states: Tensor, tokens: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        for at in range(0, len(tokens), WIDTH):
            n = min(WIDTH, len(tokens) - at)
            self.first.fill_(first + at)
            self.ids[:n] = tokens[at : at + n]
            self.states[:n] = states[0, at : at + n]
            self.replay(WIDTH, exit, self.end)
        self.replay(WIDTH, -exit)
        return self.states[None, n - 1 : n].clone(), self.out[n - 1 : n].clone()

    def passes(
        self, cache: KVCache, tokens: Tensor, j: int, length: int
    ) -> Iterator[tuple[int, int, int]]:
        """Run segment j pass by pass: each leaves its states for positions first .. last-1.

        A pass holds at most `width` positions, and all of them see the keys 0 .. end-1.
        """
        start, depth = (0, *cache.depths)[j : j + 2]
        first, begun = cache.lengths[j], cache.lengths[j] > 0
        width = WIDTH if begun else PROMPT
        while depth > 0 and first < length:
            last = min(first + width, length)
            self.first.fill_(first)
            ids = tokens[first : first + width]
            self.ids[: len(ids)] = ids
            self.replay(width, start, depth, self.end if begun else first + PROMPT)
            yield first, last, width
            first = last
        cache.advance(j, length)

    def replay(self, *key: int) -> None:
        """A pass (width, start, depth, end) through a segment, (width, exit, end) through the draft
        head on an exit, (width, depth) through a head, or (width, -exit) through a draft head's.

        Only while the cache is lent: its exits say what a segment has to leave there.
        """
        kinds: dict[int, Callable] = {2: self._head, 3: self._draft, 4: self._segment}
        self.launch(key, partial(kinds[len(key)], *key))

    def launch(self, key: tuple, work: Callable[[], None]) -> None:
        """Do `work`. On CUDA, replay the graph that was captured for this key, or capture it."""
        if key not in self.captured:
            if len(self.captured) == GRAPHS:
                del self.captured[next(iter(self.captured))]
            self.captured[key] = self.capture(work) if self.pool else work
        self.captured[key]()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture `work` as a CUDA graph, and return what replays it on the same tensors."""
        states = self.states.clone()  # a draft head's pass writes over the states that it reads
        self.stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            for _ in range(3):  # first aside: compilers and libraries set themselves up
                work()
        torch.cuda.current_stream().wait_stream(self.stream)
        mode = "thread_local"  # other threads may allocate meanwhile
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
            work()
        self.states.copy_(states)  # to warm up, the work has been done
        # a graph holds addresses, not tensors: what it reads and writes has to be kept
        self.addresses = addresses(self.model)
        rows = [head.rows for head in self.variant.modules() if isinstance(head, ExitHead)]
        held = [value for name, value in vars(self).items() if name != "captured"]
        held += [self.variant.rope.table, *rows]

        def replay(held=held) -> None:
            graph.replay()

        return replay

    def plan(self, first: Tensor, width: int, end: int) -> ChunkPlan:
        """Return the plan of `width` positions from first (1,) on, with the keys before `end`."""
        cache, positions = self.cache, first + self.cache.columns[:width]
        masked = mask(positions, cache.columns[:end], cache.group, cache.keys)
        return ChunkPlan(cache, positions, [(width, cache.before(end)[0], masked)])

    def _segment(self, width: int, start: int, depth: int, end: int) -> None:
        plan = self.plan(self.first, width, end)
        self.states[:width] = hispec.run_plan(self.variant, plan, self.ids[:width], start, depth)

    def _draft(self, width: int, exit: int, end: int) -> None:
        plan, states = self.plan(self.first, width, end), self.states[None, :width]
        self.states[:width] = self.variant.draft(exit, states, self.ids[None, :width], plan)[0]

    def _head(self, width: int, depth: int) -> None:
        h, model = self.states[:width], self.variant
        self.out[:width] = model.logits(h, depth) if depth > 0 else model.draft_logits(h, -depth)


class ReusedCache(Cache):
    """A cache at the same addresses for one text after another, whatever their ladders."""

    def empty(self, exits: tuple[int, ...], draft_head: int) -> None:
        """Make ready for another text and ladder: nothing of an earlier one is left.

        Not even a NaN, which no mask would hide: 0 x NaN is NaN. An exit whose head owns a block
        has to be among those the cache was made for.
        """
        for t in (self.keys, self.values, *self.hidden.values()):
            t.zero_()
        room, n_layers = len(self.columns), self.depths[-1]
        for exit in (*exits, draft_head):
            if exit > 0 and exit not in self.hidden:
                self.hidden[exit] = self.keys.new_zeros(1, room, self.dim)
        self.depths = (*exits, n_layers)
        self.lengths = [0] * len(self.depths)
        self.processed = [0] * len(self.depths)


class CompiledLayer(Layer):
    """A layer whose parts around attention are compiled: a program for each width."""

    def before(self, h: Tensor, signed: plain.Rope) -> tuple[Tensor, Tensor, Tensor]:
        return compiled("before")(self, h, signed)

    def after(self, h: Tensor, y: Tensor) -> Tensor:
        return compiled("after")(self, h, y)


@cache
def compiled(name: str, backend: str | Callable = "inductor") -> Callable:
    """Return a method of Layer, compiled. It is compiled only when needed: this takes seconds."""
    return torch.compile(getattr(Layer, name), dynamic=False, fullgraph=True, backend=backend)


def addresses(model: Llama) -> list[int]:
    """Where the weights lie: a model that is moved, even there and back, lies elsewhere."""
    return [weight.data_ptr() for weight in model.parameters()]


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


KINDS: dict[type, type] = {plain.RoPE: RoPE, plain.ExitHead: ExitHead}
