"""The shared cache: equal to a fresh prefill, each position once, memory as its formula says."""

from collections import Counter
from contextlib import nullcontext
from itertools import count

import pytest
import torch
from conftest import Case, cases, random_model
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import hispec
import kvcache
from arguments import checked
from faststep import FixedStep
from hispec import Ladder, generate
from kvcache import CHUNK, WIDEST, KVCache
from model import Config, ExitHead, Llama


def run(case: Case, temperature: float = 0.0, after_settling=None, fast=None) -> Ladder:
    """Generate, calling after_settling(ladder, k) whenever level k has judged; return the ladder as it ended."""

    class Watched(Ladder):
        def settle(self, k, *verdict):
            super().settle(k, *verdict)
            if after_settling:
                after_settling(self, k)

    thresholds = case.thresholds or (0.0,) * len(case.exits)
    ladder_of = (case.exits, case.windows, thresholds)
    with torch.inference_mode():
        asked = checked(
            case.model.config,
            case.prompt,
            case.max_new_tokens,
            *ladder_of,
            temperature,
            0,
            1.0,
            1,
            case.stop,
        )
        end = min(len(case.prompt) + case.max_new_tokens, case.model.config.max_seq_len)
        with fast.open(case.model, case.exits, end) if fast else nullcontext() as cache:
            ladder = Watched(case.model, asked, cache, end, fast or hispec.step)
            ladder.propose(ladder.top, end - ladder.length)
    return ladder


def check_equals_prefill(ladder: Ladder, k: int) -> None:
    """Below each segment's length, keys, values and hidden states are those of a fresh prefill."""
    model, cache, n = ladder.model, ladder.cache, ladder.length
    fresh = KVCache(model, ladder.depths[:-1], n)
    hispec.step(model, fresh, ladder.depths, ladder.tokens, n, len(ladder.depths) - 1, 1)
    first = 0
    for j, last in enumerate(ladder.depths):
        m = cache.lengths[j]
        layers = [*range(first, last), *([cache.slots[last]] if last in cache.slots else [])]
        pairs = [(cache.keys, fresh.keys), (cache.values, fresh.values)]
        pairs = [(a[layers, :, :, :m], b[layers, :, :, :m]) for a, b in pairs]
        if last in cache.hidden:
            pairs.append((cache.hidden[last][:, :m], fresh.hidden[last][:, :m]))
        for mine, theirs in pairs:
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
        run(case, after_settling=check_lengths)


@given(cases(), st.sampled_from([0.0, 0.8]))
def test_each_layer_sees_each_token_once(case, temperature):
    """Every token placed at a position is one birth: kept ones pass each layer once, rejected ones at most once."""
    model, seen = case.model, Counter()
    births, ids, real = {}, count(), model.run  # births: position -> id of the token there

    def counting(h, first, last, cache=None):
        for position in cache.at.tolist():
            birth = births.setdefault(position, next(ids))
            seen.update((layer, birth) for layer in range(first, last))
        return real(h, first, last, cache)

    def born(ladder, k):
        for position in [
            p for p in births if p >= ladder.length - 1
        ]:  # the one new token, and what was rejected
            del births[position]

    model.run = counting
    ladder = run(case, temperature, born)
    assert set(seen.values()) <= {1}
    for position in range(
        ladder.length - 1 if case.max_new_tokens else 0
    ):  # the last token has had no successor
        assert all((layer, births[position]) in seen for layer in range(model.config.n_layers))
    for first, level in zip((0, *case.exits), ladder.stats, strict=True):
        if level.exit > 0:  # a look-up has no layers
            assert level.positions == sum(
                times for (layer, _), times in seen.items() if layer == first
            )


