"""Files that appear whole or not at all, and what is said where they cannot."""

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoints.files import must_be_writable, write_whole


@pytest.mark.parametrize(
    "path, why", [("no/such/a", "No such file or directory"), ("file/a", "Not a directory")]
)
def test_no_draft_is_named(tmp_path, path, why):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as refused:
        must_be_writable(tmp_path / path)
    assert str(refused.value) == f"cannot write to '{tmp_path / path}': {why}"
    with pytest.raises(OSError) as failed:
        write_whole(tmp_path / path, lambda to: to.write_text("x"))
    assert str(failed.value).endswith(f"{why}: '{tmp_path / path}'")


def test_no_draft_is_named_where_a_folder_stands(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=f"Is a directory: '{tmp_path / 'folder'}'$"):
        write_whole(tmp_path / "folder", lambda to: to.write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("a new file", "an old one"):
        must_be_writable(tmp_path / "link")
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "file").read_text() == text and (tmp_path / "link").is_symlink()
    assert len([*tmp_path.iterdir()]) == 2


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe': it is no ordinary file"):
        must_be_writable(tmp_path / "pipe")


def test_weights_may_be_read_by_whoever_may_read_texts(tmp_path):
    write_whole(tmp_path / "text", "x")
    write_whole(tmp_path / "weights", lambda to: save_file({"x": torch.zeros(1)}, to))
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "text").stat().st_mode


def test_what_safetensors_cannot_write_is_an_error_of_the_system(tmp_path):
    def fill(to):
        raise SafetensorError("no space")

    with pytest.raises(OSError, match="weights: no space"):
        write_whole(tmp_path / "weights", fill)
    assert [*tmp_path.iterdir()] == []
