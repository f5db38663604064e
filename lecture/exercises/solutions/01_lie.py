"""Only the last level decides which tokens are written; the others decide how soon.

Level 1 is a middle level only if it is not the last: `exits=(8,)` has no middle level.
"""

from hispec import Decoder


class Liar(Decoder):
    def run(self, k: int, base: int):
        logits = super().run(k, base)
        return -logits if 0 < k < self.top else logits
