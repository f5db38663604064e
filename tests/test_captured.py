"""What CUDA will ask of a captured pass, found out without one: devices, reads, liveness, kernels."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, greedy, random_model
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import faststep
from arguments import checked
from faststep import KERNELS, PROMPT, WIDTH, FixedStep, compiled_parts, replaced
from hispec import Ladder, generate
from kvcache import CHUNK, KVCache
from lab import tune
from model import ExitHead, Llama


def with_head(**shape) -> Llama:
    """A model with a block and a reduced vocabulary at exit 2."""
    model = random_model(1, n_layers=4, **shape)
    model.exit_heads["2"] = ExitHead(model.config, width=8, vocab=[1, 4, 7]).double().eval()
    return model


# ---- devices, and reads by the host -------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """A model whose tensors are on another device and hold nothing: a read, or a mix, raises."""
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: real())
    model = with_head().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.inference_mode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in ((n, t) for n, t in tensors.items() if t is not None):
                    empty = torch.empty(t.shape, dtype=t.dtype, device="meta")
                    tensors[name] = torch.nn.Parameter(empty, False) if t.dim() > 1 else empty
        yield model


def test_a_captured_pass_reads_nothing_and_stays_on_its_device(elsewhere):
    model = elsewhere
    fast = FixedStep(model, 40)
    with fast.open(model, (2,), 40):
        for key in ((0, 2, CHUNK), (2, 4, CHUNK), (0, 4, CHUNK), (2,), (4,)):
            fast.run(WIDTH, *key)
        for key in ((0, 2, PROMPT), (2, 4, PROMPT), (4,)):
            fast.run(PROMPT, *key)
    assert fast.out.device.type == fast.cache.parts[0][1].device.type == "meta"


def test_a_draft_step_reads_nothing(elsewhere):
    """Level 0's whole step: the captured passes, its judgement, and what it settles."""
    model = elsewhere
    fast = FixedStep(model, 40)
    asked = checked(model.config, [1, 2, 3], 20, (2,), (4,), (), 0.0, 0, 1.0, 1, ())
    with fast.open(model, (2,), 40) as cache:
        ladder = Ladder(model, asked, cache, 23, fast)
        cache.lengths = [2, 2]  # the prompt has been read
        ladder.propose(0, 4)
        assert ladder.length == 7 and ladder.stats[0].calls == 4
        with pytest.raises(Exception, match="aten._local_scalar_dense|data-dependent"):
            ladder.propose(1, 1)  # a verification is read, once


def test_a_read_in_a_captured_pass_is_caught(elsewhere, monkeypatch):
    real = KVCache.begin

    def planted(self, at, parts):
        assert at[0].item() >= 0  # a host read
        real(self, at, parts)

    monkeypatch.setattr(KVCache, "begin", planted)
    model = elsewhere
    fast = FixedStep(model, 40)
    with fast.open(model, (2,), 40), pytest.raises(Exception, match="_local_scalar_dense|data-dep"):
        fast.run(WIDTH, 0, 2, CHUNK)


def test_a_tensor_on_another_device_is_caught(elsewhere, monkeypatch):
    model = elsewhere
    fast = FixedStep(model, 40)
    fast.cache.columns = torch.arange(CHUNK)
    with fast.open(model, (2,), 40), pytest.raises(Exception, match="(?i)device"):
        fast.run(WIDTH, 0, 2, CHUNK)


# ---- what a replay reads stays alive ------------------------------------------------------------


class Fake:
    """A stream, a graph, or a context of either, that does nothing."""

    def __init__(self, *arguments, **options):
        self.replayed = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, other):
        pass

    def replay(self):
        self.replayed += 1


def test_what_a_replay_reads_outlives_its_owners(monkeypatch):
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    model = with_head()
    fast = FixedStep(model, 20, compiled=False)
    fast.pool, fast.stream = "pool", Fake()
    with torch.inference_mode(), fast.open(model, (2,), 20):
        for key in ((WIDTH, 0, 2, CHUNK), (WIDTH, 2), (WIDTH, 2, 4, CHUNK), (WIDTH, 4)):
            fast.run(*key)
    rows, table = model.exit_heads["2"]._rows[0].weight, model._rope_table
    read = [fast.cache.keys, fast.cache.values, *fast.cache.hidden.values(), fast.cache.columns]
    read += [fast.first, fast.ids, fast.states, fast.out, rows, table, model.head.weight]
    alive = [weakref.ref(tensor) for tensor in read]
    replays = list(fast.captured.values())
    model.eval()  # drops the gathered rows
    model._rope_table = None
    del fast, rows, table, read, model
    gc.collect()
    assert all(ref() is not None for ref in alive)
    replays[0]()
    del replays
    gc.collect()
    assert not any(ref() is not None for ref in alive)  # and no longer than that


