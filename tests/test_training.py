"""What --resume refuses: a checkpoint of another run, another vocabulary, a damaged file."""

import pytest
import torch
from safetensors.torch import save

import train_exits

OPTIONS = "--layers 2 --dim 16 --heads 2 --ffn 16 --vocab 260 --exits 1 --batch 64 --context 8"


def train(folder, corpus, options=""):
    asked = [*OPTIONS.split(), "--steps", "1", *options.split()]
    train_exits.main(["--out", str(folder / "run"), "--corpus", str(folder / corpus), *asked])


@pytest.fixture
def run(tmp_path):
    """A folder with two corpora of the same size, and a run of one step over the first."""
    for corpus, line in (("one", "if x:\n    y = 1\n"), ("two", "for i in range(3):\n    f(i)\n")):
        (tmp_path / corpus).mkdir()
        for i in range(60):
            (tmp_path / corpus / f"part{i:02}.txt").write_text(line * 20, "utf-8")
    train(tmp_path, "one")
    return tmp_path


def files(folder):
    return {f: f.read_bytes() for f in (folder / "run").rglob("*") if f.is_file()}


def test_another_corpus_or_vocabulary_is_another_run(run):
    before = files(run)
    with pytest.raises(ValueError, match="its corpus is .*one, asked is .*two"):
        train(run, "two", "--resume")
    (run / "one").rename(run / "gone")  # the same place, another text
    (run / "two").rename(run / "one")
    with pytest.raises(ValueError, match="its vocabulary is"):
        train(run, "one", "--resume")
    assert files(run) == before


def test_another_way_to_train_is_another_run(run):
    before = files(run)
    for options in ("--draft-vocab 5", "--batch 128"):
        name = options.split()[0].removeprefix("--").replace("-", "_")
        with pytest.raises(ValueError, match=f"its {name} is"):
            train(run, "one", f"{options} --resume")
    assert files(run) == before


def test_a_checkpoint_that_was_cut_is_named(run):
    file = run / "run" / "training.safetensors"
    for damaged in (file.read_bytes()[:-100], save({"a": torch.zeros(1)})):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="training.safetensors is damaged, or of another kind"):
            train(run, "one", "--resume")
