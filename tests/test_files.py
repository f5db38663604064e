"""Files that appear whole or not at all, and what is said where they cannot."""

import pytest

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
