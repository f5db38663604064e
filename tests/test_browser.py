"""The page in a real browser: at every event it shows what the recorded events say."""

import html
import json
import re

import pytest
from conftest import random_model
from test_page import EVERYTHING, NASTY, nasty, replay, traced

from show import page, picture

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
  counts: ["passes", "work", "settled", "greedy-passes", "greedy-work", "greedy-settled", "took", "greedy-took"].map(id => at(id).textContent),
  text: [...at("text").querySelectorAll("span, del")].map(e => [e.tagName, e.className, e.dataset.level, e.textContent]),
  cells: [...document.querySelectorAll("#lanes .cell")].filter(e => getComputedStyle(e).visibility === "visible")
    .map(e => [e.className, e.dataset.level, e.firstChild.textContent, e.lastChild.textContent]),
  steps: [...document.querySelectorAll("#lanes .step")].filter(e => getComputedStyle(e).visibility === "visible")
    .map(e => [e.style.gridColumnStart, e.style.gridRowStart]),
  lead: getComputedStyle(document.querySelector("#lanes .marker")).visibility === "visible" ?
    inside(document.querySelector("#lanes .marker").getBoundingClientRect(), at("lanes").getBoundingClientRect()) : null,
  tip: at("text").lastChild.getBoundingClientRect().bottom <= at("text").getBoundingClientRect().bottom + 1,
  wide: document.body.scrollWidth,
  past: [...document.querySelectorAll("#race .track")].map(e => e.querySelectorAll(".block:not(.ahead)").length),
  race: [at("ratio").textContent, at("race").ariaLabel],
  bars: [...document.querySelectorAll("#cache .track")].map(e => [e.nextSibling.textContent,
    e.querySelector(".held").style.width, e.querySelector(".rolled").hidden]),
  greedy: at("text").querySelector("b")?.textContent,
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
seen.tabs = [["run", "cost"].map(id => at(id).hidden)];
at("cost-tab").click();
seen.tabs.push(["run", "cost"].map(id => at(id).hidden), location.hash, press("ArrowRight"), press(" "), tick);
at("run-tab").click();
seen.tabs.push(["run", "cost"].map(id => at(id).hidden), at("slider").value);
history.replaceState(null, "", "#formula");
dispatchEvent(new HashChangeEvent("hashchange"));
seen.tabs.push(["run", "cost"].map(id => at(id).hidden));
at("run-tab").click();
const colours = () => [getComputedStyle(document.body).backgroundColor, at("theme").ariaLabel];
seen.themes = [colours(), (at("theme").click(), colours()), (at("theme").click(), colours())];
seen.page = { title: document.title, question: at("question").textContent,
  images: document.images.length, scripts: document.scripts.length, fetched: performance.getEntriesByType("resource").length };
