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

from collections.abc import Sequence

SUFFIX = 4  # tokens of the text's end that are looked for at most


class LookUp:
    """Drafts what followed the text's end where it stood before (prompt lookup)."""

    def draft(self, decoder, want: int) -> tuple[list[int], None]:
        return look_up(decoder.text, want), None


def look_up(text: Sequence[int], want: int) -> list[int]:
    """The `want` tokens that followed the end of `text` where it stood before, if it did.

    Of all places the one that shares most with the end counts, among equals the latest. Where the
    copy reaches the end of the text it goes on with its own beginning, as a text in a loop would.
    """
    most, at = 0, 0
    for i in range(len(text) - 1, 0, -1):  # text[:i] ends as text does, in so many tokens:
        shared = 0
        while shared < min(SUFFIX, i) and text[i - 1 - shared] == text[-1 - shared]:
            shared += 1
        if shared > most:
            most, at = shared, i
        if most == SUFFIX:
            break
    return [text[at + j % (len(text) - at)] for j in range(want)] if most else []
