"""The ladders, threads and dtype that were found fastest, by model, dtype, step and processor.

Those that ship are in results/ladders.json. Those found on a user's machine go to a folder of their
own, $XDG_CACHE_HOME/hispec/ladders or ~/.cache/hispec/ladders, with one file per setting, so that
two runs at the same time lose nothing. If nothing was found on this machine, another's are used.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from arguments import Options
from checkpoints.console import must_take_files
from checkpoints.cores import cores
from checkpoints.files import must_be_writable, read_json, write_whole
from checkpoints.machine import best_threads, seconds_of_few
from model import Llama

SHIPPED = Path(__file__).parent.parent / "results" / "ladders.json"
# exits, windows, thresholds; a first exit of 0 is a look-up, of -8 the draft head on exit 8
Ladder = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]
OF_A_LADDER = ("exits", "windows", "thresholds", "draft_head")  # a ladder's keys in files


def as_ladder(options: Options) -> Ladder:
    exits, head = options.exits, options.draft_head
    return (-head, *exits[1:]) if head else exits, options.windows, options.thresholds


def as_options(ladder: Ladder) -> dict:
    """The ladder as options of `generate`, and as it is written to files."""
    exits, windows, thresholds = ladder
    options: dict = {"exits": exits, "windows": windows, "thresholds": thresholds}
    if exits and exits[0] < 0:
        options |= {"exits": (0, *exits[1:]), "draft_head": -exits[0]}
    return options


def default_exits(model: Llama) -> tuple[int, ...]:
    """The model's trained exits, or 1/8 and 1/4 of its depth. ValueError if there are not two."""
    depth = model.config.n_layers
    eighth, quarter = math.ceil(depth / 8), math.ceil(depth / 4)
    exits = model.exits or tuple(e for e in (eighth, max(quarter, eighth + 1)) if e < depth)
    if len(exits) < 2:
        raise ValueError(
            "HiSpec needs two exits below the full depth, "
            f"and this model of {depth} layers has {exits}"
        )
    return exits


# ---- what was found -----------------------------------------------------------------------------


def kept_ladders(
    header: dict, model: Llama, sampled: bool = False
) -> tuple[dict[str, Ladder], str]:
    """The ladders tuned for this model, by kind, and where they were tuned; ({}, "") if nowhere.

    All come from one tuning. One with exactly this setting comes first, this machine's before the
    shipped one. Then come other settings: those with the same dtype first, and among these those
    with the same step. Ladders that do not fit the model are skipped. sampled: take the ladders
    for sampled text, for the kinds that were also tuned for it.
    """
    for found, where in _found(header):
        if ladders := ladders_in(found, model, sampled):
            return ladders, where
    return {}, ""


def ladders_in(found: dict, model: Llama, sampled: bool = False) -> dict[str, Ladder]:
    """The ladders that one tuning found, by kind; arguments as for `kept_ladders`."""
    entries = found | (found.get("sampled", {}) if sampled else {})
    ladders = {name: _fitting(kept, model) for name, kept in entries.items()}
    return {name: ladder for name, ladder in ladders.items() if ladder}


def kept_ladder(header: dict, model: Llama) -> tuple[Ladder, str] | None:
    """HiSpec's tuned ladder, or if it is slower than greedy the fastest of any kind; and why.

    None if there is none.
    """
    for found, where in _found(header):
        known = [
            (kept["measured"], name, ladder)
            for name, kept in found.items()
            if (ladder := _fitting(kept, model)) and isinstance(kept.get("measured"), int | float)
        ]
        if known:
            wins = [x for x in known if x[1] == "hispec" and x[0] >= 1]
            speed, _, ladder = wins[0] if wins else max(known)
            return ladder, f"tuned on {where}, {speed:.2f}x greedy there"
    return None


