"""The data for the figures of one run of the bench, measured and predicted; plots.py draws them.

    python bench.py --figures DIR

Everything shown was measured in the same run on the same machine, or predicted from such
measurements. Where there are too many ladders to run, they are replayed on measured costs and
recorded texts, and the figure says so. Two panels show the formula at costs of other machines.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product
from operator import eq

import numpy as np
import torch
from tqdm import tqdm

from arguments import Options, ladder_text
from checkpoints.ladders import OF_A_LADDER, Ladder, as_ladder, as_options, default_exits
from checkpoints.machine import watch
from drafters import LookUp
from hispec import Decoder, Step
from lab.costs import CONTEXT, WIDTHS, Costs, Trace, replay, trace
from lab.tune import GREEDY, THRESHOLDS, WINDOWS, can_matter, costs_of_ladders, run
from model import Llama
from train_exits import measure

N_D, N_I = (1, 2, 3, 4, 6, 8), (2, 4, 6, 8, 12, 16)  # the windows that are run
FEW = 6  # prompts they are run on, each of another category
# the methods that the figure of where time goes compares
BARS = {
    "greedy": "greedy", "draft alone": "draft exit alone", "hispec": "HiSpec",
    "single-layer": "best exit alone", "head, exit": "draft head, exit",
    "look-up, exit": "look-up, exit",
}  # fmt: skip
LONGEST = (12, 24)  # the longest windows the formula tries: N_d, N_i; one exit: their sum
OPENING, SAMPLES = 16, 1000  # tokens before the one that is sampled, and how often it is
WIDEST = 16  # positions in a pass whose logits are compared


@dataclass(frozen=True)
class Data:
    """The data of the figures: speed-ups over greedy, agreement with the full model (0..1)."""

    n_layers: int
    ladder: Ladder  # HiSpec's in this run
    costs: Costs
    # of exits 1..n_layers-1: on the prompts, on the greedy answers
    agreement: tuple[list[float], list[float]]
    # tokens/s of greedy, the grid of windows, and last the one with thresholds
    speed: dict[Ladder, float]
    identical: bool  # whether all of these wrote greedy's texts
    # predicted and measured speed-ups, by kind of ladder
    compared: dict[str, list[tuple[float, float]]]
    trained: tuple[int, ...]  # the exits that were trained
    # by method, milliseconds per token: drafting, intermediate, full, and the loop outside steps
    time: dict[str, list[float]]
    # by category, how often draft and intermediate (alpha), intermediate and full (beta) agree
    rates: dict[str, tuple[float, float]]
    # HiSpec's speed-up with its best windows, by which costs count: the formula's, then replayed
    charged: dict[str, float]
    # (3, V) distributions of one token: the draft exit's, the full model's, HiSpec's samples
    one_token: np.ndarray
    moved: dict[str, list[float]]  # by step: how far the widths 1..WIDEST of a pass move logits
    results: list[dict]  # the bench's, one per method


# ---- gathering ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What ladders are predicted from: costs, and every exit's predictions on greedy answers."""

    n_layers: int
    costs: Costs
    traces: list[Trace]  # one per request

    def predicted(self, ladders: list[Ladder], chosen, what: str) -> dict[Ladder, float]:
        """Predicted speed-ups over greedy on the chosen requests; `what` labels the bar."""
        traces = [self.traces[i] for i in chosen]
        seconds = {
            x: sum(t.prefill + replay(t, x, self.costs, self.n_layers) for t in traces)
            for x in tqdm([GREEDY, *ladders], f"predicting {what}", leave=False)
        }
        return {x: seconds[GREEDY] / seconds[x] for x in ladders}


