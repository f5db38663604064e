"""The fused kernel in Triton's interpreter: it writes what the plain step writes, without a GPU.

The interpreter takes a tenth of a second for a layer, so models and texts are small. It multiplies
bfloat16 numbers as if they were integers, so float16 stands for both.
"""

import copy
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import Case, greedy, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_cpu import bits, different, stir
from test_rounds import both as by_rounds

import checkpoints
from fast import rounds
from fast.cuda import FixedStep
from fast.layers import WIDTH
from hispec import generate

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

if torch.cuda.is_available():
    pytest.skip("with a GPU the captured step's tests run the kernel", allow_module_level=True)

import triton
import triton.language as tl

from fast import kernels

Fused = partial(FixedStep, fused=True)


@st.composite
def short_cases(draw) -> Case:
    """As conftest.cases, of models that fit the kernel, with few layers and tokens."""
    layers = draw(st.integers(1, 3))
    exits = sorted(draw(st.permutations(range(layers)))[: draw(st.integers(0, layers))])
    sizes = dict(n_layers=layers, n_heads=2, n_kv_heads=draw(st.sampled_from([1, 2])))
    ffn, tied = draw(st.sampled_from([16, 48, 64])), draw(st.booleans())
    fits = dict(dim=32, head_dim=32, ffn_dim=ffn, tie_embeddings=tied)
    return Case(
        model=stir(random_model(draw(st.integers(0, 10**6)), **sizes, **fits)),
        prompt=draw(st.lists(st.integers(0, 10), min_size=1, max_size=9)),
        max_new_tokens=draw(st.integers(1, 5)),
        exits=tuple(exits),
        windows=tuple(draw(st.integers(1, 3)) for _ in exits),
        stop=(),
    )


def model_that_fits(dtype=torch.float64, **shape):
    sizes = dict(dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96, n_layers=3)
    return stir(random_model(3, max_seq_len=128, **sizes, **shape)).requires_grad_(False).to(dtype)


def differs(case: Case) -> bool:
    """Whether the fused step writes another text than plain greedy decoding."""
    step = Fused(case.model, len(case.prompt) + case.max_new_tokens)
    rest = dict(**case.arguments, fast=step)
    out = generate(case.model, case.prompt, case.max_new_tokens, **rest)
    return out.tokens != greedy(case)


@settings(max_examples=12)
@given(short_cases())
def test_fused_texts_are_greedys(case):
    assert not differs(case)


@settings(max_examples=8)
@given(short_cases())
def test_fused_rounds_are_the_loops(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_rounds.RoundStep", partial(rounds.RoundStep, fused=True))
        made, expected = by_rounds(case)
    assert made.tokens == expected.tokens == greedy(case) and made.levels == expected.levels


def test_a_text_longer_than_a_chunk_of_keys():
    model = model_that_fits()
    assert not differs(Case(model, [1, 2, 3] * 20, 10, (1,), (3,), ()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_position_has_the_same_bits_in_any_pass(dtype):
    step = Fused(model_that_fits(dtype), 100)
    alone = bits(step, (1,), [1], 24)
    for sizes in ([3, 1], [7, 16]):
        assert different(alone, bits(step, (1,), sizes, 24)) == [], sizes


def test_weights_are_read_where_they_are_now():
    model = model_that_fits()
    step, case = Fused(model, 40), Case(model, [1, 2], 6, (), (), ())
    text = generate(model, [1, 2], 6, fast=step).tokens
    stir(model)  # in place
    changed = generate(model, [1, 2], 6, fast=step).tokens
    assert changed == greedy(case) != text
    for layer in model.layers:
        layer.attn.out.weight.data = layer.attn.out.weight.data * -1  # elsewhere
    assert generate(model, [1, 2], 6, fast=step).tokens == greedy(case) != changed


@triton.jit
def _turned_the_other_way(x, qkv, row, cos, sin, dtype, D, E):
    a = kernels._product(x, qkv, row, 0, E // 2, D, D)
    b = kernels._product(x, qkv, row + E // 2, 0, E // 2, D, D)
    return (a * cos + b * sin).to(dtype), (b * cos - a * sin).to(dtype)


@triton.jit
def _without_its_weight(h, weight, eps, dtype, D):
    return (h / tl.sqrt(tl.sum(h * h, 1) / D + eps)[:, None]).to(dtype)


@pytest.mark.parametrize(
    "part, planted", [("_rotated", _turned_the_other_way), ("_norm", _without_its_weight)]
)
def test_a_planted_bug_changes_the_text(monkeypatch, part, planted):
    case = Case(model_that_fits(), [1, 2, 3], 8, (1,), (3,), ())
    assert not differs(case)
    monkeypatch.setattr(kernels, part, planted)
    assert differs(case)


@pytest.mark.parametrize(
    "shape, why",
    [
        (dict(dim=48), "powers of two from 32"),
        (dict(head_dim=16), "powers of two from 32"),
        (dict(dim=512), "powers of two from 32 to 256"),
        (dict(ffn_dim=40), "ffn_dim"),
        (dict(qkv_bias=True), "biases"),
        (dict(qk_norm=True), "norms"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(shape, why):
    with pytest.raises(ValueError, match=why):
        Fused(random_model(0, **{**dict(dim=64, head_dim=32, ffn_dim=96), **shape}), 40)


def test_tiny_fits():
    kernels.check_fits(checkpoints.load("tiny", "cpu", plain=True)[0])


def test_one_launch_runs_a_whole_segment(monkeypatch):
    launches = []

    class Counted:
        def __getitem__(self, grid):
            return lambda *args, **options: (
                launches.append(args[7:9]) or real[grid](*args, **options)
            )

    real = kernels._layers
    monkeypatch.setattr(kernels, "_layers", Counted())
    model = copy.deepcopy(model_that_fits())
    step = Fused(model, 64)
    with torch.inference_mode(), step.open((2,), 64) as cache:
        tokens = torch.randint(11, (60,))
        step.run(cache, tokens, 5, 1, 1)  # the prompt: wide passes
        assert launches == []
        step.run(cache, tokens, 5 + WIDTH, 1, 1)
    assert launches == [(0, 2), (2, 3)]
