"""A vocabulary learned from text: any text comes back, and what is common is merged."""

import pytest
from conftest import random_model
from hypothesis import example, given
from hypothesis import strategies as st

import checkpoints
from checkpoints import tokenizer


@pytest.fixture(scope="module")
def bpe():
    texts = [
        "def f(x):\n    return x\n" * 20,
        "naïve café ½ _under__score '日本語' \U0001f600 aaaa\t\r\n" * 20,
    ]
    return tokenizer.learn_bpe(texts, 400)


@given(st.text())
@example("aaaaaaa")
@example("<|endoftext|> is text, not a mark")
@example("\x00\x1c\u2028\u200d e\u0301 ½²٣ _a__b \ud7ff")
@example("  \n\n\t x   \r\n")
def test_bpe_gives_any_text_back(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_merges_what_is_common(bpe, tmp_path):
    assert len(bpe.encode("    return x\n")) < 6
    assert bpe.n_vocab <= 400 and bpe.special[tokenizer.END] == bpe.n_vocab - 1
    model = random_model(vocab_size=bpe.n_vocab).float()
    checkpoints.save(model, bpe, tmp_path)
    text = "def f(x):\n    return naïve_1\t\U0001f600\x00"
    assert checkpoints.load(tmp_path)[1].encode(text) == bpe.encode(text)


def test_bpe_joins_runs_left_to_right():
    a, b = b"a", b"b"
    assert tokenizer._merged([a, a, a, a, a], (a, a)) == [b"aa", b"aa", a]
    assert tokenizer._merged([a, b, a, b, b], (a, b)) == [b"ab", b"ab", b]
