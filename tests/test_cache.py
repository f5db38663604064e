"""The shared cache: equal to a fresh prefill, each position once, memory as its formula says."""

from collections import Counter
from itertools import count

import pytest
import torch
from conftest import Case, cases, random_model
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import hispec
from faststep import FixedStep
from hispec import Ladder
from kvcache import CHUNK, KVCache
from model import Config


def run(case: Case, temperature: float = 0.0, after_verify=None, fast=None) -> Ladder:
    """Generate, calling after_verify(ladder, k) whenever level k has judged, and return the ladder as it ended."""

    class Watched(Ladder):
        def verify(self, k, base, logits):
            sure = super().verify(k, base, logits)
            if after_verify:
                after_verify(self, k)
            return sure

    with torch.inference_mode():
        ladder = Watched(
            case.model,
            case.prompt,
            case.max_new_tokens,
            case.exits,
            case.windows,
            case.thresholds or (0.0,) * len(case.exits),
            temperature,
            1,
            frozenset(case.stop),
            fast=fast,
        )
        ladder.propose(len(case.exits), case.max_new_tokens)
    return ladder


def check_equals_prefill(ladder: Ladder, k: int) -> None:
    """Below each segment's length, keys, values and hidden states are those of a fresh prefill."""
    model, cache, n = ladder.model, ladder.cache, ladder.length
    fresh = KVCache(model.config, ladder.depths[:-1], n, dtype=torch.float64, blocks=tuple(cache.slots))
    hispec.step(model, fresh, ladder.depths, ladder.tokens, n, len(ladder.depths) - 1, 1)
    first = 0
    for j, last in enumerate(ladder.depths):
        m = cache.lengths[j]
        layers = [*range(first, last), *([cache.slots[last]] if last in cache.slots else [])]
        for mine, theirs in (
            (cache.keys[layers, :, :, :m], fresh.keys[layers, :, :, :m]),
            (cache.values[layers, :, :, :m], fresh.values[layers, :, :, :m]),
            (cache.hidden[j, :, :m], fresh.hidden[j, :, :m]),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        first = last


def check_lengths(ladder: Ladder, k: int) -> None:
    lengths = [ladder.length, *ladder.cache.lengths]
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
        run(case, after_verify=check_lengths)


@given(cases(), st.sampled_from([0.0, 0.8]))
def test_each_layer_sees_each_token_once(case, temperature):
    """Every token placed at a position is one birth: kept ones pass each layer once, rejected ones at most once."""
    model, seen = case.model, Counter()
    births, ids, real = {}, count(), model.run  # births: position -> id of the token there

    def counting(h, first, last, start=0, cache=None):
        for position in range(start, start + h.shape[1]):
            birth = births.setdefault(position, next(ids))
            seen.update((layer, birth) for layer in range(first, last))
        return real(h, first, last, start, cache)

    def born(ladder, k):
        for position in [p for p in births if p >= ladder.length - 1]:  # the one new token, and what was rejected
            del births[position]

    model.run = counting
    ladder = run(case, temperature, born)
    assert set(seen.values()) <= {1}
    for position in range(ladder.length - 1 if case.max_new_tokens else 0):  # the last token has had no successor
        assert all((layer, births[position]) in seen for layer in range(model.config.n_layers))
    for first, level in zip((0, *case.exits), ladder.stats, strict=True):
        assert level.positions == sum(times for (layer, _), times in seen.items() if layer == first)


@given(cases(), st.sampled_from([0.0, 0.8]), st.booleans())
def test_one_host_read_a_verification_and_none_a_draft_without_threshold(case, temperature, fixed):
    reads = Counter()
    fast = FixedStep(case.model, case.exits, len(case.prompt) + case.max_new_tokens) if fixed else None

    def counted(name, real):
        return lambda self, *args: (reads.update([name]), real(self, *args))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        ladder = run(case, temperature, fast=fast)
    verifications = sum(level.calls for level in ladder.stats[len(case.exits) > 0 :])
    doubting = [level for level, threshold in zip(ladder.stats, case.thresholds, strict=False) if threshold > 0]
    doubts = sum(level.calls for level in doubting if level.exit > 0)  # a look-up has no doubts
    assert reads == Counter(tolist=verifications, item=doubts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("exits", "blocks"), [((), ()), ((2,), ()), ((1, 3), ()), ((1, 3), (3,)), ((1, 3), (1, 3))])
def test_bytes_are_as_the_formula_says(dtype, exits, blocks):
    c, T = Config(11, 16, 5, 4, 2, 24), 100
    cache = KVCache(c, exits, T, dtype=dtype, blocks=blocks)
    tensors = [t for t in vars(cache).values() if isinstance(t, torch.Tensor)]
    layers = c.n_layers + len(blocks)
    formula = dtype.itemsize * T * (2 * layers * c.n_kv_heads * c.head_dim + (len(exits) + 2) * c.dim + 2 * CHUNK)
    assert cache.nbytes == formula == sum(t.untyped_storage().nbytes() for t in tensors)


def test_nothing_is_allocated_in_proportion_to_the_context():
    model = random_model(n_layers=2, max_seq_len=8192).float()

    def allocated(length: int, rows: int) -> int:
        cache = KVCache(model.config, (1,), 8192)
        cache.lengths = [length - rows] * 2
        tokens = torch.zeros(8192, dtype=torch.long)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            hispec.step(model, cache, (1, 2), tokens, length, 1, rows)
        return sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages())

    for rows in (1, 4):
        allocated(1024, rows)  # builds the RoPE table
        assert allocated(1024, rows) == allocated(8192, rows) > 0


def test_rollback_sets_integers_only():
    cache = KVCache(Config(11, 16, 5, 4, 2, 24), (1, 3), 10)
    cache.lengths = [9, 7, 4]
    before = [t.data_ptr() for t in (cache.keys, cache.values, cache.hidden, cache.read)]
    cache.rollback(6)
    assert cache.lengths == [6, 6, 4]
    cache.rollback(3)
    assert cache.lengths == [3, 3, 3]
    assert before == [t.data_ptr() for t in (cache.keys, cache.values, cache.hidden, cache.read)]


def test_a_window_of_the_mask_is_causal():
    cache = KVCache(Config(11, 16, 5, 4, 2, 24), (), 12)
    for start in range(1, 10):
        for n in range(2, 13 - start):
            allowed = torch.arange(start + n) <= torch.arange(start, start + n)[:, None]
            assert torch.equal(cache.mask(start, n) == 0, allowed)
