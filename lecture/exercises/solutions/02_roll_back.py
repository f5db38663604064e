"""No segment may be longer than the text that is kept; a shorter one stays as it is.

`base + n` includes the drafts that are kept. The token after them is the level's own, which no
layer has run yet. A length of `base + n + 1` would claim that its keys are there. But in its slot
are the keys of the draft that it corrects, or, after a full match, none.
"""

from kvcache import KVCache


class Cache(KVCache):
    def rollback(self, length: int) -> None:
        self.lengths = [min(processed, length) for processed in self.lengths]
