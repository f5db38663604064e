"""A generation as coloured text, one piece for each full verification, and its statistics."""

import codecs
from collections.abc import Callable

from arguments import Event, Generation, Options
from checkpoints.console import visible

COLOURS = ("\033[36m", "\033[33m", "\033[35m", "\033[34m")  # by level: cyan, yellow, magenta, blue
FULL, FALLEN, PLAIN = "\033[1;32m", "\033[9;31m", "\033[0m"  # bold green; struck through, red
DIM = "\033[2m"
NEW_LINE = "↵"  # for the newlines of rejected drafts, which would break up the text


class Painter:
    """Turns events into coloured text, one piece for each verification by the full model.

    names: the levels' names, shallow to deep. spell: a token id to its bytes; a character that
    several tokens spell waits for its last byte.
    """

    def __init__(self, names: list[str], spell: Callable[[int], bytes]):
        self.names, self.spell, self.top = names, spell, len(names) - 1
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.colours = (*(COLOURS[k % len(COLOURS)] for k in range(self.top)), FULL)
        self.writers: dict[int, int] = {}  # position -> the level that wrote its token
        # position -> the drafts that were rejected from there on, and by which level
        self.fallen: dict[int, list[tuple[list[int], int]]] = {}

    def see(self, event: Event) -> str | None:
        """Take one event. If it is the full model's, return the text it settles, else None."""
        end = event.base + len(event.text)
        if event.kept < len(event.drafts):
            fallen = event.drafts[event.kept :], event.level
            self.fallen.setdefault(event.base + event.kept, []).append(fallen)
        own = range(event.base + event.kept, end)  # one token, or a drafter's
        self.writers.update(dict.fromkeys(own, event.level))
        if event.level < self.top:
            return None
        pieces = []
        for position, token in zip(range(event.base, end), event.text, strict=True):
            pieces += [self.struck(*fallen) for fallen in self.fallen.pop(position, [])]
            colour = self.colours[self.writers[position]]
            pieces.append(colour + visible(self.characters.decode(self.spell(token))) + PLAIN)
        self.fallen.clear()
        return "".join(pieces)

    def rest(self) -> str:
        """Return a character whose last byte never came. To be called at the end."""
        return self.characters.decode(b"", final=True)

    def struck(self, drafts: list[int], level: int) -> str:
        """Rejected drafts, on one line, and the level that rejected them."""
        spelt = b"".join(map(self.spell, drafts)).decode("utf-8", "replace")
        line = NEW_LINE.join(spelt.splitlines()) + NEW_LINE * spelt.endswith("\n")
        return f"{FALLEN}{visible(line)}{PLAIN}{self.colours[level]}⟨{self.names[level]}⟩{PLAIN}"

    def legend(self) -> str:
        pairs = zip(self.colours, self.names, strict=True)
        levels = [colour + level + PLAIN for colour, level in pairs]
        return "  ".join([*levels, f"{FALLEN}rejected{PLAIN}⟨by this level⟩"])


def level_names(options: Options) -> list[str]:
    """The name of each level of a ladder, shallow to deep."""
    drafter = "draft head" if options.draft_head else "look-up"
    return [*(f"exit {exit}" if exit else drafter for exit in options.exits), "full model"]


def statistics(out: Generation, names: list[str], alone: Generation, called: str) -> list[str]:
    """Return lines on passes, accepted drafts and speed, and a note if the ladder was slower.

    names: the levels' names. alone: the full model's generation after the same prompt without a
    ladder. called: the name for it.
    """
    levels = zip(names, out.levels[:-1])
    kept = ", ".join(f"{name} {level.accepted}/{level.proposed}" for name, level in levels)
    passes = f"{len(out.tokens)} tokens in {out.levels[-1].calls} full passes"
    lines = [f"{passes}; accepted: {kept}" if kept else passes]
    began = f"first token after {out.prefill_seconds:.2f} s"
    mine, other = speed(out), speed(alone)
    if mine is None or other is None:
        return [*lines, began]
    first = f"its first {len(alone.tokens)} tokens"
    lines.append(
        f"{began}, then {mine:.1f} tokens/s; {called} {other:.1f} ({first}): {mine / other:.2f}x"
    )
    if mine < other:
        lines.append(f"the ladder loses on this prompt: {called} decoding is faster")
    return lines


def speed(out: Generation) -> float | None:
    """Tokens per second after the first token; None if there was only one."""
    seconds = out.seconds - out.prefill_seconds
    return (len(out.tokens) - 1) / seconds if len(out.tokens) > 1 and seconds > 0 else None
