"""Prompts that no model here was trained on: beginnings of installed files, drawn by a seed."""

import random
import sysconfig
from pathlib import Path

from checkpoints.tokenizer import Tokenizer
from lab.installed import HELD_OUT_PACKAGES, read_installed
from train_exits import read_corpus

SEED, BEGINNING, FILES = 0, 200, 12  # for drawing; most tokens per beginning; beginnings


def draw_held_out(tokenizer: Tokenizer) -> list[dict]:
    """Draw beginnings of twelve installed files on which --corpus installed never trains.

    Two are from each package that is held out as a whole, the others from one other package each,
    all drawn by the seed. A beginning is the first 200 tokens, cut to whole lines; files of less
    than twice that length are skipped. The category is the package.
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
    """site-packages/rich/table.py belongs to rich, site-packages/six.py to six."""
    return Path(Path(name).parts[1]).stem
