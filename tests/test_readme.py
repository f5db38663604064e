"""What the README and the texts beside it point at: links, files, commands, and measured numbers."""

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
PROGRAMS = ["bench.py", "train_exits.py", "show", "show.picture", "lab.train", "lab.rules"]
# of git, pip, torchrun and tar
OTHERS = {"--depth", "--no-deps", "--nproc_per_node", "--strip-components"}
# the rows of the first table: the file, and the method in it
FIRST_TABLE = [
    ("results/cpu-tiny.json", "hispec"),
    ("results/cpu-tiny.json", "look-up, exit"),
    ("results/gpu-tiny.json", "hispec"),
    ("results/cpu-smollm2.json", "hispec"),
]
COLUMNS = {  # of the results table, and the bench's names for them
    "tokens/s": "tokens_per_second",
    "over greedy": "speedup_vs_greedy",
    "over single-layer": "speedup_vs_single_layer",
    "tokens a full pass": "tokens_per_target_pass",
}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def rows(text: str) -> list[dict[str, str]]:
    """The first table of a text, a dict a row."""
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


@cache
def options(program: str) -> set[str]:
    program = [program] if program.endswith(".py") else ["-m", program]
    command = [sys.executable, *program, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[\w-]+", run.stdout))


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_every_flag_exists(file):
    text = file.read_text("utf-8").replace("\\\n", " ")
    for command in re.findall(r"(?:^    |&& |`)(python .*|torchrun .*)$", text, re.M):
        for name in PROGRAMS:
            if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", command):
                flags = set(re.findall(r"--[\w-]+", command.split("`")[0])) - OTHERS
                assert flags <= options(name), command
    known = OTHERS.union(*(options(name) for name in PROGRAMS))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


def test_the_example_runs():
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "LevelStats(exit=32" in run.stdout


# ---- measured numbers ---------------------------------------------------------------------------


def test_the_first_table_was_measured():
    """In runs whose greedy texts were all greedy's own."""
    for row, (file, name) in zip(rows(TEXT), FIRST_TABLE, strict=True):
        methods = measured(file)
        ours = [m for n, m in methods.items() if not n.startswith("transformers")]
        assert all(m["identical"] == m["prompts"] for m in ours)
        method = methods[name]
        _, *cells = row.values()
        for cell, key in zip(cells, ("speedup_vs_greedy", "speedup_vs_single_layer"), strict=True):
            greedy, sampled = re.findall(r"([\d.]+)x", cell)
            assert printed(greedy, method[key]), (row, key)
            assert printed(sampled, method["sampled"][key]), (row, key)


def test_the_results_table_was_measured():
    text = TEXT.split("\n# Results\n")[1].split("\n# ")[0]
    source = re.search(r"\]\((results/[\w-]+\.json)\)", text)
    assert source and json.loads((ROOT / source[1]).read_text("utf-8"))["command"] in text
    methods = measured(source[1])
    assert [row["method"] for row in rows(text)] == [*methods]
    for row in rows(text):
        method = methods[row["method"]]
        for column, key in COLUMNS.items():
            assert printed(row[column], method[key]), (row["method"], column)
            if column.startswith("over"):
                assert printed(row[f"sampled, {column}"], method["sampled"][key]), row["method"]
        ladder = method["exits"], method["windows"], method["thresholds"]
        assert row["ladder"] == ladder_text(*ladder)
        assert row["identical"] == f"{method['identical']}/{method['prompts']}"
