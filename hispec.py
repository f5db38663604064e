"""Hierarchical speculative decoding: one model, read at several depths, one recursion.

A shallow exit drafts tokens, a deeper exit filters the draft, the full model has the last word
(HiSpec, Kumar, Sanghavi, Das, arXiv 2510.01336). A *ladder* is a list of exits, each a depth in
layers. Level k is the model cut at exit k, the last level is the whole model; segment k is the
layers that level k has beyond level k-1. So

    exits=()      windows=()       plain autoregressive decoding
    exits=(8,)    windows=(4,)     a single exit (LayerSkip, arXiv 2404.16710)
    exits=(4, 8)  windows=(2, 4)   HiSpec
    exits=(0, 8)  windows=(4, 4)   at depth 0 no layer runs: a drafter proposes (drafters.py)

and longer ladders. Whatever the ladder, the output is the full model's own: the same tokens at
temperature 0, the same distribution above it. `Decoder.propose` is the method.
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
    options: exits, windows, thresholds, temperature, top_k, top_p, seed, stop: arguments.Options.
    watch: called with an Event after every step but a drafter's. drafter: what drafts at depth 0
    (drafters.py; default: the look-up). decoder: a subclass of Decoder, to count, to time, or to
    decide otherwise. fast: the step to use; default: the model's own, or the plain one.
    Raises ValueError for arguments out of range, before any work, and for logits that are not
    finite.
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

    tokens[:length] is the text so far, on the device: what the last level wrote, then drafts that
    it has not judged. `text` is its copy on the host, which lags behind while level 0 drafts. The
    newest token has always been written, and no level has run it yet.
    """

    def __init__(self, prompt: list[int], end: int, options: Options, step: "Step",
                 cache: KVCache, drafter, watch=None):  # fmt: skip
        self.options, self.step, self.cache = options, step, cache
        self.drafter, self.watch = drafter, watch
        self.depths = cache.depths
        self.top = len(self.depths) - 1  # the last level: the whole model
        self.text = list(prompt)  # on the host, as far as it has been read there
        self.start = self.length = len(prompt)
        self.unchanged = 0  # tokens of the text that are as they were when the drafter last saw it
        self.end = end  # no text beyond it; a stop token that the last level writes lowers it
        device = cache.keys.device
        room = len(cache.columns) + 1  # a level's own token may fall right behind the text's end
        self.tokens = torch.zeros(room, dtype=torch.long, device=device)
        self.tokens[: self.length] = torch.tensor(prompt)
        self.rng = torch.Generator(device)
        drawn = torch.randint(2**63 - 1, ())  # repeatable after torch.manual_seed
        self.rng.manual_seed(int(drawn if options.seed is None else options.seed))
        self.stats = [LevelStats(depth) for depth in self.depths]
        self.began = time.perf_counter()

    def read_prompt(self) -> None:
        """One pass through all layers; the last level's own token follows the prompt."""
        base = self.length
        own, kept, _ = self.judge(self.top, base, None, self.run(self.top, base))
        self.settle(self.top, base, own, kept)

    def propose(self, k: int, want: int) -> Tensor | None:
        """Append at least `want` tokens that level k accepts; fewer at the end of the text, or once
        level k's probability of what it appended is below its threshold.

        Returns the distributions (n, V) that the n tokens are samples of; at temperature 0 None.
        """
        if self.depths[k] == 0:
            return self.draft(want)
        threshold = (*self.options.thresholds, 0.0)[k]  # the last level's word is final
        goal, sure = self.length + want, 1.0  # sure: level k's probability of what it appended
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
                sure *= probability(
                    self.tokens[base : self.length], self.options.distribution(logits)
                )
        return torch.cat(samples_of) if samples_of else None

    def run(self, k: int, base: int) -> Tensor:
        """Level k's logits (n+1, V) for the n drafts from `base` on and one token more."""
        # a position's logits predict the next token: they are those from base - 1 on
        return self.step.run(self.cache, self.tokens, self.length, k, self.length - base + 1)

    def judge(self, k: int, base: int, q: Tensor | None, logits: Tensor):
        """What level k makes of the n drafts from `base` on: its own token (1,), how many drafts
        (1,) it keeps before it, and the distributions (n+1, V) that these are samples of.
        """
        drafts = self.tokens[base : self.length]  # (n,), none for level 0
        if self.options.temperature == 0:
            to_check, choice = logits.max(dim=-1)  # (n+1,)
            (own, kept), written = accept_equal(drafts, choice), None
        else:
            p = self.options.distribution(logits)  # (n+1, V)
            q = p[:0] if q is None else q
            own, kept, written = self.accept(k, drafts, q, p)
            to_check = torch.cat([p[:, 0], q[:, 0]])  # of logits with a NaN the whole row is NaN
        if self.reads(k):
            # an own token of -1 means "not finite": `settle` raises, without a second host read
            own = torch.where(to_check.isfinite().all(), own, -1)
        return own, kept, written

    def accept(self, k: int, drafts: Tensor, q: Tensor, p: Tensor):
        """The acceptance rule for sampled text: override it to try another.

        drafts (n,) are samples of the rows of q (n, V); p (n+1, V) is level k's own. Returns its
        own token (1,), how many drafts it keeps before that (1,), and what is written, (n+1, V):
        row i is the distribution of the token at draft i's place, over all that could have happened
        there, whether the draft was kept or not. If a rule keeps what is in a set S, and else draws
        from p, then written = q * S + (q outside S).sum() * p. The last level's rule has to write
        p, so call super() there. At temperature 0 `judge` decides, by the argmax alone.
        """
        return accept_block(drafts, q, p, self.rng)

    def reads(self, k: int) -> bool:
        """Whether the host reads what level k decides. The lowest level, if it only drafts, never
        judges, so that its tokens may stay on the device.
        """
        return k > 0 or self.top == 0

    def settle(self, k: int, base: int, own: Tensor, kept: Tensor) -> None:
        """Keep the accepted drafts and level k's own token behind them; roll back the rest."""
        n, drafts = 0, []  # as it is where nothing is read: no drafts, and one token of its own
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
        """Depth 0 has no layers: the drafter appends at most `want` tokens, or none."""
        want = min(want, self.end - self.length)
        drafts, q = self.drafter.draft(self, want)
        if not isinstance(drafts, Tensor):
            check_tokens(self.step.model.config, drafts, "the drafter's text")
            drafts = torch.tensor(drafts, dtype=torch.long, device=self.tokens.device)
        drafts = drafts[:want]
        self.tokens[self.length : self.length + len(drafts)] = drafts
        self.length += len(drafts)
        self.unchanged = self.length
        self.stats[0].calls += 1
        if self.options.temperature == 0:
            return None
        if q is None:  # not drawn: all the probability is on each draft
            q = F.one_hot(drafts, self.step.model.config.vocab_size).to(precise(drafts.device))
        return q[: len(drafts)]

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A drafter's token (1,) by its logits (1, V), and the distribution it was drawn from."""
        if self.options.temperature == 0:
            return logits.argmax(-1), None
        q = self.options.distribution(logits)
        return draw(q[0], self.rng), q

    # ---- what was done, for whoever wants to know -----------------------------------------------

    def report(self, k: int, base: int, drafts: list[int], kept: int) -> None:
        """Count what a step of level k did, and tell whoever watches."""
        self.stats[k].calls += 1
        if k > 0:
            self.stats[k - 1].proposed += len(drafts)
            self.stats[k - 1].accepted += min(kept, self.length - base)  # none behind a stop token
        if self.watch:
            text, now = self.tokens[base : self.length].tolist(), time.perf_counter() - self.began
            positions = list(self.cache.processed)
            self.watch(Event(k, base, drafts, kept, text, positions, now))

    def statistics(self) -> list[LevelStats]:
        """What each level did, once the text has ended."""
        for stats, positions in zip(self.stats, self.cache.processed):
            stats.positions = positions
        self.stats[-1].proposed = self.stats[-1].accepted = self.length - self.start
        return self.stats


