"""GGUF files: configuration, weights and vocabulary of a model, in one file or split into parts.

The gguf package reads the file and expands quantised weights. Sources: docs/gguf.md of
ggml-org/ggml; llama.cpp's Hugging Face converter, for the order of the rows of q and k and for
rope_freqs.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from checkpoints import vocabulary
from checkpoints.families import FAMILIES, GGUF, GGUF_IDLE, GGUF_ONLY, GGUF_ROPE
from checkpoints.files import need, only
from checkpoints.tokenizer import Tokenizer
from checkpoints.weights import build, linear
from model import Config, Llama, RopeScaling, rope_frequencies

ARCHITECTURES = {family.gguf: family for family in FAMILIES.values()}


def load_gguf(
    path: Path, device: torch.device, dtype: torch.dtype, ranks=None
) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a file, or of the split file that it is a part of."""
    meta: dict[str, Any] = {}
    tensors: dict[str, gguf.gguf_reader.ReaderTensor] = {}
    for file in _parts(path):
        try:
            reader = gguf.GGUFReader(file)
            values = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"truncated or corrupt GGUF file ({error})") from error
        only("byte order", reader.byte_order, "I")  # the gguf package expands only this
        meta = values | meta  # the first part has the metadata
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    arch: Any = meta.get("general.architecture")
    only("architecture", arch, *ARCHITECTURES)
    shapes = {name: tuple(map(int, t.shape[::-1])) for name, t in tensors.items()}

    def read(name: str) -> torch.Tensor:
        data, kind = tensors[name].data, tensors[name].tensor_type
        try:
            values = gguf.quants.dequantize(data, kind)
        except NotImplementedError:
            message = f"{name}: quantisation {kind.name} cannot be expanded"
            raise ValueError(message) from None
        t = torch.from_numpy(np.require(values, requirements="W"))
        if ARCHITECTURES[arch].interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            # rows come in interleaved pairs (2i, 2i+1); `rotate` pairs (i, i + E/2)
            pairs = t.view(-1, config.head_dim // 2, 2, config.dim)
            t = pairs.transpose(1, 2).reshape(t.shape)
        return t

    config = _config(meta, shapes)
    if shapes.pop("rope_freqs.weight", None):
        config = replace(config, rope_scaling=_rope_scaling(config, read("rope_freqs.weight")))
    tokenizer = vocabulary.from_gguf(meta, config.vocab_size, str(path))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.n_layers)
    spell = partial(names.get_name, try_suffixes=(".weight", ".bias"))
    return build(config, shapes, read, device, dtype, spell, ranks), tokenizer


def _parts(path: Path) -> list[Path]:
    """All parts of the split file of which path is a part, or only path if it is whole."""
    split = re.fullmatch(r"(?i)(.*-)\d{5}(-of-(\d{5})\.gguf)", path.name)
    if split is None:
        return [path]
    files = [path.with_name(f"{split[1]}{i + 1:05}{split[2]}") for i in range(int(split[3]))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"part {absent[0]} is missing")
    return files


def _config(meta: dict, shapes: dict[str, tuple[int, ...]]) -> Config:
    arch = meta["general.architecture"]
    said = {f"{arch}.rope.freq_base": 10_000.0, f"{arch}.attention.key_length": 0, **meta}
    said.setdefault(f"{arch}.attention.head_count_kv", meta.get(f"{arch}.attention.head_count"))
    config = Config(
        vocab_size=need(shapes, "token_embd.weight")[0],
        tie_embeddings="output.weight" not in shapes,
        qkv_bias=ARCHITECTURES[arch].qkv_bias,
        qk_norm=ARCHITECTURES[arch].qk_norm,
        **{ours: need(said, f"{arch}.{key}") for ours, key in GGUF.items()},
    )
    one = dict.fromkeys(("rope.dimension_count", "attention.value_length"), config.head_dim)
    one |= GGUF_ONLY
    for key, value in meta.items():
        name = key.removeprefix(f"{arch}.")
        if name in one:
            only(key, value, one[name])
        elif name != key and name not in (*GGUF.values(), *GGUF_ROPE, *GGUF_IDLE):
            raise ValueError(f"{key} is not supported")
    factor = meta.get(f"{arch}.rope.scale_linear")  # the older key
    asked = [key for key in meta if key.startswith(f"{arch}.rope.scaling.")]
    kind = meta.get(f"{arch}.rope.scaling.type", asked[0] if asked else "none")
    only("RoPE scaling", kind, "none", "linear")
    if kind == "linear":
        factor = need(meta, f"{arch}.rope.scaling.factor")
    scaling = None if factor is None else linear(factor, config.max_seq_len)
    return replace(config, rope_scaling=scaling)


def _rope_scaling(config: Config, divisors: torch.Tensor) -> RopeScaling:
    """The scaling from which a converter made these divisors (E/2,): 1, 4, 8192 since Llama 3.1."""
    guess = RopeScaling(divisors.max().item(), 1.0, 4.0, 8192)
    plain, stretched = (rope_frequencies(replace(config, rope_scaling=s)) for s in (None, guess))
    if divisors.shape != plain.shape or not torch.allclose(plain / stretched, divisors, rtol=1e-5):
        raise ValueError("rope_freqs.weight is not the RoPE scaling of Llama 3.1 to 3.3")
    return guess
