"""Imports: a part of the project imports only parts below it, and no two import each other, not
even in functions.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# the other parts ("rooms") that each may import; files of one room may import each other
BELOW: dict[str, set[str]] = {
    "model": set(),
    "arguments": {"model"},
    "kvcache": {"model"},
    "drafters": {"model", "kvcache"},
    "hispec": {"model", "kvcache", "arguments", "drafters"},
}
CORE = set(BELOW)
BELOW["fast"] = CORE
BELOW["checkpoints"] = CORE | {"fast"}
BELOW["train_exits"] = CORE | {"fast", "checkpoints"}
BELOW["bench"] = CORE | {"fast", "checkpoints", "lab"}
BELOW["lab"] = CORE | {"fast", "checkpoints", "train_exits"}
BELOW["show"] = CORE | {"fast", "checkpoints"}
ANYTHING = {"lecture", "tests"}
# rooms that may be missing: they are imported only if found, or if an option asks for them
MAY_BE_MISSING = {"fast", "lab"}


def name_of(file: Path) -> str:
    """lab/tune.py is lab.tune, lab/__init__.py is lab."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [file for file in ROOT.rglob("*.py") if not file.relative_to(ROOT).parts[0].startswith(".")]
TREES = {name_of(file): ast.parse(file.read_text("utf-8")) for file in sorted(FILES)}


def room_of(name: str) -> str:
    return name.partition(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """The project's modules that are imported anywhere in a file, in functions and conditions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are written out"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & TREES.keys()
            # an import of submodules only is not an import of the package itself
            names |= inside if len(inside) == len(node.names) else inside | {node.module}
    return names & TREES.keys()


IMPORTS = {name: imported(tree) for name, tree in TREES.items()}


def test_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_room_imports_only_rooms_below():
    rooms: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        rooms.setdefault(room_of(name), set()).update(map(room_of, others))
    assert BELOW.keys() <= rooms.keys() <= BELOW.keys() | ANYTHING
    above = {room: rooms[room] - below - {room} for room, below in BELOW.items()}
    assert not any(above.values()), above


def test_what_may_be_missing_is_imported_where_it_is_asked_for():
    """It is never imported at the top of a file, but within `try` or in a function."""
    for name, tree in TREES.items():
        if room_of(name) not in MAY_BE_MISSING | ANYTHING:
            at_top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            others = imported(ast.Module(at_top, []))
            assert {room_of(other) for other in others} & MAY_BE_MISSING == set(), name
