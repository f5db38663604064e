"""The figures of a whole run on a small random model, and the numbers behind them, computed in a
second way."""

from functools import partial
from random import Random

import pytest
import torch
from conftest import random_model

import bench
from bench import Request
from checkpoints import machine
from fast.cpu import prepare
from hispec import Step, generate
from lab import costs as costs_room
from lab import figures, plots
from lab.costs import WIDTHS, Costs, Trace, replay


def small_run():
    """A model, requests in three categories with greedy answers of 12 tokens, and results as the
    bench has them."""
    model = random_model(4, n_layers=9)
    prompts = [("chat", [1, 2, 3]), ("chat", [5]), ("code", [7, 1]), ("maths", [3, 4, 9, 9])]
    requests = [Request(c, p, generate(model, p, 12).tokens) for c, p in prompts]
    columns = ("name", "exits", "windows", "thresholds", "speedup_vs_greedy", "positions")
    rows = [
        ("greedy", (), (), (), 1.0, [1.25]),
        ("single-layer", (4,), (4,), (), 1.5, [1.5, 1.25]),
        ("hispec", (2, 4), (2, 4), (0.0, 0.0), 1.75, [2.0, 1.5, 1.25]),
        ("draft alone", (2,), (4,), (), 1.25, [1.75, 1.25]),
        ("peer", (), (), (), 0.5, []),
    ]
    results = [dict(zip(columns, row), tokens_per_target_pass=1 + m) for m, row in enumerate(rows)]
    return model, requests, results


@pytest.fixture
def few_windows(monkeypatch):
    make_small(monkeypatch)


def make_small(monkeypatch):
    """Use smaller grids, so that tests are fast."""
    for module in (figures, plots):
        monkeypatch.setattr(module, "N_D", (1, 3))
        monkeypatch.setattr(module, "N_I", (2, 4))
        monkeypatch.setattr(module, "SAMPLES", 20)
    monkeypatch.setattr(figures, "WINDOWS", (1, 3))

    def seconds(step, depth, widths, context):  # in place of timing real passes
        below = [1e-3 * depth * (9 + n) for n in widths]
        return below, [taken + 1e-3 for taken in below]

    monkeypatch.setattr(costs_room, "pass_seconds", seconds)
    monkeypatch.setattr(figures, "THRESHOLDS", (0.0, 0.5))


def gather(run, tuned=None) -> figures.Data:
    model, requests, results = run
    step = Step(model)
    decoder = partial(bench.decode_with, model, step)
    return figures.gather(step, requests, results, tuned or {}, 12, (), decoder)


def test_the_grid_is_run_and_its_texts_are_greedys(few_windows, monkeypatch):
    asked, real = {}, figures.run

    def watched(decoders, prompts, *others):
        made = real(decoders, prompts, *others)
        asked.update(prompts=prompts, made=made)
        # clocked: 1 s a prompt for greedy, 1/2 s and less for others
        for ladder, generations in made.items():
            for g in generations:
                g.seconds = 1.0 if ladder == figures.GREEDY else 1 / sum(ladder[1])
        return made

    monkeypatch.setattr(figures, "run", watched)
    _, requests, _ = made = small_run()
    data = gather(made)
    assert asked["prompts"] == [[1, 2, 3], [7, 1], [3, 4, 9, 9]]  # the first of each category
    grid = [((2, 4), w, (0.0, 0.0)) for w in [(1, 2), (1, 4), (3, 4)]]
    assert list(asked["made"])[:-1] == [figures.GREEDY, *grid] == list(data.speed)[:-1]
    adaptive = list(data.speed)[-1]
    assert adaptive[0] == (2, 4) and any(adaptive[2]) and data.identical
    assert [data.speed[x] for x in (figures.GREEDY, *grid)] == pytest.approx([12, 36, 60, 84])
    measured = [measured for _, measured in data.compared["grid of windows"]][:3]
    assert measured == pytest.approx([3, 5, 7])
    assert [measured for _, measured in data.compared["all prompts"]] == [1.5, 1.75, 1.25]
    requests[2].greedy[5] += 1
    assert not gather(made).identical


