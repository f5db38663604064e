"""Hierarchical speculative decoding: one model, read at several depths, one recursion.

A shallow exit drafts tokens, a deeper exit filters the draft, the full model has the last word
(HiSpec, Kumar, Sanghavi, Das, arXiv 2510.01336). A *ladder* is a list of exits, each a depth in
layers. Level k is the model cut at exit k, the last level is the whole model; segment k is the layers
that level k has beyond level k-1. So

    exits=()      windows=()       plain autoregressive decoding
    exits=(8,)    windows=(4,)     self-speculation with one draft exit (LayerSkip, arXiv 2404.16710)
    exits=(4, 8)  windows=(2, 4)   HiSpec
    exits=(0, 4, 8) ...            exit 0 is no layer at all: it looks the next tokens up in the text so far
    exits=(2, 4, 8, 16) ...        any ladder: the same code

Whatever the ladder, the output is the full model's own: the same tokens at temperature 0, the same
distribution above it. One caveat: how many positions a pass holds can change the last bit of a sum, so
two logits that are equal to within rounding, which in bfloat16 is not rare, can change places.

`Ladder.propose` is the whole method; the function `step` is the only place that runs the model, and
faststep.py has a faster one for GPUs; the cache and its rollback are in kvcache.py.
"""

import numbers
import operator
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcache import KVCache
from model import Config, Llama

if TYPE_CHECKING:
    from faststep import FixedStep


@dataclass
class LevelStats:
    """What one level did in one generation."""

    exit: int  # depth in layers at which the level is read
    calls: int = 0  # steps of this level: drafts for the first, verifications for the others
    proposed: int = 0  # tokens it handed to the level above; last level: tokens it generated
    accepted: int = 0  # how many of those the level above kept; last level: all
    positions: int = 0  # positions that passed through its segment, the prompt's included


@dataclass
class Generation:
    """The new tokens (without the prompt), one LevelStats a level, shallow to deep, and wall-clock seconds."""

    tokens: list[int]
    levels: list[LevelStats] = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class Event:
    """One step of one level, as `watch` is told of it: the level judged some drafts and added a token of its own."""

    level: int  # 0 is the shallowest
    base: int  # position of the first draft, counted from the prompt's first token
    drafts: list[int]  # what the level below had appended; none for level 0
    kept: int  # how many of them the level accepts
    text: list[int]  # the tokens from base on, after the step: the drafts kept, and the level's own
    positions: list[int]  # that have passed through each segment so far, the prompt's included
    seconds: float  # since the generation began


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    exits: Sequence[int] = (),
    windows: Sequence[int] = (),
    thresholds: Sequence[float] = (),
    temperature: float = 0.0,
    seed: int | None = None,
    stop: Iterable[int] = (),
    watch: Callable[[Event], None] | None = None,
    fast: "FixedStep | None" = None,
) -> Generation:
    """Continue `prompt` (token ids) by at most max_new_tokens tokens, exactly as the full model would.

    exits: depths in layers, ascending, each below the full depth; depth 0 looks drafts up in the text so far.
    windows[k]: how many tokens level k is asked for (it drafts or accepts them) before level k+1 verifies.
    thresholds[k], 0..1: level k stops short of that once the product of its own probabilities of the tokens it
    has gathered since it was asked falls below (at temperature 0 those of temperature 1); none given: never.
    Depth 0 never does. temperature 0 takes the likeliest token (argmax); above 0 it samples, reproducibly if a
    seed is given. Generation ends after the first token in `stop`, which is kept as the last one, or when prompt
    and new tokens fill the model's max_seq_len. watch, if given, is called with an Event after every step that
    chooses a token. fast, made for this model and these exits, takes the place of the plain `step`. Raises
    ValueError, before any work, for arguments out of range.
    """
    inputs = checked(model.config, prompt, max_new_tokens, exits, windows, thresholds, temperature, seed, stop)
    ladder = Ladder(model, *inputs, watch=watch, fast=fast)
    start = ladder.length
    ladder.propose(ladder.top, want=ladder.limit - start)
    tokens = ladder.tokens[start : ladder.length].tolist()
    ladder.stats[-1].proposed = ladder.stats[-1].accepted = len(tokens)
    return Generation(tokens, ladder.stats, time.perf_counter() - ladder.began)


