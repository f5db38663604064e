"""Choose what to run: a model's exits, windows and thresholds, and the number of threads on a CPU.

Running every ladder would take hours. So each ladder's speed is predicted from measured parts, and
only the most promising are run, and what lies next to the fastest of them:

    seconds  =  prefill  +  sum over steps of  ( sum over its segments of segment_seconds[width]
                                                 +  head_seconds[width]  +  loop_seconds[depth]
                                                 +  doubt_seconds if it has a threshold )

Which steps a ladder takes is found by replaying the recursion on what every exit predicts along the
model's own greedy text, and how sure it is. That is exact as long as all drafts are right; where
the text goes astray it takes the levels to agree as often as on the right path. The width of a
segment's pass is the number of positions it has not seen.

One draft exit, HiSpec's two, and the look-ups beyond the paper are searched in the same way and
equally hard, so that none wins by being the better tuned; ladders of three exits over fewer windows
and thresholds. The choice is kept in results/ladders.json.
"""

import json
import math
from collections.abc import Callable
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import checked_ladder
from checkpoints.files import write_whole
from faststep import FixedStep
from hispec import Generation
from lab.costs import (
    WIDTHS,
    Costs,
    Rungs,
    Trace,
    best_threads,
    measure_costs,
    replay,
    seconds_of_few,
    trace,
    with_loop,
)
from model import Llama
from operators import can_pack

# what was found, by model, dtype, step and device
LADDERS = Path(__file__).parent.parent / "results" / "ladders.json"
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)  # what is tried at each level
COARSE = (1, 2, 4, 8, 16)  # the same where three levels draft
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # exits that are tried where all share the model's head
RUN = 6  # ladders that are run, of each kind
KINDS = {  # how many exits below the full model, and whether the first is a look-up in the text
    "single-layer": (1, False),
    "hispec": (2, False),
    "look-up": (1, True),
    "look-up, exit": (2, True),
    "three exits": (3, False),
}
GREEDY: Rungs = ((), (), ())


