"""What the commands share: they refuse early, say what is wrong in one line, and print safely."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints.files import must_be_writable


class Parser(argparse.ArgumentParser):
    """Options that are wrong raise ValueError, as all that is wrong does; --help has the usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise ValueError(message)


def command(main: Callable[[], None], stopped: str) -> None:
    """Run a command. What is wrong is said on one line, and so is that it was interrupted."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit("error: " + "; ".join(line.strip() for line in str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(f"\n{stopped}")


def say(*words: object, sep: str = " ", keep_going: bool = False) -> None:
    """Print a line at once. If nobody reads any more: end quietly, or keep_going in silence."""
    try:
        print(*words, sep=sep, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not keep_going:
            raise SystemExit(0) from None


def check_exits(exits: Sequence[int], shallowest: int, depth: int | None = None) -> None:
    """ValueError unless the exits ascend within a model of `depth` layers, if that is known yet."""
    ascend = all(a < b for a, b in zip((shallowest - 1, *exits), exits))
    if not ascend or (depth is not None and exits and exits[-1] >= depth):
        within = f"within {shallowest}..{depth - 1}" if depth else f"from {shallowest} on"
        raise ValueError(f"exits must ascend strictly {within}, got {tuple(exits)}")


def must_take_files(folder: Path) -> None:
    """ValueError if no file can be written there: to be said before long work, not after it.

    The folder need not exist yet, and does not exist after this either.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        must_be_writable(folder / "a file")
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    finally:
        for each in made:
            if each.exists():
                each.rmdir()


def table(rows: list[list[str]], first: int = 100) -> str:
    """Columns side by side. A first cell of more than `first` characters has its line to itself."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows if len(row[0]) <= first)
    lines = []
    for head, *cells in rows:
        if len(head) > widths[0]:
            lines, head = [*lines, head], ""
        padded = [cell.ljust(width) for cell, width in zip((head, *cells), widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
