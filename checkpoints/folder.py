"""Reading and writing a Hugging Face folder: configuration, weights, trained exits, vocabulary."""

import json
import os
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import vocabulary
from checkpoints.families import ABSENT, CONFIG, FAMILIES, ONLY, family_of
from checkpoints.files import need, only, read_json, write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.weights import build, layout, linear
from model import Config, DraftHead, ExitHead, Llama, RopeScaling

ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_folder(
    path: Path, device: torch.device, dtype: torch.dtype, ranks=None
) -> tuple[Llama, Tokenizer | None]:
    if not (path / "config.json").is_file():
        raise ValueError("no config.json")
    settings = read_json(path / "config.json")
    config = _config(settings)
    exits, last = settings.get("exits", []), config.n_layers - 1
    if exits != sorted({e for e in exits if isinstance(e, int) and 1 <= e <= last}):
        raise ValueError(f"exits must rise strictly between 1 and {last}, got {exits}")
    tokenizer = vocabulary.from_folder(path, settings, config.vocab_size)
    files = [safe_open(file, framework="pt") for file in _weight_files(path)]
    # all tensors except a buffer of older transformers
    where = {
        key: file
        for file in files
        for key in file.keys()
        if not key.endswith("rotary_emb.inv_freq")
    }
    names = {name: name for name in where}
    if config.tie_embeddings and HEAD in names:
        names.setdefault(EMBED, HEAD)  # the single matrix may have either name
        a, b = (where[names[name]].get_tensor(names[name]) for name in (EMBED, HEAD))
        if not torch.equal(a, b):  # a copy is harmless, a second matrix is not
            raise ValueError(f"tie_word_embeddings is true, but {HEAD} is not {EMBED}")
        del names[HEAD]
    shapes = {name: tuple(where[key].get_slice(key).get_shape()) for name, key in names.items()}

    def read(name: str):
        file, key = where[names[name]], names[name]
        return file.get_slice(key) if ranks else file.get_tensor(key)

    model = build(config, shapes, read, device, dtype, ranks=ranks)
    model.exits, model.family = tuple(exits), settings["model_type"]
    add_heads(model, path, ranks)
    return model, tokenizer


def _weight_files(path: Path) -> list[Path]:
    """model.safetensors, or the shards that an index lists."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = read_json(path / "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values()))
    if not names:
        pickles = [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
        rule = f", only {pickles[0]}: weights are never from pickles" if pickles else ""
        raise ValueError(f"no model.safetensors, with or without an index{rule}")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"shard {absent[0]} is missing")
    return [path / name for name in names]


def add_heads(model: Llama, folder: Path, ranks=None) -> None:
    """Give the model the exit heads and the draft heads in the folder's files, if there are any."""
    c, file = ranks.whole if ranks else model.config, folder / "exits.safetensors"
    for exit, parts in _heads(file, c.n_layers - 1).items():
        down, vocab = parts.get("block.mlp.down.weight"), parts.get("vocab")
        width = 0 if down is None else down.shape[1]
        head = ExitHead(c, width, None if vocab is None else vocab.tolist())
        model.exit_heads[exit] = _filled(head, parts, model, f"{file.name}, exit {exit}", ranks)
    file = folder / "draft.safetensors"
    for exit, parts in _heads(file, c.n_layers).items():
        vocab = parts.get("out.vocab")
        draft = DraftHead(c, None if vocab is None else vocab.tolist())
        model.draft_heads[exit] = _filled(draft, parts, model, f"{file.name}, exit {exit}", ranks)


def _heads(path: Path, deepest: int) -> dict[str, dict[str, torch.Tensor]]:
    """Each exit's tensors in the file, by name, shallow to deep; none if there is no file."""
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for name, t in load_file(path).items() if path.is_file() else ():
        exit, _, part = name.partition(".")
        if not exit.isdecimal() or not 1 <= int(exit) <= deepest:
            raise ValueError(f"{path.name}: {name} belongs to no exit between 1 and {deepest}")
        heads.setdefault(str(int(exit)), {})[part] = t
    return dict(sorted(heads.items(), key=lambda head: int(head[0])))


