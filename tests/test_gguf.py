"""GGUF files: the weights of the same model's folder, Llama 3's rope_freqs, refusals by name."""

import json
import struct
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from conftest import random_model

import checkpoints
from checkpoints import save
from checkpoints import vocabulary as text
from model import RopeScaling, rope_table

load = partial(checkpoints.load, device="cpu")
IDS = torch.arange(40).view(2, 20) * 7 % 11
SHAPE = dict(dim=32, ffn_dim=64, n_heads=4, n_kv_heads=2)  # rows of whole Q8_0 blocks


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, arch="llama", extra=(), keys=()):
    """The model as llama.cpp's converter would write it. Norms stay F32, as there."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.ffn_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    for key, value in keys:
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[bool] = writer.add_bool
        add[type(value)](key, value)
    for name, t in gguf_tensors(model).items():
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
    for i, layer in enumerate(model.layers):
        heads = layer.attn.qkv.weight.view(-1, c.head_dim, c.dim)
        pairs = torch.stack(
            [heads[:, : c.head_dim // 2], heads[:, c.head_dim // 2 :]], dim=2
        ).view_as(heads)
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


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize(
    "shape", [dict(tie_embeddings=True), dict(tie_embeddings=False), dict(head_dim=16)]
)
def test_gguf_and_folder_hold_the_same_weights(tmp_path, kind, shape):
    kind = gguf.GGMLQuantizationType[kind]
    model = random_model(**SHAPE, **shape)
    for (
        p
    ) in model.parameters():  # what the file can hold exactly, so that the folder can hold it too
        if p.dim() > 1:
            p.data = torch.tensor(
                gguf.quants.dequantize(gguf.quants.quantize(p.detach().float().numpy(), kind), kind)
            )
    model = model.float()
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    save(model, None, tmp_path / "folder")
    a, _ = load(tmp_path / "folder", dtype=torch.float32)
    b, tokenizer = load(write_gguf(tmp_path / "m.gguf", model, kind), dtype=torch.float32)
    assert tokenizer is None and (b.head.weight is b.embed.weight) == model.config.tie_embeddings
    assert torch.equal(a(IDS), b(IDS))  # quantising what was expanded changes nothing


@pytest.mark.parametrize("factor, theta, head_dim", [(8.0, 500_000.0, 128), (32.0, 500_000.0, 64)])
def test_gguf_rope_freqs_are_llama_3s_scaling(tmp_path, factor, theta, head_dim):
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    model = random_model(**SHAPE, head_dim=head_dim, rope_scaling=scaling, rope_theta=theta).float()
    divisors = []
    for i in range(head_dim // 2):  # the paper's three cases, one frequency at a time
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength > 8192:
            divisors.append(factor)
        elif wavelength < 8192 / 4:
            divisors.append(1.0)
        else:
            keep = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - keep) / factor + keep))
    assert any(1 < d < factor for d in divisors)
    extra = [("rope_freqs.weight", np.array(divisors, dtype=np.float32))]
    again, _ = load(write_gguf(tmp_path / "m.gguf", model, extra=extra), dtype=torch.float32)
    assert again.config.rope_scaling == scaling
    divisors[head_dim // 4] *= 1.01
    extra = [("rope_freqs.weight", np.array(divisors, dtype=np.float32))]
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        load(write_gguf(tmp_path / "m.gguf", model, extra=extra))


GGUF_REFUSED = {
    "architecture 'falcon'": dict(arch="falcon"),
    "RoPE scaling 'yarn'": dict(
        keys=[("llama.rope.scaling.type", "yarn"), ("llama.rope.scaling.factor", 2.0)]
    ),
    "llama.rope.scaling.factor is missing": dict(keys=[("llama.rope.scaling.type", "linear")]),
    "factor of linear RoPE scaling must be a number above 0, got 0.0": dict(
        keys=[("llama.rope.scale_linear", 0.0)]
    ),
    "RoPE scaling 'llama.rope.scaling.factor'": dict(keys=[("llama.rope.scaling.factor", 2.0)]),
    "llama.expert_count is 8": dict(keys=[("llama.expert_count", 8)]),
    "unexpected tensor blk.0.attn_q.bias": dict(
        extra=[("blk.0.attn_q.bias", np.zeros(32, np.float32))]
    ),
    "quantisation I32 cannot be expanded": dict(extra=[("counts", np.zeros(32, np.int32))]),
    "tokenizer.ggml.model 't5'": dict(keys=[("tokenizer.ggml.model", "t5")]),
    "tokenizer.ggml.scores is missing": dict(
        keys=[
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.tokens", ["a"]),
            ("tokenizer.ggml.token_type", [1]),
        ]
    ),
    "token_type has 1 entries, tokens 2": dict(
        keys=[
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.tokens", ["a", "b"]),
            ("tokenizer.ggml.token_type", [1]),
        ]
    ),
    "scores has 3 entries, tokens 1": dict(
        keys=[
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.tokens", ["a"]),
            ("tokenizer.ggml.token_type", [1]),
            ("tokenizer.ggml.scores", [0.0, 1.0, 2.0]),
        ]
    ),
    "holds a token twice": dict(
        keys=[
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.tokens", ["a", "a"]),
            ("tokenizer.ggml.token_type", [1, 1]),
            ("tokenizer.ggml.scores", [0.0, 1.0]),
        ]
    ),
    "merges has 'a c', of tokens that are not there": dict(
        keys=[
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "smollm"),
            ("tokenizer.ggml.tokens", ["a", "b"]),
            ("tokenizer.ggml.token_type", [1, 1]),
            ("tokenizer.ggml.merges", ["a c"]),
        ]
    ),
    "the chat template is not valid Jinja": dict(
        keys=[
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.tokens", ["a"]),
            ("tokenizer.ggml.token_type", [1]),
            ("tokenizer.ggml.scores", [0.0]),
            ("tokenizer.chat_template", "{% if"),
        ]
    ),
    "tokenizer.ggml.pre 'default'": dict(
        keys=[("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "default")]
    ),
    "tokenizer.ggml.tokens is missing": dict(
        keys=[("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")]
    ),
}


@pytest.mark.parametrize("message", GGUF_REFUSED)
def test_gguf_refusals_name_the_reason(tmp_path, message):
    path = write_gguf(tmp_path / "m.gguf", random_model(**SHAPE).float(), **GGUF_REFUSED[message])
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    "pre, split", [("gpt-2", text.GPT2), ("llama-bpe", text.LLAMA3), ("smollm", text.SMOLLM)]
)
def test_gguf_tokenizer(tmp_path, pre, split):
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": ["<|im_end|>", "a", "Ġ", "b", "Ġa", "Ġab", "[PAD6]"],
    }
    keys |= {"token_type": [3, 1, 1, 1, 1, 1, 5], "merges": ["Ġ a", "Ġa b"]}
    keys = [(f"tokenizer.ggml.{key}", value) for key, value in keys.items()]
    path = write_gguf(tmp_path / "m.gguf", random_model(**SHAPE).float(), keys=keys)
    model, ours = load(path)
    assert ours.encode("a ab") == [1, 5] and ours.engine.encoding._pat_str == split
    assert (
        set(ours.special) == {"<|im_end|>", "[PAD6]"}
        and ours.decode([0, 5, 6]) == "<|im_end|> ab[PAD6]"
    )
    assert ours.encode("c")[0] >= model.config.vocab_size  # a byte this vocabulary lacks


def test_a_merge_list_that_tiktoken_cannot_express_goes_to_tokenizers(tmp_path):
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "c", "abc", "ab"],
        "token_type": [1] * 5,
    }
    keys |= {"merges": ["a b", "ab c"]}
    path = tmp_path / "m.gguf"
    write_gguf(
        path,
        random_model(**SHAPE).float(),
        keys=[(f"tokenizer.ggml.{key}", v) for key, v in keys.items()],
    )
    ours = load(path)[1]
    assert type(ours.engine).__name__ == "Library" and ours.encode("abcab") == [3, 4]


@pytest.mark.parametrize("old", [False, True])
def test_gguf_linear_rope_scaling(tmp_path, old):
    model = random_model(**SHAPE).float()
    keys = [("llama.rope.scale_linear", 4.0)] if old else []
    keys += (
        [] if old else [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)]
    )
    ours = load(write_gguf(tmp_path / "m.gguf", model, keys=keys), dtype=torch.float32)[0]
    plain = load(write_gguf(tmp_path / "plain.gguf", model), dtype=torch.float32)[0]
    stretched, table = rope_table(ours.config), rope_table(plain.config)
    assert torch.equal(stretched[:, ::4], table[:, : len(stretched[0, ::4])])  # four times as slow


def split_gguf(path, model, parts=3):
    """The file as llama.cpp's gguf-split leaves it: the metadata first, the tensors shared out."""
    full = gguf_tensors(model)
    names = [f"m-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]
    with pytest.MonkeyPatch.context() as patch:
        for i, name in enumerate(names):
            own = {key: t for j, (key, t) in enumerate(full.items()) if j % parts == i}
            patch.setitem(globals(), "gguf_tensors", lambda _, own=own: own)
            write_gguf(path / name, model, keys=[("split.no", i), ("split.count", parts)])
    return [path / name for name in names]


def test_a_split_file_is_joined(tmp_path):
    model = random_model(**SHAPE).float()
    parts = split_gguf(tmp_path, model)
    whole, _ = load(write_gguf(tmp_path / "m.gguf", model), dtype=torch.float32)
    for part in parts:  # whichever is named
        assert torch.equal(load(part, dtype=torch.float32)[0](IDS), whole(IDS))
    parts[1].unlink()
    with pytest.raises(ValueError, match="part m-00002-of-00003.gguf is missing"):
        load(parts[0])


def test_gguf_rope_dimensions_must_be_the_heads(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_model(**SHAPE).float())
    data = path.read_bytes()
    key = b"llama.rope.dimension_count" + struct.pack("<I", 4)  # a uint32 follows
    at = data.index(key) + len(key)
    path.write_bytes(data[:at] + struct.pack("<I", 4) + data[at + 4 :])
    with pytest.raises(ValueError, match="llama.rope.dimension_count 4"):
        load(path)


def test_gguf_missing_and_misshapen_tensors(tmp_path):
    model = random_model(**SHAPE).float()
    full = dict(gguf_tensors(model))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("blk.4.ffn_up.weight", "output_norm.weight", "token_embd.weight"):
            without = {key: t for key, t in full.items() if key != name}
            patch.setitem(globals(), "gguf_tensors", lambda _, tensors=without: tensors)
            with pytest.raises(ValueError, match=f"{name} is missing"):
                load(write_gguf(tmp_path / "m.gguf", model))
        patch.setitem(
            globals(), "gguf_tensors", lambda _: full | {"blk.1.attn_k.weight": torch.zeros(32, 32)}
        )
        with pytest.raises(
            ValueError,
            match=r"blk.1.attn_k.weight has shape \(32, 32\), the config needs \(16, 32\)",
        ):
            load(write_gguf(tmp_path / "m.gguf", model))


def test_gguf_cut_anywhere_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_model(**SHAPE).float())
    data = path.read_bytes()
    for size in (0, 3, 10, 30, 200, 700, 1500, 3000, len(data) // 2, len(data) - 200):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated or corrupt GGUF"):
            load(path)
    path.write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(ValueError, match="truncated or corrupt GGUF"):
        load(path)


def test_gguf_numbers_that_would_hang_or_crash_are_refused(tmp_path):
    """Of layers, of the alignment, and of arrays in arrays."""
    model = random_model(4)
    for keys in ([("llama.block_count", 2**32 - 1)], [("general.alignment", 0)]):
        file = write_gguf(tmp_path / "model.gguf", model, keys=keys)
        with pytest.raises(ValueError) as error:
            load(file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(50_000))
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + nested
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key)
    with pytest.raises(ValueError, match="truncated or corrupt GGUF"):
        load(file)


def test_a_huge_number_of_layers_in_a_config_is_refused(tmp_path):
    save(random_model(4), None, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="layers.5.*is missing"):
        load(tmp_path)
