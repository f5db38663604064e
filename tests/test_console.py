"""What the commands refuse before any work, their error messages, and their output."""

import io
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import pytest

from checkpoints.console import (
    Parser,
    check_exits,
    coloured,
    command,
    must_take_files,
    say,
    visible,
)


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("two\n  lines"), "error: two; lines"),
        (OSError("no tensor 'a\x1b[2Jb'"), "error: no tensor 'a\u241b[2Jb'"),
        (KeyboardInterrupt(), "\nstopped: nothing was written"),
        (None, "error: argument --number: invalid int value: 'x'"),
    ],
)
def test_what_is_wrong_is_one_line(error, line):
    parser = Parser(description="a command")
    parser.add_argument("--number", type=int)

    def main():
        if error:
            raise error
        parser.parse_args(["--number", "x"])

    with pytest.raises(SystemExit) as stop:
        command(main, "stopped: nothing was written")
    assert stop.value.code == line  # which is printed, and the exit status is 1


def test_exits_ascend():
    for exits in (), (2, 8), (1, 31):
        check_exits(exits, 1)
        check_exits((0, *exits), 0, 32)
    for exits in (8, 2), (2, 2), (0, 2):
        with pytest.raises(ValueError, match="exits must ascend strictly from 1 on, got"):
            check_exits(exits, 1)
    for exits in (8, 2), (2, 32):
        with pytest.raises(ValueError, match=r"exits must ascend strictly within 1..31, got"):
            check_exits(exits, 1, 32)


def test_a_folder_is_tried_and_nothing_left_behind(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    must_take_files(tmp_path / "new" / "below")
    must_take_files(tmp_path / "old")
    for folder in tmp_path / "file", tmp_path / "file" / "below":
        with pytest.raises(ValueError, match=f"^cannot write to '{folder}': [A-Z][a-z ]*$"):
            must_take_files(folder)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "old", "kept"}


# ---- what is printed ----------------------------------------------------------------------------


@contextmanager
def nobody_reads():
    """Make standard output a pipe whose other end is closed; yield what goes to standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    stream, errors = open(writer, "w", encoding="utf-8"), io.StringIO()
    with redirect_stdout(stream), redirect_stderr(errors):
        yield errors
    with suppress(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize("text", ["flushed at the end", "x" * 100_000])
def test_a_command_ends_quietly_when_nobody_reads(text):
    with nobody_reads() as errors:
        command(lambda: print(text), "stopped")
        print("falls on deaf ears")
    assert errors.getvalue() == ""


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_line_nobody_reads_ends_a_command_that_only_prints(keep_going):
    done = []

    def main():
        say("a line", keep_going=keep_going)
        say("another", keep_going=keep_going)
        done.append("the file is written")

    with nobody_reads() as errors:
        command(main, "stopped")
    assert bool(done) == keep_going and errors.getvalue() == ""


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch):
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding="cp1252"))
    command(lambda: say("caf\u00e9 \u4e2d \u241b"), "stopped")
    assert bytes_written.getvalue() == b"caf\xe9 \\u4e2d \\u241b" + os.linesep.encode()


@pytest.mark.parametrize(
    "text, seen",
    [
        ("def f():\n\t\u4e2d e\u0301 \U0001f468\u200d\U0001f469",) * 2,
        ("\x1b[31mred\x1b[0m\x08\r", "\u241b[31mred\u241b[0m\u2408\u240d"),
        ("\x00\x7f\x9b2J", "\u2400\u2421\u27e8U+009B\u27e92J"),
        ("a\u202eb\u2028c\u2066", "a\u27e8U+202E\u27e9b\u27e8U+2028\u27e9c\u27e8U+2066\u27e9"),
    ],
)
def test_what_moves_the_cursor_is_shown_as_a_sign(text, seen, capsys):
    assert visible(text) == seen
    say("a", text)
    assert capsys.readouterr().out == f"a {seen}\n"


def test_colours_where_a_terminal_shows_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not coloured()  # pytest's own output is none
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert coloured()
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: set, and not empty
    assert coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured()
