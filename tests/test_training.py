"""lab/train.py: a model stays close to the original, leaves its loops, learns from its own writing;
processes share steps.
"""

import re
import subprocess
import sys
from argparse import Namespace

import pytest
import test_train_exits
import torch
from conftest import module, random_model
from safetensors import safe_open
from test_train_exits import (
    ROOT,
    SHAPE,
    SPEED,
    assert_same,
    held,
    one_thread,
    steps_of,
    train,
    trunk_of,
    weights,
)
from texts import PROSE, write_family

import checkpoints
import lab.train
from checkpoints.variety import looped
from checkpoints.vocabulary import from_folder, learn
from hispec import generate
from lab.corpus import make_openings, openers, own_loops, sample
from lab.installed import INSTALLED, everything, is_held_out
from model import ExitHead, Llama
from train_exits import Run, measure, read_corpus

corpus, trunk = test_train_exits.corpus, test_train_exits.trunk  # the fixtures


def lab_train(out, text, options):
    return train(out, text, options, lab.train.main)


# ---- recipe 3 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "--self-distill 8000"])
def test_all_of_a_model_learns_and_the_original_is_kept(tmp_path, corpus, trunk, capsys, text):
    before, tokenizer = checkpoints.load(trunk, "cpu", torch.float32)
    options = f"--model {trunk} --exits 1 2 {SPEED} --steps 60 --lr 1e-3 {text}"
    after, _ = lab_train(tmp_path / "$run$", corpus, options)
    rows = held(tokenizer, corpus)
    (was, _), (now, _) = (measure(m, rows) for m in (before, after))
    said = re.search(r"kept of the original: agreement .*, KL (.*) nats", capsys.readouterr().out)
    assert now < was * 1.1 and float(said[1]) < 0.05  # one that learns the text has 0.1 or more


def test_an_exit_learns_among_the_tokens_it_knows():
    """The loss equals its formula: the cross-entropy of the two distributions over the exit's
    vocabulary.
    """
    model, rows = random_model().float(), torch.randint(11, (3, 9))
    model.exit_heads["2"], model.exits = ExitHead(model.config, 8, [1, 4, 7]), (2,)
    losses = whole_model(model)
    total, stats = losses.loss(rows, frozenset(), 1.0)
    full, exit = (model(rows[:, :-1], at)[..., [1, 4, 7]] for at in (None, 2))
    wanted = -(full.softmax(-1) * exit.log_softmax(-1)).sum(-1).mean().item()
    assert stats[1, 0].item() == pytest.approx(wanted, rel=1e-4)
    choices = model(rows[:, :-1]).argmax(-1), model(rows[:, :-1], 2).argmax(-1)
    assert stats[1, 1].item() == pytest.approx((choices[0] == choices[1]).float().mean().item())
    assert total.item() == pytest.approx(stats[:, 0].sum().item(), rel=1e-4)