def gather(
    step: Step, requests: Sequence, results: list[dict], tuned: dict, max_new_tokens: int, stop,
    make_decoder: Callable,
) -> Data:  # fmt: skip
    """Measure and predict everything that the figures show.

    requests: each has category, prompt, and greedy (the answer). results: the bench's dict for each
    method. tuned: by kind of ladder, with the ladders that tuning ran if it was part of this run.
    make_decoder: as in tune.tune.
    """
    model = step.model
    n, methods = model.config.n_layers, {r["name"]: ladder_of(r) for r in results}
    ladder = methods["hispec"]
    ours = {e for exits, _, _ in methods.values() for e in exits if e > 0}
    read, decode = tuple(sorted({*ours, *default_exits(model)})), make_decoder()
    bar = tqdm(requests, "recording what each exit predicts", leave=False)
    traces = [trace(model, r.prompt, max_new_tokens, stop, read, decode) for r in bar]
    costs = costs_of_ladders(step, read, traces, max_new_tokens, stop, make_decoder)
    recorded = Recorded(n, costs, traces)

    firsts = {r.category: i for i, r in reversed(list(enumerate(requests)))}
    few = sorted(firsts.values())[:FEW]
    ladders = grid(ladder, recorded, few)
    decoders = {x: make_decoder(*x) for x in (GREEDY, *ladders)}
    made = run(decoders, [requests[i].prompt for i in few], max_new_tokens, stop)
    seconds = {x: sum(g.seconds for g in made[x]) for x in made}
    faster = {x: seconds[GREEDY] / seconds[x] for x in ladders}
    of = {
        c: [t for t, r in zip(traces, requests) if c in ("all", r.category)]
        for c in ("all", *firsts)
    }
    by_category = {category: rates(some, ladder[0], n) for category, some in of.items()}
    return Data(
        n_layers=n,
        ladder=ladder,
        costs=costs,
        agreement=agreement(model, requests),
        trained=model.exits,
        time=where_time_goes(methods, make_decoder, requests, max_new_tokens, stop),
        speed={x: sum(len(g.tokens) for g in made[x]) / seconds[x] for x in made},
        identical=all(
            [g.tokens for g in x] == [requests[i].greedy for i in few] for x in made.values()
        ),
        compared=compared(tuned, faster, results, recorded, few),
        rates=by_category,
        charged=charged(recorded, ladder[0], by_category["all"]),
        one_token=one_token(step, requests, ladder),
        moved=moved(step, [t for i in few for t in requests[i].prompt + requests[i].greedy]),
        results=results,
    )


def grid(ladder: Ladder, recorded: Recorded, few: list[int]) -> list[Ladder]:
    """Return HiSpec's exits with each pair of windows, and then the best ladder with thresholds."""
    windows = [w for w in product(N_D, N_I) if w[0] <= w[1]]
    adaptive = ladder
    if not any(ladder[2]):  # no tuned thresholds: take those that replay finds best
        doubts = [t for t in product(THRESHOLDS, repeat=2) if any(t)]
        both = [(w, t) for w, t in product(windows, doubts) if can_matter(w, t)]
        fields: list[Ladder] = [(ladder[0], w, t) for w, t in both]
        seen = recorded.predicted(fields, few, "thresholds")
        adaptive = max(seen, key=seen.__getitem__)
    return [*((ladder[0], w, (0.0, 0.0)) for w in windows), adaptive]


def compared(
    tuned: dict, faster: dict[Ladder, float], results: list[dict], recorded: Recorded,
    few: list[int],
) -> dict[str, list[tuple[float, float]]]:  # fmt: skip
    """Predicted and measured speed-ups of the tuned ladders, the grid, and the bench's methods."""
    points = {
        f"tuning: {kind}": [(r["predicted"], r["measured"]) for r in t.get("ran", ())]
        for kind, t in tuned.items()
    }
    guess = recorded.predicted([*faster], few, "grid")
    points["grid of windows"] = [(guess[x], faster[x]) for x in faster]
    methods = {ladder_of(r): r["speedup_vs_greedy"] for r in results if r["exits"]}
    guess = recorded.predicted([*methods], range(len(recorded.traces)), "methods")
    points["all prompts"] = [(guess[x], methods[x]) for x in methods]
    return {kind: some for kind, some in points.items() if some}


