"""Which of a file's tensors make up which of the model's. This module reads no file itself."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import Config, Llama, RopeScaling


def layout(config: Config) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Each parameter of the model, with the tensors of a Hugging Face folder that form its rows."""
    D, F, V = config.dim, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    layer: dict[str, dict[str, tuple[int, ...]]] = {
        "attn_norm.weight": {"input_layernorm.weight": (D,)},
        "attn.qkv.weight": {f"{part}.weight": (n, D) for part, n in rows.items()},
        "attn.out.weight": {"self_attn.o_proj.weight": (D, q)},
        "mlp_norm.weight": {"post_attention_layernorm.weight": (D,)},
        "mlp.gate_up.weight": {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)},
        "mlp.down.weight": {"mlp.down_proj.weight": (D, F)},
    }
    if config.qkv_bias:
        layer["attn.qkv.bias"] = {f"{part}.bias": (n,) for part, n in rows.items()}
    if config.qk_norm:
        layer["attn.q_norm.weight"] = {"self_attn.q_norm.weight": (config.head_dim,)}
        layer["attn.k_norm.weight"] = {"self_attn.k_norm.weight": (config.head_dim,)}
    yield "embed.weight", {"model.embed_tokens.weight": (V, D)}
    for i in range(config.n_layers):
        for ours, parts in layer.items():
            yield f"layers.{i}.{ours}", {f"model.layers.{i}.{p}": s for p, s in parts.items()}
    yield "norm.weight", {"model.norm.weight": (D,)}
    if not config.tie_embeddings:
        yield "head.weight", {"lm_head.weight": (V, D)}


def build(
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Any],
    device: torch.device,
    dtype: torch.dtype,
    spell: Callable = str,
    ranks=None,
) -> Llama:
    """The model. read: fetches a tensor by name. spell: turns a folder's name into the file's.

    ranks: the processes that share the model (fast/parallel.py). Only this one's part is built, and
    only this part is copied from what `read` returns, a tensor or a slice of a file.
    """
    parameters: dict[str, list[str]] = {}
    shapes = dict(shapes)
    for ours, parts in layout(config):
        parameters[ours] = list(map(spell, parts))
        for name, shape in zip(parameters[ours], parts.values()):
            if name not in shapes:
                raise ValueError(f"tensor {name} is missing")
            if (got := shapes.pop(name)) != shape:
                raise ValueError(f"tensor {name} has shape {got}, the config needs {shape}")
    if shapes:
        raise ValueError(f"unexpected tensor {min(shapes)} ({len(shapes)} in all)")
    with torch.device("meta"), _Unfilled():
        model = Llama(config)  # only shapes: no memory, no random numbers
        model = ranks.share(model) if ranks else model
    state = {}
    for ours, names in parameters.items():
        held = [read(name) for name in names]
        held = ranks.cut(ours, held) if ranks else held
        # copies even a single tensor, which may be a page of the file
        state[ours] = torch.cat([tensor.to(device, dtype) for tensor in held])
    model.load_state_dict(state, strict=False, assign=True)  # a tied head has no tensor of its own
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Makes torch.nn.init do nothing; its draws on the meta device, to no effect, take a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def linear(factor: float, context: int) -> RopeScaling:
    """Return a scaling that divides all frequencies, since none turns often enough to be kept."""
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(f"factor of linear RoPE scaling must be a number above 0, got {factor!r}")
    return RopeScaling(factor, float(context), context + 1.0, context)
