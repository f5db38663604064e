"""Nine figures of one run of the bench, drawn from the data that figures.py gathered."""

import statistics
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rcsetup
from matplotlib.figure import Figure

from checkpoints.files import in_words, write_whole
from lab.costs import CONTEXT, WIDTHS
from lab.figures import (
    FEW,
    N_D,
    N_I,
    OPENING,
    SAMPLES,
    WIDEST,
    Data,
    speed_up_by_rates,
    step_seconds,
)
from lab.tune import GREEDY

SHOWN = 10  # the likeliest tokens, which get their own bars
RATES = np.linspace(0.3, 1, 36)  # acceptance rates in the figure of the formula
LEVELS = (0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4)  # boundaries of its colours: speed-ups
# Okabe and Ito
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
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
    "svg.hashsalt": "figures",  # the same figure gives the same file
}


def plot_pass(figure: Figure, data: Data) -> str:
    axes, n, widths = figure.subplots(), data.n_layers, np.arange(1, WIDTHS[-1] + 1)
    whole = 1e3 * (np.array(data.costs.trunk[n]) + data.costs.head[n])[1:]
    many = "as many passes over one"
    axes.plot(widths, widths * whole[0], color="0.4", linestyle=":", label=many)
    axes.plot(widths, whole, label="one pass over all")
    axes.plot(widths, whole / widths, label="of it, for each position")
    axes.set(xlabel="positions in a pass", ylabel="milliseconds")
    axes.set(xlim=(1, widths[-1]), ylim=(0, 1.5 * whole[-1]))
    axes.set_xticks([1, *range(4, WIDTHS[-1] + 1, 4)])
    axes.set_title(
        f"A pass over 8 positions takes {whole[7] / whole[0]:.1f} times as long as a pass over one"
    )
    axes.legend()
    return (
        f"The full model, {CONTEXT} positions into a text. Measured at "
        f"{', '.join(map(str, WIDTHS))} positions."
    )


def plot_time(figure: Figure, data: Data) -> str:
    axes, names, bottoms = figure.subplots(), list(data.time), np.zeros(len(data.time))
    most = max(map(sum, data.time.values()))
    roles = zip(("drafting", "intermediate", "full", "loop"), zip(*data.time.values(), strict=True))
    for (role, heights), colour in zip(roles, (*COLOURS[:3], "0.7")):
        bars = axes.bar(names, heights, 0.66, bottoms, label=role, color=colour, edgecolor="white")
        shown = [f"{height:.1f}" if height > 0.04 * most else "" for height in heights]
        axes.bar_label(bars, shown, label_type="center", color="white", weight="bold")
        bottoms += heights
    for name, whole in zip(names, bottoms):
        axes.annotate(
            f"{whole:.1f}", (name, whole), (0, 4), textcoords="offset points", ha="center"
        )
    axes.tick_params("x", labelsize=10)
    axes.set(ylabel="milliseconds a token", ylim=(0, 1.1 * most))
    full = {name.split("\n")[0]: parts[2] for name, parts in data.time.items()}
    axes.set_title(
        f"Full passes take {full['draft exit alone']:.1f} ms a token after the draft exit, "
        f"{full['HiSpec']:.1f} with the middle level"
    )
    axes.legend()
    return (
        "Measured on all prompts, in turns, every step timed by itself, which takes a little "
        "longer; every ladder as it was tuned."
    )


def plot_agreement(figure: Figure, data: Data) -> str:
    axes, exits, layers = figure.subplots(), data.ladder[0], range(1, data.n_layers)
    labels = "prompts' own text", "greedy answers"
    for share, label, style in zip(data.agreement, labels, ("o-", "s-")):
        axes.plot(layers, [100 * a for a in share], style, markersize=5, label=label)
    for exit in exits:
        axes.axvline(exit, color="0.5", linestyle=":", zorder=0)
    marks = [(e, 100 * share[e - 1]) for share in data.agreement for e in data.trained]
    if marks:
        axes.plot(*zip(*marks), "D", color=COLOURS[4], markersize=10, label="trained exits")
    axes.set(xlabel="exit after layer", ylabel="same token as the full model (%)", ylim=(0, 102))
    seen = " and ".join(f"exit {exit} on {data.agreement[1][exit - 1]:.0%}" for exit in exits)
    axes.set_title(f"On greedy answers the full model agrees with {seen}")
    axes.legend(loc="lower right")
    return (
        "Teacher-forced: every layer reads the same text. Exits without a diamond were not "
        "trained. Dotted: HiSpec's exits in this run."
    )


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
        inside: dict[str, Any] = dict(ha="center", va="center", color="white", weight="bold")
        axes.annotate(f"{bottom:.0f}", (x, bottom / 2), **inside)
        axes.annotate(f"{alone:.0f}", (x, alone), (0, 6), textcoords="offset points", ha="center")
        totals[r["name"]] = bottom, alone
    names = [
        f"{r['name']}\n{', '.join(map(str, r['exits']))}\n{r['tokens_per_target_pass']:.1f}"
        for r in ours
    ]
    axes.set_xticks(range(len(ours)), names)
    axes.set(ylabel="layers run for each new token")
    axes.margins(y=0.12)
    shared, alone = totals["hispec"]
    axes.set_title(
        f"HiSpec runs {shared:.0f} layers a token; if its levels shared nothing, it would be "
        f"{alone:.0f}"
    )
    return (
        "Counted: passes of a position through a layer, kept or rejected, after the prompt, over "
        "the tokens written. "
        "Stacked by segment, the draft's below and the full model's on top. Black: if each level "
        "began at layer 0. Under the names: exits, and tokens for each full pass."
    )


