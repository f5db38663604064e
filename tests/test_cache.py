"""The shared cache equals a fresh prefill, runs each position once, and takes the memory of its
formula.
"""

from collections import Counter
from itertools import count

import pytest
import torch
from conftest import Case, cases, random_model
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import hispec
from hispec import Decoder, generate
from kvcache import WIDEST, KVCache
from model import Config, ExitHead, Llama


def run(case: Case, temperature: float = 0.0, after_settling=None, fast=None) -> Decoder:
    """Generate, calling after_settling(decoder, k) whenever level k has judged; return the decoder
    at the end.
    """
    made = []

    class Watched(Decoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def settle(self, k, *verdict):
            super().settle(k, *verdict)
            if after_settling:
                after_settling(self, k)

    options = case.arguments | dict(temperature=temperature, seed=1)
    generate(case.model, case.prompt, case.max_new_tokens, **options, fast=fast, decoder=Watched)
    return made[0]


def check_equals_prefill(decoder: Decoder, k: int) -> None:
    """Below each segment's length, keys, values and hidden states are those of a fresh prefill."""
    cache, n = decoder.cache, decoder.length
    step = hispec.Step(decoder.step.model)
    with step.open(decoder.depths[:-1], n) as fresh:
        step.run(fresh, decoder.tokens, n, decoder.top, 1)
    first = 0
    for j, last in enumerate(decoder.depths):
        m = cache.lengths[j]
        blocks = [cache.block_layers[last]] if last in cache.block_layers else []
        layers = [*range(first, last), *blocks]
        pairs = [(cache.keys, fresh.keys), (cache.values, fresh.values)]
        pairs = [(a[layers, :, :, :m], b[layers, :, :, :m]) for a, b in pairs]
        if last in cache.hidden:
            pairs.append((cache.hidden[last][:, :m], fresh.hidden[last][:, :m]))
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        first = last


def check_lengths(decoder: Decoder, k: int) -> None:
    lengths = [decoder.length, *decoder.cache.lengths]
    assert lengths == sorted(lengths, reverse=True)


@given(cases(), st.sampled_from([0.0, 0.8]))
def test_cache_equals_a_fresh_prefill_after_every_verification(case, temperature):
    run(case, temperature, check_equals_prefill)


@given(cases(), st.sampled_from([0.0, 0.8]))
def test_deeper_lengths_never_exceed_shallower_ones(case, temperature):
    run(case, temperature, check_lengths)


def test_a_stale_cache_is_caught(monkeypatch):
    monkeypatch.setattr(KVCache, "rollback", lambda self, length: None)
    case = Case(random_model(1), [1, 2, 3], 20, (1, 3), (2, 3), ())
    with pytest.raises(AssertionError):
        run(case, after_settling=check_lengths)


@given(cases(), st.sampled_from([0.0, 0.8]))
def test_each_layer_sees_each_token_once(case, temperature):
    """Every token put at a position counts as new: a kept one passes each layer once, a rejected
    one at most once.
    """
    seen: Counter = Counter()
    births, ids = {}, count()  # position -> id of the token there

    class Counting(Llama):
        def run(self, h, first, last, plan=None):
            for position in plan.positions.tolist():
                birth = births.setdefault(position, next(ids))
                seen.update((layer, birth) for layer in range(first, last))
            return super().run(h, first, last, plan)

    def born(decoder, k):
        for position in [p for p in births if p >= decoder.length - 1]:
            del births[position]  # the one new token, and what was rejected

    case.model.__class__ = Counting
    decoder = run(case, temperature, born)
    assert set(seen.values()) <= {1}
    written = decoder.length - 1 if case.max_new_tokens else 0  # the last has had no successor
    for position in range(written):
        assert all((layer, births[position]) in seen for layer in range(len(case.model.layers)))
    for first, level in zip((0, *case.exits), decoder.statistics(), strict=True):
        if level.exit > 0:  # a drafter has no layers
            times = sum(n for (layer, _), n in seen.items() if layer == first)
            assert level.positions == times


@given(cases(), st.sampled_from([0.0, 0.8]))
def test_one_host_read_a_verification_and_none_a_draft_without_threshold(case, temperature):
    reads: Counter = Counter()

    def counted(name, real):
        return lambda self, *args: (reads.update([name]), real(self, *args))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "tolist",
            "item",
            "__bool__",
            "__int__",
            "__index__",
            "__float__",
            "cpu",
            "numpy",
        ):
            patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        decoder = run(case, temperature)
    verifications = sum(level.calls for level in decoder.stats[len(case.exits) > 0 :])
    doubting = [
        level
        for level, threshold in zip(decoder.stats, case.thresholds, strict=False)
        if threshold > 0
    ]
    doubts = sum(level.calls for level in doubting if level.exit > 0)  # a look-up has no doubts
    assert reads == Counter(tolist=verifications, item=doubts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("exits", "blocks"),
    [((), ()), ((2,), ()), ((1, 3), ()), ((0, 3), (3,)), ((1, 3), (3,)), ((1, 3), (1, 3))],
)
def test_bytes_are_as_the_formula_says(dtype, exits, blocks):
    c, max_len = Config(11, 16, 5, 4, 2, 24), 108
    model = Llama(c)
    for exit in (*blocks, 4):  # the ladder does not read exit 4: its block needs no room
        model.exit_heads[str(exit)] = ExitHead(c, width=8)
    cache = KVCache(model.to(dtype), exits, max_len)
    held = [cache.keys, cache.values, *cache.hidden.values()]
    layers, hidden = c.n_layers + len(blocks), len([exit for exit in exits if exit > 0])
    formula = dtype.itemsize * max_len * (2 * layers * c.n_kv_heads * c.head_dim + hidden * c.dim)
    assert cache.nbytes == formula == sum(t.untyped_storage().nbytes() for t in held)


def test_nothing_is_allocated_in_proportion_to_the_context():
    model = random_model(n_layers=2, max_seq_len=8192).float()
    step = hispec.Step(model)

    def allocated(length: int, n: int) -> int:
        tokens = torch.zeros(8192, dtype=torch.long)
        with step.open((1,), 8192) as cache, torch.inference_mode():
            cache.lengths = [length - n] * 2
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                step.run(cache, tokens, length, 1, n)
        return sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages())

    for n in (1, 4):
        mask = 8192 * n * model.config.n_heads  # of a pass, by far the most
        assert 0 < allocated(1024, n) < allocated(8192, n) < allocated(1024, n) + 40 * mask


def test_a_pass_holds_a_bounded_number_of_positions():
    cache = KVCache(random_model(max_seq_len=4 * WIDEST), (2,), 4 * WIDEST)
    cache.lengths = [61, 0]

    def passes(segment, length):
        return [plan.positions.tolist() for plan in cache.plans(segment, length)]

    assert passes(0, 69) == [list(range(61, 69))]
    assert passes(0, 61) == []
    assert passes(1, WIDEST + 1) == [list(range(WIDEST)), [WIDEST]]


def test_a_batch_is_what_its_rows_are_alone():
    model, rows = random_model(4), torch.randint(11, (3, 9))
    caches = [KVCache(model, (), 9, batch=3), *(KVCache(model, (), 9) for _ in range(3))]
    with torch.inference_mode():
        for first, last in [(0, 4), (4, 5), (5, 9)]:
            states = []
            for cache, ids in zip(caches, [rows, *rows[:, None]]):
                plan = cache.plan(first, last)
                states.append(model.run(model.embed(ids[:, first:last]), 0, 5, plan))
            torch.testing.assert_close(states[0], torch.cat(states[1:]), rtol=1e-9, atol=1e-9)
