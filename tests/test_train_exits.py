"""train_exits.py: frozen weights keep every bit, exits get better, a killed run continues, errors
name the cause.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import module, random_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

import checkpoints
import train_exits
from checkpoints import vocabulary
from hispec import Step, generate
from kvcache import KVCache
from model import DraftHead, ExitHead, Llama

ROOT = Path(__file__).parent.parent
SHAPE = "--layers 4 --dim 32 --heads 2 --ffn 48 --vocab 300 --exits 1 2"
SPEED = "--batch 256 --micro 128 --context 16"
WORDS = ["if x:\n    y = 1\n", "for i in range(3):\n    f(i)\n", "return x + y\n", "# the sum\n"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty small files: sentences from a grammar that a tiny model learns in seconds."""
    folder, rng = tmp_path_factory.mktemp("corpus"), torch.Generator().manual_seed(1)
    for i in range(60):
        picks = torch.randint(len(WORDS), (100,), generator=rng).tolist()
        (folder / f"part{i:02}.txt").write_text("".join(WORDS[p] for p in picks), "utf-8")
    return folder


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, corpus):
    """A model trained briefly without exits, from which recipes 2 and 3 start."""
    out = tmp_path_factory.mktemp("trunk") / "run"
    train(out, corpus, f"{SHAPE} {SPEED} --steps 80 --exits")
    return out / "model"


def train(out, corpus, options, main=train_exits.main):
    main(["--out", str(out), "--corpus", str(corpus), *options.split()])
    return checkpoints.load(out / "model", "cpu", torch.float32)


