"""Choose the fastest exits, windows and thresholds for a model.

Running every ladder would take hours. So each ladder's speed is predicted from measured parts, and
only the most promising ladders are run, then the neighbours of the fastest:

    seconds  =  prefill  +  sum over steps of  ( sum over its segments of segment_seconds[width]
                                                 +  head_seconds[width]  +  loop_seconds[depth]
                                                 +  doubt_seconds if it has a threshold )

The steps that a ladder takes are found by replaying the recursion on every exit's recorded
predictions along the model's own greedy text. That is exact as long as all drafts are right. After
a wrong draft, it assumes that levels agree as often as on the right path. The width of a segment's
pass is the number of positions that it has not seen.

Single exits, HiSpec's two, HiSpec's draft alone, look-ups and draft heads are searched in the same
way and equally hard, so that none wins by being better tuned. Ladders of three exits are searched
over fewer windows and thresholds. In sampled text a level keeps drafts more or less often than in
greedy text, so all kinds except three exits are searched again, along sampled texts. What a ladder
writes then depends on chance, so each is run on several seeds.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import combinations, combinations_with_replacement, product

from tqdm import tqdm

from arguments import ladder_text
from checkpoints.console import table
from checkpoints.ladders import Ladder, as_options, default_exits
from hispec import Generation, Step
from lab.costs import (
    Costs,
    Trace,
    coupled,
    measure_costs,
    replay,
    trace,
    with_loop,
    with_sampling,
)

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)  # tried at each level
COARSE = (1, 2, 4, 8, 16)  # tried instead for ladders of three exits
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # exits tried if all share the model's head
RUN = 6  # how many ladders of each kind are run
SEEDS = 3  # sampled text: how often each prompt is continued in a run
COUPLINGS = 4  # sampled text: how often the exits' choices are drawn for a replay
GREEDY: Ladder = ((), (), ())


def tune(
    step: Step, prompts: list[list[int]], max_new_tokens: int, stop, make_decoder: Callable,
    sampling: dict | None = None,
) -> dict[str, dict]:  # fmt: skip
    """The fastest ladder of each kind, for the texts that follow these prompts.

    make_decoder(exits, windows, thresholds) returns the function that decodes with a ladder, by
    this step. All ladders are predicted without thresholds, those of the four most promising sets
    of exits also with them. The best RUN of each kind are run, then the neighbours of the fastest.
    Then the first exit of each ladder of two or more, its own draft, is tuned alone. Returns {name:
    {"exits", "windows", "thresholds", "predicted": speed-up over greedy, "measured": the same,
    "ran": all that were run, with their speed-ups}}. With `sampling` (options of generate) there is
    one more entry, "sampled": the same for sampled text, with speed-ups over plain sampling.
    """
    model, depth = step.model, step.model.config.n_layers
    exits = default_exits(model)
    if not model.exit_heads:
        exits = tuple(sorted({*exits, *(d for d in DEPTHS if d <= depth // 2)}))
    decode, limit = make_decoder(), (max_new_tokens, stop)

    def record(options: dict) -> list[Trace]:
        return [trace(model, prompt, *limit, exits, decode, **options) for prompt in prompts]

    traces = record({})
    heads = sorted(map(int, model.draft_heads))
    costs = costs_of_ladders(step, exits, traces, *limit, make_decoder, heads)

    def seconds(ladder: Ladder) -> float:
        return sum(t.prefill + replay(t, ladder, costs, depth) for t in traces)

    kinds = kinds_of(exits, heads, depth)
    attempt = partial(run, prompts=prompts, max_new_tokens=max_new_tokens, stop=stop)
    found = search(kinds, seconds, attempt, make_decoder)
    if not sampling:
        return found
    drawn, dearer = record(sampling), with_sampling(costs, step, sampling)

    @cache
    def paths(exits: tuple[int, ...]) -> list[Trace]:
        return [coupled(t, exits, depth, seed) for t in drawn for seed in range(COUPLINGS)]

    def seconds_sampled(ladder: Ladder) -> float:
        return sum(t.prefill + replay(t, ladder, dearer, depth) for t in paths(ladder[0]))

    kinds = {name: sets for name, sets in kinds.items() if name != "three exits"}
    again = partial(attempt, sampling=sampling)
    return found | {"sampled": search(kinds, seconds_sampled, again, make_decoder)}


def kinds_of(exits: tuple[int, ...], heads: list[int], depth: int) -> dict[str, list]:
    """Return the sets of exits to choose from for each kind of ladder that the model can have.

    heads: the exits on which the model has a draft head, which may include its full depth.
    """
    ways: dict[str, list[tuple[int, ...]]] = {
        "single-layer": [(exit,) for exit in exits],
        "hispec": list(combinations(exits, 2)),
        "look-up": [(0,)],
        "look-up, exit": [(0, exit) for exit in exits],
        "three exits": list(combinations(exits, 3)),
        "head": [(-depth,) for head in heads if head == depth],
        "head, exit": [(-head, head) for head in heads if head < depth],
    }
    return {name: sets for name, sets in ways.items() if sets}


def search(
    kinds: dict[str, list], predicted: Callable, attempt: Callable, make_decoder: Callable
) -> dict[str, dict]:
    """Tune for one sort of text. predicted(ladder): seconds. attempt(decoders): runs ladders."""

    def best_of(name: str, sets: list[tuple[int, ...]]) -> dict:
        measured = climb(promising(name, sets, predicted), make_decoder, attempt)
        ran = [
            as_options(ladder)
            | {"predicted": predicted(GREEDY) / predicted(ladder), "measured": speed}
            for ladder, speed in measured.items()
        ]
        return max(ran, key=lambda r: r["measured"]) | {"ran": ran}

    best = {name: best_of(name, sets) for name, sets in kinds.items()}
    alone = {best["hispec"]["exits"][0]: "draft alone"}
    for kind in best.values():
        if kind["exits"][0] > 0 and len(kind["exits"]) > 1:
            alone.setdefault(kind["exits"][0], f"exit {kind['exits'][0]} alone")
    return best | {name: best_of(name, [(exit,)]) for exit, name in alone.items()}


def tuning_table(best: dict[str, dict]) -> str:
    """The ladders that were run, with their predicted and measured speed-ups over greedy."""
    rows = [["tuning", "ladder", "predicted", "measured"]]
    kinds = {name: kind for name, kind in best.items() if name != "sampled"}
    kinds |= {f"sampled: {name}": kind for name, kind in best.get("sampled", {}).items()}
    for name, kind in kinds.items():
        for r in kind["ran"]:
            ladder = ladder_text(r["exits"], r["windows"], r["thresholds"], r.get("draft_head", 0))
            rows.append([name, ladder, f"{r['predicted']:.2f}x", f"{r['measured']:.2f}x"])
    return table(rows)


def costs_of_ladders(
    step: Step, exits: tuple[int, ...], traces: list[Trace], max_new_tokens: int, stop,
    make_decoder: Callable, heads: list[int] | None = None,
) -> Costs:  # fmt: skip
    """Measure what passes cost, and what steps cost beyond them, by running short ladders."""
    few = traces[:3]
    ladders: list[Ladder] = [GREEDY, *(((exit,), (4,), (0.0,)) for exit in exits)]
    for head in heads or []:
        below = head < step.model.config.n_layers
        ladders.append(((-head, head), (3, 6), (0.0, 0.0)) if below else ((-head,), (3,), (0.0,)))
    decoders = {ladder: make_decoder(*ladder) for ladder in ladders}
    alone = run(decoders, [t.prompt for t in few], max_new_tokens, stop)
    return with_loop(measure_costs(step, exits), few, alone, step.model.config.n_layers)


def promising(name: str, sets: list[tuple[int, ...]], predicted: Callable) -> list[Ladder]:
    """Return the RUN ladders predicted to be fastest, of which two or more have no thresholds."""
    levels = len(sets[0])
    windows = list(combinations_with_replacement(COARSE if levels > 2 else WINDOWS, levels))
    never, first = (0.0,) * levels, sum(exit <= 0 for exit in sets[0])
    fields = tqdm([(e, w, never) for e in sets for w in windows], f"predicting {name}", leave=False)
    seconds = {ladder: predicted(ladder) for ladder in fields}
    fewest = list(dict.fromkeys(e for e, _, _ in sorted(seconds, key=seconds.__getitem__)))[:4]
    # a look-up or a draft head never stops early
    doubts = [(0.0,)] * first + [THRESHOLDS] * min(2, levels - first)
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
    """Whether every threshold can have an effect. With a window of 1 a level stops there anyway.

    windows: none smaller than the one below it.
    """
    return all(window > 1 or threshold == 0 for window, threshold in zip(windows, thresholds))


def climb(chosen: list[Ladder], make_decoder: Callable, attempt: Callable) -> dict[Ladder, float]:
    """Measure the chosen ladders' speed-ups over greedy, then those of the fastest's neighbours."""
    measured: dict[Ladder, float] = {}
    while chosen:
        made = attempt({ladder: make_decoder(*ladder) for ladder in [GREEDY, *chosen]})
        speed = {
            x: sum(len(g.tokens) for g in m) / sum(g.seconds for g in m) for x, m in made.items()
        }
        measured |= {ladder: speed[ladder] / speed[GREEDY] for ladder in chosen}
        fastest = max(measured, key=measured.__getitem__)
        chosen = [near for near in neighbours(fastest) if near not in measured]
    return measured


def neighbours(ladder: Ladder) -> list[Ladder]:
    """The ladder with one window a step longer or shorter; a window of 1 gets no threshold."""
    exits, windows, thresholds = ladder
    near = []
    for k, i in product(range(len(windows)), (-1, 1)):
        at = WINDOWS.index(windows[k]) + i
        if 0 <= at < len(WINDOWS):
            stops = thresholds if at else (*thresholds[:k], 0.0, *thresholds[k + 1 :])
            near.append((exits, (*windows[:k], WINDOWS[at], *windows[k + 1 :]), stops))
    return [n for n in near if list(n[1]) == sorted(n[1])]


def run(
    decoders: dict[Ladder, Callable], prompts, max_new_tokens: int, stop,
    sampling: dict | None = None,
) -> dict[Ladder, list[Generation]]:  # fmt: skip
    """Each ladder's generations for each prompt. They take turns, and the faster of two counts.

    Sampled text differs from seed to seed, so there all SEEDS turns count.
    """
    options: list[dict] = [{}, {}]
    if sampling:
        options = [sampling | {"seed": (sampling["seed"] + turn) % 2**63} for turn in range(SEEDS)]
        for decode in decoders.values():  # a ladder's round may have to be captured first
            decode(prompts[0], 2, stop=stop, **options[0])
    made: dict[Ladder, list[Generation]] = {ladder: [] for ladder in decoders}
    for prompt in tqdm(prompts, "running ladders", leave=False):
        turns = [
            {x: decode(prompt, max_new_tokens, stop=stop, **turn) for x, decode in decoders.items()}
            for turn in options
        ]
        for ladder, kept in made.items():
            each = [turn[ladder] for turn in turns]
            kept += each if sampling else [min(each, key=lambda g: g.seconds)]
    return made
