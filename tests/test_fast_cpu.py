"""Packed weights on a CPU: the same numbers, held once, and the same bits in passes of any size."""

import copy
import gc
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, cases, greedy, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import fast.cpu
import fast.layers
import fast.training
from fast.cpu import ROWS, Linear, PackedStep, RMSNorm, can_pack, prepare
from fast.layers import CHUNK, Cache
from fast.training import for_training
from hispec import Step, generate
from model import ExitHead, Llama

DTYPES = [torch.float32, torch.bfloat16]
KINDS = st.fixed_dictionaries({"qkv_bias": st.booleans(), "qk_norm": st.booleans()})
packs = pytest.mark.skipif(
    not (can_pack(torch.float32) and can_pack(torch.bfloat16)),
    reason="without oneDNN's packed products nothing is packed, and equal bits are not promised",
)


def stir(model: Llama) -> Llama:
    """Give norms and biases random values: 0 or 1 would hide mistakes."""
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, -2 if name.endswith("bias") else 0.5, 1.5)
    return model


def large_model(dtype: torch.dtype = torch.float32, tied: bool = True, **shape) -> Llama:
    """A model with layers of SmolLM2's shape, so that they are packed; exit 1 has a block and a
    third of the vocabulary.
    """
    sizes = dict(n_layers=4, dim=576, n_heads=9, n_kv_heads=3, ffn_dim=1536, vocab_size=2000)
    model = random_model(2, scale=3, max_seq_len=128, tie_embeddings=tied, **{**sizes, **shape})
    known = list(range(0, model.config.vocab_size, 3))
    model.exit_heads["1"] = head = ExitHead(model.config, model.config.ffn_dim, known)
    for weight in (head.block.attn.out.weight, head.block.mlp.down.weight):
        torch.nn.init.normal_(weight, std=0.05)
    return stir(model).requires_grad_(False).to(dtype).eval()


def packed_ones(model: Llama) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear) and m.packed]


# ---- a weight -----------------------------------------------------------------------------------


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "inputs, outputs", [(64, 32), (64, 8), (576, 960), (1536, 576), (2500, 300)]
)
def test_packing_keeps_every_bit_of_the_weight_and_gives_its_product(inputs, outputs, dtype, bias):
    layer, other = (
        Linear(inputs, outputs, bias=bias, dtype=dtype).eval().requires_grad_(False) for _ in "ab"
    )
    x, before = torch.randn(2, 5, inputs).to(dtype), copy.deepcopy(layer.state_dict())
    exact = F.linear(x.double(), *(t.double() for t in before.values()))
    layer.pack()
    small = dtype == torch.float32 and inputs * outputs < fast.cpu.SMALL
    assert bool(layer.packed) is not small
    assert torch.equal(layer.dense(), before["weight"])
    assert layer.state_dict().keys() == before.keys() == layer.state_dict(keep_vars=True).keys()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    with torch.inference_mode():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for one in (layer, copy.deepcopy(layer), copy.deepcopy(layer).double().to(dtype)):
            torch.testing.assert_close(one(x).double(), exact, rtol=tolerance, atol=tolerance)
    layer.unpack()
    assert not layer.packed and layer.turned is None and torch.equal(layer.weight, before["weight"])
    layer.pack()
    layer.load_state_dict(other.state_dict())
    assert not layer.packed and torch.equal(layer(x), other(x))


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_a_small_weight_is_turned_for_inference_only(rows):
    """Its bits are the same with and without gradients, and a gradient reaches the weight."""
    layer, x = Linear(64, 32, bias=False).eval(), torch.randn(2, rows, 64)
    layer.pack()
    layer.weight.data += 1  # a change of the weight in place is one of its transpose
    outside = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), outside) and torch.equal(copy.deepcopy(layer)(x), outside)
    assert layer.turned is not None and torch.equal(layer.turned, layer.weight.T)
    outside.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert layer.train().turned is None and layer.weight.is_contiguous()


def test_without_onednn_or_in_another_dtype_it_is_the_plain_product(monkeypatch):
    monkeypatch.setattr(fast.cpu, "can_pack", lambda dtype: False)
    for dtype in (*DTYPES, torch.float64, torch.float16):
        layer = Linear(600, 600, bias=False, dtype=dtype).eval().requires_grad_(False)
        x = torch.randn(3, 600).to(dtype)
        weight = layer.weight
        layer.pack()
        assert layer.weight is weight and torch.equal(layer(x), F.linear(x, weight))
        assert not layer.packed and layer.same_bits is (dtype.itemsize == 2)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@torch.no_grad()
