"""The house: what a room may import, and how long its files and functions may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("checkpoints", "lab", "show", "lecture", "tests")
WINGS += ("lecture/exercises", "lecture/exercises/solutions")
FILES = sorted(
    [*ROOT.glob("*.py"), *(file for wing in WINGS for file in ROOT.glob(f"{wing}/*.py"))]
)
LECTURE = ("hispec", "kvcache", "model", "train_exits", "bench")  # the root files
LONGEST_FILE, LONGEST_FUNCTION, WIDEST = 400, 60, 100

# what each room may import of the others; a wing's files may import each other
BELOW: dict[str, set[str]] = {
    "arguments": {"model"},
    "lookup": set(),
    "operators": set(),
    "model": {"operators"},
    "kvcache": {"model"},
    "hispec": {"model", "kvcache", "arguments", "lookup"},
    "faststep": {"model", "kvcache", "hispec"},
    "checkpoints": {"model"},
    "lab": {
        "operators",
        "model",
        "kvcache",
        "hispec",
        "arguments",
        "lookup",
        "faststep",
        "checkpoints",
    },
    "show": {"model", "arguments", "hispec", "checkpoints", "lab"},
}
BELOW["train_exits"] = {"model", "checkpoints", "lab"}
BELOW["bench"] = BELOW["lab"] | {"lab"}


def name_of(file: Path) -> str:
    """lab/tune.py is lab.tune, lab/__init__.py is lab."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {name_of(file): ast.parse(file.read_text("utf-8")) for file in FILES}


def imported(tree: ast.AST) -> set[str]:
    """The project's modules that are imported anywhere in a file, in functions and conditions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are written out"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & TREES.keys()
            # of a package's submodules alone, the package itself is not meant
            names |= inside if len(inside) == len(node.names) else inside | {node.module}
    return names & TREES.keys()


IMPORTS = {name: imported(tree) for name, tree in TREES.items()}


def test_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in TREES if name.split(".")[0] in BELOW])
def test_a_room_imports_only_rooms_below(name):
    room = name.split(".")[0]
    rooms = {other.split(".")[0] for other in IMPORTS[name]}
    assert rooms - {room} <= BELOW[room]


def test_every_file_has_its_room():
    rooms = {name.split(".")[0] for name in TREES}
    assert rooms - {"tests", "lecture"} <= BELOW.keys()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_is_too_long(file):
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("name", TREES)
def test_no_function_is_too_long(name):
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {f: length for f, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("name", LECTURE)
def test_the_lecture_fits_a_projector(name):
    lines = (ROOT / f"{name}.py").read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDEST] == []
