"""The bench's questions: those that ship, and those that cannot be read."""

import json
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import byte_tokenizer, module

from bench import HELD_OUT, PROMPTS, choose_questions, read_prompts
from lab.installed import is_held_out
from lab.prompts import draw_held_out
from train_exits import read_corpus


@pytest.mark.parametrize(
    "settings, file",
    [({}, "python.jsonl"), ({"chat_template": "{{ messages[0].content }}"}, "chat.jsonl")],
)
def test_the_default_follows_from_the_tokenizer(settings, file):
    asked = SimpleNamespace(prompts=None, quick=False, all=True)
    questions = read_prompts(PROMPTS / file)
    assert choose_questions(asked, byte_tokenizer(settings)) == questions
    asked.all = False
    third = choose_questions(asked, byte_tokenizer(settings))
    assert len(questions) / 3 <= len(third) <= len(questions) / 2
    halves = {(q["category"], q.get("ending", "") == "line") for q in questions}
    assert {(q["category"], q.get("ending", "") == "line") for q in third} == halves
    assert {q.get("ending", "") for q in third} == {q.get("ending", "") for q in questions}
    asked.quick = True
    some = choose_questions(asked, byte_tokenizer(settings))
    categories = dict.fromkeys(q["category"] for q in read_prompts(PROMPTS / file))
    assert [question["category"] for question in some] == list(categories)


def test_beginnings_are_not_in_the_standard_library():
    questions = read_prompts(PROMPTS / "python.jsonl")
    assert all(len(question["turns"]) == 1 for question in questions)
    ours = set().union(*(windows(question["turns"][0]) for question in questions))
    assert len(ours) > 500
    library, folder = read_corpus(None), Path(sysconfig.get_paths()["stdlib"])
    files = {f"{name}.py" for name in sys.stdlib_module_names}
    modules = {name for name in files if (folder / name).exists()}
    assert len(modules) > 100 and modules <= library.keys()
    assert [(name, w) for name, text in library.items() for w in windows(text) & ours] == []


def windows(text: str) -> set[tuple[str, ...]]:
    """Every five consecutive lines, without indentation and empty lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return set(zip(*(lines[i:] for i in range(5))))


@pytest.mark.parametrize(
    "line", ["{", "3", "[" * 200_000, '{"turns": ["a"]}', '{"category": "x", "turns": []}',
             '{"category": "x", "turns": [""]}', '{"category": 1, "turns": ["a"]}', '{"category": "x", "turns": "a"}']
)  # fmt: skip
def test_bad_prompts_name_the_line(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"category": "x", "turns": ["a"]}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3.*category.*turns"):
        read_prompts(path)


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    line = json.dumps({"category": "x", "turns": ["a\u2028b\x85c"]}, ensure_ascii=False)
    for text in (line, line + "\r\n" + line + "\r\n", "\ufeff" + line):
        path.write_bytes(text.encode())
        assert {q["turns"][0] for q in read_prompts(path)} == {"a\u2028b\x85c"}
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)


@pytest.fixture
def packages(site):
    """In addition to those of `site`: files of the packages held out as a whole, and of twenty
    others.
    """
    sizes = {"rich": 4, "mpmath": 4, "networkx": 4} | {f"other{i}": 60 for i in range(20)}
    for package, size in sizes.items():
        (site / package).mkdir(exist_ok=True)
        for i in range(size):
            (site / package / f"part{i}.py").write_text(module(f"{package}_{i}"), "utf-8")
    return site


def test_beginnings_are_drawn_from_what_is_held_out(packages):
    questions = choose_questions(
        SimpleNamespace(prompts=HELD_OUT, quick=False, all=False), byte_tokenizer()
    )
    assert questions == draw_held_out(byte_tokenizer())
    per_package = Counter(question["category"] for question in questions)
    whole = {"mpmath": 2, "networkx": 2, "rich": 2}
    assert len(questions) == 12 and len(per_package.keys() - whole.keys()) == 6
    assert per_package.items() >= whole.items()
    files = {f.read_text("utf-8"): f for f in packages.rglob("*.py") if f.name != "bad.py"}
    for question in questions:
        (beginning,) = question["turns"]
        (file,) = {file for text, file in files.items() if text.startswith(beginning + "\n")}
        name = "site-packages/" + file.relative_to(packages).as_posix()
        assert is_held_out(name) and question["category"] == name.split("/")[1]
        assert 100 < len(beginning) < 200  # two or three whole lines of 60 bytes


def test_short_files_are_passed_over_and_none_is_an_error(site):
    for file in site.rglob("*.py"):
        if file.is_file():
            file.write_text("value = 1  # it is\n" * 3, "utf-8")
    with pytest.raises(ValueError, match="no held-out files"):
        draw_held_out(byte_tokenizer())
