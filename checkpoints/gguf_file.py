"""GGUF files: configuration, weights and vocabulary of a Llama, in one file or split into parts.

Read here rather than by gguf's own reader, which takes three seconds for a vocabulary of 49
thousand tokens; what expands quantised weights is gguf's.

Sources: docs/gguf.md of ggml-org/ggml; llama.cpp's Hugging Face converter, for the order of q's and
k's rows and for rope_freqs.
"""

import re
import struct
from dataclasses import replace
from math import gcd, prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from checkpoints import vocabulary
from checkpoints.tokenizer import Tokenizer
from checkpoints.weights import GGUF, build, linear, need
from model import Config, Llama, RopeScaling, rope_table

# by the number of a value's type, in struct's letters; 8 is a string, 9 an array
NUMBERS = "BbHhIif?..QqdX"
STRING, ARRAY = 8, 9


def load_gguf(
    path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer of a file, or of the split file that it is a part of."""
    meta: dict[str, Any] = {}
    tensors: dict[str, tuple[np.ndarray, tuple[int, ...], gguf.GGMLQuantizationType]] = {}
    for part in _parts(path):
        try:
            values, held = _read(part)
        except (
            struct.error,
            ValueError,
            IndexError,
            KeyError,
            OverflowError,
            MemoryError,
        ) as error:
            raise ValueError(f"truncated or corrupt GGUF file ({error})") from error
        meta = values | meta
        tensors |= held
    if meta.get("general.architecture") != "llama":
        raise ValueError(
            f"architecture {meta.get('general.architecture')!r} is not supported, only 'llama'"
        )
    shapes = {name: shape for name, (_, shape, _) in tensors.items()}
    for kind, name in {kind: name for name, (_, _, kind) in tensors.items()}.items():
        try:
            gguf.quants.dequantize(
                np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind
            )  # one block
        except NotImplementedError:
            raise ValueError(
                f"tensor {name}: quantisation {kind.name} cannot be expanded"
            ) from None

    def read(name: str) -> Tensor:
        data, shape, kind = tensors[name]
        few = data.reshape(gcd(len(data), 1024), -1)  # long rows: gguf expands sixteen at a time
        t = torch.from_numpy(np.require(gguf.quants.dequantize(few, kind), requirements="W")).view(
            shape
        )
        if name.endswith((f"{GGUF['q']}.weight", f"{GGUF['k']}.weight")):
            # rows come in interleaved pairs (2i, 2i+1); `rotate` pairs (i, i + E/2)
            t = t.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(t.shape)
        return t

    config = _config(meta, shapes)
    if shapes.pop("rope_freqs.weight", None):
        config = replace(config, rope_scaling=_rope_scaling(config, read("rope_freqs.weight")))
    tokenizer = vocabulary.from_gguf(meta, config.vocab_size, str(path))
    return build(config, GGUF, shapes, read, device, dtype), tokenizer


def _parts(path: Path) -> list[Path]:
    """All files of a split model, the first of which has the metadata; a file that is not split
    alone.
    """
    name = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if name is None:
        return [path]
    parts = [path.with_name(f"{name[1]}-{i + 1:05}-of-{name[2]}.gguf") for i in range(int(name[2]))]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"part {absent[0]} is missing")
    return parts


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple]]:
    """A file's metadata, and for each of its tensors the data, the shape (rows, columns) and the
    quantisation.
    """
    data = np.memmap(path, mode="r")
    view, at = memoryview(data), 0  # type: ignore[arg-type]

    def take(letters: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{letters}", view, at)
        at += struct.calcsize(f"<{letters}")
        return values[0]

    def value(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            length = take("Q")
            at += length
            if at > len(view):
                raise ValueError("a text goes past the end")
            return str(view[at - length : at], "utf-8")
        if kind != ARRAY:
            return take(NUMBERS[kind])
        kind, count = take("I"), take("Q")
        if kind in (STRING, ARRAY):
            if count > len(view):
                raise ValueError("an array goes past the end")
            return [value(kind) for _ in range(count)]
        numbers = np.frombuffer(view, np.dtype(f"<{NUMBERS[kind]}"), count, at)
        at += numbers.nbytes
        return numbers.tolist()

    if take("4s") != b"GGUF" or take("I") not in (2, 3):
        raise ValueError("not the magic and version of a little-endian GGUF file")
    n_tensors, n_values = take("Q"), take("Q")
    meta: dict[str, Any] = {}
    for _ in range(n_values):
        key = value(STRING)
        if key in meta:
            raise ValueError(f"{key} stands there twice")
        meta[key] = value(take("I"))
    infos = []
    for _ in range(n_tensors):
        name = value(STRING)
        shape = tuple(take("Q") for _ in range(take("I")))[::-1]
        infos.append((name, shape, gguf.GGMLQuantizationType(take("I")), take("Q")))
    start = at + -at % meta.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    tensors = {}
    for name, shape, kind, offset in infos:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = prod(shape) // block * size
        raw = data[start + offset : start + offset + nbytes]
        if len(raw) < nbytes or not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} goes past the end, or has an odd shape")
        if name in tensors:
            raise ValueError(f"tensor {name} stands there twice")
        tensors[name] = (np.asarray(raw).reshape(prod(shape[:-1]), -1), shape, kind)
    return meta, tensors


def _config(meta: dict, shapes: dict[str, tuple[int, ...]]) -> Config:
    if meta.get("llama.expert_count"):
        raise ValueError(
            f"llama.expert_count is {meta['llama.expert_count']}: "
            "mixtures of experts are not supported"
        )
    context = need(meta, "llama.context_length")
    heads = need(meta, "llama.attention.head_count")
    config = Config(
        vocab_size=need(shapes, f"{GGUF['embed']}.weight")[0],
        dim=need(meta, "llama.embedding_length"),
        n_layers=need(meta, "llama.block_count"),
        n_heads=heads,
        n_kv_heads=meta.get("llama.attention.head_count_kv", heads),
        ffn_dim=need(meta, "llama.feed_forward_length"),
        rope_theta=meta.get("llama.rope.freq_base", 10_000.0),
        norm_eps=need(meta, "llama.attention.layer_norm_rms_epsilon"),
        max_seq_len=context,
        tie_embeddings=f"{GGUF['head']}.weight" not in shapes,
        rope_scaling=_linear_scaling(meta, context),
        head_dim=meta.get("llama.attention.key_length") or 0,
    )
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if meta.get(key, config.head_dim) != config.head_dim:
            raise ValueError(
                f"{key} {meta[key]} is not supported, only the head's size, {config.head_dim}"
            )
    return config


def _linear_scaling(meta: dict, context: int) -> RopeScaling | None:
    """Linear scaling, the only kind that these keys may ask for: under its older key, or by its
    type.
    """
    if "llama.rope.scale_linear" in meta:
        return linear(meta["llama.rope.scale_linear"], context)
    keys = [key for key in meta if key.startswith("llama.rope.scaling.")]
    kind = meta.get("llama.rope.scaling.type")
    if not keys or kind == "none":
        return None
    if kind != "linear":
        raise ValueError(
            f"RoPE scaling {kind or keys[0]!r} is not supported, only 'none' and 'linear'"
        )
    return linear(need(meta, "llama.rope.scaling.factor"), context)


def _rope_scaling(config: Config, divisors: Tensor) -> RopeScaling:
    """What the converter made these per-frequency divisors (E/2,) from. Every Llama since 3.1 has
    1, 4, 8192.
    """
    guess = RopeScaling(divisors.max().item(), 1.0, 4.0, 8192)
    plain, stretched = (  # at position 1 the angle is the frequency, at most 1 radian
        rope_table(replace(config, max_seq_len=2, rope_scaling=s))[
            1, 1, 0, config.head_dim // 2 :
        ].asin()
        for s in (None, guess)
    )
    if divisors.shape != plain.shape or not torch.allclose(plain / stretched, divisors, rtol=1e-5):
        raise ValueError("rope_freqs.weight is not the RoPE scaling of Llama 3.1 to 3.3")
    return guess