def test_tuning_keeps_one_cache_and_few_graphs(monkeypatch):
    born = weakref.WeakSet()
    real = KVCache.__init__

    def counted(self, *arguments, **options):
        born.add(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(KVCache, "__init__", counted)
    monkeypatch.setattr(KVCache, "__hash__", object.__hash__)
    monkeypatch.setattr(faststep, "GRAPHS", 7)
    monkeypatch.setattr(tune, "WINDOWS", (1, 3))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    model = random_model()
    gc.collect()
    fast = FixedStep(model, 60)
    make_decoder = partial(bench.decoder, model, fast)
    chosen = tune.tune(model, [[1, 2]], 6, (), make_decoder, fast)
    assert sum(len(kind["ran"]) for kind in chosen.values()) > 10
    assert list(born) == [fast.cache]
    assert 0 < len(fast.captured) <= 7


# ---- which kernels can take the calls -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads, room", [(1, 1), (2, 7), (4, 40)])
def test_every_mask_is_aligned(dtype, kv_heads, room):
    """Memory-efficient attention asks rows of a mask to begin at multiples of 16 bytes."""
    model = random_model(n_kv_heads=kv_heads, max_seq_len=4096).to(dtype)
    cache = KVCache(model, (), 3 * CHUNK)
    for last in range(room, 3 * CHUNK, 13):
        cache.place(max(0, last - 5), last)
        for _, mask in cache.parts:
            assert mask.is_contiguous() and mask.stride(0) % 8 == 0
            assert mask.data_ptr() % 16 == 0 and mask.dtype == dtype
            assert mask.shape[1] % CHUNK == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fused_kernels_can_take_every_call(monkeypatch, kv_heads):
    """No grouped heads, a mask of the queries' dtype, rows without gaps, heads of 8 elements."""
    calls = []

    def seen(q, k, v, attn_mask=None, **options):
        calls.append((q, k, v, attn_mask, options))
        return real(q, k, v, attn_mask=attn_mask, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    model = random_model(n_kv_heads=kv_heads, dim=64, max_seq_len=512).bfloat16()
    fast = FixedStep(model, 320)
    generate(model, [1, 2, 3] * 90, 20, exits=(1, 3), windows=(2, 4), fast=fast)
    assert calls
    for q, k, v, mask, options in calls:
        assert options == {} and q.shape[1] == k.shape[1] == v.shape[1] == kv_heads
        assert q.dtype == k.dtype == v.dtype == mask.dtype
        assert all(t.stride(-1) == 1 and t.shape[-1] % 8 == 0 for t in (q, k, v))
        assert mask.shape == (q.shape[2], k.shape[2]) and mask.stride(0) % 8 == 0


def test_attention_is_never_cudnns():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model = random_model()
    fast = FixedStep(model, 40)
    assert torch.nn.attention.SDPBackend.CUDNN_ATTENTION not in KERNELS
    seen = []
    watch = lambda event: seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # noqa: E731
    generate(model, [1, 2], 10, exits=(2,), windows=(3,), fast=fast, watch=watch)
    assert seen and not any(seen)  # from the prompt on
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# ---- compiled layers ----------------------------------------------------------------------------


def compiled_with(backend) -> dict:
    torch._dynamo.reset()
    return compiled_parts(backend=backend)


def test_compiled_layers_are_a_program_for_each_width_and_write_the_same_text(monkeypatch):
    counter = CompileCounter()
    case = Case(random_model(3, n_layers=6), [3, 1, 4], 20, (2, 4), (2, 3), ())
    fast = FixedStep(case.model, 40)
    parts, real = compiled_with(counter), FixedStep.run

    def run(self, *key):
        with replaced(case.model, parts):
            real(self, *key)

    monkeypatch.setattr(FixedStep, "run", run)
    out = generate(case.model, case.prompt, 20, **case.arguments, fast=fast)
    assert out.tokens == greedy(case)
    # before and after attention, for a prompt and for what follows, whatever the layer or segment
    assert counter.frame_count == 4
    assert all("before" not in layer.__dict__ for layer in case.model.layers)


def test_inductor_takes_the_parts_of_a_layer():
    """The compiler that CUDA will use, here with its code for a CPU: the same numbers in float64."""
    model = random_model(3, n_layers=3)
    parts = compiled_with("inductor")
    h = torch.randn(1, WIDTH, 16, dtype=torch.float64)
    cache = KVCache(model, (), 40)
    with torch.inference_mode():
        cache.place(0, WIDTH)
        plain = model.run(h, 0, 3, cache)
        with replaced(model, parts):
            torch.testing.assert_close(model.run(h, 0, 3, cache), plain, rtol=1e-9, atol=1e-9)


def test_the_parts_are_taken_away_when_capturing_fails():
    model = random_model()
    with pytest.raises(RuntimeError, match="out of memory"), replaced(model, {"before": print}):
        raise RuntimeError("out of memory")
    assert all("before" not in layer.__dict__ for layer in model.layers)
