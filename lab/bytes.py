"""Compare formula and replay, by tokens and by bytes: easy text is easy at every depth.

    python -m lab.bytes --json results/cpu-tiny-bytes.json --figure results/figures/bytes

The cost formula assumes that agreements are independent, from level to level and from token to
token. The replay of recorded texts does not. Both predict how much faster the two exits of a model
are than the better one alone, each with its best windows: first for the model's tokens, then for
the same texts read byte by byte. An exit's choice of a byte is the likeliest next byte under its
distribution over the tokens that begin with the bytes so far. A pass over a byte is charged the
cost of a pass over a token.
"""

import json
from functools import cache, partial
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from checkpoints import load
from checkpoints.console import Parser, command, say, table
from checkpoints.files import describe, must_be_writable, write_whole
from checkpoints.ladders import Ladder, default_exits
from hispec import Step, generate
from lab.costs import Costs, Trace, replay, trace
from lab.figures import rates, speed_up_by_rates, step_seconds
from lab.plots import COLOURS, draw
from lab.tune import GREEDY, WINDOWS, costs_of_ladders
from model import Llama

PROMPTS = Path(__file__).parent.parent / "prompts" / "python.jsonl"
TOKENS = 64  # per text
CHAIN = 4  # drafts in a row whose agreement is counted


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="NAME", help="NAME.png and NAME.svg")
    args = parser.parse_args()
    for file in filter(None, (args.json, args.figure and args.figure.with_suffix(".png"))):
        must_be_writable(file)
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, "cpu", torch.float32)
    assert tokenizer is not None
    questions = map(json.loads, PROMPTS.read_text("utf-8").splitlines())
    prompts = [tokenizer.chat(question["turns"][:1]) for question in questions]
    found = measure(model, prompts, [tokenizer.spell(i) for i in range(tokenizer.n_vocab)])
    header = describe(args.model, "cpu", torch.float32)
    say(table(rows(found)))
    if args.json:
        write_whole(args.json, json.dumps({**header, **found}, indent=1) + "\n")
    if args.figure:
        draw(args.figure, partial(plot, found=found), header)


def measure(model: Llama, prompts: list[list[int]], spell: list[bytes]) -> dict:
    """Return `compared` along greedy texts, read in "tokens" and in "bytes"."""
    step, n, stop = model.fast or Step(model), model.config.n_layers, ()
    exits = default_exits(model)[:2]

    def decoder(exits=(), windows=(), thresholds=()):
        return partial(generate, model, exits=exits, windows=windows, thresholds=thresholds)

    # temperature 1 without sampling: each exit's distribution along the greedy text
    traces = [trace(model, p, TOKENS, stop, exits, decoder(), temperature=0.0) for p in prompts]
    costs = costs_of_ladders(step, exits, traces, TOKENS, stop, decoder)
    in_bytes = [as_bytes(t, spell) for t in traces]
    return {
        "tokens": compared(traces, costs, exits, n),
        "bytes": compared(in_bytes, costs, exits, n),
    }


def as_bytes(trace: Trace, spell: list[bytes]) -> Trace:
    """Return the same text byte by byte, with each depth's likeliest next byte."""

    @cache
    def nexts(begun: bytes) -> tuple[Tensor, Tensor]:
        """Return the tokens that continue these bytes, and the next byte of each."""
        ids = [
            i for i, word in enumerate(spell) if len(word) > len(begun) and word.startswith(begun)
        ]
        return torch.tensor(ids), torch.tensor([spell[i][len(begun)] for i in ids])

    def likeliest(word: bytes, row: Tensor) -> list[int]:
        ways = [nexts(word[:j]) for j in range(len(word))]
        return [int(torch.bincount(byte, weights=row[ids]).argmax()) for ids, byte in ways]

    text = trace.choices[max(trace.choices)]
    choices: dict[int, list[int]] = {
        depth: [byte for token, row in zip(text, p) for byte in likeliest(spell[token], row)]
        for depth, p in trace.p.items()
    }
    choices[max(choices)] = [byte for token in text for byte in spell[token]]
    sure = {depth: [1.0] * len(one) for depth, one in choices.items()}
    return Trace([byte for token in trace.prompt for byte in spell[token]], 0.0, choices, sure)


