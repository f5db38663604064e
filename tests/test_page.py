"""The page of --html: its events are the generation's, and no text can break it."""

import json
import re
from contextlib import contextmanager
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import cases, random_model
from hypothesis import example, given
from hypothesis import strategies as st

from arguments import Event, Options, parse_ladder
from checkpoints.ladders import as_ladder, as_options
from hispec import Step, generate
from kvcache import KVCache
from show import page
from show.terminal import level_names

ROOT = Path(__file__).parent.parent
NASTY = [
    "<!--<script>", " return", "\n    ", "\t", "</script><img src=x onerror=\"document.title='broken'\">", "&lt;b&gt;",
    "'\"`${1}\\n", b"\xe2\x82", "日本", "\u202e\u200b\x00", "TRACE_AS_JSON",
]  # fmt: skip

# of this and random_model(7) all kinds of events come, and a stop amid drafts that the full model
# keeps
EVERYTHING = dict(exits=(0, 1, 3), windows=(3, 2, 4), stop=(4,))


def spell(token: int) -> bytes:
    text = NASTY[token] if token < len(NASTY) else f"<{token}>"
    return text if isinstance(text, bytes) else text.encode()


def nasty(tokens: list[int]) -> str:
    return b"".join(map(spell, tokens)).decode("utf-8", "replace")


def traced(model, prompt, n, **options):
    events, alone = [], []
    out = generate(model, prompt, n, **options, watch=events.append)
    rest = {k: v for k, v in options.items() if k not in ("exits", "windows", "thresholds")}
    generate(model, prompt, n, **rest, watch=alone.append)
    asked = Options(**{k: v for k, v in options.items() if k != "fast"})
    about = "random", model.config.n_layers, nasty([0, 1, 4])
    trace = json.loads(json.dumps(page.trace(*about, prompt, [(asked, events)], alone, spell)))
    return out, trace | trace["runs"][0], events  # as the page reads it


def replay(trace: dict, n: int) -> tuple[list[dict], list[dict]]:
    """After n events: every cell ever written, and the text's cells in order, those the last event
    struck among them."""
    born, line, shown = [], [], []
    for i, event in enumerate(trace["events"][:n]):
        at, kept = event["base"] - trace["prompt_tokens"], event["kept"]
        drafts, stands = line[at:], event["text"]
        assert [cell["token"] for cell in drafts] == event["drafts"]
        assert stands[:kept] == event["drafts"][: len(stands)][:kept]
        for cell in born:
            cell["judged"] = any(cell is draft for draft in drafts)
        for j, cell in enumerate(drafts):
            falls = j >= kept or j >= len(stands)
            cell["state"] = "struck" if falls else "accepted"
            cell["marks"] += "✗" if falls else "✓"
        kind = "↺" if kept < len(drafts) else "+" if drafts else ""
        new = dict(level=event["level"], event=i, state="drafted", marks=kind, judged=False)
        pieces = zip(stands[kept:], event["pieces"], strict=True)
        own = [dict(new, token=token, piece=piece) for token, piece in pieces]
        born += own
        shown = line[:at] + drafts + own
        line = [cell for cell in line[:at] + drafts if cell["state"] != "struck"] + own
        if event["level"] == len(trace["depths"]) - 1:
            for cell in line:
                cell["state"] = "settled"
    return born, shown


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_the_trace_replays_to_the_generated_tokens(case, temperature):
    options = dict(case.arguments, temperature=temperature, seed=1)
    out, trace, told = traced(case.model, case.prompt, case.max_new_tokens, **options)
    events, (_, shown) = trace["events"], replay(trace, len(trace["events"]))
    assert [cell["token"] for cell in shown if cell["state"] == "settled"] == out.tokens
    assert all(cell["state"] in ("settled", "struck") for cell in shown)
    own = [{k: v for k, v in asdict(event).items() if k != "seconds"} for event in told]
    assert [{k: event[k] for k in own[0]} for event in events] == own
    written = "".join(cell["piece"] for cell in shown if cell["state"] == "settled")
    assert page.visible(nasty(case.prompt + out.tokens)).startswith(trace["prompt"] + written) or (
        trace["prompt"].endswith("\ufffd")
    )
    seconds = [event["seconds"] for event in events]
    assert seconds == sorted(seconds) and len(trace["alone"]["seconds"]) >= bool(out.tokens)
    assert sum(event["level"] == len(out.levels) - 1 for event in events) == out.levels[-1].calls
    positions = events[-1]["positions"] if events else [0] * len(out.levels)
    assert positions == [level.positions for level in out.levels]
    proposed = sum(level.proposed for level in out.levels[:-1])
    assert sum(len(event["drafts"]) for event in events) == proposed


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_the_bars_are_what_the_cache_holds(case, temperature):
    held = []

    class Watched(KVCache):
        def rollback(self, length):
            super().rollback(length)
            held.append(list(self.lengths))

    class OnWatched(Step):
        @contextmanager
        def open(self, exits, max_len, draft_head=0):
            yield Watched(self.model, exits, max_len, draft_head)

    arguments = dict(case.arguments, temperature=temperature, seed=1, fast=OnWatched(case.model))
    _, trace, events = traced(case.model, case.prompt, case.max_new_tokens, **arguments)
    depths = trace["depths"]
    shown = [event["cache"] for event in trace["events"] if depths[event["level"]] > 0]
    layered, real = (  # a look-up has no layer and no rollback
        [[n for n, depth in zip(row, depths) if depth] for row in rows] for rows in (shown, held)
    )
    assert layered == real[: len(layered)]


