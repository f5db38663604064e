"""What drafts at depth 0, where no layer of the model runs.

A drafter is an object with one method,

    draft(decoder, want) -> (tokens, q)

It proposes at most `want` token ids that may follow `decoder.text`, a list, or a tensor on the
model's device; none is allowed. q (n, V) are the distributions that they were drawn from, or None
if they were not drawn: then all the probability is on them. `decoder.choose(logits)` draws a token
as the generation's options ask, and gives its distribution. The first `decoder.unchanged` tokens of
the text are as the drafter last saw or wrote them, 0 at the first call of a generation: so far a
cache of its own still holds.
"""

from collections import defaultdict
from collections.abc import Sequence

SUFFIX = 4  # tokens of the text's end that are looked for at most


class LookUp:
    """Drafts what followed the text's end where it stood before (prompt lookup).

    Of all places the one that shares most with the end counts, up to SUFFIX tokens, among equals
    the latest. An index of the places behind every run of tokens makes a draft take the same time
    however long the text is.
    """

    def __init__(self):
        self.text: list[int] = []  # as far as its places are in the index
        # places[run of 1 to SUFFIX tokens]: the lengths at which the text ended so, ascending
        self.places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def draft(self, decoder, want: int) -> tuple[list[int], None]:
        return self.look_up(decoder.text, decoder.unchanged, want), None

    def look_up(self, text: Sequence[int], unchanged: int, want: int) -> list[int]:
        """The `want` tokens that followed text's end before, or none.

        unchanged: how many of its first tokens are as they were at the last call. Where the copy
        reaches the end of the text it goes on with its own beginning, as a text in a loop would.
        """
        while len(self.text) > unchanged:
            for run in self.runs():
                self.places[run].pop()
            self.text.pop()
        for token in text[len(self.text) : -1]:  # the end itself is no place before it
            self.text.append(token)
            for run in self.runs():
                self.places[run].append(len(self.text))
        for n in range(min(SUFFIX, len(text)), 0, -1):
            if before := self.places.get(tuple(text[-n:])):
                at = before[-1]
                return [text[at + j % (len(text) - at)] for j in range(want)]
        return []

    def runs(self) -> list[tuple[int, ...]]:
        """The runs of tokens that the text indexed so far ends with."""
        return [tuple(self.text[-n:]) for n in range(1, min(SUFFIX, len(self.text)) + 1)]


def look_up(text: Sequence[int], want: int) -> list[int]:
    """What LookUp drafts behind a text that it sees for the first time."""
    return LookUp().look_up(text, 0, want)
