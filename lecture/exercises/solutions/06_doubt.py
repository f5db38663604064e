"""The runner-up against the best: how much worse the level's second choice is.

Where two tokens share what probability there is, the next level may well take the other one. A
token of probability .5 is safe if the rest is spread over a thousand.
"""


def certainty(best, second, entropy) -> float:
    return 1 - second / best
