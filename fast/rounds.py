"""Whole rounds on the device: drafts, middle levels and the full verification in one launch.

`hispec.Decoder` decides on the host: it launches one pass after another, and reads how many drafts
a verification keeps before it knows which pass comes next. Here the text, its length and all
decisions stay in tensors at fixed addresses, and a whole round is one captured graph. The host
launches it, reads one small tensor, and launches the next. Since a captured graph does the same
work each time,

- windows are counted in steps: level k takes a fixed number of steps before each step of level k+1.
  Level 0 writes one token a step, so its window is still a number of tokens; a step of any other
  level writes one token or more (`in_steps`). The text does not depend on this, because the full
  model verifies all of it;
- widths are fixed, and drafts that do not exist are masked;
- a round does not know where the text ends, so the host cuts off the tokens beyond the end;
- random numbers are drawn before the launch.

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
from fast.cuda import PROMPT, FixedStep
from fast.layers import WIDTH
from hispec import Decoder, leading
from model import Llama

# tokens that a round may write at most. Before it is captured it runs three times, each after the
# last; with the round itself and the padding of a pass, that must fit behind the text
ROUND = (PROMPT - WIDTH) // 4


class Rounds(Decoder):
    """Decodes round by round where the options allow it (`covers`), else as Decoder does."""

    step: "RoundStep"

    def __init__(self, prompt: list[int], *args):
        super().__init__(prompt, *args)
        asked = replace(self.options, seed=None, stop=frozenset())  # a graph is for any of these
        alone = self.watch is None and (self.depths[0] > 0 or type(self.drafter) is HeadDrafter)
        self.round = Round(self.step, asked) if alone and covers(asked) else None
        self.step.tokens[: len(prompt)] = self.tokens[: len(prompt)]
        self.tokens = self.step.tokens

    def propose(self, k: int, want: int) -> Tensor | None:
        if self.round is None:
            return super().propose(k, want)
        step = self.step
        step.length.fill_(self.length)
        if self.options.draft_head and self.length < self.end:
            self.drafter.draft(self, 1)  # so that the head has run the prompt
            step.headed.fill_(self.length - 1)
        while self.length < self.end:
            if self.options.temperature > 0:
                step.uniforms.uniform_(generator=self.rng)
            step.launch((self.round.options, step.end), self.round)
            self.read(step.report[: self.round.size].tolist())  # the one host read
        return None

    def read(self, report: list[int]) -> None:
        """Take over what a round has written, up to the text's end."""
        assert self.round is not None
        base, (self.length, finite), judged = self.length, report[:2], len(self.round.judges)
        if not finite:
            raise ValueError(
                "logits of a level, or of its drafts, are NaN or infinite: the weights are damaged,"
                f" or too large for {self.cache.keys.dtype}"
            )
        drafts, kept = report[2 : 2 + 2 * judged : 2], report[3 : 3 + 2 * judged : 2]
        self.text[base:] = report[2 + 2 * judged :][: self.length - base]
        stops = [i for i in range(base, self.length) if self.text[i] in self.options.stop]
        self.end = min([self.end, *(i + 1 for i in stops)])
        kept[-1:] = [min(n, self.end - base) for n in kept[-1:]]  # none behind the text's end
        self.length = min(self.length, self.end)
        del self.text[self.length :]
        for k, proposed, accepted in zip(self.round.judges, drafts, kept):
            self.stats[k - 1].proposed += proposed
            self.stats[k - 1].accepted += accepted
            self.cache.processed[k] += proposed
        for k, calls in enumerate(self.round.calls):
            self.stats[k].calls += calls
            # and at each step of a level its newest token passes all segments of that level
            self.cache.processed[k] += sum(self.round.calls[k:])
        if self.depths[0] == 0:
            self.cache.processed[0] = self.cache.processed[1]  # it has seen as many


