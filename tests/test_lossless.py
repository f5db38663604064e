"""The output is the full model's own, whatever the ladder, the windows and the drafts."""

import time

import pytest
import torch
from conftest import Case, cases, greedy, random_model
from hypothesis import given
from hypothesis import strategies as st

import hispec
import kvcache
from drafters import LookUp
from hispec import generate
from kvcache import KVCache


def check_lossless(case: Case) -> None:
    assert generate(
        case.model, case.prompt, case.max_new_tokens, **case.arguments
    ).tokens == greedy(case)


@given(cases())
def test_every_ladder_equals_greedy(case):
    check_lossless(case)


@given(cases(levels=st.just(1)))
def test_an_empty_ladder_is_plain_decoding(case):
    check_lossless(case)


@given(cases(levels=st.integers(2, 4)), st.data())
def test_stop_in_the_middle_of_an_accepted_run(case, data):
    free = Case(case.model, case.prompt, case.max_new_tokens, case.exits, case.windows, stop=())
    text = greedy(free)
    if not text:
        return
    case.stop = (data.draw(st.sampled_from(text)),)
    out = generate(case.model, case.prompt, case.max_new_tokens, **case.arguments)
    assert out.tokens == text[: text.index(case.stop[0]) + 1]  # up to and with the first stop token
    assert out.levels[-1].proposed == len(out.tokens)


def test_a_level_in_doubt_stops_early():
    """No probability reaches 1: at threshold 1 each level gathers one token, as if its windows were 1."""
    model = random_model(3)
    one = generate(model, [1, 2], 30, exits=(1, 3), windows=(1, 1))
    doubting = generate(model, [1, 2], 30, exits=(1, 3), windows=(5, 9), thresholds=(1, 1))
    assert doubting.levels == one.levels
    between = generate(model, [1, 2], 30, exits=(1, 3), windows=(5, 9), thresholds=(0.5, 0.5))
    free = generate(model, [1, 2], 30, exits=(1, 3), windows=(5, 9))
    assert one.levels[2].calls > between.levels[2].calls > 0
    assert between.levels[0].calls < free.levels[0].calls


@pytest.mark.parametrize("ladder", [((), ()), ((2,), (3,)), ((1, 3), (2, 4))])
def test_the_context_limit_ends_generation(ladder):
    model = random_model(max_seq_len=16)
    for n in (1, 9, 15):
        out = generate(model, [1] * n, 16, exits=ladder[0], windows=ladder[1])
        assert len(out.tokens) == 16 - n


