"""Operators for a CPU: another layout holds the same numbers, and what it replaces is let go."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

import operators
from model import ExitHead, Llama
from operators import Linear, RMSNorm, can_pack

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 32), (64, 8), (576, 960), (1536, 576), (2500, 300)]
packs = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no oneDNN, or none in bfloat16")


def linear(inputs: int, outputs: int, dtype: torch.dtype) -> Linear:
    layer = Linear(inputs, outputs).to(dtype).eval()
    return layer.requires_grad_(False)


@packs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, outputs", SHAPES)
def test_packing_keeps_every_bit_of_the_weight(inputs, outputs, dtype):
    layer = linear(inputs, outputs, dtype)
    weight = layer.weight.clone()
    layer.pack()
    small = dtype == torch.float32 and inputs * outputs < operators.SMALL
    assert bool(layer.packed) is not small
    assert torch.equal(layer.dense(), weight)
    assert torch.equal(layer.state_dict()["weight"], weight)
    layer.unpack()
    assert layer.packed == [] and torch.equal(layer.weight, weight)


@packs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, outputs", SHAPES)
def test_a_packed_product_is_the_product(inputs, outputs, dtype):
    layer, x = linear(inputs, outputs, dtype), torch.randn(2, 5, inputs).to(dtype)
    exact = x.double() @ layer.weight.double().T
    layer.pack()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x).double(), exact, rtol=tolerance, atol=tolerance)


@packs
@pytest.mark.parametrize(
    "undo",
    [lambda m: m.train(), lambda m: m.to(torch.float64), lambda m: m.to("cpu")],
    ids=["train", "another dtype", "the same device"],
)
def test_training_and_moving_undo_it(undo):
    model = big_model(torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    packed_ones = [m for m in model.pack().modules() if isinstance(m, Linear) and m.packed]
    assert packed_ones
    undo(model)
    assert model.pad == 1
    assert not any(m.packed for m in model.modules() if isinstance(m, Linear))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].float(), before[name]) for name in before)
    assert model.head.weight is model.embed.weight  # still tied


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_a_small_weight_is_turned_for_inference_only(rows):
    """The same bits with gradients and without, and a gradient still reaches the weight."""
    layer, x = Linear(64, 32).eval(), torch.randn(2, rows, 64)
    layer.pack()
    layer.weight.data += 1  # a change of the weight in place is one of its transpose
    outside = layer(x)
    with torch.inference_mode():
        inside = layer(x)
        copied = copy.deepcopy(layer)(x)
        moved = copy.deepcopy(layer).float()(x)
    assert layer.turned is not None and torch.equal(layer.turned, layer.weight.T)
    assert torch.equal(inside, outside) and torch.equal(copied, outside)
    torch.testing.assert_close(moved, outside)
    outside.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    layer.train()
    assert layer.turned is None and layer.weight.is_contiguous()


def test_without_onednn_it_is_the_plain_product(monkeypatch):
    monkeypatch.setattr(operators, "can_pack", lambda dtype: False)
    for dtype, alike in ((torch.float32, False), (torch.bfloat16, True)):
        layer, x = linear(576, 960, dtype), torch.randn(3, 576).to(dtype)
        plain = F.linear(x, layer.weight)
        assert layer.pack() is alike
        assert layer.packed == [] and torch.equal(layer(x), plain)


def test_a_dtype_or_device_that_has_no_layout_is_left_alone():
    for layer in (Linear(600, 600).double(), Linear(600, 600).half(), Linear(600, 600).to("meta")):
        weight = layer.weight
        layer.pack()
        assert layer.packed == [] and layer.weight is weight


def big_model(dtype: torch.dtype, tied: bool = True) -> Llama:
    """Large enough to be packed; an exit of its own reads a third of the vocabulary."""
    shape = dict(dim=576, n_heads=9, n_kv_heads=3, ffn_dim=1536, n_layers=2, vocab_size=2000)
    model = random_model(1, tie_embeddings=tied, **shape)
    model.exit_heads["1"] = ExitHead(model.config, vocab=list(range(0, 2000, 3)))
    return model.requires_grad_(False).to(dtype).eval()


def held_bytes(model: Llama) -> int:
    """Bytes of the distinct tensors that a model's modules hold, packed ones among them."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += module.packed if isinstance(module, Linear) else []
    for head in model.exit_heads.values():
        rows = head._rows[0]
        tensors += [*rows.parameters(), *rows.packed]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


