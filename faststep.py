"""The fast step: every pass has the same shape, and on CUDA is one captured graph.

`hispec.step` sends as many positions through a segment as there are. A GPU dislikes that twice: the host has
to launch some twenty small kernels a layer, and the kernels that a library picks for one width round
differently from those it picks for another, so that in bfloat16 a token can depend on how many drafts were
checked beside it. Here a pass always holds WIDTH positions, the missing ones padded, and attention always
reads the whole cache, what lies ahead being masked. Then

- what a position yields does not depend on its company: all ladders give the same bits (tests/test_faststep.py);
- the same kernels run on the same addresses whenever a segment is run, so that CUDA can record them once
  and replay them with one launch.

The loop in hispec.py does not change: it is told to call a `FixedStep` in place of its plain `step`. On a CPU
nothing is captured, and padding costs more than it brings: there it serves to prove the bits equal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcache import KVCache
from model import Llama

WIDTH = 16  # positions in a pass: on a GPU one position is hardly cheaper than sixteen


class FixedCache(KVCache):
    """A KVCache that is written at positions known on the device only, and read whole."""

    def place(self, first: Tensor) -> Tensor:
        """Make first (1,) .. first+WIDTH-1 the positions (WIDTH,) that `write` and `mask` are about."""
        columns = torch.arange(self.max_len, device=first.device)
        self.at = first + columns[:WIDTH]
        self.visible = columns <= self.at[:, None]  # (WIDTH, max_len)
        return self.at

    def write(self, layer: int, start: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (1, G, WIDTH, E) at positions start (WIDTH,); return all the layer's keys and values."""
        self.keys[layer].index_copy_(2, start, k)
        self.values[layer].index_copy_(2, start, v)
        return self.keys[layer], self.values[layer]

    def mask(self, start: Any, n: int) -> Tensor:
        """True (WIDTH, max_len) where a position may look."""
        return self.visible


class FixedStep:
    """A step for one ladder, in place of `hispec.step`, with the cache it works on.

    max_len: the longest sequence, prompt included, in tokens. One generation at a time can use it.
    """

    def __init__(self, model: Llama, exits: Sequence[int], max_len: int):
        self.model, self.exits, self.max_len = model, tuple(exits), max_len
        weight = model.embed.weight
        blocks = tuple(exit for exit in exits if exit in model.blocks)
        # padded positions write too: a pass that begins at the last position needs room behind it
        self.cache = FixedCache(model.config, self.exits, max_len + WIDTH, weight.device, weight.dtype, blocks)
        self.first = torch.zeros(1, dtype=torch.long, device=weight.device)  # what the passes read: where they begin
        self.ids = torch.zeros(1, WIDTH, dtype=torch.long, device=weight.device)  # and the tokens there
        depths = (*self.exits, model.config.n_layers)
        with torch.inference_mode():
            self.segments = [capture(lambda j=j: self._segment(j, depths), weight.device) for j in range(len(depths))]
            self.heads = [capture(lambda depth=depth: self._head(depth), weight.device) for depth in depths]

    def open(self, model: Llama, exits: Sequence[int], limit: int) -> FixedCache:
        """The cache, emptied for a sequence of at most `limit` tokens. ValueError if this step is not made for it."""
        if model is not self.model or tuple(exits) != self.exits:
            raise ValueError(f"the step was made for another model, or for exits {self.exits} and not {tuple(exits)}")
        if limit > self.max_len:
            raise ValueError(f"the step was made for at most {self.max_len} tokens, and this may take {limit}")
        self.cache.rollback(0)
        return self.cache

    def __call__(
        self, model: Llama, cache: KVCache, depths: tuple[int, ...], tokens: Tensor, length: int, k: int, rows: int
    ) -> Tensor:
        """As `hispec.step`: run segments 0..k over every position < length that each has not processed.

        Returns level k's logits (rows, V) at positions length-rows .. length-1.
        """
        for j in range(k + 1):
            for first in range(cache.lengths[j], length, WIDTH):
                self.first.fill_(first)
                if j == 0:
                    new = tokens[first : first + WIDTH]
                    self.ids[0, : len(new)] = new
                self.segments[j]()
            cache.lengths[j] = length
        logits = []
        for first in range(length - rows, length, WIDTH):
            self.first.fill_(first)
            logits.append(self.heads[k]().clone())  # the next replay would overwrite it
        return torch.cat(logits)[:rows]

    def _segment(self, j: int, depths: tuple[int, ...]) -> None:
        cache, above = self.cache, depths[j - 1] if j else 0
        at = cache.place(self.first)
        h = cache.hidden[j - 1].index_select(1, at) if j else self.model.embed(self.ids)  # (1, WIDTH, D)
        h = self.model.run(h, above, depths[j], at, cache)
        cache.hidden[j].index_copy_(1, at, h)
        cache.read.index_copy_(1, at, self.model.read(h, depths[j], at, cache))

    def _head(self, depth: int) -> Tensor:
        return self.model.logits(self.cache.read[0].index_select(0, self.cache.place(self.first)), depth)  # (WIDTH, V)


def capture(run: Callable, device: torch.device) -> Callable:
    """`run` as a CUDA graph, to be replayed on the tensors it was captured with; elsewhere `run` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)  # a few runs first, aside: libraries set themselves up in them
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay():
        graph.replay()
        return out

    return replay
