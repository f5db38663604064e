"""Only the last level decides what is written: the others decide how soon.

Level 1 is the level between only where it is not the last: `exits=(8,)` has no level between.
"""

from hispec import Decoder


class Liar(Decoder):
    def run(self, k: int, base: int):
        logits = super().run(k, base)
        return -logits if 0 < k < self.top else logits
