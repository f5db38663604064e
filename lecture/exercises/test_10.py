import pytest
import torch


@pytest.fixture(scope="module")
def found(work):
    return work.compare()


def test_a_state_belongs_to_the_position_before(work):
    h = torch.arange(1.0, 13).view(2, 3, 2)
    assert work.before(h).tolist() == [
        [[0, 0], [1, 2], [3, 4]],
        [[0, 0], [7, 8], [9, 10]],
    ]


def test_the_head_sees_what_it_may(work):
    state, token = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    for looks, sees in (("state", (1, 0)), ("token", (0, 2)), ("both", (1, 2))):
        assert [t.unique().tolist() for t in work.look(state, token, looks)] == [[x] for x in sees]


def test_the_token_says_more_than_the_state_and_both_say_most(found):
    state, token, both = (found[looks][0] for looks in ("state", "token", "both"))
    assert 0.02 < state < token < both < 0.5


def test_what_was_learnt_is_there_when_it_drafts(found):
    _, accepted, proposed = found["both"]
    assert 0 < accepted < proposed
