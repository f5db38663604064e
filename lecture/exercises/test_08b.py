import pytest
from common import random_model

from hispec import generate

PROMPT = [1, 2, 3]


@pytest.mark.parametrize("exits, windows", [((0,), (3,)), ((0, 3), (2, 4))])
def test_the_text_stays(work, exits, windows):
    for seed in range(5):
        large, small = random_model(seed), work.SmallModel(random_model(seed + 50, n_layers=1))
        out = generate(large, PROMPT, 30, exits=exits, windows=windows, drafter=small)
        assert out.tokens == generate(large, PROMPT, 30).tokens


def test_a_twin_is_always_right_and_reads_a_position_once(work):
    for seed in range(5):
        large = random_model(seed)
        twin = work.SmallModel(large)
        out = generate(large, PROMPT, 30, exits=(0,), windows=(3,), drafter=twin)
        assert out.levels[0].accepted == out.levels[0].proposed
        assert out.levels[1].calls < 12  # three drafts and one token more a pass
        assert twin.read <= len(PROMPT) + 30


def test_a_stranger_reads_again_only_what_was_rejected(work):
    small = work.SmallModel(random_model(60, n_layers=1))
    out = generate(random_model(2), PROMPT, 30, exits=(0,), windows=(3,), drafter=small)
    rejected = out.levels[0].proposed - out.levels[0].accepted
    assert small.read <= len(PROMPT) + 30 + rejected


def test_two_generations_with_one_drafter(work):
    large, small = random_model(2), work.SmallModel(random_model(60, n_layers=1))
    for prompt in (PROMPT, [5, 6], PROMPT):
        out = generate(large, prompt, 12, exits=(0,), windows=(3,), drafter=small)
        assert out.tokens == generate(large, prompt, 12).tokens


def test_drawn_drafts_are_kept_as_often_as_they_are_right(work):
    """Sampled, a twin's drafts come from the large model's own distribution: none is rejected."""
    large = random_model(4)
    options = dict(exits=(0,), windows=(3,), temperature=1.0, seed=0)
    out = generate(large, PROMPT, 30, **options, drafter=work.SmallModel(large))
    assert out.levels[0].accepted == out.levels[0].proposed > 0
