"""Hierarchical speculative decoding: one model, read at several depths, one recursion.

A shallow exit drafts tokens, a deeper exit filters the draft, the full model has the last word
(HiSpec, Kumar, Sanghavi, Das, arXiv 2510.01336). A *ladder* is a list of exits, each a depth in
layers. Level k is the model cut at exit k, the last level is the whole model; segment k is the
layers that level k has beyond level k-1. So

    exits=()      windows=()       plain autoregressive decoding
    exits=(8,)    windows=(4,)     one draft exit (LayerSkip, arXiv 2404.16710)
    exits=(4, 8)  windows=(2, 4)   HiSpec
    exits=(0, 8)  windows=(4, 4)   exit 0 is no layer: it looks drafts up in the text so far

and longer ladders. Whatever the ladder, the output is the full model's own: the same tokens at
temperature 0, the same distribution above it. `Ladder.propose` is the method.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from arguments import Arguments, Event, Generation, LevelStats, checked
from kvcache import KVCache, up_to_chunk
from lookup import look_up
from model import Llama


@torch.inference_mode()
def generate(
    model: Llama, prompt: Sequence[int], max_new_tokens: int, *, exits: Sequence[int] = (),
    windows: Sequence[int] = (), thresholds: Sequence[float] = (), temperature: float = 0.0,
    top_k: int = 0, top_p: float = 1.0, seed: int | None = None, stop: Iterable[int] = (),
    watch: Callable[[Event], None] | None = None, fast=None,
) -> Generation:  # fmt: skip
    """Continue `prompt` (token ids) by at most max_new_tokens tokens, as the full model would.

    exits: depths in layers, ascending; 0 looks drafts up in the text so far.
    windows[k]: how many tokens level k is asked for before level k+1 verifies them.
    thresholds[k]: level k stops early once the product of its own probabilities of what it gathered
    is below this (at temperature 0: those of temperature 1). None given: never.
    temperature: 0 takes the likeliest token. Above, each level samples from its top_k likeliest
    (0: all), of these from the fewest that hold top_p of the probability. seed makes it repeatable.
    stop: token ids; the text ends after the first new one, or when the model's context is full.
    watch: called with an Event after every step, but for look-ups. fast: a step to use (faststep).
    Raises ValueError, before any work, for arguments out of range.
    """
    began = time.perf_counter()
    asked = checked(model.config, prompt, max_new_tokens, exits, windows, thresholds,
                    temperature, top_k, top_p, seed, stop)  # fmt: skip
    end = min(len(asked.prompt) + asked.max_new_tokens, model.config.max_seq_len)
    with fast.open(model, asked.exits, end) if fast else nullcontext() as cache:
        ladder = Ladder(model, asked, cache, end, fast or step, watch)
        ladder.propose(ladder.top, end - ladder.length)
    tokens = ladder.text[len(asked.prompt) :]
    ladder.stats[-1].proposed = ladder.stats[-1].accepted = len(tokens)
    return Generation(tokens, ladder.stats, time.perf_counter() - began, ladder.prefilled - began)


class Ladder:
    """The state of one generation, and the recursion that advances it.

    tokens[:length] is the text so far: what the last level wrote, then drafts it has not judged.
    """

    def __init__(self, model: Llama, asked: Arguments, cache, end: int, step, watch=None):
        self.model, self.asked, self.step, self.watch = model, asked, step, watch
        self.cache = cache or KVCache(model, asked.exits, end)
        self.depths = (*asked.exits, model.config.n_layers)
        self.thresholds = (*asked.thresholds, 0.0)  # the last level's word is final
        self.top = len(asked.exits)  # the last level: the whole model
        self.stats = [LevelStats(depth) for depth in self.depths]
        self.length = len(asked.prompt)
        self.end = end  # no text beyond it; a stop token that the last level writes lowers it
        device = model.embed.weight.device
        room = up_to_chunk(end + model.pad)  # for a token past the end, or a pass's padding
        self.tokens = torch.zeros(room, dtype=torch.long, device=device)
        self.tokens[: self.length] = torch.as_tensor(asked.prompt)
        self.text = list(asked.prompt)  # the same on the host, as far as it has been read there
        # laws[k]: from each step of the level below, the laws (n, V) of the n drafts it appended:
        # whether it kept a draft or wrote its own, each is a sample of its row
        self.laws: list[list[Tensor]] = [[] for _ in self.depths]
        self.rng = torch.Generator(device)
        self.rng.manual_seed(self.rng.seed() if asked.seed is None else asked.seed)
        self.began = self.prefilled = time.perf_counter()

    def propose(self, k: int, want: int) -> None:
        """Append at least `want` tokens that level k accepts; fewer at the end or in doubt."""
        if self.depths[k] == 0:
            return self.copy(want)
        goal, sure = self.length + want, 1.0  # sure: level k's probability of what it appended
        while self.length < min(goal, self.end) and sure >= self.thresholds[k]:
            base = self.length  # level k has yet to run position base - 1
            if k > 0 and self.cache.lengths[k] > 0:  # the last level first reads the prompt
                window = self.asked.windows[k - 1]
                self.propose(k - 1, min(window, goal - base))  # the level below drafts
            logits = self.run(k, base)
            own, kept = self.judge(k, base, logits)
            self.settle(k, base, own, kept)
            if self.thresholds[k] > 0:
                sure *= probability(self.tokens[base : self.length], self.asked.law(logits))

    def run(self, k: int, base: int) -> Tensor:
        """Level k's logits (n+1, V) for the n drafts from `base` on and one token more."""
        self.stats[k].calls += 1
        for j in range(k + 1):
            self.stats[j].positions += self.length - self.cache.lengths[j]
        rows = self.length - base + 1  # a position's logits predict the next: from base - 1 on
        return self.step(self.model, self.cache, self.depths, self.tokens, self.length, k, rows)

    def judge(self, k: int, base: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The token (1,) that level k adds itself, and how many drafts (1,) it keeps before it."""
        drafts = self.tokens[base : self.length]  # (n,), none for level 0
        if self.asked.temperature == 0:
            return verify_greedy(drafts, logits)
        p = self.asked.law(logits)  # (n+1, V)
        q = torch.cat([p[:0], *self.laws[k]])  # (n, V), of no rows if n = 0
        self.laws[k].clear()
        if k < self.top:
            self.laws[k + 1].append(p)
        return verify_sampled(drafts, q, p, self.rng)

    def settle(self, k: int, base: int, own: Tensor, kept: Tensor) -> None:
        """Keep the accepted drafts and level k's own token behind them; roll back the rest."""
        n, drafts = 0, []  # a drafting level judges nothing: the host need not wait for it
        if k > 0 or self.top == 0:  # the one host read of a verification without thresholds
            read = torch.cat([kept, own, self.tokens[base : self.length]])
            n, token, *drafts = read.tolist()
            self.text[base:] = [*drafts[:n], token]
        if k == self.top:
            stops = [i for i in range(base, len(self.text)) if self.text[i] in self.asked.stop]
            self.end = min([self.end, *(i + 1 for i in stops)])
        self.tokens[base + n : base + n + 1] = own
        self.length = min(base + n + 1, self.end)
        del self.text[self.length :]
        if k < self.top and self.asked.temperature > 0:
            self.laws[k + 1][-1] = self.laws[k + 1][-1][: self.length - base]
        self.cache.rollback(min(base + n, self.length))  # level k has yet to run its own token
        self.report(k, base, drafts, n)

    def report(self, k: int, base: int, drafts: list[int], kept: int) -> None:
        """Count what a step of level k did, and tell whoever watches."""
        if k > 0:
            self.stats[k - 1].proposed += len(drafts)
            self.stats[k - 1].accepted += min(kept, self.length - base)  # none behind a stop token
        if k == self.top and self.stats[k].calls == 1:
            self.prefilled = time.perf_counter()
        if self.watch:
            text, now = self.tokens[base : self.length].tolist(), time.perf_counter() - self.began
            positions = [stats.positions for stats in self.stats]
            self.watch(Event(k, base, drafts, kept, text, positions, now))

    def copy(self, want: int) -> None:
        """Depth 0 drafts: append up to `want` tokens, or none, that followed such an end before."""
        drafts = look_up(self.text, min(want, self.end - self.length))
        new = torch.tensor(drafts, dtype=torch.long, device=self.tokens.device)
        self.tokens[self.length : self.length + len(drafts)] = new
        self.length += len(drafts)
        self.stats[0].calls += 1
        if self.asked.temperature > 0:  # a copy is no chance: all the probability is on it
            self.laws[1].append(F.one_hot(new, self.model.config.vocab_size).double())


def step(model: Llama, cache: KVCache, depths, tokens, length: int, k: int, rows: int) -> Tensor:
    """Run segments 0..k over every position < length that each has not processed.

    Returns level k's logits (rows, V) at the last `rows` of them.
    """
    for j, (start, depth) in enumerate(zip((0, *depths), depths[: k + 1])):
        states = []
        for first, stop in cache.passes(j, length) if depth > 0 else ():
            cache.place(first, stop)
            h = cache.run(model, tokens[cache.at], start, depth)  # (N, D)
            states.append(h[: stop - first])
        cache.lengths[j] = length
    tail = torch.cat(states)[-rows:]  # (rows, D); padded below, as positions are
    return model.logits(F.pad(tail, (0, 0, 0, -rows % cache.pad)), depths[k])[:rows]


def verify_greedy(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The level's own token (1,), where drafts (n,) differ or end, and how many precede it (1,)."""
    choice = logits.argmax(dim=-1)  # (n+1,)
    kept = leading(choice[:-1] == drafts)
    return choice.index_select(0, kept), kept


def verify_sampled(drafts: Tensor, q: Tensor, p: Tensor, rng) -> tuple[Tensor, Tensor]:
    """Speculative sampling (arXiv 2211.17192, Algorithm 1): what is written is distributed as p.

    drafts (n,) are samples of the rows of q (n, V); p (n+1, V) is the level's own. Draft x is kept
    with probability min(1, p(x) / q(x)). The first that is not is replaced by a draw from the
    positive part of p - q; after a full match nothing is subtracted. Returns as verify_greedy.
    """
    x = drafts.unsqueeze(1)  # (n, 1)
    kept = leading(coin((p[:-1].gather(1, x) / q.gather(1, x)).squeeze(1), rng))
    residual = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]])  # (n+1, V), unnormalised
    return draw(residual.index_select(0, kept).squeeze(0), rng), kept


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
    return (weights / clocks).argmax(dim=0, keepdim=True)  # sped up so, the first clock to ring
