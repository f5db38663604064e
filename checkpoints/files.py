"""Files that appear whole or not at all, and the setting of a run in words. Knows no format."""

import os
import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch


def write_whole(path: Path, fill: Callable[[Path], object] | None) -> None:
    """Let `fill` write the file under another name, then put it in place. None: remove the file."""
    if fill is None:
        return path.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(draft)
        os.replace(draft, path)
    except OSError as error:
        if error.errno is None:
            raise
        # the reader knows the file by its own name
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # the error to be told is the one before
            draft.unlink()


def must_be_writable(path: Path) -> None:
    """ValueError if `write_whole` cannot put a file there: to be said before long work."""
    try:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.touch()
        draft.unlink()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot write to {str(path)!r}: {why}") from None
    if path.is_dir():
        raise ValueError(f"cannot write to {str(path)!r}: it is a folder")


def describe(model: str, device: torch.device | str, dtype: torch.dtype) -> dict:
    """What a reader needs to repeat a measurement: machine, versions, the command running."""
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
