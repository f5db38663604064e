"""The figures of a whole run on a small random model, and the numbers behind them, worked out a second way."""

import dataclasses
import re
import sys
from collections import defaultdict
from functools import partial
from itertools import product
from random import Random
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import test_bench
import torch
from conftest import random_model
from matplotlib.figure import Figure

import bench
import figures
import tune
from bench import Request
from hispec import Generation, generate

small_bench = test_bench.small_bench  # the fixture: bench.main on a small random model

HEADER = {
    "model": "m", "dtype": "float32", "device": "a processor", "threads": 1, "versions": {"torch": "2"},
    "command": "python bench.py --figures out",
}  # fmt: skip


def small_run(n_layers: int = 9, exits=(2, 4), thresholds=(0.0, 0.0)):
    """A model, requests in three categories with greedy answers of 12 tokens, and results as the bench has them."""
    model = random_model(4, n_layers=n_layers)
    prompts = {"chat": [[1, 2, 3], [5]], "code": [[7, 1]], "maths": [[3, 4, 9, 9]]}
    requests = [Request(c, p, generate(model, p, 12).tokens) for c, several in prompts.items() for p in several]
    ladders = {"greedy": ((), ()), "single-layer": (exits[1:], (4,)), "hispec": (exits, (2, 4)), "peer": ((), ())}
    speeds = {"greedy": 1.0, "single-layer": 1.5, "hispec": 1.75, "peer": 0.5}
    results = []
    for m, (name, (e, w)) in enumerate(ladders.items()):
        by = {c: {"speedup_vs_greedy": speeds[name] + (m > 0) * k / 4} for k, c in enumerate(prompts)}
        t = thresholds if name == "hispec" else ()
        positions = [] if name == "peer" else [2.0, 1.5, 1.25][-len(e) - 1 :]
        result = dict(name=name, exits=e, windows=w, thresholds=t, speedup_vs_greedy=speeds[name], by_category=by)
        result["positions"] = positions
        results.append(result)
    return model, requests, results


@pytest.fixture
def few_windows(monkeypatch):
    """Smaller grids, that a test need not wait."""
    monkeypatch.setattr(figures, "N_D", (1, 3))
    monkeypatch.setattr(figures, "N_I", (2, 4))
    monkeypatch.setattr(figures, "WINDOWS", (1, 3))
    monkeypatch.setattr(figures, "THRESHOLDS", (0.0, 0.5))
    monkeypatch.setattr(figures, "SAMPLES", 40)


def gather(run, tuned=None, **patches) -> figures.Data:
    model, requests, results = run
    return figures.gather(model, requests, results, tuned or {}, 12, (), partial(bench.decoder, model, None), False)


