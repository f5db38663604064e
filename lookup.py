"""The draft that costs no layer: what followed the text's end before (prompt lookup)."""

from collections.abc import Sequence

SUFFIX = 4  # tokens of the text's end that are looked for at most


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
