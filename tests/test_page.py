"""The page of --html: its events are the generation's, and no text of theirs can break it."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import cases, random_model
from hypothesis import given
from hypothesis import strategies as st

from hispec import Event, generate
from show import page

ROOT = Path(__file__).parent.parent
NASTY = [
    "<!--<script>", " return", "\n    ", "\t", "</script><img src=x onerror=\"document.title='broken'\">", "&lt;b&gt;",
    "'\"`${1}\\n", b"\xe2\x82".decode("utf-8", "replace"), "日本", "\u202e\u200b\x00", "TRACE_AS_JSON",
]  # fmt: skip

# of this and random_model(27) all kinds of events come, and a stop amid drafts that the full model
# keeps
EVERYTHING = dict(exits=(0, 1, 3), windows=(3, 2, 4), stop=(8,))


def nasty(tokens: list[int]) -> str:
    return "".join(NASTY[token] if token < len(NASTY) else f"<{token}>" for token in tokens)


def traced(model, prompt, n, **options):
    events = []
    out = generate(model, prompt, n, **options, watch=events.append)
    depths = (*options.get("exits", ()), model.config.n_layers)
    trace = page.trace("random", nasty([0, 1, 4]), prompt, depths, events, nasty)
    return out, json.loads(json.dumps(trace)), events  # as the page reads it


def replay(trace: dict, n: int) -> tuple[list[dict], list[dict]]:
    """After n events: every cell ever written, and the text's cells in order, those the last event
    struck among them."""
    born, line, shown = [], [], []
    for i, event in enumerate(trace["events"][:n]):
        at, kept, full = (
            event["base"] - trace["prompt_tokens"],
            event["kept"],
            event["level"] == len(trace["depths"]) - 1,
        )
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
        own = [
            dict(
                token=token,
                level=event["level"],
                event=i,
                state="drafted",
                marks=kind,
                judged=False,
            )
            for token in stands[kept:]
        ]
        born += own
        shown = line[:at] + drafts + own
        line = [cell for cell in line[:at] + drafts if cell["state"] != "struck"] + own
        if full:
            for cell in line:
                cell["state"] = "settled"
    return born, shown


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_the_trace_replays_to_the_generated_tokens(case, temperature):
    out, trace, told = traced(
        case.model,
        case.prompt,
        case.max_new_tokens,
        **case.arguments,
        temperature=temperature,
        seed=1,
    )
    _, shown = replay(trace, len(trace["events"]))
    assert [cell["token"] for cell in shown if cell["state"] == "settled"] == out.tokens
    assert all(cell["state"] in ("settled", "struck") for cell in shown)
    events = trace["events"]
    looked_up = [event for event in events if event["level"] == 0 and trace["depths"][0] == 0]
    whole = [
        {name: value for name, value in asdict(event).items() if name != "seconds"}
        for event in told
    ]
    assert [dict(event, words=None) for event in events if event not in looked_up] == [
        dict(event, words=None) for event in whole
    ]
    assert sum(event["level"] == len(out.levels) - 1 for event in events) == out.levels[-1].calls
    assert (events[-1]["positions"] if events else [0] * len(out.levels)) == [
        level.positions for level in out.levels
    ]
    assert sum(len(event["drafts"]) for event in events) == sum(
        level.proposed for level in out.levels[:-1]
    )


@pytest.mark.parametrize(
    "event, depths, said",
    [
        (Event(0, 9, [], 0, [1], [], 0.0), [2, 8, 32], "exit 2 drafts '·return'"),
        (Event(0, 9, [], 0, [1, 2], [], 0.0), [0, 32], "the look-up copies '·return' '↵····'"),
        (Event(0, 9, [], 0, [1], [], 0.0), [32], "the full model writes '·return'"),
        (Event(1, 9, [], 0, [1], [], 0.0), [0, 8, 32], "exit 8 writes '·return'"),
        (Event(1, 9, [2], 1, [2, 1], [], 0.0), [2, 8, 32], "exit 8 checks 1 draft of exit 2, keeps it and adds '·return'"),
        (Event(2, 9, [2, 2], 2, [2, 2, 1], [], 0.0), [2, 8, 32], "the full model checks 2 drafts of exit 8, keeps all and adds '·return'"),
        (Event(1, 9, [2, 2, 2, 2], 3, [2, 2, 2, 1], [], 0.0), [2, 8, 32], "exit 8 checks 4 drafts of exit 2, keeps 3, corrects the 4th to '·return'"),
        (Event(1, 9, [2, 2, 2], 0, [1], [], 0.0), [0, 8, 32], "exit 8 checks 3 drafts of the look-up, keeps none, corrects the 1st to '·return' and drops the 2 behind it"),
        (Event(1, 9, [2] * 12, 11, [2] * 11 + [1], [], 0.0), [2, 8], "the full model checks 12 drafts of exit 2, keeps 11, corrects the 12th to '·return'"),
        (Event(1, 9, [2] * 5, 5, [2, 2], [], 0.0), [2, 8], "the full model checks 5 drafts of exit 2, keeps 2, and the text ends there"),
    ],
)  # fmt: skip
def test_an_event_in_words(event, depths, said):
    texts = {token: page.visible(nasty([token])) for token in event.text}
    assert page.words(event, depths, texts) == said


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


def test_tokens_and_prompt_are_data_and_never_markup(tmp_path):
    _, trace, _ = traced(random_model(27), [1, 2] * 5, 40, **EVERYTHING)
    assert (
        any("</script>" in text for text in trace["texts"].values()) and "<!--" in trace["question"]
    )
    page.write(tmp_path / "a.html", trace)
    template, written = page.TEMPLATE.read_text("utf-8"), (tmp_path / "a.html").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    assert Tags(written).tags == Tags(template).tags
    data = Tags(written).inside["script"][0]
    assert json.loads(data) == trace
    assert written.replace(data, page.PLACEHOLDER) == template


def test_the_page_needs_nothing_from_outside():
    template = page.TEMPLATE.read_text("utf-8")
    assert template.count(page.PLACEHOLDER) == 1
    assert not {"src", "href", "srcset", "data", "action"} & set(Tags(template).attributes)
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|fetch\(|XMLHttp|import\(", template)


def test_what_cannot_be_seen_is_shown():
    assert (
        page.visible("a b\n\tc\r\u00a0\u202e\x00é日\ufffd")
        == "a·b↵⇥c⟨U+000D⟩⟨U+00A0⟩⟨U+202E⟩⟨U+0000⟩é日\ufffd"
    )