def same_tokens(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    return (a.argmax(-1) == b.argmax(-1)).flatten().tolist()


# A whole run


def test_a_run_draws_each_figure_whole_and_twice(small_bench, few_windows, tmp_path):
    _, result = small_bench("--quick", "--figures", str(tmp_path / "new" / "folder"))
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert drawn.keys() == {f"{name}.{kind}" for name in figures.PLOTS for kind in ("png", "svg")}
    assert len(drawn) == 22
    for name, content in drawn.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
            assert content[16:24] == (1440).to_bytes(4, "big") + (840).to_bytes(4, "big")
        else:
            texts = [text for e in ElementTree.fromstring(content).iter() for text in (e.text, e.tail) if text]
            words = " ".join(" ".join(texts).split())
            assert f"{result['model']}, {result['dtype']}, {result['device']}, threads: {result['threads']}" in words
            assert f"torch {result['versions']['torch']}" in words
            assert (
                result["command"].split()
                == words[words.index("python bench.py") :].split()[: len(result["command"].split())]
            )
            assert not re.search(rb"<dc:date>", content)


def test_the_figures_of_tuning_and_peers(small_bench, few_windows, monkeypatch, tmp_path):
    """--tune in the same run adds its ladders to the predictions, its methods to the categories."""
    monkeypatch.setattr(tune, "RUN", 2)
    kept = []
    monkeypatch.setattr(figures, "save", lambda folder, data, header: kept.append(data))
    small_bench("--quick", "--tune", "--figures", str(tmp_path))
    (data,) = kept
    assert {"tuning: single-layer", "tuning: hispec", "tuning: look-up"} <= data.compared.keys()
    assert len(data.compared["tuning: hispec"]) >= 2  # and the neighbours of whichever was fastest
    assert len(data.compared["all prompts"]) == len(data.results) - 1 >= 4  # all but greedy
    assert data.ladder[:2] == (data.results[2]["exits"], data.results[2]["windows"])


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_ends_at_once(monkeypatch, capsys, tmp_path, folder):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["bench.py", "--figures", str(tmp_path / folder)])
    monkeypatch.setattr(bench, "load", lambda *arguments: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "--figures: cannot write there" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_the_trial_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", "--figures", str(tmp_path / "new")])
    assert bench.parse_arguments().figures == tmp_path / "new"
    assert list((tmp_path / "new").iterdir()) == []


def test_a_figure_is_written_whole_or_not_at_all_and_always_alike(few_windows, monkeypatch, tmp_path):
    data = gather(small_run())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        figures.save(tmp_path / folder, data, HEADER)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def half(figure, to, **options):
        to.write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", half)
    (tmp_path / "c").mkdir()
    with pytest.raises(OSError, match="full"):
        figures.save(tmp_path / "c", data, HEADER)
    assert list((tmp_path / "c").iterdir()) == []
    assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]  # the style is the figures' own


# The numbers


def test_agreement_and_rates_are_those_of_whole_passes(few_windows):
    """Every exit's choices anew, by passes without a cache."""
    model, requests, _ = run = small_run()
    data = gather(run)
    on_text, on_greedy, by = ({e: [] for e in range(1, 9)} for _ in range(2)), None, defaultdict(lambda: ([], []))
    on_text, on_greedy = on_text
    for r in requests:
        ids, n = torch.tensor([r.prompt + r.greedy]), len(r.prompt)
        with torch.no_grad():
            full, draft, middle = (model(ids, exit=e) for e in (None, 2, 4))
            for e in range(1, 9):
                same = same_tokens(model(ids, exit=e), full)
                on_text[e] += same[: n - 1]
                on_greedy[e] += same[n - 1 : -1]
        for category in ("all", r.category):
            by[category][0].extend(same_tokens(draft, middle)[n - 1 : -1])
            by[category][1].extend(same_tokens(middle, full)[n - 1 : -1])
    assert [len(on_text[1]), len(on_greedy[1])] == [2 + 0 + 1 + 3, 4 * 12]
    for seen, expected in zip(data.agreement, (on_text, on_greedy), strict=True):
        assert seen == pytest.approx([np.mean(expected[e]) for e in range(1, 9)])
    assert 0 < np.mean(data.agreement) < 1
    assert data.rates.keys() == by.keys() == {"all", "chat", "code", "maths"}
    for category, both in by.items():
        assert data.rates[category] == pytest.approx(tuple(map(np.mean, both)))


def test_the_grid_is_run_and_its_texts_are_greedys(few_windows, monkeypatch):
    asked, real = {}, figures.run

    def watched(decoders, prompts, *others):
        made = real(decoders, prompts, *others)
        asked.update(prompts=prompts, made=made)
        for ladder, generations in made.items():  # clocked: 1 s a prompt for greedy, 1/2 s and less for others
            for g in generations:
                g.seconds = 1.0 if ladder == figures.GREEDY else 1 / sum(ladder[1])
        return made

    monkeypatch.setattr(figures, "run", watched)
    model, requests, results = small_run()
    data = gather((model, requests, results))
    assert asked["prompts"] == [[1, 2, 3], [7, 1], [3, 4, 9, 9]]  # the first of each category
    grid = [((2, 4), w, (0.0, 0.0)) for w in [(1, 2), (1, 4), (3, 4)]]
    assert list(asked["made"])[:-1] == [figures.GREEDY, *grid] == list(data.speed)[:-1]
    adaptive = list(data.speed)[-1]
    assert adaptive[0] == (2, 4) and any(adaptive[2])
    texts = [generate(model, prompt, 12).tokens for prompt in asked["prompts"]]
    assert all([g.tokens for g in generations] == texts for generations in asked["made"].values())
    assert data.identical
    assert [data.speed[x] for x in (figures.GREEDY, *grid)] == pytest.approx([12, 36, 60, 84])
    assert [measured for _, measured in data.compared["grid of windows"]][:3] == pytest.approx([3, 5, 7])
    requests[2].greedy[5] += 1
    assert not gather((model, requests, results)).identical


