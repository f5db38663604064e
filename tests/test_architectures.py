"""Llama, Mistral, Qwen2 and Qwen3: transformers' logits and texts, what is refused, ladders, packing, heads."""

import copy
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from conftest import cases, greedy, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import F32, write_gguf

import checkpoints
from checkpoints import save, vocabulary
from checkpoints.families import FAMILIES
from fast.cpu import Linear, RMSNorm, can_pack, prepare
from fast.cuda import FixedStep
from fast.training import for_training
from hispec import generate

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
load = partial(checkpoints.load, device="cpu")
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}
SCALED = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
SCALED["original_max_position_embeddings"] = 16


def random_hugging_face(family, seed):
    """A small model of the family, of a random shape, odd sizes among them."""
    draw = random.Random(f"{family} {seed}")
    groups, shared = draw.randint(1, 3), draw.choice([1, 1, 2, 3])
    heads, head_dim = groups * shared, 2 * draw.randint(2, 8)
    dim = draw.randint(16, 48)
    if family == "llama" or draw.random() < 0.3:  # transformers allows a Llama nothing else
        dim = max(1, dim // heads) * heads
    rope = draw.choice([{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}])
    shape = dict(
        vocab_size=draw.randint(64, 300),
        hidden_size=dim,
        intermediate_size=draw.randint(9, 65),
        num_hidden_layers=draw.randint(1, 3),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=draw.choice([64, 100]),
        rms_norm_eps=draw.choice([1e-6, 1e-5, 1e-3]),
        tie_word_embeddings=draw.random() < 0.5,
        rope_parameters=rope | {"rope_theta": draw.choice([500.0, 10_000.0, 1e6])},
        bos_token_id=None,
        eos_token_id=None,
    )
    if family == "mistral":
        shape["sliding_window"] = None
    torch.manual_seed(seed)
    theirs = CLASSES[family](CLASSES[family].config_class(**shape)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # what is 0 or 1 at first would hide mistakes
            if p.dim() > 1:
                p.mul_(8)
            else:
                p.uniform_(-1, 1) if name.endswith("bias") else p.uniform_(0.5, 1.5)
    return theirs


def as_gguf(path, theirs):
    """The model as llama.cpp's converter would write it."""
    c = theirs.config
    arch = FAMILIES[c.model_type].gguf
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    tensors = {}
    for name, t in theirs.state_dict().items():
        heads = {"q_proj.weight": c.num_attention_heads, "k_proj.weight": c.num_key_value_heads}
        n = heads.get(".".join(name.split(".")[-2:]))
        if arch == "llama" and n:
            t = t.view(n, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        if name != "lm_head.weight" or not c.tie_word_embeddings:
            tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = t
    ours = dict(n_layers=c.num_hidden_layers, max_seq_len=c.max_position_embeddings)
    ours |= dict(dim=c.hidden_size, ffn_dim=c.intermediate_size, norm_eps=c.rms_norm_eps)
    ours |= dict(n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads)
    ours |= dict(head_dim=c.head_dim, rope_theta=c.rope_parameters["rope_theta"])
    keys = {}
    if c.rope_parameters["rope_type"] == "linear":
        keys[f"{arch}.rope.scaling.type"] = "linear"
        keys[f"{arch}.rope.scaling.factor"] = c.rope_parameters["factor"]
    model = SimpleNamespace(config=SimpleNamespace(**ours))
    return write_gguf(path, model, F32, arch, keys=keys.items(), tensors=tensors)


def logits_of(theirs, ids):
    with torch.no_grad():
        return theirs(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_forty_random_models_give_transformers_logits_and_texts(tmp_path, family):
    for seed in range(40):
        theirs = random_hugging_face(family, seed)
        ids = torch.randint(theirs.config.vocab_size, (1, 20))
        expected = logits_of(theirs, ids)
        text = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, 20:].tolist()
        folder = tmp_path / str(seed)
        theirs.save_pretrained(folder)
        for path in (folder, as_gguf(tmp_path / f"{seed}.gguf", theirs)):
            for plain in (True, False):
                ours, _ = load(path, plain=plain)
                torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)
                assert generate(ours, ids[0].tolist(), 12).tokens == text
        assert (ours.head.weight is ours.embed.weight) == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_save_writes_the_familys_own_config(tmp_path, family):
    for seed in range(10):
        theirs = random_hugging_face(family, seed)
        ids = torch.randint(theirs.config.vocab_size, (1, 20))
        theirs.save_pretrained(tmp_path / "theirs")
        ours, _ = load(tmp_path / "theirs")
        for model in (ours, copy.deepcopy(ours), ours.bfloat16().float()):
            save(model, None, tmp_path / "ours")
            read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
            assert type(read) is CLASSES[family]
            again, _ = load(tmp_path / "ours", plain=True)
            assert again.config == ours.config and again.family == family
            for name, t in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], t)
            torch.testing.assert_close(
                again(ids), logits_of(read.float(), ids), rtol=1e-4, atol=1e-4
            )


