"""The search for ladders, and what it keeps."""

import json
from functools import partial

import pytest
import torch
from conftest import random_model

import bench
from faststep import FixedStep
from hispec import Generation, LevelStats, generate
from lab import tune

HEADER = {
    "model": "m",
    "dtype": "float32",
    "step": "plain",
    "device": "cpu",
    "threads": 1,
    "versions": {},
    "command": "python bench.py --tune",
}


@pytest.mark.parametrize(
    "costs, best",
    [
        ({3: (1, 2), 6: (3, 1)}, 3),  # fastest in all, though not on the last prompt
        ({3: (1, 5), 6: (2, 1)}, 6),  # fastest in all, though not on the first
    ],
)
def test_tuning_adds_up_over_the_prompts(monkeypatch, costs, best):
    def clocked(exits=(), windows=(), thresholds=()):
        def decode(prompt, n, *, stop=()):
            seconds = costs.get(windows[0], (9, 9))[prompt[0]] if exits == (1,) else 10
            return Generation([3] * 4, [LevelStats(5, calls=4)], seconds)

        return decode

    monkeypatch.setattr(tune, "WINDOWS", (3, 6, 8))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(tune, "RUN", 100)
    chosen = tune.tune(random_model(), [[0], [1]], 4, (), clocked, None)["single-layer"]
    assert (chosen["exits"], chosen["windows"]) == ((1,), (best,))
    assert chosen["measured"] == pytest.approx(20 / sum(costs[best]))


@pytest.mark.parametrize("fastest", [1, 6, 16])
def test_tuning_climbs_to_the_fastest_windows_from_wherever_it_begins(monkeypatch, fastest):
    def clocked(exits=(), windows=(), thresholds=()):
        seconds = 20.0 + sum(
            abs(tune.WINDOWS.index(w) - tune.WINDOWS.index(fastest)) for w in windows
        )
        made = Generation([3] * 4, [LevelStats(5, calls=4)], seconds if windows else 40.0)
        return lambda prompt, n, *, stop=(): made

    monkeypatch.setattr(tune, "RUN", 1)
    for name, best in tune.tune(random_model(), [[0]], 4, (), clocked, None).items():
        assert best["windows"] == (fastest,) * tune.KINDS[name][0]
        assert best["measured"] == 2


def test_no_threshold_is_tried_where_one_token_is_asked_for(monkeypatch):
    """There it cannot change a step, and costs a read each."""
    asked = []
    tune.promising("hispec", (2, 4), lambda ladder: asked.append(ladder) or len(asked))
    both = {(w > 1, t > 0) for _, windows, doubts in asked for w, t in zip(windows, doubts)}
    assert both == {(True, True), (True, False), (False, False)}
    near = tune.neighbours(((2, 8), (2, 4), (0.7, 0.1)))
    assert {n[1]: n[2] for n in near} == {
        (1, 4): (0.0, 0.1), (3, 4): (0.7, 0.1), (2, 3): (0.7, 0.1), (2, 6): (0.7, 0.1)
    }  # fmt: skip
    model = random_model()
    for windows, doubts in (((1, 4), (0.9, 0.0)), ((1, 1), (0.5, 0.9))):
        with_them, without = (
            generate(model, [1, 2], 20, exits=(1, 2), windows=windows, thresholds=t)
            for t in (doubts, ())
        )
        assert with_them.tokens == without.tokens and with_them.levels == without.levels


@pytest.mark.parametrize("fixed", [False, True])
def test_tuning_runs_as_many_ladders_of_either_kind(monkeypatch, fixed):
    monkeypatch.setattr(tune, "RUN", 4)
    model = random_model(n_layers=6)
    fast = FixedStep(model, 40) if fixed else None
    chosen = tune.tune(model, [[1, 2]], 6, (), partial(bench.decoder, model, fast), fast)
    assert list(chosen) == list(tune.KINDS)
    assert chosen["look-up"]["exits"] == (0,) and len(chosen["three exits"]["exits"]) == 3
    for best in chosen.values():
        assert (
            len({(r["exits"], r["windows"], r["thresholds"]) for r in best["ran"]})
            == len(best["ran"])
            >= 4
        )
        assert best["measured"] == max(r["measured"] for r in best["ran"])


