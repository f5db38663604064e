"""Measuring the machine: cores, threads, passes, memory, and generations that are watched."""

import os
from functools import partial

import pytest
import torch
from conftest import random_model

from checkpoints import machine
from checkpoints.cores import cores
from checkpoints.machine import Notes, pass_seconds, watch, what_was_seen
from fast.cpu import prepare
from fast.cuda import FixedStep
from hispec import Generation, Step, generate
from model import Llama


@pytest.mark.parametrize("seconds, best", [((1, 0.97, 2), 1), ((1, 0.5, 0.3), 4), ((1, 0.8, 3), 2)])
def test_best_threads_is_the_fewest_of_the_fastest(monkeypatch, seconds, best):
    """The choice is between one thread, two and four."""
    took, set_to = dict(zip((1, 2, 4), seconds)), []
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    made = lambda model, prompt, n: Generation([], [], took[set_to[-1]])  # noqa: E731
    monkeypatch.setattr(machine, "generate", made)
    assert machine.best_threads(None) == best


@pytest.mark.parametrize(
    "said, files, expected",
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/a/b\n", {"cpu.max": "300000 100000", "a/b/cpu.max": "400000 100000"}, 3),
        ("5:memory:/\n4:cpu,cpuacct:/x\n",
         {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_a_quota_of_processor_time_counts(monkeypatch, tmp_path, said, files, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "own").write_text(said)
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content)
    assert cores(tmp_path / "own", tmp_path / "groups") == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")  # an explicit setting is believed
    assert cores(tmp_path / "own", tmp_path / "groups") == 3


@pytest.mark.parametrize("kind", ["plain", "packed", "fixed"])
def test_passes_are_timed_by_any_step_alike(monkeypatch, kind):
    """The clock here counts the positions that each layer and each head really runs."""
    model = random_model(n_layers=6).float()
    ran, run, logits = [], Llama.run, Llama.logits
    layers = lambda m, h, a, b, *x: ran.append((b - a) * h.shape[1]) or run(m, h, a, b, *x)  # noqa: E731
    monkeypatch.setattr(Llama, "run", layers)
    monkeypatch.setattr(Llama, "logits", lambda *of: ran.append(100) or logits(*of))
    fixed = partial(FixedStep, max_len=64, compiled=False)
    step = {"plain": Step, "packed": prepare, "fixed": fixed}[kind](model)

    def counted(call, device):
        ran.clear()
        call()
        return sum(ran)

    monkeypatch.setattr(machine, "timed", counted)
    below, whole = pass_seconds(step, 3, (1, 4, 17), 30)
    widths = [16, 16, 32] if kind == "fixed" else [1, 4, 17]
    if kind == "packed":  # to multiples of four, where a small matrix is not packed
        widths = [b // 3 for b in below]
        assert all(w in (n, -(-n // 4) * 4) for w, n in zip(widths, (1, 4, 17)))
    assert below == [3 * w for w in widths]
    heads_run = [w - b for b, w in zip(below, whole)]
    assert heads_run == ([100, 100, 200] if kind == "fixed" else [100] * 3)


def test_limits_count_each_weight_of_a_pass_once(monkeypatch):
    monkeypatch.setattr(machine, "memory_speed", lambda model: 1e6)
    model = random_model(vocab_size=11, dim=16)
    found = machine.limits(Step(model), 32)
    layers = sum(p.numel() for p in model.layers.parameters())
    assert found["pass_bytes"] == 8 * (layers + 16 + 11 * 16)  # embeddings are tied
    assert found["greedy_tokens_per_second"] == 1e6 / found["pass_bytes"]
    assert list(found["pass_seconds"]) == ["1", "2", "4", "8", "16"] and found["layers"] == 5
    assert found["layer_seconds"] > 0 and found["head_seconds"] >= 0


@pytest.mark.parametrize(
    "ladder", [((), (), ()), ((1,), (3,), ()), ((1, 3), (2, 4), (0.3, 0)), ((0, 2), (4, 4), ())]
)
def test_a_watched_generation_writes_the_same_and_counts_what_statistics_do(ladder):
    model, prompt = random_model(3), [4, 2]
    decode = partial(generate, model, **dict(zip(("exits", "windows", "thresholds"), ladder)))
    plain = decode(prompt, 30)
    notes = watch(decode, prompt, 30)
    assert notes.tokens == len(plain.tokens) and notes.memory is None
    assert 0 < sum(notes.steps) < notes.seconds and len(notes.steps) == len(plain.levels)
    for k, level in enumerate(plain.levels[:-1]):
        checks = [(drafts, kept) for by, drafts, kept in notes.checks if by == k + 1]
        above = plain.levels[k + 1]
        assert len(checks) == above.calls - (above is plain.levels[-1])  # without the prompt's pass
        assert sum(drafts for drafts, _ in checks) == level.proposed
        assert sum(kept for _, kept in checks) == level.accepted


def test_what_became_of_drafts_by_hand():
    """In two generations, the full model judges drafts of 3, 1 and 0 tokens, the level below two
    drafts of 2.
    """
    one = Notes(5, 10.0, [1.0, 2.0, 3.0], [(1, 2, 2), (1, 2, 0), (2, 3, 2)])
    two = Notes(5, 10.0, [0.0, 1.0, 5.0], [(2, 1, 1), (2, 0, 0)], memory=7)
    found = what_was_seen([one, two])
    assert found["acceptance_by_position"] == [[1 / 2, 1 / 2], [2 / 2, 1 / 1, 0 / 1]]
    assert found["accepted_length"] == [2 / 2, 3 / 3]
    assert found["time_share"] == [1 / 20, 3 / 20, 8 / 20]
    assert found["time_share_loop"] == pytest.approx(8 / 20) and found["peak_bytes"] == 7
    never = what_was_seen([Notes(5, 1.0, [0.1, 0.1, 0.1])])  # a level that judged nothing
    assert never["acceptance_by_position"] == [[], []] and never["accepted_length"] == [None, None]
    assert "accepted_length" not in what_was_seen([Notes(5, 1.0, [0.5])])
