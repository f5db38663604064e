"""Photograph a page in a real browser, light and dark: python -m show.picture PAGE --out DIR

PAGE was written by `python -m show "a prompt" --html PAGE`. DIR/page-light.png and
DIR/page-dark.png show its run after one event, or its cost model with --at formula. This needs a
browser, and Pillow, which comes with matplotlib.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from checkpoints.console import Parser, command, must_take_files, say

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
SCHEMES = {"dark": 0, "light": 1}  # the browser's numbers for them


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(address: str, scheme: str, size: str, *options: str) -> subprocess.CompletedProcess:
    """Open an address without a window, in light or dark colours, in a separate profile.

    The process may fail. Raises ValueError if there is no browser.
    """
    if (browser := find_browser()) is None:
        raise ValueError(f"no browser found, none of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        colours = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        where = [f"--user-data-dir={profile}", f"--window-size={size}"]
        run = [browser, *QUIET, colours, *where, *options, address]
        return subprocess.run(run, capture_output=True, text=True, encoding="utf-8", timeout=200)


def main() -> None:
    parser = Parser(prog="python -m show.picture", description=__doc__)
    args = arguments(parser)
    must_take_files(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        picture = args.out / f"page-{scheme}.png"
        address = f"{args.page.resolve(strict=True).as_uri()}#{args.at}"
        run = browse(address, scheme, args.size, f"--screenshot={picture.resolve()}")
        if run.returncode or not picture.exists():
            raise ValueError(f"the browser failed: {run.stderr.strip()[-300:]}")
        Image.open(picture).quantize(128).save(picture, optimize=True)  # a third of the bytes
        say(picture)


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("page", type=Path, help="the page to photograph")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the pictures")
    parser.add_argument("--at", default="formula", help="an event's number, or formula (default)")
    parser.add_argument("--size", default="1200,980", metavar="W,H", help="default 1200,980")
    return parser.parse_args()


if __name__ == "__main__":
    command(main, "stopped")