class Ladder:
    """The state of one generation, and the recursion that advances it.

    `tokens[:length]` is the sequence so far: settled text, then drafts not yet seen by deeper levels.
    """

    def __init__(
        self,
        model: Llama,
        prompt: tuple[int, ...],
        max_new_tokens: int,
        exits: tuple[int, ...],
        windows: tuple[int, ...],
        thresholds: tuple[float, ...],
        temperature: float,
        seed: int | None,
        stop: frozenset[int],
        *,
        watch: Callable[[Event], None] | None = None,
        fast: "FixedStep | None" = None,
    ):
        self.began = time.perf_counter()
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        self.model, self.windows, self.temperature, self.stop, self.watch = model, windows, temperature, stop, watch
        self.depths = (*exits, model.config.n_layers)
        self.thresholds = (*thresholds, 0.0)  # the last level's word is final, however sure it is
        self.top = len(exits)  # the last level: the whole model
        self.stats = [LevelStats(depth) for depth in self.depths]
        self.limit = min(len(prompt) + max_new_tokens, model.config.max_seq_len)  # the sequence never gets longer
        if fast is None:
            blocks = tuple(exit for exit in exits if exit in model.blocks)
            self.step, self.cache = step, KVCache(model.config, exits, self.limit, device, dtype, blocks)
        else:
            self.step, self.cache = fast, fast.open(model, exits, self.limit)
        self.tokens = torch.zeros(self.limit + 1, dtype=torch.long, device=device)  # one more: a bonus past the limit
        self.tokens[: len(prompt)] = torch.as_tensor(prompt)
        self.length = len(prompt)
        self.known = list(prompt)  # tokens[:length] without the latest drafts, where the host can read them for free
        # probs[k]: level k's distributions, rows (V,), one for each token it has proposed and level k+1 not yet
        # judged. Accepted draft, correction or bonus: however it came about, the token is a sample of that row.
        self.probs: list[list[Tensor]] = [[] for _ in self.depths]
        self.rng = torch.Generator(device)
        if seed is None:
            self.rng.seed()
        else:
            self.rng.manual_seed(seed)

    def propose(self, k: int, want: int) -> None:
        """Append at least `want` tokens that level k accepts, or fewer: at the end of the text, or if in doubt."""
        if self.depths[k] == 0:
            return self.draft_by_look_up(want)
        goal, sure = self.length + want, 1.0  # sure: level k's own probability of what it has appended so far
        while self.length < min(goal, self.limit) and sure >= self.thresholds[k]:
            base = self.length  # the token before it is level k's latest, and level k has not run it yet
            if k > 0:
                self.propose(k - 1, min(self.windows[k - 1], goal - base))  # drafts from the level below
            logits = self.predict(k, rows=self.length - base + 1)
            sure *= self.verify(k, base, logits)

    def predict(self, k: int, rows: int) -> Tensor:
        """Run level k on all it has not seen; return its logits (rows, V) at the last `rows` positions.

        The logits at position i predict token i+1, so the rows for the drafts from `base` on begin at base-1.
        """
        self.stats[k].calls += 1
        for j in range(k + 1):
            self.stats[j].positions += self.length - self.cache.lengths[j]
        return self.step(self.model, self.cache, self.depths, self.tokens, self.length, k, rows)

    def verify(self, k: int, base: int, logits: Tensor) -> float:
        """Keep the drafts tokens[base:length] as far as level k agrees, then add level k's own next token.

        Returns level k's probability of these tokens, or 1 if no threshold asks for it.

        logits (n+1, V) predict the n drafts and the token after them, so a correction after a rejection
        and a bonus after a full match are the same thing: the first token the drafts do not supply.
        """
        drafts = self.tokens[base : self.length]  # (n,), none for level 0
        judged = drafts.tolist() if self.watch else []  # before the level's own tokens overwrite them
        if self.temperature == 0:
            choice, accepted = verify_greedy(drafts, logits)
        else:
            p = probabilities(logits, self.temperature)  # (n+1, V)
            q = torch.cat([p[:0], *(self.probs[k - 1] if k > 0 else ())])  # (n, V) what each draft was drawn from
            choice, accepted = verify_sampled(drafts, q, p, self.rng)
        self.tokens[base : self.length + 1] = choice  # what follows the first new token is left over, beyond length
        if k == 0 and self.top > 0:
            kept = 0  # drafting: nothing was judged, so there is nothing for the host to read
        else:
            kept, *new = torch.cat([accepted.view(1), choice]).tolist()  # the one host read of a verification
            self.known[base:] = new[: kept + 1]
            if k == self.top:
                self._end_at_stop(base, new[: kept + 1])
        if k > 0:
            self.stats[k - 1].proposed += len(drafts)
            self.stats[k - 1].accepted += kept
            self.probs[k - 1].clear()
        self.length = min(base + kept + 1, self.limit)
        if self.temperature > 0 and k < self.top:
            self.probs[k].append(p[: self.length - base])
        self.cache.rollback(min(base + kept, self.length))  # the new token's position has not been run with it
        if self.watch:
            text, positions = self.tokens[base : self.length].tolist(), [stats.positions for stats in self.stats]
            self.watch(Event(k, base, judged, kept, text, positions, time.perf_counter() - self.began))
        if self.thresholds[k] == 0:
            return 1.0
        rows = probabilities(logits[: kept + 1], self.temperature or 1.0)
        return rows.gather(1, choice[: kept + 1, None]).prod().item()

    def draft_by_look_up(self, want: int) -> None:
        """Append up to `want` tokens that followed the latest two where those last occurred (prompt lookup)."""
        drafts = look_up(self.known, min(want, self.limit - self.length))
        self.stats[0].calls += 1
        new = torch.tensor(drafts, dtype=torch.long, device=self.tokens.device)
        self.tokens[self.length : self.length + len(drafts)] = new
        self.length += len(drafts)
        if self.temperature > 0:  # it was sure of each of them
            self.probs[0].append(torch.nn.functional.one_hot(new, self.model.config.vocab_size).double())

    def _end_at_stop(self, base: int, new: list[int]) -> None:
        for i, token in enumerate(new):
            if token in self.stop:
                self.limit = min(self.limit, base + i + 1)  # the stop may itself lie beyond the limit
                return


