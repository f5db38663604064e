"""Eleven figures of one run of the bench: what a pass and a level cost, where levels agree, when drafting pays.

    python bench.py --figures DIR

`gather` measures and predicts, the `plot_...` functions only draw, and `save` writes each figure as PNG and SVG.
Nothing is drawn that was not measured in the same run, on the same machine, or predicted from what was: ladders
too many to run are replayed on measured costs and recorded texts (tune.py), and the figure says so.
"""

import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from math import ceil
from operator import eq
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import rcsetup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from checkpoints.files import in_words, write_whole
from faststep import WIDTH, FixedStep
from hispec import probabilities, step
from kvcache import KVCache
from model import Llama
from train_exits import measure
from tune import (
    CONTEXT,
    DEPTHS,
    THRESHOLDS,
    WIDTHS,
    WINDOWS,
    Costs,
    Rungs,
    default_exits,
    measure_costs,
    replay,
    run,
    trace,
)

N_D, N_I = (1, 2, 3, 4, 6, 8), (2, 4, 6, 8, 12, 16)  # the windows that are run
FEW = 6  # prompts they are run on, each of another category
RATES = np.linspace(0.3, 1, 36)  # acceptance rates in the figure of the formula
LEVELS = (0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4)  # speed-ups told apart there
LONGEST = (12, 24)  # windows that the formula is tuned over: N_d and N_i, or a single layer's
OPENING, SAMPLES, SHOWN = 16, 1000, 10  # tokens that are sampled after; how often; the likeliest, which are told apart
GREEDY: Rungs = ((), (), ())
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": rcsetup.cycler(color=COLOURS),
    "lines.linewidth": 2,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "hatch.color": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "figures",  # the same figure is the same file
}


@dataclass(frozen=True)
class Data:
    """What the figures show. Speed-ups are over greedy decoding; agreement is with the full model, 0..1."""

    n_layers: int
    ladder: Rungs  # HiSpec's in this run
    costs: Costs
    agreement: tuple[list[float], list[float]]  # of exits 1..n_layers-1: on the prompts, on the greedy answers
    speed: dict[Rungs, float]  # tokens/s of greedy, the grid of windows, and last the one with thresholds
    identical: bool  # whether all of these wrote greedy's texts
    pairs: dict[tuple[int, ...], float]  # predicted speed-up of one or two exits, with the best windows
    compared: dict[str, list[tuple[float, float]]]  # predicted and measured speed-ups, by kind of ladder
    rates: dict[str, tuple[float, float]]  # by category: p, draft and intermediate agree; q, intermediate and full do
    law: np.ndarray  # (3, V) distributions of one token: the draft exit's, the full model's, what HiSpec sampled
    moved: dict[str, list[float]]  # by step: how far the widths 1..WIDTH of a pass move logits
    results: list[dict]  # the bench's, one a method


# ---- gathering ------------------------------------------------------------------------------------------