def test_a_gguf_file_is_saved_as_the_family_that_holds_it(tmp_path):
    for family, saved in [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]:
        theirs = random_hugging_face(family, 4)
        model, _ = load(as_gguf(tmp_path / "m.gguf", theirs))
        save(model, None, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == saved
    with pytest.raises(ValueError, match="no family .* both qkv_bias and qk_norm"):
        save(random_model(qkv_bias=True, qk_norm=True), None, tmp_path / "both")


def test_llama_3s_scaling_in_every_family(tmp_path):
    for family, cls in CLASSES.items():
        config = random_hugging_face(family, 1).config
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4, **SCALED}
        theirs, ids = cls(config).eval(), torch.arange(20)[None]
        theirs.save_pretrained(tmp_path / family)
        ours, _ = load(tmp_path / family)
        torch.testing.assert_close(ours(ids), logits_of(theirs, ids), rtol=1e-4, atol=1e-4)


# ---- refusals ------------------------------------------------------------------------------------

FOLDERS_REFUSED = [
    ("mistral", dict(sliding_window=32), "sliding_window 32 is not supported, only None"),
    ("mistral", dict(sliding_window=...), "sliding_window 4096"),  # what leaving it out means
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window True"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window True"),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"]), "'sliding_attention'"),
    ("qwen3", dict(attention_bias=True), "attention_bias True"),
    ("llama", dict(attention_bias=True), "attention_bias True"),
    ("qwen2", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    ("mistral", dict(is_causal=False), "is_causal False"),
    ("qwen2", dict(architectures=["Qwen2ForSequenceClassification"]), "Qwen2ForSequenceClass"),
    ("qwen3", dict(architectures=["Qwen3MoeForCausalLM"]), "architectures .*Qwen3Moe"),
    ("qwen3", dict(model_type="qwen3_moe"), "model_type 'qwen3_moe' is not supported"),
    ("mistral", dict(model_type="mixtral"), "model_type 'mixtral' is not supported"),
    ("qwen2", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "RoPE scaling 'yarn'"),
    ("qwen2", dict(rope_parameters={"mrope_section": [1]}), "RoPE setting 'mrope_section'"),
    ("qwen3", dict(rope_parameters={"full_attention": {}}), "RoPE setting 'full_attention'"),
    ("qwen3", dict(head_dim=...), r"q_proj.weight has shape .* needs \(\d{3}, "),  # 128, then
    ("llama", dict(model_type="qwen2", architectures=None), "q_proj.bias is missing"),
    ("llama", dict(model_type="qwen3", architectures=None), "q_norm.weight is missing"),
    ("qwen2", dict(model_type="mistral", architectures=None, sliding_window=None), "unexpected"),
    ("qwen3", dict(model_type="qwen2", architectures=None), "q_proj.bias is missing"),
]


@pytest.mark.parametrize("family, changes, message", FOLDERS_REFUSED)
def test_what_a_folder_asks_for_in_vain_is_named(tmp_path, family, changes, message):
    random_hugging_face(family, 0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*{message}") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "arch, keys, message",
    [
        ("qwen2", {"qwen2.attention.sliding_window": 32}, "sliding_window 32 is not supported"),
        ("llama", {"llama.attention.sliding_window": 32}, "sliding_window 32 is not supported"),
        ("qwen3", {"qwen3.expert_count": 8}, "qwen3.expert_count 8"),
        ("qwen3", {"qwen3.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
        ("qwen2", {"qwen2.rope.scaling.attn_factor": 2.0}, "qwen2.rope.scaling.attn_factor is not"),
        ("qwen2", {"qwen2.rope.dimension_count": 2}, "qwen2.rope.dimension_count 2"),
        ("qwen3", {"qwen3.attention.causal": False}, "qwen3.attention.causal False"),
        ("qwen3", {"qwen3.attention.scale": 0.5}, "qwen3.attention.scale is not supported"),
        ("qwen3", {"qwen3.pooling_type": 1}, "qwen3.pooling_type is not supported"),
        ("qwen3moe", {}, "architecture 'qwen3moe' is not supported"),
        ("gemma3", {}, "architecture 'gemma3' is not supported"),
        ("qwen2", {}, "blk.0.attn_q.bias is missing"),
        ("qwen3", {}, "blk.0.attn_q_norm.weight is missing"),
    ],
)
def test_what_a_gguf_file_asks_for_in_vain_is_named(tmp_path, arch, keys, message):
    path = write_gguf(tmp_path / "m.gguf", random_model().float(), arch=arch, keys=keys.items())
    with pytest.raises(ValueError, match=f"^{path}: .*{message}") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


def test_weights_that_a_model_does_not_use_are_refused(tmp_path):
    theirs = random_hugging_face("qwen2", 1)
    theirs.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(1))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected tensor model.layers.0.self_attn.o_proj.bias"):
        load(tmp_path)


# ---- ladders -------------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries({"qkv_bias": st.booleans(), "qk_norm": st.booleans()})


def stir(model):
    """Norms and biases of their own: what is 0 or 1 would hide mistakes."""
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, -2 if name.endswith("bias") else 0.5, 1.5)
    return model