def test_the_norm_is_pytorchs(dtype, tolerance):
    ours, theirs = RMSNorm(48, 1e-5).to(dtype), torch.nn.RMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.uniform_(ours.weight, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 48).to(dtype) * torch.logspace(-4, 3, 7)[:, None].to(dtype)
    assert torch.equal(ours(x), theirs(x))  # it is PyTorch's own until it is packed
    ours.pack()
    assert (ours.packed is None) == (dtype == torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance * 1e-2)


# ---- a model ------------------------------------------------------------------------------------

UNDO = {
    "train": lambda m: m.train(),
    "another dtype": lambda m: m.to(torch.float64),
    "the same device": lambda m: m.to("cpu"),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
}


@packs
@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("undo", UNDO)
def test_training_moving_and_loading_undo_it(tmp_path, undo, bias, tied):
    """Weights saved or copied while packed are plain too, and a copy has its own step."""
    model, ids = large_model(tied=tied, qkv_bias=bias), torch.arange(9)[None]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(ids), model(ids, exit=1)
    prepare(model)
    for mine, theirs in zip((model(ids), model(ids, exit=1)), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    checkpoints.save(model, None, tmp_path)
    saved, twin = checkpoints.load(tmp_path, "cpu", plain=True)[0], copy.deepcopy(model)
    assert len(packed_ones(model)) == 5 * 4 + 1  # four layers and a block, and the head
    assert not packed_ones(twin) and twin.fast.model is twin
    UNDO[undo](model)
    assert not model.exit_heads["1"].rows
    assert not any(m.packed for m in model.modules() if isinstance(m, RMSNorm))
    for one in (model, saved, twin):
        after = one.state_dict()
        assert not packed_ones(one) and after.keys() == before.keys()
        assert all(torch.equal(after[name].float(), before[name].float()) for name in before)
        assert (one.head.weight is one.embed.weight) == tied
        torch.testing.assert_close(one(ids).float(), expected[0], rtol=1e-3, atol=1e-3)
    texts = [generate(m, [1, 2, 3], 9, exits=(1, 3), windows=(2, 3)) for m in (twin, saved)]
    assert texts[0].tokens == texts[1].tokens


def held_bytes(model: Llama) -> int:
    """Bytes of the distinct tensors that a model's modules hold, packed ones among them."""
    modules = list(model.modules())
    modules += [rows for m in modules for rows in getattr(m, "rows", ())]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [t for m in modules if isinstance(m, Linear) for t in m.packed]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


@packs
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_held_once(dtype, tied):
    """The exceptions are a head tied to the embedding, whose rows are read too, and an exit's own
    rows.
    """
    model = large_model(dtype, tied)
    before = held_bytes(model)
    prepare(model)
    gc.collect()
    rows = 667 * 576 * dtype.itemsize
    assert held_bytes(model) - before == rows + (2000 * 576 * dtype.itemsize if tied else 0)


def test_other_weights_are_not_mixed_with_packed_ones():
    """Loaded into a packed model, whole or in parts, they decode as in a new one, also when packed
    again.
    """
    model, other, third = (random_model(s, dim=256, ffn_dim=1100).float() for s in (1, 2, 3))
    ids = torch.randint(11, (1, 9))
    prepare(model)
    for new, names in ((other, [""]), (third, ["layers", "norm", "embed", "head"])):
        for name in names:
            model.get_submodule(name).load_state_dict(new.get_submodule(name).state_dict())
        with torch.inference_mode():
            for _ in range(2):
                torch.testing.assert_close(model(ids), new(ids), rtol=1e-3, atol=1e-3)
                prepare(model)


def test_a_model_trains_on_after_it_was_packed():
    """The optimizer still updates the Parameters it was given, including large matrices."""
    model = random_model(dim=256, ffn_dim=1100).float().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids = torch.randint(11, (1, 9))
    prepare(model)
    assert not model.training
    model(ids)
    before = {name: weight.clone() for name, weight in model.train().named_parameters()}
    model(ids).square().mean().backward()
    optimizer.step()
    assert [n for n, weight in model.named_parameters() if torch.equal(weight, before[n])] == []


@packs
@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_are_added_later_are_packed_too(tied):
    """Only then is an untied head's weight freed; a model in training is left in training."""
    model, twin = large_model(tied=tied), large_model(tied=tied)
    del model.exit_heads["1"]
    step, first = prepare(model), model.layers[0]
    model.exit_heads["1"] = copy.deepcopy(twin.exit_heads["1"])
    prepare(twin)
    options = dict(exits=(1, 3), windows=(2, 3), temperature=0.8, seed=1)
    mine, theirs = (generate(m, [1, 2, 3], 20, **options) for m in (model, twin))
    assert mine.tokens == theirs.tokens and mine.levels == theirs.levels
    assert len(packed_ones(model)) == len(packed_ones(twin)) and model.exit_heads["1"].rows
    assert model.fast is step and prepare(model).model.layers[0] is first
    model.train().exit_heads["2"] = ExitHead(model.config, 8, [1, 2, 3])
    generate(model, [1, 2, 3], 20, exits=(2,), windows=(2,))
    assert model.training and not packed_ones(model)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    "first, shape", [(prepare, {}), (for_training, dict(qkv_bias=True, qk_norm=True))]
)
def test_attention_in_blocks_is_attention(monkeypatch, first, shape):
    """Its gradient is the same too, whether or not the model has been packed."""
    model, ids = stir(random_model(3, max_seq_len=300, **shape)), torch.randint(11, (2, 300))
    calls = []
    real, plain = fast.training.attend_in_blocks, copy.deepcopy(model)
    monkeypatch.setattr(
        fast.training, "attend_in_blocks", lambda *qkv: (calls.append(1), real(*qkv))[1]
    )
    first(model)
    for_training(model)
    for m in (model.train(), plain.train()):
        m(ids).logsumexp(-1).mean().backward()
    assert len(calls) == model.config.n_layers
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


