"""Text to train on: what is held out, what an epoch reads, what a model writes side by side."""

from argparse import Namespace

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from texts import PROSE, write_family

from checkpoints.vocabulary import from_folder
from hispec import generate
from lab import corpus
from lab.installed import INSTALLED, is_held_out
from lab.variety import looped


def test_held_out_files_are_never_trained_on():
    names = corpus.read_corpus(None)
    held = {n for n in names if corpus.is_held_out(n)}
    assert 0.01 < len(held) / len(names) < 0.08
    assert not any({"site-packages", "test", "tests"} & set(n.split("/")) for n in names)
    assert 5e6 < sum(map(len, names.values())) < 3e7


@given(st.integers(40, 400), st.integers(1, 5), st.integers(1, 9))
def test_an_epoch_reads_every_window_once(length, rows, context):
    text = torch.arange(length)
    windows = (length - 1) // context - 1
    if windows < 1:
        return
    starts = []
    for step in range(-(-windows // rows)):
        batch = corpus.batch(text, step, rows, context, seed=0)
        assert batch.shape == (rows, context + 1)
        assert (batch[:, 1:] == batch[:, :-1] + 1).all()
        starts += batch[:, 0].tolist()
    first_epoch = starts[:windows]
    assert len(set(first_epoch)) == windows
    assert len({start % context for start in first_epoch}) == 1


@given(st.integers(1, 60), st.integers(0, 70))
def test_every_row_of_a_step_counts_alike(rows, most):
    sizes = [len(part) for part in torch.zeros(rows).chunk(corpus.equal_parts(rows, most))]
    assert sum(sizes) == rows and len(set(sizes)) == 1
    assert sizes[0] <= max(1, most)
    larger = [n for n in range(sizes[0] + 1, max(1, most) + 1) if rows % n == 0]
    assert larger == []


def test_sampling_side_by_side_is_greedy_decoding():
    model = random_model().float()
    openings = torch.randint(11, (3, 4))
    rows = corpus.sample(model, openings, 20, torch.tensor([False, True, False]))
    for i in (0, 2):
        assert (
            rows[i].tolist()
            == openings[i].tolist() + generate(model, openings[i].tolist(), 16).tokens
        )


def test_own_loops_are_marked_where_a_model_repeats_itself():
    model, rows = random_model().float(), torch.randint(11, (6, 41))
    own, inside = corpus.own_loops(model, rows)
    for row, made, mark in zip(rows.tolist(), own.tolist(), inside):
        assert made == row[:20] + generate(model, row[:20], 21).tokens
        assert set(mark.nonzero().flatten().tolist()) == {i for i in looped(made, 4) if i >= 20}
    assert inside.any() and not inside.all(0)[20:].any()


def test_installed_packages_without_tables_copies_and_links(site):
    documents = corpus.read_corpus(INSTALLED)
    library, packages = (
        corpus.read_corpus(None),
        {n for n in documents if n.startswith("site-packages/")},
    )
    assert documents.keys() - packages == library.keys() and len(library) == 3
    assert packages == {
        f"site-packages/{n}" for n in ("plain/code.py", "plain/deep/code.py", "networkx/graph.py")
    }
    held = {name for name in documents if is_held_out(name)}
    assert "site-packages/networkx/graph.py" in held and held & library.keys()
    assert not is_held_out("networkx/graph.py")  # such a folder of one's own is not that package


@pytest.mark.parametrize(
    "name, chats", [("llama-3", True), ("llama-2 first", True), ("llama-2", False)]
)
def test_openings_are_the_templates(tmp_path, name, chats):
    """A question is left to the model only where a template says what a user's turn is: BOS alone is no chat."""
    write_family(name, tmp_path)
    (words := tmp_path / "words").mkdir()
    for i in range(60):
        (words / f"part{i}.txt").write_text(PROSE, "utf-8")
    tokenizer = from_folder(tmp_path, {"eos_token_id": 2}, 600)
    model, args = random_model(vocab_size=600), Namespace(corpus=words)
    openings, until = corpus.make_openings(
        model, tokenizer, args, 1, 5, torch.Generator().manual_seed(0)
    )
    framed, others = corpus.make_openings(
        model, tokenizer, args, 4, 5, torch.Generator().manual_seed(0)
    )
    assert until == (tokenizer.stop if chats else ()) and others == ()
    assert len(openings) == len(framed) == 5
    before = tokenizer.chat(["a"])[: openings.shape[1]]
    assert (openings.tolist()[0] == before) == chats
    assert (
        framed.shape[1] == len(tokenizer.chat(["a"])) + 11
        and (framed[:, 0] == tokenizer.bos[0]).all()
    )


def test_a_packed_model_writes_in_bfloat16():
    """As a model does that was loaded on a CPU: its samples are written by a copy."""
    model = random_model(vocab_size=2**15, tie_embeddings=False).float().pack()
    args = Namespace(
        bf16=True, context=4, self_distill=1, seed=0, model="m", device=torch.device("cpu")
    )
    rows = corpus.write_samples(model, None, args, 0, 1)
    assert rows.shape == (corpus.SIDE_BY_SIDE["cpu"], corpus.WHOLE * 4)
