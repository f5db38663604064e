"""Shared by the commands: they refuse early, report an error in one line, and print safely."""

import argparse
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints.files import must_be_writable


class Parser(argparse.ArgumentParser):
    """Wrong options raise ValueError, like every other error; the usage is shown only by --help."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise ValueError(message)


def command(main: Callable[[], None], stopped: str) -> None:
    """Run a command. An error ends it with one line, and an interruption with the line `stopped`.

    A character that the terminal's encoding does not have is escaped. If nobody reads the output
    any more, the command ends quietly.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        fall_silent()
    except (ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        sys.exit(visible("error: " + "; ".join(lines)))
    except KeyboardInterrupt:
        sys.exit(f"\n{stopped}")


def say(*words: object, sep: str = " ", keep_going: bool = False) -> None:
    """Print a line at once, in a form that is safe to show on a terminal.

    If nobody reads the output any more: with keep_going print nothing from now on; otherwise raise
    BrokenPipeError, which ends a command.
    """
    try:
        print(visible(sep.join(map(str, words))), flush=True)
    except BrokenPipeError:
        fall_silent()
        if not keep_going:
            raise


def fall_silent() -> None:
    """Print to nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def visible(text: str) -> str:
    """The text, with visible signs for characters that would move a cursor, change colours or
    reverse the line's direction. A newline and a tab are left as they are.
    """
    return "".join(c if c in "\n\t" or not moves(c) else sign(c) for c in text)


def moves(c: str) -> bool:
    directions = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in directions


def sign(c: str) -> str:
    """Return ␛ for ESC and so on; a number for a character of which Unicode has no picture."""
    code = ord(c)
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"⟨U+{code:04X}⟩"


def coloured() -> bool:
    """Whether to print in colour: to a terminal, unless NO_COLOR is set to something."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def check_exits(exits: Sequence[int], shallowest: int, depth: int | None = None) -> None:
    """ValueError unless the exits ascend within a model of `depth` layers (None: not known yet)."""
    ascend = all(a < b for a, b in zip((shallowest - 1, *exits), exits))
    if not ascend or (depth is not None and exits and exits[-1] >= depth):
        within = f"within {shallowest}..{depth - 1}" if depth else f"from {shallowest} on"
        raise ValueError(f"exits must ascend strictly {within}, got {tuple(exits)}")


def must_take_files(folder: Path) -> None:
    """ValueError if no file can be written there. To be called before long work.

    The folder need not exist yet. If the check has to create it, it is removed again.
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
    """Rows as aligned columns. A first cell longer than `first` characters gets its own line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows if len(row[0]) <= first)
    lines: list[str] = []
    for head, *cells in rows:
        if len(head) > widths[0]:
            lines, head = [*lines, head], ""
        padded = [cell.ljust(width) for cell, width in zip((head, *cells), widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