class TokenByToken(Decoder):
    """Decides on each sampled draft by itself, as speculative sampling was first published."""

    def accept(self, k: int, drafts: Tensor, q: Tensor, p: Tensor):
        return accept_tokens(drafts, q, p, self.rng)


class Step:
    """How levels run: plainly. fast/ has steps that do the same work in less time."""

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

        Returns what it leaves for its exit's logits there (N, D).
        """
        start, depth = (0, *cache.depths)[j : j + 2]
        plans = cache.plans(j, length) if depth > 0 else ()
        states = [run_plan(self.model, plan, tokens[plan.slots], start, depth) for plan in plans]
        cache.advance(j, length)
        return torch.cat(states) if states else self.model.embed.weight[:0]

    def logits(self, states: Tensor, depth: int) -> Tensor:
        """The logits (n, V) of what `segment` left at n positions (n, D)."""
        return self.model.logits(states, depth)

    def draft(
        self, cache: KVCache, exit: int, states: Tensor, tokens: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Run the draft head on `exit` over the N positions from `first` on.

        states (1, N, D): the exit's, one position before each; tokens (N,): those at the positions.
        Returns what the head makes of the last one: its state (1, 1, D), its logits (1, V).
        """
        plan = cache.plan(first, first + len(tokens))
        h = self.model.draft(exit, states, tokens[None], plan)[:, -1:]
        return h, self.model.draft_logits(h, exit)[0]


