"""Passes of one shape, as CUDA captures them: here called instead, on any device but for one test."""

import contextlib
import gc
import weakref
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, cases, greedy, random_model
from hypothesis import given, settings
from test_fast_cpu import DTYPES, KINDS, bits, check_bits, different, large_model, shapes, stir
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoints
import model as plain
from arguments import Options
from fast import cuda
from fast.cpu import prepare
from fast.cuda import KERNELS, PROMPT, WIDTH, CompiledLayer, FixedStep, compiled
from fast.layers import CHUNK, Cache, ChunkPlan, Layer
from fast.modules import replaced
from fast.rounds import RoundStep
from hispec import Decoder, Step, generate
from model import DraftHead, ExitHead, Llama

LADDERS = [((), ()), ((8,), (6,)), ((2, 8), (2, 6)), ((0, 8), (8, 8)), ((1, 2, 8), (1, 3, 5))]


def run_twice(case: Case, **options):
    """The plain step's Generation, and the fixed one's, on a cache that holds an earlier text."""
    step = FixedStep(case.model, len(case.prompt) + case.max_new_tokens)
    rest = dict(max_new_tokens=case.max_new_tokens, **case.arguments, **options)
    generate(case.model, case.prompt[::-1], **rest, fast=step)
    return [generate(case.model, case.prompt, **rest, fast=fast) for fast in (None, step)]


# ---- whole texts --------------------------------------------------------------------------------


@settings(max_examples=100)
@given(cases(shapes=KINDS))
def test_fixed_texts_are_greedys(case):
    """The plain step's texts and statistics: each position passes each segment exactly once."""
    stir(case.model)
    expected = greedy(case)
    for options in ({}, dict(temperature=0.9, seed=7)):
        alone, out = run_twice(case, **options)
        assert out.tokens == alone.tokens and out.levels == alone.levels
        assert options or out.tokens == expected


def test_prompts_and_windows_wider_than_a_pass():
    model = random_model(5, max_seq_len=2 * PROMPT + 64)
    case = Case(model, [], 20, (1, 3), (WIDTH + 3, 2 * WIDTH), ())
    for length in (WIDTH, WIDTH + 1, 40, PROMPT - 1, PROMPT, PROMPT + 1, 2 * PROMPT + 5):
        case.prompt = ([3, 1, 4, 1, 5] * length)[:length]
        assert run_twice(case)[1].tokens == greedy(case)


