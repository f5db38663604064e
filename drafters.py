"""What drafts at depth 0, where no layer of the model runs.

A drafter is an object with one method,

    draft(decoder, want) -> (tokens, q)

It proposes at most `want` token ids that may follow `decoder.text`, as a list, or as a tensor on
the model's device; none is allowed. q (n, V) are the distributions that they were drawn from, or
None if they were not drawn: then all the probability is on them. For example

    class Again:  # the last token, again and again
        def draft(self, decoder, want):
            return [decoder.text[-1]] * want, None

`decoder.choose(logits)` draws a token as the generation's options ask, and gives its distribution.
The first `decoder.unchanged` tokens of the text are as the drafter last saw or wrote them: what it
has cached for these is still right. At the first call of a generation it is 0: forget everything.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache import WIDEST

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


class HeadDrafter:
    """Drafts with the model's draft head on an exit (model.DraftHead), in the shared cache.

    The exit's own level has judged all of the text when the head is asked: its states are there for
    every position but the last. What the head computed from its own guesses is run again from these
    states in the pass of its next draft, so that a kept position passes it at most twice.
    """

    def __init__(self, exit: int):
        self.exit = exit
        self.length = 0  # positions that have passed the head from true states

    def draft(self, decoder, want: int) -> tuple[Tensor, Tensor | None]:
        step, cache, tokens = decoder.step, decoder.cache, decoder.tokens
        first, last = min(self.length, decoder.unchanged), decoder.length
        for start in range(first, last, WIDEST):  # more than one pass after a long prompt only
            stop = min(start + WIDEST, last)
            before = cache.hidden[self.exit][:, max(0, start - 1) : stop - 1]  # (1, N, D)
            if start == 0:  # nothing stands before the text
                before = F.pad(before, (0, 0, 1, 0))
            state, logits = step.draft(cache, self.exit, before, tokens[start:stop], start)
        self.length = last
        drafts: list[Tensor] = []
        qs: list[Tensor | None] = []
        for position in range(last, last + want):
            token, q = decoder.choose(logits)
            drafts.append(token)
            qs.append(q)
            if position + 1 < last + want:
                state, logits = step.draft(cache, self.exit, state, token, position)
        return torch.cat(drafts), None if qs[0] is None else torch.cat(qs)  # type: ignore[arg-type]


def look_up(text: Sequence[int], want: int) -> list[int]:
    """What LookUp drafts behind a text that it sees for the first time."""
    return LookUp().look_up(text, 0, want)