def test_thresholds_that_tuning_found_are_the_adaptive_line(few_windows):
    data = gather(small_run(thresholds=(0.3, 0.1)))
    assert list(data.speed)[-1] == ((2, 4), (2, 4), (0.3, 0.1))


def test_one_token_is_sampled_where_draft_and_full_model_differ_most(few_windows, monkeypatch):
    monkeypatch.setattr(figures, "OPENING", 2)
    model, requests, _ = run = small_run()
    laws = {}
    for r in requests:
        with torch.no_grad():
            rows = [model(torch.tensor([r.prompt[:2]]), exit=e)[0, -1].softmax(-1).numpy() for e in (2, 9)]
        laws[tuple(r.prompt[:2])] = rows
    opening = max(laws, key=lambda o: max(abs(laws[o][0] - laws[o][1])))
    draft, full, drawn = gather(run).law
    assert draft == pytest.approx(laws[opening][0]) and full == pytest.approx(laws[opening][1])
    ladder = dict(exits=(2, 4), windows=(2, 4))
    tokens = [generate(model, opening, 1, **ladder, temperature=1.0, seed=s).tokens[0] for s in range(40)]
    assert drawn == pytest.approx(np.bincount(tokens, minlength=len(full)) / 40)


def test_company_moves_logits_in_the_plain_step_only(monkeypatch):
    real = figures.step
    monkeypatch.setattr(figures, "step", lambda *arguments: real(*arguments) + 0.5 * arguments[-1])
    moved = figures.moved(random_model(4), [3, 1, 4])
    assert moved["plain"] == pytest.approx([0.5 * more for more in range(figures.WIDTH)], abs=1e-9)
    assert moved["fixed"] == [0.0] * figures.WIDTH


def test_runs_keep_the_faster_turn_and_the_right_ladder():
    clock = iter([9, 3, 4, 5, 1, 8, 6, 7])  # two ladders, two turns, two prompts

    def clocked(exits):
        return lambda prompt, n, stop: Generation([len(exits)], [], next(clock))

    one = ((1,), (2,), (0.0,))
    made = tune.run({ladder: clocked(ladder[0]) for ladder in (figures.GREEDY, one)}, [[1], [2]], 4, ())
    assert [(g.tokens, g.seconds) for g in made[figures.GREEDY]] == [([0], 4), ([0], 1)]
    assert [(g.tokens, g.seconds) for g in made[one]] == [([1], 3), ([1], 7)]


def test_pairs_of_exits_are_predicted_with_their_best_windows(few_windows, monkeypatch):
    """Against replays of every window on the same costs and traces, one exit and two."""
    traces, real = [], figures.trace
    monkeypatch.setattr(figures, "trace", lambda *arguments: traces.append(real(*arguments)) or traces[-1])
    data = gather(small_run(n_layers=9))
    depths = [1, 2, 3, 4]  # up to half of 9, the paper's 2 and 3, the run's 2 and 4
    expected = {(a,) for a in depths} | {(a, b) for a, b in product(depths, depths) if a < b}
    assert data.pairs.keys() == expected
    assert len(traces) == 4

    def seconds(exits, windows):
        return sum(t.prefill + tune.replay(t, (exits, windows, (0.0,) * len(exits)), data.costs, 9) for t in traces)

    for exits in expected:
        windows = [(1,), (3,)] if len(exits) == 1 else [(1, 1), (1, 3), (3, 3)]
        best = max(seconds((), ()) / seconds(exits, w) for w in windows)
        assert data.pairs[exits] == pytest.approx(best)
    predicted = data.compared["all prompts"]
    assert [measured for _, measured in predicted] == [1.5, 1.75]
    assert predicted[1][0] == pytest.approx(seconds((), ()) / seconds((2, 4), (2, 4)))


