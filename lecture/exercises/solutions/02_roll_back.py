"""No segment may be longer than the text that is kept; one that is shorter stays as it is.

`base + n` counts the drafts that are kept. The token behind them is the level's own: it has been
written, and no layer has read it yet. A length of `base + n + 1` would claim that one had: the
token's keys would be those of the draft it corrects, or, after a full match, nobody's.
"""

from kvcache import KVCache


class Cache(KVCache):
    def rollback(self, length: int) -> None:
        self.lengths = [min(processed, length) for processed in self.lengths]
