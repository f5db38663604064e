from types import SimpleNamespace

import pytest
from common import random_model

from drafters import LookUp
from hispec import Decoder, generate

LADDERS = [((0,), (3,)), ((0, 3), (4, 6)), ((0, 1, 3), (2, 3, 4))]


def test_the_notes_are_followed(work):
    decoder = SimpleNamespace(text=[9, 8, 3, 1], unchanged=0, notes={1: 4, 4: 5, 5: 1, 3: 7})
    assert work.Recycled().draft(decoder, 2) == ([4, 5], None)
    assert work.Recycled().draft(decoder, 5) == ([4, 5, 1, 4, 5], None)
    decoder.notes = {1: 4}
    assert work.Recycled().draft(decoder, 3) == ([4], None)


def test_where_two_tokens_stood_before_the_look_up_drafts(work):
    decoder = SimpleNamespace(text=[3, 1, 6, 7, 3, 1], unchanged=0, notes={1: 4})
    assert work.Recycled().draft(decoder, 3) == ([6, 7, 3], None)
    decoder.text = [2, 1, 6, 7, 3, 1]  # only one token stood before
    assert work.Recycled().draft(decoder, 3) == ([4], None)


def test_what_levels_choose_is_noted(work):
    """Of every verification, rejected drafts included, the last word on each token."""
    model, seen = random_model(2), {}

    class Checked(work.Remembering):
        def read_prompt(self):
            super().read_prompt()
            seen.clear()  # along the prompt an exit's word counts

        def run(self, k, base):
            logits = super().run(k, base)
            tokens = self.tokens[base - 1 : self.length].tolist()
            seen.update(zip(tokens, logits.argmax(-1).tolist(), strict=True))
            return logits

        def settle(self, *verdict):
            super().settle(*verdict)
            assert seen.items() <= self.notes.items()

    generate(model, [1, 2, 3], 24, exits=(0, 3), windows=(4, 6), decoder=Checked)
    assert len(seen) > 5


@pytest.mark.parametrize("exits, windows", LADDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_stays(work, exits, windows, temperature):
    options = dict(windows=windows, temperature=temperature, seed=1)
    for seed in range(4):
        model = random_model(seed)
        parts = dict(drafter=work.Recycled(), decoder=work.Remembering)
        out = generate(model, [1, 2, 3], 24, exits=exits, **options, **parts)
        assert len(out.tokens) == 24
        assert temperature or out.tokens == generate(model, [1, 2, 3], 24).tokens


def test_fewer_steps_than_with_the_look_up_alone(work):
    plain, recycled = work.steps(LookUp(), Decoder), work.steps(work.Recycled(), work.Remembering)
    assert recycled[1] < plain[1]