# ---- equal bits ---------------------------------------------------------------------------------


@torch.inference_mode()
def bits(step: Step, exits: tuple[int, ...], sizes: list[int], length: int = 70) -> dict:
    """Hidden states, keys, values, and every level's logits, from passes of these sizes in turn."""
    tokens = torch.arange(length + 300) * 37 % step.model.config.vocab_size
    levels = [(k, e) for k, e in enumerate((*exits, step.model.config.n_layers)) if e > 0]
    logits: dict[int, list] = {exit: [] for _, exit in levels}
    with step.open(exits, length) as cache:
        step.run(cache, tokens, 1, len(exits), 1)  # a prompt of one token
        at, turn = 1, 0
        while at < length:
            n = min(sizes[turn % len(sizes)], length - at)
            for k, exit in levels:
                logits[exit].append(step.run(cache, tokens, at + n, k, n))
            at, turn = at + n, turn + 1
    kept = {"keys": cache.keys, "values": cache.values}
    kept |= {f"hidden {exit}": cache.hidden[exit] for exit in exits if exit > 0}
    kept = {name: t[..., :length, :].clone() for name, t in kept.items()}
    return kept | {f"logits {exit}": torch.cat(rows) for exit, rows in logits.items()}


def different(alone: dict, mine: dict) -> list[str]:
    """The names of the tensors whose bits differ."""
    assert all(torch.isfinite(t[t > -torch.inf]).all() for t in mine.values())
    return [name for name in alone if not torch.equal(alone[name], mine[name])]


SMALL = dict(dim=48, n_heads=4, n_kv_heads=2, head_dim=10, ffn_dim=60, vocab_size=300)
SHAPES = {"SmolLM2's shape": {}, "with biases": {"qkv_bias": True}, "with norms": {"qk_norm": True}}
SHAPES |= {f"small {name}": SMALL | SHAPES[name] for name in ("with biases", "with norms")}


@cache
def prepared(name: str, dtype: torch.dtype) -> tuple[PackedStep, tuple[int, ...], Llama]:
    """A step, a ladder, and the model before it was packed."""
    tiny = name == "tiny"
    load = lambda: checkpoints.load("tiny", "cpu", dtype, plain=True)[0]  # noqa: E731
    model = load() if tiny else large_model(dtype, **SHAPES[name])
    plain = copy.deepcopy(model)
    return prepare(model), (2, 8) if tiny else (1, 3), plain


