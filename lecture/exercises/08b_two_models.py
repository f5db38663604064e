"""Exercise 8b, twenty minutes: a second, smaller model drafts.

python lecture/exercises/08b_two_models.py

Speculation is older than early exits: a small model drafts, a large one checks (arXiv 2211.17192).
At depth 0 of a ladder you can put any drafter: an object with `draft(decoder, want)`, as
drafters.py says. Here it is a second Llama with the same vocabulary and its own cache.

(a) `draft`: draft one token after another, each from the small model's last logits. The stub drafts
one token and stops.
(b) The cache still holds the previous draft. The first `decoder.unchanged` tokens of the text are
as they were then; the tokens after them may differ. How must the cache be rolled back, so that the
small model reads each token once and keeps none that was rejected?

When would this be slower than greedy decoding, however often the drafts are right?
"""

from common import random_model

from hispec import Step, generate
from model import Llama


class SmallModel:
    """Drafts with a second model."""

    def __init__(self, model: Llama):
        self.step, self.read = Step(model), 0  # read: positions that it has processed

    def draft(self, decoder, want: int):
        """At most `want` tokens (n,), and the distributions (n, V) they were drawn from, or None.

        The text is decoder.tokens[: decoder.length]. `self.step.run(cache, tokens, length, 0, 1)`
        reads those of tokens[:length] that the cache does not hold yet, and returns the logits at
        the last one. `decoder.choose(logits)` returns a token and the distribution it was drawn
        from.
        """
        if decoder.unchanged == 0:  # a new generation
            self.opened = self.step.open((), decoder.end + want)
            self.cache = self.opened.__enter__()
        self.cache.rollback(0)  # your turn (b): this reads the whole text again each time
        tokens, length = decoder.tokens.clone(), decoder.length
        self.read += length - self.cache.lengths[0]
        token, q = decoder.choose(self.step.run(self.cache, tokens, length, 0, 1))
        return token, q  # your turn (a): go on from tokens that end in this one


def main() -> None:
    large = random_model(3, n_layers=8)
    plain = generate(large, [1, 2, 3], 40)
    for name, small in (("its twin", large), ("a stranger", random_model(7, n_layers=2))):
        drafter = SmallModel(small)
        out = generate(large, [1, 2, 3], 40, exits=(0,), windows=(4,), drafter=drafter)
        drafts, passes = out.levels
        print(
            f"{name} drafts: kept {drafts.accepted} of {drafts.proposed}, {passes.calls} full "
            f"passes for 40 tokens, {drafter.read} positions read, "
            f"same text: {out.tokens == plain.tokens}"
        )


if __name__ == "__main__":
    main()
