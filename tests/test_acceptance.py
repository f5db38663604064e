"""What was kept of the drafts, counted by hand and against the generation's own count."""

import pytest
from conftest import random_model

from arguments import Event
from hispec import generate
from lab.acceptance import count_kept, draft_acceptance
from lab.prompts import Request


def step(level, drafts, kept):
    return Event(level, 0, [5] * drafts, kept, [], [], 0.0)


def test_positions_and_lengths_by_hand():
    """The full model judges drafts of 3, 1 and none, in two generations that begin at the prompt;
    the level below judges two of 2."""
    one = [step(2, 0, 0), step(1, 2, 2), step(1, 2, 0), step(2, 3, 2)]
    two = [step(2, 0, 0), step(2, 1, 1), step(2, 0, 0)]
    found = count_kept([one, two], 3)
    assert found["acceptance_by_position"] == [[1 / 2, 1 / 2], [2 / 2, 1 / 1, 0 / 1]]
    assert found["accepted_length"] == [2 / 2, 3 / 3]


def test_a_level_that_never_judged():
    found = count_kept([[step(2, 0, 0)]], 3)
    assert found == {"acceptance_by_position": [[], []], "accepted_length": [None, None]}


@pytest.mark.parametrize(
    "exits, windows, thresholds",
    [((1,), (3,), ()), ((1, 3), (2, 4), (0.3, 0)), ((0, 2), (4, 4), ())],
)
def test_they_add_up_to_the_generations_count(exits, windows, thresholds):
    model, requests = random_model(3), [Request("x", [4, 2], []), Request("x", [1], [])]
    generations = []

    def decode(prompt, n, stop, watch):
        ladder = dict(exits=exits, windows=windows, thresholds=thresholds)
        generations.append(generate(model, prompt, n, **ladder, stop=stop, watch=watch))

    found = draft_acceptance(decode, len(exits) + 1, requests, 30, ())
    for k, length in enumerate(found["accepted_length"]):
        accepted = sum(g.levels[k].accepted for g in generations)
        checks = sum(g.levels[k + 1].calls for g in generations)
        if k + 1 == len(exits):
            checks -= len(requests)  # the passes that read the prompts
        assert length == pytest.approx(accepted / checks)
        shares = found["acceptance_by_position"][k]
        assert shares == sorted(shares, reverse=True) or thresholds or exits[0] == 0
        first = sum(g.levels[k].proposed > 0 for g in generations)
        assert first == 2 and len(shares) <= windows[k] + (k > 0)