def test_a_step_takes_its_layers_its_head_and_the_loop():
    widths = np.arange(tune.WIDTHS[-1] + 1)
    costs = tune.Costs({e: list(e * (2.0 + widths)) for e in (0, 2, 8)}, {8: list(10 * widths)}, 0.5)
    assert figures.step_seconds(costs, 8) == 8 * 3 + 10 + 0.5
    assert figures.step_seconds(costs, 8, 4, below=2) == 2 * 3 + 6 * 6 + 40 + 0.5


def test_the_papers_exits():
    assert figures.paper_exits(32) == (4, 8)
    assert figures.paper_exits(30) == (4, 8)
    assert figures.paper_exits(3) == (1, 2)


# The formula

COLUMNS = {"q": [0.7, 0.8, 0.9, 0.9, 0.95, 0.95], "p": [0.7, 0.8, 0.7, 0.8, 0.8, 0.9]}


@pytest.mark.parametrize(
    "d, i, published",
    [
        (1 / 8, 1 / 4, [1.25, 1.27, 1.21, 1.26, 1.25, 1.28]),
        (1 / 16, 1 / 4, [1.28, 1.25, 1.40, 1.35, 1.49, 1.27]),
        (1 / 32, 1 / 4, [1.27, 1.25, 1.52, 1.37, 1.53, 1.29]),
        (1 / 32, 1 / 8, [1.22, 1.31, 1.29, 1.38, 1.45, 1.46]),
        (0.01, 1 / 8, [1.34, 1.36, 1.53, 1.64, 1.86, 1.55]),
    ],
)
def test_the_formula_gives_the_table_it_was_published_with(d, i, published):
    """HiSpec over the single layer, both tuned, where a full verification is charged the upper layers alone."""
    single, hispec = figures.speed_up_by_rates(d, i, COLUMNS["p"], COLUMNS["q"], full=1 - i)
    assert hispec / single == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize("p, q", [(0.7, 0.9), (0.8, 0.7), (0.4, 0.5)])
def test_the_formula_is_what_the_recursion_takes_when_width_is_free(p, q):
    """Replayed on texts whose tokens agree independently, with the best of a few windows; a full pass costs 1."""
    rng, n = Random(1), 6000
    middle = [int(rng.random() >= q) for _ in range(n)]  # the text is all 0
    draft = [m if rng.random() < p else 2 for m in middle]
    choices = {2: draft, 8: middle, 32: [0] * n}
    text = tune.Trace([], 0.0, choices, {e: [1.0] * n for e in choices})
    widths = range(tune.WIDTHS[-1] + 1)
    free = {e: [0.0 for _ in widths] for e in choices}
    costs = tune.Costs({e: [e / 32 for _ in widths] for e in (0, *choices)}, free, 0.0)

    def best(exits, windows):
        return max(n / tune.replay(text, (exits, w, (0.0,) * len(exits)), costs, 32) for w in windows)

    single, hispec = figures.speed_up_by_rates(2 / 32, 8 / 32, p, q)
    alone = [((e,), [(w,) for w in range(1, 14)]) for e in (2, 8)]
    assert max(best(*one) for one in alone) == pytest.approx(float(single), rel=0.03)
    both = [(a, b) for a in range(1, 5) for b in range(a, 12)]
    assert best((2, 8), both) == pytest.approx(float(hispec), rel=0.03)


