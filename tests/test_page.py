"""The page of --html: what it shows at every event, in a real browser, is what the events say."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import cases, random_model
from hypothesis import given
from hypothesis import strategies as st

import page
import show
from checkpoints.files import must_be_writable
from hispec import Event, generate

ROOT = Path(__file__).parent.parent
NASTY = [
    "<!--<script>", " return", "\n    ", "\t", "</script><img src=x onerror=\"document.title='broken'\">", "&lt;b&gt;",
    "'\"`${1}\\n", b"\xe2\x82".decode("utf-8", "replace"), "日本", "\u202e\u200b\x00", "TRACE_AS_JSON",
]  # fmt: skip

# of this and random_model(27) all kinds of events come, and a stop amid drafts that the full model keeps
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
    """After n events: every cell ever written, and the text's cells in order, those the last event struck among them."""
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
            dict(token=token, level=event["level"], event=i, state="drafted", marks=kind, judged=False)
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
        case.model, case.prompt, case.max_new_tokens, **case.arguments, temperature=temperature, seed=1
    )
    _, shown = replay(trace, len(trace["events"]))
    assert [cell["token"] for cell in shown if cell["state"] == "settled"] == out.tokens
    assert all(cell["state"] in ("settled", "struck") for cell in shown)
    events = trace["events"]
    looked_up = [event for event in events if event["level"] == 0 and trace["depths"][0] == 0]
    whole = [{name: value for name, value in asdict(event).items() if name != "seconds"} for event in told]
    assert [dict(event, words=None) for event in events if event not in looked_up] == [
        dict(event, words=None) for event in whole
    ]
    assert sum(event["level"] == len(out.levels) - 1 for event in events) == out.levels[-1].calls
    assert (events[-1]["positions"] if events else [0] * len(out.levels)) == [level.positions for level in out.levels]
    assert sum(len(event["drafts"]) for event in events) == sum(level.proposed for level in out.levels[:-1])


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


# ---- what a browser shows ------------------------------------------------------------------------------------

COLLECT = """
<script type="module">
document.documentElement.style.width = "390px";  // a phone's; no window gets as narrow
let link = null, tick = null;
window.setTimeout = act => { link = act; };
window.setInterval = act => { tick = act; return 7; };
window.clearInterval = id => { if (id === 7) tick = null; };
const at = id => document.getElementById(id), seen = {};
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const look = () => ({
  count: at("count").textContent, slider: at("slider").value, words: at("words").textContent,
  said: at("slider").ariaValueText,
  counts: ["passes", "work", "settled", "greedy-passes", "greedy-work", "greedy-settled"].map(id => at(id).textContent),
  text: [...at("text").querySelectorAll("span, del")].map(e => [e.tagName, e.className, e.dataset.level, e.textContent]),
  cells: [...document.querySelectorAll("#lanes .cell")].filter(e => getComputedStyle(e).visibility === "visible")
    .map(e => [e.className, e.dataset.level, e.firstChild.textContent, e.lastChild.textContent]),
  steps: [...document.querySelectorAll("#lanes .step")].filter(e => getComputedStyle(e).visibility === "visible")
    .map(e => [e.style.gridColumnStart, e.style.gridRowStart]),
  lead: getComputedStyle(document.querySelector("#lanes .marker")).visibility === "visible" ?
    inside(document.querySelector("#lanes .marker").getBoundingClientRect(), at("lanes").getBoundingClientRect()) : null,
  tip: at("text").lastChild.getBoundingClientRect().bottom <= at("text").getBoundingClientRect().bottom + 1,
  wide: document.body.scrollWidth,
});
const press = (key, target = document.body, more = {}) =>
  !target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
const last = Number(at("slider").max), events = [...Array(last + 1).keys()];
const drag = n => { at("slider").value = n; at("slider").dispatchEvent(new Event("input")); return look(); };
const playing = () => [at("play").ariaLabel, tick !== null];

seen.opened = look();
seen.dragged = events.map(drag);
drag(3);
link();
seen.address = location.hash;
seen.back = events.map(n => drag(last - n)).reverse();
press("Home");
seen.right = events.map(n => (n && press("ArrowRight", at("slider")), look()));
press("ArrowRight");
seen.stays = look();
press("Home");
press("ArrowLeft");
seen.home = look();
seen.taken = [press("End", at("lanes")), press("x"), press("ArrowLeft", document.body, { altKey: true }), press(" ", at("play"))];
seen.left = events.map(n => (n && press("ArrowLeft"), look())).reverse();
press(" ");
seen.plays = playing();
tick();
tick();
seen.played = look();
press(" ");
seen.pauses = playing();
press("End");
at("play").click();
seen.again = [look(), playing()];
press("ArrowRight");
seen.interrupted = playing();
drag(last - 1);
press(" ");
tick();
seen.ended = [look(), playing()];
history.replaceState(null, "", "#5");
dispatchEvent(new HashChangeEvent("hashchange"));
seen.linked = look();
history.replaceState(null, "", "#999999");
dispatchEvent(new HashChangeEvent("hashchange"));
seen.beyond = look();
document.querySelectorAll("#lanes .step")[3].click();
seen.clicked = look();
const colours = () => [getComputedStyle(document.body).backgroundColor, at("theme").ariaLabel];
seen.themes = [colours(), (at("theme").click(), colours()), (at("theme").click(), colours())];
seen.page = { title: document.title, question: at("question").textContent, about: at("about").textContent,
  images: document.images.length, scripts: document.scripts.length, fetched: performance.getEntriesByType("resource").length,
  lanes: [...document.querySelectorAll("#lanes .lane")].map(e => [e.firstChild.textContent, e.lastChild.textContent]) };
const pre = document.createElement("pre");
pre.id = "collected";
pre.textContent = JSON.stringify(seen);
document.body.append(pre);
</script>
"""


