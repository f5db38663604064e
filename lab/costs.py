"""The cost of a generation's parts on this machine, and the time that a ladder would take.

`measure_costs` times passes by width, `trace` records every exit's predictions along a text of the
full model, and `replay` adds up the steps that a ladder would take along it. For a sampled text the
exits' choices are drawn first (`coupled`). Which ladders are worth running is decided in tune.py.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import Options
from checkpoints.ladders import Ladder
from checkpoints.machine import pass_seconds, timed
from drafters import LookUp
from hispec import Generation, Step, accept_block, probability
from model import Llama
from train_exits import Chain

# positions in a timed pass, up to more than any ladder takes; widths in between are interpolated. A
# fixed step takes as long for 16 as for one, and twice as long for 17
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 20)
IN_A_ROW = 4  # a head's drafts in a row that are recorded; later ones are treated as the last
CONTEXT = 256  # positions before a timed pass: a prompt and half an answer

ByDepth = dict[int, list[float]]  # seconds, by depth in layers and positions in a pass


@dataclass(frozen=True)
class Costs:
    """Seconds, listed by the number of positions in a pass: 0 .. WIDTHS[-1].

    A segment is charged the difference of two depths. A drafting level runs the same few layers
    over and over, which stay in the processor's caches, so its layers are cheaper than those of a
    full pass.
    """

    trunk: ByDepth  # the layers up to each depth, 0 included
    head: ByDepth  # after an exit: its block, its norm, its output matrix
    doubt: float  # computing a step's probability, which a threshold needs
    loop: dict[int, float]  # a step that ends at each depth, beyond its pass; -8: head 8's drafts
    draft: ByDepth = field(default_factory=dict)  # the draft head on each exit, choice included


def measure_costs(step: Step, exits: tuple[int, ...]) -> Costs:
    """Measure what the passes of a ladder of these exits cost, with any kind of step."""
    model, widths = step.model, range(1, WIDTHS[-1] + 1)
    trunk, head = {0: [0.0] * (WIDTHS[-1] + 1)}, {}
    for depth in (*exits, model.config.n_layers):
        context = min(CONTEXT, model.config.max_seq_len - WIDTHS[-1])
        below, whole = np.array(pass_seconds(step, depth, WIDTHS, context))
        below = below * depth / (depth + (depth in model.blocks))  # a block is a layer of the head
        trunk[depth] = [0.0, *np.interp(widths, WIDTHS, below).tolist()]
        after = np.maximum(whole - below, 0.0)
        head[depth] = [0.0, *np.interp(widths, WIDTHS, after).tolist()]
    weight = model.embed.weight
    new, rows = weight.new_zeros(2).long(), weight.new_zeros(2, model.config.vocab_size)
    doubt = timed(lambda: probability(new, Options().distribution(rows)), weight.device)
    drafts = {exit: draft_seconds(step, exit) for exit in map(int, model.draft_heads)}
    loop = dict.fromkeys([*head, *(-exit for exit in drafts)], 0.0)
    return Costs(trunk, head, doubt, loop, drafts)


@torch.inference_mode()
def draft_seconds(step: Step, exit: int) -> list[float]:
    """Return a draft's seconds, choice included, if a head runs over 0 .. WIDTHS[-1] positions."""
    model, took = step.model, []
    exits = (0, exit) if exit < model.config.n_layers else (0,)
    context = min(CONTEXT, model.config.max_seq_len - WIDTHS[-1])
    with step.open(exits, context + WIDTHS[-1], exit) as cache:
        tokens = torch.zeros_like(cache.columns)
        for n in WIDTHS:
            states, new = cache.hidden[exit][:, :n], tokens[:n]
            draft = partial(step.draft, cache, exit, states, new, context)
            took.append(timed(lambda draft=draft: draft()[1].argmax(-1), cache.keys.device))
    return [0.0, *np.interp(range(1, WIDTHS[-1] + 1), WIDTHS, took).tolist()]


