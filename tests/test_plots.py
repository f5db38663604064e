"""The figures of a whole run on a small random model: written whole, and each number in its place."""

import copy
import dataclasses
from collections import defaultdict
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import test_bench
import test_figures
from matplotlib.figure import Figure
from test_figures import gather, small_run

from lab import figures, learning, plots, tune

few_windows = test_figures.few_windows  # the fixture: smaller grids
small_bench = test_bench.small_bench  # the fixture: bench.main on a small random model


def test_a_run_draws_each_figure_with_its_setting(small_bench, few_windows, tmp_path):
    folder = tmp_path / "new" / "folder"
    _, result = small_bench("--quick", "--max-new-tokens", "6", "--figures", str(folder))
    kinds = ("png", "svg")
    names = {f"{name}.{kind}" for name in plots.PLOTS for kind in kinds}
    assert {path.name for path in folder.iterdir()} == names
    setting = "{model}, {dtype}, {device}, threads: {threads}".format(**result)
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    for path in folder.glob("*.svg"):
        words = " ".join(" ".join(ElementTree.parse(path).getroot().itertext()).split())
        assert setting in words and f"torch {result['versions']['torch']}" in words
        assert " ".join(result["command"].split()) in words


def test_a_figure_is_written_whole_or_not_at_all_and_always_alike(data, monkeypatch, tmp_path):
    header = dict(model="m", dtype="float32", device="a processor", threads=1, versions={})
    header["command"] = "python bench.py --figures out"
    for folder in ("a", "b"):
        plots.save(tmp_path / folder, data, header)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def half(figure, to, **options):
        to.write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="full"):
        plots.save(tmp_path / "c", data, header)
    assert list((tmp_path / "c").iterdir()) == []
    # the style is the figures' own
    assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]


@pytest.fixture
def data(gathered):
    return copy.deepcopy(gathered)


@pytest.fixture(scope="module")
def gathered():
    with pytest.MonkeyPatch.context() as patch:
        test_figures.make_small(patch)
        return gather(small_run())


def drawn(plot, data):
    figure = Figure()
    assert plot(figure, data)
    return figure.axes


def test_time_is_stacked_in_milliseconds_of_a_token(data):
    time = {
        "greedy": [0, 0, 9.0, 1.0],
        "draft exit alone\n2(2)": [1.0, 0, 6.0, 0.5],
        "HiSpec\n2(2) 8(4)": [1.0, 2.0, 3.0, 0.25],
    }
    (axes,) = drawn(plots.plot_time, dataclasses.replace(data, time=time))
    for k, bars in enumerate(axes.containers):
        assert [bar.get_height() for bar in bars] == [parts[k] for parts in time.values()]
        assert [bar.get_y() for bar in bars] == [sum(parts[:k]) for parts in time.values()]
    assert "6.0 ms a token after the draft exit, 3.0 with" in axes.get_title()


def test_layers_are_counted_with_and_without_what_levels_share(data):
    """HiSpec's positions 2, 1.5 and 1.25 in segments of 2, 2 and 5 layers; alone they would be of
    2, 4 and 9."""
    (axes,) = drawn(plots.plot_reuse, data)
    heights = defaultdict(list)
    for bar in axes.patches:
        heights[round(bar.get_center()[0])].append(bar.get_height())
    hispec, draft = [2 * 2, 2 * 1.5, 5 * 1.25], [2 * 1.75, 7 * 1.25]
    assert heights == {0: [9 * 1.25], 1: [4 * 1.5, 5 * 1.25], 2: hispec, 3: draft}
    unshared = [11.25, 4 * 1.5 + 11.25, 4 + 6 + 11.25, 2 * 1.75 + 11.25]
    assert [line.get_ydata()[0] for line in axes.lines] == unshared
    assert "13 layers a token; if its levels shared nothing, it would be 21" in axes.get_title()


def test_one_token_is_drawn_by_the_full_models_likeliest_tokens(data, monkeypatch):
    monkeypatch.setattr(plots, "SHOWN", 2)
    rows = np.array([[0.5, 0.25, 0.25], [0.1, 0.3, 0.6], [0.15, 0.25, 0.6]])
    (axes,) = drawn(plots.plot_sampling, dataclasses.replace(data, one_token=rows))
    bars = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert bars == [pytest.approx(b) for b in ([25, 25, 50], [60, 30, 10], [60, 25, 15])]
    assert "5.0% off" in axes.get_title() and "the draft's 40%" in axes.get_title()


def test_windows_are_drawn_by_n_d_over_n_i(data):
    (axes,) = drawn(plots.plot_windows, data)
    one, three, adaptive, greedy = axes.lines
    speed = {x[1]: tokens for x, tokens in list(data.speed.items())[1:-1]}
    assert dict(zip(*one.get_data(), strict=True)) == {2: speed[1, 2], 4: speed[1, 4]}
    assert dict(zip(*three.get_data(), strict=True)) == {4: speed[3, 4]}
    assert adaptive.get_ydata()[0] == list(data.speed.values())[-1]
    assert greedy.get_ydata()[0] == data.speed[tune.GREEDY]


def test_the_formula_is_drawn_with_this_runs_rates_and_costs(data, monkeypatch):
    asked, real = [], figures.speed_up_by_rates

    def watched(*of):
        asked.append([of[0], of[1], np.shape(of[2]), np.shape(of[3])])
        return real(*of)

    monkeypatch.setattr(plots, "speed_up_by_rates", watched)
    first, *_ = drawn(plots.plot_where, data)
    steps = [data.costs.trunk[e][1] + data.costs.head[e][1] + data.costs.loop[e] for e in (2, 4, 9)]
    assert asked[0][:2] == pytest.approx([steps[0] / steps[2], steps[1] / steps[2]])
    # alpha up, beta to the right
    assert asked[0][2:] == [(len(plots.RATES), 1), (len(plots.RATES),)]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in first.lines]
    assert points == [(beta, alpha) for alpha, beta in data.rates.values()]


def test_what_draft_heads_have_learned_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "h8").mkdir()
    rows = ["tokens,loss,draft 1,draft 2", "1000000,4.0,0.25,0.125", "3000000,3.0,0.5,0.375"]
    (tmp_path / "h8/learning.csv").write_text("\n".join(rows) + "\n")
    found = {"h8": learning.read(tmp_path / "h8")}
    (axes,) = drawn(learning.plot, found)
    lines = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines}
    assert lines == {"h8, draft 1": (1, 3, 25, 50), "h8, draft 2": (1, 3, 12.5, 37.5)}
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "h8"), "--out", str(tmp_path / "a/f")])
    learning.main()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["f.png", "f.svg"]
    with pytest.raises(ValueError, match="has no learning.csv"):
        learning.read(tmp_path)