def test_the_formula_at_its_ends():
    grid = figures.RATES
    for speed_up in figures.speed_up_by_rates(0.1, 0.3, grid[:, None], grid):
        assert np.isfinite(speed_up).all() and speed_up.shape == (len(grid), len(grid))
        assert (np.diff(speed_up, axis=1) > 0).all()  # the better the intermediate, the faster
    single, hispec = figures.speed_up_by_rates(0.1, 0.3, 0.0, 0.0)  # nothing is ever right: one token a pass
    assert float(single) == pytest.approx(1 / 1.1, rel=1e-3)
    assert float(hispec) == pytest.approx(1 / 1.4, rel=1e-3)  # draft 0.1, intermediate 0.3, full 1


# What is drawn


@pytest.fixture
def data(few_windows):
    return gather(small_run())


def drawn(plot, data):
    figure = Figure()
    assert plot(figure, data)
    return figure.axes


def test_the_wall_shows_milliseconds_of_a_token(data):
    widths = range(tune.WIDTHS[-1] + 1)
    trunk = {e: [0.001 * e * w for w in widths] for e in (0, 1, 2, 4, 9)}
    costs = tune.Costs(trunk, {e: [0.01 for _ in widths] for e in (1, 2, 4, 9)}, 0.002)
    (axes,) = drawn(figures.plot_wall, dataclasses.replace(data, costs=costs))
    drafted, checked, full = ({x: y for x, y in zip(*line.get_data(), strict=True)} for line in axes.lines)
    assert drafted == pytest.approx({e: e + 12 for e in (1, 2, 4, 9)})
    assert checked == pytest.approx({e: (2 + 3 * (e - 2) + 12) / 3 for e in (4, 9)})  # N_d = 2: three positions
    assert full == pytest.approx({9: (4 + 5 * 5 + 12) / 5})  # N_i = 4: five positions, above exit 4


def test_one_pass_is_drawn_beside_as_many_of_one_position(data):
    trunk = {9: [0.001 * (4 + w) for w in range(tune.WIDTHS[-1] + 1)]}
    costs = dataclasses.replace(data.costs, trunk=trunk, head={9: [0.001 for _ in trunk[9]]})
    (axes,) = drawn(figures.plot_pass, dataclasses.replace(data, costs=costs))
    many, one, each = (dict(zip(*line.get_data(), strict=True)) for line in axes.lines)
    assert [line[7] for line in (many, one, each)] == pytest.approx([7 * 6, 12, 12 / 7])
    assert "8 positions takes 2.2 times" in axes.get_title()


def test_layers_are_counted_with_and_without_what_levels_share(data):
    """HiSpec's positions 2, 1.5 and 1.25 in segments of 2, 2 and 5 layers; alone they would be of 2, 4 and 9."""
    (axes,) = drawn(figures.plot_reuse, data)
    heights = defaultdict(list)
    for bar in axes.patches:
        heights[round(bar.get_center()[0])].append(bar.get_height())
    assert heights == {0: [9 * 1.25], 1: [4 * 1.5, 5 * 1.25], 2: [2 * 2, 2 * 1.5, 5 * 1.25]}
    assert [line.get_ydata()[0] for line in axes.lines] == [11.25, 4 * 1.5 + 11.25, 4 + 6 + 11.25]
    assert axes.get_title() == "HiSpec runs 13 layers a token; if its levels shared nothing, it would be 21"


def test_agreement_is_drawn_at_its_layer(data):
    (axes,) = drawn(figures.plot_agreement, data)
    for line, share in zip(axes.lines[:2], data.agreement, strict=True):
        assert dict(zip(*line.get_data(), strict=True)) == {e: 100 * a for e, a in enumerate(share, 1)}
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [2, 4]