def test_one_token_is_sampled_where_draft_and_full_model_differ_most(few_windows, monkeypatch):
    monkeypatch.setattr(figures, "OPENING", 2)
    model, requests, _ = run = small_run()
    openings = [torch.tensor([r.prompt[:2]]) for r in requests]
    with torch.no_grad():
        both = [[model(o, e)[0, -1].softmax(-1).numpy() for e in (2, 9)] for o in openings]
    monkeypatch.setattr(figures, "SAMPLES", 400)
    draft, full, drawn = gather(run).one_token
    expected = max(both, key=lambda rows: max(abs(rows[0] - rows[1])))
    assert draft == pytest.approx(expected[0]) and full == pytest.approx(expected[1])
    assert abs(drawn - full).sum() / 2 < 0.1 < abs(draft - full).sum() / 2


def test_how_far_company_moves_logits():
    """The step here adds 0.5 to logits for every position of a pass beyond the first."""

    class Moving(Step):
        def run(self, cache, tokens, length, k, n):
            return super().run(cache, tokens, length, k, n) + 0.5 * (n - 1)

    moved = figures.moved(Moving(random_model(4)), [3, 1, 4])
    assert moved["ours"] == pytest.approx([0.5 * more for more in range(16)], abs=1e-9)
    assert moved["plain"] == pytest.approx([0.0] * 16, abs=1e-9)
    packed = figures.moved(prepare(random_model(4, dim=64, ffn_dim=96).float()), [3, 1, 4])
    assert packed["ours"] == [0.0] * 16 and max(packed["plain"]) < 1e-2


def test_time_is_that_of_each_level(monkeypatch):
    """The clock here ticks one second for each layer of a step's depth."""
    now = [0.0]

    class Clocked(Step):
        def run(self, cache, tokens, length, k, n):
            now[0] += cache.depths[k]
            return super().run(cache, tokens, length, k, n)

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    model, requests, _ = small_run()
    decoder = partial(bench.decode_with, model, Clocked(model))
    methods = {
        "greedy": ((), (), ()),
        "draft alone": ((2,), (4,), (0.0,)),
        "paper windows": ((2, 4), (1, 1), (0.0, 0.0)),
        "hispec": ((2, 4), (2, 4), (0.0, 0.0)),
    }
    time = figures.where_time_goes(methods, decoder, requests, 12, ())
    names = ["greedy", "draft exit alone\n2(4)", "HiSpec\n2(2) 4(4)"]
    for name, ladder in zip(names, [methods[n] for n in figures.BARS if n in methods], strict=True):
        exits, windows, _ = ladder
        made = [generate(model, r.prompt, 12, exits=exits, windows=windows) for r in requests]
        calls = [sum(g.levels[k].calls for g in made) for k in range(len(exits) + 1)]
        of = [1e3 * n * e / 48 for n, e in zip(calls, (*exits, 9))]
        assert time[name] == pytest.approx([*[*of[:-1], 0.0, 0.0][:2], of[-1], 0.0])


# The formula

COLUMNS = {"beta": [0.7, 0.8, 0.9, 0.9, 0.95, 0.95], "alpha": [0.7, 0.8, 0.7, 0.8, 0.8, 0.9]}


@pytest.mark.parametrize(
    "d, i, published",
    [
        (1 / 8, 1 / 4, [1.25, 1.27, 1.21, 1.26, 1.25, 1.28]),
        (1 / 32, 1 / 4, [1.27, 1.25, 1.52, 1.37, 1.53, 1.29]),
        (1 / 32, 1 / 8, [1.22, 1.31, 1.29, 1.38, 1.45, 1.46]),
        (0.01, 1 / 8, [1.34, 1.36, 1.53, 1.64, 1.86, 1.55]),
    ],
)
def test_the_formula_gives_the_table_it_was_published_with(d, i, published):
    """HiSpec over one exit, both tuned; a full verification costs only the upper layers."""
    single, hispec = figures.speed_up_by_rates(d, i, COLUMNS["alpha"], COLUMNS["beta"], full=1 - i)
    assert hispec / single == pytest.approx(published, abs=0.02)


