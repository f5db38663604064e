"""What is asked: questions from a file, and the conversations that a model makes of them.

Knows nothing of ladders: the answers, which are part of the next turn's prompt, come from whatever
decodes.
"""

import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints.tokenizer import Tokenizer
from lab.corpus import read_corpus
from lab.installed import HELD_OUT_PACKAGES, read_installed

PROMPTS = Path(__file__).parent.parent / "prompts"
DRAWN = Path("held-out")  # in place of a file: beginnings of installed files, drawn as below
SEED, BEGINNING, FILES = 0, 200, 12  # of the drawing; tokens of a beginning at most; beginnings


@dataclass(frozen=True)
class Request:
    """One turn to answer: its category and the token ids of the conversation so far."""

    category: str
    prompt: list[int]
    greedy: list[int]  # the reference answer


def default_prompts(tokenizer: Tokenizer) -> Path:
    """Questions where the tokenizer has a chat format around them, else files to continue."""
    return PROMPTS / ("python.jsonl" if tokenizer.template is None else "chat.jsonl")


def read_prompts(path: Path) -> list[dict]:
    """Questions in Spec-Bench's form: a JSON object a line, with `category` and `turns` (texts)."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # no other mark ends a line
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            turns = question["turns"]
            ok = isinstance(question["category"], str) and isinstance(turns, list) and turns
            if not ok or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = '{"category": "...", "turns": ["...", ...]} with at least one turn'
            raise ValueError(f"{path}, line {number}: expected {wanted}") from None
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no prompts")
    return questions


def draw_held_out(tokenizer: Tokenizer) -> list[dict]:
    """Beginnings of twelve installed files on which --corpus installed never trains.

    Two are of each package that is held out as a whole, the others of as many other packages, one
    of each, all drawn from the seed. A beginning is the first 200 tokens, cut to whole lines; files
    of less than twice as many are passed over. The category is the package.
    """
    library = read_corpus(None)
    texts = read_installed(library, Path(sysconfig.get_paths()["purelib"]), held_out_only=True)
    names = sorted(texts.keys() - library.keys())
    random.Random(SEED).shuffle(names)
    names.sort(key=lambda name: package_of(name) not in HELD_OUT_PACKAGES)  # the others after these
    questions: list[dict] = []
    for name in names:
        package = package_of(name)
        taken = sum(question["category"] == package for question in questions)
        if taken == (2 if package in HELD_OUT_PACKAGES else 1):
            continue
        ids = tokenizer.encode(texts[name])
        lines, _, _ = tokenizer.decode(ids[:BEGINNING]).rpartition("\n")
        if len(ids) >= 2 * BEGINNING and lines.strip():
            questions.append({"category": package, "turns": [lines.rstrip()]})
        if len(questions) == FILES:
            break
    if not questions:
        raise ValueError("no held-out files are installed: pip install -r requirements-dev.txt")
    return questions


def package_of(name: str) -> str:
    """site-packages/rich/table.py is of rich, site-packages/six.py of six."""
    return Path(Path(name).parts[1]).stem


def most_tokens(model, tokenizer, questions, max_new_tokens) -> int:
    """An upper bound for the longest conversation, answers included; at most the context."""
    asked = [[text for turn in q["turns"] for text in (turn, "")][:-1] for q in questions]
    # an answer cut from the text and encoded anew may have more tokens than were generated
    most = max(len(tokenizer.chat(turns)) + 2 * max_new_tokens * len(turns) for turns in asked)
    return min(most, model.config.max_seq_len)


def open_requests(
    decode, tokenizer, questions, max_new_tokens, stop, room, bar
) -> Iterator[Request]:
    """Answer each turn greedily: the answer is the reference, and part of the next prompt."""
    for question in questions:
        conversation: list[str] = []
        for turn in question["turns"]:
            conversation.append(turn)
            prompt = tokenizer.chat(conversation)
            if len(prompt) + max_new_tokens > room:
                size = f"{question['category']}, {len(prompt)} tokens"
                bar.write(f"left out: {size}, too long for the model's context")
                break
            greedy = decode(prompt, max_new_tokens, stop=stop).tokens
            conversation.append(tokenizer.decode([token for token in greedy if token not in stop]))
            yield Request(question["category"], prompt, greedy)
        bar.update()
