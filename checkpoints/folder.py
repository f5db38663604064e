"""A Hugging Face folder: configuration, weights, trained exits, vocabulary; read and written.

Source: transformers' LlamaConfig, old and new spelling.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import vocabulary
from checkpoints.files import write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import read_json
from checkpoints.weights import HF, build, layout, linear, need
from model import Config, ExitHead, Llama, RopeScaling

# what `save` writes or removes of a tokenizer; the last two it only removes, since what they say
# stands elsewhere then
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def load_folder(
    path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Llama, Tokenizer | None]:
    if not (path / "config.json").is_file():
        raise ValueError("no config.json")
    settings = read_json(path / "config.json")
    config = _config_from_hf(settings)
    exits = settings.get("exits", [])
    if not all(isinstance(e, int) for e in exits) or exits != sorted(
        {e for e in exits if 0 < e < config.n_layers}
    ):
        raise ValueError(
            f"exits must rise strictly between 1 and {config.n_layers - 1}, got {exits}"
        )
    if (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (path / "model.safetensors.index.json").is_file():
        names = sorted(
            set(need(read_json(path / "model.safetensors.index.json"), "weight_map").values())
        )
    elif pickles := [f.name for kind in ("*.bin", "*.pt", "*.pth") for f in path.glob(kind)]:
        raise ValueError(
            f"only {pickles[0]}: weights are read from safetensors or GGUF, never from pickles"
        )
    else:
        raise ValueError("no model.safetensors, with or without an index")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"shard {absent[0]} is missing")
    files = [safe_open(path / name, framework="pt") for name in names]
    where = {
        key: file
        for file in files
        for key in file.keys()
        if not key.endswith("rotary_emb.inv_freq")
    }
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in where.items()}

    own_name: dict[str, str] = {}  # in the file, where it is another

    def read(name: str) -> Tensor:
        name = own_name.get(name, name)
        return where[name].get_tensor(name)

    embed, head = f"{HF['embed']}.weight", f"{HF['head']}.weight"
    if config.tie_embeddings and head in shapes:
        if embed not in shapes:  # one matrix, under its other name
            own_name[embed], shapes[embed] = head, shapes[head]
        elif not torch.equal(read(head), read(embed)):  # a copy is harmless, a second matrix is not
            raise ValueError(f"tie_word_embeddings is true, but {head} is not {embed}")
        del shapes[head]
    tokenizer = vocabulary.from_folder(path, settings, config.vocab_size)
    model = build(config, HF, shapes, read, device, dtype)
    model.exits = tuple(exits)
    add_exit_heads(model, path / "exits.safetensors")
    return model, tokenizer


def add_exit_heads(model: Llama, path: Path) -> None:
    """Give the model the exit heads in the file, if there is one."""
    config, weight = model.config, model.embed.weight
    tensors: dict[int, dict[str, Tensor]] = {}
    for name, t in load_file(path).items() if path.is_file() else ():
        exit, _, part = name.partition(".")
        if not exit.isdecimal() or not 0 < int(exit) < config.n_layers:
            raise ValueError(
                f"{path.name}: {name} belongs to no exit between 1 and {config.n_layers - 1}"
            )
        tensors.setdefault(int(exit), {})[part] = t
    for depth, parts in sorted(tensors.items()):
        width = parts["block.mlp.down.weight"].shape[1] if "block.mlp.down.weight" in parts else 0
        head = ExitHead(config, width, parts["vocab"].tolist() if "vocab" in parts else None)
        try:
            head.load_state_dict(parts)
        except RuntimeError as error:  # torch names each missing, unexpected or misshapen tensor
            raise ValueError(f"{path.name}, exit {depth}: {error}") from error
        model.exit_heads[str(depth)] = (
            head.to(weight.device, weight.dtype).requires_grad_(False).eval()
        )


def save(model: Llama, tokenizer: Tokenizer | None, folder: str | os.PathLike) -> None:
    """Write a Hugging Face Llama folder; `load` in the same dtype gives back every bit.

    Beyond what transformers reads, config.json lists `exits`, and exits.safetensors holds the heads
    they own: {exit}.norm.weight, {exit}.vocab, and their blocks' weights as
    {exit}.block.attn.qkv.weight and so on. Each file appears whole or not at all, config.json last;
    a part the model lacks is removed from an earlier save.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    weights = {}
    for ours, parts in layout(model.config, HF).items():
        rows = [shape[0] for _, shape in parts]
        for (name, _), part in zip(parts, state[ours].split(rows)):
            weights[name] = part.clone()  # safetensors refuses views of one storage
    heads = {
        key.removeprefix("exit_heads."): t
        for key, t in state.items()
        if key.startswith("exit_heads.")
    }
    write_whole(
        folder / "model.safetensors", lambda to: save_file(weights, to, metadata={"format": "pt"})
    )
    write_whole(folder / "exits.safetensors", (lambda to: save_file(heads, to)) if heads else None)
    files: dict[str, str | None] = dict.fromkeys(TEXT_FILES)
    if tokenizer is not None:
        files |= vocabulary.to_files(tokenizer, model.config.vocab_size)
    files["config.json"] = json.dumps(_config_to_hf(model, tokenizer), indent=1)
    for name, content in files.items():
        write_whole(folder / name, None if content is None else partial(_write, content))


def _write(content: str, to: Path) -> None:
    to.write_text(content, "utf-8")


def _config_from_hf(c: dict) -> Config:
    if c.get("model_type") != "llama":
        raise ValueError(f"model_type {c.get('model_type')!r} is not supported, only 'llama'")
    rope = (
        c.get("rope_scaling") or c.get("rope_parameters") or {}
    )  # before and since transformers 5
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    only = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False,
        "quantization_config": None, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    for key, value in only.items():
        if (got := c.get(key, rope.get(key))) not in (None, value):
            raise ValueError(
                f"{key} {got!r} is not supported"
                + (f", only {value!r}" if value is not None else "")
            )
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"RoPE scaling {kind!r} is not supported, only 'default', 'linear' and 'llama3'"
        )
    context = c.get("max_position_embeddings", 2048)
    scaling = linear(need(rope, "factor"), context) if kind == "linear" else None
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(*(need(rope, key) for key in keys))
    heads = need(c, "num_attention_heads")
    return Config(  # the defaults are those of transformers' LlamaConfig
        vocab_size=need(c, "vocab_size"),
        dim=need(c, "hidden_size"),
        n_layers=need(c, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=c.get("num_key_value_heads") or heads,
        ffn_dim=need(c, "intermediate_size"),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10_000.0)),
        norm_eps=c.get("rms_norm_eps", 1e-6),
        max_seq_len=context,
        tie_embeddings=c.get("tie_word_embeddings", False),
        rope_scaling=scaling,
        head_dim=c.get("head_dim") or 0,
    )


def _config_to_hf(model: Llama, tokenizer: Tokenizer | None) -> dict:
    c, scaling = model.config, model.config.rope_scaling
    rope = None
    if scaling is not None and scaling == linear(scaling.factor, c.max_seq_len):
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "rope_theta": c.rope_theta,  # the older spelling, read before and since transformers 5
        "rope_scaling": rope,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos[0] if tokenizer and tokenizer.bos else None,
        "eos_token_id": list(tokenizer.stop) if tokenizer else None,
        "exits": list(model.exits),
    }
