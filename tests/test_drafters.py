"""The drafters of depth 0: any object will do, and none changes the text or its distribution."""

import random

import pytest
import torch
from conftest import Case, cases, greedy, random_model
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import distance, output_law

import hispec
from drafters import LookUp
from hispec import generate


class Script:
    """Drafts whatever it is told to: lists, tensors, too many tokens, or none."""

    def __init__(self, seed: int, vocab: int):
        self.rng, self.vocab = random.Random(seed), vocab

    def draft(self, decoder, want):
        tokens = [self.rng.randrange(self.vocab) for _ in range(self.rng.randrange(2 * want + 1))]
        return (tokens if self.rng.random() < 0.5 else torch.tensor(tokens, dtype=torch.long)), None


@given(cases(levels=st.integers(2, 4)), st.integers(0, 99))
def test_random_drafts_leave_the_text_alone(case, seed):
    exits = (0, *[exit for exit in case.exits if exit > 0])
    options = dict(exits=exits, windows=[3] * len(exits), stop=case.stop)
    drafter = Script(seed, case.model.config.vocab_size)
    out = generate(case.model, case.prompt, case.max_new_tokens, **options, drafter=drafter)
    assert out.tokens == greedy(case)


def plain_look_up(text, want):
    """The look-up by its definition, which reads the whole text at every call."""
    most, at = 0, 0
    for i in range(len(text) - 1, 0, -1):  # text[:i] ends as text does, in so many tokens:
        shared = 0
        while shared < min(4, i) and text[i - 1 - shared] == text[-1 - shared]:
            shared += 1
        if shared > most:
            most, at = shared, i
    return [text[at + j % (len(text) - at)] for j in range(want)] if most else []


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]))
def test_the_index_finds_what_reading_the_whole_text_finds(seed, vocab):
    """It does so while the text grows, and after rollbacks of any length."""
    rng, text, drafter = random.Random(seed), [0], LookUp()
    for _ in range(30):
        kept = rng.randint(0, len(text)) if rng.random() < 0.5 else len(text)
        text[kept:] = [rng.randrange(vocab) for _ in range(rng.randint(1, 6))]
        want = rng.randint(1, 5)
        assert drafter.look_up(text, kept, want) == plain_look_up(text, want)


class SmallLlama:
    """Two-model speculation (arXiv 2211.17192): a second, smaller Llama with its own cache."""

    def __init__(self, model):
        self.step, self.runs = hispec.Step(model), 0

    def draft(self, decoder, want):
        if decoder.unchanged == 0:
            self.opened = self.step.open((), decoder.end + want)
            self.cache = self.opened.__enter__()
        self.cache.rollback(decoder.unchanged)
        tokens, qs, length = decoder.tokens.clone(), [], decoder.length
        for i in range(length, length + want):
            self.runs += i - self.cache.lengths[0]
            token, q = decoder.choose(self.step.run(self.cache, tokens, i, 0, 1))
            tokens[i : i + 1] = token
            qs.append(q)
        return tokens[length : length + want], None if qs[0] is None else torch.cat(qs)


@pytest.mark.parametrize("exits, windows", [((0,), (3,)), ((0, 3), (2, 4))])
def test_a_small_model_drafts_for_a_large_one(exits, windows):
    """The text is unchanged, and an identical model is always right and runs each position once."""
    for seed in range(5):
        case = Case(random_model(seed), [1, 2, 3], 30, exits, windows, ())
        small = SmallLlama(random_model(seed + 50, n_layers=1))
        out = generate(case.model, [1, 2, 3], 30, **case.arguments, drafter=small)
        assert out.tokens == greedy(case)
        twin = SmallLlama(case.model)
        out = generate(case.model, [1, 2, 3], 30, **case.arguments, drafter=twin)
        assert out.tokens == greedy(case)
        assert exits != (0,) or out.levels[0].accepted == out.levels[0].proposed > 0
        assert twin.runs <= 2 * 33


def test_a_drafter_with_a_distribution_follows_the_law(monkeypatch):
    model, small = (
        random_model(5, vocab_size=3, n_layers=3),
        random_model(6, vocab_size=3, n_layers=1),
    )
    options = dict(windows=(2, 2), temperature=3.0, seed=0)

    def run():
        return generate(model, [2, 0], 2, exits=(0, 2), **options, drafter=SmallLlama(small)).tokens

    alone = output_law(
        monkeypatch, lambda: generate(model, [2, 0], 2, temperature=3.0, seed=0).tokens
    )
    assert distance(output_law(monkeypatch, run), alone) < 1e-12


def test_a_token_out_of_range_is_refused_in_one_line():
    class Wild:
        def draft(self, decoder, want):
            return [11], None

    with pytest.raises(ValueError, match=r"the drafter's text holds token id 11.*0\.\.10"):
        generate(random_model(), [1, 2], 5, exits=(0,), windows=(2,), drafter=Wild())


@pytest.mark.parametrize(
    "drafted, why",
    [([1], "must return"), (([1.5], None), "whole numbers"), (([1], None, 0), "must return")],
)
def test_what_is_no_pair_of_tokens_and_distributions_is_refused(drafted, why):
    class Wrong:
        def draft(self, decoder, want):
            return drafted

    with pytest.raises(ValueError, match=why):
        generate(random_model(), [1, 2], 5, exits=(0,), windows=(2,), drafter=Wrong())


@pytest.mark.parametrize("options", [{}, dict(exits=(2,), windows=(2,))])
def test_a_drafter_that_would_never_be_asked_is_refused(options):
    with pytest.raises(ValueError, match="a drafter drafts at depth 0"):
        generate(random_model(), [1, 2], 5, **options, drafter=LookUp())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("exits, windows", [((), ()), ((2,), (3,)), ((1, 3), (2, 4)), ((0,), (2,))])
def test_logits_that_are_not_finite_are_an_error(exits, windows, value, temperature):
    model = random_model()
    model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=r"logits after layer \d.*NaN or infinite"):
        generate(model, [1, 2], 9, exits=exits, windows=windows, temperature=temperature)
