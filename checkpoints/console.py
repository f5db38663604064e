"""What the commands share: they look at what was asked first, and say what is wrong in one line."""

import argparse
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