def whole_model(model, text=None, **asked):
    defaults = dict(
        model="m", corpus=None, batch=7 * 64, micro=1000, context=8, seed=0, rank=0, world=1,
        compile=False, bf16=False, freeze_trunk=False, draft_head=0, unlikelihood=0.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    return lab.train.WholeModel(model, text, Namespace(**(defaults | asked)), model)


# ---- unlikelihood -------------------------------------------------------------------------------


def test_tokens_of_loops_are_made_unlikely():
    """The loss equals its formula."""
    model, rows = random_model(), torch.randint(11, (3, 9))
    inside = torch.zeros(3, 9, dtype=torch.long)
    inside[:, 5:7] = 1
    total, stats = whole_model(model, unlikelihood=4.0).loop_loss(torch.stack([rows, inside], 1))
    p = model(rows[:, :-1]).softmax(-1).gather(2, rows[:, 1:, None])[:, 4:6]
    unlikely = -torch.log1p(-p).sum().item() / (3 * 8)
    assert stats.flatten().tolist() == pytest.approx([unlikely, 6 / 24])
    assert total.item() == pytest.approx(lab.train.OWN * 4.0 * unlikely)


def test_a_model_is_taught_to_leave_its_loops(tmp_path, corpus, trunk):
    """Measured on its loops from before, compared with the same training without unlikelihood."""
    before, tokenizer = checkpoints.load(trunk, "cpu", torch.float32)
    own, inside = own_loops(before, held(tokenizer, corpus).repeat(1, 2)[:, :65])
    options = f"--model {trunk} --exits 1 2 {SPEED} --context 32 --steps 40 --lr 2e-3"
    probable = []
    for weight in (0, 10):
        model, _ = lab_train(tmp_path / str(weight), corpus, f"{options} --unlikelihood {weight}")
        with torch.no_grad():
            p = model(own[:, :-1]).softmax(-1).gather(2, own[:, 1:, None]).squeeze(2)
        probable.append(p[inside[:, 1:]].mean().item())
    assert probable[1] < 0.8 * probable[0]


def test_own_loops_are_marked_where_a_model_repeats_itself():
    model, rows = random_model().float(), torch.randint(11, (6, 41))
    own, inside = own_loops(model, rows)
    for row, made, mark in zip(rows.tolist(), own.tolist(), inside):
        assert made == row[:20] + generate(model, row[:20], 21).tokens
        assert set(mark.nonzero().flatten().tolist()) == {i for i in looped(made, 4) if i >= 20}
    assert inside.any() and not inside.all(0)[20:].any()


# ---- processes and passes -----------------------------------------------------------------------


class Share(Run):
    """The part of a step that one of several processes computes, without the others."""

    def mine(self, rows):
        return rows.tensor_split(self.args.world)[self.args.rank]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [16, 48, 4096])
def test_processes_and_passes_add_up_to_the_same_gradients(world, micro):
    """With unlikelihood, rows of text and the model's own have the same weight however they are
    divided.
    """
    found = []
    for n, most in ((1, 4096), (world, micro)):
        total = 0
        for rank in range(n):
            model, text = random_model().float(), torch.arange(5000) * 7 % 11
            model.exits = (1, 3)
            asked = dict(unlikelihood=4.0, context=16, micro=most, world=n, rank=rank)
            recipe = whole_model(model, text, **asked, draft_vocab=20)
            stats = recipe.gradients(Share(recipe.args, model, None), 0.3)
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            total = total + torch.cat([*grads, stats.flatten()])
        found.append(total)
    assert recipe.names == ["last layer", "exit 1", "exit 3", "own loops"] and stats[3, 1] > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_three_processes_take_the_same_step_as_one(tmp_path, corpus, monkeypatch):
    """Each process has ten or eleven of 32 rows. Muon rounds to bfloat16, so equal means to 2 % of
    the step.
    """
    if torch.cuda.device_count() < 3:  # each process would want a GPU of its own
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = f"{SHAPE} --micro 128 --context 16 --steps 4"
    lab_train(tmp_path / "one", corpus, f"{options} --batch 512")
    lab_train(tmp_path / "half", corpus, f"{options} --batch 384")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    command += ["-m", "lab.train", "--out", str(tmp_path / "three"), "--corpus", str(corpus)]
    command += [*options.split(), "--batch", "512"]
    subprocess.run(command, cwd=ROOT, env=one_thread(), timeout=300, check=True)
    one, three, half = (weights(tmp_path / name) for name in ("one", "three", "half"))
    torch.manual_seed(0)  # as train_exits.main does before it makes the model
    start = Llama(checkpoints.load(tmp_path / "one" / "model")[0].config).state_dict()

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a).sqrt()

    assert distance(one, three) < 0.02 * distance(one, start) < 0.2 * distance(one, half)
    lab_train(tmp_path / "three", corpus, f"{options} --batch 512 --steps 6 --resume")
    assert steps_of(tmp_path / "three") == 6  # by one process


