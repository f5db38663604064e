"""The cost model on the page, in a real browser: its formula, its sliders, its maps."""

from functools import cache

import pytest
from conftest import random_model
from test_browser import collected
from test_page import traced

# (d, i): HiSpec over one exit, both with their best windows, at the rates PAIRS (alpha, beta)
TABLE = {
    (1 / 8, 1 / 4): (1.25, 1.27, 1.21, 1.26, 1.25, 1.28),
    (1 / 16, 1 / 4): (1.28, 1.25, 1.40, 1.35, 1.49, 1.27),
    (1 / 32, 1 / 8): (1.22, 1.31, 1.29, 1.38, 1.45, 1.46),
}
PAIRS = ((0.7, 0.7), (0.8, 0.8), (0.7, 0.9), (0.8, 0.9), (0.8, 0.95), (0.9, 0.95))

LOOK = """
<script type="module">
const box = id => document.getElementById(id), seen = {};
box("cost-tab").click();
const knobs = ["alpha", "beta", "d", "i", "f", "nd", "ni"];
const look = () => ({ values: knobs.map(id => box(id).valueAsNumber), most: knobs.map(id => Number(box(id).max)),
  rows: [...box("results").querySelectorAll("tr")].map(row => [...row.children].map(e => e.textContent)),
  marks: ["rates", "windows"].map(id => [...box(id).querySelectorAll("b")].map(e =>
    [e.textContent, parseFloat(e.style.left), parseFloat(e.style.bottom)])),
  labels: ["rates", "windows"].map(id => box(id).ariaLabel), own: box("own").hidden,
  best: box("windows").querySelector("i:nth-child(40)").title });
const move = (id, value) => { box(id).value = value; box(id).dispatchEvent(new Event("input")); return look(); };
seen.opened = look();
seen.moved = move("alpha", 0.5);
box("optimal").click();
seen.optimal = look();
box("rates").firstChild.click();  // the first cell: the top left
seen.clicked = look();
box("own").click();
seen.back = look();
seen.wide = document.body.scrollWidth <= innerWidth;
seen.gains = ASKED.map(asked => hispec(asked));
seen.table = TABLE.map(([d, i, alpha, beta]) =>
  bestWindows({ alpha, beta, d, i, f: 1 - i }).gain / single({ alpha, beta, d, i, f: 1 }).gain);
const pre = document.createElement("pre");
pre.id = "collected";
pre.textContent = JSON.stringify(seen);
document.body.append(pre);
</script>
"""
NAMES = ("alpha", "beta", "d", "i", "f", "nd", "ni")
ASKED = [
    (0.8, 0.9, 0.1, 0.3, 1.0, 2, 4), (0.3, 0.99, 0.0, 0.25, 1.3, 12, 24), (1.0, 1.0, 0.05, 0.2, 1.0, 4, 8),
    (0.0, 0.0, 0.5, 0.5, 1.0, 1, 1), (0.95, 0.6, 0.02, 0.1, 0.9, 7, 3),
]  # fmt: skip


def by_recursion(alpha, beta, d, i, f, nd, ni) -> tuple[float, float]:
    """Tokens and speed-up computed in another way: from the tokens still to come, not those
    written.
    """
    keep = [sum(beta**j for j in range(m + 1)) for m in range(nd + ni + 1)]

    @cache
    def ahead(m: int) -> tuple[float, float]:  # tokens, cost
        if m >= ni:
            return keep[m], f
        chances = [alpha ** (r - 1) * (1 - alpha) for r in range(1, nd + 1)] + [alpha**nd]
        tokens, cost = (sum(c * ahead(m + r)[k] for r, c in enumerate(chances, 1)) for k in (0, 1))
        return tokens, cost + nd * d + i

    tokens, cost = ahead(0)
    return tokens, tokens / cost


@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    """A run of two exits, and what the browser showed of its cost model."""
    _, trace, _ = traced(random_model(27), [1, 2] * 5, 40, exits=(1, 3), windows=(2, 14))
    asked = str([dict(zip(NAMES, each, strict=True)) for each in ASKED])
    table = str([[d, i, *rates] for d, i in TABLE for rates in PAIRS])
    script = LOOK.replace("ASKED", asked).replace("TABLE", table)
    return trace, collected(tmp_path_factory.mktemp("formula"), trace, script)


def test_the_formula_and_the_best_windows(modelled):
    _, seen = modelled
    for asked, got in zip(ASKED, seen["gains"], strict=True):
        assert (got["tokens"], got["gain"]) == pytest.approx(by_recursion(*asked), rel=1e-4)
    assert seen["table"] == pytest.approx([x for row in TABLE.values() for x in row], abs=0.006)


def test_it_opens_where_the_run_was(modelled):
    trace, seen = modelled
    point, opened = trace["point"], seen["opened"]
    steps = (0.01, 0.01, 0.005, 0.005, 0.01, 1, 1)
    for name, value, step in zip(NAMES, opened["values"], steps, strict=True):
        assert value == pytest.approx(point[name], abs=step), name
    tokens, gain = by_recursion(*point.values())
    assert opened["rows"][1][1:] == ["2, 14", f"{tokens:.1f}", f"{gain:.2f}x"]
    assert opened["rows"][-1][0] == "measured in this run"
    assert opened["rows"][-1][3] == f"{trace['speed_up']:.2f}x"
    rates, windows = opened["marks"]
    here = [
        pytest.approx(100 * point["alpha"], abs=1e-3),
        pytest.approx(100 * point["beta"], abs=1e-3),
    ]
    assert rates == [["○", *here], ["◆", *here]]
    here = [pytest.approx(100 * 1.5 / 12), pytest.approx(100 * 13.5 / 24)]
    assert windows[:2] == [["○", *here], ["◆", *here]] and windows[2][0] == "★"
    assert seen["back"] == opened and not opened["own"] and seen["wide"]


def test_sliders_maps_and_buttons(modelled):
    trace, seen = modelled
    moved, optimal, clicked = seen["moved"], seen["optimal"], seen["clicked"]
    assert moved["values"][0] == 0.5 and moved["values"][1:] == seen["opened"]["values"][1:]
    assert moved["rows"][1] != seen["opened"]["rows"][1]
    assert moved["marks"][0][0][1] == 50 and moved["marks"][0][1] == seen["opened"]["marks"][0][1]
    best = moved["rows"][2][1]
    assert ", ".join(str(value) for value in optimal["values"][5:]) == best
    assert optimal["rows"][1][1:] == optimal["rows"][2][1:]
    assert optimal["marks"][1][0][1:] == optimal["marks"][1][2][1:]
    assert clicked["values"][:2] == pytest.approx([0.025, 0.975], abs=0.006)
    assert clicked["labels"][0].endswith(clicked["rows"][1][3])


def test_without_two_exits_no_point_is_claimed(tmp_path):
    _, trace, _ = traced(random_model(27), [1, 2] * 5, 12, exits=(3,), windows=(4,))
    assert trace["point"] is None
    script = LOOK.replace("ASKED", "[]").replace("TABLE", "[]")
    opened = collected(tmp_path, trace, script.replace('box("own").click();', ""))["opened"]
    assert opened["values"] == [0.8, 0.9, 0.125, 0.25, 1, 2, 4] and opened["own"]
    assert [mark[0] for mark in opened["marks"][0]] == ["○"]
