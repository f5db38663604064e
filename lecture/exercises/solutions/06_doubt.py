"""Compare the two best tokens: how much less likely is the level's second choice?

If two tokens share most of the probability, the next level may well take the other one. A token of
probability .5 is safe if the rest is spread over a thousand others.
"""


def certainty(best, second, entropy) -> float:
    return 1 - second / best