def _filled(head: nn.Module, parts: dict, model: Llama, where: str, ranks) -> nn.Module:
    try:
        head.load_state_dict(parts)
    except RuntimeError as error:  # torch names each missing, unexpected or misshapen tensor
        raise ValueError(f"{where}: {error}") from error
    weight = model.embed.weight
    head.to(weight.device, weight.dtype).requires_grad_(False).eval()
    return ranks.share_layers(head) if ranks else head


def save(model: Llama, tokenizer: Tokenizer | None, folder: str | os.PathLike) -> None:
    """Write a Hugging Face folder of the model's family; `load` in its dtype gives back every bit.

    Beyond what transformers reads, config.json lists `exits`, exits.safetensors holds the exits'
    heads under names like 8.norm.weight, 8.vocab and 8.block.attn.qkv.weight, and draft.safetensors
    holds the draft heads (8.fuse.weight, 8.out.vocab). Each file appears whole or not at all,
    config.json last. Files of an earlier save that the model does not need are removed.
    """
    folder, name = Path(folder), family_of(model.config, model.family)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    weights: dict[str, torch.Tensor] = {}
    for ours, parts in layout(model.config):
        rows = state[ours].split([shape[0] for shape in parts.values()])
        weights |= {name: part.clone() for name, part in zip(parts, rows)}  # none may be a view
    write_whole(folder / "model.safetensors", lambda to: save_file(weights, to, {"format": "pt"}))
    for kind, heads in (("exits", model.exit_heads), ("draft", model.draft_heads)):
        write = partial(save_file, heads.state_dict()) if len(heads) else None
        write_whole(folder / f"{kind}.safetensors", write)
    texts: dict[str, str | None] = dict.fromkeys(["tokenizer.json", "tokenizer_config.json"])
    texts |= dict.fromkeys(["tokenizer.model", "special_tokens_map.json"])
    texts |= dict.fromkeys(["chat_template.jinja", "generation_config.json"])  # replaced by others
    if tokenizer is not None:
        texts |= vocabulary.to_files(tokenizer)
    c, scaling = model.config, model.config.rope_scaling
    family = FAMILIES[name]
    rope = scaling and {"rope_type": "llama3", **dict(zip(ROPE, astuple(scaling)))}
    if scaling and scaling == linear(scaling.factor, c.max_seq_len):
        rope = {"rope_type": "linear", "factor": scaling.factor}
    settings = {
        "architectures": [family.architecture],
        "model_type": name,
        **{key: getattr(c, ours) for ours, key in CONFIG.items()},
        **family.only,
        "rope_scaling": rope,  # the older spelling, read before and since transformers 5
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos[0] if tokenizer and tokenizer.bos else None,
        "eos_token_id": list(tokenizer.stop) if tokenizer and tokenizer.stop else None,
        "exits": list(model.exits),
    }
    texts["config.json"] = json.dumps(settings, indent=1)
    for file, text in texts.items():
        write_whole(folder / file, text)


def _config(settings: dict) -> Config:
    only("model_type", settings.get("model_type"), *FAMILIES)
    family = FAMILIES[settings["model_type"]]
    classes = settings.get("architectures") or [family.architecture]
    only("architectures", classes, [family.architecture])
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, got {rope!r}")
    said: dict[str, Any] = {"num_key_value_heads": settings.get("num_attention_heads"), **ABSENT}
    said |= {k: v for k, v in {**family.absent, **settings, **rope}.items() if v is not None}
    for key, value in {**ONLY, **family.only}.items():
        only(key, said.get(key, value), value)
    for kind in said.get("layer_types", ()):
        only("layer_types", kind, "full_attention")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    only("RoPE scaling", kind, "default", "linear", "llama3")
    for key in rope:
        only("RoPE setting", key, *ROPE, "rope_type", "type", "rope_theta", "partial_rotary_factor")
    if kind == "default" and "factor" in rope:
        raise ValueError("RoPE scaling has a factor, but no type")
    if kind == "linear":
        scaling = linear(need(rope, "factor"), said["max_position_embeddings"])
    elif kind == "llama3":
        scaling = RopeScaling(*(need(rope, key) for key in ROPE))
    own = {ours: need(said, key) for ours, key in CONFIG.items()}
    own |= {"qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}
    return Config(**own, rope_scaling=scaling)
