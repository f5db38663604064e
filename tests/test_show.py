"""Watching a generation: what the terminal shows is what was generated."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cases, random_model
from hypothesis import example, given
from hypothesis import strategies as st

import show
from hispec import Event, generate

ROOT = Path(__file__).parent.parent


def letter(token: int) -> bytes:
    return bytes([ord("A") + token])


def painted(model, prompt, n, **options):
    painter, pieces = show.Painter(tuple(options.get("exits", ())), letter), []
    out = generate(model, prompt, n, **options, watch=lambda event: pieces.append(painter.see(event)))
    return out, "".join(piece for piece in pieces if piece)


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_what_is_not_struck_through_is_the_text(case, temperature):
    out, text = painted(case.model, case.prompt, case.max_new_tokens, **case.arguments, temperature=temperature, seed=1)
    standing = re.sub(re.escape(show.FALLEN) + ".*?" + re.escape(show.PLAIN), "", text)
    assert re.sub("\033\\[[0-9;]*m", "", standing) == b"".join(map(letter, out.tokens)).decode()


def test_each_token_has_the_colour_of_the_level_that_wrote_it():
    model = random_model(3)
    _, plain = painted(model, [1, 2], 20)
    assert set(re.findall("\033\\[[0-9;]+m(?=[A-Z])", plain)) == {show.FULL}
    out, text = painted(model, [1, 2], 20, exits=(1, 3), windows=(2, 4))
    first, middle = show.COLOURS[:2]
    assert text.count(show.FULL) <= out.levels[2].calls  # one token of its own a pass, but for what the end cuts off
    assert text.count(first) + text.count(middle) + text.count(show.FULL) == len(out.tokens)
    assert show.FALLEN in text
    _, looked_up = painted(model, [1, 2] * 5, 20, exits=(0, 3), windows=(3, 4))
    assert first in looked_up and middle in looked_up


def shown_byte_by_byte(data: bytes) -> list[str]:
    """What each of these tokens adds to the terminal, a byte a token, and what is left at the end."""
    painter = show.Painter((), lambda token: bytes([token]))
    pieces = [painter.see(Event(0, i, [], 0, [token], [i], 0.0)) for i, token in enumerate(data)]
    settled = [piece.removeprefix(show.FULL).removesuffix(show.PLAIN) for piece in pieces]
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


def hispec_command(*arguments):
    command = [sys.executable, "hispec.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_command_prints_plain_text_where_there_is_no_terminal():
    run = hispec_command("def add(a, b):", "--max-new-tokens", "8")
    assert run.returncode == 0, run.stderr
    assert "\033" not in run.stdout
    assert run.stdout.startswith("prompt: plain text\n")
    assert "8 tokens in" in run.stdout and "accepted: exit 2" in run.stdout


@pytest.mark.parametrize(
    "arguments, message", [(["--exits", "9", "3"], "ascend"), (["--model", "./none/such"], "none/such")]
)
def test_the_command_says_what_is_wrong_in_one_line(arguments, message):
    run = hispec_command("a prompt", *arguments)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and message in run.stderr
