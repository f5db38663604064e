"""Which of a file's tensors make up which of the model's, in both formats. Knows no file."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import Config, Llama, RopeScaling

HF = dict(
    embed="model.embed_tokens", norm="model.norm", head="lm_head", layer="model.layers.{}.",
    attn_norm="input_layernorm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
    out="self_attn.o_proj", mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip
GGUF = dict(
    embed="token_embd", norm="output_norm", head="output", layer="blk.{}.",
    attn_norm="attn_norm", q="attn_q", k="attn_k", v="attn_v",
    out="attn_output", mlp_norm="ffn_norm", gate="ffn_gate", up="ffn_up", down="ffn_down",
)  # fmt: skip


def layout(config: Config, names: dict[str, str]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """For each parameter of the model, the file's tensors (name, shape) whose rows make it up, in
    order.
    """
    D, F, V = config.dim, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    outer = {"embed": (V, D), "norm": (D,)} | ({} if config.tie_embeddings else {"head": (V, D)})
    parameters = {
        f"{ours}.weight": [(f"{names[ours]}.weight", shape)] for ours, shape in outer.items()
    }
    layer: dict[str, dict[str, tuple[int, ...]]] = {
        "attn_norm": {"attn_norm": (D,)},
        "attn.qkv": {"q": (q, D), "k": (kv, D), "v": (kv, D)},
        "attn.out": {"out": (D, q)},
        "mlp_norm": {"mlp_norm": (D,)},
        "mlp.gate_up": {"gate": (F, D), "up": (F, D)},
        "mlp.down": {"down": (D, F)},
    }
    for i in range(config.n_layers):
        prefix = names["layer"].format(i)
        for ours, parts in layer.items():
            parameters[f"layers.{i}.{ours}.weight"] = [
                (f"{prefix}{names[p]}.weight", shape) for p, shape in parts.items()
            ]
    return parameters


def build(
    config: Config, names: dict[str, str], shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype,
) -> Llama:  # fmt: skip
    """The model, from a file whose tensors have these shapes; `read` fetches one."""
    parameters = layout(config, names)
    expected = dict(part for parts in parameters.values() for part in parts)
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing")
        if shapes[name] != shape:
            raise ValueError(f"tensor {name} has shape {shapes[name]}, the config needs {shape}")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise ValueError(f"unexpected tensor {extra[0]} ({len(extra)} in all)")
    with torch.device("meta"), _Unfilled():
        model = Llama(config)  # shapes alone: no memory, no random numbers
    state = {}
    for ours, parts in parameters.items():
        tensors = [read(name).to(device, dtype) for name, _ in parts]
        state[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    model.load_state_dict(
        state, strict=False, assign=True
    )  # not strict: a tied head has no tensor of its own
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Lets torch.nn.init do nothing: on the meta device its draws take a second to do as much."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def linear(factor: float, context: int) -> RopeScaling:
    """All frequencies divided by factor: none of them turns so often within the context that it
    stays.
    """
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(
            f"the factor of linear RoPE scaling must be a number above 0, got {factor!r}"
        )
    return RopeScaling(factor, float(context), context + 1.0, context)


def need(values: dict, key: str):
    if values.get(key) is None:
        raise ValueError(f"{key} is missing")
    return values[key]
