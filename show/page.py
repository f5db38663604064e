"""A generation as one web page to play back: python -m show "a prompt" --html FILE

The page is page.html with the events of `generate(watch=...)` in it, as JSON. It needs nothing
else, no network either.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints.files import write_whole
from hispec import Event

TEMPLATE = Path(__file__).with_name("page.html")
PLACEHOLDER = "TRACE_AS_JSON"
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"}


def trace(
    model: str, question: str, prompt: Sequence[int], depths: Sequence[int],
    events: Sequence[Event], decode: Callable[[list[int]], str],
) -> dict:  # fmt: skip
    """What the page plays back, ready for JSON.

    model: its name. question: what was asked; prompt: the token ids made of it. depths: the exits
    and the full depth. events: all that `watch` was told. decode: token ids to text, with U+FFFD
    for bytes that are none.
    """
    steps, positions = [], [0] * len(depths)
    for event in events:
        # a look-up has no events of its own
        if event.level == 1 and depths[0] == 0 and event.drafts:
            steps.append(Event(0, event.base, [], 0, event.drafts, positions, 0.0))
        steps.append(event)
        positions = event.positions
    texts = {token: visible(decode([token])) for step in steps for token in step.text}
    return {
        "model": model,
        "question": visible(question),
        "prompt": visible(decode(list(prompt))),
        "prompt_tokens": len(prompt),
        "depths": list(depths),
        "texts": texts,
        "events": [
            dict(level=step.level, base=step.base, drafts=step.drafts, kept=step.kept,
                 text=step.text, positions=step.positions, words=words(step, depths, texts))
            for step in steps
        ],
    }  # fmt: skip


def words(event: Event, depths: Sequence[int], texts: dict[int, str]) -> str:
    """What happened, as a sentence."""
    names = ["the look-up" if depth == 0 else f"exit {depth}" for depth in depths[:-1]]
    names.append("the full model")
    who, n, kept, k = names[event.level], len(event.drafts), event.kept, event.level
    own = " ".join(f"'{texts[token]}'" for token in event.text[kept:])
    if n == 0 and (k > 0 or len(depths) == 1):
        return f"{who} writes {own}"
    if n == 0:
        return f"{who} {'drafts' if depths[0] else 'copies'} {own}"
    checks = f"{who} checks {n} draft{'s' * (n > 1)} of {names[k - 1]}, keeps"
    if not own:
        return f"{checks} {min(kept, len(event.text))}, and the text ends there"
    if kept == n:
        return f"{checks} {'all' if n > 1 else 'it'} and adds {own}"
    at = kept + 1  # the draft corrected, counted from one
    suffix = "th" if 10 < at % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(at % 10, "th")
    behind = f" and drops the {n - at} behind it" if at < n else ""
    return f"{checks} {kept or 'none'}, corrects the {at}{suffix} to {own}{behind}"


def visible(text: str) -> str:
    """The text with whitespace, control characters and the like each as something to see."""
    return "".join(
        SIGNS.get(c) or (f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c)[0] in "CZ" else c)
        for c in text
    )


def write(path: Path, trace: dict) -> None:
    """Write the page, whole or not at all."""
    # no text can end the script it stands in
    data = json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text("utf-8").replace(PLACEHOLDER, data)
    write_whole(path, lambda to: to.write_text(page, "utf-8"))
