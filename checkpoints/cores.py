"""How many threads can run at once on this machine."""

import math
import os
from pathlib import Path


def cores(own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many threads can run at once here: OMP_NUM_THREADS, if it is set.

    Otherwise the number of cores that this process may run on, or fewer if its control group
    (version 1 or 2) or a parent of it has a quota of processor time. own, groups: the files in
    which Linux reports this.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a list has a number per nesting
    if said.isdecimal() and int(said) > 0:
        return int(said)
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            base = groups / controllers if controllers else groups
            folders = [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]
            for folder in folders[: folders.index(base) + 1]:
                count = min(count, quota(folder) or count)
    return count


def quota(folder: Path) -> int | None:
    """How many cores a control group's quota of time amounts to, rounded up; None: no limit."""
    try:
        if (folder / "cpu.max").exists():
            time_, period = (folder / "cpu.max").read_text().split()
        else:
            time_, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
    except (OSError, ValueError):
        return None
    return None if time_ in ("max", "-1") else max(1, math.ceil(int(time_) / int(period)))
