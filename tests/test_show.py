"""Watching a generation: what the terminal shows is what was generated."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cases, random_model
from hypothesis import example, given
from hypothesis import strategies as st
from test_page import Tags, replay

from arguments import Event, Generation, LevelStats
from checkpoints.files import must_be_writable
from hispec import generate
from show import __main__, page, terminal

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(__main__, "kept_dtype", lambda header, load: torch.float32)


def letter(token: int) -> bytes:
    return bytes([ord("A") + token])


def painted(model, prompt, n, **options):
    painter, pieces = terminal.Painter(tuple(options.get("exits", ())), letter), []
    out = generate(
        model, prompt, n, **options, watch=lambda event: pieces.append(painter.see(event))
    )
    return out, "".join(piece for piece in pieces if piece)


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_what_is_not_struck_through_is_the_text(case, temperature):
    out, text = painted(
        case.model,
        case.prompt,
        case.max_new_tokens,
        **case.arguments,
        temperature=temperature,
        seed=1,
    )
    standing = re.sub(re.escape(terminal.FALLEN) + ".*?" + re.escape(terminal.PLAIN), "", text)
    standing = re.sub("⟨[a-z0-9 -]+⟩", "", standing)  # who rejected them
    assert re.sub("\033\\[[0-9;]*m", "", standing) == b"".join(map(letter, out.tokens)).decode()


def test_each_token_has_the_colour_of_the_level_that_wrote_it():
    model = random_model(3)
    _, plain = painted(model, [1, 2], 20)
    assert set(re.findall("\033\\[[0-9;]+m(?=[A-Z])", plain)) == {terminal.FULL}
    out, text = painted(model, [1, 2], 20, exits=(1, 3), windows=(2, 4))
    first, middle = terminal.COLOURS[:2]
    text = re.sub("\033\\[[0-9;]+m⟨.*?⟩", "", text)  # who rejected a draft
    # one token of its own a pass, but for what the end cuts off
    assert text.count(terminal.FULL) <= out.levels[2].calls
    assert text.count(first) + text.count(middle) + text.count(terminal.FULL) == len(out.tokens)
    assert terminal.FALLEN in text
    _, looked_up = painted(model, [1, 2] * 5, 20, exits=(0, 3), windows=(3, 4))
    assert first in looked_up and middle in looked_up


def test_what_fell_is_one_line_and_says_who_rejected_it():
    spelt = {1: b"def", 2: b"\n\n    return", 3: b"x\n", 4: b"!"}
    painter = terminal.Painter((2, 8), spelt.__getitem__)
    assert painter.see(Event(0, 5, [], 0, [2], [], 0.0)) is None
    assert painter.see(Event(1, 5, [2, 3], 0, [1], [], 0.0)) is None
    settled = painter.see(Event(2, 5, [1, 3], 1, [1, 4], [], 0.0))
    first, middle, full = painter.colours
    fallen, plain = terminal.FALLEN, terminal.PLAIN
    assert settled == (
        f"{fallen}↵↵    returnx↵{plain}{middle}⟨exit 8⟩{plain}{middle}def{plain}"
        f"{fallen}x↵{plain}{full}⟨full model⟩{plain}{full}!{plain}"
    )
    assert "exit 2" in painter.legend() and "rejected" in painter.legend()


def made(tokens: int, seconds: float, prefill: float, *levels: LevelStats) -> Generation:
    return Generation([0] * tokens, list(levels), seconds, prefill)


def test_the_numbers_at_the_end():
    """Speed is that after the first token, which has to wait for the prompt."""
    levels = LevelStats(0, proposed=5, accepted=3), LevelStats(8, proposed=9, accepted=7)
    out = made(21, 3.0, 1.0, *levels, LevelStats(32, calls=6))
    alone = made(5, 2.0, 1.0, LevelStats(32, calls=5))
    first = "21 tokens in 6 full passes; accepted: look-up 3/5, exit 8 7/9"
    second = "first token after 1.00 s, then 10.0 tokens/s; greedy 4.0 (its first 5 tokens): 2.50x"
    assert terminal.statistics(out, alone, "greedy") == [first, second]
    faster = made(5, 1.1, 1.0, LevelStats(32, calls=5))
    last = "the ladder loses on this prompt: greedy decoding is faster"
    assert terminal.statistics(out, faster, "greedy")[2:] == [last]
    short = made(1, 1.0, 1.0, LevelStats(32, calls=1))
    lines = ["1 tokens in 1 full passes", "first token after 1.00 s"]
    assert terminal.statistics(short, alone, "greedy") == lines


def shown_byte_by_byte(data: bytes) -> list[str]:
    """What each of these tokens adds to the terminal, a byte a token, and what is left at the
    end."""
    painter = terminal.Painter((), lambda token: bytes([token]))
    pieces = [painter.see(Event(0, i, [], 0, [token], [i], 0.0)) for i, token in enumerate(data)]
    settled = [piece.removeprefix(terminal.FULL).removesuffix(terminal.PLAIN) for piece in pieces]
    return [*settled, painter.characters.decode(b"", final=True)]


@given(st.text())
@example("a😀é日")
def test_a_character_is_shown_with_its_last_byte(text):
    assert [piece for piece in shown_byte_by_byte(text.encode()) if piece] == [*text]


@given(st.binary(max_size=30))
@example(b"\xf0\x9f\x98")
@example(b"\xe2\x28\xa1\xff\xc3")
def test_bytes_that_are_no_character_are_shown_as_such(data):
    assert "".join(shown_byte_by_byte(data)) == data.decode("utf-8", "replace")


# As `python -m show`, but for where the number of threads is kept.
COMMAND = """
import runpy, sys
from pathlib import Path
from lab import tune
tune.LADDERS = Path(sys.argv.pop(1))
runpy.run_module("show", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def show_command(tmp_path_factory):
    """show_command(*arguments, cwd=...) -> the finished process."""
    kept = tmp_path_factory.mktemp("kept") / "ladders.json"

    def run(*arguments, cwd=ROOT):
        command = [sys.executable, "-c", COMMAND, str(kept), *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8"
        )

    return run


def test_the_command_prints_plain_text_where_there_is_no_terminal(show_command):
    run = show_command("def add(a, b):", "--max-new-tokens", "8")
    assert run.returncode == 0, run.stderr
    assert "\033" not in run.stdout
    assert "8 tokens in" in run.stdout and "accepted: exit 2" in run.stdout
    assert "\nladder: 2(2) 8(4), the model's own exits\n" in run.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--exits", "9", "3"], "ascend"),
        (["--model", "none/such"], "none/such"),
        (["--step"], "unrecognized arguments: --step"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(show_command, arguments, message):
    run = show_command("a prompt", *arguments)
    assert run.returncode == 1
    assert (
        run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and message in run.stderr
    )


def test_the_command_prints_as_ever_and_writes_the_page(show_command, tmp_path):
    run = show_command("def add(a, b):", "--max-new-tokens", "8", "--html", "a.html", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = re.fullmatch(
        r"[^\n]+\nprompt: plain text\nladder: [^\n]+\n(.*?)\n(8 tokens in .*)\n([^\n]+)\n",
        run.stdout,
        re.S,
    )
    assert lines is not None, run.stdout
    text, statistics, last = lines.groups()
    assert "; greedy " in statistics and last == "to play it back: a.html"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    trace = json.loads(Tags((tmp_path / "a.html").read_text("utf-8")).inside["script"][0])
    assert (trace["model"], trace["question"], trace["depths"]) == (
        "tiny",
        "def·add(a,·b):",
        [2, 8, 32],
    )
    _, shown = replay(trace, len(trace["events"]))
    standing = "".join(cell["piece"] for cell in shown if cell["state"] == "settled")
    assert standing == page.visible(text)


@pytest.mark.parametrize(
    "path, message",
    [("no/such/a.html", "No such file"), (".", "is a folder"), ("folder", "is a folder")],
)
def test_a_path_that_cannot_be_written_is_told_before_any_work(
    show_command, tmp_path, path, message
):
    (tmp_path / "folder").mkdir()
    run = show_command(
        "a prompt", "--model", "none/such", "--html", path, cwd=tmp_path
    )  # no model: nothing can start
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith(f"error: cannot write to '{path}': ")
    assert run.stderr.count("\n") == 1 and message in run.stderr and ".html." not in run.stderr
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
        watched.append(options.get("watch"))
        return generate(*arguments, **options)

    monkeypatch.setattr(__main__, "generate", spy)
    monkeypatch.setattr(__main__, "kept_threads", lambda header, model: 1)
    extra = ["--html", str(tmp_path / "a.html")] if html_wanted else []
    monkeypatch.setattr(sys, "argv", ["show", "x", "--max-new-tokens", "2", *extra])
    __main__.main()
    # a warm-up, the ladder, the full model alone
    assert [watch is not None for watch in watched] == [False, html_wanted, html_wanted]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--exits", "8", "2"], r"from 0 on, got \(8, 2\)"),
        (["--exits", "-1"], "from 0 on"),
        (["--max-new-tokens", "few"], "invalid int value: 'few'"),
        (["--html", "no/such/a.html"], "cannot write to"),
        (["--max-new-tokens", "0"], "at least 1, got 0"),
        (["--windows", "2", "0"], r"at least 1 each, got \(2, 0\)"),
        (["--windows", "2"], "one length for each of the 2 exits"),
        (["--exits", "2", "--windows", "2", "4"], "one length for each of the 1 exits"),
        (["--temperature", "-1"], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--top-k", "-3"], "top_k must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_arguments_are_looked_at_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(__main__, "load", lambda *arguments: pytest.fail("work was begun"))
    monkeypatch.setattr(sys, "argv", ["show", "x", *arguments])
    with pytest.raises(ValueError, match=message):
        __main__.main()


def test_an_exit_past_the_depth_is_refused_before_threads_are_searched_for(monkeypatch):
    for search in ("kept_dtype", "kept_threads"):
        monkeypatch.setattr(__main__, search, lambda *arguments: pytest.fail("work was begun"))
    monkeypatch.setattr(sys, "argv", ["show", "x", "--exits", "2", "99"])
    with pytest.raises(ValueError, match="within 0..31"):
        __main__.main()


@pytest.mark.parametrize("pause", [False, True])
def test_a_pause_comes_before_each_verification_by_the_full_model(monkeypatch, capsys, pause):
    waited, made = [], []

    def spy(*arguments, **options):
        made.append(generate(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(__main__, "generate", spy)
    monkeypatch.setattr(__main__, "kept_threads", lambda header, model: 1)
    monkeypatch.setattr(__main__, "coloured", lambda: True)
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now.append(now[-1] + 0.001) or now[-1])

    def enter():
        waited.append(None)
        now.append(now[-1] + 1000)
        if len(waited) > 1:
            raise EOFError  # nobody there any more: it goes on

    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setattr(sys, "argv", ["show", "x", "--max-new-tokens", "12", *["--pause"] * pause])
    __main__.main()
    assert len(waited) == (made[1].levels[-1].calls if pause else 0)  # made[0] warms up
    assert 0 < made[1].seconds < 1000  # the waits are not the model's
    printed = capsys.readouterr().out
    assert f"{terminal.DIM}x{terminal.PLAIN}" in printed and "full model" in printed


def test_sampling_is_passed_on_to_both(monkeypatch, capsys):
    asked = []

    def spy(*arguments, **options):
        asked.append([options[name] for name in ("temperature", "top_k", "top_p", "seed")])
        return generate(*arguments, **options)

    monkeypatch.setattr(__main__, "generate", spy)
    monkeypatch.setattr(__main__, "kept_threads", lambda header, model: 1)
    told = "show x --max-new-tokens 4 --temperature 0.7 --top-k 5 --top-p 0.9 --seed 3"
    monkeypatch.setattr(sys, "argv", told.split())
    __main__.main()
    assert asked == [[0.7, 5, 0.9, 3]] * 3
    assert "tokens/s; plain " in capsys.readouterr().out


def test_the_fastest_kept_ladder_is_the_default(monkeypatch):
    kept = {"exits": [0, 8], "windows": [12, 12], "thresholds": [0.0, 0.0]}, "the fastest kept"
    model = random_model(n_layers=9)
    monkeypatch.setattr(__main__, "kept_ladder", lambda header, model: kept)
    assert __main__.choose(None, None, model, {}) == kept
    own, why = __main__.choose(None, [3, 6], model, {})
    assert own == {"exits": (2, 3), "windows": [3, 6], "thresholds": ()} and "own exits" in why
    asked, why = __main__.choose([1, 4, 5], None, model, {})
    assert (asked["exits"], asked["windows"], why) == ((1, 4, 5), [2, 4, 8], "as asked")
    monkeypatch.setattr(__main__, "kept_ladder", lambda header, model: None)
    assert __main__.choose(None, None, model, {})[0]["windows"] == [2, 4]


def test_the_faster_dtype_is_taken_and_said(monkeypatch, capsys):
    ran = []

    def spy(model, *arguments, **options):
        ran.append(model.embed.weight.dtype)
        return generate(model, *arguments, **options)

    monkeypatch.setattr(__main__, "generate", spy)
    monkeypatch.setattr(__main__, "kept_threads", lambda header, model: 1)
    monkeypatch.setattr(__main__, "kept_dtype", lambda header, load: torch.bfloat16)
    monkeypatch.setattr(sys, "argv", ["show", "x", "--max-new-tokens", "3"])
    __main__.main()
    assert ran == [torch.bfloat16] * 3
    assert "tiny in bfloat16 on " in capsys.readouterr().out