MIXED = [[5, 1, 16, 3, 2, 8], [16, 1, 1, 9, 4], [7, 2, 13, 1]]  # a position in other places
EVERY = [[2, 16, 3, 15, 4], [14, 5, 13, 6], [7, 12, 8, 11, 1], [10, 9, 10, 9]]  # all in few passes


@packs
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "threads, name",
    [(2, "tiny"), (2, "SmolLM2's shape"), *[(1, name) for name in ("tiny", *SHAPES)]],
)
def test_a_position_has_the_same_bits_in_any_pass(request, threads, name, dtype):
    # two threads wait for each other where cores are shared: fewer passes, but all widths
    passes, length = (EVERY, 42) if threads == 2 else ([*([n] for n in range(2, 17)), *MIXED], 70)
    before, (step, exits, plain) = torch.get_num_threads(), prepared(name, dtype)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    alone = bits(step, exits, [1], length)
    found = {str(sizes): different(alone, bits(step, exits, sizes, length)) for sizes in passes}
    assert {sizes: names for sizes, names in found.items() if names} == {}
    ids, n_layers = torch.arange(length) * 37 % plain.config.vocab_size, plain.config.n_layers
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    expected = plain(ids[None])[0, 1:].double()
    mine = alone[f"logits {n_layers}"].double()
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@st.composite
def shapes(draw) -> tuple[Llama, list[int], int]:
    """A random model whose exit 1 has its own head, the sizes of passes, and a text's length."""

    def one(*choices):
        return draw(st.sampled_from(choices))

    kv, group = one((1, 1), (1, 3), (2, 2), (3, 3), (4, 1))
    shape = dict(n_heads=kv * group, n_kv_heads=kv, head_dim=4 * draw(st.integers(1, 20)))
    shape |= dict(dim=one(8, 24, 100, 576), ffn_dim=one(4, 48, 700, 1100, 2500), n_layers=3)
    shape |= dict(vocab_size=one(2, 7, 40, 500, 3000), tie_embeddings=one(True, False))
    shape |= dict(qkv_bias=one(False, True), qk_norm=one(False, True))
    model = random_model(draw(st.integers(0, 99)), scale=3, max_seq_len=128, **shape)
    known = list(range(0, shape["vocab_size"], one(1, 2, 3)))
    model.exit_heads["1"] = head = ExitHead(model.config, one(0, 8, 64), known)
    if head.block is not None:
        torch.nn.init.normal_(head.block.attn.out.weight)
        torch.nn.init.normal_(head.block.mlp.down.weight)
    sizes = draw(st.lists(st.integers(1, 70) | st.integers(1, 8), min_size=1, max_size=5))
    return model.to(one(torch.float64, *DTYPES)).eval(), sizes, draw(st.integers(2, 90))


def check_bits(shape, step_of) -> None:
    model, sizes, length = shape
    step = step_of(model)
    alone, mine = (bits(step, (0, 1), some, length) for some in ([1], sizes))
    assert different(alone, mine) == []


@packs
@settings(max_examples=40)
@given(shapes())
def test_random_shapes_have_the_same_bits_too(shape):
    check_bits(shape, prepare)


@packs
def test_eval_mode_again_and_what_undid_the_packing_keep_equal_bits():
    step, exits, _ = prepared("tiny", torch.float32)
    before = bits(step, exits, [1])
    step.model.eval()
    assert different(before, bits(step, exits, [7])) == []
    plain = PackedStep(copy.deepcopy(step.model).train().eval())  # its passes are padded
    assert different(bits(plain, exits, [1]), bits(plain, exits, [7, 2])) == []
    assert plain.pad == ROWS


# Planted bugs, in products and in attention: each must change bits, if it can on this machine.


def widths_differ(step: Step, exits: tuple[int, ...]) -> bool:
    alone = bits(step, exits, [1])
    return any(different(alone, bits(step, exits, [n])) for n in (2, 3, 5, 8, 16))


@pytest.mark.parametrize("room", [fast.cpu, fast.layers], ids=["products", "attention"])
def test_rows_in_ones_are_caught(monkeypatch, room):
    """For one row, plain float32 products and attention use another kernel than for many."""
    monkeypatch.setattr(room, "ROWS", 1)
    if not widths_differ(*prepared("tiny", torch.float32)[:2]):
        pytest.skip("this machine rounds one row as it rounds many")