def with_loop(
    costs: Costs, traces: list["Trace"], alone: dict[Ladder, list[Generation]], n_layers: int
) -> Costs:
    """The costs, with what a step costs beyond its pass, by depth, from runs of short ladders.

    alone: {ladder: a generation for each trace}: greedy first, then single exits, then draft heads.
    The time that these took beyond their passes is the host's work. It also covers that a
    repeatedly timed pass finds its layers in the processor's caches, while in a generation the full
    model's layers have replaced them.
    """
    for ladder, made in alone.items():
        took = sum(g.seconds - g.prefill_seconds for g in made)
        passes = sum(replay(t, ladder, costs, n_layers) for t in traces)
        steps = sum(g.levels[0].calls for g in made) - (len(made) if not ladder[0] else 0)
        depth = (*ladder[0], n_layers)[0]
        beyond = max(0.0, took - passes) / max(1, steps)
        costs = replace(costs, loop=costs.loop | {depth: beyond})
    return costs


def with_sampling(costs: Costs, step: Step, sampling: dict) -> Costs:
    """The costs for sampled text, where a step also computes distributions and tosses coins.

    Each step is charged for a check of four drafts.
    """
    asked, device = Options(**sampling), step.model.embed.weight.device
    logits = torch.randn(5, step.model.config.vocab_size, device=device)
    drafts, rng = torch.arange(4, device=device), torch.Generator(device)
    q = asked.distribution(logits[1:])
    longer = timed(lambda: accept_block(drafts, q, asked.distribution(logits), rng), device)
    return replace(costs, loop={depth: beyond + longer for depth, beyond in costs.loop.items()})


@dataclass(frozen=True)
class Trace:
    """What every exit predicts along a text of n tokens: its choices, and how sure it is of them.

    The text is the full model's. For a sampled text, p holds each exit's distributions (n, V) by
    depth. drafts and drafts_p hold the same for draft heads, by the exit that a head reads: a list
    with one entry for a first draft, one for a second that follows it, and so on.
    """

    prompt: list[int]
    prefill: float  # seconds to read the prompt
    choices: dict[int, list[int]]
    sure: dict[int, list[float]]
    p: dict[int, Tensor] = field(default_factory=dict)
    drafts: dict[int, list[list[int]]] = field(default_factory=dict)
    drafts_p: dict[int, list[Tensor]] = field(default_factory=dict)


@torch.inference_mode()
def trace(
    model: Llama, prompt: list[int], max_new_tokens: int, stop, exits: tuple[int, ...], decode,
    **sampling,
) -> Trace:  # fmt: skip
    """The trace of the greedy text, or with `sampling` (names of Options) of a sampled one."""
    prefill = min(decode(prompt, 1).seconds for _ in range(2))
    text = decode(prompt, max_new_tokens, stop=stop, **sampling).tokens
    p, drafts, drafts_p = {}, {}, {}
    ids = torch.tensor([prompt + text[:-1]], device=model.embed.weight.device)
    h, first, choices, sure = model.embed(ids), 0, {}, {}
    heads = {int(exit) for exit in model.draft_heads}
    for depth in sorted({*exits, *heads, model.config.n_layers}):
        h, first = model.run(h, first, depth), depth
        if depth in heads:
            of_head = [row[len(prompt) - 1 :] for row in draft_logits(model, depth, ids, h)]
            drafts[depth] = [logits.argmax(-1).tolist() for logits in of_head]
            if sampling:
                drafts_p[depth] = [Options(**sampling).distribution(logits) for logits in of_head]
        logits = model.logits(model.exit_block(h, depth)[0, len(prompt) - 1 :], depth)
        best = logits.float().softmax(-1).max(-1)
        choices[depth], sure[depth] = best.indices.tolist(), best.values.tolist()
        if sampling:
            p[depth] = Options(**sampling).distribution(logits)
    choices[depth] = text
    return Trace(prompt, prefill, choices, sure, p, drafts, drafts_p)


def draft_logits(model: Llama, exit: int, ids: Tensor, h: Tensor) -> list[Tensor]:
    """Logits of the draft head on `exit`, from ids (1, N) and the exit's states h (1, N, D).

    There is one (N, V) for each draft in a row: the i-th at a position is drafted from true states
    up to i positions before it, and after these from the head's own outputs.
    """
    head: Any = model.draft_heads[str(exit)]
    rope, chain = model.rope(torch.arange(ids.shape[1], device=h.device)), Chain()
    state, embedded, found = h, model.embed(ids), []
    for _ in range(IN_A_ROW):
        state = head(F.pad(state[:, :-1], (0, 0, 1, 0)), embedded, rope, chain)
        found.append(model.draft_logits(state, exit)[0])
    return found


