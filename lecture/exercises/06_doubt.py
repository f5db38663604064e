"""Exercise 6, thirty minutes: doubt better.

python lecture/exercises/06_doubt.py

A level stops short of its window once the product of its own probabilities, of what it has gathered
since it was asked, falls below its threshold. Is another measure of certainty a better sign that
the next level will disagree? Entropy, the gap between the two best, a power of either?

`certainty` is a factor for each token gathered; the product of factors is compared with the
threshold. Ladders are replayed on what record.py has recorded of `tiny`, each rule with its best
windows and thresholds, so that it takes seconds and no luck. Beat the rule of the stub.

What may the rule look at, so that sampling stays exact? All that stands before the next token. The
token just written may end the draft, but may not be dropped for being what it is.
"""

from itertools import product

from common import as_trace, recorded

from checkpoints.ladders import Ladder
from lab.costs import replay

LADDERS: list[Ladder] = [
    ((2, 8), windows, thresholds)
    for windows in ((3, 4), (3, 8), (8, 8), (8, 16))
    for thresholds in product((0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9), repeat=2)
]


def certainty(best: float, second: float, entropy: float) -> float:
    """How sure a level is of its token, 0..1, from its two best probabilities and the entropy.

    The entropy is that of its distribution in nats, 0 where it is certain.
    """
    return best  # your turn


def speed_up(rule) -> tuple[float, Ladder]:
    """Over greedy, with the best of LADDERS under this rule; and which that is."""
    found = recorded()
    traces = [as_trace(one, rule) for one in found["traces"]]

    def seconds(ladder: Ladder) -> float:
        each = (replay(t, ladder, found["costs"], found["n_layers"]) for t in traces)
        return sum(each) + sum(t.prefill for t in traces)

    took = {ladder: seconds(ladder) for ladder in LADDERS}
    fastest = min(took, key=took.__getitem__)
    return seconds(((), (), ())) / took[fastest], fastest


def main() -> None:
    for name, rule in (("product of probabilities", lambda b, s, e: b), ("yours", certainty)):
        gain, (_, windows, thresholds) = speed_up(rule)
        print(f"{name}: {gain:.3f}x with windows {windows}, thresholds {thresholds}")


if __name__ == "__main__":
    main()
