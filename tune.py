"""Choose what to run: a model's exits, windows and thresholds, and the number of threads on a CPU.

Running every ladder would take hours. So each ladder's speed is predicted from measured parts, and only
the most promising are run, and what lies next to the fastest of them:

    seconds  =  prefill  +  sum over steps of  ( sum over the step's segments of segment_seconds[width]
                                                 +  head_seconds[width]  +  loop_seconds )

Which steps a ladder takes is found by replaying the recursion on what every exit predicts along the
model's own greedy text, and how sure it is. That is exact as long as all drafts are right; where the text
goes astray it takes the levels to agree as often as on the right path. The width of a segment's pass is the
number of positions it has not seen.

All kinds of ladder, one draft exit, HiSpec's two and those beyond the paper, are searched in the same way and
equally hard, so that none wins by being the better tuned. The choice is kept in results/ladders.json.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import write_whole
from faststep import WIDTH, FixedStep
from hispec import Generation, generate, look_up
from kvcache import KVCache
from model import Llama

LADDERS = Path(__file__).parent / "results" / "ladders.json"  # what was found, by model, dtype and device
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)  # what is tried at each level
COARSE = (1, 2, 4, 8, 16)  # the same where three levels draft
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 20)  # positions in a timed pass, up to more than any ladder takes; others in between
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # exits that are tried where all share the model's head
CONTEXT = 128  # positions before a timed pass
RUN = 6  # ladders that are run, of each kind
KINDS = {  # how many exits below the full model, and whether the first is a look-up in the text
    "single-layer": (1, False),
    "hispec": (2, False),
    "look-up": (1, True),
    "look-up, exit": (2, True),
    "three exits": (3, False),
}

Rungs = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]  # exits, windows, thresholds


def tune(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, stop, make_decoder: Callable, fixed: bool
) -> dict[str, dict]:
    """The fastest ladder of each kind, for the texts that follow these prompts.

    make_decoder(exits, windows, thresholds) gives the function that decodes with a ladder; fixed: by a FixedStep.

    All are predicted without thresholds, those of the four most promising sets of exits also with them. The best RUN
    of each kind are run, then those next to the fastest. Returns {name: {"exits", "windows", "thresholds",
    "predicted": speed-up over greedy, "measured": the same, "ran": all that were run, with their speed-ups}}.
    """
    exits = default_exits(model)
    if not model.exit_heads:
        exits = tuple(sorted({*exits, *(d for d in DEPTHS if d <= model.config.n_layers // 2)}))
    decode = make_decoder()
    costs = measure_costs(model, exits, decode, fixed)
    traces = [trace(model, prompt, max_new_tokens, stop, exits, decode) for prompt in prompts]

    def predicted(ladder: Rungs) -> float:
        return sum(t.prefill + replay(t, ladder, costs, model.config.n_layers) for t in traces)

    greedy: Rungs = ((), (), ())
    best = {}
    kinds = {name: kind for name, kind in KINDS.items() if kind[0] - kind[1] <= len(exits)}
    for name, (levels, looks_up) in kinds.items():
        windows = [w for w in product(COARSE if levels > 2 else WINDOWS, repeat=levels) if list(w) == sorted(w)]
        never, first = (0.0,) * levels, (0,) * looks_up
        seconds = {}
        fields = [((*first, *e), w, never) for e in combinations(exits, levels - looks_up) for w in windows]
        for ladder in tqdm(fields, f"predicting {name}", leave=False):
            seconds[ladder] = predicted(ladder)
        promising = list(dict.fromkeys(e for e, _, _ in sorted(seconds, key=seconds.__getitem__)))[:4]
        doubts = [(0.0,)] * looks_up + [THRESHOLDS] * min(2, levels - looks_up)  # a look-up has none
        thresholds = [(*t, *never[len(t) :]) for t in product(*doubts)]
        fields = [(e, w, t) for e in promising for w in windows for t in thresholds]
        for ladder in tqdm(fields, f"predicting {name} with thresholds", leave=False):
            seconds[ladder] = predicted(ladder)
        ranked = sorted(seconds, key=seconds.__getitem__)
        plain = [ladder for ladder in ranked if ladder[2] == never]
        chosen = list(dict.fromkeys([*ranked[: RUN - 2], *plain[:2], *ranked]))[:RUN]  # as many of either kind
        measured: dict[Rungs, float] = {}
        while chosen:  # the most promising, then the neighbours of the fastest, until none is faster
            made = run({ladder: make_decoder(*ladder) for ladder in [greedy, *chosen]}, prompts, max_new_tokens, stop)
            took = {ladder: sum(g.seconds for g in made[ladder]) for ladder in made}
            measured |= {ladder: took[greedy] / took[ladder] for ladder in chosen}
            fastest = max(measured, key=measured.__getitem__)
            chosen = [near for near in neighbours(fastest) if near not in measured]
        ran = [
            dict(zip(("exits", "windows", "thresholds"), ladder, strict=True))
            | {"predicted": predicted(greedy) / predicted(ladder), "measured": speed}
            for ladder, speed in measured.items()
        ]
        best[name] = max(ran, key=lambda r: r["measured"]) | {"ran": ran}
    return best


def neighbours(ladder: Rungs) -> list[Rungs]:
    """The same ladder with one of its windows a step longer or shorter."""
    exits, windows, thresholds = ladder
    near = []
    for k, i in product(range(len(windows)), (-1, 1)):
        at = WINDOWS.index(windows[k]) + i
        if 0 <= at < len(WINDOWS):
            near.append((exits, (*windows[:k], WINDOWS[at], *windows[k + 1 :]), thresholds))
    return [n for n in near if list(n[1]) == sorted(n[1])]


def run(decoders: dict[Rungs, Callable], prompts, max_new_tokens: int, stop) -> dict[Rungs, list[Generation]]:
    """Each ladder's generation for each prompt: they take turns on it, and the faster of two turns counts."""
    made: dict[Rungs, list[Generation]] = {ladder: [] for ladder in decoders}
    for prompt in tqdm(prompts, "running ladders", leave=False):
        turns = [[decode(prompt, max_new_tokens, stop=stop) for decode in decoders.values()] for _ in range(2)]
        for ladder, *two in zip(made, *turns):
            made[ladder].append(min(two, key=lambda g: g.seconds))
    return made