def test_a_law_is_drawn_by_the_full_models_likeliest_tokens(data, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN", 2)
    law = np.array([[0.5, 0.25, 0.25], [0.1, 0.3, 0.6], [0.15, 0.25, 0.6]])
    (axes,) = drawn(figures.plot_sampling, dataclasses.replace(data, law=law))
    bars = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert bars == [pytest.approx(b) for b in ([25, 25, 50], [60, 30, 10], [60, 25, 15])]
    assert axes.get_title() == "HiSpec's samples are 5.0% off the full model's law, the draft's law is 40% off"


def test_both_steps_are_drawn_by_the_width_of_a_pass(data):
    (axes,) = drawn(figures.plot_one_shape, data)
    for line, far in zip(axes.lines, data.moved.values(), strict=True):
        assert dict(zip(*line.get_data(), strict=True)) == dict(enumerate(far, 1))


def test_windows_are_drawn_by_n_d_over_n_i(data):
    (axes,) = drawn(figures.plot_windows, data)
    one, three, adaptive, greedy = axes.lines
    speed = {x[1]: tokens for x, tokens in list(data.speed.items())[1:-1]}
    assert dict(zip(*one.get_data(), strict=True)) == {2: speed[1, 2], 4: speed[1, 4]}
    assert dict(zip(*three.get_data(), strict=True)) == {4: speed[3, 4]}
    assert adaptive.get_ydata()[0] == list(data.speed.values())[-1]
    assert greedy.get_ydata()[0] == data.speed[figures.GREEDY]


def test_the_heat_map_has_each_pair_in_its_place(data):
    data.pairs.update({pair: k + 1.0 for k, pair in enumerate(data.pairs)})
    axes, _ = drawn(figures.plot_exits, data)
    drafts, middles = ([int(t.get_text()) for t in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    table = axes.images[0].get_array()
    seen = {(d, i): table[row, column] for row, d in enumerate(drafts) for column, i in enumerate(middles) if d < i}
    assert seen == {pair: speed_up for pair, speed_up in data.pairs.items() if len(pair) == 2}
    texts = {(drafts[int(t.get_position()[1])], middles[int(t.get_position()[0])]): t.get_text() for t in axes.texts}
    assert texts == {pair: f"{speed_up:.2f}" for pair, speed_up in seen.items()}
    centres = [patch.get_center() for patch in axes.patches]
    marked = [(drafts[round(row)], middles[round(column)]) for column, row in centres]
    assert marked == [figures.paper_exits(9), data.ladder[0]] == [(2, 3), (2, 4)]


def test_categories_have_a_bar_for_each_method_but_greedy(data):
    (axes,) = drawn(figures.plot_categories, data)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["all", "chat", "code", "maths"]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {
        "single-layer (4)": [1.5, 1.5, 1.75, 2.0],
        "hispec (2, 4)": [1.75, 1.75, 2.0, 2.25],
        "peer": [0.5, 0.5, 0.75, 1.0],
    }
    assert axes.get_title() == "HiSpec over greedy: 1.75x (chat) to 2.25x (maths)"


def test_predictions_are_drawn_against_measurements():
    compared = {"a": [(1.0, 2.0), (3.0, 2.0)], "b": [(2.0, 2.0)]}
    (axes,) = drawn(figures.plot_predictions, SimpleNamespace(compared=compared))
    *kinds, diagonal = axes.lines
    assert [list(zip(*line.get_data(), strict=True)) for line in kinds] == list(compared.values())
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert "Half of 3 predictions are within 50%" in axes.get_title()


def test_the_formula_is_drawn_with_this_runs_rates_and_costs(data, monkeypatch):
    asked, real = [], figures.speed_up_by_rates

    def watched(d, i, p, q):
        asked.append((d, i, np.shape(p), np.shape(q)))
        return real(d, i, p, q)

    monkeypatch.setattr(figures, "speed_up_by_rates", watched)
    first, *_ = drawn(figures.plot_where, data)
    steps = [data.costs.trunk[e][1] + data.costs.head[e][1] + data.costs.loop for e in (2, 4, 9)]
    here = steps[0] / steps[2], steps[1] / steps[2]
    fractions = [here, (1 / 8, 1 / 4), (1 / 32, 1 / 8), here]
    assert [x[:2] for x in asked] == [pytest.approx(x) for x in fractions]
    assert asked[0][2:] == ((len(figures.RATES), 1), (len(figures.RATES),))  # p up, q to the right
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in first.lines]
    assert points == [(q, p) for p, q in data.rates.values()]