def step(
    model: Llama, cache: KVCache, depths: tuple[int, ...], tokens: Tensor, length: int, k: int, rows: int
) -> Tensor:
    """Run segments 0..k over every position < length that each has not processed.

    Returns level k's logits (rows, V) at positions length-rows .. length-1.
    """
    above = 0
    for j, depth in enumerate(depths[: k + 1]):
        for first, last in cache.pending(j, length):
            if j == 0:
                h = model.embed(tokens[None, first:last])  # (1, N, D)
            else:
                h = cache.hidden[j - 1, :, first:last]  # (1, N, D), as the level below left them
            h = cache.hidden[j, :, first:last] = model.run(h, above, depth, first, cache)
            cache.read[:, first:last] = model.read(h, depth, first, cache)
        cache.lengths[j] = length
        above = depth
    # level k had run none of these rows: base-1 is the position of its own latest token
    return model.logits(cache.read[0, length - rows : length], depths[k])


def look_up(text: Sequence[int], want: int) -> list[int]:
    """The `want` tokens that followed the last two of `text` where these two last occurred before; else none.

    Where the copy reaches the end of the text it goes on with its own beginning, as a text in a loop would.
    """
    for i in range(len(text) - 1, 1, -1):
        if text[i - 1] == text[-1] and text[i - 2] == text[-2]:
            return [text[i + j % (len(text) - i)] for j in range(want)]
    return []


