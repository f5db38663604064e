"""The search for ladders, and its basis: the costs of passes and the replay of ladders."""

from collections import defaultdict
from functools import partial

import pytest
import test_bench
from conftest import random_model

import bench
from fast.cpu import prepare
from fast.cuda import FixedStep
from hispec import Generation, LevelStats, Step, generate
from lab import costs as costs_room
from lab import tune
from lab.costs import WIDTHS, Costs, Trace, measure_costs, replay, trace, with_loop
from model import ExitHead

small_bench = test_bench.small_bench  # the fixture: bench.main on a small random model
EVERY_WIDTH = range(WIDTHS[-1] + 1)
NO_TIME = dict.fromkeys(range(9), [0.0] * len(EVERY_WIDTH))
A_SECOND = dict.fromkeys(range(1, 9), [1.0] * len(EVERY_WIDTH))
ONE_A_PASS = Costs(NO_TIME, A_SECOND, 0.0, dict.fromkeys(range(9), 0.0))


@pytest.fixture
def free(monkeypatch):
    """Measure no costs: every pass takes one second."""
    monkeypatch.setattr(tune, "measure_costs", lambda step, exits: ONE_A_PASS)


# fastest in all, though not on the last prompt, and not on the first
@pytest.mark.parametrize("costs, best", [({3: (1, 2), 6: (3, 1)}, 3), ({3: (1, 5), 6: (2, 1)}, 6)])
def test_tuning_adds_up_over_the_prompts(monkeypatch, free, costs, best):
    def clocked(exits=(), windows=(), thresholds=()):
        def decode(prompt, n, *, stop=()):
            seconds = costs.get(windows[0], (9, 9))[prompt[0]] if exits == (1,) else 10
            return Generation([3] * 4, [LevelStats(5, calls=4)], seconds)

        return decode

    monkeypatch.setattr(tune, "WINDOWS", (3, 6, 8))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(tune, "RUN", 100)
    found = tune.tune(Step(random_model()), [[0], [1]], 4, (), clocked)
    for name in "single-layer", "draft alone":
        assert (found[name]["exits"], found[name]["windows"]) == ((1,), (best,))
        assert found[name]["measured"] == pytest.approx(20 / sum(costs[best]))


@pytest.mark.parametrize("fastest", [1, 6, 16])
def test_tuning_climbs_to_the_fastest_windows_from_wherever_it_begins(monkeypatch, free, fastest):
    def clocked(exits=(), windows=(), thresholds=()):
        far = (abs(tune.WINDOWS.index(w) - tune.WINDOWS.index(fastest)) for w in windows)
        made = Generation([3] * 4, [LevelStats(5, calls=4)], 20.0 + sum(far) if windows else 40.0)
        return lambda prompt, n, *, stop=(): made

    monkeypatch.setattr(tune, "RUN", 1)
    for best in tune.tune(Step(random_model()), [[0]], 4, (), clocked).values():
        assert best["windows"] == (fastest,) * len(best["exits"]) and best["measured"] == 2


def test_every_kind_is_searched_and_each_ladders_own_draft_alone(monkeypatch, free):
    monkeypatch.setattr(tune, "RUN", 4)
    model = random_model(n_layers=6)
    decoder = partial(bench.decode_with, model, Step(model))
    found = tune.tune(Step(model), [[1, 2]], 6, (), decoder)
    assert list(found)[:6] == [
        "single-layer",
        "hispec",
        "look-up",
        "look-up, exit",
        "three exits",
        "draft alone",
    ]
    first = {kind["exits"][0] for kind in found.values() if len(kind["exits"]) > 1} - {0}
    alone = [kind["exits"] for name, kind in found.items() if name.endswith("alone")]
    assert {(exit,) for exit in first} == {*alone}
    assert found["draft alone"]["exits"] == found["hispec"]["exits"][:1]
    assert found["look-up"]["exits"] == (0,) and len(found["three exits"]["exits"]) == 3
    for kind in found.values():
        ran = [(r["exits"], r["windows"], r["thresholds"]) for r in kind["ran"]]
        assert len({*ran}) == len(ran) >= 4
        assert kind["measured"] == max(r["measured"] for r in kind["ran"])


def test_the_bench_runs_what_was_tuned_and_so_does_the_next(
    small_bench, monkeypatch, free, tmp_path
):
    for name, few in (("WINDOWS", (3, 6)), ("COARSE", (3, 6)), ("THRESHOLDS", (0.0,))):
        monkeypatch.setattr(tune, name, few)
    brief = ["--quick", "--temperature", "0", "--max-new-tokens", "5"]
    _, tuned = small_bench(*brief, "--tune")
    assert tuned["ladders"] == "tuned on this machine, now"
    assert not (tmp_path / "shipped.json").exists()
    _, later = small_bench(*brief)
    assert later["ladders"] == "tuned on this machine"
    ours = [[(m["exits"], m["windows"]) for m in run["methods"][:7]] for run in (tuned, later)]
    assert ours[0] == ours[1]
    small_bench(*brief, "--tune", "--ship")
    assert (tmp_path / "shipped.json").exists()


def test_runs_keep_the_faster_turn_and_the_right_ladder():
    clock = iter([9, 3, 4, 5, 1, 8, 6, 7])  # two ladders, two turns, two prompts

    def clocked(exits):
        return lambda prompt, n, stop: Generation([len(exits)], [], next(clock))

    ladders = [tune.GREEDY, ((1,), (2,), (0.0,))]
    made = tune.run({ladder: clocked(ladder[0]) for ladder in ladders}, [[1], [2]], 4, ())
    assert [[(g.tokens, g.seconds) for g in made[x]] for x in ladders] == [
        [([0], 4), ([0], 1)], [([1], 3), ([1], 7)]
    ]  # fmt: skip