const pre = document.createElement("pre");
pre.id = "collected";
pre.textContent = JSON.stringify(seen);
document.body.append(pre);
</script>
"""


@pytest.fixture(scope="module")
def browsed(tmp_path_factory):
    """A generation on a ladder of all kinds of levels, its trace, and all that a phone's browser
    showed of it."""
    out, trace, _ = traced(random_model(7), [1, 2] * 5, 40, **EVERYTHING)
    return out, trace, collected(tmp_path_factory.mktemp("browsed"), trace, COLLECT)


def collected(folder, trace: dict, script: str) -> dict:
    """What a script found on the page of this trace, opened at event 12."""
    if picture.find_browser() is None:
        pytest.skip("no chromium or chrome to open the page in")
    page.write(folder / "page.html", trace)
    with (folder / "page.html").open("a", encoding="utf-8") as file:
        file.write(script)
    address = f"{(folder / 'page.html').as_uri()}#12"
    run = picture.browse(address, "light", "500,844", "--enable-logging=stderr", "--dump-dom")
    found = re.search(r'<pre id="collected">(.*?)</pre>', run.stdout, re.S)
    assert found, "the page's script failed: " + "\n".join(re.findall(".*CONSOLE.*", run.stderr))
    return json.loads(html.unescape(found[1]))


def expected(trace: dict, n: int) -> dict:
    """Everything that the page must show at event n, computed from the trace."""
    depths, last, alone = trace["depths"], len(trace["events"]), trace["alone"]["seconds"]
    cells, shown = replay(trace, n)
    cells.sort(key=lambda cell: cell["event"])
    settled = sum(cell["state"] == "settled" for cell in shown)
    passes = sum(event["level"] == len(depths) - 1 for event in trace["events"][:n])
    layers = [deep - shallow for shallow, deep in zip([0, *depths], depths)]
    positions = trace["events"][n - 1]["positions"] if n else [0] * len(depths)
    work = sum(a * b for a, b in zip(layers, positions))
    greedy = (trace["prompt_tokens"] + settled - 1) * depths[-1] if settled else 0
    at = trace["events"][n - 1]["seconds"] if n else 0
    written = sum(seconds <= at for seconds in alone)
    everything = trace["prompt_tokens"] + len(alone)
    cache = trace["events"][n - 1]["cache"] if n else [0] * len(depths)
    level, ran = (trace["events"][n - 1][k] for k in ("level", "base")) if n else (0, 0)
    ran += len(trace["events"][n - 1]["drafts"]) if n else 0
    fell = [max(0, ran - held) * (k <= level) for k, held in enumerate(cache)]
    ratio = f": {trace['speed_up']:.2f}x as fast after the first token" if n == last else ""
    tokens = f"{written} token{'s' * (written != 1)}"
    said = (
        f"After {ms(at)} ms greedy has written {tokens}, the ladder has settled {settled}{ratio}."
    )
    classes = {"settled": "writer", "struck": ""}
    return dict(
        count=f"{n} / {last}", slider=str(n), said=f"event {n} of {last}",
        words=trace["events"][n - 1]["words"] if n else "the prompt alone: press play",
        counts=[f"{count:,}" for count in (
            passes, work, settled, settled, greedy, settled, ms(at), ms(alone[settled - 1] if settled else 0)
        )],
        text=[["SPAN", "prompt", None, trace["prompt"].replace("↵", "↵\n")]] + [
            ["DEL" if cell["state"] == "struck" else "SPAN", classes.get(cell["state"], "writer tentative"),
             str(cell["level"]), cell["piece"].replace("↵", "↵\n")]
            for cell in shown
        ],
        cells=sorted(
            ["cell " + cell["state"] + " judged" * cell["judged"], str(cell["level"]), cell["piece"] or "⋯", cell["marks"]]
            for cell in cells
        ),
        steps=[[str(i + 2), str(event["level"] + 2)] for i, event in enumerate(trace["events"][:n])],
        lead=True if n else None, tip=True, wide=390,
        past=[written, n, 0], race=[said, said], greedy="◂ greedy is here" if n else None,
        bars=[
            [f"{held} −{less}" if less else f"{held}", f"{round(100 * held / everything, 4):g}%", not less]
            for held, less in list(zip(cache, fell))[1:]
        ],
    )  # fmt: skip


def test_a_plain_text_that_ended_sooner_is_not_compared(tmp_path):
    """When sampling, the two texts differ: past the end of one there is nothing to compare."""
    case = random_model(7), [1, 2] * 5, 40
    options = dict(EVERYTHING, temperature=1.0)
    for seed in range(50):
        out, trace, _ = traced(*case, **options, seed=seed)
        alone = len(trace["alone"]["seconds"])
        if alone < len(out.tokens) - 3:
            break
    seen = collected(tmp_path, trace, COLLECT)
    for look in seen["dragged"]:
        settled = int(look["counts"][2])
        theirs = [look["counts"][i] for i in (3, 4, 5, 7)]
        assert (theirs == ["–"] * 4) == ("–" in theirs) == (settled > alone)
        assert "NaN" not in str(look)
    assert settled == len(out.tokens) > alone


def ms(seconds: float) -> int:
    return int(1e3 * seconds + 0.5)  # as the browser rounds


def test_every_event_looks_as_the_trace_says(browsed):
    _, trace, seen = browsed
    every = [expected(trace, n) for n in range(len(trace["events"]) + 1)]
    kinds = {cell[i] for look in every for cell in look["cells"] for i in (0, 3)}
    assert trace["events"][-1]["kept"] > len(trace["events"][-1]["text"])
    states = {"cell drafted", "cell accepted judged", "cell settled", "cell struck judged"}
    assert kinds >= states | {"", "+", "↺", "✓✗"}
    for way in ("dragged", "back", "right", "left"):
        for want, got in zip(every, seen[way], strict=True):
            got["cells"].sort()
            got["bars"] = [[a, f"{round(float(b[:-1]), 4):g}%", c] for a, b, c in got["bars"]]
            for name in want:
                assert got.get(name) == want[name], (way, want["count"], name)


def test_keys_buttons_and_links(browsed):
    _, trace, seen = browsed
    last, play, pause = len(trace["events"]), ["play", False], ["pause", True]

    def at(look):
        return int(look["slider"])

    looks = [at(seen[name]) for name in ("opened", "home", "stays", "linked", "beyond", "clicked")]
    assert looks == [12, 0, last, 5, last, 4]
    assert seen["address"] == "#3"
    assert seen["taken"] == [True, False, False, False]
    assert seen["plays"] == pause and at(seen["played"]) == 2 and seen["pauses"] == play
    assert at(seen["again"][0]) == 0 and seen["again"][1] == pause
    assert seen["interrupted"] == play
    assert at(seen["ended"][0]) == last and seen["ended"][1] == play
    light, dark, light_again = seen["themes"]
    assert light == light_again == ["rgb(255, 255, 255)", "dark colours"]
    assert dark[1] == "light colours" and max(map(int, re.findall(r"\d+", dark[0]))) < 50


def test_two_tabs(browsed):
    """On the cost model's tab the keys move its sliders, and nothing plays."""
    _, _, seen = browsed
    run, cost = [False, True], [True, False]
    assert seen["tabs"] == [run, cost, "#formula", False, False, None, run, "4", cost]


def test_no_text_breaks_the_page(browsed):
    _, trace, seen = browsed
    said = page.visible(nasty([0, 1, 4]))
    assert page.visible(NASTY[4]) in [p for e in trace["events"] for p in e["pieces"]]
    assert seen["page"]["question"] == said and seen["page"]["title"] == f"{said} | random"
    assert (seen["page"]["images"], seen["page"]["scripts"], seen["page"]["fetched"]) == (0, 4, 0)
