"""Every exercise: the stub runs, and its test fails on the stub and passes on the solution."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXERCISES = ROOT / "lecture" / "exercises"
NUMBERS = sorted(file.name.partition("_")[0] for file in EXERCISES.glob("[0-9]*.py"))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "EXERCISES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env
    )


@pytest.fixture(scope="module")
def tried():
    """The failed tests of all exercises, on the stubs and on the solutions: one process each."""
    files = [str(EXERCISES / f"test_{number}.py") for number in NUMBERS]
    command = ["-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *files]
    return [run(*command), run(*command, EXERCISES="solutions")]


def test_every_exercise_has_a_test_a_solution_and_a_row():
    stubs = sorted(file.name for file in EXERCISES.glob("[0-9]*.py"))
    assert len(stubs) >= 10
    assert sorted(file.name for file in (EXERCISES / "solutions").glob("*.py")) == stubs
    assert sorted(file.name for file in EXERCISES.glob("test_*.py")) == [
        f"test_{number}.py" for number in NUMBERS
    ]
    told = (EXERCISES / "README.md").read_text("utf-8")
    assert re.findall(r"^\| \[(.*?)\]", told, re.M) == stubs


def test_every_solution_is_green(tried):
    assert tried[1].returncode == 0, tried[1].stdout


@pytest.mark.parametrize("number", NUMBERS)
def test_the_test_is_red_on_the_stub(tried, number):
    assert re.search(rf"^FAILED .*test_{number}\.py", tried[0].stdout, re.M), tried[0].stdout
    assert not re.search(r"^ERROR ", tried[0].stdout, re.M), tried[0].stdout


def test_every_stub_runs():
    lines = [
        f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
        for file in sorted(EXERCISES.glob("[0-9]*.py"))
    ]
    script = "\n".join([f"import sys; sys.path.insert(0, {str(EXERCISES)!r})", *lines])
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 * len(NUMBERS)


@pytest.mark.parametrize("number", ["05", "06", "07", "09"])
def test_the_numbers_told_are_those_printed(number):
    row = re.search(rf"^\| \[{number}_.*$", (EXERCISES / "README.md").read_text("utf-8"), re.M)
    assert row
    told = re.findall(r"[\d.]+x|\d+ steps", row[0])
    (stub,) = EXERCISES.glob(f"{number}_*.py")
    printed = [run(str(stub)), run(str(EXERCISES / "common.py"), number)]
    shown = " ".join(done.stdout for done in printed)
    assert len(told) >= 2 and [speed for speed in told if f" {speed}" not in shown] == []
