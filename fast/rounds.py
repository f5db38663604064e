"""Rounds on the device: drafts, the levels between and the full model's verdict in one launch.

`hispec.Decoder` decides on the host: it launches pass after pass, and reads what each verification
keeps before it knows which pass comes next. Here the text, its length and all that is decided stay
in tensors at fixed addresses, and a whole round is one captured graph: the host launches it, reads
one small tensor, and launches the next. A captured graph does the same work each time, therefore

- windows are counted in steps: level k takes a fixed number of steps before each of level k+1. For
  level 0 a step is a token, as ever; a step of another level writes one token or more (`in_steps`).
  The text does not depend on it, since the full model has the last word all the same;
- widths are fixed, and a mask stands for the drafts that are not there;
- a round does not know where the text ends. What it writes behind the end the host cuts off;
- random numbers are drawn ahead, before the launch.

Thresholds, look-ups and whoever watches need the host at every step: for these `Rounds` decodes as
Decoder does, in the fixed step's passes, which give the same bits. On a CPU rounds are called
instead of captured, for tests.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import hispec
from arguments import Options, precise
from drafters import HeadDrafter
from fast.cuda import PROMPT, WIDTH, FixedStep
from hispec import Decoder, leading
from model import Llama

# tokens that a round may write at most: to be captured it is run three times, each behind the last,
# and with the round itself and the padding of a pass that must fit behind the text
ROUND = (PROMPT - WIDTH) // 4


class Rounds(Decoder):
    """Decodes round by round where the ladder allows it (`covers`), else as Decoder does."""

    step: "RoundStep"

    def __init__(self, prompt: list[int], *args):
        super().__init__(prompt, *args)
        asked = replace(self.options, seed=None, stop=frozenset())  # a graph is for any of these
        self.round = Round(self.step, asked) if covers(self) else None
        self.rounds = 0  # how many there were
        self.step.tokens[: len(prompt)] = self.tokens[: len(prompt)]
        self.tokens = self.step.tokens

    def propose(self, k: int, want: int) -> Tensor | None:
        if self.round is None:
            return super().propose(k, want)
        self.step.state.zero_()
        self.step.length.fill_(self.length)
        if self.options.draft_head and self.length < self.end:
            self.drafter.draft(self, 1)  # the prompt passes the head
            self.step.headed.fill_(self.length - 1)
        while self.length < self.end:
            if self.options.temperature > 0:
                self.step.uniforms.uniform_(generator=self.rng)
            self.step.launch((self.round.options, self.step.end), self.round)
            self.read_round(self.round)
        return None

    def read_round(self, round: "Round") -> None:
        """Take over what a round has written, up to the text's end: the one host read."""
        base, read = self.length, self.step.report[: round.size].tolist()
        self.length, broken, _, *counts = read[: len(self.step.state)]
        if broken:
            raise ValueError(
                f"logits after layer {broken} are NaN or infinite: the weights are damaged, or too "
                f"large for {self.cache.keys.dtype}"
            )
        self.text[base:] = read[len(self.step.state) :][: self.length - base]
        stops = [i for i in range(base, self.length) if self.text[i] in self.options.stop]
        self.end = min([self.end, *(i + 1 for i in stops)])
        beyond = max(0, self.length - 1 - self.end)  # accepted drafts that the end cuts off
        self.length = min(self.length, self.end)
        del self.text[self.length :]
        self.rounds += 1
        for k, stats in enumerate(self.stats[:-1]):
            stats.proposed, stats.accepted = counts[2 * k : 2 * k + 2]
            stats.accepted -= beyond * (k == self.top - 1)

    def statistics(self) -> list[hispec.LevelStats]:
        calls = [self.rounds * n for n in self.round.calls] if self.round else []
        for j in range(len(calls)):
            self.stats[j].calls += calls[j]
            # at each of its steps a level runs its newest token through all its segments, and the
            # drafts through the last of these
            drafts = self.stats[j - 1].proposed if j > 0 else 0
            self.cache.processed[j] += sum(calls[j:]) + drafts
        if self.round and self.depths[0] == 0:
            self.cache.processed[0] = self.cache.processed[1]  # it has seen as many
        return super().statistics()


def covers(decoder: Decoder) -> bool:
    """Whether rounds can do all that is asked."""
    options, drafter = decoder.options, decoder.drafter
    _, most = in_steps(options.windows)
    if decoder.depths[0] == 0:  # the head runs what is new, kept drafts and two tokens, in a pass
        heads = type(drafter) is HeadDrafter and drafter.exit == options.draft_head
        if not heads or most[1] + 2 > WIDTH:
            return False
    return decoder.watch is None and not any(options.thresholds) and most[-1] < ROUND


