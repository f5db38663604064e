"""Exercise 5, forty minutes: predict the best windows, from the table that this prints alone.

python lecture/exercises/05_window.py

(a) A single exit drafts n tokens, each right with probability a independently of the others. Then
one full verification writes one token more than it keeps. What does a written token cost on
average?
(b) HiSpec: a round consists of n_d drafts and one step of the middle level, which writes one
token more than it keeps. A draft is right with probability alpha. Rounds follow until at least n_i
tokens are gathered. Then the full model verifies them: each is right with probability beta, and
again one token more is written than is kept. What does a written token cost now? Derive it, or
simulate 20000 verifications with a fixed seed.
(c) Which windows are best by these two formulas?
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Milliseconds taken by steps, and how often levels agree."""

    draft: float  # a step of the draft exit, over one position
    middle: float  # a step of the middle level, over a draft and one more token
    full: float  # a verification by the full model, of eight positions
    greedy: float  # a full pass over one position
    alpha: float  # how often the draft and the middle level choose the same token
    beta: float  # how often the middle level and the full model do


# `tiny`, exits 2 and 8 of 32, one thread of an AMD EPYC, from recorded.json
TABLE = Table(draft=0.91, middle=3.02, full=9.34, greedy=9.32, alpha=0.53, beta=0.86)


def single_layer(a: float, draft: float, full: float, n: int) -> float:
    """Milliseconds per written token: n drafts at `draft` each, one verification at `full`."""
    return draft + full / n  # your turn (a): this assumes that every draft is right


def hispec(t: Table, n_d: int, n_i: int) -> float:
    """Milliseconds per written token, for HiSpec."""
    return t.draft + t.middle / n_d + t.full / n_i  # your turn (b): this assumes the same


def best_single_layer(a: float, draft: float, full: float) -> int:
    """The window, 1..24, at which a token costs least."""
    return 4  # your turn (c)


def best_hispec(t: Table) -> tuple[int, int]:
    """The windows, n_d in 1..6 and n_i in n_d..16, at which a token costs least."""
    return 2, 4  # your turn (c)


def main() -> None:
    for name, value in vars(TABLE).items():
        print(f"{name:8} {value}")
    n = best_single_layer(TABLE.beta, TABLE.middle, TABLE.full)
    ms = single_layer(TABLE.beta, TABLE.middle, TABLE.full, n)
    print(f"the middle level alone, window {n}: {ms:.2f} ms a token, {TABLE.greedy / ms:.2f}x")
    n_d, n_i = best_hispec(TABLE)
    ms = hispec(TABLE, n_d, n_i)
    print(f"HiSpec, windows {n_d} and {n_i}: {ms:.2f} ms a token, {TABLE.greedy / ms:.2f}x")


if __name__ == "__main__":
    main()
