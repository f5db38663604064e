"""The cache keeps what the text still shares with the last draft: `rollback(decoder.unchanged)`.

So each position is read once, or once more if its token was rejected. A draft's last token is not
read when it is drafted, since nothing is predicted from it; if it is kept, the next draft reads it.

A drafted token costs a pass of the small model, with its launch and its work on the host. If that
is a quarter of a large pass, four drafted tokens cost one large pass, and if all are kept, 5 tokens
are written at the cost of 2 passes.
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
