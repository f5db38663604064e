"""The cache keeps what the text still shares with the last draft: `rollback(decoder.unchanged)`.

A position is so read once, or once more where its token was rejected. The last draft is never read:
nothing stood behind it. It is read with the next one, if it was kept.

A draft costs the small model's pass, its launch and its share of the host. Where that is a quarter
of a large pass, four drafts cost one pass, and 4 drafts all kept write 5 tokens for 2 passes.
"""

import torch

from hispec import Step


class SmallModel:
    def __init__(self, model):
        self.step, self.read = Step(model), 0

    def draft(self, decoder, want: int):
        if decoder.unchanged == 0:
            self.opened = self.step.open((), decoder.end + want)
            self.cache = self.opened.__enter__()
        self.cache.rollback(decoder.unchanged)
        tokens, first, qs = decoder.tokens.clone(), decoder.length, []
        for i in range(first, first + want):
            self.read += i - self.cache.lengths[0]
            tokens[i : i + 1], q = decoder.choose(self.step.run(self.cache, tokens, i, 0, 1))
            qs.append(q)
        return tokens[first : first + want], None if qs[0] is None else torch.cat(qs)
