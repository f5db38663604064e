"""Llama, Mistral, Qwen2 and Qwen3: logits and texts equal transformers', refusals, heads."""

import copy
import json
import random
from functools import partial
from types import SimpleNamespace

import gguf
import pytest
import torch
from conftest import random_model
from test_fast_cpu import stir
from test_gguf import F32, write_gguf

import checkpoints
import train_exits
from checkpoints import save, vocabulary
from checkpoints.families import FAMILIES
from hispec import generate

transformers = pytest.importorskip("transformers")
load = partial(checkpoints.load, device="cpu")
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}


def random_hugging_face(family, seed):
    """A small model of the family with a random shape, sometimes of odd sizes."""
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
        for name, p in theirs.named_parameters():  # initial 0s and 1s would hide mistakes
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


# ---- refusals ------------------------------------------------------------------------------------

FOLDERS_REFUSED = [
    ("mistral", dict(sliding_window=32), "sliding_window 32 is not supported, only None"),
    ("mistral", dict(sliding_window=...), "sliding_window 4096"),  # what leaving it out means
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window True"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window True"),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"]), "'sliding_attention'"),
    ("qwen3", dict(attention_bias=True), "attention_bias True"),
    ("mistral", dict(is_causal=False), "is_causal False"),
    ("qwen3", dict(architectures=["Qwen3MoeForCausalLM"]), "architectures .*Qwen3Moe"),
    ("qwen3", dict(model_type="qwen3_moe"), "model_type 'qwen3_moe' is not supported"),
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


GGUF_REFUSED = [
    ("qwen2", {"attention.sliding_window": 32}, "sliding_window 32 is not supported"),
    ("llama", {"attention.sliding_window": 32}, "sliding_window 32 is not supported"),
    ("qwen3", {"expert_count": 8}, "qwen3.expert_count 8"),
    ("qwen3", {"rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
    ("qwen2", {"rope.scaling.attn_factor": 2.0}, "qwen2.rope.scaling.attn_factor is not"),
    ("qwen2", {"rope.dimension_count": 2}, "qwen2.rope.dimension_count 2"),
    ("qwen3", {"attention.causal": False}, "qwen3.attention.causal False"),
    ("qwen3", {"attention.scale": 0.5}, "qwen3.attention.scale is not supported"),
    ("qwen3", {"pooling_type": 1}, "qwen3.pooling_type is not supported"),
    ("qwen3moe", {}, "architecture 'qwen3moe' is not supported"),
    ("qwen2", {}, "blk.0.attn_q.bias is missing"),
    ("qwen3", {}, "blk.0.attn_q_norm.weight is missing"),
]


@pytest.mark.parametrize("arch, keys, message", GGUF_REFUSED)
def test_what_a_gguf_file_asks_for_in_vain_is_named(tmp_path, arch, keys, message):
    keys = [(f"{arch}.{key}", value) for key, value in keys.items()]
    path = write_gguf(tmp_path / "m.gguf", random_model().float(), arch=arch, keys=keys)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


# ---- heads ---------------------------------------------------------------------------------------


def test_a_qwen3_gets_heads_at_two_exits(tmp_path):
    """Ten steps of recipe 2 leave the trunk's bits unchanged, and every ladder writes its text."""
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(2000))
    (tmp_path / "corpus.txt").write_text(text)
    given = stir(random_model(vocab_size=300, scale=3, max_seq_len=256, qk_norm=True)).float()
    save(given, vocabulary.learn([text], 300), tmp_path / "given")
    options = f"--out {tmp_path} --model {tmp_path / 'given'} --corpus {tmp_path / 'corpus.txt'}"
    options += " --freeze-trunk --exits 1 2 --steps 10 --batch 256 --context 16 --width 8"
    train_exits.main([*options.split(), "--draft-vocab", "80"])
    model, tokenizer = load(tmp_path / "model")
    assert model.family == "qwen3" and model.config == given.config and model.exits == (1, 2)
    for name, t in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    for head in model.exit_heads.values():
        assert 0 < len(head.vocab) <= 80 and isinstance(head.block.attn.q_norm, torch.nn.RMSNorm)
    prompt = tokenizer.encode("def f7(x):")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(read) is CLASSES["qwen3"]
    written = read.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    expected = written[0, len(prompt) :].tolist()
    for ladder in [{}, dict(exits=(1,), windows=(3,)), dict(exits=(1, 2), windows=(2, 4))]:
        assert generate(model, prompt, 20, **ladder).tokens == expected
