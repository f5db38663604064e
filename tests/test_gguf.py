"""GGUF files: the same weights as the model's folder, Llama 3's rope_freqs, refusals that name the
cause.
"""

from functools import partial

import gguf
import numpy as np
import pytest
import torch
from conftest import random_model

import checkpoints
from checkpoints import save
from model import RopeScaling, rope_frequencies

load = partial(checkpoints.load, device="cpu")
IDS = torch.arange(40).view(2, 20) * 7 % 11
SHAPE = dict(dim=32, ffn_dim=64, n_heads=4, n_kv_heads=2)  # rows of whole Q8_0 blocks
F32 = gguf.GGMLQuantizationType.F32


def write_gguf(path, model, kind=F32, arch="llama", extra=(), keys=(), tensors=None):
    """The model as llama.cpp's converter would write it. Norms stay F32, as there."""
    c, writer = model.config, gguf.GGUFWriter(path, arch)
    for name, value in dict(
        block_count=c.n_layers, context_length=c.max_seq_len, embedding_length=c.dim,
        feed_forward_length=c.ffn_dim, head_count=c.n_heads, head_count_kv=c.n_kv_heads,
        layer_norm_rms_eps=c.norm_eps, rope_freq_base=c.rope_theta, key_length=c.head_dim,
        value_length=c.head_dim,
    ).items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add |= {list: writer.add_array, bool: writer.add_bool}
    for key, value in keys:
        add[type(value)](key, value)
    for name, t in (gguf_tensors(model) if tensors is None else tensors).items():
        data = t.float().numpy()
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model):
    c = model.config
    tensors = {"token_embd.weight": model.embed.weight, "output_norm.weight": model.norm.weight}
    if not c.tie_embeddings:
        tensors["output.weight"] = model.head.weight
    half = c.head_dim // 2
    for i, layer in enumerate(model.layers):
        heads = layer.attn.qkv.weight.view(-1, c.head_dim, c.dim)
        pairs = torch.stack([heads[:, :half], heads[:, half:]], dim=2).view_as(heads)
        own = {
            "attn_norm": layer.attn_norm.weight,
            "attn_q": pairs[: c.n_heads].flatten(0, 1),
            "attn_k": pairs[c.n_heads : c.n_heads + c.n_kv_heads].flatten(0, 1),
            "attn_v": heads[c.n_heads + c.n_kv_heads :].flatten(0, 1),
            "attn_output": layer.attn.out.weight,
            "ffn_norm": layer.mlp_norm.weight,
            "ffn_gate": layer.mlp.gate_up.weight[: c.ffn_dim],
            "ffn_up": layer.mlp.gate_up.weight[c.ffn_dim :],
            "ffn_down": layer.mlp.down.weight,
        }
        tensors |= {f"blk.{i}.{name}.weight": t for name, t in own.items()}
    return {name: t.detach() for name, t in tensors.items()}


@pytest.fixture
def model():
    return random_model(**SHAPE).float()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize(
    "shape", [dict(tie_embeddings=True), dict(tie_embeddings=False), dict(head_dim=16)]
)
def test_gguf_and_folder_hold_the_same_weights(tmp_path, kind, shape):
    kind = gguf.GGMLQuantizationType[kind]
    model = random_model(**SHAPE, **shape).float()
    for p in model.parameters():  # values that the file holds exactly, as the folder does
        if p.dim() > 1:
            held = gguf.quants.dequantize(gguf.quants.quantize(p.detach().numpy(), kind), kind)
            p.data.copy_(torch.tensor(held))
    save(model, None, tmp_path / "folder")
    a, _ = load(tmp_path / "folder", dtype=torch.float32)
    b, tokenizer = load(write_gguf(tmp_path / "m.gguf", model, kind), dtype=torch.float32)
    assert tokenizer is None and (b.head.weight is b.embed.weight) == model.config.tie_embeddings
    assert torch.equal(a(IDS), b(IDS))