def test_a_prompt_is_read_in_few_wide_passes():
    class Noted(FixedStep):
        def replay(self, *key):
            keys.append(key)
            super().replay(*key)

    keys, n = [], 2 * PROMPT + 5
    model = random_model(max_seq_len=800)
    generate(model, [1] * n, 1, exits=(2,), windows=(2,), fast=Noted(model, n + 1))
    ends = [PROMPT, 2 * PROMPT, 3 * PROMPT]
    read = [(PROMPT, start, depth, end) for start, depth in [(0, 2), (2, 5)] for end in ends]
    assert keys == [*read, (PROMPT, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_position_has_the_same_bits_in_any_pass(dtype):
    step = FixedStep(large_model(dtype), 100)
    alone = bits(step, (1, 3), [1], 40)
    for sizes in ([2], [3, 1], [7, 16, 5], [15], [16], [1, 38]):
        assert different(alone, bits(step, (1, 3), sizes, 40)) == [], sizes


@settings(max_examples=25)
@given(shapes())
def test_random_shapes_have_the_same_bits_too(shape):
    check_bits(shape, lambda model: FixedStep(model, 90))


def test_segments_and_logits_on_their_own_are_what_a_run_gives():
    model = random_model(1)
    tokens, n = torch.randint(11, (60,)), 2 * WIDTH + 3
    for step in (Step(model), FixedStep(model, 50)):
        with torch.inference_mode(), step.open((2,), 50) as cache:
            step.run(cache, tokens, 5, 1, 1)
            states = [step.segment(cache, tokens, j, 5 + n) for j in (0, 1)]
            mine = [step.logits(s, depth) for s, depth in zip(states, (2, 5))]
            assert cache.lengths == cache.processed == [5 + n] * 2
            assert len(step.segment(cache, tokens, 1, 5 + n)) == 0
            cache.rollback(5)
            for k in (0, 1):
                torch.testing.assert_close(step.run(cache, tokens, 5 + n, k, n), mine[k])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "device, dtype", [("cpu", torch.bfloat16), *[("cuda", dtype) for dtype in DTYPES]]
)
def test_all_ladders_write_the_same_text(device, dtype, fused):
    """On CUDA by captured rounds, and where a look-up drafts by captured passes."""
    if device == "cpu" and fused:
        pytest.skip("test_kernels.py runs the fused kernel in Triton's interpreter")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("captured graphs need CUDA")
    model, tokenizer = checkpoints.load("tiny", device, dtype, plain=device == "cpu")
    n = 100 if device == "cuda" else 64
    step = RoundStep(model, 800, compiled=not fused, fused=fused)
    prompt, rest = tokenizer.encode("def add(a, b):"), dict(stop=tokenizer.stop, fast=step)
    first, *others = (
        generate(model, prompt, n, exits=exits, windows=windows, **rest).tokens
        for exits, windows in LADDERS
    )
    assert len(first) == n and all(text == first for text in others)


# ---- one step, many texts -----------------------------------------------------------------------


def test_it_is_not_used_for_what_it_was_not_made_for():
    model, other = random_model(1), random_model(2)
    step, options = FixedStep(model, 20), dict(exits=(2,), windows=(3,))
    model.fast = prepare(other)  # which would refuse this model: an explicit step is the one taken
    generate(model, [1, 2], 18, **options, fast=step)
    generate(model, [1, 2], 5, exits=(1, 3), windows=(1, 2), fast=step)  # any ladder will do
    for wrong in (step, Step(model)):
        with pytest.raises(ValueError, match="another model"):
            generate(other, [1, 2], 5, **options, fast=wrong)
    assert type(model.layers[0]) is plain.Layer  # as it was
    with pytest.raises(ValueError, match="at most 20 tokens, this may take 21"):
        generate(model, [1, 2], 19, **options, fast=step)
    for width, vocab in ((8, None), (0, [1, 2])):  # one that is new, one that takes its place
        model.exit_heads["2"] = ExitHead(model.config, width, vocab).double()
        with pytest.raises(ValueError, match="other exit heads since"):
            generate(model, [1, 2], 5, **options, fast=step)
        step = FixedStep(model, 20)
        generate(model, [1, 2], 5, **options, fast=step)
    with pytest.raises(ValueError, match="another dtype"):
        generate(model.float(), [1, 2], 5, **options, fast=step)


def test_it_serves_one_generation_at_a_time_and_is_free_after_an_interruption():
    model = random_model(1)
    options = dict(exits=(1, 3), windows=(2, 4), fast=FixedStep(model, 60))

    def interrupt(event):
        if event.base > 12:
            raise KeyboardInterrupt

    within = lambda event: generate(model, [1], 5, **options)  # noqa: E731
    for watch, error in ((within, ValueError), (interrupt, KeyboardInterrupt)):
        with pytest.raises(error, match="in use" if watch is within else None):
            generate(model, [1, 2], 30, **options, watch=watch)
        assert generate(model, [1, 2], 30, **options).tokens == generate(model, [1, 2], 30).tokens


def test_nothing_of_an_earlier_generation_is_left():
    """A NaN that one text left behind a mask would spoil all later ones, since 0 x NaN is NaN."""
    model = random_model(1)
    step, expected = FixedStep(model, 60), generate(model, [1, 2], 30).tokens
    weight = model.layers[2].attn.qkv.weight.data.clone()
    model.layers[2].attn.qkv.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        generate(model, [3] * 20, 40, exits=(1, 3), windows=(2, 4), fast=step)
    assert step.cache.keys.isnan().any()
    model.layers[2].attn.qkv.weight.data.copy_(weight)
    for exits, windows in [((), ()), ((1,), (3,)), ((1, 3), (2, 4)), ((0, 3), (2, 4))]:
        out = generate(model, [1, 2], 30, exits=exits, windows=windows, fast=step)
        assert out.tokens == expected


def test_many_ladders_take_few_graphs(monkeypatch):
    monkeypatch.setattr(cuda, "GRAPHS", 7)
    model = random_model(1)
    step, expected = FixedStep(model, 60), generate(model, [1, 2], 30).tokens
    for exits in [(), (1,), (2,), (1, 3), (0, 2), (1, 2, 4), (3,)]:
        windows = (2, 3, 4)[: len(exits)]
        out = generate(model, [1, 2], 30, exits=exits, windows=windows, fast=step)
        assert out.tokens == expected and 0 < len(step.captured) <= 7


# ---- planted bugs -------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["packed", "fixed"])
def test_a_pass_that_sees_what_lies_ahead_is_caught(monkeypatch, step):
    def blind(self, *args):
        real(self, *args)
        for _, mask in self.seen:
            mask.zero_()

    real = ChunkPlan.__init__
    monkeypatch.setattr(ChunkPlan, "__init__", blind)
    cases = [Case(random_model(seed), [1, 2, 3], 12, (2, 4), (2, 3), ()) for seed in range(5)]
    expected = [greedy(case) for case in cases]
    steps = [prepare(c.model) if step == "packed" else FixedStep(c.model, 15) for c in cases]
    assert expected != [
        generate(c.model, c.prompt, 12, **c.arguments, fast=s).tokens for c, s in zip(cases, steps)
    ]


# ---- what CUDA will ask of a captured pass, found out without one -------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """A model whose tensors are on another device and hold nothing: a read, or a mix, raises."""
    monkeypatch.setattr(torch, "Generator", lambda device, real=torch.Generator: real())
    config = random_model(n_layers=4).config
    with FakeTensorMode(allow_non_fake_inputs=False), torch.inference_mode():
        with torch.device("meta"):
            model = Llama(config).requires_grad_(False)
            model.exit_heads["2"] = head = ExitHead(config, width=8)
            head.vocab = torch.empty(3, dtype=torch.long)
        yield model


READ = "_local_scalar_dense|data-dependent"


def test_a_captured_pass_reads_nothing_and_stays_on_its_device(elsewhere):
    step = FixedStep(elsewhere, 40)
    with step.open((2,), 40):
        for key in ((0, 2, CHUNK), (2, 4, CHUNK), (0, 4, CHUNK), (2,), (4,)):
            step.replay(WIDTH, *key)
        for key in ((0, 2, PROMPT), (2, 4, PROMPT), (4,)):
            step.replay(PROMPT, *key)
    assert step.out.device.type == step.states.device.type == "meta"


def test_a_draft_step_reads_nothing(elsewhere):
    """Level 0's whole step: the captured passes, its judgement, and what it settles."""
    step, options = FixedStep(elsewhere, 40), Options((2,), (4,), seed=1)
    with step.open((2,), 40) as cache:
        run = Decoder([1, 2, 3], 23, options, step, cache, None)
        cache.lengths = [2, 2]  # the prompt has been read
        run.propose(0, 4)
        assert run.length == 7 and run.stats[0].calls == 4
        with pytest.raises(Exception, match=READ):
            run.propose(1, 1)  # a verification is read, once


def test_a_read_in_a_captured_pass_is_caught(elsewhere, monkeypatch):
    def planted(self, cache, positions, chunks):
        assert positions[0].item() >= 0  # a host read
        real(self, cache, positions, chunks)

    real = ChunkPlan.__init__
    monkeypatch.setattr(ChunkPlan, "__init__", planted)
    step = FixedStep(elsewhere, 40)
    with step.open((2,), 40), pytest.raises(Exception, match=READ):
        step.replay(WIDTH, 0, 2, CHUNK)


def test_a_tensor_on_another_device_is_caught(elsewhere):
    step = FixedStep(elsewhere, 40)
    step.cache.columns = torch.arange(CHUNK)
    with step.open((2,), 40), pytest.raises(Exception, match="(?i)device"):
        step.replay(WIDTH, 0, 2, CHUNK)


@pytest.fixture
def captures(monkeypatch):
    """CUDA's part in a capture is left out: what is captured is only called."""
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())