def charged(
    recorded: Recorded, exits: tuple[int, ...], rates: tuple[float, float]
) -> dict[str, float]:
    """Return Data.charged, without thresholds: costs that the formula omits, added one by one."""
    n, costs = recorded.n_layers, recorded.costs
    d, i = (step_seconds(costs, exit) / step_seconds(costs, n) for exit in exits)
    flat = replace(
        costs,
        trunk={depth: [0.0, *[s[1]] * WIDTHS[-1]] for depth, s in costs.trunk.items()},
        head={depth: [0.0, *[s[1]] * WIDTHS[-1]] for depth, s in costs.head.items()},
    )
    unread = [replace(t, prefill=0.0) for t in recorded.traces]
    ladders: list[Ladder] = [
        (exits, windows, (0.0, 0.0)) for windows in combinations_with_replacement(WINDOWS, 2)
    ]
    found = {"formula": float(speed_up_by_rates(d, i, *rates)[1])}
    for what, some in {
        "texts": Recorded(n, flat, unread),
        "widths": Recorded(n, costs, unread),
        "prompt": recorded,
    }.items():
        found[what] = max(some.predicted(ladders, range(len(unread)), what).values())
    return found


def ladder_of(result: dict) -> Ladder:
    return as_ladder(Options(**{k: v for k, v in result.items() if k in OF_A_LADDER}))


def agreement(model: Llama, requests: Sequence) -> tuple[list[float], list[float]]:
    """Return how often exits 1..n_layers-1 choose the full model's token on prompts and answers."""
    sums, counts = np.zeros((2, model.config.n_layers - 1)), [0, 0]
    for r in tqdm(requests, "agreement by layer", leave=False):
        ids, first = torch.tensor([r.prompt + r.greedy]), len(r.prompt)
        for k, (row, start) in enumerate([(ids[:, :first], 0), (ids, first - 1)]):
            # number of predictions: one for each token after the first, or in the answer
            if n := row.shape[1] - 1 - start:
                sums[k] += n * np.array(measure(model, row, start)[1])
                counts[k] += n
    return tuple((s / n if n else s).tolist() for s, n in zip(sums, counts))


def where_time_goes(
    methods: dict[str, Ladder],
    make_decoder: Callable,
    requests: Sequence,
    max_new_tokens: int,
    stop,
) -> dict[str, list[float]]:
    """Data.time, over all requests: on each one the methods take turns, with their steps timed."""
    decoders = {name: make_decoder(*methods[name]) for name in BARS if name in methods}
    seen: dict[str, list] = {name: [] for name in decoders}
    for r in tqdm(requests, "timing every step", leave=False):
        for name, decode in decoders.items():
            seen[name].append(watch(decode, r.prompt, max_new_tokens, stop))
    spent = {}
    for name, notes in seen.items():
        *below, full = (sum(steps) for steps in zip(*(n.steps for n in notes)))
        drafting, intermediate = (*below, 0.0, 0.0)[:2]
        loop = sum(n.seconds - sum(n.steps) for n in notes)
        tokens = sum(n.tokens for n in notes)
        asked = Options(**as_options(methods[name]))
        ladder = ladder_text(asked.exits, asked.windows, asked.thresholds, asked.draft_head)
        name = f"{BARS[name]}\n{ladder}".rstrip()
        spent[name] = [1e3 * part / tokens for part in (drafting, intermediate, full, loop)]
    return spent


@torch.inference_mode()
def one_token(step: Step, requests: Sequence, ladder: Ladder) -> np.ndarray:
    """One token's distributions (3, V) at temperature 1: of draft exit, full model, and samples.

    The token follows the first OPENING tokens of the prompt on which draft and full model differ
    most for one token. All but the last of these have been read, so that HiSpec drafts the token
    and judges it.
    """
    both, model = {}, step.model
    for opening in {tuple(r.prompt[:OPENING]) for r in requests}:
        ids = torch.tensor([opening], device=model.embed.weight.device)
        depths = ladder[0][0], model.config.n_layers
        rows = torch.stack([model(ids, exit)[0, -1] for exit in depths])
        both[opening] = rows.double().softmax(-1)
    opening = max(both, key=lambda o: (both[o][0] - both[o][1]).abs().max().item())
    n, count, top = len(opening), np.zeros(model.config.vocab_size), len(ladder[0])
    with step.open(ladder[0], n + 1) as cache:
        for seed in tqdm(range(SAMPLES), "sampling one token", leave=False):
            asked = Options(*ladder, temperature=1.0, seed=seed)
            decoder = Decoder(list(opening), n + 1, asked, step, cache, LookUp())
            if seed == 0 and n > 1:
                step.run(cache, decoder.tokens, n - 1, top, 1)
            cache.rollback(n - 1)
            decoder.propose(top, 1)
            count[decoder.text[n]] += 1
    return np.stack([*both[opening].cpu().numpy(), count / SAMPLES])