def test_each_process_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """It is set before anything is gathered; no process leaves before all are done; more processes
    than GPUs are refused.
    """
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    monkeypatch.setattr(lab.train.dist, "init_process_group", lambda *_, **__: seen.append("init"))
    monkeypatch.setattr(lab.train.dist, "barrier", lambda: seen.append("wait"))
    monkeypatch.setattr(lab.train.dist, "destroy_process_group", lambda: seen.append("leave"))
    monkeypatch.setattr(lab.train, "train", lambda args: seen.append(str(args.device)))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    lab.train.main(["--out", str(tmp_path / "run")])
    assert seen == ["cuda:1", "init", "cuda:1", "wait", "leave"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="a GPU each: at most 2 here"):
        lab.train.main(["--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# ---- a model's own writing ----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["--freeze-trunk --width 512", "--lr 5e-3"])
def test_a_random_folder_without_tokenizer_learns_from_its_own_samples(tmp_path, corpus, recipe):
    random = random_model(scale=20, vocab_size=50).float()
    checkpoints.save(random, None, tmp_path / "random")
    options = f"--model {tmp_path / 'random'} --exits 2 --self-distill 20000 --steps 150 {recipe}"
    options += " --batch 256 --micro 256 --context 8"
    model, tokenizer = lab_train(tmp_path / "run", corpus, options)
    assert tokenizer is None and model.exits == (2,)
    if "freeze" in recipe:
        assert_same(trunk_of(model), random.state_dict())
    rows = sample(random, torch.randint(50, (64, 4)), 32, torch.arange(64) % 2 == 1)
    untrained, trained = (measure(m, rows)[1][1] for m in (random, model))
    assert trained > untrained + 0.1, (untrained, trained)


def test_a_draft_head_learns_from_its_models_own_samples(tmp_path, corpus):
    checkpoints.save(random_model(vocab_size=50).float(), None, tmp_path / "random")
    options = f"--model {tmp_path / 'random'} --draft-head 3 --self-distill 2000 --steps 3"
    model, _ = lab_train(tmp_path / "run", corpus, f"{options} --batch 256 --micro 256 --context 8")
    assert list(model.draft_heads) == ["3"] and (tmp_path / "run/samples.safetensors").exists()
    assert "draft,held_out_text" in (tmp_path / "run/agreement.csv").read_text()


@pytest.mark.parametrize(
    "name, chats", [("llama-3", True), ("llama-2 first", True), ("llama-2", False)]
)
def test_openings_are_the_templates(tmp_path, name, chats):
    """The model writes the question itself only if a template marks the user's turn: BOS alone is
    not a chat.
    """
    write_family(name, tmp_path)
    (tmp_path / "words").write_text(PROSE * 60, "utf-8")
    tokenizer = from_folder(tmp_path, {"eos_token_id": 2}, 600)
    model = random_model(vocab_size=600)
    words = openers(model, tokenizer, Namespace(corpus=tmp_path / "words"))
    openings, until = make_openings(tokenizer, words, 1, 5, torch.Generator().manual_seed(0))
    framed, others = make_openings(tokenizer, words, 4, 5, torch.Generator().manual_seed(0))
    assert until == (tokenizer.stop if chats else ()) and others == ()
    assert len(openings) == len(framed) == 5
    turn = tokenizer.chat(["a"])
    assert (openings.tolist()[0] == turn[: openings.shape[1]]) == chats
    assert framed.shape[1] == len(turn) + 11 and (framed[:, 0] == tokenizer.bos[0]).all()


# ---- installed packages, measuring --------------------------------------------------------------


def test_installed_packages_without_tables_copies_and_links(site):
    documents, library = everything(), read_corpus(None)
    packages = {name for name in documents if name.startswith("site-packages/")}
    assert documents.keys() - packages == library.keys() and len(library) == 3
    names = ("plain/code.py", "plain/deep/code.py", "networkx/graph.py")
    assert packages == {f"site-packages/{name}" for name in names}
    held_out = {name for name in documents if is_held_out(name)}
    assert "site-packages/networkx/graph.py" in held_out and held_out & library.keys()
    assert not is_held_out("networkx/graph.py")  # such a folder of one's own is not that package


def test_training_on_installed_packages_keeps_their_tokens(site, tmp_path):
    options = f"{SHAPE} {SPEED} --vocab 400"
    _, first = lab_train(tmp_path / "run", INSTALLED, f"{options} --steps 3")
    for file in site.rglob("*.py"):
        file.unlink()
    _, again = lab_train(tmp_path / "run", INSTALLED, f"{options} --steps 6 --resume")
    assert again.encode(module("new")) == first.encode(module("new"))
    with safe_open(tmp_path / "run" / "corpus" / "tokens.safetensors", "pt") as saved:
        text, ends = (first.decode(saved.get_tensor(name).tolist()) for name in ("text", "held"))
    assert "plain_code" in text and "networkx" not in text and "networkx_graph" in ends
    with pytest.raises(ValueError, match="another --out reads the text afresh"):
        lab_train(tmp_path / "run", INSTALLED, f"{options} --vocab 300 --steps 6 --resume")


def test_no_steps_only_measure(tmp_path, corpus, trunk):
    """The model's name has a dollar sign, which must not begin a formula on the figure."""
    run, model = tmp_path / "run", tmp_path / "$a^{$"
    model.symlink_to(trunk)
    asked = f"--out {run} --corpus {corpus} --model {model} --steps 0 --context 16"
    lab.train.main(asked.split())
    assert {f.name for f in run.iterdir()} == {"agreement.csv", "agreement.png"}
    setting, command, title, *rows = (run / "agreement.csv").read_text().splitlines()
    assert setting.startswith(f"# {model}, float32, ") and command.startswith("# python ")
    assert title == "layer,held_out_text,greedy_continuations" and len(rows) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--self-distill 100", "need a --model"),
        ("--unlikelihood 1", "changes the trunk of a --model"),
        ("--model tiny --unlikelihood nan", "must be 0 or above"),
        ("--model tiny --freeze-trunk --steps 0", "--steps must be above 0"),
        ("--model tiny --exits 8 2", "from 1 on, got"),
    ],
)
def test_errors_are_named_and_write_nothing(tmp_path, monkeypatch, corpus, options, message):
    monkeypatch.setattr(checkpoints, "load", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        lab_train(tmp_path / "run", corpus, options)
    assert not (tmp_path / "run").exists()


def test_another_way_to_train_is_another_run(tmp_path, corpus, trunk):
    options = f"--model {trunk} --exits 1 2 {SPEED} --steps"
    lab_train(tmp_path / "run", corpus, f"{options} 1")
    for more, key in (("--unlikelihood 1", "unlikelihood"), ("--self-distill 500", "self_distill")):
        with pytest.raises(ValueError, match=f"its {key} is 0"):
            lab_train(tmp_path / "run", corpus, f"{options} 2 --resume {more}")


# ---- recipe 1 from another model's layers -------------------------------------------------------


def test_a_new_vocabulary_begins_with_the_layers_of_another_model(tmp_path):
    """A token in both vocabularies keeps its embedding; another gets the mean of those that spell
    it.
    """
    text = "def begin(of, a, text):\n    return of + a + text  # begin\n" * 20
    old, new = learn([text], 280), learn([text, "zzzz qqqq " * 50], 300)
    model = random_model(n_layers=2, vocab_size=old.n_vocab).float()
    checkpoints.save(model, old, tmp_path)
    begun = random_model(1, n_layers=2, vocab_size=new.n_vocab).float()
    lab.train.take_layers(begun, new, str(tmp_path))
    embeddings = model.embed.weight
    for name, weight in begun.state_dict().items():
        if name.startswith(("layers.", "norm.")):
            assert torch.equal(weight, model.state_dict()[name]), name
    for token in range(256, new.n_vocab - 1):
        pieces = old.encode(new.spell(token).decode())
        torch.testing.assert_close(begun.embed.weight[token], embeddings[pieces].mean(0))
    of_bytes = {old.spell(id): embeddings[id] for id in range(old.n_vocab)}
    assert all(torch.equal(begun.embed.weight[id], of_bytes[new.spell(id)]) for id in range(256))
    assert torch.equal(begun.embed.weight[-1], embeddings[-1])  # the end of a text
    with pytest.raises(ValueError, match="are needed"):
        lab.train.take_layers(random_model(n_layers=3, vocab_size=300), new, str(tmp_path))