@settings(max_examples=300)
@given(cases(shapes=SHAPES), st.sampled_from(["plain", "packed", "fixed"]))
def test_ladders_write_the_greedy_text(case, step):
    stir(case.model)
    expected = greedy(case)
    if step == "packed":
        prepare(case.model)
    fast = FixedStep(case.model, 64) if step == "fixed" else None
    out = generate(case.model, case.prompt, case.max_new_tokens, **case.arguments, fast=fast)
    assert out.tokens == expected


# ---- fast/ ---------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16]
packs = pytest.mark.skipif(
    not (can_pack(torch.float32) and can_pack(torch.bfloat16)),
    reason="without oneDNN's packed products nothing is packed, and equal bits are not promised",
)


@packs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, outputs", [(64, 32), (64, 8), (576, 960), (2500, 300)])
def test_a_packed_product_adds_its_bias(inputs, outputs, dtype):
    layer = Linear(inputs, outputs, dtype=dtype).eval().requires_grad_(False)
    x, before = (
        torch.randn(2, 5, inputs).to(dtype),
        {n: t.clone() for n, t in layer.state_dict().items()},
    )
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    layer.pack()
    assert bool(layer.packed) or layer.turned is not None or outputs == 8
    with torch.inference_mode():
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        for one in (layer, copy.deepcopy(layer), copy.deepcopy(layer).double().to(dtype)):
            torch.testing.assert_close(one(x).double(), exact, rtol=tolerance, atol=tolerance)
    assert layer.state_dict().keys() == before.keys() == layer.state_dict(keep_vars=True).keys()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    other = Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    layer.load_state_dict(other.state_dict())
    assert not layer.packed and torch.equal(layer(x), other(x))


def stirred(dtype, large, **shape):
    """Large: products of oneDNN's; small: turned ones."""
    sizes = dict(n_layers=4, dim=576, n_heads=9, n_kv_heads=3, ffn_dim=700, vocab_size=2000)
    sizes = sizes if large else dict(n_layers=4, dim=48, head_dim=10, vocab_size=300, ffn_dim=60)
    model = random_model(2, scale=3, max_seq_len=128, **sizes, **shape)
    return stir(model).requires_grad_(False).to(dtype).eval()


@torch.inference_mode()
def bits(step, exits, ids, sizes):
    """Keys, values, hidden states and the levels' logits, of passes with `sizes` in turn."""
    tokens, logits = torch.tensor([*ids, *[0] * 100]), {k: [] for k in range(len(exits) + 1)}
    with step.open(exits, len(ids)) as cache:
        at = turn = 0
        while at < len(ids):
            n = min(sizes[turn % len(sizes)], len(ids) - at) if at else 1
            for k, rows in logits.items():
                rows.append(step.run(cache, tokens, at + n, k, n))
            at, turn = at + n, turn + 1
        kept = [cache.keys, cache.values, *cache.hidden.values()]
    return [t[..., : len(ids), :].clone() for t in kept] + [torch.cat(r) for r in logits.values()]


@packs
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{"qkv_bias": True}, {"qk_norm": True}], ids=lambda s: min(s))
def test_a_position_has_the_same_bits_in_any_pass(shape, dtype, large):
    model = stirred(dtype, large, **shape)
    ids = [i * 37 % model.config.vocab_size for i in range(70)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).double()
    step = prepare(model)
    if shape.get("qk_norm"):
        assert all(isinstance(layer.attn.k_norm, RMSNorm) for layer in model.layers)
    alone = bits(step, (1, 3), ids, [1])
    for sizes in [*([n] for n in range(2, 17)), [5, 1, 16, 3, 2, 8], [7, 2, 13, 1]]:
        assert all(map(torch.equal, alone, bits(step, (1, 3), ids, sizes))), sizes
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(alone[-1].double(), expected[0], rtol=tolerance, atol=tolerance)


