"""Choose what to run: a model's exits and windows, and the number of threads on a CPU.

Both ladders, one draft exit and HiSpec's two, are searched in the same way and equally hard, so that
neither wins by being the better tuned. The choice is kept in results/ladders.json.
"""

import json
import math
import os
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import write_whole
from hispec import generate
from model import Llama

LADDERS = Path(__file__).parent / "results" / "ladders.json"  # what was found, by model, dtype and device
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)  # what is tried at each level


def tune(model: Llama, prompts: list[list[int]], max_new_tokens: int, stop=()) -> dict[str, dict]:
    """The fastest single-layer ladder and the fastest HiSpec ladder, found by running them all.

    Every exit and pair of exits is tried with every window. After each prompt the slower half drops
    out, as long as more than three are left. Returns {name: {"exits": ..., "windows": ...}}.
    """
    exits = default_exits(model)
    fields = {
        "single-layer": [((e,), (w,)) for e in exits for w in WINDOWS],
        "hispec": [(pair, (n, m)) for pair in combinations(exits, 2) for n in WINDOWS for m in WINDOWS if n <= m],
    }
    best = {}
    for name, field in fields.items():
        seconds = dict.fromkeys(field, 0.0)
        for prompt in tqdm(prompts, desc=f"tuning {name}", leave=False):
            for e, w in seconds:
                seconds[e, w] += generate(model, prompt, max_new_tokens, exits=e, windows=w, stop=stop).seconds
            fastest = sorted(seconds, key=seconds.get)[: max(3, len(seconds) // 2)]
            seconds = {ladder: seconds[ladder] for ladder in fastest}
        e, w = min(seconds, key=seconds.get)
        best[name] = {"exits": e, "windows": w}
    return best


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
    while threads <= os.cpu_count():
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
            fits = len(exits) == len(windows) == length and 0 < exits[0] <= exits[-1] < model.config.n_layers
        except (TypeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"{LADDERS}: {name} of {_key(header)} does not fit the model: remove it, or run --tune")
        ladders[name] = {"exits": exits, "windows": windows}
    return ladders


def save_ladders(header: dict, ladders: dict[str, dict]) -> None:
    """Keep what `tune` found beside what it found for other models and machines."""
    found = _read() | {_key(header): {**ladders, "versions": header["versions"], "command": header["command"]}}
    LADDERS.parent.mkdir(exist_ok=True)
    write_whole(LADDERS, lambda to: to.write_text(json.dumps(found, indent=1) + "\n", "utf-8"))


def _key(header: dict) -> str:
    return f"{header['model']}, {header['dtype']}, {header['device']}"


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