def kept_threads(header: dict, model: Llama, anew: bool = False) -> int:
    """The best number of threads for this model, dtype, step and CPU.

    OMP_NUM_THREADS decides, if it is set. Otherwise the number is found once, which takes seconds,
    and kept; anew: find it again. The number never exceeds that of the cores.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return cores()
    threads = _of_this_machine(header).get("threads")
    if threads is not None and not (isinstance(threads, int) and threads > 0):
        raise ValueError(f"threads kept for {_key(header)} must be a whole number above 0")
    if threads is None or anew:
        threads = best_threads(model)
        _try_to_keep(header, {"threads": threads})
    return min(threads, cores())


def kept_dtype(header: dict, load: Callable[[str], Llama], anew: bool = False) -> str:
    """float32 or bfloat16, whichever decodes this model faster on this CPU.

    It is found once, with each dtype's best number of threads, and kept; anew: find it again. load:
    loads the model in a dtype.
    """
    either, names = header | {"dtype": "either dtype"}, ("float32", "bfloat16")
    dtype = _of_this_machine(either).get("dtype")
    if dtype is not None and dtype not in names:
        raise ValueError(f"dtype kept for {_key(either)} must be one of {', '.join(names)}")
    if dtype is None or anew:
        seconds = {}
        for name in names:
            model = load(name)
            torch.set_num_threads(kept_threads(header | {"dtype": name}, model, anew))
            seconds[name] = seconds_of_few(model)
        dtype = min(seconds, key=seconds.__getitem__)
        _try_to_keep(either, {"dtype": dtype})
    return dtype


# ---- where it is kept ---------------------------------------------------------------------------


def own_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hispec" / "ladders"


def must_be_keepable(ship: bool) -> None:
    """ValueError if `save_ladders` could not write. To be called before long work."""
    must_be_writable(SHIPPED) if ship else must_take_files(own_folder())


def save_ladders(header: dict, ladders: dict[str, dict], ship: bool = False) -> Path:
    """Keep the ladders tuned on this machine; ship: in results/ladders.json. Returns the file."""
    about = {key: header[key] for key in ("threads", "versions", "command")}
    return _keep(header, {**ladders, **about}, ship)


def _keep(header: dict, entry: dict, ship: bool = False) -> Path:
    """Add to the setting's entry; ship: replace the entry in results/ladders.json."""
    key = _key(header)
    file = SHIPPED if ship else _own_file(key)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent):
        found = _read(file)
        new = entry if ship else found.get(key, {}) | entry
        write_whole(file, json.dumps(found | {key: new}, indent=1) + "\n")
    return file


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes that take this lock, too, from writing in a folder."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_to_keep(header: dict, entry: dict) -> None:
    try:
        _keep(header, entry)
    except OSError:
        pass  # if it cannot be kept, it is found again each time


def _key(header: dict) -> str:
    return f"{header['model']}, {header['dtype']}, {header['step']} step, {header['device']}"


def _own_file(key: str) -> Path:
    """A file name made of the setting's words; a few digits tell apart settings that look alike."""
    words = re.sub(r"[^\w.]+", "-", key)[:100]
    return own_folder() / f"{words}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"


def _of_this_machine(header: dict) -> dict:
    key = _key(header)
    return _read(SHIPPED).get(key, {}) | _read(_own_file(key)).get(key, {})


def _found(header: dict) -> Iterator[tuple[dict, str]]:
    """The entries kept for this model and where each was found, the most similar setting first."""
    folder, key = own_folder(), _key(header)
    own = sorted(folder.glob("*.json")) if folder.is_dir() else []
    kept = []
    for file in (*own, SHIPPED):  # this machine's files come first among equals
        for setting, found in _read(file).items():
            if not setting.startswith(f"{header['model']}, "):
                continue
            dtype, step, device = setting.removeprefix(f"{header['model']}, ").split(", ", 2)
            where = f"{device} ({dtype}, {step})"
            if setting == key:
                where = "this machine" if file in own else f"a processor of this name ({device})"
            unlike = setting != key, dtype != header["dtype"], step != f"{header['step']} step"
            kept.append((unlike, where, found))
    for _, where, found in sorted(kept, key=lambda x: x[0]):
        yield found, where


def _fitting(kept: object, model: Llama) -> Ladder | None:
    """Return the ladder in an entry, or None if it has no valid one or one that does not fit."""
    try:
        ladder = Options(**{k: v for k, v in kept.items() if k in OF_A_LADDER})  # type: ignore
        ladder.check_model(model.config, list(map(int, model.draft_heads)))
        return as_ladder(ladder) if ladder.exits else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _read(file: Path) -> dict[str, dict]:
    try:
        found = read_json(file)
        for setting, entry in found.items():
            if not isinstance(entry, dict) or setting.count(", ") < 3:
                raise ValueError(f"{setting!r} is no setting with what was found for it")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it") from None
    return found
