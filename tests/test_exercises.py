"""Every exercise: the stub runs, and its test fails on the stub and passes on the solution."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXERCISES = ROOT / "lecture" / "exercises"
NUMBERS = sorted(file.name.partition("_")[0] for file in EXERCISES.glob("[0-9]*.py"))
TOLD = ["05", "06", "07", "09"]  # their numbers in the README are those that they print


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "EXERCISES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env
    )


def test_every_exercise_has_a_test_a_solution_and_a_row():
    stubs = sorted(file.name for file in EXERCISES.glob("[0-9]*.py"))
    assert len(stubs) >= 10
    assert sorted(file.name for file in (EXERCISES / "solutions").glob("*.py")) == stubs
    assert sorted(file.name for file in EXERCISES.glob("test_*.py")) == [
        f"test_{number}.py" for number in NUMBERS
    ]
    told = (EXERCISES / "README.md").read_text("utf-8")
    assert re.findall(r"^\| \[(.*?)\]", told, re.M) == stubs


def their_tests(**environment: str) -> subprocess.CompletedProcess:
    files = [str(EXERCISES / f"test_{number}.py") for number in NUMBERS]
    return run("-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *files, **environment)


def test_every_solution_is_green():
    done = their_tests(EXERCISES="solutions")
    assert done.returncode == 0, done.stdout


def test_each_test_is_red_on_its_stub():
    done = their_tests()
    red = set(re.findall(r"^FAILED .*test_(\w+)\.py", done.stdout, re.M))
    assert sorted(red) == NUMBERS, done.stdout
    assert not re.search(r"^ERROR ", done.stdout, re.M), done.stdout


def test_every_stub_runs_and_the_numbers_told_are_those_printed():
    """Those of the stub, and for exercises in TOLD those with its solution."""
    script = f"""
import sys
sys.path.insert(0, {str(EXERCISES)!r})
from common import exercise
for number in {NUMBERS}:
    print("\\f" + number)
    for solved in [False, True][: 1 + (number in {TOLD})]:
        exercise(number, solved).main()
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    printed = {part.splitlines()[0]: part for part in done.stdout.split("\f")[1:]}
    assert [number for number in NUMBERS if len(printed[number].splitlines()) < 3] == []
    readme = (EXERCISES / "README.md").read_text("utf-8")
    for number in TOLD:
        row = re.search(rf"^\| \[{number}_.*$", readme, re.M)
        assert row
        told = re.findall(r"[\d.]+x|\d+ steps", row[0])
        assert len(told) >= 2
        assert [speed for speed in told if f" {speed}" not in printed[number]] == []