def verify_greedy(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the level itself would write (n+1,), and how many drafts (n,) agree before the first that does not."""
    choice = logits.argmax(dim=-1)
    return choice, leading(choice[:-1] == drafts)


def verify_sampled(drafts: Tensor, q: Tensor, p: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Speculative sampling (arXiv 2211.17192, Algorithm 1): the tokens kept are distributed as p.

    drafts (n,) were drawn from the rows of q (n, V); p (n+1, V) is the level's own. Draft x is accepted
    with probability min(1, p(x) / q(x)); the first rejected one is replaced by a draw from the positive
    part of p - q. After a full match there is no q to subtract and the bonus is a draw from p. Returns
    (n+1,) tokens, of which those up to the replacement or bonus count, and the number accepted.
    """
    x = drafts.unsqueeze(1)  # (n, 1)
    accepted = leading(coin((p[:-1].gather(1, x) / q.gather(1, x)).squeeze(1), rng))
    residual = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]])  # (n+1, V), unnormalised
    at = accepted.view(1)  # indexing by a tensor of one element, where a plain number would need a host read
    token = draw(residual.index_select(0, at).squeeze(0), rng)
    return torch.cat([drafts, drafts.new_zeros(1)]).scatter(0, at, token.view(1)), accepted


def leading(agree: Tensor) -> Tensor:
    """How many values of agree (n,) are true before the first false one, as a 0-d tensor."""
    return agree.long().cumprod(dim=0).sum()


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) in float64; however small the temperature, nothing overflows."""
    logits = logits.double()
    return torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def coin(prob: Tensor, rng: torch.Generator) -> Tensor:
    """True with probability prob (n,); at 1 and above always."""
    return torch.rand(prob.shape, dtype=prob.dtype, device=prob.device, generator=rng) < prob


def draw(weights: Tensor, rng: torch.Generator) -> Tensor:
    """A token (0-d) drawn in proportion to weights (V,): the first of V exponential clocks to ring.

    Unlike torch.multinomial it checks nothing, and so needs no host read.
    """
    return (weights / torch.empty_like(weights).exponential_(generator=rng)).argmax()


def checked(config: Config, prompt, max_new_tokens, exits, windows, thresholds, temperature, seed, stop) -> tuple:
    """The arguments of `generate` as plain ints, floats and tuples; ValueError with what is wrong and allowed."""
    V, L, T = config.vocab_size, config.n_layers, config.max_seq_len
    prompt, stop = whole_numbers(prompt, "prompt"), whole_numbers(stop, "stop")
    exits, windows = whole_numbers(exits, "exits"), whole_numbers(windows, "windows")
    (max_new_tokens,) = whole_numbers([max_new_tokens], "max_new_tokens")
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token")
    if len(prompt) >= T:
        raise ValueError(f"the prompt has {len(prompt)} tokens, which leaves no room in the model's context of {T}")
    for name, tokens in (("prompt", prompt), ("stop", stop)):
        if outside := [token for token in tokens if not 0 <= token < V]:
            raise ValueError(f"{name} holds token id {outside[0]}, outside the vocabulary 0..{V - 1}")
    if not 0 <= max_new_tokens <= T:
        raise ValueError(f"max_new_tokens must be between 0 and the model's context of {T}, got {max_new_tokens}")
    if any(not below < exit < L for below, exit in zip((-1, *exits), exits, strict=False)):
        raise ValueError(f"exits must ascend strictly within 0..{L - 1}, got {exits}")
    if len(windows) != len(exits):
        raise ValueError(f"windows needs one length for each of the {len(exits)} exits, got {windows}")
    if any(window < 1 for window in windows):
        raise ValueError(f"windows must be at least 1 each, got {windows}")
    thresholds = tuple(thresholds) or (0.0,) * len(exits)
    if len(thresholds) != len(exits):
        raise ValueError(f"thresholds needs one probability for each of the {len(exits)} exits, got {thresholds}")
    if any(not isinstance(t, numbers.Real) or not 0 <= t <= 1 for t in thresholds):  # type: ignore[operator]
        raise ValueError(f"thresholds must be probabilities, 0 to 1, got {thresholds}")
    if not isinstance(temperature, numbers.Real) or not 0 <= temperature <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if seed is not None:
        (seed,) = whole_numbers([seed], "seed")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be None or a whole number in 0..2**63-1, got {seed}")
    thresholds = tuple(map(float, thresholds))
    return prompt, max_new_tokens, exits, windows, thresholds, float(temperature), seed, frozenset(stop)


def whole_numbers(values: Iterable[int], name: str) -> tuple[int, ...]:
    """values as ints; ValueError if they are not whole numbers."""
    try:
        return tuple(int(operator.index(value)) for value in values)
    except TypeError:
        raise ValueError(f"{name} takes whole numbers, got {values!r}") from None