def test_a_sum_that_onednn_cuts_is_caught(monkeypatch):
    monkeypatch.setattr(fast.cpu, "LONGEST", 10**6)
    if not any(widths_differ(prepare(large_model(dtype)), (1, 3)) for dtype in DTYPES):
        pytest.skip("this machine's oneDNN does not cut the sums of these shapes")


# ---- passes -------------------------------------------------------------------------------------

SPANS = [(0, 1), (0, 3 * CHUNK - 1), (CHUNK - 1, CHUNK), (CHUNK - 2, CHUNK + 1)]


@pytest.mark.parametrize("pad", [1, 4])
@pytest.mark.parametrize("first, stop", [*SPANS, (CHUNK + 7, CHUNK + 20)])
def test_a_position_sees_all_before_it_among_keys_up_to_its_chunks_end(pad, first, stop):
    plan = Cache(random_model(max_seq_len=4 * CHUNK), (2,), 4 * CHUNK, pad).plan(first, stop)
    at = plan.positions.tolist()
    assert at == list(range(first, first + len(at))) and len(at) == -(-(stop - first) // pad) * pad
    assert sum(plan.sizes) == len(at) and torch.equal(plan.slots, plan.positions)
    zeros = torch.zeros(2, 1, 2, len(at), 4, dtype=torch.float64)
    for n, (keys, values, mask) in zip(plan.sizes, plan.write_chunks(0, *zeros)):
        mine, at = [p for p in at[:n] if p < stop], at[n:]
        end = mask.shape[1]
        assert keys.shape[2] == values.shape[2] == end
        assert all(end - CHUNK <= position < end for position in mine)
        rows = mask[: len(mine) * 2 : 2]  # two query heads share a key head
        assert torch.equal(rows == 0, torch.arange(end) <= torch.tensor(mine)[:, None])


@packs
@pytest.mark.parametrize("dtype, pad", [(torch.float64, 4), (torch.bfloat16, 1)])
def test_texts_that_end_anywhere_about_a_chunks_end(monkeypatch, dtype, pad):
    """The last pass's padding lies past the text's end, where there must be room for it."""
    monkeypatch.setattr(fast.layers, "CHUNK", 16)
    model = random_model(3, vocab_size=40).to(dtype)
    step = prepare(model)
    text = generate(model, [1, 2, 3], 50).tokens
    assert step.pad == pad and len(set(text)) > 5
    for new in range(10, 20):
        for exits, windows in [((), ()), ((2,), (3,)), ((1, 3), (2, 5))]:
            out = generate(model, [1, 2, 3], new, exits=exits, windows=windows)
            assert out.tokens == text[:new]


@pytest.mark.parametrize("widest", [512, 24])
def test_prompts_and_windows_longer_than_a_chunk_or_a_pass(monkeypatch, widest):
    monkeypatch.setattr(fast.layers, "CHUNK", 16)
    monkeypatch.setattr("kvcache.WIDEST", widest)
    model = random_model(max_seq_len=100)
    case = Case(model, torch.randint(11, (40,)).tolist(), 60, (1, 3), (25, 35), ())
    expected = greedy(case)
    prepare(model)
    assert generate(model, case.prompt, 60, **case.arguments).tokens == expected


# ---- whole texts --------------------------------------------------------------------------------


@packs
@settings(max_examples=100)
@given(cases(shapes=KINDS))
def test_packed_texts_are_greedys(case):
    """In float64 they equal the plain step's texts and statistics, in float32 those of greedy
    decoding.
    """
    model, n, options = stir(case.model), case.max_new_tokens, case.arguments
    ways = {}, dict(temperature=0.9, seed=7)
    plain = [generate(model, case.prompt, n, **options, **way) for way in ways]
    assert plain[0].tokens == greedy(case)
    prepare(model)
    for way, expected in zip(ways, plain):
        out = generate(model, case.prompt, n, **options, **way)
        assert out.tokens == expected.tokens and out.levels == expected.levels
    prepare(model.float())
    alone = generate(model, case.prompt, n, stop=case.stop)
    assert generate(model, case.prompt, n, **options).tokens == alone.tokens
