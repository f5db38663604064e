"""Any wing but checkpoints/ can be deleted, and the main jobs still run; what is missing is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("lab", "show", "lecture", "fast")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree without the wings, weights by a link."""
    tree = tmp_path_factory.mktemp("tree") / "without-wings"
    left_out = shutil.ignore_patterns(*WINGS, ".*", "__pycache__", "weights", "figures")
    shutil.copytree(ROOT, tree, ignore=left_out)
    (tree / "weights").symlink_to(ROOT / "weights")
    assert [wing for wing in WINGS if (tree / wing).exists()] == []
    return tree


def run(tree: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess:
    cache = tree.parent / "cache"  # of what a machine is found to do best
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr
    return done


def test_the_core_can_be_imported(tree):
    script = "import hispec, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ours = {file.stem for file in tree.glob("*.py")} | {"checkpoints"}
    own = {"hispec", "kvcache", "model", "arguments", "drafters"}
    assert ours & set(run(tree, "-c", script).stdout.split()) == own


def test_the_bench_runs(tree):
    run(tree, "bench.py", "--quick", "--max-new-tokens", "8", "--json", "out.json")
    result = json.loads((tree / "out.json").read_text())
    assert result["step"] == "plain"
    assert all(method["differing_tokens"] == 0 for method in result["methods"])


def test_exits_are_trained(tree):
    arguments = ["--out", "trained", "--steps", "2", "--corpus", "checkpoints"]
    run(tree, "train_exits.py", *arguments)
    assert (tree / "trained" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "asked, refused",
    [
        ("--tune --figures x --peers --prompts held-out", "--prompts held-out: needs lab/"),
        ("--step packed", "--step packed needs fast/"),
    ],
)
def test_what_needs_a_missing_wing_says_so_in_one_line(tree, asked, refused):
    said = run(tree, "bench.py", *asked.split(), code=1).stderr
    assert re.fullmatch(rf"error: .*{refused}, which is not here\n", said)