def test_ladders_are_kept_by_model_dtype_and_device(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "results" / "ladders.json")
    model = random_model()
    assert tune.saved_ladders(HEADER, model) == {}
    one = {"hispec": {"exits": [1, 2], "windows": [3, 4], "thresholds": [0.5, 0.0]}}
    two = {"single-layer": {"exits": [1], "windows": [2], "thresholds": [0.1]}}
    tune.save_ladders(HEADER, one)
    for key in ("model", "dtype", "device"):
        other = HEADER | {key: "other"}
        assert tune.saved_ladders(other, model) == {}
        tune.save_ladders(other, two)
        assert tune.saved_ladders(other, model) == two
    assert tune.saved_ladders(HEADER, model) == one


@pytest.mark.parametrize(
    "ladder",
    [
        {"exits": [1], "windows": [2]},
        {"exits": [1, 5], "windows": [2, 2]},
        {"exits": [1, 2], "windows": [2, 19]},
        {"exits": [1, 2], "windows": [0, 2]},
        {"exits": [1, 2]},
        [],
        {"exits": 3},
    ],
)
def test_a_ladder_that_does_not_fit_is_refused(monkeypatch, tmp_path, ladder):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "ladders.json")
    tune.save_ladders(HEADER, {"hispec": ladder})
    with pytest.raises(
        ValueError, match="ladders.json: hispec of m, float32, plain step, cpu does not fit"
    ):
        tune.saved_ladders(HEADER, random_model())


@pytest.mark.parametrize("content", ["{bad", "[]", '{"a": 3}'])
def test_a_damaged_ladder_file_is_named(monkeypatch, tmp_path, content):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "ladders.json")
    tune.LADDERS.write_text(content)
    with pytest.raises(ValueError, match="ladders.json is damaged"):
        tune.saved_ladders(HEADER, random_model())


def test_the_kept_ladder_is_hispecs_unless_that_loses(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "ladders.json")
    model = random_model()
    assert tune.kept_ladder(HEADER, model) is None
    slow = {"exits": [1, 2], "windows": [3, 4], "thresholds": [0.5, 0.0], "measured": 0.9}
    fast = {"exits": [0], "windows": [8], "thresholds": [0.0], "measured": 1.234}
    tune.save_ladders(HEADER | {"device": "GPU, 1 core"}, {"hispec": slow, "look-up": fast})
    ladder = {"exits": [0], "windows": [8], "thresholds": [0.0]}
    why = "kept by tuning, 1.23x greedy on GPU, 1 core"
    assert tune.kept_ladder(HEADER, model) == (ladder, why)
    assert tune.kept_ladder(HEADER | {"model": "another"}, model) is None
    tune.save_ladders(HEADER, {"hispec": slow})  # this machine's go first, if they fit
    assert tune.kept_ladder(HEADER, model)[1].endswith("0.90x greedy on this machine")
    tune.save_ladders(HEADER, {"hispec": slow | {"measured": 1.1}, "look-up": fast})
    assert tune.kept_ladder(HEADER, model)[0]["exits"] == [1, 2]
    for part, wrong in (("exits", [1, 99]), ("windows", [1]), ("measured", "fast")):
        tune.save_ladders(HEADER, {"hispec": slow | {part: wrong}, "look-up": {"measured": 2.0}})
        assert tune.kept_ladder(HEADER, model) == (ladder, why)
    tune.save_ladders(HEADER, {"hispec": [3], "look-up": fast})
    assert tune.kept_ladder(HEADER, model) == (ladder, why)


def test_default_exits():
    model = random_model(n_layers=30)
    assert tune.default_exits(model) == (4, 8)
    model.exits = (2, 5, 9)
    assert tune.default_exits(model) == (2, 5, 9)
    assert tune.default_exits(random_model(n_layers=3)) == (1, 2)
    for layers in (1, 2):
        with pytest.raises(ValueError, match=f"two exits below .* {layers} layers"):
            tune.default_exits(random_model(n_layers=layers))


@pytest.fixture
def searches(monkeypatch, tmp_path):
    """How often the number of threads was searched for; each time one more is found best."""
    found = []
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "results" / "ladders.json")
    monkeypatch.setattr(tune, "best_threads", lambda model: found.append(None) or len(found))
    return found


def test_the_number_of_threads_is_found_once_and_again_when_tuning(searches):
    model = random_model()
    assert [tune.kept_threads(HEADER, model) for _ in range(3)] == [1, 1, 1]
    assert tune.kept_threads(HEADER | {"model": "another"}, model) == 2
    assert tune.kept_threads(HEADER, model, anew=True) == 3
    assert tune.kept_threads(HEADER, model) == 3
    assert len(searches) == 3


