"""Exercise 6, thirty minutes: find a better sign of doubt.

python lecture/exercises/06_doubt.py

A level stops before its window is full once the product of its own probabilities of the tokens
gathered in this call falls below its threshold. Is there a better sign that the next level will
disagree? For example the entropy, the gap between the two best tokens, or a power of either?

`certainty` returns one factor for each gathered token, and the product of these factors is compared
with the threshold. Ladders are replayed on the texts of `tiny` that record.py recorded, with the
best windows and thresholds for each rule, so this takes seconds and involves no chance. Beat the
rule of the stub.

What may the rule look at, so that sampling stays exact? Everything before the next token. The token
just written may end the draft, but it must not be dropped because of which token it is.
"""

from itertools import product

from recordings import as_trace, recorded

from checkpoints.ladders import Ladder
from lab.costs import replay

LADDERS: list[Ladder] = [
    ((2, 8), windows, thresholds)
    for windows in ((3, 4), (3, 8), (8, 8), (8, 16))
    for thresholds in product((0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9), repeat=2)
]


def certainty(best: float, second: float, entropy: float) -> float:
    """How sure a level is of its token, 0..1, from its two best probabilities and the entropy.

    The entropy of its distribution is in nats, 0 if it is certain.
    """
    return best  # your turn


def speed_up(rule) -> tuple[float, Ladder]:
    """The speed-up over greedy of the best of LADDERS under this rule, and that ladder."""
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