def files(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def weights(folder):
    return checkpoints.load(folder / "model", "cpu", torch.float32)[0].state_dict()


def trunk_of(model):
    return {n: p for n, p in model.state_dict().items() if "_heads" not in n}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def held(tokenizer, folder):
    texts = train_exits.read_corpus(folder).values()
    return train_exits.held_rows(train_exits.encode(tokenizer, texts), 32)


def steps_of(run):
    with safe_open(run / "training.safetensors", "pt") as file:
        return json.loads(file.metadata()["run"])["step"]


# ---- the recipes --------------------------------------------------------------------------------


def test_from_scratch_learns_text_and_exits(tmp_path, corpus):
    model, tokenizer = train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --steps 80")
    rows = held(tokenizer, corpus)
    loss, agreement = train_exits.measure(model, rows)
    untrained, _ = train_exits.measure(Llama(model.config), rows)
    assert loss < untrained / 2
    assert model.exits == (1, 2) and min(agreement[:2]) > 0.6
    setting, command, title, *table = (tmp_path / "run/agreement.csv").read_text().splitlines()
    assert f"torch {torch.__version__}" in setting and command.startswith("# ")
    assert title == "layer,held_out_text" and [row[:2] for row in table] == ["1,", "2,", "3,"]
    prompt = tokenizer.encode("for i in")
    greedy = generate(model, prompt, 40)
    assert generate(model, prompt, 40, exits=(1, 2), windows=(2, 4)).tokens == greedy.tokens


@pytest.mark.parametrize("bf16", ["", "--bf16"])
def test_a_frozen_trunk_keeps_every_bit(tmp_path, monkeypatch, capsys, corpus, trunk, bf16):
    """Also, the command says so if bfloat16 is slow."""
    monkeypatch.setattr(train_exits, "bfloat16_takes", lambda: 3)
    before, _ = checkpoints.load(trunk, "cpu", torch.float32)
    options = f"--model {trunk} --freeze-trunk --exits 1 2 --width 24 --draft-vocab 60 {SPEED}"
    after, _ = train(tmp_path / "run", corpus, f"{options} --steps 10 {bf16}")
    assert_same(trunk_of(after), before.state_dict())
    heads = after.exit_heads.values()
    assert all(isinstance(head, ExitHead) and len(head.vocab) <= 60 for head in heads)
    assert ("3 times as long on this processor" in capsys.readouterr().out) == bool(bf16)


@pytest.mark.parametrize("exit", [2, 4])
def test_a_draft_head_learns_and_drafts(tmp_path, corpus, trunk, exit):
    """It learns several drafts in a row, on a trunk that keeps every bit; 4 is the full depth."""
    before, tokenizer = checkpoints.load(trunk, "cpu", torch.float32)
    options = f"--model {trunk} --draft-head {exit} {SPEED}"
    after, _ = train(tmp_path / "run", corpus, f"{options} --steps 60")
    assert_same(trunk_of(after), before.state_dict())
    assert after.exits == before.exits and list(after.draft_heads) == [str(exit)]
    *_, title, first, second, third = (tmp_path / "run/agreement.csv").read_text().splitlines()
    assert title == "draft,held_out_text"
    shares = [row.split(",")[1] for row in (first, second, third)]
    assert min(map(float, shares)) > 0.4
    names, *_, last = (tmp_path / "run/learning.csv").read_text().splitlines()
    assert names == "tokens,loss,draft 1,draft 2,draft 3"
    tokens, _, *learned = last.split(",")
    assert (tokens, learned) == (str(60 * 256), shares)
    ladder = dict(exits=(0,) if exit == 4 else (0, exit), draft_head=exit)
    text, accepted, proposed = (corpus / "part00.txt").read_text("utf-8"), 0, 0
    for prompt in (text[:60], text[:200], text[100:300]):
        ids = tokenizer.encode(prompt)
        out = generate(after, ids, 40, windows=(3, 4)[: len(ladder["exits"])], **ladder)
        assert out.tokens == generate(before, ids, 40).tokens
        accepted, proposed = accepted + out.levels[0].accepted, proposed + out.levels[0].proposed
    assert accepted / proposed > 0.25
    options = f"--model {tmp_path / 'run/model'} --draft-head {exit} {SPEED} --steps 1 --lr 1e-9"
    again, _ = train(tmp_path / "again", corpus, options)  # goes on with what it has learned
    torch.testing.assert_close(again.draft_heads.state_dict(), after.draft_heads.state_dict())


def test_a_draft_head_drafts_what_its_exit_knows(tmp_path, corpus, trunk):
    """The exit's own head, which knows few tokens, is kept as it is."""
    options = f"--freeze-trunk --exits 1 2 --width 24 --draft-vocab 60 {SPEED} --steps 5"
    exits, _ = train(tmp_path / "exits", corpus, f"--model {trunk} {options}")
    known = exits.exit_heads["2"].vocab.tolist()
    options = f"--model {tmp_path / 'exits/model'} {SPEED} --steps 5 --bf16"
    after, _ = train(tmp_path / "run", corpus, f"{options} --draft-head 2")
    assert after.draft_heads["2"].out.vocab.tolist() == known
    assert_same(exits.exit_heads.state_dict(), after.exit_heads.state_dict())
    options = f"--model {trunk} {SPEED} --steps 5 --draft-vocab 60"
    after, _ = train(tmp_path / "full", corpus, f"{options} --draft-head 4")
    assert len(after.draft_heads["4"].out.vocab) <= 60


def test_drafts_in_a_row_are_trained_as_decoding_makes_them(trunk):
    """Each draft of a chain from each position has the state that decoding gives it."""
    model, _ = checkpoints.load(trunk, "cpu", torch.float32, plain=True)
    model = model.double()
    model.draft_heads["2"] = DraftHead(model.config).double()
    ids = torch.arange(12) * 7 % model.config.vocab_size
    args = Namespace(context=12, draft_head=2, device=torch.device("cpu"), compile=False)
    recipe, seen = train_exits.LookBack(model, ids, args), []
    hook = recipe.head.block.register_forward_hook(lambda *passed: seen.append(passed[-1]))
    states, choices = recipe.run(ids)
    recipe.drafts(ids[None], states[None, :, 0], choices[None])
    hook.remove()
    with torch.inference_mode():
        for start in range(len(ids)):
            cache, step = KVCache(model, (0, 2), 12, draft_head=2), Step(model)
            before = torch.nn.functional.pad(states[None, :start, 0], (0, 0, 1, 0))
            state, _ = step.draft(cache, 2, before, ids[: start + 1], 0)
            for i, trained in enumerate(seen):
                position = start + i
                if position < len(ids):
                    torch.testing.assert_close(trained[0, position], state[0, 0])
                if position + 1 < len(ids):
                    state, _ = step.draft(cache, 2, state, ids[[position + 1]], position + 1)


def test_a_time_budget_ends_and_saves_the_run(tmp_path, corpus, monkeypatch):
    """Clocks of several processes differ; the time agreed on ends the loop and decides when to
    save.
    """
    train(tmp_path / "short", corpus, f"{SHAPE} {SPEED} --minutes 0.02")
    assert steps_of(tmp_path / "short") > 0
    clock = iter([0.0, 0.5, 1.0])  # read once per step; one more reading would find it exhausted
    monkeypatch.setattr(train_exits.Run, "progress", lambda run: next(clock))
    train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --minutes 9")
    assert steps_of(tmp_path / "run") == 2


# ---- data ---------------------------------------------------------------------------------------


def test_held_out_files_are_never_trained_on():
    documents = train_exits.read_corpus(None)
    text, held_out = train_exits.split(documents)
    assert sorted(text + held_out) == sorted(documents.values())
    assert 0.01 < len(held_out) / len(documents) < 0.08
    assert not any({"site-packages", "test", "tests"} & set(n.split("/")) for n in documents)
    assert 5e6 < sum(map(len, documents.values())) < 3e7


@pytest.mark.parametrize("files", [1, 10])
def test_the_ends_of_a_few_documents_are_held_out(tmp_path, files):
    text = "".join(f"{i}\n" for i in range(100_000))[:300_000]
    size = len(text) // files
    for i in range(files):
        (tmp_path / f"alice{i}.txt").write_text(text[i * size : (i + 1) * size])
    corpus = tmp_path if files > 1 else tmp_path / "alice0.txt"
    texts, held_out = train_exits.split(train_exits.read_corpus(corpus))
    assert "".join(a + b for a, b in zip(texts, held_out)) == text
    assert sum(map(len, held_out)) / len(text) == pytest.approx(1 / 28, rel=0.01)


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, monkeypatch, capsys):
    for name in ("a", "locked", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\xfa")

    def refuse(path, *asked, real=Path.read_text, **named):  # as a file of another user
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *asked, **named)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert train_exits.read_corpus(tmp_path) == {"a.txt": "a", "b.txt": "b"}
    assert capsys.readouterr().out.count("locked.txt") == 1