def test_threads_and_ladders_are_kept_beside_each_other(searches):
    ladders = {"hispec": {"exits": [1, 2], "windows": [3, 4], "thresholds": [0.5, 0.0]}}
    model = random_model()
    tune.save_ladders(HEADER | {"threads": 7}, ladders)
    assert tune.kept_threads(HEADER, model) == 7
    assert tune.kept_threads(HEADER, model, anew=True) == 1
    assert tune.saved_ladders(HEADER, model) == ladders


def test_ladders_kept_without_a_number_of_threads_stay(searches):
    tune.save_ladders(HEADER, {"hispec": {"exits": [1, 2], "windows": [3, 4]}})
    found = json.loads(tune.LADDERS.read_text())
    for entry in found.values():
        del entry["threads"]
    tune.LADDERS.write_text(json.dumps(found))
    assert tune.kept_threads(HEADER, random_model()) == 1
    assert tune.saved_ladders(HEADER, random_model()).keys() == {"hispec"}


@pytest.mark.parametrize("threads", [0, -1, "two", 1.5, [1]])
def test_a_number_of_threads_that_is_none_is_refused(searches, threads):
    tune.save_ladders(HEADER | {"threads": threads}, {})
    with pytest.raises(
        ValueError, match="ladders.json: threads of m, float32, plain step, cpu must"
    ):
        tune.kept_threads(HEADER, random_model())


def test_where_nothing_can_be_kept_threads_are_found_anew(searches, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "file" / "ladders.json")
    assert [tune.kept_threads(HEADER, random_model()) for _ in range(2)] == [1, 2]


@pytest.fixture
def timed(searches, monkeypatch):
    """How long each dtype takes; which were timed is kept under `loads` and `seen`."""
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0}
    seconds["seen"] = []

    def took(model):
        seconds["seen"].append(model.embed.weight.dtype)
        return seconds[model.embed.weight.dtype]

    monkeypatch.setattr(tune, "can_pack", lambda dtype: True)
    monkeypatch.setattr(tune, "seconds_of_few", took)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return seconds


def load_float():
    return random_model().float()


def test_the_faster_dtype_is_found_once_and_again_when_tuning(timed, searches):
    both = [torch.float32, torch.bfloat16]
    assert tune.kept_dtype(HEADER, load_float) == torch.bfloat16
    assert timed["seen"] == both and len(searches) == 1  # bfloat16's threads when it is used
    assert tune.kept_threads(HEADER | {"dtype": "bfloat16"}, random_model()) == 2
    never = lambda: pytest.fail("loaded again")  # noqa: E731
    assert tune.kept_dtype(HEADER | {"dtype": "bfloat16"}, never) == torch.bfloat16
    timed[torch.bfloat16] = 3.0
    assert tune.kept_dtype(HEADER, load_float, anew=True) == torch.float32
    assert tune.kept_dtype(HEADER, never) == torch.float32
    assert tune.kept_dtype(HEADER | {"model": "another"}, load_float) == torch.float32
    assert timed["seen"] == 3 * both


def test_the_kept_dtype_disturbs_no_ladder(timed):
    ladders = {"hispec": {"exits": [1, 2], "windows": [3, 4], "thresholds": [0.5, 0.0]}}
    tune.save_ladders(HEADER, ladders)
    tune.kept_dtype(HEADER, load_float)
    assert tune.saved_ladders(HEADER, random_model()) == ladders
    assert tune.kept_ladder(HEADER | {"model": "m"}, random_model()) is None  # none was measured


def test_a_processor_without_bfloat16_takes_float32(timed, monkeypatch):
    monkeypatch.setattr(tune, "can_pack", lambda dtype: False)
    assert tune.kept_dtype(HEADER, lambda: pytest.fail("loaded")) == torch.float32
    assert not tune.LADDERS.exists()


def test_a_dtype_that_is_none_of_the_two_is_refused(timed):
    tune.LADDERS.parent.mkdir()
    tune.LADDERS.write_text('{"m, either dtype, plain step, cpu": {"dtype": "int8"}}')
    with pytest.raises(
        ValueError, match="dtype of m, either dtype, plain step, cpu must be one of"
    ):
        tune.kept_dtype(HEADER, load_float)
