"""The families of models that can be read and written, and their files' names for each setting.

Sources: the configuration classes of huggingface/transformers; docs/gguf.md of ggml-org/ggml and
the Hugging Face converter of ggml-org/llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model import Config

# Config's name of a setting: its name in config.json, and in a GGUF file after "ARCHITECTURE."
FIELDS = {
    "dim": ("hidden_size", "embedding_length"),
    "n_layers": ("num_hidden_layers", "block_count"),
    "ffn_dim": ("intermediate_size", "feed_forward_length"),
    "n_heads": ("num_attention_heads", "attention.head_count"),
    "n_kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "norm_eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    "rope_theta": ("rope_theta", "rope.freq_base"),
    "max_seq_len": ("max_position_embeddings", "context_length"),
}
CONFIG = {ours: theirs for ours, (theirs, _) in FIELDS.items()}
CONFIG |= {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
GGUF = {ours: theirs for ours, (_, theirs) in FIELDS.items()}  # the tensors tell the other two


@dataclass(frozen=True)
class Family:
    """architecture: config.json's name of the class. gguf: the architecture in a GGUF file.

    absent: the values of settings that config.json leaves out. only: settings for which just this
    value is implemented. interleaved: in a GGUF file, pairs of query and key rows are (2i, 2i+1),
    while `rotate` pairs (i, i + E/2).
    """

    architecture: str
    gguf: str
    qkv_bias: bool = False
    qk_norm: bool = False
    interleaved: bool = False
    absent: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {  # by config.json's model_type; the first that can hold a model is used to save it
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        interleaved=True,
        absent={"max_position_embeddings": 2048},
        only={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",
        interleaved=True,
        absent={"max_position_embeddings": 2**17, "num_key_value_heads": 8, "sliding_window": 4096},
        only={"sliding_window": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        qkv_bias=True,
        absent={"max_position_embeddings": 2**15, "num_key_value_heads": 32},
        only={"use_sliding_window": False},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        qk_norm=True,
        absent={"max_position_embeddings": 2**15, "num_key_value_heads": 32, "head_dim": 128},
        only={"use_sliding_window": False, "attention_bias": False},
    ),
}
ABSENT = {"head_dim": 0, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ONLY = {  # the only supported values in any family's config.json; others would have to be ignored
    "hidden_act": "silu",
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
}
GGUF_ONLY = {"expert_count": 0, "attention.sliding_window": 0, "attention.causal": True}
GGUF_ROPE = ["rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"]
GGUF_ROPE += ["rope.scaling.original_context_length", "rope.scaling.finetuned"]
GGUF_IDLE = ("vocab_size", "expert_used_count", "tensor_data_layout")  # no result depends on these


def family_of(config: Config, name: str = "") -> str:
    """The family to save a model in: the one named, if it has such models, else the first."""
    held = (config.qkv_bias, config.qk_norm)
    names = [name for name, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm) == held]
    if not names:
        raise ValueError("no family of checkpoints has both qkv_bias and qk_norm")
    return name if name in names else names[0]