# ---- predicting a ladder's speed -----------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds, listed by the number of positions in a pass: 0 .. WIDTHS[-1].

    A segment is charged the difference of two depths: a level that drafts runs the same few layers over and over,
    which stay in the processor's caches, so that its layers are cheaper than a full pass's.
    """

    trunk: dict[int, list[float]]  # of the layers down to each depth, 0 included
    head: dict[int, list[float]]  # of what comes after an exit: its block, its norm, its output matrix
    loop: float  # of a step, outside the model


@torch.inference_mode()
def measure_costs(model: Llama, exits: tuple[int, ...], decode: Callable, fixed: bool) -> Costs:
    c, weight = model.config, model.embed.weight
    depths, context = (*exits, c.n_layers), min(CONTEXT, c.max_seq_len - WIDTHS[-1])
    trunk, head = {0: [0.0] * (WIDTHS[-1] + 1)}, {}
    if fixed:  # a pass costs the same however few positions it is for
        passes = [math.ceil(width / WIDTH) for width in range(WIDTHS[-1] + 1)]
        layer = timed(FixedStep(model, (), context).segments[0], weight.is_cuda) / c.n_layers
        for e in depths:
            step = FixedStep(model, (e,) if e < c.n_layers else (), context)
            whole = timed(lambda step=step: (step.segments[0](), step.heads[0]()), weight.is_cuda)
            trunk[e], head[e] = ([n * seconds for n in passes] for seconds in (e * layer, max(0.0, whole - e * layer)))
    else:
        cache = KVCache(c, (), context + WIDTHS[-1], weight.device, weight.dtype, model.blocks)
        ids = torch.zeros(1, WIDTHS[-1], dtype=torch.long, device=weight.device)
        states = [model.embed(ids[:, :n]) for n in WIDTHS]

        def run_down_to(e: int, h: Tensor) -> Tensor:
            return model.run(h, 0, e, context, cache)

        def choose_at(e: int, h: Tensor) -> Tensor:
            return model.logits(model.read(h, e, context, cache), e).argmax(-1)

        def by_width(call: Callable, e: int) -> list[float]:
            seconds = [timed(partial(call, e, h), weight.is_cuda) for h in states]
            return [0.0, *np.interp(range(1, WIDTHS[-1] + 1), WIDTHS, seconds).tolist()]

        trunk |= {e: by_width(run_down_to, e) for e in depths}
        head |= {e: by_width(choose_at, e) for e in depths}
    modelled = 24 * (trunk[c.n_layers][1] + head[c.n_layers][1])
    took = min(decode([0], 24).seconds for _ in range(8))  # whatever else the machine does can only add
    return Costs(trunk, head, max(0.0, (took - modelled) / 24))


def timed(call: Callable, on_gpu: bool) -> float:
    """Seconds of one call: the fastest of twenty, since whatever else the machine does can only add to them."""
    took = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return min(took)


@dataclass(frozen=True)
class Trace:
    """What every exit predicts along a greedy text of n tokens: its choices and its probability of each."""

    prompt: list[int]
    prefill: float  # seconds to read the prompt
    choices: dict[int, list[int]]
    sure: dict[int, list[float]]


@torch.inference_mode()
def trace(model: Llama, prompt: list[int], max_new_tokens: int, stop, exits: tuple[int, ...], decode) -> Trace:
    prefill = min(decode(prompt, 1).seconds for _ in range(2))
    text = decode(prompt, max_new_tokens, stop=stop).tokens
    ids = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)
    h, first, choices, sure = model.embed(ids), 0, {}, {}
    for depth in (*exits, model.config.n_layers):
        h, first = model.run(h, first, depth), depth
        best = model.logits(model.read(h, depth)[0, len(prompt) - 1 :], depth).float().softmax(-1).max(-1)
        choices[depth], sure[depth] = best.indices.tolist(), best.values.tolist()
    choices[depth] = text
    return Trace(prompt, prefill, choices, sure)


def replay(trace: Trace, ladder: Rungs, costs: Costs, n_layers: int) -> float:
    """Seconds after the prompt: hispec's recursion, with recorded choices in place of the model."""
    exits, windows, thresholds = ladder
    depths, thresholds = (*exits, n_layers), (*thresholds, 0.0)
    text, seen, end, seconds = [], [-1] * len(depths), len(trace.choices[n_layers]), 0.0

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
            seconds += costs.head[depth][len(text) - base + 1] + costs.loop
            kept = base
            while kept < min(len(text), end - 1) and text[kept] == choices[kept]:
                kept += 1
            probability *= math.prod(sure[base : kept + 1])
            text[kept:] = [choices[kept]]
            seen[:] = [min(s, kept - 1) for s in seen]

    propose(len(exits), end)
    return seconds