def covers(options: Options) -> bool:
    """Whether rounds can decode with these options."""
    _, most = in_steps(options.windows)
    if options.exits[:1] == (0,):  # in one pass a head runs the kept drafts and two tokens more
        if not options.draft_head or most[1] + 2 > WIDTH:
            return False
    return not any(options.thresholds) and most[-1] < ROUND


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

    def __init__(self, model: Llama, max_len: int, compiled: bool = True, fused: bool = False):
        super().__init__(model, max_len, compiled, fused)
        most, device = 2 * ROUND * (model.config.n_layers + 1), self.first.device
        self.tokens = self.first.new_zeros(len(self.cache.columns) + 1)
        self.length = self.first.new_zeros(1)  # of the text
        self.headed = self.first.new_zeros(1)  # positions that the head has run from true states
        # no level takes more than ROUND steps in a round, or judges more than ROUND drafts
        self.report = self.first.new_zeros(most + ROUND)
        self.uniforms = torch.zeros(most, dtype=precise(device), device=device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        before = self.length.clone(), self.headed.clone()
        replay = super().capture(work)
        self.length.copy_(before[0])  # to warm up, it has been run
        self.headed.copy_(before[1])
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
        self.judges = self.order(len(self.steps))
        # of its report: the text's length, whether all logits were finite, for each verification
        # how many drafts there were and how many were kept, and the new tokens
        self.size = 2 + 2 * len(self.judges) + self.most[-1] + 1

    def order(self, k: int) -> list[int]:
        """Return the levels in the order in which they verify, up to and in a step of level k."""
        return [*self.order(k - 1) * self.steps[k - 1], k] if k > 0 else []

    def __call__(self) -> None:
        step = self.step
        base = self.length = step.length
        self.headed, self.used = step.headed, 0
        self.judged: list[Tensor] = []
        self.to_check: list[Tensor] = []  # a NaN or an infinity here is one in the logits
        self.propose(len(self.steps))
        finite = torch.cat(self.to_check).isfinite().all().long()[None]
        found = [self.length, finite, *self.judged, self.tokens(base, self.most[-1] + 1)]
        torch.cat(found, out=step.report[: self.size])
        step.length.copy_(self.length)
        step.headed.copy_(self.headed)

    def propose(self, k: int) -> Tensor | None:
        """Take the steps of the levels below and one of level k, as Decoder.propose does.

        Returns the distributions (most + 1, V) of what it may write; at temperature 0 None.
        """
        base = self.length  # level k has yet to run position base - 1
        q = self.gather(k)
        n = self.length - base
        own, kept, written = self.judge(k, base, n, q, self.run(k, base))
        at = base
        if kept is not None:
            at = base + kept
            self.judged += [n, kept]
        self.step.tokens.index_copy_(0, at, own)
        self.length = at + 1
        if self.options.draft_head:
            self.headed = torch.minimum(self.headed, at)
        return written

    def judge(self, k: int, base: Tensor, n: Tensor, q: Tensor | None, logits: Tensor):
        """As Decoder.judge: level k's own token (1,), how many of the n (1,) drafts it keeps (1,),
        and the distributions of what it may write. Level 0 has no drafts and keeps None.
        """
        most, kept, sampled = self.most[k], None, self.options.temperature > 0
        drafts = self.tokens(base, most) if k > 0 else None
        if sampled:
            p = self.options.distribution(logits)  # (most + 1, V)
            to_check = p[:, 0]
            if drafts is None or q is None:
                own = draw(p[0], self.draw_ahead(1))
            else:
                own, kept = accept_block(drafts, q, p, n, self.draw_ahead(most + 1))
                to_check = torch.cat([to_check, q[:, 0]])
        else:
            to_check, own = logits.max(dim=-1)  # (most + 1,)
            if drafts is not None:
                kept = torch.minimum(leading(own[:-1] == drafts), n)
                own = own.index_select(0, kept)
        if k > 0 or not self.steps:
            self.to_check.append(to_check)
        return own, kept, p if sampled else None

    def gather(self, k: int) -> Tensor | None:
        """Let the level below level k draft. Returns the drafts' distributions (most, V)."""
        if k == 0:
            return None
        if self.depths[k - 1] == 0:
            return self.draft(self.steps[0])
        base, rows = self.length, []
        for _ in range(self.steps[k - 1]):
            at = self.length - base
            if (written := self.propose(k - 1)) is not None:
                rows.append((at, written))
        if not rows:
            return None
        q = rows[0][1].new_zeros(self.most[k], rows[0][1].shape[1])
        for at, p in rows:  # later ones in place of what earlier steps did not write
            q.index_copy_(0, self.positions(at, len(p)), p)
        return q

    def run(self, k: int, base: Tensor) -> Tensor:
        """Level k's logits (most + 1, V) from position base - 1 on."""
        step, depth = self.step, self.depths[k]
        if k > 0 and self.depths[k - 1] > 0:  # the segments below have run all but the newest token
            self.segments(0, k, self.length - 1)
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
        step, exit = self.step, self.options.draft_head
        first, self.headed = self.headed, self.length
        states = step.cache.hidden[exit].index_select(1, self.positions(first - 1, WIDTH))
        h = self.pass_head(first, states).index_select(1, self.length - 1 - first)  # (1, 1, D)
        rows = []
        for i in range(want):
            if i > 0:
                h = self.pass_head(self.length - 1, F.pad(h, (0, 0, 0, WIDTH - 1)))[:, :1]
            logits = step.variant.draft_logits(h, exit)[0]  # (1, V)
            token = logits.argmax(-1)
            if self.options.temperature > 0:
                rows.append(self.options.distribution(logits))
                token = draw(rows[-1][0], self.draw_ahead(1))
            step.tokens.index_copy_(0, self.length, token)
            self.length = self.length + 1
        return torch.cat(rows) if rows else None

    def pass_head(self, first: Tensor, states: Tensor) -> Tensor:
        """Run the draft head from position first (1,) on, given the exit's states (1, WIDTH, D)."""
        plan = self.step.plan(first, WIDTH, self.step.end)
        ids = self.step.tokens.index_select(0, plan.positions)
        return self.step.variant.draft(self.options.draft_head, states, ids[None], plan)

    def positions(self, first: Tensor, n: int) -> Tensor:
        return first + self.step.cache.columns[:n]

    def tokens(self, first: Tensor, n: int) -> Tensor:
        return self.step.tokens.index_select(0, self.positions(first, n))

    def draw_ahead(self, n: int) -> Tensor:
        """Return the next n of the uniform numbers that were drawn ahead."""
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
    b = F.pad((grown - grown.cummax(0).values.clamp(min=0)).exp(), (1, 0), value=1)  # (N+1,)
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
