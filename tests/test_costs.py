"""What passes cost, what a ladder made of them would take, and what bounds a generation."""

from functools import partial

import pytest
import torch
from conftest import random_model

from faststep import FixedStep
from hispec import Generation, generate
from lab.costs import (
    WIDTHS,
    Costs,
    Trace,
    best_threads,
    measure_costs,
    memory_limit,
    peak_memory,
    replay,
    timed,
    trace,
    with_loop,
)

EVERY_WIDTH = range(WIDTHS[-1] + 1)

ONE_A_PASS = Costs(
    {e: [0.0 for _ in EVERY_WIDTH] for e in range(9)},
    {e: [1.0 for _ in EVERY_WIDTH] for e in range(1, 9)},
    0.0,
    dict.fromkeys(range(9), 0.0),
)


def test_a_replay_takes_the_steps_that_a_generation_takes():
    """Counted in steps, along a text on which one exit is wrong here and there and the other
    never."""
    model = random_model(3)
    text = trace(model, [1, 2], 40, (), (1, 3), partial(generate, model))
    for exits, windows in [
        ((), ()),
        ((1,), (3,)),
        ((3,), (2,)),
        ((3,), (6,)),
        ((0,), (4,)),
        ((0, 3), (2, 4)),
    ]:
        out = generate(model, [1, 2], 40, exits=exits, windows=windows)
        steps = replay(
            text, (exits, windows, (0.0,) * len(exits)), ONE_A_PASS, model.config.n_layers
        )
        assert steps == pytest.approx(
            sum(level.calls for level in out.levels if level.exit > 0), rel=0.1
        )
    # a draft in doubt stops: at threshold 1 after every token, as a window of 1 does
    doubting = replay(text, ((3,), (6,), (1.0,)), ONE_A_PASS, model.config.n_layers)
    assert doubting == replay(text, ((3,), (1,), (0.0,)), ONE_A_PASS, model.config.n_layers)


def test_a_replay_charges_each_segment_the_difference_of_its_depths():
    """All drafts right, two a step: level 0 runs layers 0..2, the full model 3..7, a head each."""
    trunk = {e: [e**2 * w for w in EVERY_WIDTH] for e in (0, 2, 7)}
    head = {2: [0.5 for _ in EVERY_WIDTH], 7: [3.0 for _ in EVERY_WIDTH]}
    costs = Costs(trunk, head, 100.0, {2: 0.25, 7: 1.25})
    text = Trace([1], 0.0, {2: [5] * 6, 7: [5] * 6}, {2: [1.0] * 6, 7: [1.0] * 6})
    # the second round begins with the full model's own token, which level 0 has not run
    drafts, checks = 4, 2
    # six positions in all: the prompt's own token, two drafts and a bonus, then two drafts
    layers = 4 * 6 + (49 - 4) * 6
    assert replay(text, ((2,), (2,), (0.0,)), costs, 7) == layers + drafts * 0.75 + checks * 4.25
    # a threshold asks each of the drafting level's steps how sure it is
    doubting = replay(text, ((2,), (2,), (0.5,)), costs, 7)
    assert doubting == layers + drafts * 100.75 + checks * 4.25


@pytest.mark.parametrize("fixed", [False, True])
def test_costs_are_measured_by_width_or_by_the_pass_if_it_is_fixed(monkeypatch, fixed):
    monkeypatch.setattr("lab.costs.timed", lambda call, device: 1.0)
    model = random_model()
    fast = FixedStep(model, 64) if fixed else None
    costs = measure_costs(model, (1, 3), fast)
    assert costs.trunk.keys() == {0, 1, 3, 5} and costs.head.keys() == {1, 3, 5}
    assert costs.doubt == 1.0 and costs.loop == {1: 0.0, 3: 0.0, 5: 0.0}
    assert set(costs.trunk[0]) == {0}
    for row in costs.trunk[5], *costs.head.values():
        assert len(row) == len(EVERY_WIDTH) and row[0] == 0
    # each timing takes a second: the fixed step needs two passes for more than sixteen positions
    assert costs.trunk[5][1:] == [1 + (fixed and w > 16) for w in EVERY_WIDTH[1:]]
    assert costs.trunk[3][1] == pytest.approx(3 / 5 if fixed else 1)