@given(st.integers(40, 400), st.integers(1, 5), st.integers(1, 9))
def test_an_epoch_reads_every_window_once(length, rows, context):
    text, windows, starts = torch.arange(length), (length - 1) // context - 1, []
    for step in range(-(-windows // rows)):
        read = train_exits.batch(text, step, rows, context, seed=0)
        assert read.shape == (rows, context + 1) and (read[:, 1:] == read[:, :-1] + 1).all()
        starts += read[:, 0].tolist()
    assert len(set(starts[:windows])) == max(0, windows)
    assert len({start % context for start in starts[:windows]}) <= 1


# ---- the same again -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["LayerSkip", "FrozenTrunk", "LookBack"])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_passes_of_any_size_add_up_to_the_same_gradients(recipe, rows):
    """Every row has the same weight, also if the last pass has fewer rows."""
    found = []
    for most in (rows, 1000):
        model, text = random_model(vocab_size=50).float(), torch.arange(5000) * 7 % 50
        model.exits = (1, 3)
        args = Namespace(
            batch=7 * 32, micro=32 * most, context=8, seed=0, draft_vocab=20, width=8,
            compile=False, bf16=False, freeze_trunk=recipe == "FrozenTrunk", model=None,
            draft_head=3 * (recipe == "LookBack"), corpus=None, device=torch.device("cpu"),
        )  # fmt: skip
        train_exits.prepare(model, text, text, args)
        made = getattr(train_exits, recipe)
        stats = made(model, text, args).gradients(train_exits.Run(args, model, None), 0.3)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([*grads, stats.flatten()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recipe", ["", "--bf16", "--freeze-trunk", "--draft-head 2"])
def test_a_killed_run_continues_bit_for_bit(tmp_path, corpus, trunk, recipe):
    start = SHAPE if recipe in ("", "--bf16") else f"--model {trunk}"
    options = f"{start} {SPEED} --steps 40 {recipe}"
    train(tmp_path / "whole", corpus, options)
    code = "import sys, train_exits; train_exits.SAVE_EVERY = 0; train_exits.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "cut"), "--corpus", str(corpus)]
    process = subprocess.Popen([*command, *options.split()], cwd=ROOT, env=one_thread())
    saved = tmp_path / "cut" / "training.safetensors"
    while not saved.exists() or steps_of(tmp_path / "cut") < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= steps_of(tmp_path / "cut") < 40
    train(tmp_path / "cut", corpus, options + " --resume")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # as conftest sets it


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--exits 1 4", "exits must ascend strictly within 1..3"),
        ("--freeze-trunk", "go together"),
        ("--model tiny", "lab/train.py trains all of M"),
        ("--model tiny --freeze-trunk --exits", "--exits names none"),
        ("--model tiny --freeze-trunk --draft-head 8", "no --freeze-trunk, no --exits"),
        ("--draft-head 2", "no --freeze-trunk, no --exits"),
        ("--steps 0", "--steps must be above 0"),
        ("--lr nan", "--lr must be above 0"),
        ("--minutes -1", "--minutes must be above 0"),
        ("--batch 64", "--batch must hold 8 x --context tokens"),
        ("--context 512 --batch 8192", "must fit the model's 2048"),
        ("--heads 5", "must be a multiple of n_heads"),
        ("--resume", "nothing to resume"),
        ("--lr 1e6 --steps 30", "diverged at step"),
    ],
)  # fmt: skip
def test_errors_are_named_and_write_nothing(tmp_path, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --steps 5 {options}")
    assert not (tmp_path / "run").exists()


def test_a_draft_head_reads_an_exit_of_the_model(tmp_path, corpus, trunk):
    with pytest.raises(ValueError, match="--draft-head must be an exit in 1..4, got 5"):
        train(tmp_path / "run", corpus, f"--model {trunk} {SPEED} --draft-head 5")
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_will_not_do(tmp_path):
    folder = tmp_path / "corpus"
    for content, message in (
        (None, "no corpus at"),
        (b"\xff\xfe", "the corpus is empty"),
        (b"too short", "the corpus is too short"),
    ):
        if content:
            folder.mkdir(exist_ok=True)
            (folder / "a").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", folder, f"{SHAPE} {SPEED} --steps 5")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/none"])
@pytest.mark.parametrize("recipe", ["", "--model none/such --freeze-trunk"])
def test_a_place_that_takes_no_files_is_refused_first(tmp_path, monkeypatch, corpus, out, recipe):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(train_exits, "read_corpus", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=f"^cannot write to '{tmp_path / out}': ") as refused:
        train(tmp_path / out, corpus, f"{SPEED} {recipe}")
    assert "\n" not in str(refused.value) and "/." not in str(refused.value)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "kept")]


