"""Training: what must stay, stays bit for bit; a killed run continues; exits get better; errors are
named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import module, random_model
from safetensors import safe_open

import checkpoints
import train_exits
from hispec import generate
from lab.agreement import measure
from lab.corpus import encode, held_rows, read_corpus, sample
from lab.installed import INSTALLED, is_held_out
from lab.training import Run
from model import ExitHead, Llama

ROOT = Path(__file__).parent.parent
SHAPE = "--layers 4 --dim 32 --heads 2 --ffn 48 --vocab 300 --exits 1 2"
SPEED = "--batch 256 --micro 128 --context 16"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty small files: sentences from a grammar that a tiny model learns in seconds."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = torch.Generator().manual_seed(1)
    words = [
        "if x:\n    y = 1\n",
        "for i in range(3):\n    f(i)\n",
        "return x + y\n",
        "# the sum of both\n",
    ]
    for i in range(60):
        picks = torch.randint(len(words), (100,), generator=rng).tolist()
        (folder / f"part{i:02}.txt").write_text("".join(words[p] for p in picks), "utf-8")
    return folder


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, corpus):
    """A model trained for a moment without exits: what recipes 2 and 3 start from."""
    out = tmp_path_factory.mktemp("trunk") / "run"
    train(out, corpus, f"{SHAPE} {SPEED} --steps 80 --exits")
    return out / "model"


def train(out, corpus, options):
    train_exits.main(["--out", str(out), "--corpus", str(corpus), *options.split()])
    return checkpoints.load(out / "model", "cpu", torch.float32)


def weights(folder):
    model, _ = checkpoints.load(folder / "model", "cpu", torch.float32)
    return model.state_dict()


def steps_of(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        return json.loads(file.metadata()["run"])["step"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def agreement(model, exits, folder, tokenizer):
    held = {n: t for n, t in read_corpus(folder).items() if is_held_out(n)}
    rows = held_rows(encode(tokenizer, held), 32)
    _, agree = measure(model, rows)
    return [agree[exit - 1] for exit in exits]


# ---- the three recipes --------------------------------------------------------------------------


def test_from_scratch_learns_text_and_exits(tmp_path, corpus):
    model, tokenizer = train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --steps 80")
    held = held_rows(encode(tokenizer, read_corpus(corpus)), 32)
    loss, _ = measure(model, held)
    untrained, _ = measure(Llama(model.config), held)
    assert model.exits == (1, 2)
    assert loss < untrained / 2
    assert min(agreement(model, model.exits, corpus, tokenizer)) > 0.6
    assert (tmp_path / "run" / "agreement.png").stat().st_size > 1000
    setting, command, title, *rows = (tmp_path / "run" / "agreement.csv").read_text().splitlines()
    assert len(rows) == model.config.n_layers - 1
    prompt = tokenizer.encode("for i in")
    greedy = generate(model, prompt, 40)
    assert generate(model, prompt, 40, exits=(1, 2), windows=(2, 4)).tokens == greedy.tokens


@pytest.mark.parametrize("text", ["", "--self-distill 4000"])
def test_a_frozen_trunk_keeps_every_bit(tmp_path, corpus, trunk, text):
    before, _ = checkpoints.load(trunk, "cpu", torch.float32)
    options = f"--model {trunk} --freeze-trunk --exits 1 2 --width 24 --draft-vocab 60 {SPEED} --steps 10 {text}"
    after, _ = train(tmp_path / "run", corpus, options)
    ids = torch.randint(before.config.vocab_size, (4, 64))
    assert torch.equal(before(ids), after(ids))
    assert {
        n: p for n, p in after.state_dict().items() if "exit_heads" not in n
    }.keys() == before.state_dict().keys()
    assert_same(
        {n: p for n, p in after.state_dict().items() if "exit_heads" not in n}, before.state_dict()
    )
    for head in after.exit_heads.values():
        assert isinstance(head, ExitHead) and len(head.vocab) <= 60


def test_bfloat16_leaves_a_frozen_trunk_as_it_came(tmp_path, corpus, trunk):
    before, _ = checkpoints.load(trunk, "cpu", torch.float32)
    after, _ = train(
        tmp_path / "run",
        corpus,
        f"--model {trunk} --freeze-trunk --exits 1 {SPEED} --steps 3 --bf16",
    )
    assert_same(
        {n: p for n, p in after.state_dict().items() if "exit_heads" not in n}, before.state_dict()
    )


@pytest.mark.parametrize("text", ["", "--self-distill 8000"])
def test_continual_training_keeps_the_original(tmp_path, corpus, trunk, capsys, text):
    before, tokenizer = checkpoints.load(trunk, "cpu", torch.float32)
    after, _ = train(
        tmp_path / "run", corpus, f"--model {trunk} --exits 1 2 {SPEED} --steps 60 --lr 1e-3 {text}"
    )
    assert min(agreement(after, (1, 2), corpus, tokenizer)) > 0.8
    rows = held_rows(encode(tokenizer, read_corpus(corpus)), 32)
    was, now = (measure(m, rows)[0] for m in (before, after))
    assert now < was * 1.1
    said = capsys.readouterr().out
    assert "kept of the original: agreement" in said and "KL" in said and "perplexity" in said


@pytest.mark.parametrize("recipe", ["--freeze-trunk --width 512", "--lr 5e-3"])
def test_a_random_folder_without_tokenizer_learns_from_its_own_samples(tmp_path, corpus, recipe):
    random = random_model(scale=20, vocab_size=50).float()
    checkpoints.save(random, None, tmp_path / "random")
    options = (
        f"--model {tmp_path / 'random'} --exits 2 --self-distill 20000 --steps 150 --batch 256"
    )
    model, tokenizer = train(
        tmp_path / "run", corpus, f"{options} --micro 256 --context 8 {recipe}"
    )
    assert tokenizer is None and model.exits == (2,)
    rows = sample(random, torch.randint(50, (64, 4)), 32, torch.arange(64) % 2 == 1)
    untrained, trained = (measure(m, rows)[1][1] for m in (random, model))
    assert trained > untrained + 0.1, (untrained, trained)
    prompt = [1, 2, 3]
    assert (
        generate(model, prompt, 30, exits=(2,), windows=(3,)).tokens
        == generate(model, prompt, 30).tokens
    )


def test_no_steps_only_measure(tmp_path, corpus, trunk):
    train_exits.main(
        f"--out {tmp_path / 'run'} --corpus {corpus} --model {trunk} --steps 0 --context 16".split()
    )
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "agreement.csv",
        "agreement.png",
    }
    lines = (tmp_path / "run" / "agreement.csv").read_text().splitlines()
    assert lines[0].startswith(f"# {trunk}, float32, ") and f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("# python ")
    assert lines[2] == "layer,held_out_text,greedy_continuations" and len(lines) == 2 + 4


def test_a_time_budget_ends_the_run(tmp_path, corpus):
    began = time.time()
    train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --minutes 0.02")
    assert time.time() - began < 30
    assert steps_of(tmp_path / "run" / "training.safetensors") > 0


def test_a_run_is_saved_by_the_clock_that_ends_it(tmp_path, corpus, monkeypatch):
    """Clocks of several processes differ: the one agreed on ends the loop, and so says to save."""
    clock = iter([0.0, 0.5, 1.0])  # asked once a step; another question would find it at its end
    monkeypatch.setattr(Run, "progress", lambda run, world=1: next(clock))
    train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --minutes 9")
    assert steps_of(tmp_path / "run" / "training.safetensors") == 2


# ---- the same again, bit for bit ----------------------------------------------------------------


def test_same_seed_same_weights_another_seed_others(tmp_path, corpus):
    runs = [tmp_path / name for name in "abc"]
    for run, seed in zip(runs, (5, 5, 6), strict=True):
        train(run, corpus, f"{SHAPE} {SPEED} --steps 7 --seed {seed}")
    a, b, c = map(weights, runs)
    assert_same(a, b)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("recipe", ["", "--bf16", "--freeze-trunk --self-distill 4000"])
def test_a_killed_run_continues_bit_for_bit(tmp_path, corpus, trunk, recipe):
    start = f"--model {trunk} --exits 1 2" if "trunk" in recipe else SHAPE
    options = f"{start} {SPEED} --steps 40 {recipe}"
    train(tmp_path / "whole", corpus, options)
    code = "import sys, train_exits; train_exits.SAVE_EVERY = 0; train_exits.main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        "--out",
        str(tmp_path / "cut"),
        "--corpus",
        str(corpus),
        *options.split(),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=one_thread(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    saved = tmp_path / "cut" / "training.safetensors"
    while not saved.exists() or steps_of(saved) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = steps_of(saved)
    assert 3 <= step < 40
    train(tmp_path / "cut", corpus, options + " --resume")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def one_thread():
    # as conftest sets it here
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_two_processes_take_the_same_step_as_one(tmp_path, corpus, monkeypatch):
    """Each process computes half the rows. Muon rounds to bfloat16, so equal means: to 2 % of the
    step."""
    if torch.cuda.device_count() < 2:  # each process would want a GPU of its own
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = f"{SHAPE} --micro 128 --context 16 --steps 4"
    train(tmp_path / "one", corpus, f"{options} --batch 512")
    train(tmp_path / "half", corpus, f"{options} --batch 256")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train_exits.py",
    ]
    command += [
        "--out",
        str(tmp_path / "two"),
        "--corpus",
        str(corpus),
        *options.split(),
        "--batch",
        "512",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, half = (weights(tmp_path / name) for name in ("one", "two", "half"))
    torch.manual_seed(0)
    model, _ = checkpoints.load(tmp_path / "one" / "model")
    start = Llama(model.config).state_dict()  # train seeds with 0 before it makes the model

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a).sqrt()

    step = distance(one, start)
    assert distance(one, two) < 0.02 * step
    assert distance(one, half) > 0.1 * step


def test_training_on_installed_packages_keeps_their_tokens(site, tmp_path):
    options = f"{SHAPE} {SPEED} --vocab 400"
    first, bpe = train(tmp_path / "run", INSTALLED, f"{options} --steps 3")
    for file in site.rglob("*.py"):
        file.unlink()
    _, again = train(tmp_path / "run", INSTALLED, f"{options} --steps 6 --resume")
    assert again.encode(module("new")) == bpe.encode(module("new"))
    with safe_open(tmp_path / "run" / "corpus" / "tokens.safetensors", "pt") as saved:
        text, held = (bpe.decode(saved.get_tensor(name).tolist()) for name in ("text", "held"))
    assert "plain_code" in text and "networkx" not in text and "networkx_graph" in held
    with pytest.raises(ValueError, match="another --out reads the text afresh"):
        train(tmp_path / "run", INSTALLED, f"{options} --vocab 300 --steps 6 --resume")


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--exits 2 1", "exits must ascend strictly within 1..3"),
        ("--exits 1 4", "exits must ascend strictly within 1..3"),
        ("--freeze-trunk", "need a --model"),
        ("--self-distill 100", "need a --model"),
        ("--unlikelihood 1", "changes the trunk of a --model"),
        ("--steps 0", "--steps must be above 0"),
        ("--lr nan", "--lr must be above 0"),
        ("--minutes -1", "--minutes must be above 0"),
        ("--vocab 200", "--vocab must be at least 257"),
        ("--batch 64", "--batch must hold 8 x --context tokens"),
        ("--context 512 --batch 8192", "must fit the model's 2048"),
        ("--heads 5", "must be a multiple of n_heads"),
        ("--context 1", "--context must be 2 or above"),
        ("--seed -1", "--seed must be 0 or above"),
        ("--seed 9000000000000000", "--seed must be .* below 2"),
        ("--draft-vocab 0", "--draft-vocab must be 1 or above"),
        ("--resume", "nothing to resume"),
        ("--lr 1e6 --steps 30", "diverged at step"),
    ],
)
def test_errors_are_named_and_write_nothing(tmp_path, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", corpus, f"{SHAPE} {SPEED} --steps 5 {options}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the corpus is empty"),
        ({"a.txt": b""}, "the corpus is empty"),
        ({"a.bin": b"\xff\xfe\xfa"}, "the corpus is empty"),
        ({"a.txt": b"too short"}, "the corpus is too short"),
        (None, "no corpus at"),
    ],
)
def test_a_corpus_that_will_not_do(tmp_path, files, message):
    folder = tmp_path / "corpus"
    if files is not None:
        folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", folder, f"{SHAPE} {SPEED} --steps 5")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/none"])
@pytest.mark.parametrize("recipe", ["", "--model none/such --freeze-trunk"])
def test_a_place_that_takes_no_files_is_refused_first(tmp_path, monkeypatch, corpus, out, recipe):
    (tmp_path / "file").write_text("kept")
    for reads in ("read_corpus", "own_samples"):
        monkeypatch.setattr(train_exits, reads, lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=f"^cannot write to '{tmp_path / out}': ") as refused:
        train(tmp_path / out, corpus, f"{SHAPE} {SPEED} --steps 5 {recipe}")
    assert "\n" not in str(refused.value) and "/." not in str(refused.value)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "kept")]


@pytest.mark.parametrize(
    "options, message", [("--exits 8 2", "from 1 on, got"), ("--steps x", "invalid int")]
)
def test_arguments_are_looked_at_before_a_model_is_loaded(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(checkpoints, "load", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        train_exits.main(["--out", str(tmp_path / "run"), "--model", "tiny", *options.split()])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, corpus):
    run = tmp_path / "run"
    train(run, corpus, f"{SHAPE} {SPEED} --steps 2")
    before = {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}
    wider = SHAPE.replace("--dim 32", "--dim 64")
    for options, message in [
        (f"{SHAPE} {SPEED} --steps 2", "holds a run already"),
        (f"{wider} {SPEED} --steps 4 --resume", "its config is"),
        (f"{SHAPE} {SPEED} --steps 4 --exits 1 3 --resume", "its exits is"),
        (f"{SHAPE} {SPEED} --steps 4 --seed 1 --resume", "its seed is"),
        (f"{SHAPE} {SPEED} --steps 400 --lr 1e6 --resume", "diverged at step"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(run, corpus, options)
    assert before == {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}


def test_help_reads_as_documentation(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_exits.main(["--help"])
    said = capsys.readouterr().out
    assert "--freeze-trunk" in said and "LayerSkip" in said
