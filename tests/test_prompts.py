"""The bench's questions: those that ship, and those that cannot be read."""

from pathlib import Path

import pytest

from lab.prompts import read_prompts

ROOT = Path(__file__).parent.parent


def test_the_chat_prompts():
    questions = read_prompts(ROOT / "prompts" / "chat.jsonl")
    per_category = {
        c: sum(q["category"] == c for q in questions) for c in {q["category"] for q in questions}
    }
    assert set(per_category) == {"chat", "code", "summary", "maths", "translation", "retrieval"}
    assert min(per_category.values()) >= 4
    assert any(len(question["turns"]) > 1 for question in questions)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"turns": ["a"]}', '{"category": "x"}', '{"category": "x", "turns": []}',
             '{"category": "x", "turns": [""]}', '{"category": 1, "turns": ["a"]}', '{"category": "x", "turns": "a"}']
)  # fmt: skip
def test_bad_prompts_name_the_line(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"category": "x", "turns": ["a"]}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3.*category.*turns"):
        read_prompts(path)


def test_missing_or_empty_prompts(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