def plot_sampling(figure: Figure, data: Data) -> str:
    axes, likeliest = figure.subplots(), np.argsort(-data.one_token[1], kind="stable")[:SHOWN]
    bars = np.array([[*row[likeliest], 1 - row[likeliest].sum()] for row in data.one_token])
    draft, full, drawn = bars
    drafts = f"exit {data.ladder[0][0]}, which drafts"
    names = drafts, "the full model", f"HiSpec, {SAMPLES} samples"
    for k, (name, heights, colour) in enumerate(zip(names, bars, ("0.7", *COLOURS))):
        places = np.arange(len(heights)) + 0.28 * (k - 1)
        axes.bar(places, 100 * heights, 0.26, label=name, color=colour)
    axes.set_xticks(range(len(full)), [*(str(i + 1) for i in range(len(likeliest))), "others"])
    axes.set(xlabel="the full model's likeliest tokens", ylabel="probability (%)")
    exact = full.clip(0) / full.clip(0).sum()
    plain = np.random.default_rng(0).multinomial(SAMPLES, exact, 1000) / SAMPLES
    chance, off, far = (np.abs(x - full).sum(-1).mean() / 2 for x in (plain, drawn, draft))
    axes.set_title(
        f"HiSpec's samples are {off:.1%} off the full model's distribution, the draft's {far:.0%}"
    )
    axes.legend()
    return (
        f"One token at temperature 1, after the first {OPENING} of the prompt where draft and full "
        "model differ most. "
        f"Off: half the sum of the bars' differences; {SAMPLES} samples of the full model itself "
        f"are {chance:.1%} off."
    )


def plot_one_shape(figure: Figure, data: Data) -> str:
    axes = figure.subplots()
    labels = "ordinary products", "as passes run here"
    for far, label, style in zip(data.moved.values(), labels, ("o-", "s-")):
        axes.plot(range(1, WIDEST + 1), far, style, label=label)
    axes.set(xlabel="positions in the pass", ylabel="largest change of a logit")
    plain, ours = map(max, data.moved.values())
    axes.set_title(
        f"Company in a pass moves logits by up to {plain:.2g}, as passes run here by {ours:.2g}"
    )
    axes.legend()
    return (
        f"The full model, {CONTEXT} positions into a text at most, against passes over one "
        "position each."
    )


def plot_windows(figure: Figure, data: Data) -> str:
    axes, greedy = figure.subplots(), data.speed[GREEDY]
    *grid, adaptive = (x for x in data.speed if x != GREEDY)
    for k, n_d in enumerate(N_D):
        line = [(x[1][1], data.speed[x]) for x in grid if x[1][0] == n_d]
        colour = matplotlib.colormaps["viridis"](k / len(N_D))
        axes.plot(*zip(*line), marker="osD^vP"[k], color=colour, label=f"$N_d$ = {n_d}")
    _, most, doubts = adaptive
    label = "thresholds {:g} and {:g},\nwindows at most {} and {}".format(*doubts, *most)
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
        f"Measured at exits {draft} and {middle}, on one prompt of each category ({FEW} at most), "
        "the faster of two "
        f"turns. {same} is greedy's, token for token."
    )