@pytest.mark.parametrize("factor, head_dim", [(8.0, 128), (32.0, 64)])
def test_gguf_rope_freqs_are_llama_3s_scaling(tmp_path, factor, head_dim):
    scaling, theta = RopeScaling(factor, 1.0, 4.0, 8192), 500_000.0
    model = random_model(**SHAPE, head_dim=head_dim, rope_scaling=scaling, rope_theta=theta).float()
    divisors = []
    for i in range(head_dim // 2):  # the paper's three cases, one frequency at a time
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        keep = min(max((8192 / wavelength - 1) / (4 - 1), 0), 1)
        divisors.append(1 / ((1 - keep) / factor + keep))
    assert any(1 < d < factor for d in divisors)
    extra = [("rope_freqs.weight", np.array(divisors, dtype=np.float32))]
    again, _ = load(write_gguf(tmp_path / "m.gguf", model, extra=extra), dtype=torch.float32)
    assert again.config.rope_scaling == scaling
    extra[0][1][head_dim // 4] *= 1.01
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        load(write_gguf(tmp_path / "m.gguf", model, extra=extra))


def test_gguf_linear_rope_scaling(tmp_path, model):
    plain, _ = load(write_gguf(tmp_path / "plain.gguf", model))
    named = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    for keys in ({"llama.rope.scale_linear": 4.0}, named):
        ours, _ = load(write_gguf(tmp_path / "m.gguf", model, keys=keys.items()))
        assert torch.equal(4 * rope_frequencies(ours.config), rope_frequencies(plain.config))


def tokenizer_keys(model, tokens, types, **more):
    keys = {"model": model, "tokens": tokens, "token_type": types, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


BYTES = dict(pre="smollm", merges=["a b"])
REFUSED = {
    "llama.rope.scaling.factor is missing": {"llama.rope.scaling.type": "linear"},
    "got 0.0": {"llama.rope.scale_linear": 0.0},
    "RoPE scaling 'llama.rope.scaling.factor'": {"llama.rope.scaling.factor": 2.0},
    "tokenizer.ggml.model 't5'": {"tokenizer.ggml.model": "t5"},
    "tokenizer.ggml.tokens is missing": {"tokenizer.ggml.model": "gpt2"},
    "tokenizer.ggml.scores is missing": tokenizer_keys("llama", ["a"], [1]),
    "tokenizer.ggml.pre 'default'": tokenizer_keys("gpt2", ["a"], [1], pre="default"),
    "does not fit token_type": tokenizer_keys("gpt2", ["a", "b"], [1], **BYTES),
    "repeats a token": tokenizer_keys("gpt2", ["a", "a"], [1, 1], **BYTES),
    "`b` out of vocabulary": tokenizer_keys("gpt2", ["a"], [1], **BYTES),
}
NAMED = tokenizer_keys("gpt2", ["a", "b", "ab"], [1, 1, 1], **BYTES)
for key, id in [("bos", 3), ("eos", 11), ("eot", 99999), ("eom", 2**32 - 1)]:
    message = f"tokenizer.ggml.{key}_token_id {id}, outside the vocabulary of 3"
    REFUSED[message] = NAMED | {f"tokenizer.ggml.{key}_token_id": id}


@pytest.mark.parametrize("message", REFUSED)
def test_gguf_refusals_name_the_reason(tmp_path, model, message):
    path = write_gguf(tmp_path / "m.gguf", model, keys=REFUSED[message].items())
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        load(path)


def test_gguf_tensors_must_be_the_models(tmp_path, model):
    path, full = tmp_path / "m.gguf", gguf_tensors(model)
    for name in ("blk.4.ffn_up.weight", "output_norm.weight", "token_embd.weight"):
        fewer = {key: t for key, t in full.items() if key != name}
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load(write_gguf(path, model, tensors=fewer))
    misshapen = full | {"blk.1.attn_k.weight": torch.zeros(32, 32)}
    with pytest.raises(ValueError, match=r"attn_k.weight has shape \(32, 32\), .* needs \(16, 32"):
        load(write_gguf(path, model, tensors=misshapen))
    with pytest.raises(ValueError, match="unexpected tensor blk.0.attn_q.bias"):
        load(write_gguf(path, model, extra=[("blk.0.attn_q.bias", np.zeros(32, np.float32))]))
    del full["output_norm.weight"]
    counts = [("output_norm.weight", np.zeros(32, np.int32))]
    with pytest.raises(ValueError, match="quantisation I32 cannot be expanded"):
        load(write_gguf(path, model, tensors=full, extra=counts))


def test_a_gguf_file_is_known_by_its_content_and_refused_if_cut(tmp_path, model):
    path = write_gguf(tmp_path / "model.gguf", model)
    before, data = load(path)[0](IDS), path.read_bytes()
    for name in ("m.GGUF", "m", "sha256-0123abcd"):
        path = path.rename(tmp_path / name)
        assert torch.equal(load(path)[0](IDS), before)
    path = path.rename(tmp_path / "m.gguf")
    sizes = (0, 3, 10, 30, 200, 700, 1500, 3000, len(data) // 2, len(data) - 200)
    for content in (*(data[:size] for size in sizes), b"nothing of the kind" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or corrupt GGUF"):
            load(path)


def test_gguf_byte_level_tokenizer(tmp_path, model):
    """Control and unused tokens are special; merges are done in their order, not by id."""
    tokens, types = ["<|im_end|>", "a", "b", "c", "abc", "ab", "[PAD6]"], [3, 1, 1, 1, 1, 1, 5]
    keys = tokenizer_keys("gpt2", tokens, types, pre="gpt-2", merges=["a b", "ab c"])
    _, ours = load(write_gguf(tmp_path / "m.gguf", model, keys=keys.items()))
    assert ours.encode("abcab") == [4, 5] and ours.decode([0, 4, 5]) == "<|im_end|>abcab"
    assert ours.encode("<|im_end|>") != [0] and set(ours.special) == {"<|im_end|>", "[PAD6]"}


def test_a_split_gguf_is_joined(tmp_path, model):
    """It is split as by llama.cpp's gguf-split: metadata in the first part, tensors in all."""
    full, parts = gguf_tensors(model).items(), []
    for i in range(3):
        part, own = tmp_path / f"m-{i + 1:05}-of-00003.gguf", dict(list(full)[i::3])
        keys = [("split.no", i), ("split.count", 3)]
        parts.append(write_gguf(part, model, tensors=own, keys=keys))
    whole, _ = load(write_gguf(tmp_path / "m.gguf", model))
    for part in parts:  # whichever is named
        assert torch.equal(load(part)[0](IDS), whole(IDS))
    parts[1].unlink()
    with pytest.raises(ValueError, match="part m-00002-of-00003.gguf is missing"):
        load(parts[0])
