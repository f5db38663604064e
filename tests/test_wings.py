"""Any folder except checkpoints/ can be deleted: the main jobs still run, and errors name what is
missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("lab", "show", "lecture", "fast")
PROPERTIES = ["lossless", "cache", "sampling", "block", "model", "arguments", "drafters"]
# of these the longest are left out: they say the same on more levels, windows and truncations
LONGEST = """
truncated or three_levels or whole_texts or look_ups or contexts_end or planted_bugs
or longer_than_a_pass or without_a_bug or float32 or lossy_rule or transformers or no_fewer
"""
FEW = """
import sys
import pytest
from hypothesis import settings
settings.register_profile("few", deadline=None, max_examples=3, derandomize=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--hypothesis-profile", "few", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project without these folders, with a link to the weights."""
    tree = tmp_path_factory.mktemp("tree") / "without-wings"
    left_out = shutil.ignore_patterns(*WINGS, ".*", "__pycache__", "weights", "figures")
    shutil.copytree(ROOT, tree, ignore=left_out)
    (tree / "weights").symlink_to(ROOT / "weights")
    assert [wing for wing in WINGS if (tree / wing).exists()] == []
    return tree


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    cache = tree.parent / "cache"  # of what a machine is found to do best
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True
    )


def test_the_core_can_be_imported(tree):
    script = "import hispec, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = run(tree, "-c", script)
    assert done.returncode == 0, done.stderr
    ours = {file.stem for file in tree.glob("*.py")} | {"checkpoints"}
    own = {"hispec", "kvcache", "model", "arguments", "drafters"}
    assert ours & set(done.stdout.split()) == own


def test_the_bench_runs(tree):
    done = run(tree, "bench.py", "--quick", "--max-new-tokens", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "greedy" in done.stdout and "hispec" in done.stdout


def test_exits_are_trained(tree):
    sources = [file.read_text("utf-8") for file in sorted(tree.glob("*.py"))]
    (tree / "a_text_file").write_text("\n".join(sources), "utf-8")
    arguments = ["--out", "trained", "--steps", "2", "--corpus", "a_text_file"]
    arguments += ["--layers", "8", "--batch", "2048"]  # to be quicker
    done = run(tree, "train_exits.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tree / "trained" / "model" / "config.json").exists()


def test_the_core_keeps_its_properties(tree):
    few = f"not ({' '.join(LONGEST.split())})"
    done = run(tree, "-c", FEW, "-k", few, *(f"tests/test_{name}.py" for name in PROPERTIES))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    "command, wing",
    [
        ("bench.py --tune --figures drawn --peers", "lab"),
        ("bench.py --prompts held-out", "lab"),
        ("bench.py --step packed", "fast"),
    ],
)
def test_what_needs_a_missing_wing_says_so_in_one_line(tree, command, wing):
    done = run(tree, *command.split(), "--max-new-tokens", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert f"{wing}/" in done.stderr
