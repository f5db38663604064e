"""The options of `hispec.generate`, checked before any work is done, and what it returns."""

import math
import numbers
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model import Config

REAL: Any = numbers.Real  # floats, ints, fractions, numpy's


@dataclass(frozen=True)
class Options:
    """How `generate` decodes. Raises ValueError that says what is wrong and what is allowed."""

    exits: tuple[int, ...] = ()  # depths in layers, ascending; at depth 0 the drafter drafts
    # [k]: tokens asked of level k before level k+1 verifies them; a level that verifies drafts adds
    # a token of its own, so it may write one more
    windows: tuple[int, ...] = ()
    # [k]: level k stops early once the product of its own probabilities of the tokens it gathered
    # is below this (at temperature 0 they are computed as at temperature 1). Empty: never.
    thresholds: tuple[float, ...] = ()
    draft_head: int = 0  # at depth 0, the draft head on this exit drafts; 0: the drafter does
    temperature: float = 0.0  # 0: take the likeliest token; above 0: draw tokens, as follows
    top_k: int = 0  # draw from this many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # and of these, from the fewest that hold this share of the probability
    seed: int | None = None  # for the random numbers; None: another text each time
    stop: frozenset[int] = frozenset()  # token ids; the text ends after the first new one

    def __post_init__(self):
        for name, kind in (("exits", tuple), ("windows", tuple), ("stop", frozenset)):
            object.__setattr__(self, name, kind(whole_numbers(getattr(self, name), name)))
        object.__setattr__(self, "thresholds", self._checked_thresholds())
        if any(not below < exit for below, exit in zip((-1, *self.exits), self.exits)):
            raise ValueError(f"exits must ascend strictly from 0 on, got {self.exits}")
        if len(self.windows) != len(self.exits):
            raise ValueError(
                f"windows needs one length for each of the {len(self.exits)} exits, "
                f"got {self.windows}"
            )
        if any(window < 1 for window in self.windows):
            raise ValueError(f"windows must be at least 1 each, got {self.windows}")
        if whole_number(self.draft_head, "draft_head") and self.exits[:1] != (0,):
            raise ValueError(f"a draft head drafts at depth 0, got exits {self.exits}")
        if not isinstance(self.temperature, REAL) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be a finite number of at least 0, got {self.temperature}"
            )
        if whole_number(self.top_k, "top_k") < 0:
            raise ValueError(f"top_k must be a number of tokens, or 0 for all, got {self.top_k}")
        if not isinstance(self.top_p, REAL) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a probability above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= whole_number(self.seed, "seed") < 2**63:
            raise ValueError(f"seed must be None or a whole number in 0..2**63-1, got {self.seed}")

    def _checked_thresholds(self) -> tuple[float, ...]:
        if not isinstance(self.thresholds, Iterable):
            raise ValueError(f"thresholds must be a list of probabilities, got {self.thresholds!r}")
        thresholds = tuple(self.thresholds) or (0.0,) * len(self.exits)
        if len(thresholds) != len(self.exits):
            raise ValueError(
                f"thresholds needs one probability for each of the {len(self.exits)} exits, "
                f"got {thresholds}"
            )
        if any(not isinstance(t, REAL) or not 0 <= t <= 1 for t in thresholds):
            raise ValueError(f"thresholds must be probabilities, 0 to 1, got {thresholds}")
        return tuple(map(float, thresholds))

    def check_model(self, config: Config, draft_heads: Sequence[int] = ()) -> None:
        """ValueError unless the model has these exits, stop tokens and draft head."""
        if self.draft_head:
            reads = (*self.exits, config.n_layers)[1]
            if self.draft_head != reads or reads not in draft_heads:
                raise ValueError(
                    f"the draft head must read the level above it, exit {reads}, and the model has "
                    f"draft heads on exits {tuple(draft_heads)}; got draft_head={self.draft_head}"
                )
        if self.exits and self.exits[-1] >= config.n_layers:
            raise ValueError(
                f"exits must ascend strictly within 0..{config.n_layers - 1}, got {self.exits}"
            )
        check_tokens(config, self.stop, "stop")

    def distribution(self, logits: Tensor) -> Tensor:
        """The distribution (..., V) that a level draws from: softmax of logits / temperature.

        It is cut to the top_k likeliest tokens, then to the fewest that hold top_p of the remaining
        probability. Tokens as likely as the last one kept are kept, too. At temperature 0 it is the
        distribution of temperature 1. Its dtype is that of `precise`.
        """
        logits = logits.to(precise(logits.device))
        gap = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: nothing overflows
        p = torch.softmax(gap / (float(self.temperature) or 1.0), dim=-1)
        if 0 < self.top_k < p.shape[-1]:
            p = p * (p >= p.topk(self.top_k).values[..., -1:])
            p = p / p.sum(-1, keepdim=True)
        if self.top_p < 1:
            falling = p.sort(descending=True).values
            kept = (falling.cumsum(-1) - falling < self.top_p).sum(-1, keepdim=True)
            p = p * (p >= falling.gather(-1, kept - 1))
            p = p / p.sum(-1, keepdim=True)
        return p