@pytest.fixture(scope="module")
def browsed(tmp_path_factory):
    """A generation on a ladder of all kinds of levels, its trace, and all that a phone's browser showed of it."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium or chrome to open the page in")
    out, trace, _ = traced(random_model(27), [1, 2] * 5, 40, **EVERYTHING)
    folder = tmp_path_factory.mktemp("browsed")
    page.write(folder / "page.html", trace)
    with (folder / "page.html").open("a", encoding="utf-8") as file:
        file.write(COLLECT)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--blink-settings=preferredColorScheme=1", "--window-size=500,844",
        "--dump-dom", f"{(folder / 'page.html').as_uri()}#12",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=200)
    found = re.search(r'<pre id="collected">(.*?)</pre>', run.stdout, re.S)
    assert found, "the page's script failed: " + "\n".join(re.findall(".*CONSOLE.*", run.stderr))
    return out, trace, json.loads(html.unescape(found[1]))


def expected(trace: dict, n: int) -> dict:
    """All that the page must show at event n, as the trace has it."""
    depths, texts, last = trace["depths"], trace["texts"], len(trace["events"])
    cells, shown = replay(trace, n)
    cells.sort(key=lambda cell: cell["event"])
    settled = sum(cell["state"] == "settled" for cell in shown)
    passes = sum(event["level"] == len(depths) - 1 for event in trace["events"][:n])
    layers = [deep - shallow for shallow, deep in zip([0, *depths], depths)]
    positions = trace["events"][n - 1]["positions"] if n else [0] * len(depths)
    work = sum(a * b for a, b in zip(layers, positions))
    greedy = (trace["prompt_tokens"] + settled - 1) * depths[-1] if settled else 0
    classes = {"settled": "writer", "struck": ""}
    return dict(
        count=f"{n} / {last}", slider=str(n), said=f"event {n} of {last}",
        words=trace["events"][n - 1]["words"] if n else "the prompt alone: press play",
        counts=[f"{count:,}" for count in (passes, work, settled, settled, greedy, settled)],
        text=[["SPAN", "prompt", None, trace["prompt"].replace("↵", "↵\n")]] + [
            ["DEL" if cell["state"] == "struck" else "SPAN", classes.get(cell["state"], "writer tentative"),
             str(cell["level"]), texts[str(cell["token"])].replace("↵", "↵\n")]
            for cell in shown
        ],
        cells=sorted(
            ["cell " + cell["state"] + " judged" * cell["judged"], str(cell["level"]), texts[str(cell["token"])], cell["marks"]]
            for cell in cells
        ),
        steps=[[str(i + 2), str(event["level"] + 2)] for i, event in enumerate(trace["events"][:n])],
        lead=True if n else None, tip=True, wide=390,
    )  # fmt: skip


def test_every_event_looks_as_the_trace_says(browsed):
    _, trace, seen = browsed
    every = [expected(trace, n) for n in range(len(trace["events"]) + 1)]
    kinds = {cell[0] for look in every for cell in look["cells"]} | {
        cell[3] for look in every for cell in look["cells"]
    }
    assert trace["events"][-1]["kept"] > len(trace["events"][-1]["text"])
    assert kinds >= {"cell drafted", "cell accepted judged", "cell settled", "cell struck judged", "", "+", "↺", "✓✗"}
    for way in ("dragged", "back", "right", "left"):
        for want, got in zip(every, seen[way], strict=True):
            got["cells"].sort()
            for name in want:
                assert got.get(name) == want[name], (way, want["count"], name)


def test_keys_buttons_and_links(browsed):
    _, trace, seen = browsed
    last = len(trace["events"])

    def at(look):
        return int(look["slider"])

    assert [at(seen[name]) for name in ("opened", "home", "stays", "linked", "beyond", "clicked")] == [
        12,
        0,
        last,
        5,
        last,
        4,
    ]
    assert seen["address"] == "#3"
    assert seen["taken"] == [True, False, False, False]
    assert seen["plays"] == ["pause", True] and at(seen["played"]) == 2 and seen["pauses"] == ["play", False]
    assert at(seen["again"][0]) == 0 and seen["again"][1] == ["pause", True]
    assert seen["interrupted"] == ["play", False]
    assert at(seen["ended"][0]) == last and seen["ended"][1] == ["play", False]
    light, dark, light_again = seen["themes"]
    assert light == light_again == ["rgb(255, 255, 255)", "dark colours"] and dark[1] == "light colours"
    assert max(map(int, re.findall(r"\d+", dark[0]))) < 50


def test_the_last_counters_are_the_statistics(browsed):
    out, trace, seen = browsed
    layers = [1 - 0, 3 - 1, 5 - 3]
    work = sum(n * level.positions for n, level in zip(layers, out.levels[1:]))
    tokens = len(out.tokens)
    counts = [out.levels[-1].calls, work, tokens, tokens, (10 + tokens - 1) * 5, tokens]
    assert [int(count.replace(",", "")) for count in seen["dragged"][-1]["counts"]] == counts


def test_no_text_breaks_the_page(browsed):
    _, trace, seen = browsed
    said = page.visible(nasty([0, 1, 4]))
    assert page.visible(NASTY[4]) in trace["texts"].values()
    assert seen["page"]["question"] == said and seen["page"]["title"] == f"{said} | random"
    assert (seen["page"]["images"], seen["page"]["scripts"], seen["page"]["fetched"]) == (0, 3, 0)
    assert seen["page"]["about"] == "Model random, ladder: look-up → exit 1 → exit 3 → full model, 5 layers"
    lanes = [
        ["look-up", "no layer"],
        ["exit 1", "layers 1–1"],
        ["exit 3", "layers 2–3"],
        ["full model, 5 layers", "layers 4–5"],
    ]
    assert seen["page"]["lanes"] == lanes


# ---- the file --------------------------------------------------------------------------------------------------


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
    assert any("</script>" in text for text in trace["texts"].values()) and "<!--" in trace["question"]
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
    assert page.visible("a b\n\tc\r\u00a0\u202e\x00é日\ufffd") == "a·b↵⇥c⟨U+000D⟩⟨U+00A0⟩⟨U+202E⟩⟨U+0000⟩é日\ufffd"


def hispec_command(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "hispec.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_the_command_prints_as_ever_and_writes_the_page(tmp_path):
    run = hispec_command("def add(a, b):", "--max-new-tokens", "8", "--html", "a.html", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    text, statistics, last = run.stdout[:-1].rsplit("\n", 2)
    assert statistics.startswith("8 tokens in") and last == "to play it back: a.html"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    trace = json.loads(Tags((tmp_path / "a.html").read_text("utf-8")).inside["script"][0])
    assert (trace["model"], trace["question"], trace["depths"]) == ("tiny", "def·add(a,·b):", [2, 8, 32])
    _, shown = replay(trace, len(trace["events"]))
    standing = "".join(trace["texts"][str(cell["token"])] for cell in shown if cell["state"] == "settled")
    assert standing == page.visible(text)


@pytest.mark.parametrize(
    "path, message", [("no/such/a.html", "No such file"), (".", "empty name"), ("folder", "is a folder")]
)
def test_a_path_that_cannot_be_written_is_told_before_any_work(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    run = hispec_command(
        "a prompt", "--model", "none/such", "--html", path, cwd=tmp_path
    )  # no model: nothing can start
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: cannot write to") and run.stderr.count("\n") == 1 and message in run.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_trying_a_path_leaves_what_is_there(tmp_path):
    (tmp_path / "a.html").write_text("kept")
    must_be_writable(tmp_path / "a.html")
    must_be_writable(tmp_path / "b.html")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.html", "kept")]


@pytest.mark.parametrize("html_wanted", [False, True])
def test_nothing_is_watched_unless_asked_for(tmp_path, monkeypatch, capsys, html_wanted):
    watched = []

    def spy(*arguments, **options):
        watched.append(options["watch"])
        return generate(*arguments, **options)

    monkeypatch.setattr(show, "generate", spy)
    monkeypatch.setattr(show, "best_threads", lambda model: 1)
    extra = ["--html", str(tmp_path / "a.html")] if html_wanted else []
    monkeypatch.setattr(sys, "argv", ["hispec.py", "x", "--max-new-tokens", "2", *extra])
    show.main()
    assert [watch is not None for watch in watched] == [html_wanted]
