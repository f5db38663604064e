"""What the parts of a generation cost on this machine, and what a ladder made of them would take.

`measure_costs` times passes by width, `trace` records what every exit says along a greedy text, and
`replay` adds up the steps that a ladder would take along it. The rest says what bounds a generation
(memory, threads) and where its time goes. Which ladders are worth running is not decided here but
in tune.py.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import hispec
from arguments import checked
from faststep import WIDTH, FixedStep
from hispec import Generation, generate, probability, step
from kvcache import KVCache, up_to_chunk
from lookup import look_up
from model import Llama, RMSNorm
from operators import Linear

# positions in a timed pass, up to more than any ladder takes; others in between
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 20)
CONTEXT = 256  # positions before a timed pass: a prompt and half an answer
ROOM = CONTEXT + WIDTH  # what a step must have room for, to be timed

Rungs = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]  # exits, windows, thresholds
ByDepth = dict[int, list[float]]  # seconds, by depth in layers and positions in a pass


@dataclass(frozen=True)
class Costs:
    """Seconds, listed by the number of positions in a pass: 0 .. WIDTHS[-1].

    A segment is charged the difference of two depths: a level that drafts runs the same few layers
    over and over, which stay in the processor's caches, so that its layers are cheaper than a full
    pass's.
    """

    trunk: ByDepth  # of the layers down to each depth, 0 included
    head: ByDepth  # of what comes after an exit: its block, its norm, its output matrix
    doubt: float  # of a step's probability, which a threshold needs
    loop: dict[int, float]  # of a step that ends at each depth, beyond its pass


@torch.inference_mode()
def measure_costs(model: Llama, exits: tuple[int, ...], fast: FixedStep | None) -> Costs:
    """What a ladder of these exits is charged for its passes. fast: if not by the plain step."""
    L, device = model.config.n_layers, model.embed.weight.device
    context = min(CONTEXT, model.config.max_seq_len - WIDTHS[-1])
    timed_passes = partial(fixed_passes, fast) if fast else plain_passes
    trunk, head = timed_passes(model, (*exits, L), context)
    law = checked(model.config, [0], 1, (), (), (), 0.0, 0, 1.0, None, ()).law
    token = torch.zeros(1, dtype=torch.long, device=device)
    row = model.embed.weight.new_zeros(1, model.config.vocab_size)
    doubt = timed(lambda: probability(token, law(row)), device)
    return Costs(trunk, head, doubt, dict.fromkeys(head, 0.0))


def with_loop(
    costs: Costs, traces: list["Trace"], alone: dict[Rungs, list[Generation]], n_layers: int
) -> Costs:
    """The same with what a step costs beyond its pass, by depth, from runs of single exits.

    alone: {ladder: a generation for each trace}, greedy first. What they took longer than their
    passes is the host's work; also, a pass is timed over and over and finds its layers in the
    processor's caches, where in a generation the full model's have been since.
    """
    for ladder, made in alone.items():
        took = sum(g.seconds - g.prefill_seconds for g in made)
        passes = sum(replay(t, ladder, costs, n_layers) for t in traces)
        steps = sum(g.levels[0].calls for g in made) - (len(made) if not ladder[0] else 0)
        depth = (*ladder[0], n_layers)[0]
        beyond = max(0.0, took - passes) / max(1, steps)
        costs = replace(costs, loop=costs.loop | {depth: beyond})
    return costs


def plain_passes(model: Llama, depths: tuple[int, ...], context: int) -> tuple[ByDepth, ByDepth]:
    """Costs.trunk and Costs.head, of passes as wide as they need be."""
    weight, longest = model.embed.weight, WIDTHS[-1]
    cache = KVCache(model, model.blocks, context + longest)
    ids = torch.zeros(1, longest + model.pad, dtype=torch.long, device=weight.device)

    def run_down_to(e: int, n: int) -> Tensor:
        cache.place(context, context + n)
        return model.run(model.embed(ids[:, : len(cache.at)]), 0, e, cache)

    def choose_at(e: int, n: int) -> Tensor:
        cache.place(context, context + n)
        h = model.embed(ids[:, : len(cache.at)])
        return model.logits(model.read(h, e, cache), e)[:, :n].argmax(-1)

    def by_width(call: Callable, e: int) -> list[float]:
        seconds = [timed(partial(call, e, n), weight.device) for n in WIDTHS]
        return [0.0, *np.interp(range(1, longest + 1), WIDTHS, seconds).tolist()]

    trunk = {0: [0.0] * (longest + 1)} | {e: by_width(run_down_to, e) for e in depths}
    return trunk, {e: by_width(choose_at, e) for e in depths}


def fixed_passes(
    fast: FixedStep, model: Llama, depths: tuple[int, ...], context: int
) -> tuple[ByDepth, ByDepth]:
    """The same of passes of one shape, which cost the same however few positions they are for."""
    L, device, end = model.config.n_layers, model.embed.weight.device, up_to_chunk(context)
    passes = [math.ceil(width / WIDTH) for width in range(WIDTHS[-1] + 1)]
    trunk, head = {0: [0.0] * len(passes)}, {}

    def whole_pass(e: int) -> None:
        fast.run(WIDTH, 0, e, end)
        fast.run(WIDTH, e)

    with fast.open(model, tuple(e for e in depths if e < L), fast.max_len):
        layer = timed(partial(fast.run, WIDTH, 0, L, end), device) / L
        for e in depths:  # a segment's pass takes an exit's own block too
            whole = timed(partial(whole_pass, e), device)
            trunk[e] = [n * e * layer for n in passes]
            head[e] = [n * max(0.0, whole - e * layer) for n in passes]
    return trunk, head


def timed(call: Callable, device: torch.device) -> float:
    """Seconds of one call: the fastest of twenty, since other work of the machine can only add."""
    took = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took)


@dataclass(frozen=True)
class Trace:
    """What every exit predicts along a greedy text of n tokens: its choices, and how sure it is."""

    prompt: list[int]
    prefill: float  # seconds to read the prompt
    choices: dict[int, list[int]]
    sure: dict[int, list[float]]


@torch.inference_mode()
def trace(
    model: Llama, prompt: list[int], max_new_tokens: int, stop, exits: tuple[int, ...], decode
) -> Trace:
    prefill = min(decode(prompt, 1).seconds for _ in range(2))
    text = decode(prompt, max_new_tokens, stop=stop).tokens
    ids = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)
    h, first, choices, sure = model.embed(ids), 0, {}, {}
    for depth in (*exits, model.config.n_layers):
        h, first = model.run(h, first, depth), depth
        logits = model.logits(model.read(h, depth)[0, len(prompt) - 1 :], depth)
        best = logits.float().softmax(-1).max(-1)
        choices[depth], sure[depth] = best.indices.tolist(), best.values.tolist()
    choices[depth] = text
    return Trace(prompt, prefill, choices, sure)


def replay(trace: Trace, ladder: Rungs, costs: Costs, n_layers: int) -> float:
    """Seconds after the prompt: hispec's recursion, with recorded choices in place of the model."""
    exits, windows, thresholds = ladder
    depths, thresholds = (*exits, n_layers), (*thresholds, 0.0)
    text, end, seconds = trace.choices[n_layers][:1], len(trace.choices[n_layers]), 0.0
    seen = [-1] * len(depths)  # the prompt's pass has written the first token

    def propose(k: int, want: int) -> None:
        nonlocal seconds
        if depths[k] == 0:
            return text.extend(look_up(trace.prompt + text, min(want, end - len(text))))
        depth, goal, probability = depths[k], len(text) + want, 1.0
        choices, sure = trace.choices[depth], trace.sure[depth]
        while len(text) < min(goal, end) and probability >= thresholds[k]:
            base = len(text)
            if k:
                propose(k - 1, min(windows[k - 1], goal - base))
            above = 0
            for j in range(k + 1):
                width = len(text) - seen[j] - 1
                seconds += costs.trunk[depths[j]][width] - costs.trunk[above][width]
                seen[j], above = len(text) - 1, depths[j]
            seconds += costs.head[depth][len(text) - base + 1] + costs.loop[depth]
            seconds += costs.doubt * (thresholds[k] > 0)
            kept = base
            while kept < min(len(text), end - 1) and text[kept] == choices[kept]:
                kept += 1
            probability *= math.prod(sure[base : kept + 1])
            text[kept:] = [choices[kept]]
            seen[:] = [min(s, kept - 1) for s in seen]

    propose(len(exits), end - 1)
    return seconds


