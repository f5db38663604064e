"""GGUF files: configuration, weights and vocabulary of a Llama, in one file or split into parts.

Read here, since gguf's own reader takes three seconds for a vocabulary of 49 thousand tokens; what
expands quantised weights is gguf's. Sources: docs/gguf.md of ggml-org/ggml; llama.cpp's Hugging
Face converter, for the order of q's and k's rows and for rope_freqs.
"""

import re
import struct
from dataclasses import replace
from functools import partial
from math import gcd, prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from checkpoints import vocabulary
from checkpoints.files import need, only
from checkpoints.tokenizer import Tokenizer
from checkpoints.weights import build, linear
from model import Config, Llama, RopeScaling, rope_frequencies

# by the number of a value's type, in struct's letters; 8 is a string, 9 an array
NUMBERS = "BbHhIif?..QqdX"
STRING, ARRAY = 8, 9
CONFIG = dict(  # Config's name of a setting, and the metadata's behind "llama."
    dim="embedding_length", n_layers="block_count", ffn_dim="feed_forward_length",
    n_heads="attention.head_count", n_kv_heads="attention.head_count_kv",
    head_dim="attention.key_length", norm_eps="attention.layer_norm_rms_epsilon",
    rope_theta="rope.freq_base", max_seq_len="context_length",
)  # fmt: skip


def load_gguf(
    path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a file, or of the split file that it is a part of."""
    meta: dict[str, Any] = {}
    tensors: dict[str, tuple] = {}
    split, files = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", path.name), [path]
    if split is not None:  # the first part has the metadata
        files = [path.with_name(f"{split[1]}{i + 1:05}{split[2]}") for i in range(int(split[3]))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"part {absent[0]} is missing")
    try:
        for file in files:
            values, held = _read(file)
            meta, tensors = values | meta, tensors | held
    except (struct.error, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"truncated or corrupt GGUF file ({error})") from error
    only("architecture", meta.get("general.architecture"), "llama")
    shapes = {name: shape for name, (_, shape, _) in tensors.items()}
    for name, (_, _, kind) in tensors.items():
        try:  # one block
            gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            raise ValueError(f"{name}: quantisation {kind.name} cannot be expanded") from None

    def read(name: str) -> torch.Tensor:
        data, shape, kind = tensors[name]
        few = data.reshape(gcd(len(data), 1024), -1)  # long rows: gguf expands sixteen at a time
        values = np.require(gguf.quants.dequantize(few, kind), requirements="W")
        t = torch.from_numpy(values).view(shape)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # rows come in interleaved pairs (2i, 2i+1); `rotate` pairs (i, i + E/2)
            t = t.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(shape)
        return t

    config = _config(meta, shapes)
    if shapes.pop("rope_freqs.weight", None):
        config = replace(config, rope_scaling=_rope_scaling(config, read("rope_freqs.weight")))
    tokenizer = vocabulary.from_gguf(meta, config.vocab_size, str(path))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, min(config.n_layers, len(shapes)))
    spell = partial(names.get_name, try_suffixes=(".weight",))
    return build(config, shapes, read, device, dtype, spell), tokenizer


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple]]:
    """A file's metadata, and each tensor's data, shape (rows, columns) and quantisation.

    A count or length that goes past the end of the file fails there: nothing is made in advance.
    """
    data, at = np.memmap(path, mode="r"), 0
    view = memoryview(data)  # type: ignore[arg-type]

    def take(letters: str) -> tuple:
        nonlocal at
        values = struct.unpack_from(f"<{letters}", view, at)
        at += struct.calcsize(f"<{letters}")
        return values

    def value(kind: int) -> Any:
        if kind == STRING:
            return take(f"{take('Q')[0]}s")[0].decode("utf-8")
        if kind != ARRAY:
            return take(NUMBERS[kind])[0]
        kind, count = take("IQ")
        if kind in (STRING, ARRAY):
            return [value(kind) for _ in range(count)]
        return list(take(f"{count}{NUMBERS[kind]}"))

    magic, version, n_tensors, n_values = take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not the magic and version of a little-endian GGUF file")
    meta: dict[str, Any] = {}
    for _ in range(n_values):
        key = value(STRING)
        if key in meta:
            raise ValueError(f"{key} stands there twice")
        meta[key] = value(*take("I"))
    infos = []
    for _ in range(n_tensors):
        name, (dimensions,) = value(STRING), take("I")
        infos.append((name, take(f"{dimensions}Q")[::-1], *take("IQ")))
    start = at + -at % meta.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    tensors: dict[str, tuple] = {}
    for name, shape, number, offset in infos:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = prod(shape) // block * size
        raw = data[start + offset : start + offset + nbytes]
        if len(raw) < nbytes or not shape or shape[-1] % block or name in tensors:
            raise ValueError(f"tensor {name} goes past the end, has an odd shape, or comes twice")
        tensors[name] = (np.asarray(raw).reshape(prod(shape[:-1]), -1), shape, kind)
    return meta, tensors


def _config(meta: dict, shapes: dict[str, tuple[int, ...]]) -> Config:
    if count := meta.get("llama.expert_count"):
        raise ValueError(f"llama.expert_count is {count}: mixtures of experts are not supported")
    said = {"llama.rope.freq_base": 10_000.0, "llama.attention.key_length": 0, **meta}
    said.setdefault("llama.attention.head_count_kv", meta.get("llama.attention.head_count"))
    config = Config(
        vocab_size=need(shapes, "token_embd.weight")[0],
        tie_embeddings="output.weight" not in shapes,
        **{ours: need(said, f"llama.{key}") for ours, key in CONFIG.items()},
    )
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        only(key, meta.get(key, config.head_dim), config.head_dim)
    factor = meta.get("llama.rope.scale_linear")  # the older key
    asked = [key for key in meta if key.startswith("llama.rope.scaling.")]
    kind = meta.get("llama.rope.scaling.type", asked[0] if asked else "none")
    only("RoPE scaling", kind, "none", "linear")
    if kind == "linear":
        factor = need(meta, "llama.rope.scaling.factor")
    scaling = None if factor is None else linear(factor, config.max_seq_len)
    return replace(config, rope_scaling=scaling)


def _rope_scaling(config: Config, divisors: torch.Tensor) -> RopeScaling:
    """What the converter made these divisors (E/2,) from. Every Llama since 3.1 has 1, 4, 8192."""
    guess = RopeScaling(divisors.max().item(), 1.0, 4.0, 8192)
    plain, stretched = (rope_frequencies(replace(config, rope_scaling=s)) for s in (None, guess))
    if divisors.shape != plain.shape or not torch.allclose(plain / stretched, divisors, rtol=1e-5):
        raise ValueError("rope_freqs.weight is not the RoPE scaling of Llama 3.1 to 3.3")
    return guess