def coupled(trace: Trace, exits: tuple[int, ...], n_layers: int, seed: int) -> Trace:
    """Return the trace of a sampled text, with this ladder's exits' choices drawn deep to shallow.

    Each exit's choices are samples of its own p. They are drawn so that they equal the next level's
    as often as that level would keep them token by token: with probability min(1, p(x) /
    p_above(x)).
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(p: Tensor, token: Tensor, above: Tensor) -> Tensor:
        """(n, 1) samples of p (n, V) that equal those of the level above as often as possible."""
        same = torch.rand(token.shape, generator=rng) < p.gather(1, token) / above.gather(1, token)
        clocks = torch.empty_like(p).exponential_(generator=rng)
        other = ((p - above).clamp(min=0) / clocks).argmax(-1, keepdim=True)
        return torch.where(same, token, other)

    token, above = torch.tensor(trace.choices[n_layers])[:, None], trace.p[n_layers].cpu()
    choices, sure = {n_layers: trace.choices[n_layers]}, {n_layers: trace.sure[n_layers]}
    for exit in (exit for exit in reversed(exits) if exit > 0):
        p = trace.p[exit].cpu()
        token, above = draw(p, token, above), p
        choices[exit], sure[exit] = token.flatten().tolist(), p.gather(1, token).flatten().tolist()
    drafts = {}
    if exits and exits[0] < 0:
        rows = [draw(p.cpu(), token, above) for p in trace.drafts_p[-exits[0]]]
        drafts[-exits[0]] = [row.flatten().tolist() for row in rows]
    return replace(trace, choices=choices, sure=sure, drafts=drafts)


def replay(trace: Trace, ladder: Ladder, costs: Costs, n_layers: int) -> float:
    """Return the seconds after the prompt, by hispec's recursion on recorded choices."""
    exits, windows, thresholds = ladder
    depths, thresholds = (*exits, n_layers), (*thresholds, 0.0)
    text, end, seconds = trace.choices[n_layers][:1], len(trace.choices[n_layers]), 0.0
    seen = [-1] * len(depths)  # the prompt's pass has written the first token
    drafter, prompt = LookUp(), trace.prompt
    unchanged, known = 0, 0  # first tokens: unchanged since the last draft; run from true states

    def propose(k: int, want: int) -> None:
        nonlocal seconds, unchanged, known
        if depths[k] == 0:
            drafts = drafter.look_up(prompt + text, unchanged, min(want, end - len(text)))
            unchanged = len(prompt) + len(text)
            return text.extend(drafts)
        if depths[k] < 0:
            took, rows = costs.draft[-depths[k]], trace.drafts[-depths[k]]
            last, want = len(prompt) + len(text), min(want, end - len(text))
            width = last - min(known, unchanged)  # the first draft reads the whole prompt
            seconds += took[min(width, WIDTHS[-1])] * max(1.0, width / WIDTHS[-1])
            seconds += took[1] * (want - 1) + costs.loop[depths[k]]
            for i in range(want):
                text.append(rows[min(i, IN_A_ROW - 1)][len(text)])
            known, unchanged = last, len(prompt) + len(text)
            return None
        depth, goal, probability = depths[k], len(text) + want, 1.0
        choices, sure = trace.choices[depth], trace.sure[depth]
        while len(text) < min(goal, end) and probability >= thresholds[k]:
            base = len(text)
            if k:
                propose(k - 1, min(windows[k - 1], goal - base))
            above = 0
            for j, end_of_segment in enumerate(max(0, d) for d in depths[: k + 1]):
                width = len(text) - seen[j] - 1
                seconds += costs.trunk[end_of_segment][width] - costs.trunk[above][width]
                seen[j], above = len(text) - 1, end_of_segment
            seconds += costs.head[depth][len(text) - base + 1] + costs.loop[depth]
            seconds += costs.doubt * (thresholds[k] > 0)
            kept = base
            while kept < min(len(text), end - 1) and text[kept] == choices[kept]:
                kept += 1
            probability *= math.prod(sure[base : kept + 1])
            text[kept:] = [choices[kept]]
            unchanged = min(unchanged, len(prompt) + kept)
            seen[:] = [min(s, kept - 1) for s in seen]

    propose(len(exits), end - 1)
    return seconds
