"""The README and the lecture's texts: links, files, commands, and measured numbers are right."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from arguments import ladder_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
TEXTS = [README, *ROOT.glob("lecture/*.md"), ROOT / "lecture/exercises/README.md"]
TEXTS += [ROOT / "results/README.md"]
PROGRAMS = [
    "bench.py",
    "train_exits.py",
    "show",
    "show.picture",
    "lab.train",
    "lab.rules",
    "lab.bytes",
]
# of git, pip, torchrun and tar
OTHERS = {"--depth", "--no-deps", "--nproc_per_node", "--strip-components"}
# the rows of the first table: the file, and the method in it
FIRST_TABLE = {
    "greedy decoding": ("results/cpu-tiny.json", "greedy"),
    "exit 2 alone, the draft without the filter": ("results/cpu-tiny.json", "draft alone"),
    "**HiSpec**: exit 2 drafts, exit 8 filters": ("results/cpu-tiny.json", "hispec"),
    "the best exit alone": ("results/cpu-tiny.json", "single-layer"),
    "a draft head on exit 8 drafts, exit 8 filters": ("results/cpu-tiny.json", "head, exit"),
    "a draft head on the last layer, alone": ("results/cpu-tiny.json", "head"),
    "look-ups draft, exit 8 filters": ("results/cpu-tiny.json", "look-up, exit"),
    "another model, SmolLM2-135M: look-ups alone": ("results/cpu-smollm2.json", "look-up"),
}
COLUMNS = {  # of both tables, and the bench's names for them
    "over greedy": "speedup_vs_greedy",
    "over its own draft alone": "speedup_vs_draft_alone",
    "over the best exit alone": "speedup_vs_single_layer",
}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def rows(text: str) -> list[dict[str, str]]:
    """The first table of a text, as one dict per row."""
    table = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert table
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table[0].splitlines()]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def measured(path: str) -> dict[str, dict]:
    found = json.loads((ROOT / path).read_text("utf-8"))
    return {method["name"]: method for method in found["methods"]}


def printed(number: str, value: float) -> bool:
    """Whether this is the value, to as many decimals as are printed."""
    return f"{value:.{len(number.partition('.')[2])}f}" == number


# ---- links and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_links_and_files_exist(file):
    text = file.read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            assert (file.parent / path).exists() if path else anchor in anchors(text), link
    for name in re.findall(r"`([\w/-]+\.(?:py|md|json|jsonl|csv|png|ipynb))`", text):
        assert (file.parent / name).exists() or (ROOT / name).exists(), name


def anchors(text: str) -> set[str]:
    """What headings are called in a link."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- commands -----------------------------------------------------------------------------------


HELP = """
import runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    except SystemExit:
        print("\\f")
"""


@cache
def options() -> dict[str, set[str]]:
    """The options of each program, as its --help lists them."""
    command = [sys.executable, "-c", HELP, *PROGRAMS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    texts = run.stdout.split("\f")[: len(PROGRAMS)]
    return {p: set(re.findall(r"--[\w-]+", text)) for p, text in zip(PROGRAMS, texts, strict=True)}


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_every_flag_exists(file):
    text = file.read_text("utf-8").replace("\\\n", " ")
    for command in re.findall(r"(?:^    |&& |`)(python .*|torchrun .*)$", text, re.M):
        for name in PROGRAMS:
            if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", command):
                flags = set(re.findall(r"--[\w-]+", command.split("`")[0])) - OTHERS
                assert flags <= options()[name], command
    known = OTHERS.union(*options().values())
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


def test_the_example_runs():
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "LevelStats(exit=32" in run.stdout


# ---- measured numbers ---------------------------------------------------------------------------


def check_row(row: dict[str, str], method: dict) -> None:
    """Every number that is printed is the measured one, to as many decimals."""
    of = [method.get(name, 0) for name in ("exits", "windows", "thresholds", "draft_head")]
    assert row["ladder"] == ladder_text(*of)
    assert printed(row["tokens/s"], method["tokens_per_second"])
    for before, found in ("", method), ("sampled, ", method["sampled"]):
        for column, key in COLUMNS.items():
            if (cell := row.get(before + column, "–").strip("*")) != "–":
                assert printed(cell, found[key]), (row, before + column)
        assert row[f"{before}over greedy"] != "–"


def test_the_first_table_was_measured():
    """It was measured in runs in which every method wrote exactly greedy's texts."""
    assert [row["method"] for row in rows(TEXT)] == [*FIRST_TABLE]
    for row, (file, name) in zip(rows(TEXT), FIRST_TABLE.values(), strict=True):
        methods = measured(file)
        ours = [m for n, m in methods.items() if not n.startswith("transformers")]
        assert all(m["identical"] == m["prompts"] for m in ours)
        check_row(row, methods[name])


def test_the_results_table_was_measured():
    text = (ROOT / "results/README.md").read_text("utf-8")
    file = "results/cpu-tiny.json"
    methods = measured(file)
    assert json.loads((ROOT / file).read_text("utf-8"))["command"] in text
    assert [row["method"] for row in rows(text)] == [*methods]
    for row in rows(text):
        method = methods[row["method"]]
        check_row(row, method)
        assert printed(row["tokens a full pass"], method["tokens_per_target_pass"])
        assert row["identical"] == f"{method['identical']}/{method['prompts']}"