@given(cases(), st.sampled_from([0.0, 0.8]), st.booleans())
def test_one_host_read_a_verification_and_none_a_draft_without_threshold(case, temperature, fixed):
    reads = Counter()
    fast = FixedStep(case.model, len(case.prompt) + case.max_new_tokens) if fixed else None

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
        ladder = run(case, temperature, fast=fast)
    verifications = sum(level.calls for level in ladder.stats[len(case.exits) > 0 :])
    doubting = [
        level
        for level, threshold in zip(ladder.stats, case.thresholds, strict=False)
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
    c, max_len = Config(11, 16, 5, 4, 2, 24), CHUNK + 44
    model = Llama(c)
    for exit in (*blocks, 4):  # the ladder does not read exit 4: its block needs no room
        model.exit_heads[str(exit)] = ExitHead(c, width=8)
    cache = KVCache(model.to(dtype), exits, max_len)
    held = [cache.keys, cache.values, *cache.hidden.values()]
    layers, hidden = c.n_layers + len(blocks), len([exit for exit in exits if exit > 0])
    formula = dtype.itemsize * 2 * CHUNK * (2 * layers * c.n_kv_heads * c.head_dim + hidden * c.dim)
    assert cache.nbytes == formula == sum(t.untyped_storage().nbytes() for t in held)


def test_nothing_is_allocated_in_proportion_to_the_context():
    model = random_model(n_layers=2, max_seq_len=8192).float()

    def allocated(length: int, rows: int) -> int:
        cache = KVCache(model, (1,), 8192)
        cache.lengths = [length - rows] * 2
        tokens = torch.zeros(8192, dtype=torch.long)
        with (
            torch.inference_mode(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        ):
            hispec.step(model, cache, (1, 2), tokens, length, 1, rows)
        return sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages())

    for rows in (1, 4):
        allocated(1024, rows)  # builds the RoPE table
        mask = (
            8192 * rows * model.config.n_heads // model.config.n_kv_heads
        )  # of a pass, by far the most
        assert 0 < allocated(1024, rows) < allocated(8192, rows) < allocated(1024, rows) + 40 * mask


def test_a_pass_holds_a_bounded_number_of_positions():
    cache = KVCache(random_model(max_seq_len=4 * WIDEST), (2,), 4 * WIDEST)
    cache.lengths = [CHUNK - 3, 0]
    assert list(cache.passes(0, CHUNK + 5)) == [(CHUNK - 3, CHUNK + 5)]
    assert list(cache.passes(0, CHUNK - 3)) == []
    assert list(cache.passes(1, WIDEST + 1)) == [(0, WIDEST), (WIDEST, WIDEST + 1)]


@pytest.mark.parametrize("pad", [1, 4])
@pytest.mark.parametrize(
    ("first", "stop"),
    [
        (0, 1),
        (0, 3 * CHUNK - 1),
        (CHUNK - 1, CHUNK),
        (CHUNK - 2, CHUNK + 1),
        (CHUNK + 7, CHUNK + 20),
    ],
)
def test_a_position_sees_all_before_it_among_keys_up_to_its_chunks_end(pad, first, stop):
    model = random_model(max_seq_len=4 * CHUNK)
    model.pad = pad
    cache = KVCache(model, (2,), 4 * CHUNK)
    cache.place(first, stop)
    at = cache.at.tolist()
    assert at == list(range(first, first + len(at))) and len(at) == -(-(stop - first) // pad) * pad
    assert sum(cache.sizes) == len(at)
    zeros = torch.zeros(2, 1, 2, len(at), 4, dtype=torch.float64)
    for n, (keys, values, mask) in zip(cache.sizes, cache.write(0, *zeros)):
        mine, at = [p for p in at[:n] if p < stop], at[n:]
        end = mask.shape[1]
        assert keys.shape[2] == values.shape[2] == end
        assert all(end - CHUNK <= position < end for position in mine)
        rows = mask[: len(mine) * 2 : 2]  # two query heads share a key head
        assert torch.equal(rows == 0, torch.arange(end) <= torch.tensor(mine)[:, None])


@pytest.mark.parametrize("pad", [1, 4, 16])
def test_padding_changes_no_text_and_no_count(pad):
    model = random_model(3)
    plain = generate(model, [1, 2, 3], 30, exits=(0, 1, 3), windows=(2, 2, 3))
    model.pad = pad
    padded = generate(model, [1, 2, 3], 30, exits=(0, 1, 3), windows=(2, 2, 3))
    assert padded.tokens == plain.tokens and padded.levels == plain.levels


def test_a_batch_is_what_its_rows_are_alone():
    model, rows = random_model(4), torch.randint(11, (3, 9))
    caches = [KVCache(model, (), 9, batch=3), *(KVCache(model, (), 9) for _ in range(3))]
    with torch.inference_mode():
        for first, last in [(0, 4), (4, 5), (5, 9)]:
            states = []
            for cache, ids in zip(caches, [rows, *rows[:, None]]):
                cache.place(first, last)
                states.append(model.run(model.embed(ids[:, first:last]), 0, 5, cache))
            torch.testing.assert_close(states[0], torch.cat(states[1:]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pad", [1, 4])
def test_texts_that_end_anywhere_about_a_chunks_end(monkeypatch, pad):
    """The last pass's padding lies behind the text's end, and there has to be room for it."""
    monkeypatch.setattr(kvcache, "CHUNK", 16)
    model = random_model(3)
    plain = generate(model, [1, 2, 3], 50).tokens
    model.pad = pad
    for new in range(8, 32):
        for exits, windows in [((), ()), ((2,), (3,)), ((1, 3), (2, 5))]:
            out = generate(model, [1, 2, 3], new, exits=exits, windows=windows)
            assert out.tokens == plain[:new]
