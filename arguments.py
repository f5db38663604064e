"""What `hispec.generate` takes, checked before any work is done, and what it returns."""

import numbers
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model import Config

REAL: Any = numbers.Real  # floats, ints, fractions, numpy's


@dataclass
class LevelStats:
    """What one level did in one generation."""

    exit: int  # depth in layers at which the level is read
    calls: int = 0  # steps of this level: drafts for the first, verifications for the others
    proposed: int = 0  # tokens it handed to the level above; last level: tokens it generated
    accepted: int = 0  # how many of those the level above kept and wrote; last level: all
    positions: int = 0  # that passed through its segment, or would have: a look-up has no layers


@dataclass
class Generation:
    """The new tokens, one LevelStats a level, shallow to deep, and wall-clock seconds."""

    tokens: list[int]
    levels: list[LevelStats] = field(repr=False)
    seconds: float
    prefill_seconds: float = 0.0  # of these, until the prompt was read and the first token written


@dataclass(frozen=True)
class Event:
    """One step of one level, as `watch` is told: drafts judged, a token of its own added."""

    level: int  # 0 is the shallowest
    base: int  # position of the first draft, counted from the prompt's first token
    drafts: list[int]  # what the level below had appended; none for level 0
    kept: int  # how many of them the level accepts
    text: list[int]  # from base on, after the step: kept drafts, the level's own, up to the end
    positions: list[int]  # that have passed through each segment so far, the prompt's included
    seconds: float  # since the generation began


@dataclass(frozen=True)
class Arguments:
    """The arguments of `generate`, in range and as plain numbers."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    exits: tuple[int, ...]
    windows: tuple[int, ...]
    thresholds: tuple[float, ...]
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: frozenset[int]

    def law(self, logits: Tensor) -> Tensor:
        """Distributions (..., V) in float64: softmax of logits / temperature (at temperature 0: 1).

        They are cut to the top_k likeliest tokens, then to the fewest that hold top_p of what is
        left. Ties with the last one kept are kept.
        """
        logits = logits.double()
        gap = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: nothing overflows
        # division by a number is a product with its reciprocal, and that of 1e-309 is infinite
        p = torch.softmax(gap / max(self.temperature or 1.0, 1e-300), dim=-1)
        if 0 < self.top_k < p.shape[-1]:
            p = p * (p >= p.topk(self.top_k).values[..., -1:])
            p = p / p.sum(-1, keepdim=True)
        if self.top_p < 1:
            falling = p.sort(descending=True).values
            kept = (falling.cumsum(-1) - falling < self.top_p).sum(-1, keepdim=True)
            p = p * (p >= falling.gather(-1, kept - 1))
            p = p / p.sum(-1, keepdim=True)
        return p


def checked(
    config: Config,
    prompt,
    max_new_tokens,
    exits,
    windows,
    thresholds,
    temperature,
    top_k,
    top_p,
    seed,
    stop,
) -> Arguments:
    """The arguments of `generate`; ValueError with what is wrong and what is allowed."""
    V, T = config.vocab_size, config.max_seq_len
    prompt, stop = whole_numbers(prompt, "prompt"), whole_numbers(stop, "stop")
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token")
    if len(prompt) >= T:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens: no room is left in the model's context of {T}"
        )
    for name, tokens in (("prompt", prompt), ("stop", stop)):
        if outside := [token for token in tokens if not 0 <= token < V]:
            raise ValueError(
                f"{name} holds token id {outside[0]}, outside the vocabulary 0..{V - 1}"
            )
    (new,) = whole_numbers([max_new_tokens], "max_new_tokens")
    if not 0 <= new <= T:
        raise ValueError(
            f"max_new_tokens must be between 0 and the model's context of {T}, got {new}"
        )
    ladder = checked_ladder(config.n_layers, exits, windows, thresholds)
    temperature, top_k, top_p, seed = checked_sampling(temperature, top_k, top_p, seed)
    return Arguments(prompt, new, *ladder, temperature, top_k, top_p, seed, frozenset(stop))


def checked_sampling(temperature, top_k, top_p, seed) -> tuple[float, int, float, int | None]:
    """What says how tokens are drawn; ValueError for what is out of range."""
    if not isinstance(temperature, REAL) or not 0 <= temperature <= sys.float_info.max:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    (top_k,) = whole_numbers([top_k], "top_k")
    if top_k < 0:
        raise ValueError(f"top_k must be a number of tokens, or 0 for all, got {top_k}")
    if not isinstance(top_p, REAL) or not (0 < top_p <= 1 and float(top_p)):
        raise ValueError(f"top_p must be a probability above 0 and at most 1, got {top_p}")
    if seed is not None:
        (seed,) = whole_numbers([seed], "seed")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be None or a whole number in 0..2**63-1, got {seed}")
    return float(temperature), top_k, float(top_p), seed


def checked_ladder(
    n_layers: int, exits, windows, thresholds=()
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Exits, windows and thresholds (none given: all 0); ValueError if they make no ladder."""
    exits, windows = whole_numbers(exits, "exits"), whole_numbers(windows, "windows")
    if any(not below < exit < n_layers for below, exit in zip((-1, *exits), exits, strict=False)):
        raise ValueError(f"exits must ascend strictly within 0..{n_layers - 1}, got {exits}")
    if len(windows) != len(exits):
        raise ValueError(
            f"windows needs one length for each of the {len(exits)} exits, got {windows}"
        )
    if any(window < 1 for window in windows):
        raise ValueError(f"windows must be at least 1 each, got {windows}")
    try:
        thresholds = tuple(thresholds) or (0.0,) * len(exits)
    except TypeError:
        raise ValueError(
            f"thresholds must be a list of probabilities, got {thresholds!r}"
        ) from None
    if len(thresholds) != len(exits):
        raise ValueError(
            f"thresholds needs one probability for each of the {len(exits)} exits, got {thresholds}"
        )
    if any(not isinstance(t, REAL) or not 0 <= t <= 1 for t in thresholds):
        raise ValueError(f"thresholds must be probabilities, 0 to 1, got {thresholds}")
    return exits, windows, tuple(map(float, thresholds))


def whole_numbers(values: Iterable[int], name: str) -> tuple[int, ...]:
    """values as ints; ValueError if they are not whole numbers."""
    try:
        return tuple(int(operator.index(value)) for value in values)
    except TypeError:
        raise ValueError(f"{name} takes whole numbers, got {values!r}") from None