@given(st.text(min_size=1), st.integers(0, 3))
@example("a😀é日", 1)
def test_a_character_of_several_tokens_is_shown_by_the_last(text, drafted):
    """Each byte is a token here; drafts rejected earlier do no harm."""
    pieces, shown = page.Pieces(0, lambda token: bytes([token])), []
    for at, byte in enumerate(text.encode() + b"\xe2\x82A"):  # which ends in no character
        pieces.see(Event(0, at, [], 0, [0x80, 0xF0, 0x41][:drafted], [], 0.0))
        shown += pieces.see(Event(0, at, [], 0, [byte], [], 0.0))
    assert [piece for piece in shown if piece] == [*map(page.visible, text), "\ufffdA"]


def moments(*steps):
    """Events (level, drafts, kept) that took so many seconds each, after a prompt of one token."""
    events, base, now = [], 1, 0.0
    for level, drafts, kept, seconds in steps:
        now += seconds
        text = [0] * (kept + 1)
        events.append(Event(level, base, [0] * drafts, kept, text, [], now))
        base += len(text) if level == 2 else 0
    return events


def test_the_runs_own_point():
    """Rates are the share of judged drafts that are kept; costs are in steps of greedy, without the
    prompt.
    """
    alone = moments(*[(2, 0, 0, 9.0)], *[(2, 0, 0, 2.0)] * 4)
    events = moments(
        (2, 0, 0, 5.0), (0, 0, 0, 0.2), (0, 0, 0, 0.4), (1, 2, 2, 1.0), (0, 0, 0, 0.3), (1, 1, 0, 0.5),
        (1, 0, 0, 0.6), (2, 5, 3, 2.4), (2, 5, 5, 2.0),
    )  # fmt: skip
    expected = dict(alpha=2 / 4, beta=8 / 9, d=0.15, i=0.35, f=1.1, nd=3, ni=5)
    assert page.point(events, alone, (3, 5)) == pytest.approx(expected)
    assert page.speed_up(events, alone) == pytest.approx(10 / 7.4 * 2.0)
    assert page.point(events, alone, (3,)) is None
    assert page.point(events[:1], alone, (3, 5)) is None
    assert page.point(events, alone[:1], (3, 5)) is page.speed_up([], alone) is None


@pytest.mark.parametrize(
    "level, drafts, kept, text, ladder, said",
    [
        (0, 0, 0, [1], "2(1) 8(1)", "exit 2 drafts '·return'"),
        (0, 0, 0, [1], "", "the full model writes '·return'"),
        (0, 0, 0, [1, 2], "0(1)", "the look-up copies '·return' '↵····'"),
        (0, 0, 0, [], "0(1)", "the look-up finds nothing"),
        (0, 0, 0, [1], "8'(1) 8(1)", "the draft head drafts '·return'"),
        (1, 0, 0, [1], "0(1) 8(1)", "exit 8 writes '·return'"),
        (1, 1, 1, [2, 1], "2(1) 8(1)", "exit 8 checks 1 draft of exit 2, keeps it and adds '·return'"),
        (1, 3, 0, [1], "0(1) 8(1)", "exit 8 checks 3 drafts of the look-up, keeps none, corrects the 1st to '·return' and drops the 2 behind it"),
        (1, 12, 11, [2] * 11 + [1], "2(1)", "the full model checks 12 drafts of exit 2, keeps 11, corrects the 12th to '·return'"),
        (1, 5, 5, [2, 2], "2(1)", "the full model checks 5 drafts of exit 2, keeps 2, and the text ends there"),
    ],
)  # fmt: skip
def test_an_event_in_words(level, drafts, kept, text, ladder, said):
    own = [page.visible(nasty([token])) for token in text[kept:]]
    event = Event(level, 9, [2] * drafts, kept, text, [], 0.0)
    options = parse_ladder(ladder) if ladder else Options()
    assert page.words(event, level_names(options), own) == said


# ---- the file -----------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.inside = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.inside.setdefault(self.tags[-1] if self.tags else "", []).append(data)


def test_a_page_has_several_ladders():
    """Each has its own events; the plain text that they share is recorded once."""
    model, prompt, runs = random_model(7), [1, 2] * 5, []
    for ladder in ("2(2)", "0(3) 3(4)"):
        runs.append((parse_ladder(ladder), events := []))
        generate(model, prompt, 40, **as_options(as_ladder(runs[-1][0])), watch=events.append)
    trace = page.trace("random", 5, "", prompt, runs, [], spell)
    assert [run["names"] for run in trace["runs"]] == [
        ["exit 2", "full model"],
        ["look-up", "exit 3", "full model"],
    ]
    for run, (options, events) in zip(trace["runs"], runs, strict=True):
        assert run["depths"] == [*options.exits, 5] and len(run["events"]) == len(events)


def test_tokens_and_prompt_are_data_and_never_markup(tmp_path):
    _, trace, _ = traced(random_model(7), [1, 2] * 5, 40, **EVERYTHING)
    pieces = [piece for event in trace["events"] for piece in event["pieces"]]
    assert any("</script>" in piece for piece in pieces) and "<!--" in trace["question"]
    page.write(tmp_path / "a.html", trace)
    template, written = page.template(), (tmp_path / "a.html").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    assert Tags(written).tags == Tags(template).tags
    data = Tags(written).inside["script"][0]
    assert json.loads(data) == trace
    assert written.replace(data, page.PLACEHOLDER) == template


def test_the_page_needs_nothing_from_outside():
    template = page.template()
    assert template.count(page.PLACEHOLDER) == 1
    assert not {"src", "href", "srcset", "data", "action"} & set(Tags(template).attributes)
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|fetch\(|XMLHttp|import\(", template)


def test_what_cannot_be_seen_is_shown():
    assert (
        page.visible("a b\n\tc\r\u00a0\u202e\x00é日\ufffd") == "a·b↵⇥c␍⟨U+00A0⟩⟨U+202E⟩␀é日\ufffd"
    )