def precise(device: torch.device) -> torch.dtype:
    """The dtype of distributions: float64, or float32 on Apple's GPUs, which lack float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def checked_prompt(config: Config, prompt, max_new_tokens) -> tuple[list[int], int]:
    """The prompt's token ids, and the text's greatest length. ValueError if either is wrong."""
    T = config.max_seq_len
    prompt = list(whole_numbers(prompt, "prompt"))
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token")
    if len(prompt) >= T:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens: no room is left in the model's context of {T}"
        )
    check_tokens(config, prompt, "prompt")
    if not 0 <= (new := whole_number(max_new_tokens, "max_new_tokens")) <= T:
        raise ValueError(
            f"max_new_tokens must be between 0 and the model's context of {T}, got {new}"
        )
    return prompt, min(len(prompt) + new, T)


def check_tokens(config: Config, tokens: Iterable[int], name: str) -> None:
    """ValueError unless all of these are token ids in the model's vocabulary."""
    V = config.vocab_size
    if outside := [token for token in whole_numbers(tokens, name) if not 0 <= token < V]:
        raise ValueError(f"{name} holds token id {outside[0]}, outside the vocabulary 0..{V - 1}")


def whole_number(value: Any, name: str) -> int:
    """value as an int. ValueError if it is not a whole number."""
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(f"{name} takes a whole number, got {value!r}") from None


def whole_numbers(values: Iterable[int], name: str) -> tuple[int, ...]:
    """values as ints. ValueError if they are not a list of whole numbers."""
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} takes a list of whole numbers, got {values!r}")
    try:
        return tuple(int(operator.index(value)) for value in values)
    except TypeError:
        raise ValueError(f"{name} takes whole numbers, got {values!r}") from None


# ---- what generate returns ----------------------------------------------------------------------


@dataclass
class LevelStats:
    """What one level did in one generation."""

    exit: int  # the level's depth in layers
    calls: int = 0  # steps: drafts of the first level, verifications of the others
    proposed: int = 0  # tokens it handed to the level above; last level: tokens it generated
    accepted: int = 0  # how many of those the level above kept and wrote; last level: all
    positions: int = 0  # positions that its segment processed; at depth 0: those it saw


@dataclass
class Generation:
    """The new tokens, one LevelStats per level, shallow to deep, and wall-clock seconds."""

    tokens: list[int]
    levels: list[LevelStats] = field(repr=False)
    seconds: float
    prefill_seconds: float = 0.0  # of these, up to the first token, which follows the prompt


@dataclass(frozen=True)
class Event:
    """One step of one level, as `watch` receives it: drafts were judged and a token was added.

    At depth 0 the step is a drafter's: nothing is judged, and several tokens, or none, are added.
    """

    level: int  # 0 is the shallowest
    base: int  # position of the first draft, counted from the prompt's first token
    drafts: list[int]  # what the level below had appended; none for level 0
    kept: int  # how many of them the level accepts
    text: list[int]  # from base on, after the step: kept drafts, then its own, up to the end
    positions: list[int]  # how many each segment has processed so far, including the prompt's
    seconds: float  # since the generation began


# ---- a ladder as text ---------------------------------------------------------------------------


def ladder_text(exits, windows, thresholds=(), draft_head=0) -> str:
    """For example 2(4 <0.3) 8(6): exit 2, window 4, threshold 0.3; then exit 8, window 6.

    8'(3) 8(6): at depth 0 the draft head on exit 8 drafts; 0(3) 8(6): the drafter does.
    """
    names = [f"{draft_head}'" if draft_head and exit == 0 else str(exit) for exit in exits]
    levels = zip(names, windows, thresholds or [0.0] * len(exits), strict=True)
    return " ".join(f"{e}({w} <{t:g})" if t else f"{e}({w})" for e, w, t in levels)


def parse_ladder(text: str) -> Options:
    """The options of a ladder in the notation of `ladder_text`. ValueError if it is not one."""
    level = r"\s*(\d+)\s*\(\s*(\d+)\s*(?:<\s*(\d*\.?\d+)\s*)?\)\s*"
    head = re.match(r"\s*(\d+)'", text)
    text_of_exits = re.sub(r"^\s*\d+'", "0", text)
    if not re.fullmatch(f"(?:{level})+", text_of_exits):
        raise ValueError(
            f'a ladder is written as "2(2 <0.2) 8(4)": exit(window), or exit(window <threshold), '
            f"shallow to deep; got {text!r}"
        )
    exits, windows, thresholds = zip(*re.findall(level, text_of_exits))
    return Options(
        tuple(map(int, exits)), tuple(map(int, windows)), tuple(float(t or 0) for t in thresholds),
        draft_head=int(head[1]) if head else 0,
    )  # fmt: skip