def in_steps(windows: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """How many steps each level takes before one of the level above, and how many drafts each level
    then has at most, the last level included.

    A step on at most m drafts writes between 1 and m+1 tokens: a window of w is counted as so many
    steps as write w tokens if each writes (m+2) / 2. Thus 2(2) 8(4) is two steps of exit 8, which
    write two to six tokens.
    """
    steps: list[int] = []
    most = [0]
    for window in windows:
        steps.append(max(1, round(2 * window / (most[-1] + 2))))
        most.append(steps[-1] * (most[-1] + 1))
    return steps, most


class RoundStep(FixedStep):
    """The fixed step with what a round reads and writes, at the same addresses for every text."""

    name = "rounds"
    decoder = Rounds

    def __init__(self, model: Llama, max_len: int, compiled: bool = True):
        super().__init__(model, max_len, compiled)
        levels, device = model.config.n_layers, self.first.device  # there cannot be more
        self.tokens = self.first.new_zeros(len(self.cache.columns) + 1)
        # the text's length; the depth of a level whose logits were not finite, or 0; how many
        # positions have passed the draft head from true states; for each level but the last, how
        # many tokens were proposed and accepted
        self.state = self.first.new_zeros(3 + 2 * levels)
        self.length, self.broken, self.headed = self.state[:3].split(1)
        self.counts = self.state[3:].view(levels, 2)
        self.report = self.first.new_zeros(len(self.state) + ROUND)  # the state, and new tokens
        # for each draft and each token drawn: every level judges a token of a round at most once
        self.uniforms = torch.zeros(2 * ROUND * (levels + 1), dtype=precise(device), device=device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        before = self.state.clone()
        replay = super().capture(work)
        self.state.copy_(before)  # to warm up, it has been run
        return replay


class Round:
    """One round of a ladder: what is captured. It reads nothing on the host.

    options: of the ladder and of sampling; seeds and stop tokens are the host's concern.
    """

    def __init__(self, step: RoundStep, options: Options):
        self.step, self.options = step, options
        self.depths = (*options.exits, step.model.config.n_layers)
        self.steps, self.most = in_steps(options.windows)
        self.calls = [1]  # steps of each level in a round
        for n in reversed(self.steps):
            self.calls.insert(0, n * self.calls[0])
        if self.depths[0] == 0:
            self.calls[0] = self.calls[1]  # all drafts at once
        self.size = len(step.state) + self.most[-1] + 1  # of what it leaves in the step's report
        self.used = 0  # uniforms

    def __call__(self) -> None:
        step, self.used = self.step, 0
        base = step.length.clone()
        self.propose(len(self.steps))
        step.report[: self.size] = torch.cat([step.state, self.tokens(base, self.most[-1] + 1)])

    def propose(self, k: int) -> Tensor | None:
        """One step of level k, and before it those of the levels below: as Decoder.propose.

        Returns the distributions (most + 1, V) of what it may write; at temperature 0 None.
        """
        step, most = self.step, self.most[k]
        base = step.length.clone()  # level k has yet to run position base - 1
        q = self.gather(k, base)
        n = step.length - base  # of `most` drafts so many are there
        drafts, logits = self.tokens(base, most), self.run(k, base)
        there = step.cache.columns[: most + 1] <= n
        if self.options.temperature == 0:
            (to_check, choice), p = logits.max(dim=-1), None
            kept = leading((choice[:-1] == drafts) & there[1:])
            own = choice.index_select(0, kept)
        else:
            p = self.options.distribution(logits)  # (most + 1, V)
            q = p[:0] if q is None else q
            own, kept = accept_block(drafts, q, p, n, self.draw_ahead(most + 1))
            to_check = p[:, 0] + F.pad(q[:, 0], (0, 1))
        at = base + kept
        step.tokens.index_copy_(0, at, own)
        step.length.copy_(at + 1)
        if k > 0:
            step.counts[k - 1] += torch.cat([n, kept])
        if self.options.draft_head:
            step.headed.copy_(torch.minimum(step.headed, at))
        if k > 0 or k == len(self.steps):
            finite = (to_check.isfinite() | ~there).all()
            step.broken.copy_(torch.where(finite, step.broken, self.depths[k]))
        return p

    def gather(self, k: int, base: Tensor) -> Tensor | None:
        """Let the levels below level k draft. Returns the drafts' distributions (most, V)."""
        if k == 0:
            return None
        if self.depths[k - 1] == 0:
            return self.draft(self.steps[0])
        step, rows = self.step, []
        for _ in range(self.steps[k - 1]):
            at = step.length - base
            rows.append((at, self.propose(k - 1)))
        if self.options.temperature == 0:
            return None
        q = rows[0][1].new_zeros(self.most[k], rows[0][1].shape[1])
        for at, p in rows:  # later ones over what earlier ones have not written
            q.index_copy_(0, at + step.cache.columns[: len(p)], p)
        return q

    def run(self, k: int, base: Tensor) -> Tensor:
        """Level k's logits (most + 1, V) from position base - 1 on."""
        step, depth = self.step, self.depths[k]
        if k > 0 and self.depths[k - 1] > 0:  # the segments below have run all but the newest token
            self.segments(0, k, step.length - 1)
        firsts = range(-1, self.most[k], WIDTH)
        states = [self.segments(k, k + 1, base + first) for first in firsts]
        logits = [step.variant.logits(h, depth) for h in states]
        return torch.cat(logits)[: self.most[k] + 1]

    def segments(self, j: int, stop: int, first: Tensor) -> Tensor:
        """Run segments j..stop-1 over WIDTH positions from first (1,) on; their states (WIDTH, D).

        Positions at which no token stands yet are run again when one does.
        """
        plan = self.step.plan(first, WIDTH, self.step.end)
        ids = self.step.tokens.index_select(0, plan.positions)
        for start, depth in pairwise((0, *self.depths)[j : stop + 1]):
            if depth > 0:
                states = hispec.run_plan(self.step.variant, plan, ids, start, depth)
        return states

    def draft(self, want: int) -> Tensor | None:
        """As drafters.HeadDrafter: `want` tokens, and their distributions (want, V)."""
        step, exit, at = self.step, self.options.draft_head, self.step.length
        first = step.headed.clone()
        step.headed.copy_(at)
        states = step.cache.hidden[exit].index_select(1, self.positions(first - 1, WIDTH))
        h = self.pass_head(first, states).index_select(1, at - 1 - first)  # (1, 1, D)
        rows = []
        for i in range(want):
            if i > 0:
                h = self.pass_head(at - 1, F.pad(h, (0, 0, 0, WIDTH - 1)))[:, :1]
            logits = step.variant.draft_logits(h, exit)[0]  # (1, V)
            token = logits.argmax(-1)
            if self.options.temperature > 0:
                rows.append(self.options.distribution(logits))
                token = draw(rows[-1][0], self.draw_ahead(1))
            step.tokens.index_copy_(0, at, token)
            at += 1
        return torch.cat(rows) if rows else None

    def pass_head(self, first: Tensor, states: Tensor) -> Tensor:
        """The draft head over WIDTH positions from first (1,) on, states (1, WIDTH, D) one before."""
        plan = self.step.plan(first, WIDTH, self.step.end)
        ids = self.step.tokens.index_select(0, plan.positions)
        return self.step.variant.draft(self.options.draft_head, states, ids[None], plan)

    def positions(self, first: Tensor, n: int) -> Tensor:
        return first + self.step.cache.columns[:n]

    def tokens(self, first: Tensor, n: int) -> Tensor:
        return self.step.tokens.index_select(0, self.positions(first, n))

    def draw_ahead(self, n: int) -> Tensor:
        """The next n of the uniforms."""
        self.used += n
        return self.step.uniforms[self.used - n : self.used]


def accept_block(
    drafts: Tensor, q: Tensor, p: Tensor, n: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """hispec.accept_block where only the first n (1,) of N drafts count.

    drafts (N,), q (N, V), p (N+1, V), uniforms (N+1,): a coin for each draft, and one for the own
    token. Returns the level's own token (1,), and how many drafts precede it (1,).
    """
    N, x = len(drafts), drafts.unsqueeze(1)
    i = torch.arange(N + 1, device=p.device)
    ratio = (p[:-1].gather(1, x) / q.gather(1, x)).squeeze(1)  # (N,)
    grown = torch.where(i[:-1] < n, ratio, 0).log().cumsum(0)  # of the products so far
    # b_i = min(1, b_{i-1} ratio_i): a product that begins anew where it would be above 1
    b = (grown - grown.cummax(0).values.clamp(min=0)).exp() if N else grown
    b = torch.cat([b.new_ones(1), b])  # (N+1,)
    less = (b[:, None] * p - F.pad(q, (0, 0, 0, 1))).clamp(min=0)
    residual = torch.where((i == n)[:, None], p, less)  # (N+1, V), unnormalised
    r = residual.sum(-1)
    passes = torch.where(i == n, b, r / (r + 1 - b)).nan_to_num(0)
    says_yes = (uniforms[:-1] < passes[1:]) & (i[1:] <= n)
    kept = torch.cat([i[:1], i[1:] * says_yes]).amax(0, keepdim=True)
    return draw(residual.index_select(0, kept)[0], uniforms[-1:]), kept


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """A token (1,) in proportion to weights (V,), by one uniform number (1,)."""
    sums = weights.cumsum(0)
    token = torch.searchsorted(sums, uniform * sums[-1:], right=True)
    return token.clamp(max=len(weights) - 1)  # of weights that are not finite any