# ---- where time and memory go -------------------------------------------------------------------


@contextmanager
def timed_steps(depths: tuple[int, ...]):
    """While open, model steps are timed: yields the seconds spent at each level so far."""
    seconds, real = [0.0] * len(depths), hispec.Ladder.run

    def run(ladder, k, base):
        began = time.perf_counter()
        logits = real(ladder, k, base)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        seconds[k] += time.perf_counter() - began
        return logits

    hispec.Ladder.run = run  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        hispec.Ladder.run = real  # type: ignore[method-assign]


def time_shares(depths: tuple[int, ...], decode, prompts, max_new_tokens: int, stop) -> dict:
    """Share of the time in each level's steps, shallow to deep, and in the loop outside them.

    From one more run, since timing a step has to wait for it.
    """
    with timed_steps(depths) as seconds:
        total = sum(decode(prompt, max_new_tokens, stop=stop).seconds for prompt in prompts)
    return {"time_share": [s / total for s in seconds], "time_share_loop": 1 - sum(seconds) / total}


@torch.inference_mode()
def memory_limit(model: Llama) -> dict:
    """What the memory allows greedy decoding: a full pass a token, which reads each weight once.

    bytes_per_second is the best of five times ten products of a matrix too large for most caches
    and a vector. A model that fits into the caches can be faster than the limit; keys and values,
    which a pass reads too, are left out.
    """
    weight = model.embed.weight
    passed = [*(m for m in model.layers.modules() if isinstance(m, Linear)), model.head]
    matrix = torch.ones(8192, 8192, device=weight.device, dtype=weight.dtype)
    fastest = math.inf
    for _ in range(6):  # the first warms up
        began = time.perf_counter()
        for _ in range(10):  # a GPU's host would else be what is timed
            product = matrix @ matrix[0]
        product[0].item()
        fastest = min(fastest, (time.perf_counter() - began) / 10)
    norms = [m.weight for m in (*model.layers.modules(), model.norm) if isinstance(m, RMSNorm)]
    pass_bytes = sum(m.nbytes for m in passed) + sum(weight.nbytes for weight in norms)
    speed = matrix.nbytes / fastest
    return {
        "bytes_per_second": speed,
        "pass_bytes": pass_bytes,
        "greedy_tokens_per_second": speed / pass_bytes,
    }