def plot_predictions(figure: Figure, data: Data) -> str:
    axes = figure.subplots()
    for k, (kind, points) in enumerate(data.compared.items()):
        edge: dict[str, Any] = dict(markersize=9, markeredgecolor="white", markeredgewidth=0.6)
        axes.plot(*zip(*points), "osD^vP*X"[k % 8], label=kind, color=COLOURS[k % 8], **edge)
    every = [point for points in data.compared.values() for point in points]
    ends = 0.95 * min(map(min, every)), 1.05 * max(map(max, every))
    axes.plot(ends, ends, color="0.4", linestyle=":", label="as predicted")
    axes.set(xlabel="predicted speed-up over greedy", ylabel="measured speed-up over greedy")
    axes.set(aspect="equal")
    off = statistics.median(abs(predicted / measured - 1) for predicted, measured in every)
    axes.set_title(f"Half of {len(every)} predictions are within {off:.0%} of what was measured")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return (
        "Each point is a ladder. A prediction replays the recursion on measured costs and recorded "
        "texts."
    )


def plot_where(figure: Figure, data: Data) -> str:
    whole = step_seconds(data.costs, data.n_layers)
    d, i = (step_seconds(data.costs, exit) / whole for exit in data.ladder[0])
    panels = {f"this run: d = {d:.2f}, i = {i:.2f}": (d, i)}
    panels |= {"d = 1/8, i = 1/4": (1 / 8, 1 / 4), "d = 1/32, i = 1/8": (1 / 32, 1 / 8)}
    row = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (title, (cheap, dear)) in zip(row, panels.items()):
        single, hispec = speed_up_by_rates(cheap, dear, RATES[:, None], RATES)  # rows alpha
        filled = axes.contourf(RATES, RATES, hispec, LEVELS, cmap="cividis", extend="both")
        axes.contour(RATES, RATES, hispec, [1], colors="white", linewidths=3)
        axes.contourf(RATES, RATES, single / hispec, [1, np.inf], colors="none", hatches=["//"])
        axes.set_title(title, fontsize=13)
        axes.set(xlabel="beta: intermediate = full", xlim=(RATES[0], 1), ylim=(RATES[0], 1))
    row[0].set_ylabel("alpha: draft = intermediate")
    for category, (alpha, beta) in data.rates.items():
        style: dict[str, Any] = dict(markeredgecolor="white", clip_on=False, zorder=3)
        marker, size = ("*", 16) if category == "all" else ("o", 7)
        row[0].plot(beta, alpha, color=COLOURS[4], marker=marker, markersize=size, **style)
    figure.colorbar(filled, ax=row, label="HiSpec's speed-up over greedy", ticks=LEVELS)
    alpha, beta = data.rates["all"]
    measured = next(r for r in data.results if r["name"] == "hispec")["speedup_vs_greedy"]
    less = data.charged
    figure.suptitle(
        f"At alpha = {alpha:.2f}, beta = {beta:.2f} the formula gives {less['formula']:.2f}x, "
        f"measured {measured:.2f}x"
    )
    return (
        "By formula, windows tuned. d, i: cost of a step of either exit, head included, over the "
        "full model's. White line: as fast as greedy. Hatched: the best single exit is faster. "
        "Star: all prompts of this run; dots: its categories. What the formula leaves out, by "
        f"replay, windows tuned: along the recorded texts {less['texts']:.2f}x, with what wide "
        f"passes cost {less['widths']:.2f}x, with the prompt {less['prompt']:.2f}x."
    )


PLOTS: dict[str, Callable[..., str]] = {
    "one-pass": plot_pass,
    "where-time-goes": plot_time,
    "agreement": plot_agreement,
    "reuse": plot_reuse,
    "windows": plot_windows,
    "sampling": plot_sampling,
    "one-shape": plot_one_shape,
    "predictions": plot_predictions,
    "where-it-pays": plot_where,
}


def save(folder: Path, data: Data, header: dict) -> None:
    """Write each figure as PNG and SVG, with its caption and its setting below."""
    for name, plot in PLOTS.items():
        draw(folder / name, partial(plot, data=data), header)


def draw(file: Path, plot: Callable[[Figure], str], header: dict) -> None:
    """Write a figure as FILE.png and FILE.svg, with the caption (from `plot`) and setting below."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        below = (plot(figure), in_words(header), header["command"])
        lines = [x for text in below for x in textwrap.wrap(text, 125, break_on_hyphens=False)]
        at: dict[str, Any] = dict(x=0.01, ha="left", fontsize=9, color="0.3")
        figure.supxlabel("\n".join(lines), parse_math=False, **at)  # a path may hold a $
        for kind, about in (("png", None), ("svg", {"Date": None})):
            options: dict[str, Any] = dict(format=kind, dpi=150, metadata=about)
            write_whole(file.parent / f"{file.name}.{kind}", partial(figure.savefig, **options))
