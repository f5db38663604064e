"""What the commands refuse before any work, and how they say it."""

import pytest

from checkpoints.console import Parser, check_exits, command, must_take_files


@pytest.mark.parametrize("error", [ValueError("two\n  lines"), OSError("two\nlines")])
def test_what_is_wrong_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        command(main, "stopped")
    assert stop.value.code == "error: two; lines"  # which is printed, and the exit status is 1


def test_an_option_that_is_wrong_is_one_line_too():
    parser = Parser(description="a command")
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as stop:
        command(lambda: parser.parse_args(["--number", "x"]), "stopped")
    assert stop.value.code == "error: argument --number: invalid int value: 'x'"


def test_an_interruption_is_one_line():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        command(main, "stopped: nothing was written")
    assert stop.value.code == "\nstopped: nothing was written"


@pytest.mark.parametrize("exits", [(), (1,), (2, 8), (1, 31)])
def test_exits_that_ascend(exits):
    check_exits(exits, 1)
    check_exits(exits, 1, 32)
    check_exits((0, *exits), 0, 32)


@pytest.mark.parametrize("exits", [(8, 2), (2, 2), (0, 2), (-1,), (2, 32)])
def test_exits_that_do_not(exits):
    if max(exits) < 32:
        with pytest.raises(ValueError, match="exits must ascend strictly from 1 on, got"):
            check_exits(exits, 1)
    with pytest.raises(ValueError, match=r"exits must ascend strictly within 1..31, got"):
        check_exits(exits, 1, 32)


def test_a_folder_is_tried_and_nothing_left_behind(tmp_path):
    must_take_files(tmp_path / "new" / "below")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    must_take_files(tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "kept"]


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^cannot write to '{tmp_path / folder}': [A-Z][a-z ]*$"):
        must_take_files(tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