def tune(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop,
    make_decoder: Callable,
    fast: FixedStep | None,
) -> dict[str, dict]:
    """The fastest ladder of each kind, for the texts that follow these prompts.

    make_decoder(exits, windows, thresholds) gives the function that decodes with a ladder; fast:
    the step it takes, if not the plain one.

    All are predicted without thresholds, those of the four most promising sets of exits also with
    them. The best RUN of each kind are run, then those next to the fastest. Returns {name:
    {"exits", "windows", "thresholds", "predicted": speed-up over greedy, "measured": the same,
    "ran": all that were run, with their speed-ups}}.
    """
    exits = default_exits(model)
    if not model.exit_heads:
        exits = tuple(sorted({*exits, *(d for d in DEPTHS if d <= model.config.n_layers // 2)}))
    decode = make_decoder()
    traces = [trace(model, prompt, max_new_tokens, stop, exits, decode) for prompt in prompts]
    costs = costs_of_ladders(model, exits, traces, max_new_tokens, stop, make_decoder, fast)

    def predicted(ladder: Rungs) -> float:
        return sum(t.prefill + replay(t, ladder, costs, model.config.n_layers) for t in traces)

    best = {}
    for name, (levels, looks_up) in KINDS.items():
        if levels - looks_up > len(exits):
            continue
        chosen = promising(name, exits, predicted)
        measured = climb(chosen, make_decoder, prompts, max_new_tokens, stop)
        ran = [
            dict(zip(("exits", "windows", "thresholds"), ladder, strict=True))
            | {"predicted": predicted(GREEDY) / predicted(ladder), "measured": speed}
            for ladder, speed in measured.items()
        ]
        best[name] = max(ran, key=lambda r: r["measured"]) | {"ran": ran}
    return best


def costs_of_ladders(
    model: Llama, exits: tuple[int, ...], traces: list[Trace], max_new_tokens: int, stop,
    make_decoder: Callable, fast: FixedStep | None,
) -> Costs:  # fmt: skip
    """What passes cost, and from a few runs of each exit alone what a step costs beyond them."""
    few = traces[:3]
    ladders = [GREEDY, *(((exit,), (4,), (0.0,)) for exit in exits)]
    decoders = {ladder: make_decoder(*ladder) for ladder in ladders}
    alone = run(decoders, [t.prompt for t in few], max_new_tokens, stop)
    return with_loop(measure_costs(model, exits, fast), few, alone, model.config.n_layers)


def promising(name: str, exits: tuple[int, ...], predicted: Callable) -> list[Rungs]:
    """The RUN ladders of this kind with the fewest seconds predicted, two without thresholds."""
    levels, looks_up = KINDS[name]
    windows = list(combinations_with_replacement(COARSE if levels > 2 else WINDOWS, levels))
    never, first = (0.0,) * levels, (0,) * looks_up
    sets = [(*first, *e) for e in combinations(exits, levels - looks_up)]
    fields = tqdm([(e, w, never) for e in sets for w in windows], f"predicting {name}", leave=False)
    seconds = {ladder: predicted(ladder) for ladder in fields}
    fewest = list(dict.fromkeys(e for e, _, _ in sorted(seconds, key=seconds.__getitem__)))[:4]
    # a look-up is never in doubt
    doubts = [(0.0,)] * looks_up + [THRESHOLDS] * min(2, levels - looks_up)
    thresholds = [(*t, *never[len(t) :]) for t in product(*doubts)]
    ladders = [
        (e, w, t)
        for e in fewest
        for w in windows
        for t in thresholds
        if any(t) and can_matter(w, t)
    ]
    for ladder in tqdm(ladders, f"predicting {name} with thresholds", leave=False):
        seconds[ladder] = predicted(ladder)
    ranked = sorted(seconds, key=seconds.__getitem__)
    plain = [ladder for ladder in ranked if ladder[2] == never]
    return list(dict.fromkeys([*ranked[: RUN - 2], *plain[:2], *ranked]))[:RUN]


def can_matter(windows: tuple[int, ...], thresholds: tuple[float, ...]) -> bool:
    """Whether no threshold is in vain. A level that is asked for one token stops there anyway.

    windows: none smaller than the one below it.
    """
    return all(window > 1 or threshold == 0 for window, threshold in zip(windows, thresholds))


def climb(chosen: list[Rungs], make_decoder, prompts, max_new_tokens: int, stop) -> dict:
    """Speed-ups over greedy of the chosen, then of what is next to the fastest, until none wins."""
    measured: dict[Rungs, float] = {}
    while chosen:
        decoders = {ladder: make_decoder(*ladder) for ladder in [GREEDY, *chosen]}
        made = run(decoders, prompts, max_new_tokens, stop)
        took = {ladder: sum(g.seconds for g in made[ladder]) for ladder in made}
        measured |= {ladder: took[GREEDY] / took[ladder] for ladder in chosen}
        fastest = max(measured, key=measured.__getitem__)
        chosen = [near for near in neighbours(fastest) if near not in measured]
    return measured


def neighbours(ladder: Rungs) -> list[Rungs]:
    """The same ladder with one of its windows a step longer or shorter; at 1, with no threshold."""
    exits, windows, thresholds = ladder
    near = []
    for k, i in product(range(len(windows)), (-1, 1)):
        at = WINDOWS.index(windows[k]) + i
        if 0 <= at < len(WINDOWS):
            stops = thresholds if at else (*thresholds[:k], 0.0, *thresholds[k + 1 :])
            near.append((exits, (*windows[:k], WINDOWS[at], *windows[k + 1 :]), stops))
    return [n for n in near if list(n[1]) == sorted(n[1])]


def run(
    decoders: dict[Rungs, Callable], prompts, max_new_tokens: int, stop
) -> dict[Rungs, list[Generation]]:
    """Each ladder's generation for each prompt: they take turns, the faster of two counts."""
    made: dict[Rungs, list[Generation]] = {ladder: [] for ladder in decoders}
    for prompt in tqdm(prompts, "running ladders", leave=False):
        turns = [
            [decode(prompt, max_new_tokens, stop=stop) for decode in decoders.values()]
            for turn in range(2)
        ]
        for ladder, *two in zip(made, *turns):
            made[ladder].append(min(two, key=lambda g: g.seconds))
    return made


# ---- what is kept -------------------------------------------------------------------------------


def default_exits(model: Llama) -> tuple[int, ...]:
    """The model's trained exits, or 1/8 and 1/4 of its depth. ValueError if there are not two."""
    depth = model.config.n_layers
    eighth, quarter = math.ceil(depth / 8), math.ceil(depth / 4)
    exits = model.exits or tuple(e for e in (eighth, max(quarter, eighth + 1)) if e < depth)
    if len(exits) < 2:
        raise ValueError(
            "HiSpec needs two exits below the full depth, "
            f"and this model of {depth} layers has {exits}"
        )
    return exits


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
            # the widest pass that has a cost
            fits = fits and 0 < min(windows) <= max(windows) <= WIDTHS[-1] - 2
        except (TypeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(
                f"{LADDERS}: {name} of {_key(header)} does not fit the model: "
                "remove it, or run --tune"
            )
        ladders[name] = {"exits": exits, "windows": windows, "thresholds": thresholds}
    return ladders


def kept_ladder(header: dict, model: Llama) -> tuple[dict, str] | None:
    """HiSpec's ladder that `tune` found, or the fastest of any kind if that loses; and where.

    What was found on this machine goes before what was found on others. None if nothing was kept
    that fits the model. Raises ValueError if the file is damaged.
    """
    kept, own = _read(), _key(header)
    others = [key for key in kept if key.startswith(f"{header['model']}, ")]
    for key in [own, *others]:
        found = [x for x in kept.get(key, {}).values() if isinstance(x, dict) and "measured" in x]
        if not found:
            continue
        try:
            best = kept[key].get("hispec", {})
            if best.get("measured", 0) < 1:
                best = max(found, key=lambda ladder: ladder["measured"])
            ladder = {part: best[part] for part in ("exits", "windows", "thresholds")}
            checked_ladder(model.config.n_layers, *ladder.values())
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # `saved_ladders` says what is wrong with it
        where = "this machine" if key == own else key.split(" step, ")[-1]
        return ladder, f"kept by tuning, {best['measured']:.2f}x greedy on {where}"
    return None


def save_ladders(header: dict, ladders: dict[str, dict]) -> None:
    """Keep what `tune` found beside what it found for other models and machines."""
    about = {key: header[key] for key in ("threads", "versions", "command")}
    _write(header, {**ladders, **about})


def kept_threads(header: dict, model: Llama, anew: bool = False) -> int:
    """The number of threads that is best for this model, dtype and device, a CPU.

    Found once, which takes seconds, and kept beside the ladders. anew: found again.
    """
    found = _read().get(_key(header), {})
    threads = found.get("threads")
    if threads is not None and not (isinstance(threads, int) and threads > 0):
        raise ValueError(f"{LADDERS}: threads of {_key(header)} must be a whole number above 0")
    if threads is None or anew:
        threads = best_threads(model)
        _try_to_keep(header, found | {"threads": threads})
    return threads


def kept_dtype(header: dict, load: Callable[[], Llama], anew: bool = False) -> torch.dtype:
    """The faster of float32 and bfloat16 for this model on a CPU, with float32's best threads.

    Found once, and kept as the threads are. load: gives the model in float32. A processor that does
    not compute in bfloat16 takes float32.
    """
    if not can_pack(torch.bfloat16):
        return torch.float32
    either = header | {"dtype": "either dtype"}
    names = ("float32", "bfloat16")
    dtype = _read().get(_key(either), {}).get("dtype")
    if dtype is not None and dtype not in names:
        raise ValueError(f"{LADDERS}: dtype of {_key(either)} must be one of {', '.join(names)}")
    if dtype is None or anew:
        model, seconds = load(), {}
        torch.set_num_threads(kept_threads(header | {"dtype": names[0]}, model, anew))
        for name in names:
            seconds[name] = seconds_of_few(model.to(getattr(torch, name)).pack())
        dtype = min(seconds, key=seconds.__getitem__)
        _try_to_keep(either, {"dtype": dtype})
    return getattr(torch, dtype)


def _try_to_keep(header: dict, entry: dict) -> None:
    try:
        _write(header, entry)
    except OSError:
        pass  # where nothing can be kept it is found anew each time


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


def _write(header: dict, entry: dict) -> None:
    found = _read() | {_key(header): entry}
    LADDERS.parent.mkdir(exist_ok=True)
    write_whole(LADDERS, json.dumps(found, indent=1) + "\n")