def run_plan(model: Llama, plan: Plan, tokens: Tensor, start: int, depth: int) -> Tensor:
    """One pass, of tokens (N,), through layers start..depth-1.

    It begins with the tokens at layer 0, elsewhere with the hidden states that were left there.
    Returns the states (N, D) for the logits of the exit at `depth`.
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


# ---- acceptance: what a level keeps of the drafts below it --------------------------------------


def accept_equal(drafts: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """The level's own token (1,), where drafts (n,) differ or end, and how many precede it (1,).

    choice (n+1,): the tokens that the level would write, for each draft and one token more.
    """
    kept = leading(choice[:-1] == drafts)
    return choice.index_select(0, kept), kept


def accept_tokens(
    drafts: Tensor, q: Tensor, p: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Speculative sampling (arXiv 2211.17192, Algorithm 1): what is written is distributed as p.

    drafts (n,) are samples of the rows of q (n, V); p (n+1, V) is the level's own. Draft x is kept
    with probability min(1, p(x) / q(x)). The first that is not is replaced by a draw from the
    positive part of p - q; after a full match nothing is subtracted. Returns the level's own token
    (1,), how many drafts precede it (1,), and the distributions of what is written: p.
    """
    kept = leading(coin(ratios(drafts, q, p), rng))
    residual = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]])  # (n+1, V), unnormalised
    return draw(residual.index_select(0, kept).squeeze(0), rng), kept, p


def accept_block(
    drafts: Tensor, q: Tensor, p: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Block verification (arXiv 2403.10444): the same, and on average it keeps no fewer drafts.

    A draft that p likes more than q makes up for a later one that it likes less (the argument is in
    lecture/acceptance.md). For drafts x_1 .. x_n

        b_0 = 1,  b_i = min(1, b_{i-1} p_i(x_i) / q_i(x_i))
        r_i = sum over v of max(b_i p_{i+1}(v) - q_{i+1}(v), 0)
        pass_i = r_i / (r_i + 1 - b_i) for i < n,  pass_n = b_n

    and the largest i whose coin, of probability pass_i, says yes is how many are kept. The level's
    own token is drawn from that sum's terms, or from p behind the last draft.
    """
    n, steps = len(drafts), [p.new_ones(())]
    for ratio in ratios(drafts, q, p):
        steps.append((steps[-1] * ratio).clamp(max=1))
    b = torch.stack(steps)  # (n+1,): b_0 .. b_n
    residual = torch.cat([(b[:-1, None] * p[:-1] - q).clamp(min=0), p[-1:]])  # (n+1, V)
    r = residual[1:-1].sum(dim=-1)  # (n-1,): r_1 .. r_{n-1}
    passes = torch.cat([r / (r + 1 - b[1:-1]), b[1:][-1:]])  # (n,): pass_1 .. pass_n
    numbers = torch.arange(1, n + 1, device=p.device)
    says_yes = coin(passes.nan_to_num(0), rng)  # 0/0 where p and q are the same: never needed
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
    """The product of the probabilities of tokens (n,) by the first rows of p (n or more, V)."""
    return p[: len(tokens)].gather(1, tokens.unsqueeze(1)).prod().item()


def coin(prob: Tensor, rng: torch.Generator) -> Tensor:
    """True with probability prob (n,); at 1 and above always."""
    return torch.rand(prob.shape, dtype=prob.dtype, device=prob.device, generator=rng) < prob


def draw(weights: Tensor, rng: torch.Generator) -> Tensor:
    """A token (1,) in proportion to weights (V,), with no host read."""
    clocks = torch.empty_like(weights).exponential_(generator=rng)
    return (weights / clocks).argmax(dim=0, keepdim=True)  # the token whose clock rings first