# ---- the rest ------------------------------------------------------------------------------------------


def default_exits(model: Llama) -> tuple[int, ...]:
    """The model's trained exits, or 1/8 and 1/4 of its depth. Raises ValueError if it is too shallow for two."""
    depth = model.config.n_layers
    eighth, quarter = math.ceil(depth / 8), math.ceil(depth / 4)
    exits = model.exits or tuple(e for e in (eighth, max(quarter, eighth + 1)) if e < depth)
    if len(exits) < 2:
        raise ValueError(f"HiSpec needs two exits below the full depth, and this model of {depth} layers has {exits}")
    return exits


def best_threads(model: Llama) -> int:
    """The number of threads with which the CPU decodes fastest; the fewest among about equals.

    One token at a time leaves little to share out, and threads that wait for each other can cost far
    more than they bring, most of all where cores are few or shared.
    """
    best, shortest = 1, math.inf
    threads = 1
    while threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
        generate(model, [0], 2)
        seconds = min(generate(model, [0], 6).seconds for _ in range(3))
        if seconds < 0.95 * shortest:
            best, shortest = threads, seconds
        threads *= 2
    return best


def saved_ladders(header: dict, model: Llama) -> dict[str, dict]:
    """What `tune` found earlier for this model, dtype and device; empty if nothing.

    Raises ValueError if the file is damaged, or what it says does not fit the model.
    """
    found = _read().get(_key(header), {})
    ladders = {}
    for name, length in (("single-layer", 1), ("hispec", 2)):
        if name not in found:
            continue
        try:
            exits, windows = found[name]["exits"], found[name]["windows"]
            thresholds = found[name].get("thresholds", [0.0] * length)
            fits = len(exits) == len(windows) == len(thresholds) == length
            fits = fits and 0 < exits[0] <= exits[-1] < model.config.n_layers
            fits = fits and 0 < min(windows) <= max(windows) <= WIDTHS[-1] - 2  # the widest pass that has a cost
        except (TypeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"{LADDERS}: {name} of {_key(header)} does not fit the model: remove it, or run --tune")
        ladders[name] = {"exits": exits, "windows": windows, "thresholds": thresholds}
    return ladders


def save_ladders(header: dict, ladders: dict[str, dict]) -> None:
    """Keep what `tune` found beside what it found for other models and machines."""
    found = _read() | {_key(header): {**ladders, "versions": header["versions"], "command": header["command"]}}
    LADDERS.parent.mkdir(exist_ok=True)
    write_whole(LADDERS, lambda to: to.write_text(json.dumps(found, indent=1) + "\n", "utf-8"))


def _key(header: dict) -> str:
    return f"{header['model']}, {header['dtype']}, {header['step']} step, {header['device']}"


def _read() -> dict[str, dict]:
    if not LADDERS.exists():
        return {}
    try:
        found = json.loads(LADDERS.read_text("utf-8"))
        if not all(isinstance(ladders, dict) for ladders in found.values()):
            raise ValueError("not an object of objects")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{LADDERS} is damaged ({error}): remove it") from None
    return found
