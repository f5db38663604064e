"""A generation as coloured text, a piece for each verification by the full model."""

import codecs
from collections.abc import Callable

from hispec import Event, Generation

COLOURS = ("\033[36m", "\033[33m", "\033[35m", "\033[34m")  # by level: cyan, yellow, magenta, blue
FULL, FALLEN, PLAIN = "\033[1;32m", "\033[9;31m", "\033[0m"  # bold green; struck through, red


class Painter:
    """Turns events into coloured text, a piece for each verification by the full model.

    exits: the ladder's. spell: a token id to its bytes; a character that several tokens spell waits
    for its last byte.
    """

    def __init__(self, exits: tuple[int, ...], spell: Callable[[int], bytes]):
        self.exits, self.spell = exits, spell
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.colours = (*(COLOURS[k % len(COLOURS)] for k in range(len(exits))), FULL)
        self.writers: dict[int, int] = {}  # position -> the level whose own token stands there
        # position -> the drafts that were rejected from there on
        self.fallen: dict[int, list[list[int]]] = {}

    def see(self, event: Event) -> str | None:
        """Take one event; the text it settles, coloured, if it is the full model's, else None."""
        end = event.base + len(event.text)
        if event.kept < len(event.drafts):
            self.fallen.setdefault(event.base + event.kept, []).append(event.drafts[event.kept :])
        if event.level == 1 and self.exits[0] == 0:  # a look-up has no events of its own
            self.writers.update(dict.fromkeys(range(event.base, end), 0))
        if event.kept < len(event.text):
            self.writers[end - 1] = event.level
        if event.level < len(self.exits):
            return None
        pieces = []
        for position, token in zip(range(event.base, end), event.text, strict=True):
            for drafts in self.fallen.pop(position, []):
                spelt = b"".join(map(self.spell, drafts)).decode("utf-8", "replace")
                pieces.append(FALLEN + spelt + PLAIN)
            colour = self.colours[self.writers[position]]
            pieces.append(colour + self.characters.decode(self.spell(token)) + PLAIN)
        self.fallen.clear()
        return "".join(pieces)

    def legend(self) -> str:
        names = ["look-up" if exit == 0 else f"exit {exit}" for exit in self.exits] + ["full model"]
        pairs = zip(self.colours, names, strict=True)
        return "  ".join(colour + name + PLAIN for colour, name in pairs)


def statistics(out: Generation) -> str:
    """One line: speed, tokens a full pass, and how many drafts each level had accepted."""
    full = out.levels[-1]
    kept = ", ".join(f"exit {s.exit} {s.accepted}/{s.proposed}" for s in out.levels[:-1])
    speed = len(out.tokens) / out.seconds
    passes = f"{len(out.tokens)} tokens in {full.calls} full passes, {speed:.1f} tokens/s"
    return f"{passes}; accepted: {kept}" if kept else passes
