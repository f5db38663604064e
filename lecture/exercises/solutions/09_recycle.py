"""The level's choices are noted whether the drafts are kept or not.

`tolist` is a host read, which waits for the GPU. It can be avoided: keep the notes in a tensor with
one entry for each token of the vocabulary, which the drafter follows on the device.
"""

from drafters import LookUp
from hispec import Decoder


class Remembering(Decoder):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes: dict[int, int] = {}

    def read_prompt(self):
        super().read_prompt()
        depth = self.depths[1]
        if depth in self.cache.hidden:
            logits = self.step.logits(self.cache.hidden[depth][0, : self.start], depth)
            self.note(self.tokens[: self.start], logits)

    def judge(self, k, base, q, logits):
        self.note(self.tokens[base - 1 : self.length], logits)
        return super().judge(k, base, q, logits)

    def note(self, tokens, logits):
        self.notes.update(zip(tokens.tolist(), logits.argmax(-1).tolist(), strict=True))


class Recycled(LookUp):
    def draft(self, decoder, want):
        drafts, last = super().draft(decoder, want)[0], decoder.text[-1]
        if not self.places.get(tuple(decoder.text[-2:])):
            drafts = []
            while len(drafts) < want and last in decoder.notes:
                last = decoder.notes[last]
                drafts.append(last)
        return drafts, None