@packs
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("undo", ["train", "double", "load"])
def test_packing_is_undone(tmp_path, undo, tied):
    model = stirred(torch.float32, True, qkv_bias=True, tie_embeddings=tied)
    before, ids = copy.deepcopy(model), torch.arange(9)[None]
    prepare(model)
    save(model, None, tmp_path)
    twin = copy.deepcopy(model)
    if undo == "load":
        model.load_state_dict(before.state_dict())
    else:
        model = model.train() if undo == "train" else model.double()
    for one in (model, twin, load(tmp_path, plain=True)[0]):
        assert not any(m.packed for m in one.modules() if isinstance(m, Linear))
        assert one.state_dict().keys() == before.state_dict().keys()
        for name, t in before.state_dict().items():
            assert torch.equal(one.state_dict()[name].float(), t), name
        torch.testing.assert_close(one(ids).float(), before(ids), rtol=1e-3, atol=1e-3)


def test_training_attends_as_the_plain_model_does():
    model = stir(random_model(3, max_seq_len=300, qkv_bias=True, qk_norm=True)).train()
    ids, blocks = torch.randint(11, (2, 300)), copy.deepcopy(model)
    for_training(blocks)
    for m in (model, blocks):
        m(ids).logsumexp(-1).mean().backward()
    for mine, theirs in zip(blocks.parameters(), model.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("shape", [{"qkv_bias": True}, {"qk_norm": True}], ids=lambda s: min(s))
def test_what_is_captured_is_compiled_whole(shape):
    """fullgraph: nothing of it may need Python in between."""
    from fast.cuda import compiled
    from fast.layers import Layer

    model = stir(random_model(**shape))
    layer = FixedStep(model, 64).variant.layers[0]
    assert isinstance(layer, Layer)
    h = torch.randn(1, 16, 16, dtype=torch.float64)
    angles = torch.rand(16, 1, 4, dtype=torch.float64)
    with torch.inference_mode():
        for mine, theirs in zip(
            compiled("before", "eager")(layer, h, (angles, angles)),
            layer.before(h, (angles, angles)),
        ):
            torch.testing.assert_close(mine, theirs)


# ---- heads ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A random Qwen3, and what recipe 2 makes of it in ten steps."""
    import train_exits

    folder = tmp_path_factory.mktemp("qwen3")
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(2000))
    (folder / "corpus.txt").write_text(text)
    model = stir(random_model(vocab_size=300, scale=3, max_seq_len=256, qk_norm=True)).float()
    save(model, vocabulary.learn([text], 300), folder / "given")
    options = f"--out {folder} --model {folder / 'given'} --corpus {folder / 'corpus.txt'}"
    options += " --freeze-trunk --exits 1 2 --steps 10 --batch 256 --context 16 --width 8"
    train_exits.main([*options.split(), "--draft-vocab", "80"])
    return model, folder / "model"


def test_a_qwen3_gets_heads_at_two_exits(trained):
    given, folder = trained
    model, tokenizer = load(folder)
    assert model.family == "qwen3" and model.config == given.config and model.exits == (1, 2)
    for name, t in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    for head in model.exit_heads.values():
        assert 0 < len(head.vocab) <= 80 and isinstance(head.block.attn.q_norm, torch.nn.RMSNorm)
    prompt = tokenizer.encode("def f7(x):")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(read) is CLASSES["qwen3"]
    text = read.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    expected = text[0, len(prompt) :].tolist()
    for ladder in [{}, dict(exits=(1,), windows=(3,)), dict(exits=(1, 2), windows=(2, 4))]:
        assert generate(model, prompt, 20, **ladder).tokens == expected


def test_a_qwen3_with_heads_is_benched(trained, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"category": "code", "turns": ["def f7(x):"]}\n')
    command = [sys.executable, "bench.py", "--model", trained[1], "--device", "cpu", "--dtype"]
    command += ["float32", "--prompts", prompts, "--max-new-tokens", "12"]
    command += ["--json", tmp_path / "out.json"]
    # what is found out about threads and ladders is kept there
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    methods = json.loads((tmp_path / "out.json").read_text())["methods"]
    assert [1, 2] in [method["exits"] for method in methods]
    assert all(method["identical"] for method in methods)