# ---- costs and replay ---------------------------------------------------------------------------


def test_a_replay_takes_the_steps_that_a_generation_takes():
    """Steps are counted along a text on which one exit is sometimes wrong, the other never."""
    model = random_model(3)
    text = trace(model, [1, 2], 40, (), (1, 3), partial(generate, model))
    steps = lambda *ladder: replay(text, ladder, ONE_A_PASS, model.config.n_layers)  # noqa: E731
    for exits, windows in ((), ()), ((1,), (3,)), ((3,), (6,)), ((0,), (4,)), ((0, 3), (2, 4)):
        out = generate(model, [1, 2], 40, exits=exits, windows=windows)
        taken = sum(level.calls for level in out.levels if level.exit > 0)
        assert steps(exits, windows, (0.0,) * len(exits)) == pytest.approx(taken, rel=0.1)
    # a draft in doubt stops: at threshold 1 after every token, as a window of 1 does
    assert steps((3,), (6,), (1.0,)) == steps((3,), (1,), (0.0,))


def test_a_replay_charges_each_segment_the_difference_of_its_depths():
    """All drafts are right, two per step: level 0 runs layers 1..2, the full model 3..7, each with
    a head.
    """
    trunk = {e: [e**2 * w for w in EVERY_WIDTH] for e in (0, 2, 7)}
    head = {exit: [seconds] * len(EVERY_WIDTH) for exit, seconds in ((2, 0.5), (7, 3.0))}
    costs = Costs(trunk, head, 100.0, {2: 0.25, 7: 1.25})
    text = Trace([1], 0.0, {2: [5] * 6, 7: [5] * 6}, {2: [1.0] * 6, 7: [1.0] * 6})
    # the second round begins with the full model's own token, which level 0 has not run. Six
    # positions in all: the prompt's own token, two drafts and a bonus, then two drafts
    drafts, checks, layers = 4, 2, 4 * 6 + (49 - 4) * 6
    assert replay(text, ((2,), (2,), (0.0,)), costs, 7) == layers + drafts * 0.75 + checks * 4.25
    # a threshold asks each of the drafting level's steps how sure it is
    doubting = replay(text, ((2,), (2,), (0.5,)), costs, 7)
    assert doubting == layers + drafts * 100.75 + checks * 4.25


@pytest.mark.parametrize("fixed", [False, True])
def test_costs_by_depth_and_width_of_any_step(monkeypatch, fixed):
    """Passes here take one second per position and layer, and ten for a head."""

    def seconds(step, depth, widths, context):
        assert widths == WIDTHS and context == 64 - WIDTHS[-1]
        rows = [-(-n // 16) * 16 if fixed else n for n in widths]
        layers = depth + (depth in step.model.blocks)
        return [layers * n for n in rows], [layers * n + 10 for n in rows]

    monkeypatch.setattr(costs_room, "pass_seconds", seconds)
    model = random_model()
    model.exit_heads["3"] = ExitHead(model.config, width=3).double()
    costs = measure_costs(Step(model), (1, 3))
    assert costs.trunk.keys() == {0, 1, 3, 5} and costs.head.keys() == {1, 3, 5}
    assert costs.doubt > 0 and costs.loop == {1: 0.0, 3: 0.0, 5: 0.0}
    rows = [0, *(16 if w <= 16 else 32 for w in EVERY_WIDTH[1:])] if fixed else [*EVERY_WIDTH]
    for depth in 0, 1, 3, 5:
        assert costs.trunk[depth] == pytest.approx([depth * n for n in rows])
    assert costs.head[5] == pytest.approx([0.0] + [10.0] * WIDTHS[-1])
    own_block = [0.0, *(n + 10.0 for n in rows[1:])]  # a layer more than its depth: the head's
    assert costs.head[3] == pytest.approx(own_block)


@pytest.mark.parametrize("step", [Step, prepare, lambda m: FixedStep(m, 64, False)])
def test_costs_of_real_passes(step):
    costs = measure_costs(step(random_model()), (1, 3))
    for row in costs.trunk[5], *costs.head.values():
        assert len(row) == len(EVERY_WIDTH) and row[0] == 0 and min(row) >= 0
    assert min(costs.trunk[1][1:]) > 0


def test_what_a_step_costs_beyond_its_pass_is_what_runs_of_one_exit_took_longer():
    """Beyond a head's 1, each of greedy's nine steps per text takes 1.5, each of an exit's 0.25."""
    model = random_model(3)
    decode = partial(generate, model)
    traces = [trace(model, prompt, 10, (), (1, 3), decode) for prompt in ([1], [2, 5])]
    alone = defaultdict(list)
    for exits, beyond in ((), 1.5), ((1,), 0.25), ((3,), 0.25):
        ladder = exits, (4,) * len(exits), (0.0,) * len(exits)
        for text in traces:
            out = generate(model, text.prompt, 10, exits=exits, windows=ladder[1])
            drafts = out.levels[0].calls if exits else 0
            checks = out.levels[-1].calls - 1  # the first reads the prompt
            out.prefill_seconds, out.seconds = 7.0, 7.0 + drafts * (1 + beyond) + checks * 2.5
            alone[ladder].append(out)
    costs = with_loop(ONE_A_PASS, traces, alone, model.config.n_layers)
    # at depth 2 nothing was run
    expected = {1: 0.25, 2: 0, 3: 0.25, 5: 1.5}
    assert {e: costs.loop[e] for e in expected} == pytest.approx(expected, abs=0.1)
