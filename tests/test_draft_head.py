"""A draft head, which uses an exit's computed states, changes only the speed, and runs few
positions.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import test_bench
import torch
from conftest import Case, greedy, random_model
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import distance, law_of_two, output_law

import hispec
from hispec import Decoder, generate
from model import DraftHead, Llama

small_bench = test_bench.small_bench  # the fixture: bench.main on a small random model


def with_heads(seed: int, exits, vocab=None, **shape) -> Llama:
    """A random model with random draft heads on these exits."""
    model = random_model(seed, **shape)
    for exit in exits:
        head = DraftHead(model.config, vocab=vocab).double()
        for p in head.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.4)
        model.draft_heads[str(exit)] = head
    return model.eval()


LADDERS = [((0, 3), (3, 4)), ((0,), (3,)), ((0, 2, 3), (2, 3, 5)), ((0, 1), (1, 1))]


def steps(model: Llama):
    yield None
    cpu, cuda = pytest.importorskip("fast.cpu"), pytest.importorskip("fast.cuda")
    yield cuda.FixedStep(model, 40, compiled=False)
    cpu.prepare(model)
    yield model.fast


@given(st.integers(0, 10**6), st.sampled_from(LADDERS), st.booleans(), st.integers(1, 12))
def test_random_ladders_with_random_heads_equal_greedy(seed, ladder, reduced, n):
    (exits, windows), rng = ladder, torch.Generator().manual_seed(seed)
    reads = (*exits, 5)[1]
    model = with_heads(seed, [reads], [0, 3, 7, 8] if reduced else None)
    prompt = torch.randint(11, (n,), generator=rng).tolist()
    case = Case(model, prompt, 24, exits, windows, ())
    expected = greedy(case)
    for step in steps(model):
        options = case.arguments | dict(draft_head=reads, fast=step)
        assert generate(model, prompt, 24, **options).tokens == expected
        generate(model, prompt, 24, **options, temperature=1.0, seed=seed)


@pytest.mark.parametrize("exits, windows", LADDERS)
def test_a_kept_position_passes_the_head_at_most_twice(exits, windows):
    """Also, each level fills the cache once, as without a head."""
    passed: Counter = Counter()

    class Counting(hispec.Step):
        def draft(self, cache, exit, states, tokens, first):
            passed.update(range(first, first + len(tokens)))
            return super().draft(cache, exit, states, tokens, first)

    class Once(Decoder):
        def settle(self, k, base, own, kept):
            super().settle(k, base, own, kept)
            # the level's own token is new there, and rejected ones after it are gone
            for position in [p for p in passed if p >= self.length - 1]:
                del passed[position]

    for seed in range(5):
        passed.clear()
        reads = (*exits, 5)[1]
        model = with_heads(seed, [reads])
        options = dict(exits=exits, windows=windows, draft_head=reads)
        out = generate(model, [1, 2, 3], 30, **options, fast=Counting(model), decoder=Once)
        assert passed and max(passed.values()) <= 2
        layers = [level.positions for level in out.levels if level.exit > 0]
        assert layers == sorted(layers, reverse=True)


def test_the_head_sees_the_states_of_a_fresh_pass():
    """Whatever was drafted and rolled back, each first draft equals that of a pass over the whole
    text.
    """
    model = with_heads(3, [3])
    seen = []

    class Watching(hispec.HeadDrafter):
        def draft(self, decoder, want):
            drafts, q = super().draft(decoder, want)
            seen.append((list(decoder.text), int(drafts[0])))
            return drafts, q

    options = dict(exits=(0, 3), windows=(3, 5), draft_head=3, drafter=Watching(3))
    generate(model, [1, 2, 3], 30, **options)
    assert len(seen) > 4
    with torch.no_grad():
        for text, draft in seen:
            ids = torch.tensor([text])
            h = model.run(model.embed(ids), 0, 3)
            before = torch.nn.functional.pad(h[:, :-1], (0, 0, 1, 0))
            logits = model.draft_logits(model.draft(3, before, ids), 3)
            assert draft == int(logits[0, -1].argmax())


@pytest.mark.parametrize("exits, windows", [((0,), (2,)), ((0, 2), (2, 2))])
def test_sampled_texts_follow_the_models_own_law(monkeypatch, exits, windows):
    reads = (*exits, 3)[1]
    model = with_heads(5, [reads], vocab=[0, 2], vocab_size=3, n_layers=3)
    options = dict(exits=exits, windows=windows, draft_head=reads, temperature=3.0, seed=0)
    law = output_law(monkeypatch, lambda: generate(model, [2, 0], 2, **options).tokens)
    assert distance(law, law_of_two(model, [2, 0], 3.0)) < 1e-12


def test_a_damaged_head_changes_speed_alone_or_is_refused():
    model = with_heads(1, [3])
    model.draft_heads["3"].fuse.weight.data[0, 0] = float("nan")
    options = dict(exits=(0, 3), windows=(3, 4), draft_head=3)
    plain = generate(model, [1, 2], 20).tokens
    assert generate(model, [1, 2], 20, **options).tokens == plain
    with pytest.raises(ValueError, match="NaN or infinite"):
        generate(model, [1, 2], 20, **options, temperature=1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(exits=(2, 3), windows=(1, 1), draft_head=3), "at depth 0"),
        (dict(exits=(0, 2), windows=(1, 1), draft_head=3), "must read the level above it, exit 2"),
        (dict(exits=(0, 2), windows=(1, 1), draft_head=2), r"heads on exits \(3,\)"),
        (dict(exits=(0,), windows=(1,), draft_head=3), "exit 5"),
    ],
)
def test_a_head_that_does_not_fit_the_ladder(options, message):
    with pytest.raises(ValueError, match=message):
        generate(with_heads(1, [3]), [1], 4, **options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [1, 3, 4])
def test_a_replay_takes_the_full_passes_that_decoding_takes(seed, window):
    """Replay keeps apart a head's drafts in a row: a misplaced one would change the number of
    passes.
    """
    costs = pytest.importorskip("lab.costs")
    model = with_heads(seed, [5], vocab_size=3)
    seen = costs.trace(model, [1, 2, 0], 40, (), (), partial(generate, model))
    full, none = {0: [0.0] * 99, 5: [1.0] * 99}, {5: [0.0] * 99}
    made = generate(model, [1, 2, 0], 40, exits=(0,), windows=(window,), draft_head=5)
    ladder, free = ((-5,), (window,), (0.0,)), costs.Costs(full, none, 0.0, {5: 0.0, -5: 0.0}, none)
    passes = costs.replay(seen, ladder, free, 5)
    assert passes == made.levels[-1].calls - 1
    # whatever else the generation took is charged to the drafts
    drafts = made.levels[0].calls
    slower = replace(made, seconds=made.prefill_seconds + passes + 2.0 * drafts)
    dearer = costs.with_loop(free, [seen], {ladder: [slower]}, 5)
    assert dearer.loop == {5: 0.0, -5: 2.0}
    assert costs.replay(seen, ladder, dearer, 5) == pytest.approx(passes + 2.0 * drafts, abs=2)


def test_each_kind_of_head_is_tuned_and_measured(small_bench, monkeypatch):
    tune = pytest.importorskip("lab.tune")
    monkeypatch.setattr(tune, "WINDOWS", (1, 3))
    monkeypatch.setattr(tune, "COARSE", (1, 3))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(tune, "RUN", 2)
    small_bench.model.draft_heads = with_heads(0, [2, 5], vocab_size=256).float().draft_heads
    brief = ["--quick", "--max-new-tokens", "5"]
    for more in (["--tune"], []):
        _, run = small_bench(*brief, *more)
        methods = {method["name"]: method for method in run["methods"]}
        for name, exits, head in (("head", [0], 5), ("head, exit", [0, 2], 2)):
            for found in (methods[name], methods[name]["sampled"]):
                assert (found["exits"], found["draft_head"]) == (exits, head)
            assert methods[name]["identical"] == methods[name]["prompts"]
