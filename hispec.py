"""Hierarchical speculative decoding: one model, read at several depths, one recursion.

A shallow exit drafts tokens, a deeper exit filters the draft, and the full model has the last
word (HiSpec, Kumar, Sanghavi, Das, arXiv 2510.01336). A *ladder* is a list of exits, each a depth
in layers. Level k is the model cut at exit k, and the last level is the whole model. Segment k is
the layers that level k has beyond level k-1. So

    exits=()      windows=()       plain autoregressive decoding
    exits=(8,)    windows=(4,)     a single exit (LayerSkip, arXiv 2404.16710)
    exits=(4, 8)  windows=(2, 4)   HiSpec
    exits=(0, 8)  windows=(4, 4)   at depth 0 no layer runs: a drafter proposes (drafters.py)

and so on for longer ladders. Whatever the ladder, the output is the full model's own: the same
tokens at temperature 0, the same distribution above it. `Decoder.propose` is the method.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from arguments import Event, Generation, LevelStats, Options, check_tokens, checked_prompt, precise
from drafters import HeadDrafter, LookUp
from kvcache import KVCache, Plan
from model import Llama


@torch.inference_mode()
def generate(
    model: Llama, prompt: Sequence[int], max_new_tokens: int, *,
    watch: Callable[[Event], None] | None = None, fast: "Step | None" = None,
    drafter=None, decoder: "type[Decoder] | None" = None, **options,
) -> Generation:  # fmt: skip
    """Continue `prompt` (token ids) by at most max_new_tokens tokens, as the full model would.

    The text also ends when the model's context is full.
    options: exits, windows, thresholds, draft_head, temperature, top_k, top_p, seed, stop, as in
    arguments.Options.
    watch: called with an Event after every step of a level. drafter: proposes tokens at depth 0
    (drafters.py; default: the draft head, if draft_head names one, or else the look-up). decoder: a
    subclass of Decoder that counts, measures time, or decides otherwise. fast: the step to use;
    default: the model's own, or else the plain one.
    Raises ValueError for arguments out of range, before any work is done, and for logits that are
    not finite.
    """
    began = time.perf_counter()
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ValueError("generate computes in the model's own dtype: call it outside autocast")
    asked = Options(**options)
    asked.check_model(model.config, list(map(int, model.draft_heads)))
    tokens, end = checked_prompt(model.config, prompt, max_new_tokens)
    step = fast or model.fast or Step(model)
    if step.model is not model:
        raise ValueError("fast: the step was made for another model")
    if drafter is not None and asked.exits[:1] != (0,):
        raise ValueError(f"a drafter drafts at depth 0: exits=(0, ...), got {asked.exits}")
    if drafter is None:
        drafter = HeadDrafter(asked.draft_head) if asked.draft_head else LookUp()
    with step.open(asked.exits, end, asked.draft_head) as cache:
        decoding = (decoder or step.decoder)(tokens, end, asked, step, cache, drafter, watch)
        if decoding.length < end:
            decoding.read_prompt()
        prefilled = time.perf_counter()
        decoding.propose(decoding.top, end - decoding.length)
    new, now = decoding.text[len(tokens) :], time.perf_counter()
    return Generation(new, decoding.statistics(), now - began, prefilled - began)


class Decoder:
    """The state of one generation, and the recursion that advances it.

    tokens[:length] is the text so far, on the device: the tokens that the last level wrote, then
    drafts that it has not judged. `text` is the copy on the host, which lags behind while level 0
    drafts. The newest token is always in `tokens`, but no level has run it yet.
    """

    def __init__(self, prompt: list[int], end: int, options: Options, step: "Step",
                 cache: KVCache, drafter, watch=None):  # fmt: skip
        self.options, self.step, self.cache = options, step, cache
        self.drafter, self.watch = drafter, watch
        self.depths = cache.depths
        self.top = len(self.depths) - 1  # the last level: the whole model
        self.text = list(prompt)  # the host's copy, as far as it has been read
        self.start = self.length = len(prompt)
        self.unchanged = 0  # how many first tokens are still as the drafter last saw or wrote them
        self.end = end  # the text's greatest length; a stop token of the last level lowers it
        device = cache.keys.device
        room = len(cache.columns) + 1  # a level's own token may land just past the text's end
        self.tokens = torch.zeros(room, dtype=torch.long, device=device)
        self.tokens[: self.length] = torch.tensor(prompt)
        self.rng = torch.Generator(device)
        drawn = torch.randint(2**63 - 1, ())  # repeatable after torch.manual_seed
        self.rng.manual_seed(int(drawn if options.seed is None else options.seed))
        self.stats = [LevelStats(depth) for depth in self.depths]
        self.began = time.perf_counter()

    def read_prompt(self) -> None:
        """Run the prompt through all layers, and append the last level's own token."""
        base = self.length
        own, kept, _ = self.judge(self.top, base, None, self.run(self.top, base))
        self.settle(self.top, base, own, kept)

    def propose(self, k: int, want: int) -> Tensor | None:
        """Append at least `want` tokens that level k accepts.

        It appends fewer if the text ends, or once the product of level k's probabilities of the
        appended tokens is below its threshold. Returns the distributions (n, V) that the n tokens
        are samples of, or None at temperature 0.
        """
        if self.depths[k] == 0:
            return self.draft(want)
        threshold = (*self.options.thresholds, 0.0)[k]  # the last level never stops early
        goal, sure = self.length + want, 1.0  # sure: level k's probability of the appended tokens
        samples_of: list[Tensor] = []
        while self.length < min(goal, self.end) and sure >= threshold:
            base, q = self.length, None  # level k has yet to run position base - 1
            if k > 0:  # the level below drafts
                q = self.propose(k - 1, min(self.options.windows[k - 1], goal - base))
            logits = self.run(k, base)
            own, kept, written = self.judge(k, base, q, logits)
            self.settle(k, base, own, kept)
            if written is not None and k < self.top:
                samples_of.append(written[: self.length - base])
            if threshold > 0:
                p = self.options.distribution(logits[: self.length - base])
                sure *= probability(self.tokens[base : self.length], p)
        return torch.cat(samples_of) if samples_of else None

    def run(self, k: int, base: int) -> Tensor:
        """Level k's logits (n+1, V) for the n drafts from `base` on and the token after them."""
        # a position's logits predict the token after it, so these begin at position base - 1
        return self.step.run(self.cache, self.tokens, self.length, k, self.length - base + 1)

    def judge(self, k: int, base: int, q: Tensor | None, logits: Tensor):
        """Decide which of the n drafts from `base` on level k keeps.

        Returns level k's own token (1,), how many drafts (1,) it keeps before that token, and the
        distributions (n+1, V) that these tokens are samples of, or None at temperature 0.
        """
        drafts = self.tokens[base : self.length]  # (n,), none for level 0
        if self.options.temperature == 0:
            own, kept = self.agree(k, drafts, logits)
            to_check, written = logits.amax(dim=-1), None  # (n+1,)
        else:
            p = self.options.distribution(logits)  # (n+1, V)
            q = p[:0] if q is None else q
            own, kept, written = self.accept(k, drafts, q, p)
            to_check = torch.cat([p[:, 0], q[:, 0]])  # one NaN logit makes its whole row NaN
        if self.reads(k):
            # an own token of -1 means "not finite": `settle` raises, without a second host read
            own = torch.where(to_check.isfinite().all(), own, -1)
        return own, kept, written

    def agree(self, k: int, drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The acceptance rule for greedy text. Override it to try another below the last level.

        logits (n+1, V) are level k's own for the drafts (n,), of which there may be none, and for
        the token after them. Returns level k's own token (1,), and how many drafts it keeps before
        that token (1,).
        """
        return accept_equal(drafts, logits.argmax(dim=-1))

    def accept(self, k: int, drafts: Tensor, q: Tensor, p: Tensor):
        """The acceptance rule for sampled text. Override it to try another below the last level.

        drafts (n,), of which there may be none, are samples of the rows of q (n, V), and p (n+1, V)
        holds level k's own distributions. Returns level k's own token (1,), how many drafts it
        keeps before that token (1,), and `written` (n+1, V): row i is the distribution of the token
        that ends up in draft i's place, whether the draft is kept or replaced; the last row is that
        of the token after all drafts. For example, a rule that keeps a draft in a set S, given as
        zeros and ones (V,), and otherwise draws from p, has

            written = torch.cat([q * S + (q * (1 - S)).sum(-1, keepdim=True) * p[:-1], p[-1:]])

        The last level's tokens must be samples of p: call super() there. Flip coins and draw tokens
        by `hispec.coin` and `hispec.draw`, since the tests of a rule's law replace these two.
        """
        return accept_block(drafts, q, p, self.rng)

    def reads(self, k: int) -> bool:
        """Whether the host reads what level k decides. A lowest level that only drafts judges
        nothing, so its tokens may stay on the device.
        """
        return k > 0 or self.top == 0

    def settle(self, k: int, base: int, own: Tensor, kept: Tensor) -> None:
        """Keep the accepted drafts, append level k's own token, and roll back the rest."""
        n, drafts = 0, []  # if the host reads nothing, there are no drafts but only an own token
        if self.reads(k):  # the one host read of a verification without thresholds
            read = torch.cat([kept, own, self.tokens[base : self.length]])
            n, token, *drafts = read.tolist()
            if token < 0:
                raise ValueError(
                    f"logits after layer {self.depths[k]}, or of its drafts, are NaN or infinite: "
                    f"the weights are damaged, or too large for {self.cache.keys.dtype}"
                )
            self.text[base:] = [*drafts[:n], token]
        if k == self.top:
            stops = [i for i in range(base, len(self.text)) if self.text[i] in self.options.stop]
            self.end = min([self.end, *(i + 1 for i in stops)])
        self.tokens[base + n : base + n + 1] = own
        self.length = min(base + n + 1, self.end)
        del self.text[self.length :]
        self.unchanged = min(self.unchanged, base + n)
        self.cache.rollback(min(base + n, self.length))  # level k has yet to run its own token
        self.report(k, base, drafts, n)

    def draft(self, want: int) -> Tensor | None:
        """Let the drafter append at most `want` tokens, or none: depth 0 has no layers."""
        base, want = self.length, min(want, self.end - self.length)
        drafted = self.drafter.draft(self, want)
        if not isinstance(drafted, tuple) or len(drafted) != 2:
            raise ValueError(f"draft must return (tokens, q), q may be None; got {drafted!r}")
        drafts, q = drafted
        if not isinstance(drafts, Tensor):
            check_tokens(self.step.model.config, drafts, "the drafter's text")
            drafts = torch.tensor(drafts, dtype=torch.long, device=self.tokens.device)
        drafts = drafts[:want]
        self.tokens[self.length : self.length + len(drafts)] = drafts
        self.length += len(drafts)
        self.unchanged = self.length
        self.report(0, base, [], 0)
        if self.options.temperature == 0:
            return None
        if q is None:  # the drafts were not drawn: each has probability 1
            q = F.one_hot(drafts, self.step.model.config.vocab_size).to(precise(drafts.device))
        return q[: len(drafts)]

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token (1,) chosen by logits (1, V), and the distribution it was drawn from."""
        if self.options.temperature == 0:
            return logits.argmax(-1), None
        q = self.options.distribution(logits)
        return draw(q[0], self.rng), q

    # ---- statistics and events ------------------------------------------------------------------

    def report(self, k: int, base: int, drafts: list[int], kept: int) -> None:
        """Count what a step of level k did, and pass it to `watch`."""
        self.stats[k].calls += 1
        if k > 0:
            self.stats[k - 1].proposed += len(drafts)
            self.stats[k - 1].accepted += min(kept, self.length - base)  # none after a stop token
        if self.watch:
            text, now = self.tokens[base : self.length].tolist(), time.perf_counter() - self.began
            positions = list(self.cache.processed)
            self.watch(Event(k, base, drafts, kept, text, positions, now))

    def statistics(self) -> list[LevelStats]:
        """What each level did. To be called once, when the text has ended."""
        for stats, positions in zip(self.stats, self.cache.processed):
            stats.positions = positions
        self.stats[-1].proposed = self.stats[-1].accepted = self.length - self.start
        return self.stats


class TokenByToken(Decoder):
    """Decides on each sampled draft separately, as in the first papers on speculative sampling."""

    def accept(self, k: int, drafts: Tensor, q: Tensor, p: Tensor):
        return accept_tokens(drafts, q, p, self.rng)


class Step:
    """The plain way to run levels. The steps in fast/ do the same work in less time."""

    name = "plain"
    decoder: type[Decoder] = Decoder  # what decodes with this step

    def __init__(self, model: Llama):
        self.model = model

    @contextmanager
    def open(self, exits: tuple[int, ...], max_len: int, draft_head: int = 0) -> Iterator[KVCache]:
        """The cache of one generation, for a text of at most max_len tokens."""
        yield KVCache(self.model, exits, max_len, draft_head)

    def run(self, cache: KVCache, tokens: Tensor, length: int, k: int, n: int) -> Tensor:
        """Run segments 0..k over every position < length that each has not processed.

        Returns level k's logits (n, V) at the last n of them.
        """
        for j in range(k + 1):
            states = self.segment(cache, tokens, j, length)
        return self.logits(states[-n:], cache.depths[k])

    def segment(self, cache: KVCache, tokens: Tensor, j: int, length: int) -> Tensor:
        """Run segment j over the N positions < length that it has not processed.

        Returns the states (N, D) at these positions, from which the exit's logits are computed.
        """
        start, depth = (0, *cache.depths)[j : j + 2]
        plans = cache.plans(j, length) if depth > 0 else ()
        states = [run_plan(self.model, plan, tokens[plan.slots], start, depth) for plan in plans]
        cache.advance(j, length)
        return torch.cat(states) if states else self.model.embed.weight[:0]

    def logits(self, states: Tensor, depth: int) -> Tensor:
        """The logits (n, V) of the states (n, D) that `segment` returned at n positions."""
        return self.model.logits(states, depth)

    def draft(
        self, cache: KVCache, exit: int, states: Tensor, tokens: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Run the draft head on `exit` over the N positions from `first` on.

        states (1, N, D): the exit's states, each from one position earlier. tokens (N,): the tokens
        at the positions. Returns the head's state (1, 1, D) and logits (1, V) at the last position.
        """
        plan = cache.plan(first, first + len(tokens))
        h = self.model.draft(exit, states, tokens[None], plan)[:, -1:]
        return h, self.model.draft_logits(h, exit)[0]


def run_plan(model: Llama, plan: Plan, tokens: Tensor, start: int, depth: int) -> Tensor:
    """Run one pass of tokens (N,) through layers start..depth-1.

    From layer 0 it begins with the tokens, from a deeper one with the hidden states that the cache
    holds there. Returns the states (N, D) from which the exit at `depth` computes its logits.
    """
    hidden = plan.cache.hidden
    if start > 0:
        h = hidden[start].index_select(1, plan.slots)  # (1, N, D)
    else:
        h = model.embed(tokens)[None]
    h = model.run(h, start, depth, plan)
    if depth in hidden:
        hidden[depth].index_copy_(1, plan.slots, h)
    return model.exit_block(h, depth, plan)[0]


# ---- acceptance: which drafts a level keeps -----------------------------------------------------


def accept_equal(drafts: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafts (n,) up to the first that is not the level's choice.

    choice (n+1,): the tokens that the level would write in place of each draft, and after the last.
    Returns the level's own token (1,) and how many drafts precede it (1,).
    """
    kept = leading(choice[:-1] == drafts)
    return choice.index_select(0, kept), kept


def accept_tokens(
    drafts: Tensor, q: Tensor, p: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Speculative sampling (arXiv 2211.17192, Algorithm 1): its output is distributed as p.

    drafts (n,) are samples of the rows of q (n, V), and p (n+1, V) holds the level's distributions.
    Draft x is kept with probability min(1, p(x) / q(x)). The first rejected draft is replaced by a
    draw from the positive part of p - q; if all are kept, one more token is drawn from p. Returns
    the level's own token (1,), how many drafts precede it (1,), and the output's distributions: p.
    """
    kept = leading(coin(ratios(drafts, q, p), rng))
    residual = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]])  # (n+1, V), unnormalised
    return draw(residual.index_select(0, kept).squeeze(0), rng), kept, p


