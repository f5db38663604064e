"""The results of tuning are kept and found again: ladders, threads, the dtype."""

import json
import multiprocessing

import pytest
import torch
from conftest import random_model

from checkpoints import ladders

HEADER = {"model": "m", "dtype": "float32", "step": "packed", "device": "a CPU, 2 cores",
          "threads": 1, "versions": {}, "command": "python bench.py --tune"}  # fmt: skip
HISPEC = {"exits": [1, 2], "windows": [3, 4], "thresholds": [0.5, 0.0], "measured": 1.5}
SINGLE = {"exits": [1], "windows": [2], "thresholds": [0.1], "measured": 1.2}
LADDER = ((1, 2), (3, 4), (0.5, 0.0))


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """A user's own folder, and a file in place of the shipped one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ladders, "SHIPPED", tmp_path / "ladders.json")
    monkeypatch.setattr(ladders, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path


def test_what_is_found_here_is_kept_by_model_dtype_step_and_device(places):
    model = random_model()
    assert ladders.kept_ladders(HEADER, model) == ({}, "")
    file = ladders.save_ladders(HEADER, {"hispec": HISPEC})
    assert file.parent == places / "cache" / "hispec" / "ladders"
    assert not ladders.SHIPPED.exists()  # a tracked file
    assert ladders.kept_ladders(HEADER, model) == ({"hispec": LADDER}, "this machine")
    for key in ("dtype", "step", "device"):
        other = HEADER | {key: "other"}
        ladders.save_ladders(other, {"single-layer": SINGLE})
        assert ladders.kept_ladders(other, model)[0].keys() == {"single-layer"}
    assert ladders.kept_ladders(HEADER, model)[0].keys() == {"hispec"}
    assert ladders.kept_ladders(HEADER | {"model": "another"}, model) == ({}, "")
    assert len(list(file.parent.iterdir())) == 4


def test_another_machines_ladders_are_taken_all_of_one_the_likest_first():
    one, two = {"hispec": HISPEC, "single-layer": SINGLE}, {"hispec": HISPEC | {"windows": [1, 1]}}
    key, here = "m, {}, {} step, {}".format, ("float32", "packed", "a CPU, 2 cores")
    kept = {
        key("bfloat16", "fixed", "a GPU"): {"look-up": SINGLE | {"exits": [0]}},
        key("float32", "fixed", "a GPU"): two,
        key("float32", "packed", "another CPU, 4 cores"): one,
        key("either dtype", *here[1:]): {"dtype": "float32"},
        f"m{key(*here)}": two,
    }
    # the same dtype and step, then the same dtype, then any
    for dtype, step, device in (
        ("float32", "packed", "another CPU, 4 cores"),
        ("float32", "fixed", "a GPU"),
        ("bfloat16", "fixed", "a GPU"),
    ):
        ladders.SHIPPED.write_text(json.dumps(kept))
        found, where = ladders.kept_ladders(HEADER, random_model())
        assert found.keys() == kept.pop(key(dtype, step, device)).keys()
        assert where == f"{device} ({dtype}, {step} step)"
    # the number of threads, found here, hides nothing that ships for a processor of this name
    ladders.SHIPPED.write_text(json.dumps({key(*here): one}))
    ladders._keep(HEADER, {"threads": 2})
    found, where = ladders.kept_ladders(HEADER, random_model())
    assert found.keys() == one.keys() and where == "a processor of this name (a CPU, 2 cores)"


def test_a_ladder_that_does_not_fit_the_model_is_passed_over_and_a_damaged_file_named():
    for ladder in {"exits": [1, 5], "windows": [2, 2]}, {"exits": [1, 2]}, []:
        ladders.save_ladders(HEADER, {"hispec": ladder, "single-layer": SINGLE})
        found, _ = ladders.kept_ladders(HEADER, random_model())
        assert found == {"single-layer": ((1,), (2,), (0.1,))}
    for content in "{bad", "[]", '{"a": 3}', '{"m, float32": {}}':
        ladders.SHIPPED.write_text(content)
        with pytest.raises(ValueError, match="ladders.json is damaged"):
            ladders.kept_ladders(HEADER, random_model())


def test_the_kept_ladder_is_hispecs_unless_that_loses():
    model = random_model()
    assert ladders.kept_ladder(HEADER, model) is None
    fast = {"exits": [0], "windows": [8], "thresholds": [0.0], "measured": 1.234}
    ladders.save_ladders(HEADER, {"hispec": HISPEC | {"measured": 0.9}, "look-up": fast})
    found = ladders.kept_ladder(HEADER, model)
    assert found == (((0,), (8,), (0.0,)), "tuned on this machine, 1.23x greedy there")
    ladders.save_ladders(HEADER, {"hispec": HISPEC | {"measured": 1.1}, "look-up": fast})
    assert ladders.kept_ladder(HEADER, model)[0] == LADDER
    ladders.save_ladders(HEADER, {"hispec": [3], "look-up": fast | {"measured": "fast"}})
    assert ladders.kept_ladder(HEADER, model) is None


def test_default_exits():
    for layers, exits in (3, (1, 2)), (30, (4, 8)):
        assert ladders.default_exits(random_model(n_layers=layers)) == exits
    model = random_model(n_layers=30)
    model.exits = (2, 5, 9)
    assert ladders.default_exits(model) == (2, 5, 9)
    with pytest.raises(ValueError, match="two exits below .* 2 layers"):
        ladders.default_exits(random_model(n_layers=2))


@pytest.fixture
def searches(monkeypatch):
    """Records searches for the number of threads; each finds one more than the last."""
    found = []
    monkeypatch.setattr(ladders, "best_threads", lambda model: found.append(None) or len(found))
    return found


def test_the_number_of_threads_is_found_once_and_again_when_tuning(searches, monkeypatch):
    model = random_model()
    assert [ladders.kept_threads(HEADER, model) for _ in range(3)] == [1, 1, 1]
    assert ladders.kept_threads(HEADER | {"model": "another"}, model) == 2
    assert ladders.kept_threads(HEADER, model, anew=True) == 3
    assert ladders.kept_threads(HEADER, model) == 3 and len(searches) == 3
    ladders.save_ladders(HEADER | {"threads": 7}, {"hispec": HISPEC})
    assert ladders.kept_threads(HEADER, model) == 7
    monkeypatch.setattr(ladders, "cores", lambda: 2)
    assert ladders.kept_threads(HEADER, model) == 2  # they were found when there were more
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ladders.kept_threads(HEADER, model, anew=True) == 2 and len(searches) == 3
    assert ladders.kept_ladders(HEADER, model)[0] == {"hispec": LADDER}
    monkeypatch.delenv("OMP_NUM_THREADS")
    for threads in 0, "two":
        ladders.save_ladders(HEADER | {"threads": threads}, {})
        with pytest.raises(ValueError, match="threads kept for m, float32, packed step.* must"):
            ladders.kept_threads(HEADER, model)


def test_where_nothing_can_be_kept_threads_are_found_anew(searches, places):
    (places / "cache").write_text("a file")
    assert [ladders.kept_threads(HEADER, random_model()) for _ in range(2)] == [1, 2]


def test_the_faster_dtype_is_found_once_and_again_when_tuning(searches, monkeypatch):
    seconds, timed = {torch.float32: 2.0, torch.bfloat16: 1.0}, []

    def took(model):
        timed.append(model.embed.weight.dtype)
        return seconds[timed[-1]]

    monkeypatch.setattr(ladders, "seconds_of_few", took)
    load = lambda name: random_model().to(getattr(torch, name))  # noqa: E731
    never = lambda name: pytest.fail("loaded again")  # noqa: E731
    assert ladders.kept_dtype(HEADER, load) == "bfloat16"
    assert timed == [torch.float32, torch.bfloat16] and len(searches) == 2  # the threads of each
    assert ladders.kept_dtype(HEADER | {"dtype": "bfloat16"}, never) == "bfloat16"
    seconds[torch.bfloat16] = 3.0
    assert ladders.kept_dtype(HEADER, load, anew=True) == "float32"
    assert ladders.kept_dtype(HEADER, never) == "float32"
    ladders.save_ladders(HEADER, {"hispec": HISPEC})
    assert ladders.kept_ladders(HEADER, random_model())[0] == {"hispec": LADDER}
    ladders._keep(HEADER | {"dtype": "either dtype"}, {"dtype": "int8"})
    with pytest.raises(ValueError, match="dtype kept for m, either dtype.* must be one of"):
        ladders.kept_dtype(HEADER, never)


@pytest.mark.parametrize("ship", [True, False])
def test_two_that_write_at_once_lose_nothing(places, ship):
    """Four processes write ten settings each, and all of them also add to one common setting."""

    def write(process):
        for i in range(10):
            header = HEADER | {"device": f"CPU {process}, {i} cores"}
            ladders.save_ladders(header, {"hispec": HISPEC}, ship)
            ladders._keep(HEADER, {f"{process} {i}": i})

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(p,)) for p in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    own = list((places / "cache" / "hispec" / "ladders").glob("*.json"))
    kept = [key for file in (own, [ladders.SHIPPED])[ship] for key in json.loads(file.read_text())]
    assert len([key for key in kept if " step, CPU " in key]) == 40
    assert len(ladders._of_this_machine(HEADER)) == 40
    assert len(own) == 1 + 40 * (not ship) and ladders.SHIPPED.exists() == ship
