"""The model that ships is small, has exits that agree often, and is lossless on the bench's
prompts.
"""

import pytest

import checkpoints
from bench import PROMPTS, read_prompts
from hispec import generate


@pytest.fixture(scope="module")
def tiny():
    return checkpoints.load("tiny", device="cpu")


def test_it_is_small_and_deep(tiny):
    model, _ = tiny
    folder = checkpoints.NAMES["tiny"]()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 25 * 2**20
    assert model.config.n_layers >= 24
    assert (
        model.exits[0] <= model.config.n_layers / 8 and model.exits[1] <= model.config.n_layers / 4
    )


def test_ladders_write_its_greedy_text_with_fewer_full_passes(tiny):
    model, tokenizer = tiny
    questions = read_prompts(PROMPTS / "python.jsonl")[::17]
    assert len(questions) == 5
    for question in questions:
        prompt = tokenizer.chat(question["turns"][:1])
        plain = generate(model, prompt, 32)
        for exits, windows in [
            ((2,), (3,)),
            ((8,), (4,)),
            ((2, 8), (2, 4)),
            ((1, 2, 4, 8), (2, 3, 4, 6)),
        ]:
            out = generate(model, prompt, 32, exits=exits, windows=windows)
            assert out.tokens == plain.tokens
            assert out.levels[-1].calls < plain.levels[-1].calls


def test_its_tokenizer_round_trips(tiny):
    _, tokenizer = tiny
    for text in ["def f(x):\n    return x + 1\n", "Zażółć 日本 😀\t\r\n", "  a  12  b"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
