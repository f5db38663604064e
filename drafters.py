"""The drafters of depth 0, where no layer of the model runs.

A drafter is an object with one method,

    draft(decoder, want) -> (tokens, q)

It proposes at most `want` token ids, possibly none, to follow `decoder.text`, whose last tokens may
be drafts that no higher level has judged yet. The ids are a list, or a tensor on the model's
device, whose values are not checked. q (n, V) are the distributions that the tokens were drawn
from, or None if they were not drawn: then each counts as having probability 1. For example

    class Again:  # the last token, again and again
        def draft(self, decoder, want):
            return [decoder.text[-1]] * want, None

`decoder.choose(logits)` draws a token as the generation's options ask, and returns its distribution
too. The first `decoder.unchanged` tokens of the text are as the drafter last saw or wrote them, so
that whatever it has cached for them is still right. At the first call of a generation this number
is 0: the drafter must forget everything.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache import WIDEST

SUFFIX = 4  # at most this many of the text's last tokens are looked for


class LookUp:
    """Finds the text's last tokens earlier in the text, and drafts what followed (prompt lookup).

    It looks for the longest match, of up to SUFFIX tokens, and among equals for the latest. An
    index of the places after every run of tokens makes a draft take the same time however long the
    text is.
    """

    def __init__(self):
        self.text: list[int] = []  # the part of the text that is in the index
        # places[run of 1 to SUFFIX tokens]: the lengths at which the text ended so, ascending
        self.places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def draft(self, decoder, want: int) -> tuple[list[int], None]:
        return self.look_up(decoder.text, decoder.unchanged, want), None

    def look_up(self, text: Sequence[int], unchanged: int, want: int) -> list[int]:
        """`want` tokens that followed the text's last tokens earlier in it, or none.

        unchanged: how many first tokens of the text are as they were at the last call. A copy that
        reaches the end of the text continues with its own beginning, as a text in a loop would.
        """
        while len(self.text) > unchanged:
            for run in self.runs():
                self.places[run].pop()
            self.text.pop()
        for token in text[len(self.text) : -1]:  # the text's end is not an earlier place
            self.text.append(token)
            for run in self.runs():
                self.places[run].append(len(self.text))
        for n in range(min(SUFFIX, len(text)), 0, -1):
            if before := self.places.get(tuple(text[-n:])):
                at = before[-1]
                return [text[at + j % (len(text) - at)] for j in range(want)]
        return []

    def runs(self) -> list[tuple[int, ...]]:
        """The runs of 1 to SUFFIX tokens that end the text indexed so far."""
        return [tuple(self.text[-n:]) for n in range(1, min(SUFFIX, len(self.text)) + 1)]


class HeadDrafter:
    """Drafts with the model's draft head on an exit (model.DraftHead), in the shared cache.

    When the head is asked, the exit's own level has judged all of the text, so its states are there
    for every position but the last. Positions that the head ran from its own outputs are run again
    from these true states when it next drafts, so a kept position goes through the head at most
    twice.
    """

    def __init__(self, exit: int):
        self.exit = exit
        self.length = 0  # positions that the head has run from true states

    def draft(self, decoder, want: int) -> tuple[Tensor, Tensor | None]:
        step, cache, tokens = decoder.step, decoder.cache, decoder.tokens
        first, last = min(self.length, decoder.unchanged), decoder.length
        for start in range(first, last, WIDEST):  # only a long prompt takes more than one pass
            stop = min(start + WIDEST, last)
            before = cache.hidden[self.exit][:, max(0, start - 1) : stop - 1]  # (1, N, D)
            if start == 0:  # the first token has no state before it
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