def test_nothing_is_overwritten_and_no_other_run_is_resumed(tmp_path, corpus):
    run, same = tmp_path / "run", f"{SHAPE} {SPEED}"
    train(run, corpus, f"{same} --steps 2")
    before, other = files(run), shutil.copytree(corpus, tmp_path / "other")
    for text, options, message in [
        (corpus, f"{same} --steps 2", "holds a run already"),
        (corpus, f"{SHAPE.replace('--dim 32', '--dim 64')} {SPEED} --resume", "its config is"),
        (corpus, f"{same} --exits 1 3 --resume", "its exits is"),
        (corpus, f"{same} --seed 1 --resume", "its seed is"),
        (other, f"{same} --resume", "its corpus is .*corpus.*, asked is .*other"),
        (corpus, f"{same} --steps 400 --lr 1e6 --resume", "diverged at step"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(run, text, options)
    assert files(run) == before
    train(run, corpus, f"{same} --micro 64 --steps 3 --resume")  # passes may have another size


def test_a_run_of_another_text_or_cut_short_is_not_resumed(tmp_path):
    run, text, options = tmp_path / "run", tmp_path / "text", f"{SHAPE} {SPEED} --vocab 260"
    text.write_text(WORDS[0] * 400)
    train(run, text, f"{options} --steps 1")
    text.write_text(WORDS[1] * 400)
    with pytest.raises(ValueError, match="its vocabulary is"):
        train(run, text, f"{options} --steps 2 --resume")
    file = run / "training.safetensors"
    for damaged in (file.read_bytes()[:-100], save({"a": torch.zeros(1)})):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="training.safetensors is damaged, or of another kind"):
            train(run, text, f"{options} --steps 2 --resume")


def test_several_processes_are_sent_elsewhere(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun .* -m lab.train"):
        train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --steps 1")


def test_text_to_learn_from_is_cut_anywhere_and_loses_nothing():
    text = module("cut", 80)
    tokenizer = vocabulary.learn([text], 300)
    whole, pieces = (train_exits.encode(tokenizer, [text, text], cut=cut) for cut in (False, True))
    assert len(pieces) > len(whole)  # some word is spelled in two pieces
    spelled = [b"".join(map(tokenizer.spell, ids.tolist())) for ids in (whole, pieces)]
    assert spelled[0] == spelled[1] == 2 * (text.encode() + b"<|endoftext|>")
