"""The terminal shows exactly the text that was generated."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import cases, random_model
from hypothesis import example, given
from hypothesis import strategies as st
from test_page import Tags, replay
from texts import write_family

from arguments import Event, Generation, LevelStats, Options
from checkpoints import load
from checkpoints.console import visible
from checkpoints.files import describe
from checkpoints.ladders import save_ladders
from checkpoints.vocabulary import from_folder
from hispec import generate
from show import __main__, page, terminal

ROOT = Path(__file__).parent.parent
LADDER = ["--ladder", "2(2) 8(4)"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder for a machine's results, in which float32 is the faster dtype."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    faster("float32")


def faster(dtype: str) -> None:
    """Record this dtype as the faster one for `tiny`."""
    save_ladders(setting(dtype="either dtype"), {"dtype": dtype})


def setting(**others: str) -> dict:
    return {**describe("tiny", "cpu", torch.float32), "step": "packed", **others}


def asked(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["show", *arguments])


def letter(token: int) -> bytes:
    return bytes([ord("A") + token])


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_what_is_not_struck_through_is_the_text(case, temperature):
    painter, pieces = (
        terminal.Painter(terminal.level_names(Options(case.exits, case.windows)), letter),
        [],
    )
    options = dict(case.arguments, temperature=temperature, seed=1)
    watch = lambda event: pieces.append(painter.see(event))  # noqa: E731
    out = generate(case.model, case.prompt, case.max_new_tokens, **options, watch=watch)
    text = "".join(piece for piece in pieces if piece)
    standing = re.sub(re.escape(terminal.FALLEN) + ".*?" + re.escape(terminal.PLAIN), "", text)
    standing = re.sub("⟨[a-z0-9 -]+⟩", "", standing)  # who rejected them
    assert re.sub("\033\\[[0-9;]*m", "", standing) == b"".join(map(letter, out.tokens)).decode()


def test_a_token_has_its_levels_colour_and_what_fell_says_who_rejected_it():
    spelt = {1: b"def", 2: b"\n\n    return", 3: b"x\n", 4: b"!", 5: b"@"}
    painter = terminal.Painter(["exit 2", "exit 8", "full model"], spelt.__getitem__)
    for at, token in ((5, 5), (6, 2)):
        assert painter.see(Event(0, at, [], 0, [token], [], 0.0)) is None
    assert painter.see(Event(1, 5, [5, 2, 3], 1, [5, 1], [], 0.0)) is None
    settled = painter.see(Event(2, 5, [5, 1, 3], 2, [5, 1, 4], [], 0.0))
    first, middle, full = painter.colours
    fallen, plain = terminal.FALLEN, terminal.PLAIN
    assert settled == (
        f"{first}@{plain}{fallen}↵↵    returnx↵{plain}{middle}⟨exit 8⟩{plain}{middle}def{plain}"
        f"{fallen}x↵{plain}{full}⟨full model⟩{plain}{full}!{plain}"
    )


def test_the_numbers_at_the_end():
    """Speed is measured after the first token, which has to wait for the prompt."""

    def made(tokens: int, seconds: float, *levels: LevelStats) -> Generation:
        return Generation([0] * tokens, [*levels, LevelStats(32, calls=6)], seconds, 1.0)

    levels = LevelStats(0, proposed=5, accepted=3), LevelStats(8, proposed=9, accepted=7)
    out, alone = made(21, 3.0, *levels), made(5, 2.0)
    first = "21 tokens in 6 full passes; accepted: look-up 3/5, exit 8 7/9"
    second = "first token after 1.00 s, then 10.0 tokens/s; greedy 4.0 (its first 5 tokens): 2.50x"
    names = ["look-up", "exit 8", "full model"]
    assert terminal.statistics(out, names, alone, "greedy") == [first, second]
    last = "the ladder loses on this prompt: greedy decoding is faster"
    assert terminal.statistics(out, names, made(5, 1.1), "greedy")[2:] == [last]
    lines = ["1 tokens in 6 full passes", "first token after 1.00 s"]
    assert terminal.statistics(made(1, 1.0), names, alone, "greedy") == lines


@given(st.text().map(str.encode) | st.binary(max_size=30))
@example("a😀é日".encode())
@example(b"\xf0\x9f\x98")
@example(b"\xe2\x28\xa1\xff\xc3")
def test_a_character_is_shown_with_its_last_byte_and_what_is_none_as_such(data):
    """Each byte is a token here."""
    painter = terminal.Painter(["full model"], lambda token: bytes([token]))
    pieces = [painter.see(Event(0, i, [], 0, [token], [i], 0.0)) for i, token in enumerate(data)]
    shown = [piece.removeprefix(terminal.FULL).removesuffix(terminal.PLAIN) for piece in pieces]
    shown.append(painter.characters.decode(b"", final=True))
    text = data.decode("utf-8", "replace")
    assert "".join(shown) == visible(text)
    if text.encode() == data:
        assert [piece for piece in shown if piece] == [visible(character) for character in text]


def test_what_a_terminal_would_obey_is_shown():
    spelt = {1: b"\x1b[2J", 2: b"a\x08b\r\n", 3: b"\x07"}
    painter = terminal.Painter(["exit 2", "full model"], spelt.__getitem__)
    painter.see(Event(0, 5, [], 0, [3], [], 0.0))
    settled = painter.see(Event(1, 5, [3, 1], 0, [1], [], 0.0))
    settled += painter.see(Event(1, 6, [], 0, [2], [], 0.0))
    text = re.sub("\033\\[[0-9;]*m", "", settled)  # the colours
    assert text == "␇␛[2J⟨full model⟩␛[2Ja␈b␍\n"


def show(*arguments, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    """`python -m show`, finished."""
    command, env = [sys.executable, "-m", "show", *arguments], {**os.environ, **environment}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_has_colours_unless_no_color_is_set_to_something(monkeypatch, capsys, no_color):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    asked(monkeypatch, "# \x1b[31m\x08x", "--max-new-tokens", "8", *LADDER)
    __main__.main()
    written = capsys.readouterr().out
    assert (terminal.FULL in written) == (no_color == "")
    assert "\x1b[31m" not in written and "\x08" not in written
    assert ("# ␛[31m␈x" in written) == (no_color == "")  # plain text does not repeat it


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "none/such"], "none/such"),
        (["--step"], "unrecognized arguments: --step"),
        (["--model", "none/such", "--html", "."], "cannot write to '.': it is a folder"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line_before_any_work(arguments, message):
    run = show("a prompt", *arguments)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr


def test_the_command_prints_plain_text_and_writes_the_page(tmp_path):
    arguments = ["--max-new-tokens", "8", *LADDER, "--ladder", "0(2) 8(4)", "--html", "a.html"]
    run = show("def add(a, b):", *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    ladder = r"ladder: 2\(2\) 8\(4\), as asked"
    lines = re.fullmatch(
        rf"[^\n]+\nprompt: plain text\n{ladder}\n(.*?)\n(8 tokens in .*)\n([^\n]+)\n",
        run.stdout,
        re.S,
    )
    assert lines is not None and "\033" not in run.stdout, run.stdout
    text, statistics, last = lines.groups()
    assert "accepted: exit 2" in statistics and "; greedy " in statistics
    assert last == "to play it back: a.html"
    trace = json.loads(Tags((tmp_path / "a.html").read_text("utf-8")).inside["script"][0])
    assert (trace["model"], trace["question"]) == ("tiny", "def·add(a,·b):")
    assert [run["depths"] for run in trace["runs"]] == [[2, 8, 32], [0, 8, 32]]
    for run in trace["runs"]:
        _, shown = replay(trace | run, len(run["events"]))
        standing = "".join(cell["piece"] for cell in shown if cell["state"] == "settled")
        assert standing == page.visible(text)


@pytest.mark.parametrize("html", [True, False])
def test_the_page_is_written_though_nobody_reads_what_is_printed(tmp_path, html):
    """python -m show ... --html a.html | head -1"""
    command = [sys.executable, "-m", "show", "x", "--max-new-tokens", "4"]
    command += ["--html", str(tmp_path / "a.html")] if html else []
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout and run.stderr
    assert not html or run.stdout.readline().startswith(b"tiny in ")
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)
    assert (tmp_path / "a.html").exists() == html


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ladder", "8(1) 2(2)"], r"from 0 on, got \(8, 2\)"),
        (["--ladder", "8"], "a ladder is written as"),
        (["--ladder", "2(1)", "--ladder", "8(1)"], "several ladders are for a page"),
        (["--max-new-tokens", "0"], "at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be"),
        (["--top-k", "-3"], "top_k must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_arguments_are_looked_at_before_a_model_is_loaded(monkeypatch, arguments, message):
    asked(monkeypatch, "x", "--model", "none/such", *arguments)
    with pytest.raises(ValueError, match=message):
        __main__.main()


def test_an_exit_past_the_depth_is_refused_before_threads_are_searched_for(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("OMP_NUM_THREADS")
    asked(monkeypatch, "x", "--ladder", "2(1) 99(1)")
    with pytest.raises(ValueError, match=r"within 0\.\.31"):
        __main__.main()
    assert not (tmp_path / "empty").exists()


class Reader(io.StringIO):
    """A user who presses Enter four times, each after a tenth of a second, and then leaves."""

    pressed = 0

    def readline(self, *size):
        if self.pressed == 4:
            return ""
        time.sleep(0.1)
        self.pressed += 1
        return "\n"


def test_a_pause_comes_before_each_verification_by_the_full_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", reader := Reader())
    model, ladder, printed = random_model(3), dict(exits=(1, 3), windows=(2, 4)), []
    for pause in (True, False):
        watcher = __main__.Watcher(
            terminal.Painter(["exit 1", "exit 3", "full model"], letter), pause
        )
        out = generate(model, [1, 2], 40, **ladder, watch=watcher)
        assert out.levels[-1].calls > reader.pressed == 4
        assert (0.4 < watcher.waited < out.seconds) if pause else watcher.waited == 0
        # the waits are not the model's
        assert watcher.events[-1].seconds <= out.seconds - 0.4 * pause
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count(terminal.FULL) > 4


def test_sampled_text_is_what_generate_writes_with_the_same_seed(monkeypatch, capsys):
    told = "--max-new-tokens 12 --temperature 0.9 --top-k 50 --top-p 0.9 --seed 3"
    asked(monkeypatch, "def add(a, b):", *told.split(), *LADDER)
    __main__.main()
    printed = capsys.readouterr().out
    model, tokenizer = load("tiny", "cpu")
    options = dict(temperature=0.9, top_k=50, top_p=0.9, seed=3, stop=tokenizer.stop)
    options |= dict(exits=(2, 8), windows=(2, 4))
    out = generate(model, prompt := tokenizer.chat(["def add(a, b):"]), 12, **options)
    text = tokenizer.decode(out.tokens, after=prompt)
    assert f"\n{text}\n" in printed and "tokens/s; plain " in printed


def test_a_continuation_keeps_its_blank(monkeypatch, capsys, tmp_path):
    """Sentencepiece drops the blank that begins a text, but the text shown continues the prompt."""
    write_family("llama-2", tmp_path)
    tokenizer = from_folder(tmp_path, {}, 1000)
    spelt = {id: tokenizer.spell(id) for id in range(tokenizer.n_vocab)}
    word = next(id for id, text in spelt.items() if len(text) > 2 and text.startswith(b" "))
    out = Generation([word] * 3, [LevelStats(5, calls=3)], 1.0, 0.5)
    monkeypatch.setattr(__main__, "loaded", lambda args: (random_model(), tokenizer, setting()))
    monkeypatch.setattr(__main__, "generate", lambda *_, **options: out)
    asked(monkeypatch, "a", "--ladder", "1(1)")
    __main__.main()
    assert f"\n{3 * spelt[word].decode()}\n" in capsys.readouterr().out


def test_a_prompt_that_ends_in_a_blank_is_told_what_to_do(monkeypatch, capsys):
    for prompt, told in (("def f(x):", False), ("def f(x):\n", True), ("    if x:\n  ", True)):
        asked(monkeypatch, prompt, "--max-new-tokens", "1", *LADDER)
        __main__.main()
        assert ("leave it out" in capsys.readouterr().out) == told


def test_the_fastest_kept_ladder_is_the_default(monkeypatch):
    """On a page, other tuned ladders are shown next to it."""
    model, header = random_model(n_layers=9), setting(model="random", dtype="float64")
    own, why = __main__.choose([], model, header)
    assert own == [Options((2, 3), (2, 4))] and "own exits" in why
    kept = {"exits": [0, 8], "windows": [12, 12], "thresholds": [0.0, 0.2], "measured": 2.0}
    slower = {"exits": [1, 8], "windows": [2, 12], "thresholds": [0.0, 0.0], "measured": 0.9}
    alone = {"exits": [1], "windows": [3], "thresholds": [0.0], "measured": 1.2}
    save_ladders(header, {"look-up, exit": kept, "hispec": slower, "draft alone": alone})
    found, why = __main__.choose([], model, header)
    look_up = Options((0, 8), (12, 12), (0.0, 0.2))
    assert found == [look_up, Options((1,), (3,))] and "this machine" in why
    chosen, why = __main__.choose(["1(2) 4(4 <0.1)"], model, header)
    assert chosen == [Options((1, 4), (2, 4), (0.0, 0.1))] and why == "as asked"


def test_the_faster_dtype_is_taken_and_said(monkeypatch, capsys):
    faster("bfloat16")
    asked(monkeypatch, "x", "--max-new-tokens", "2", *LADDER)
    __main__.main()
    assert "tiny in bfloat16 on " in capsys.readouterr().out