def test_a_look_up_drafts_what_followed_the_longest_end_that_occurred():
    def look_up(text: list[int], want: int) -> list[int]:
        return LookUp().look_up(text, 0, want)

    assert look_up([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert look_up([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]  # two tokens, where they stood last
    assert look_up([8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2], 1) == [5]  # three go before two
    assert look_up([2, 7, 3, 2], 2) == [7, 3]  # one is enough
    four = [2, 3, 4, 5]  # more than four are not looked for: the latest of these counts
    assert look_up([1, *four, 8, 0, *four, 9, 1, *four], 1) == [9]
    # past the end of the text it copies what it has copied
    assert look_up([5, 7, 8, 7, 8], 3) == [7, 8, 7]
    assert look_up([1, 1], 2) == [1, 1]
    for nothing in ([], [1], [1, 2, 3]):
        assert look_up(nothing, 4) == []


def test_a_look_up_in_a_text_that_repeats_itself_is_accepted():
    model = random_model(3)
    text = generate(model, [4, 2], 40).tokens  # a small model soon goes round in circles
    out = generate(model, [4, 2, *text], 20, exits=(0, 2), windows=(4, 4))
    assert out.tokens == generate(model, [4, 2, *text], 20).tokens
    assert out.levels[0].accepted > 0


@given(cases(), st.sampled_from([0.0, 1.0]))
def test_the_events_retell_the_generation(case, temperature):
    events = []
    options = case.arguments | dict(temperature=temperature, seed=1)
    out = generate(case.model, case.prompt, case.max_new_tokens, **options, watch=events.append)
    text, drafted, kept = list(case.prompt), [0] * len(out.levels), [0] * len(out.levels)
    for event in events:
        assert text[event.base :] == event.drafts
        agreed = min(
            event.kept, len(event.text)
        )  # a stop token ends the text, whatever was accepted after it
        assert event.drafts[:agreed] == event.text[:agreed]
        text[event.base :] = event.text
        drafted[event.level - 1] += len(event.drafts)
        kept[event.level - 1] += agreed
    assert text[len(case.prompt) :] == out.tokens
    assert drafted[:-1] == [level.proposed for level in out.levels[:-1]]
    assert kept[:-1] == [level.accepted for level in out.levels[:-1]]
    if events:
        assert events[-1].positions == [level.positions for level in out.levels]
    assert out.tokens == generate(case.model, case.prompt, case.max_new_tokens, **options).tokens


class Rigged(hispec.Step):
    """Gives every level except the last the full model's logits, made wrong if corrupt(level,
    drafts in a row).
    """

    def __init__(self, model, corrupt):
        super().__init__(model)
        self.corrupt, self.drafts = corrupt, 0

    def run(self, cache, tokens, length, k, n):
        logits = super().run(cache, tokens, length, k, n)
        self.drafts = self.drafts + 1 if k == 0 else 0
        if k == len(cache.depths) - 1:
            return logits
        oracle = self.model(tokens[None, :length])[0, -n:]
        return oracle.roll(1, dims=-1) if self.corrupt(k, self.drafts) else oracle


def with_drafts(case: Case, corrupt):
    step = Rigged(case.model, corrupt)
    return generate(case.model, case.prompt, case.max_new_tokens, **case.arguments, fast=step)


LADDERS = [((2,), (1,)), ((2,), (4,)), ((1, 3), (2, 4)), ((1, 2, 4), (3, 1, 5))]


@pytest.mark.parametrize("exits, windows", LADDERS)
def test_a_draft_that_is_always_right(exits, windows):
    case = Case(random_model(3), [4, 2], 40, exits, windows, ())
    out = with_drafts(case, lambda k, n: False)
    assert out.tokens == greedy(case)
    assert all(level.accepted == level.proposed > 0 for level in out.levels)
    assert out.levels[0].calls == out.levels[0].proposed  # a draft a step
    if len(exits) == 1:
        # the prompt's pass gives a token; then each gives a window and its bonus, rounded up
        assert out.levels[-1].calls == 1 + -(-39 // (windows[0] + 1))


@pytest.mark.parametrize("exits, windows", LADDERS)
def test_a_draft_that_is_always_wrong(exits, windows):
    case = Case(random_model(3), [4, 2], 20, exits, windows, ())
    out = with_drafts(case, lambda k, n: True)
    assert out.tokens == greedy(case)
    assert out.levels[-2].accepted == 0
    assert out.levels[-1].calls == 20  # each pass yields its own correction and no more


@pytest.mark.parametrize("exits, windows", LADDERS)
def test_a_draft_that_is_wrong_only_at_the_windows_edge(exits, windows):
    edge = min(windows)  # a level asks for no more drafts than it is itself asked for
    case = Case(random_model(3), [4, 2], 40, exits, windows, ())
    out = with_drafts(case, lambda k, n: k == 0 and n == edge)
    assert out.tokens == greedy(case)
    draft = out.levels[0]
    assert draft.accepted == 0 if edge == 1 else 0 < draft.accepted < draft.proposed


@pytest.mark.parametrize("half", [3, 4, 8, 16])
def test_ties(half):
    """Each token has a twin with the same weights. Texts are equal up to twins: which of the two equal logits
    is the larger by a rounding error may depend on how many positions a pass holds."""
    model = random_model(vocab_size=2 * half)
    model.embed.weight.data[half:] = model.embed.weight.data[
        :half
    ]  # and the tied head: logits i and i+half
    plain = greedy(Case(model, [1, 2], 30, (), (), ()))
    for exits, windows in [((), ()), *LADDERS]:
        out = generate(model, [1, 2], 30, exits=exits, windows=windows).tokens
        assert [token % half for token in out] == [token % half for token in plain]


def test_exactly_equal_logits_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    for wide in (logits, logits.repeat(1, 300)):  # a long row is searched by several threads
        assert wide.max(dim=-1).indices.tolist() == [1, 0]
    own, kept = hispec.accept_equal(torch.tensor([1]), torch.tensor([1, 0]))
    assert own.tolist() == [0] and kept.tolist() == [1]
    own, kept = hispec.accept_equal(torch.tensor([2]), torch.tensor([1, 0]))
    assert own.tolist() == [1] and kept.tolist() == [0]


def test_float32_is_lossless_too():
    for seed in range(10):
        model = random_model(seed).float()
        plain = generate(model, [1, 2, 3], 50).tokens
        for exits, windows in LADDERS:
            assert generate(model, [1, 2, 3], 50, exits=exits, windows=windows).tokens == plain


@pytest.mark.parametrize("widest", [512, 24])
def test_prompts_and_windows_longer_than_a_pass(monkeypatch, widest):
    monkeypatch.setattr(kvcache, "WIDEST", widest)
    model = random_model(max_seq_len=100)
    prompt = torch.randint(11, (40,)).tolist()
    check_lossless(Case(model, prompt, 60, (1, 3), (25, 35), ()))


# The tests above must be able to fail: each planted bug must break losslessness.


def first_failure() -> bool:
    """Whether any of 40 fixed cases changes the text."""
    for seed in range(40):
        case = Case(random_model(seed), [1, 2, 3], 20, (1, 3), (2, 3), ())
        if generate(case.model, case.prompt, 20, **case.arguments).tokens != greedy(case):
            return True
    return False


def test_without_a_bug_nothing_fails():
    assert not first_failure()


def test_a_missing_rollback_is_caught(monkeypatch):
    def cut_one_late(self, length):
        self.lengths = [
            min(processed, length + 1) for processed in self.lengths
        ]  # one stale position survives

    monkeypatch.setattr(KVCache, "rollback", cut_one_late)
    with pytest.raises(IndexError):  # a level is asked to run positions that it believes it has run
        first_failure()


def test_an_off_by_one_bonus_is_caught(monkeypatch):
    def late(drafts, choice):
        own, kept = real(drafts, choice)
        return own, (kept + 1).clamp(max=len(drafts))  # takes one token past the first mismatch

    real = hispec.accept_equal
    monkeypatch.setattr(hispec, "accept_equal", late)
    assert first_failure()


class KeepsOneOfTwo(hispec.Decoder):
    """A lossy rule for greedy text: some levels keep a draft that is one of their two likeliest."""

    lenient: tuple[int, ...] = (1,)

    def agree(self, k, drafts, logits):
        if k not in self.lenient:
            return super().agree(k, drafts, logits)
        likely = logits[:-1].topk(2).indices  # (n, 2)
        kept = hispec.leading((likely == drafts[:, None]).any(-1))
        return logits.argmax(-1).index_select(0, kept), kept


@given(cases(levels=st.integers(3, 4)))
def test_a_lossy_rule_below_the_last_level_changes_speed_alone(case):
    run = [case.model, case.prompt, case.max_new_tokens]
    assert generate(*run, **case.arguments, decoder=KeepsOneOfTwo).tokens == greedy(case)


def test_a_lossy_rule_at_the_last_level_is_caught():
    class Everywhere(KeepsOneOfTwo):
        lenient = (1, 2)

    def differs(seed):
        case = Case(random_model(seed), [1, 2], 20, (1, 3), (2, 4), ())
        out = generate(case.model, [1, 2], 20, **case.arguments, decoder=Everywhere)
        return out.tokens != greedy(case)

    assert any(map(differs, range(20)))


def test_a_missing_mask_is_caught(monkeypatch):
    def blind(self, first, stop):
        plan = real(self, first, stop)
        plan.mask.fill_(True)
        return plan

    real = KVCache.plan
    monkeypatch.setattr(KVCache, "plan", blind)
    assert first_failure()


class Slow(hispec.Step):
    """Takes some milliseconds, and more for the pass over a prompt of four tokens."""

    def run(self, cache, tokens, length, k, n):
        time.sleep(0.06 if length == 4 else 0.01)
        return super().run(cache, tokens, length, k, n)


def test_seconds_cover_the_work_and_the_prompts_are_split_off():
    model = random_model()
    out = generate(model, [1, 2, 3, 4], 10, exits=(2,), windows=(3,), fast=Slow(model))
    assert 0.06 <= out.prefill_seconds <= out.seconds - 0.02
    assert generate(model, [1], 0, fast=Slow(model)).prefill_seconds < 0.01


def test_drafts_behind_a_stop_token_are_not_counted_as_accepted():
    model = random_model(3)
    plain = greedy(Case(model, [4, 2], 20, (), (), ()))
    stop = next(t for t in plain[2:] if t not in plain[:2])
    n = plain.index(stop) + 1  # tokens written; the first by the pass over the prompt
    out = with_drafts(Case(model, [4, 2], 20, (2,), (12,), (stop,)), lambda k, n: False)
    assert out.tokens == plain[:n]
    assert (out.levels[0].proposed, out.levels[0].accepted) == (12, n - 1)
