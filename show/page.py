"""A web page that plays generations back: python -m show "a prompt" --html FILE

The page is page.html with two scripts in it, run.js and cost.js. It also holds, as JSON, the events
of several generations after one prompt: those of some ladders and of the full model alone. It needs
nothing else, not even a network.
"""

import codecs
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from arguments import Event, Options
from checkpoints.console import sign
from checkpoints.files import write_whole
from show.terminal import level_names

HERE = Path(__file__).parent
PLACEHOLDER = "TRACE_AS_JSON"
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"}
BEGUN = "⋯"  # for a token that ends within a character, which is shown by the token that ends it


def trace(
    model: str, depth: int, question: str, prompt: Sequence[int],
    runs: Sequence[tuple[Options, Sequence[Event]]], alone: Sequence[Event],
    spell: Callable[[int], bytes],
) -> dict:  # fmt: skip
    """The data that the page plays back, ready for JSON.

    model: its name; depth: its layers. question: the text asked; prompt: its token ids.
    runs: each ladder's options and the events that `watch` received. alone: the events of the full
    model without a ladder (when sampling, these write another text). spell: a token id to bytes.
    """
    sampled = any(options.temperature > 0 for options, _ in runs)
    return {
        "model": model,
        "question": visible(question),
        "prompt": visible(b"".join(map(spell, prompt)).decode("utf-8", "replace")),
        "prompt_tokens": len(prompt),
        "runs": [recorded(*run, depth, len(prompt), alone, spell) for run in runs],
        "alone": {
            "name": "full model alone" if sampled else "greedy",
            "same_text": not sampled,
            "seconds": [round(event.seconds, 6) for event in alone],
        },
    }


def recorded(
    options: Options, events: Sequence[Event], depth: int, prompt_tokens: int,
    alone: Sequence[Event], spell: Callable[[int], bytes],
) -> dict:  # fmt: skip
    """One ladder's run, for `trace`."""
    depths, names = (*options.exits, depth), level_names(options)
    shown = Pieces(prompt_tokens, spell)
    held = [0] * len(depths)
    told = []
    for i, event in enumerate(events):
        pieces, held = shown.see(event), after(event, held)
        told.append(
            dict(level=event.level, base=event.base, drafts=event.drafts, kept=event.kept,
                 text=event.text, pieces=pieces, positions=event.positions, cache=held,
                 seconds=round(event.seconds, 6), words=words(event, names, pieces, i == 0))
        )  # fmt: skip
    return {
        "depths": list(depths),
        "names": names,
        "windows": list(options.windows),
        "events": told,
        "speed_up": speed_up(events, alone),
        "point": point(events, alone, options.windows),
    }


class Pieces:
    """The text that each token adds, although several tokens may spell one character.

    Such a character is shown by its last token; bytes that form no character appear as U+FFFD.
    """

    def __init__(self, prompt_tokens: int, spell: Callable[[int], bytes]):
        self.spell = spell
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.begun = {prompt_tokens: b""}  # by position: bytes of a character begun before it

    def see(self, event: Event) -> list[str]:
        """The text that each of the level's own tokens in this event adds."""
        pieces = []
        for at, token in enumerate(event.text[event.kept :], event.base + event.kept):
            self.decoder.setstate((self.begun[at], 0))
            pieces.append(visible(self.decoder.decode(self.spell(token))))
            self.begun[at + 1] = self.decoder.getstate()[0]
        return pieces


def after(event: Event, held: list[int]) -> list[int]:
    """How many positions each segment's cache holds after an event, given how many before it."""
    ran = event.base + len(event.drafts)
    grown = [ran] * (event.level + 1) + held[event.level + 1 :]
    return [min(n, event.base + min(event.kept, len(event.text))) for n in grown]


def speed_up(events: Sequence[Event], alone: Sequence[Event]) -> float | None:
    """Tokens per second relative to the full model's, after the first token; None without more."""
    if len(alone) < 2 or not events:
        return None
    written = events[-1].base + len(events[-1].text) - events[0].base
    took = events[-1].seconds - events[0].seconds
    return (written - 1) / took * per_token(alone) if took else None


def per_token(alone: Sequence[Event]) -> float:
    return (alone[-1].seconds - alone[0].seconds) / (len(alone) - 1)


def point(steps: Sequence[Event], alone: Sequence[Event], windows: Sequence[int]) -> dict | None:
    """The place of a ladder of two exits in the page's cost model; None for all others.

    alpha, beta: how often level 1 and level 2 keep a draft that they check; a check without drafts
    counts as one rejected. d, i, f: the mean time of a step of each level, in steps of the full
    model alone; the prompt is left out.
    """
    if len(windows) != 2 or len(alone) < 2:
        return None
    checks = [[s for s in steps[1:] if s.level == k] for k in (1, 2)]
    took: list[list[float]] = [[], [], []]
    for before, step in zip(steps, steps[1:]):
        took[step.level].append(step.seconds - before.seconds)
    if not all([*checks, *took]):
        return None
    rates = []
    for some in checks:
        kept = sum(s.kept for s in some)
        rates.append(kept / (kept + sum(s.kept < max(1, len(s.drafts)) for s in some)))
    costs = [fmean(seconds) / per_token(alone) for seconds in took]
    names = ("alpha", "beta", "d", "i", "f", "nd", "ni")
    return dict(zip(names, [*rates, *costs, *windows], strict=True))


def words(event: Event, names: Sequence[str], pieces: Sequence[str], first: bool = False) -> str:
    """An event in a sentence. names: the levels' names; pieces: the text of its own tokens."""
    called = [name if name.startswith("exit") else f"the {name}" for name in names]
    who, n, kept, k = called[event.level], len(event.drafts), event.kept, event.level
    own = " ".join(f"'{piece or BEGUN}'" for piece in pieces)
    if first:
        return f"{who} reads the prompt and writes {own}"
    if n == 0 and not own:
        return f"{who} finds nothing"
    if n == 0:
        drafts = "copies" if names[k] == "look-up" else "drafts"
        return f"{who} {drafts if k == 0 < len(names) - 1 else 'writes'} {own}"
    checks = f"{who} checks {n} draft{'s' * (n > 1)} of {called[k - 1]}, keeps"
    if not own:
        return f"{checks} {min(kept, len(event.text))}, and the text ends there"
    if kept == n:
        return f"{checks} {'all' if n > 1 else 'it'} and adds {own}"
    at = kept + 1  # the draft corrected, counted from one
    suffix = "th" if 10 < at % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(at % 10, "th")
    behind = f" and drops the {n - at} behind it" if at < n else ""
    return f"{checks} {kept or 'none'}, corrects the {at}{suffix} to {own}{behind}"


def visible(text: str) -> str:
    """The text with a visible sign for each white space, control character and the like."""
    return "".join(
        SIGNS.get(c) or (sign(c) if unicodedata.category(c)[0] in "CZ" else c) for c in text
    )


def template() -> str:
    """The page with its scripts, but without a generation."""
    page = (HERE / "page.html").read_text("utf-8")
    for name in ("run", "cost"):
        page = page.replace(f"{name.upper()}_SCRIPT", (HERE / f"{name}.js").read_text("utf-8"))
    return page


def write(path: Path, trace: dict) -> None:
    """Write the page, whole or not at all."""
    # so that no text can end the script that contains it
    data = json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c")
    page = template().replace(PLACEHOLDER, data)
    write_whole(path, page)
