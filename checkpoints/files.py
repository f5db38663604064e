"""Writing files whole or not at all, reading JSON, refusing, and describing a run's setting."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def write_whole(path: Path, fill: str | Callable[[Path], object] | None) -> None:
    """Write a text, or let `fill` write, under another name; then move the file into place.

    fill None: remove the file. If path is a link, the file that it points to is replaced.
    """
    if fill is None:
        return path.unlink(missing_ok=True)
    place, draft = place_and_draft(path)
    try:
        draft.touch()
        mode = draft.stat().st_mode  # safetensors would make it readable by its owner alone
        if isinstance(fill, str):
            draft.write_text(fill, "utf-8")
        else:
            fill(draft)
        draft.chmod(mode)
        os.replace(draft, place)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise
        # name the file that the caller asked for
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # an earlier error is the one to report
            draft.unlink()


def must_be_writable(path: Path) -> None:
    """ValueError if `write_whole` cannot put a file there. To be called before long work."""
    try:
        place, draft = place_and_draft(path)
        draft.touch()
        draft.unlink()
        if place.exists() and not place.is_file():
            raise ValueError("it is a folder" if place.is_dir() else "it is no ordinary file")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise ValueError(f"cannot write to {str(path)!r}: {why}") from None


def place_and_draft(path: Path) -> tuple[Path, Path]:
    """The file that a path leads to, and the name next to it under which to write first."""
    place = Path(os.path.realpath(path))
    return place, place.with_name(f".{place.name}.{os.getpid()}")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file that a run has left. ValueError if it is damaged or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another kind ({error})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file, or an empty one if there is no such file."""
    try:
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def need(values: dict, key: str) -> Any:
    if values.get(key) is None:
        raise ValueError(f"{key} is missing")
    return values[key]


def only(what: str, got: object, *supported: object) -> None:
    """ValueError if a file asks for anything else."""
    if got not in supported:
        raise ValueError(f"{what} {got!r} is not supported, only {', '.join(map(repr, supported))}")


def describe(model: str, device: torch.device | str, dtype: torch.dtype) -> dict:
    """What one needs to repeat a measurement: the machine, versions, and the command."""
    device = torch.device(device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        hardware = f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda} if torch.version.cuda else {}
    versions |= {package: metadata.version(package) for package in ("numpy", "tiktoken")}
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if processes == "1" else ["torchrun", f"--nproc_per_node={processes}"]
    return {
        "device": hardware,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "model": model,
        "versions": versions,
        "command": shlex.join([*launcher, *program(), *sys.argv[1:]]),
    }


def program() -> list[str]:
    """The running program, as one types it after `python`: a file, or -m and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        return ["-m", spec.name.removesuffix(".__main__")]
    return [os.path.basename(sys.argv[0])]


def in_words(header: dict) -> str:
    """What `describe` returns, without the command, as a line below a figure."""
    versions = ", ".join(f"{package} {version}" for package, version in header["versions"].items())
    return "{model}, {dtype}, {device}, threads: {threads}; ".format(**header) + versions