@packs
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_held_once(dtype, tied):
    """But for the head that is tied to the embedding, which is read by rows and by products."""
    model = big_model(dtype, tied)
    for head in model.exit_heads.values():
        head.gather(model.head)
    before = held_bytes(model)
    model.pack()
    gc.collect()
    twice = model.head.nbytes if tied else 0
    assert held_bytes(model) - before == twice


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
)
def test_the_norm_is_pytorchs(dtype, tolerance):
    ours, theirs = RMSNorm(48, 1e-5).to(dtype), torch.nn.RMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.uniform_(ours.weight, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 48).to(dtype) * torch.logspace(-4, 3, 7)[:, None].to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance * 1e-2)
    assert torch.equal(ours(x), theirs(x))  # with gradients it is PyTorch's own


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_can_be_copied(tied):
    """oneDNN's layout cannot: the copy has plain weights, and the original keeps its own."""
    model = random_model(vocab_size=2**15, tie_embeddings=tied).float().pack()
    assert model.head.packed or not can_pack(torch.float32)
    twin = copy.deepcopy(model)
    assert not twin.head.packed and len(model.head.packed) == can_pack(torch.float32)
    assert (twin.head.weight is twin.embed.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[name])
    assert twin.bfloat16().head.weight.dtype == torch.bfloat16


def test_other_weights_are_not_mixed_with_packed_ones():
    """Loaded into a packed model they decode as in a fresh one; packed anew, too."""
    model, other = (random_model(seed, dim=64, ffn_dim=96).float() for seed in (1, 2))
    ids = torch.randint(11, (1, 9))
    before = model.pack()(ids)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(model(ids), other(ids), atol=1e-2)
            assert not torch.allclose(model(ids), before, atol=1.0)
            model.pack()


def test_packing_ends_training():
    """An exit's own rows are gathered from the head before its plain weight is let go."""
    model = random_model(dim=1024, vocab_size=400, tie_embeddings=False).float()
    model.exit_heads["1"] = ExitHead(model.config, vocab=list(range(0, 400, 2)))
    ids = torch.randint(400, (1, 5))
    expected = model(ids, exit=1)
    assert not model.train().pack().training
    assert torch.allclose(model(ids, exit=1), expected, atol=1e-3)


def test_a_model_trains_on_after_it_was_packed():
    """The optimizer goes on with the Parameters it was given, large matrices too."""
    model = random_model(dim=256, ffn_dim=1100).float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids = torch.randint(11, (1, 9))
    model.pack()(ids)
    before = {name: weight.clone() for name, weight in model.train().named_parameters()}
    model(ids).square().mean().backward()
    optimizer.step()
    assert [n for n, weight in model.named_parameters() if torch.equal(weight, before[n])] == []


def test_a_part_of_a_packed_model_can_be_loaded():
    model, other = (random_model(seed, dim=256, ffn_dim=1100).float() for seed in (1, 2))
    ids = torch.randint(11, (1, 9))
    model.pack()
    for mine, theirs in ((model.layers, other.layers), (model.norm, other.norm)):
        mine.load_state_dict(theirs.state_dict())
    model.embed.load_state_dict(other.embed.state_dict())
    model.head.load_state_dict(other.head.state_dict())
    torch.testing.assert_close(model(ids), other(ids), rtol=1e-4, atol=1e-4)