def test_a_model_that_was_moved_there_and_back_is_refused(captures):
    model = random_model(1, n_layers=4)
    step = FixedStep(model, 20)
    step.pool, step.stream = "pool", MagicMock()
    for moved in (False, True):
        if moved:
            model.float().double()  # as on another device: the same weights elsewhere
        with pytest.raises(ValueError, match="moved") if moved else contextlib.nullcontext():
            with torch.inference_mode(), step.open((2,), 20):
                step.replay(WIDTH, 0, 2, CHUNK)


def test_a_capture_leaves_what_its_work_reads(captures):
    """Before a draft head's pass is captured it runs, over the states that it reads."""
    model = random_model(1)
    model.draft_heads["2"] = DraftHead(model.config).double().eval()
    step = FixedStep(model, 20, compiled=False)
    step.pool, step.stream = "pool", MagicMock()
    with torch.inference_mode(), step.open((0, 2), 20, 2):
        before = step.states.normal_().clone()
        replay = step.capture(partial(step._draft, WIDTH, 2, step.end))
        assert callable(replay) and torch.equal(step.states, before)


@pytest.mark.parametrize("packed_before", [False, True])
def test_what_a_replay_reads_outlives_its_owners(captures, packed_before):
    model = random_model(1, n_layers=4)
    model.exit_heads["2"] = ExitHead(model.config, width=8, vocab=[1, 4, 7]).double().eval()
    if packed_before:
        prepare(model)  # the step then shares the head that has gathered its rows
    step = FixedStep(model, 20, compiled=False)
    step.pool, step.stream = "pool", MagicMock()
    with torch.inference_mode(), step.open((2,), 20):
        for key in ((WIDTH, 0, 2, CHUNK), (WIDTH, 2), (WIDTH, 2, 4, CHUNK), (WIDTH, 4)):
            step.replay(*key)
    rows, rope = step.variant.exit_heads["2"].rows[0].weight, step.variant.rope.table
    read = [step.cache.keys, step.cache.values, *step.cache.hidden.values(), step.cache.columns]
    read += [step.first, step.ids, step.states, step.out, rows, rope, model.head.weight]
    alive = [weakref.ref(tensor) for tensor in read]
    replays = list(step.captured.values())
    model.train()  # drops the gathered rows
    model.rope.table = None
    del step, rows, rope, read, model
    gc.collect()
    assert all(ref() is not None for ref in alive)
    replays[0]()
    del replays
    gc.collect()
    assert not any(ref() is not None for ref in alive)  # and no longer than that


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fused_kernels_can_take_every_call(monkeypatch, kv_heads, dtype):
    """No grouped heads, rows without gaps, heads of 8 elements, and a mask of the queries' dtype
    whose rows begin at multiples of 16 bytes."""
    calls = []

    def seen(q, k, v, attn_mask=None, **options):
        calls.append(1)
        assert options == {} and q.shape[1] == k.shape[1] == v.shape[1] == kv_heads
        assert q.dtype == k.dtype == v.dtype == attn_mask.dtype == dtype
        assert all(t.stride(-1) == 1 and t.shape[-1] % 8 == 0 for t in (q, k, v, attn_mask))
        assert attn_mask.shape == (q.shape[2], k.shape[2]) and attn_mask.shape[1] % CHUNK == 0
        assert attn_mask.stride(0) % 8 == 0 and attn_mask.data_ptr() % 16 == 0
        return real(q, k, v, attn_mask=attn_mask, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    model = random_model(scale=3, n_kv_heads=kv_heads, dim=64, max_seq_len=512).to(dtype)
    step = FixedStep(model, 320)
    generate(model, [1, 2, 3] * 90, 20, exits=(1, 3), windows=(2, 4), fast=step)
    assert calls


def test_attention_is_never_cudnns():
    assert torch.nn.attention.SDPBackend.CUDNN_ATTENTION not in KERNELS
    before, seen = torch.backends.cuda.cudnn_sdp_enabled(), []
    model = random_model()
    watch = lambda event: seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # noqa: E731
    generate(model, [1, 2], 10, exits=(2,), windows=(3,), fast=FixedStep(model, 40), watch=watch)
    assert seen and not any(seen)  # from the prompt on
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# ---- compiled layers ----------------------------------------------------------------------------


def with_compiled_layers(monkeypatch, model: Llama, max_len: int, backend) -> FixedStep:
    """As the step has them on CUDA, with another backend."""
    torch._dynamo.reset()
    monkeypatch.setattr(cuda, "compiled", lambda name: compiled(name, backend))
    step = FixedStep(model, max_len)
    step.variant = replaced(step.variant, {Layer: CompiledLayer})
    return step


@pytest.mark.parametrize("shape", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_compiled_layers_are_a_program_for_each_width_and_write_the_same_text(monkeypatch, shape):
    case = Case(stir(random_model(3, n_layers=6, **shape)), [3, 1, 4], 20, (2, 4), (2, 3), ())
    step = with_compiled_layers(monkeypatch, case.model, 40, counter := CompileCounter())
    assert generate(case.model, case.prompt, 20, **case.arguments, fast=step).tokens == greedy(case)
    # before and after attention, for a prompt and for what follows, whatever the layer or segment
    assert counter.frame_count == 4


def test_inductor_takes_the_parts_of_a_layer(monkeypatch):
    """The compiler that CUDA will use, here with its code for a CPU: the same numbers in float64."""
    model = random_model(3, n_layers=3)
    step = with_compiled_layers(monkeypatch, model, 40, "inductor")
    h = torch.randn(1, WIDTH, 16, dtype=torch.float64)
    with torch.inference_mode():
        states = []
        for m in (model, FixedStep(model, 40).variant, step.variant):
            plan = Cache(model, (), 40, pad=1).plan(0, WIDTH)
            states.append(m.run(h, 0, 3, plan if m is not model else None))
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-9, atol=1e-9)