@torch.inference_mode()
def pass_times(model: Llama, fast: FixedStep | None) -> dict:
    """Seconds of full passes, head included, by number of positions; and of its parts run alone.

    The parts are one layer and the head, over one position.
    """
    L, device = model.config.n_layers, model.embed.weight.device
    lent = fast.open(model, (), ROOM) if fast else nullcontext(KVCache(model, (), ROOM))
    tokens = torch.zeros(up_to_chunk(ROOM), dtype=torch.long, device=device)
    with lent as cache:

        def full(n: int) -> None:
            cache.lengths = [CONTEXT]
            (fast or step)(model, cache, (L,), tokens, CONTEXT + n, 0, n).argmax(-1)

        passes = {str(n): timed(partial(full, n), device) for n in (1, 2, 4, 8, 16)}
        if fast:
            layer = timed(partial(fast.run, WIDTH, 0, L, up_to_chunk(CONTEXT + 1)), device) / L
            head = timed(partial(fast.run, WIDTH, L), device)
        else:
            cache.place(CONTEXT, CONTEXT + 1)
            h = model.embed(tokens[None, : len(cache.at)])
            layer = timed(lambda: model.run(h, 0, 1, cache), device)
            head = timed(lambda: model.logits(h, L), device)
    return {"pass_seconds": passes, "layer_seconds": layer, "layers": L, "head_seconds": head}


def peak_memory(
    device: torch.device, decode: Callable, prompt: list[int], max_new_tokens: int
) -> int | None:
    """Bytes of GPU memory in use at most while a prompt is answered, weights too; CPU: None."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    decode(prompt, max_new_tokens)
    return torch.cuda.max_memory_allocated(device)


def best_threads(model: Llama) -> int:
    """The number of threads with which the CPU decodes fastest; the fewest among about equals.

    One token at a time leaves little to share out, and threads that wait for each other can cost
    far more than they bring, most of all where cores are few or shared.
    """
    best, shortest = 1, math.inf
    threads = 1
    while threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
        seconds = seconds_of_few(model)
        if seconds < 0.95 * shortest:
            best, shortest = threads, seconds
        threads *= 2
    return best


def seconds_of_few(model: Llama) -> float:
    """Seconds of a few tokens, decoded greedily: enough to tell settings apart."""
    generate(model, [0], 2)
    return min(generate(model, [0], 6).seconds for _ in range(3))
