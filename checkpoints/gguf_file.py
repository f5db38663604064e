"""A GGUF file: configuration, weights and vocabulary.

Sources: docs/gguf.md of ggml-org/ggml; llama.cpp's Hugging Face converter, for the order of q's and k's
rows and for rope_freqs.
"""

from dataclasses import replace
from pathlib import Path

import gguf
import torch
from torch import Tensor

from checkpoints import tokenizer as text
from checkpoints.tokenizer import Tokenizer
from checkpoints.weights import GGUF, build, need
from model import Config, Llama, RopeScaling, rope_table


def load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Llama, Tokenizer | None]:
    try:
        file = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"truncated or corrupt GGUF file ({error})") from error
    meta = {key: field.contents() for key, field in file.fields.items()}
    if meta.get("general.architecture") != "llama":
        raise ValueError(f"architecture {meta.get('general.architecture')!r} is not supported, only 'llama'")
    tensors = {t.name: t for t in file.tensors}
    shapes = {name: tuple(reversed(t.shape.tolist())) for name, t in tensors.items()}
    first = {t.tensor_type: t for t in file.tensors}
    for kind, tensor in first.items():
        try:
            gguf.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise ValueError(f"tensor {tensor.name}: quantisation {kind.name} cannot be expanded") from None

    def read(name: str) -> Tensor:
        t = torch.tensor(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))
        if name.endswith((f"{GGUF['q']}.weight", f"{GGUF['k']}.weight")):
            # rows come in interleaved pairs (2i, 2i+1); `rotate` pairs (i, i + E/2)
            t = t.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(t.shape)
        return t

    config = _gguf_config(meta, shapes)
    if shapes.pop("rope_freqs.weight", None):
        config = replace(config, rope_scaling=_gguf_rope_scaling(config, read("rope_freqs.weight")))
    tokenizer = text.from_gguf(meta, config.vocab_size)
    return build(config, GGUF, shapes, read, device, dtype), tokenizer


def _gguf_config(meta: dict, shapes: dict[str, tuple[int, ...]]) -> Config:
    scaling = [key for key in meta if key.startswith(("llama.rope.scaling.", "llama.rope.scale_linear"))]
    if scaling and meta.get("llama.rope.scaling.type") != "none":
        raise ValueError(f"RoPE scaling {meta.get('llama.rope.scaling.type', scaling[0])!r} is not supported")
    if meta.get("llama.expert_count"):
        raise ValueError(f"llama.expert_count is {meta['llama.expert_count']}: mixtures of experts are not supported")
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
        max_seq_len=need(meta, "llama.context_length"),
        tie_embeddings=f"{GGUF['head']}.weight" not in shapes,
        head_dim=meta.get("llama.attention.key_length") or 0,
    )
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if meta.get(key, config.head_dim) != config.head_dim:
            raise ValueError(f"{key} {meta[key]} is not supported, only the head's size, {config.head_dim}")
    return config


def _gguf_rope_scaling(config: Config, divisors: Tensor) -> RopeScaling:
    """What the converter made these per-frequency divisors (E/2,) from. Every Llama since 3.1 has 1, 4, 8192."""
    guess = RopeScaling(divisors.max().item(), 1.0, 4.0, 8192)
    plain, stretched = (  # at position 1 the angle is the frequency, at most 1 radian
        rope_table(replace(config, max_seq_len=2, rope_scaling=s))[1, 1, 0, config.head_dim // 2 :].asin()
        for s in (None, guess)
    )
    if divisors.shape != plain.shape or not torch.allclose(plain / stretched, divisors, rtol=1e-5):
        raise ValueError("rope_freqs.weight is not the RoPE scaling of Llama 3.1 to 3.3")
    return guess