def accept_block(
    drafts: Tensor, q: Tensor, p: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Block verification (arXiv 2403.10444): its output is distributed as p, too.

    On average it keeps at least as many drafts as `accept_tokens`: a draft to which p gives more
    probability than q makes up for a later one to which it gives less (the argument is in
    lecture/acceptance.md). For drafts x_1 .. x_n

        b_0 = 1,  b_i = min(1, b_{i-1} p_i(x_i) / q_i(x_i))
        r_i = sum over v of max(b_i p_{i+1}(v) - q_{i+1}(v), 0)
        pass_i = r_i / (r_i + 1 - b_i) for i < n,  pass_n = b_n

    Coin i says yes with probability pass_i. The largest i whose coin says yes is the number of
    drafts kept (0 if none does). The level's own token is drawn in proportion to the terms of r_i
    for this i, or from p after the last draft.
    """
    n, steps = len(drafts), [p.new_ones(())]
    for ratio in ratios(drafts, q, p):
        steps.append((steps[-1] * ratio).clamp(max=1))
    b = torch.stack(steps)  # (n+1,): b_0 .. b_n
    residual = torch.cat([(b[:-1, None] * p[:-1] - q).clamp(min=0), p[-1:]])  # (n+1, V)
    r = residual[1:-1].sum(dim=-1)  # (n-1,): r_1 .. r_{n-1}
    passes = torch.cat([r / (r + 1 - b[1:-1]), b[1:][-1:]])  # (n,): pass_1 .. pass_n
    numbers = torch.arange(1, n + 1, device=p.device)
    says_yes = coin(passes.nan_to_num(0), rng)  # 0/0 where p equals q: then a later one says yes
    kept = torch.cat([numbers.new_zeros(1), numbers * says_yes]).amax(dim=0, keepdim=True)
    return draw(residual.index_select(0, kept).squeeze(0), rng), kept, p


def ratios(drafts: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """p(x) / q(x) of each draft x, (n,)."""
    x = drafts.unsqueeze(1)
    return (p[:-1].gather(1, x) / q.gather(1, x)).squeeze(1)


def leading(agree: Tensor) -> Tensor:
    """How many values of agree (n,) are true before the first false one, (1,)."""
    return agree.long().cumprod(dim=0).sum(dim=0, keepdim=True)


def probability(tokens: Tensor, p: Tensor) -> float:
    """Multiply the probabilities that the rows of p (n, V) give to tokens (n,)."""
    return p.gather(1, tokens.unsqueeze(1)).prod().item()


def coin(prob: Tensor, rng: torch.Generator) -> Tensor:
    """True with probability prob (n,), and always where prob is 1 or above."""
    return torch.rand(prob.shape, dtype=prob.dtype, device=prob.device, generator=rng) < prob


def draw(weights: Tensor, rng: torch.Generator) -> Tensor:
    """Draw a token (1,) in proportion to weights (V,), without a host read."""
    clocks = torch.empty_like(weights).exponential_(generator=rng)
    return (weights / clocks).argmax(dim=0, keepdim=True)  # the token whose clock rings first