def compared(traces: list[Trace], costs: Costs, exits: tuple[int, ...], n_layers: int) -> dict:
    """Return how often exits agree, also in a row, beside independence's figures; and speed-ups."""
    draft, middle, full = (
        np.concatenate([t.choices[depth] for t in traces]) for depth in (*exits, n_layers)
    )
    right = {"both": (draft == full) & (middle == full), "none": (draft != full) & (middle != full)}
    right |= {"draft only": (draft == full) & (middle != full)}
    right |= {"middle only": (draft != full) & (middle == full)}
    a, b = (draft == full).mean(), (middle == full).mean()
    if_independent = {"both": a * b, "none": (1 - a) * (1 - b)}
    if_independent |= {"draft only": a * (1 - b), "middle only": (1 - a) * b}
    same = [np.equal(t.choices[exits[0]], t.choices[exits[1]]) for t in traces]
    alpha, beta = rates(traces, exits, n_layers)
    cost = [step_seconds(costs, exit) / step_seconds(costs, n_layers) for exit in exits]
    single, both = speed_up_by_rates(cost[0], cost[1], alpha, beta)
    replayed_single, replayed = replayed_best(traces, costs, exits, n_layers)
    return {
        "exits": exits,
        "jointly": {name: float(some.mean()) for name, some in right.items()},
        "jointly_if_independent": {name: float(x) for name, x in if_independent.items()},
        "in_a_row": [in_a_row(same, k) for k in range(1, CHAIN + 1)],
        "in_a_row_if_independent": [alpha**k for k in range(1, CHAIN + 1)],
        "formula": {"single": float(single), "hispec": float(both)},
        "replay": {"single": replayed_single, "hispec": replayed},
    }


def in_a_row(same: list[np.ndarray], k: int) -> float:
    """The share of places at which the first k drafts all equal the middle exit's choices."""
    starts = [np.lib.stride_tricks.sliding_window_view(s, k).all(-1) for s in same if len(s) >= k]
    return float(np.concatenate(starts).mean())


def replayed_best(traces, costs: Costs, exits: tuple[int, ...], n_layers: int) -> tuple:
    """Speed-ups over greedy after the prompt, of the better exit alone and of both, at the best
    windows.
    """

    def seconds(ladder: Ladder) -> float:
        return sum(replay(t, ladder, costs, n_layers) for t in traces)

    alone = min(seconds(((e,), (w,), (0.0,))) for e in exits for w in WINDOWS)
    pairs = combinations_with_replacement(WINDOWS, 2)
    both = min(seconds((exits, windows, (0.0, 0.0))) for windows in pairs)
    return seconds(GREEDY) / alone, seconds(GREEDY) / both


def rows(found: dict) -> list[list[str]]:
    shown = [["", *found]]
    for name in next(iter(found.values()))["jointly"]:
        of = [(f["jointly"][name], f["jointly_if_independent"][name]) for f in found.values()]
        shown.append([f"{name} right", *(f"{a:.0%} ({b:.0%})" for a, b in of)])
    for k in range(CHAIN):
        of = [(f["in_a_row"][k], f["in_a_row_if_independent"][k]) for f in found.values()]
        shown.append([f"first {k + 1} drafts kept", *(f"{a:.0%} ({b:.0%})" for a, b in of)])
    for by in ("formula", "replay"):
        each = [f[by]["hispec"] / f[by]["single"] for f in found.values()]
        shown.append([f"over the better exit, {by}", *(f"{ratio:.2f}x" for ratio in each)])
    shown[0][0] = "measured (if independent)"
    return shown


def plot(figure: Figure, found: dict) -> str:
    left, right = figure.subplots(1, 2)
    bars = [
        (f"{way},\n{how}", f[key])
        for way, f in found.items()
        for how, key in (("measured", "jointly"), ("if independent", "jointly_if_independent"))
    ]
    bottoms = np.zeros(len(bars))
    draft, middle = found["tokens"]["exits"]
    shown = {"both": "both exits", "middle only": f"exit {middle} only"}
    shown |= {"draft only": f"exit {draft} only", "none": "neither"}
    for (name, label), colour in zip(shown.items(), (*COLOURS[:3], "0.7")):
        heights = np.array([100 * shares[name] for _, shares in bars])
        left.bar([way for way, _ in bars], heights, 0.66, bottoms, label=label, color=colour)
        bottoms += heights
    left.tick_params(axis="x", labelsize=9)
    left.set(
        ylabel="tokens, or bytes (%)", ylim=(0, 125), title="Which exits choose as the full model"
    )
    left.legend(ncols=2, loc="upper center")
    at = np.arange(len(found))
    for i, by in enumerate(("formula", "replay")):
        ratios = [f[by]["hispec"] / f[by]["single"] for f in found.values()]
        drawn = right.bar(at + 0.4 * i, ratios, 0.38, label=by, color=COLOURS[i])
        right.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios])
    right.set_xticks(at + 0.2, list(found))
    right.axhline(1, color="0.5", linestyle=":")
    right.set(ylabel="HiSpec over the better exit alone", title="What the middle level is worth")
    right.set_ylim(0, 1.5)
    right.legend(loc="upper left", ncols=2)
    return (
        f"Exits {draft} and {middle}, along greedy texts after all prompts, windows tuned, the "
        "prompt's own pass left out. A pass over a byte is charged what one over a token costs."
    )


if __name__ == "__main__":
    command(main, "stopped: no result was written")