@torch.inference_mode()
def moved(step: Step, text: list[int]) -> dict[str, list[float]]:
    """How far logits are from those of one-position passes, if a pass has 1 .. WIDEST positions.

    "plain": with a library's ordinary products. "ours": as decoding runs here.
    """
    model, weight = step.model, step.model.embed.weight
    twin = Llama(model.config).to(weight.device, weight.dtype).eval()
    twin.load_state_dict(model.state_dict(), strict=False)  # its exits are not needed
    n = min(CONTEXT + WIDEST, model.config.max_seq_len)
    at, far = n - WIDEST, dict[str, list[float]]()
    for name, one in (("plain", Step(twin)), ("ours", step)):
        with one.open((), n) as cache:
            tokens = torch.zeros_like(cache.columns)
            tokens[:n] = torch.tensor((text * n)[:n])
            one.run(cache, tokens, at, 0, 1)
            alone = [one.run(cache, tokens, at + i + 1, 0, 1).clone() for i in range(WIDEST)]
            far[name] = []
            for width in range(1, WIDEST + 1):
                cache.rollback(at)
                logits = one.run(cache, tokens, at + width, 0, width)
                far[name].append((logits - torch.cat(alone[:width])).abs().max().item())
    return far


def rates(traces: list, exits: tuple[int, ...], n_layers: int) -> tuple[float, float]:
    """Return how often, on greedy texts, draft and middle exit agree, and middle and full model."""
    draft, middle, full = ([c for t in traces for c in t.choices[e]] for e in (*exits, n_layers))
    return statistics.fmean(map(eq, draft, middle)), statistics.fmean(map(eq, middle, full))


def step_seconds(costs: Costs, depth: int) -> float:
    """Return the seconds of a step over one position at this depth, with its head and the loop."""
    return costs.trunk[depth][1] + costs.head[depth][1] + costs.loop[depth]


def speed_up_by_rates(
    d: float, i: float, alpha, beta, full: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Speed-ups over greedy by a formula: of a single exit and of HiSpec, with their best windows.

    alpha, beta: how often the draft exit agrees with the intermediate, and the intermediate with
    the full model (arrays, 0..1), independently for each token. d, i: the cost of a step of either
    exit, in steps of the full model. A round of n drafts yields r tokens with probability
    alpha^(r-1) (1-alpha) for r <= n and alpha^n for r = n+1, and costs n d + i. After m >= N_i
    tokens one full verification costs `full` and yields (1 - beta^(m+1)) / (1 - beta) tokens, its
    own included. A single exit that is right with probability a (alpha beta for the draft exit,
    beta for the intermediate) yields (1 - a^(k+1)) / (1 - a) tokens for k steps and one of the full
    model.
    """
    # at 1 the sums below would be 0 / 0
    alpha, beta = np.broadcast_arrays(alpha, np.minimum(beta, 1 - 1e-6))
    exits, longest = ((alpha * beta, d), (beta, i)), sum(LONGEST)
    single = np.max(
        [(1 - a ** (k + 1)) / (1 - a) / (k * c + 1) for a, c in exits for k in range(1, longest)],
        axis=0,
    )
    hispec = np.zeros(alpha.shape)
    for n in range(1, LONGEST[0] + 1):
        chances = [alpha ** (r - 1) * (1 - alpha) for r in range(1, n + 1)] + [alpha**n]
        reached = [np.ones_like(alpha)]  # [m]: the probability that a round ends with m tokens
        for m in range(1, LONGEST[1]):
            reached.append(sum(reached[m - r] * c for r, c in enumerate(chances, 1) if r <= m))
        for N in range(1, LONGEST[1] + 1):
            ends = [
                sum(reached[m - r] * c for r, c in enumerate(chances, 1) if 0 <= m - r < N)
                for m in range(N, N + n + 1)
            ]
            tokens = sum(end * (1 - beta ** (m + 1)) / (1 - beta) for m, end in enumerate(ends, N))
            hispec = np.maximum(hispec, tokens / (sum(reached[:N]) * (n * d + i) + full))
    return single, hispec