def test_costs_between_the_timed_widths_are_interpolated(monkeypatch):
    model = random_model()
    run = lambda h, first, last, cache=None: h  # noqa: E731
    monkeypatch.setattr(model, "run", run)
    width = lambda call, device: float(getattr(call(), "shape", (0, 1))[1])  # noqa: E731
    monkeypatch.setattr("lab.costs.timed", width)
    costs = measure_costs(model, (1, 3), None)
    assert costs.trunk[3] == pytest.approx([float(w) for w in EVERY_WIDTH])


def test_what_a_step_costs_beyond_its_pass_is_what_runs_of_one_exit_took_longer():
    """Greedy's nine steps a text take 1.5 each beyond a head of 1, an exit's 0.25."""
    model = random_model(3)
    traces = [
        trace(model, prompt, 10, (), (1, 3), partial(generate, model)) for prompt in ([1], [2, 5])
    ]
    alone = {}
    for ladder, beyond in [
        (((), (), ()), 1.5),
        (((1,), (4,), (0.0,)), 0.25),
        (((3,), (4,), (0.0,)), 0.25),
    ]:
        alone[ladder] = []
        for text in traces:
            out = generate(model, text.prompt, 10, exits=ladder[0], windows=ladder[1])
            drafts = out.levels[0].calls if ladder[0] else 0
            checks = out.levels[-1].calls - 1  # the first reads the prompt
            out.prefill_seconds = 7.0
            out.seconds = 7.0 + drafts * (1 + beyond) + checks * 2.5
            alone[ladder].append(out)
    costs = with_loop(ONE_A_PASS, traces, alone, model.config.n_layers)
    found = {depth: costs.loop[depth] for depth in (1, 3, 5)}
    assert found == pytest.approx({1: 0.25, 3: 0.25, 5: 1.5}, abs=0.1)
    assert costs.loop[2] == 0  # was not run


@pytest.mark.parametrize(
    "seconds, best",
    [({1: 1.0, 2: 0.97, 4: 2.0}, 1), ({1: 1.0, 2: 0.5, 4: 0.3}, 4), ({1: 1, 2: 0.8, 4: 3}, 2)],
)
def test_best_threads_is_the_fewest_of_the_fastest(monkeypatch, seconds, best):
    now = {}
    monkeypatch.setattr("lab.costs.os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.update(threads=n))
    monkeypatch.setattr(
        "lab.costs.generate", lambda model, prompt, n: Generation([], [], seconds[now["threads"]])
    )
    assert best_threads(None) == best


def test_the_memory_limit_counts_each_weight_of_a_pass_once():
    # tied embeddings
    model = random_model(vocab_size=11, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24)
    limit = memory_limit(model)
    layer = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert limit["pass_bytes"] == 8 * (2 * layer + 16 + 11 * 16)
    assert limit["greedy_tokens_per_second"] == limit["bytes_per_second"] / limit["pass_bytes"] > 0


def test_on_a_cpu_no_gpu_memory_is_reported(monkeypatch):
    """Also where there is a GPU, which other work may be using."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    no_work = lambda *arguments: pytest.fail("work was done")  # noqa: E731
    assert peak_memory(torch.device("cpu"), no_work, [1], 4) is None


def test_gpu_memory_is_that_of_the_models_device(monkeypatch):
    asked, device = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda on: asked.append(on) or 5)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    assert peak_memory(device, lambda *arguments: None, [1], 4) == 5
    timed(lambda: None, device)
    assert asked == [device] * 22
