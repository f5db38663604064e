"""Files appear whole or not at all, and the errors if they cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoints.files import must_be_writable, write_whole


@pytest.mark.parametrize(
    "path, why",
    [
        ("no/such/a", "No such file or directory"),
        ("file/a", "Not a directory"),
        ("folder", "(it is a folder|Is a directory)"),
    ],
)
def test_where_no_file_can_be_the_reader_is_told_its_own_name(tmp_path, path, why):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"^cannot write to '{tmp_path / path}': {why}$"):
        must_be_writable(tmp_path / path)
    with pytest.raises(OSError, match=f"{why}: '{tmp_path / path}'$"):
        write_whole(tmp_path / path, lambda to: to.write_text("x"))
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder"}


def test_a_link_is_written_through_and_a_pipe_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("a new file", "an old one"):
        must_be_writable(tmp_path / "link")
        write_whole(tmp_path / "link", text)
        must_be_writable(tmp_path / "file")
        assert (tmp_path / "file").read_text() == text and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe': it is no ordinary file"):
        must_be_writable(tmp_path / "pipe")
    assert {file.name for file in tmp_path.iterdir()} == {"link", "file", "pipe"}


def test_weights_may_be_read_by_whoever_may_read_texts(tmp_path):
    write_whole(tmp_path / "text", "x")
    write_whole(tmp_path / "weights", lambda to: save_file({"x": torch.zeros(1)}, to))
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "text").stat().st_mode


def test_a_failed_write_leaves_nothing(tmp_path):
    def fill(to):
        raise SafetensorError("no space")

    with pytest.raises(OSError, match="weights: no space"):
        write_whole(tmp_path / "weights", fill)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("typed", ["-m measures.speed", "-m measures", "alone.py"])
def test_the_command_that_is_kept_can_be_typed_again(tmp_path, typed):
    script = "import torch, sys\nfrom checkpoints.files import describe\n"
    script += "print(describe('m', 'cpu', torch.float32)['command'])\n"
    (tmp_path / "measures").mkdir()
    for file in ("measures/speed.py", "measures/__main__.py", "alone.py"):
        (tmp_path / file).write_text(script)
    command = [sys.executable, *typed.split(), "--json", "a file"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == f"python {typed} --json 'a file'", done.stderr
