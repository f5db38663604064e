"""How varied a generated text is: texts that go round in circles are easy to draft.

Texts are rows of token ids, without the prompt. Beside a speed-up, both figures say whether the
method is fast or the text is dull.
"""

from collections.abc import Sequence


def distinct(tokens: Sequence[int], n: int = 64) -> int:
    """How many different tokens there are among the first n."""
    return len(set(tokens[:n]))


def looping(tokens: Sequence[int]) -> float:
    """Share of tokens in repetitions of eight or more."""
    return len(looped(tokens, 8)) / len(tokens) if tokens else 0.0


def looped(tokens: Sequence[int], n: int) -> set[int]:
    """Where tokens repeat: n tokens or more that stand right after the very same tokens.

    Loops of fewer than n tokens count too, since several rounds of them are n tokens or more. The
    first round is none: of a row of one token, all but n are in a loop.
    """
    row: list[int] = list(tokens)
    inside: set[int] = set()
    for length in range(n, len(row) // 2 + 1):
        for start in range(length, len(row) - length + 1):
            if row[start] == row[start - length]:  # most starts end here
                end = start + length
                if row[start:end] == row[start - length : start]:
                    inside.update(range(start, end))
    return inside
