"""How varied a generated text is: texts that go round in circles are easy to draft.

Texts are rows of token ids, without the prompt. Next to a speed-up, the two figures tell whether
the method is fast or the text is dull.
"""

from collections.abc import Sequence


def distinct(tokens: Sequence[int], n: int = 64) -> int:
    """How many different tokens there are among the first n."""
    return len(set(tokens[:n]))


def looping(tokens: Sequence[int]) -> float:
    """The share of tokens that `looped` finds in repetitions of eight or more tokens."""
    return len(looped(tokens, 8)) / len(tokens) if tokens else 0.0


def looped(tokens: Sequence[int], n: int) -> set[int]:
    """The positions of repeated tokens: n or more that directly follow the very same tokens.

    Loops shorter than n tokens count too, since several rounds of them make n tokens or more. The
    first round does not count: of one token repeated, all but the first n are in a loop.
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
