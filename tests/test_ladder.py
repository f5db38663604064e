"""lecture/ladder.py does what it says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_bare_recursion_writes_what_generate_writes():
    command = [sys.executable, "lecture/ladder.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    text = eval(run.stdout)
    assert len(text) == 20 and len(set(text)) > 5


def test_a_wrong_draft_that_is_kept_is_caught():
    source = (ROOT / "lecture" / "ladder.py").read_text("utf-8")
    wrong = source.replace("kept += 1  # a draft is right", "kept = len(seq) - base")
    wrong = wrong.replace("expected[kept]", "expected[-1]")
    assert wrong != source
    command = [sys.executable, "-c", wrong.replace("Path(__file__).parent.parent", repr(str(ROOT)))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "AssertionError" in run.stderr