NO_HEADS = {e: [0.0] * (WIDTHS[-1] + 1) for e in (2, 8, 32)}


def made_up(rng, alpha, beta, n, prefill=0.0):
    """A text, all 0, whose tokens agree independently at these rates."""
    middle = [int(rng.random() >= beta) for _ in range(n)]
    choices = {2: [m if rng.random() < alpha else 2 for m in middle], 8: middle, 32: [0] * n}
    return Trace([], prefill, choices, {e: [1.0] * n for e in choices})


@pytest.mark.parametrize("alpha, beta", [(0.7, 0.9), (0.4, 0.5)])
def test_the_formula_is_what_the_recursion_takes_when_width_is_free(alpha, beta):
    """Replayed on a made-up text, with the best of a few windows; a full pass costs 1."""
    n = 6000
    text = made_up(Random(1), alpha, beta, n)
    trunk = {e: [e / 32] * (WIDTHS[-1] + 1) for e in (0, 2, 8, 32)}
    costs = Costs(trunk, NO_HEADS, 0.0, dict.fromkeys(NO_HEADS, 0.0))

    def best(exits, windows):
        return max(n / replay(text, (exits, w, (0.0,) * len(exits)), costs, 32) for w in windows)

    single, hispec = figures.speed_up_by_rates(2 / 32, 8 / 32, alpha, beta)
    alone = [((e,), [(w,) for w in range(1, 14)]) for e in (2, 8)]
    assert max(best(*one) for one in alone) == pytest.approx(float(single), rel=0.03)
    both = [(a, b) for a in range(1, 5) for b in range(a, 12)]
    assert best((2, 8), both) == pytest.approx(float(hispec), rel=0.03)


def test_what_the_formula_leaves_out_is_charged_bit_by_bit(monkeypatch):
    """First the texts are replayed without the costs of prompts and widths; each cost added is
    checked by a replay.
    """
    monkeypatch.setattr(figures, "WINDOWS", (1, 2, 4, 8))
    rng = Random(2)
    easy_and_hard = ((0.9, 0.95), (0.5, 0.85))
    made = [made_up(rng, *rates, 4000, prefill=100.0) for rates in easy_and_hard]
    trunk = {e: [e / 32 * (1 + w / 10) for w in range(WIDTHS[-1] + 1)] for e in (0, 2, 8, 32)}
    costs = Costs(trunk, NO_HEADS, 0.0, dict.fromkeys(NO_HEADS, 0.0))
    recorded, rates = figures.Recorded(32, costs, made), figures.rates(made, (2, 8), 32)
    found = figures.charged(recorded, (2, 8), rates)
    assert list(found) == ["formula", "texts", "widths", "prompt"]
    assert found["formula"] == figures.speed_up_by_rates(2 / 32, 8 / 32, *rates)[1]

    def best(costs, prefill):
        windows = [(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if a <= b]
        ladders = [((), (), ()), *(((2, 8), w, (0.0, 0.0)) for w in windows)]
        greedy, *took = (sum(prefill + replay(t, x, costs, 32) for t in made) for x in ladders)
        return greedy / min(took)

    flat = {e: [0.0, *[seconds[1]] * WIDTHS[-1]] for e, seconds in trunk.items()}
    assert found["texts"] == pytest.approx(best(Costs(flat, NO_HEADS, 0.0, costs.loop), 0.0))
    assert found["widths"] == pytest.approx(best(costs, 0.0))
    assert found["prompt"] == pytest.approx(best(costs, 100.0))
    assert found["texts"] > found["widths"] > found["prompt"]