def gather(
    model: Llama, requests: list, results: list[dict], tuned: dict, max_new_tokens: int, stop, make_decoder: Callable,
    fixed: bool,
) -> Data:  # fmt: skip
    """Measure and predict all that the figures show.

    requests: the bench's, each with category, prompt and greedy answer. results: its dict for each method. tuned: by
    kind of ladder, with the ladders that tuning ran if it was part of this run. make_decoder, fixed: as in tune.tune.
    """
    n = model.config.n_layers
    methods = {r["name"]: as_ladder(r) for r in results}
    ladder = methods["hispec"]
    depths = sorted({*ladder[0], *default_exits(model), *paper_exits(n), *(d for d in DEPTHS if d <= n // 2)})
    read = tuple(sorted({*depths, *(e for exits, _, _ in methods.values() for e in exits if e > 0)}))
    decode = make_decoder()
    costs = measure_costs(model, read, decode, fixed)
    bar = tqdm(requests, "recording what each exit predicts", leave=False)
    traces = [trace(model, r.prompt, max_new_tokens, stop, read, decode) for r in bar]
    firsts = {r.category: i for i, r in reversed(list(enumerate(requests)))}
    few = sorted(firsts.values())[:FEW]

    def predicted(fields: list[Rungs], chosen, what: str) -> dict[Rungs, float]:
        """Speed-ups over greedy on the chosen requests."""
        seconds = {
            x: sum(traces[i].prefill + replay(traces[i], x, costs, n) for i in chosen)
            for x in tqdm([GREEDY, *fields], f"predicting {what}", leave=False)
        }
        return {x: seconds[GREEDY] / seconds[x] for x in fields}

    windows = [w for w in product(N_D, N_I) if w[0] <= w[1]]
    adaptive = ladder
    if not any(ladder[2]):  # not tuned, or without success: what the replay finds best
        doubts: list[Rungs] = [(ladder[0], w, t) for w in windows for t in product(THRESHOLDS, repeat=2) if any(t)]
        seen = predicted(doubts, few, "thresholds")
        adaptive = max(seen, key=seen.__getitem__)
    ladders = [(ladder[0], w, (0.0, 0.0)) for w in windows] + [adaptive]
    decoders = {ladder: make_decoder(*ladder) for ladder in (GREEDY, *ladders)}
    made = run(decoders, [requests[i].prompt for i in few], max_new_tokens, stop)
    seconds = {x: sum(g.seconds for g in made[x]) for x in made}

    sets = [exits for k in (1, 2) for exits in combinations(depths, k)]
    fields = [(e, w, (0.0,) * len(e)) for e in sets for w in product(WINDOWS, repeat=len(e)) if list(w) == sorted(w)]
    best = dict.fromkeys(sets, 0.0)
    for x, speed_up in predicted(fields, range(len(traces)), "pairs of exits").items():
        best[x[0]] = max(best[x[0]], speed_up)

    compared = {
        f"tuning: {kind}": [(r["predicted"], r["measured"]) for r in t.get("ran", ())] for kind, t in tuned.items()
    }
    compared["grid of windows"] = [
        (p, seconds[GREEDY] / seconds[x]) for x, p in predicted(ladders, few, "grid").items()
    ]
    guess = predicted(list(methods.values()), range(len(traces)), "methods")
    compared["all prompts"] = [(guess[methods[r["name"]]], r["speedup_vs_greedy"]) for r in results if r["exits"]]
    texts = [requests[i].greedy for i in few]
    return Data(
        n_layers=n,
        ladder=ladder,
        costs=costs,
        agreement=agreement(model, requests),
        speed={x: sum(len(g.tokens) for g in made[x]) / seconds[x] for x in made},
        identical=all([g.tokens for g in made[x]] == texts for x in made),
        pairs=best,
        compared={kind: points for kind, points in compared.items() if points},
        rates={
            category: rates([t for t, r in zip(traces, requests) if category in ("all", r.category)], ladder[0], n)
            for category in ("all", *firsts)
        },
        law=law(model, requests, ladder, make_decoder),
        moved=moved(model, [token for i in few for token in requests[i].prompt + requests[i].greedy]),
        results=results,
    )


def as_ladder(r: dict) -> Rungs:
    return tuple(r["exits"]), tuple(r["windows"]), tuple(r["thresholds"]) or (0.0,) * len(r["exits"])


def paper_exits(n_layers: int) -> tuple[int, int]:
    """An eighth and a quarter of the depth."""
    return ceil(n_layers / 8), max(ceil(n_layers / 4), ceil(n_layers / 8) + 1)


def agreement(model: Llama, requests: list) -> tuple[list[float], list[float]]:
    """How often exits 1..n_layers-1 choose the full model's token: on the prompts, and on the greedy answers."""
    sums, counts = np.zeros((2, model.config.n_layers - 1)), [0, 0]
    for r in tqdm(requests, "agreement by layer", leave=False):
        ids, first = torch.tensor([r.prompt + r.greedy]), len(r.prompt)
        for k, (row, start) in enumerate([(ids[:, :first], 0), (ids, first - 1)]):
            if n := row.shape[1] - 1 - start:  # predictions: a token each after the first, or in the answer
                sums[k] += n * np.array(measure(model, row, start)[1])
                counts[k] += n
    return tuple((s / n if n else s).tolist() for s, n in zip(sums, counts))


@torch.inference_mode()
def law(model: Llama, requests: list, ladder: Rungs, make_decoder: Callable) -> np.ndarray:
    """One token's distribution (3, V) at temperature 1: the draft exit's, the full model's, HiSpec's in SAMPLES runs.

    After the first OPENING tokens of the prompt for which draft and full model differ most on one token.
    """
    both = {}
    for opening in {tuple(r.prompt[:OPENING]) for r in requests}:
        ids = torch.tensor([opening], device=model.embed.weight.device)
        rows = torch.stack([model(ids, exit)[0, -1] for exit in (ladder[0][0], model.config.n_layers)])
        both[opening] = probabilities(rows, 1.0)
    opening = max(both, key=lambda o: (both[o][0] - both[o][1]).abs().max().item())
    decode, count = make_decoder(*ladder), np.zeros(model.config.vocab_size)
    for seed in tqdm(range(SAMPLES), "sampling one token", leave=False):
        count[decode(opening, 1, temperature=1.0, seed=seed).tokens] += 1
    return np.stack([*both[opening].cpu().numpy(), count / SAMPLES])


@torch.inference_mode()
def moved(model: Llama, text: list[int]) -> dict[str, list[float]]:
    """By step: how far logits are at most from those of passes over one position, if the pass holds 1 .. WIDTH."""
    n, weight, depths = min(CONTEXT + WIDTH, model.config.max_seq_len), model.embed.weight, (model.config.n_layers,)
    tokens, at, fast = torch.tensor((text * n)[:n], device=weight.device), n - WIDTH, FixedStep(model, (), n)
    plain = KVCache(model.config, (), n, weight.device, weight.dtype)
    far: dict[str, list[float]] = {"plain": [], "fixed": []}
    for name, run_step, cache in (("plain", step, plain), ("fixed", fast, fast.open(model, (), n))):
        run_step(model, cache, depths, tokens, at, 0, 1)
        alone = torch.cat([run_step(model, cache, depths, tokens, at + i, 0, 1) for i in range(1, WIDTH + 1)])
        for width in range(1, WIDTH + 1):
            cache.rollback(at)
            logits = run_step(model, cache, depths, tokens, at + width, 0, width)
            far[name].append((logits - alone[:width]).abs().max().item())
    return far


def rates(traces: list, exits: tuple[int, ...], n_layers: int) -> tuple[float, float]:
    """p and q along the greedy texts: how often draft and intermediate agree, and intermediate and full model."""
    draft, middle, full = ([c for t in traces for c in t.choices[e]] for e in (*exits, n_layers))
    return statistics.fmean(map(eq, draft, middle)), statistics.fmean(map(eq, middle, full))


def step_seconds(costs: Costs, depth: int, width: int = 1, below: int = 0) -> float:
    """A step of the level at this depth over `width` positions, of which all but one passed the layers `below` before.

    The one is the last draft, which the level below has written but not run: it takes all layers, the lower ones alone.
    """
    layers = costs.trunk[below][1] + costs.trunk[depth][width] - costs.trunk[below][width]
    return layers + costs.head[depth][width] + costs.loop


def speed_up_by_rates(d: float, i: float, p, q, full: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Speed-ups over greedy by a formula: of a single layer and of HiSpec, each with its best windows.

    p, q: how often the draft exit chooses as the intermediate does, and that as the full model does (arrays, 0..1),
    for each token independently. d, i: a step of either exit, in steps of the full model. A round of n drafts gives r
    tokens with probability p^(r-1) (1-p) for r <= n and p^n for r = n+1, for n d + i. After m >= N_i tokens one full
    verification, for `full`, keeps (1 - q^(m+1)) / (1 - q) of them, its own included. A single layer that is right
    with probability a, pq at the draft exit and q at the intermediate, gives (1 - a^(k+1)) / (1 - a) for k steps and
    one of the full model.
    """
    p, q = np.broadcast_arrays(p, np.minimum(q, 1 - 1e-6))  # at 1 the sums below would be 0 / 0
    exits, longest = ((p * q, d), (q, i)), sum(LONGEST)
    single = np.max([(1 - a ** (k + 1)) / (1 - a) / (k * c + 1) for a, c in exits for k in range(1, longest)], axis=0)
    hispec = np.zeros(p.shape)
    for n in range(1, LONGEST[0] + 1):
        chances = [p ** (r - 1) * (1 - p) for r in range(1, n + 1)] + [p**n]
        reached = [np.ones_like(p)]  # how likely it is that some round ends at so many tokens
        for m in range(1, LONGEST[1]):
            reached.append(sum(reached[m - r] * c for r, c in enumerate(chances, 1) if r <= m))
        for N in range(1, LONGEST[1] + 1):
            ends = [
                sum(reached[m - r] * c for r, c in enumerate(chances, 1) if 0 <= m - r < N) for m in range(N, N + n + 1)
            ]
            tokens = sum(end * (1 - q ** (m + 1)) / (1 - q) for m, end in enumerate(ends, N))
            hispec = np.maximum(hispec, tokens / (sum(reached[:N]) * (n * d + i) + full))
    return single, hispec


# ---- drawing --------------------------------------------------------------------------------------------


def plot_pass(figure: Figure, data: Data) -> str:
    axes, n, widths = figure.subplots(), data.n_layers, np.arange(1, WIDTHS[-1] + 1)
    whole = 1e3 * (np.array(data.costs.trunk[n]) + data.costs.head[n])[1:]
    axes.plot(widths, widths * whole[0], color="0.4", linestyle=":", label="as many passes over one")
    axes.plot(widths, whole, label="one pass over all")
    axes.plot(widths, whole / widths, label="of it, for each position")
    axes.set(xlabel="positions in a pass", ylabel="milliseconds", xlim=(1, widths[-1]), ylim=(0, 1.5 * whole[-1]))
    axes.set_xticks([1, *range(4, WIDTHS[-1] + 1, 4)])
    axes.set_title(f"A pass over 8 positions takes {whole[7] / whole[0]:.1f} times as long as a pass over one")
    axes.legend()
    return f"The full model, {CONTEXT} positions into a text. Measured at {', '.join(map(str, WIDTHS))} positions."


def plot_wall(figure: Figure, data: Data) -> str:
    (draft, middle), (n_d, n_i), _ = data.ladder
    n, costs, axes = data.n_layers, data.costs, figure.subplots()
    drafted = {e: 1e3 * step_seconds(costs, e) for e in sorted(costs.head)}
    checked = {e: 1e3 * step_seconds(costs, e, n_d + 1, draft) / (n_d + 1) for e in drafted if e > draft}
    full = 1e3 * step_seconds(costs, n, n_i + 1, middle) / (n_i + 1)
    axes.plot(*zip(*drafted.items()), "o-", label="drafted: 1 position a step")
    axes.plot(*zip(*checked.items()), "s-", label=f"verified above exit {draft}: {n_d + 1} positions a step")
    axes.plot(n, full, "D", color=COLOURS[4], markersize=9, label=f"verified in full: {n_i + 1} positions a step")
    marks = [(draft, drafted[draft], 0), (middle, checked[middle], 1), (n, full, 4), (n, drafted[n], 0)]
    for depth, ms, colour in marks:
        text = f"{ms:.1f}" if ms < drafted[n] else f"greedy {ms:.1f}"
        axes.annotate(text, (depth, ms), (2, 8), textcoords="offset points", ha="right", color=COLOURS[colour])
    axes.set(xlabel="depth of the level (layers)", ylabel="milliseconds a token", ylim=(0, 1.12 * drafted[n]))
    axes.set_title(
        f"A token takes {drafted[draft]:.1f} ms to draft, {checked[middle]:.1f} to check at exit {middle}, "
        f"{full:.1f} to verify in full"
    )
    axes.legend()
    return (
        f"From measured seconds of layers, heads and loop. HiSpec here: exits {draft} and {middle}, windows {n_d} and "
        f"{n_i}. A verification reads its drafts and one token of its own, and starts where the exit below ended."
    )


def plot_agreement(figure: Figure, data: Data) -> str:
    axes, exits, layers = figure.subplots(), data.ladder[0], range(1, data.n_layers)
    for share, label, style in zip(data.agreement, ("prompts' own text", "greedy answers"), ("o-", "s-")):
        axes.plot(layers, [100 * a for a in share], style, markersize=5, label=label)
    for exit in exits:
        axes.axvline(exit, color="0.5", linestyle=":", zorder=0)
    axes.set(xlabel="exit after layer", ylabel="same token as the full model (%)", ylim=(0, 102))
    seen = " and ".join(f"exit {exit} on {data.agreement[1][exit - 1]:.0%}" for exit in exits)
    axes.set_title(f"On greedy answers the full model agrees with {seen}")
    axes.legend(loc="lower right")
    return "Teacher-forced: every layer reads the same text. Dotted: HiSpec's exits in this run."


def plot_reuse(figure: Figure, data: Data) -> str:
    axes, ours = figure.subplots(), [r for r in data.results if r["positions"]]
    totals = {}
    for x, r in enumerate(ours):
        depths, bottom = (0, *r["exits"], data.n_layers), 0.0
        for k, (positions, above, depth) in enumerate(zip(r["positions"], depths, depths[1:])):
            colour = COLOURS[len(r["positions"]) - 1 - k]  # the full model's is the same for all
            axes.bar(x, positions * (depth - above), 0.6, bottom, color=colour, edgecolor="white")
            bottom += positions * (depth - above)
        alone = sum(positions * depth for positions, depth in zip(r["positions"], depths[1:]))
        axes.plot(x, alone, "_k", markersize=40, markeredgewidth=3)
        axes.annotate(f"{bottom:.0f}", (x, bottom / 2), ha="center", va="center", color="white", weight="bold")
        axes.annotate(f"{alone:.0f}", (x, alone), (0, 6), textcoords="offset points", ha="center")
        totals[r["name"]] = bottom, alone
    axes.set_xticks(range(len(ours)), ["\n".join([r["name"], ", ".join(map(str, r["exits"]))]) for r in ours])
    axes.set(ylabel="layers run for each new token")
    axes.margins(y=0.12)
    shared, alone = totals["hispec"]
    axes.set_title(f"HiSpec runs {shared:.0f} layers a token; if its levels shared nothing, it would be {alone:.0f}")
    return (
        "Counted: passes of a position through a layer, kept or rejected, after the prompt, over the tokens written. "
        "Stacked by segment, the draft's below and the full model's on top. Black: if each level began at layer 0."
    )


def plot_sampling(figure: Figure, data: Data) -> str:
    axes, likeliest = figure.subplots(), np.argsort(-data.law[1], kind="stable")[:SHOWN]
    draft, full, drawn = bars = np.array([[*law[likeliest], 1 - law[likeliest].sum()] for law in data.law])
    names = f"exit {data.ladder[0][0]}, which drafts", "the full model", f"HiSpec, {SAMPLES} samples"
    for k, (name, heights, colour) in enumerate(zip(names, bars, ("0.7", *COLOURS))):
        axes.bar(np.arange(len(heights)) + 0.28 * (k - 1), 100 * heights, 0.26, label=name, color=colour)
    axes.set_xticks(range(len(full)), [*(str(i + 1) for i in range(len(likeliest))), "others"])
    axes.set(xlabel="the full model's likeliest tokens", ylabel="probability (%)")
    plain = np.random.default_rng(0).multinomial(SAMPLES, np.clip(full, 0, None) / full.clip(0).sum(), 1000) / SAMPLES
    chance, off, far = (np.abs(x - full).sum(-1).mean() / 2 for x in (plain, drawn, draft))
    axes.set_title(f"HiSpec's samples are {off:.1%} off the full model's law, the draft's law is {far:.0%} off")
    axes.legend()
    return (
        f"One token at temperature 1, after the first {OPENING} of the prompt where draft and full model differ most. "
        f"Off: half the sum of the bars' differences; {SAMPLES} samples of the full model itself are {chance:.1%} off."
    )


def plot_one_shape(figure: Figure, data: Data) -> str:
    axes, labels = figure.subplots(), ("a pass as wide as its positions", f"a pass {WIDTH} wide, padded")
    for far, label, style in zip(data.moved.values(), labels, ("o-", "s-")):
        axes.plot(range(1, WIDTH + 1), far, style, label=label)
    axes.set(xlabel="positions in the pass", ylabel="largest change of a logit")
    plain, fixed = map(max, data.moved.values())
    axes.set_title(f"Company in a pass moves logits by up to {plain:.2g}, in a pass of one shape by {fixed:.2g}")
    axes.legend()
    return f"The full model, {CONTEXT} positions into a text at most, against passes over one position each."


def plot_windows(figure: Figure, data: Data) -> str:
    axes, greedy = figure.subplots(), data.speed[GREEDY]
    *grid, adaptive = (x for x in data.speed if x != GREEDY)
    for k, n_d in enumerate(N_D):
        line = [(x[1][1], data.speed[x]) for x in grid if x[1][0] == n_d]
        colour = matplotlib.colormaps["viridis"](k / len(N_D))
        axes.plot(*zip(*line), marker="osD^vP"[k], color=colour, label=f"$N_d$ = {n_d}")
    label = "thresholds {:g} and {:g},\nwindows at most {} and {}".format(*adaptive[2], *adaptive[1])
    axes.axhline(data.speed[adaptive], color=COLOURS[4], linestyle="--", label=label)
    axes.axhline(greedy, color="0.4", linestyle=":", label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(N_I, map(str, N_I))
    axes.minorticks_off()
    axes.set(xlabel="$N_i$: tokens gathered before a full verification", ylabel="tokens/s")
    best = max(grid, key=data.speed.__getitem__)
    axes.set_title(
        f"Over greedy: {data.speed[best] / greedy:.2f}x with the best windows {best[1]}, "
        f"{data.speed[adaptive] / greedy:.2f}x with thresholds"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    same = "Every text" if data.identical else "Not every text"
    draft, middle = data.ladder[0]
    return (
        f"Measured at exits {draft} and {middle}, on one prompt of each category ({FEW} at most), the faster of two "
        f"turns. {same} is greedy's, token for token."
    )


def plot_exits(figure: Figure, data: Data) -> str:
    axes, paper = figure.subplots(), paper_exits(data.n_layers)
    pairs = {exits: speed_up for exits, speed_up in data.pairs.items() if len(exits) == 2}
    drafts, middles = (sorted({exits[k] for exits in pairs}) for k in (0, 1))
    table = np.full((len(drafts), len(middles)), np.nan)
    low, high = min(pairs.values()), max(pairs.values())
    for (draft, middle), speed_up in pairs.items():
        row, column = drafts.index(draft), middles.index(middle)
        table[row, column] = speed_up
        colour = "black" if speed_up > low + 0.6 * (high - low) else "white"
        axes.text(column, row, f"{speed_up:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(axes.imshow(table, cmap="cividis", origin="lower", aspect="auto"), label="speed-up over greedy")
    marks = (
        (paper, COLOURS[4], 0.47, "the paper's 1/8 and 1/4"),
        (data.ladder[0], COLOURS[3], 0.4, "this run's HiSpec"),
    )
    for (draft, middle), colour, r, label in marks:
        corner = middles.index(middle) - r, drafts.index(draft) - r
        axes.add_patch(Rectangle(corner, 2 * r, 2 * r, fill=False, edgecolor=colour, linewidth=4, label=label))
    axes.set_xticks(range(len(middles)), map(str, middles))
    axes.set_yticks(range(len(drafts)), map(str, drafts))
    axes.set(xlabel="intermediate exit (layer)", ylabel="draft exit (layer)")
    best = max(pairs, key=pairs.__getitem__)
    axes.set_title(f"Predicted: {high:.2f}x with the best exits {best}, {pairs[paper]:.2f}x with the paper's {paper}")
    axes.legend(loc="upper left")
    (single,) = max((exits for exits in data.pairs if len(exits) == 1), key=data.pairs.__getitem__)
    return (
        "Predicted by replaying the recursion on measured costs and recorded texts, the best windows for each pair, no "
        f"thresholds. The best single layer by the same prediction: exit {single}, {data.pairs[single,]:.2f}x."
    )


def plot_categories(figure: Figure, data: Data) -> str:
    axes, drafting = figure.subplots(), [r for r in data.results if r["name"] != "greedy"]
    groups = ["all", *drafting[0]["by_category"]]
    width = 0.84 / len(drafting)
    axes.axhline(1, color="0.4", linestyle=":", label="greedy")
    for k, r in enumerate(drafting):
        values = [(r["by_category"] | {"all": r})[group]["speedup_vs_greedy"] for group in groups]
        places = np.arange(len(groups)) + (k - (len(drafting) - 1) / 2) * width
        exits = f" ({', '.join(map(str, r['exits']))})" if r["exits"] else ""
        bars = axes.bar(places, values, 0.92 * width, color=COLOURS[k % len(COLOURS)], label=r["name"] + exits)
        axes.bar_label(bars, fmt="%.2f", fontsize=10, rotation=90, padding=3)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.12)
    axes.set(ylabel="speed-up over greedy")
    hispec = next(r for r in drafting if r["name"] == "hispec")["by_category"]
    low, *_, high = sorted([(c["speedup_vs_greedy"], name) for name, c in hispec.items()] * 2)
    axes.set_title(f"HiSpec over greedy: {low[0]:.2f}x ({low[1]}) to {high[0]:.2f}x ({high[1]})")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)
    return "Measured; medians over the repeats of ratios within a repeat. In brackets: exits."


def plot_predictions(figure: Figure, data: Data) -> str:
    axes = figure.subplots()
    for k, (kind, points) in enumerate(data.compared.items()):
        style: dict[str, Any] = dict(color=COLOURS[k % 8], markersize=9, markeredgecolor="white", markeredgewidth=0.6)
        axes.plot(*zip(*points), "osD^vP*X"[k % 8], label=kind, **style)
    every = [point for points in data.compared.values() for point in points]
    ends = 0.95 * min(map(min, every)), 1.05 * max(map(max, every))
    axes.plot(ends, ends, color="0.4", linestyle=":", label="as predicted")
    axes.set(xlabel="predicted speed-up over greedy", ylabel="measured speed-up over greedy", aspect="equal")
    off = statistics.median(abs(predicted / measured - 1) for predicted, measured in every)
    axes.set_title(f"Half of {len(every)} predictions are within {off:.0%} of what was measured")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return "Each point is a ladder. A prediction replays the recursion on measured costs and recorded texts."


def plot_where(figure: Figure, data: Data) -> str:
    whole = step_seconds(data.costs, data.n_layers)
    d, i = (step_seconds(data.costs, exit) / whole for exit in data.ladder[0])
    panels = {f"this run: d = {d:.2f}, i = {i:.2f}": (d, i)}
    panels |= {"d = 1/8, i = 1/4": (1 / 8, 1 / 4), "d = 1/32, i = 1/8": (1 / 32, 1 / 8)}
    row = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (title, (cheap, dear)) in zip(row, panels.items()):
        single, hispec = speed_up_by_rates(cheap, dear, RATES[:, None], RATES)  # rows p, columns q
        filled = axes.contourf(RATES, RATES, hispec, LEVELS, cmap="cividis", extend="both")
        axes.contour(RATES, RATES, hispec, [1], colors="white", linewidths=3)
        axes.contourf(RATES, RATES, single / hispec, [1, np.inf], colors="none", hatches=["//"])
        axes.set_title(title, fontsize=13)
        axes.set(xlabel="q: intermediate = full", xlim=(RATES[0], 1), ylim=(RATES[0], 1))
    row[0].set_ylabel("p: draft = intermediate")
    for category, (p, q) in data.rates.items():
        style = dict(marker="*", markersize=16) if category == "all" else dict(marker="o", markersize=7)
        row[0].plot(q, p, color=COLOURS[4], markeredgecolor="white", clip_on=False, zorder=3, **style)
    figure.colorbar(filled, ax=row, label="HiSpec's speed-up over greedy", ticks=LEVELS)
    p, q = data.rates["all"]
    measured = next(r for r in data.results if r["name"] == "hispec")["speedup_vs_greedy"]
    formula = float(speed_up_by_rates(d, i, p, q)[1])
    figure.suptitle(f"At p = {p:.2f} and q = {q:.2f} the formula gives {formula:.2f}x, measured {measured:.2f}x")
    return (
        "By formula: windows tuned, no thresholds, tokens independent, no prompt, a wide step as dear as a narrow one. "
        "d, i: cost of a step of either exit, head included, over the full model's. White line: as fast as greedy. "
        "Hatched: the best single layer is faster. Star: all prompts of this run; dots: its categories."
    )


PLOTS: dict[str, Callable[[Figure, Data], str]] = {
    "one-pass": plot_pass,
    "verification-wall": plot_wall,
    "agreement": plot_agreement,
    "reuse": plot_reuse,
    "windows": plot_windows,
    "sampling": plot_sampling,
    "one-shape": plot_one_shape,
    "exits": plot_exits,
    "categories": plot_categories,
    "predictions": plot_predictions,
    "where-it-pays": plot_where,
}


def save(folder: Path, data: Data, header: dict) -> None:
    """Write each figure as PNG and SVG; below it what its plot says of it, then how and where it was measured."""
    for name, plot in PLOTS.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9.6, 5.6), layout="constrained")
            below = (plot(figure, data), in_words(header), header["command"])
            lines = [line for text in below for line in textwrap.wrap(text, 125, break_on_hyphens=False)]
            figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9, color="0.3")
            for kind, about in (("png", None), ("svg", {"Date": None})):
                options: dict[str, Any] = dict(format=kind, dpi=150, metadata=about)
                write_whole(folder / f"{name}.{kind}", partial(figure.savefig, **options))
