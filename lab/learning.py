"""Plot what draft heads have learned against the number of tokens they were trained on.

    python -m lab.learning runs/h8 runs/h32 --out results/draft-heads

Each folder is one that a training wrote: learning.csv has the agreement of each draft in a row with
the exit that the head reads. --out is the figure's name, without .png and .svg.
"""

import csv
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from checkpoints.console import Parser, command
from checkpoints.files import describe
from lab.plots import COLOURS, draw

STYLES = ("o-", "s--", "^:")


def main() -> None:
    parser = Parser(prog="python -m lab.learning", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME")
    args = parser.parse_args()
    found = {folder.name: read(folder) for folder in args.runs}
    header = describe("draft heads", "cpu", torch.bfloat16)
    draw(args.out, partial(plot, found=found), header)


def read(folder: Path) -> dict[str, list[float]]:
    """The columns of learning.csv. ValueError if there is none."""
    try:
        with (folder / "learning.csv").open() as file:
            rows = list(csv.DictReader(file))
    except OSError:
        raise ValueError(f"no training wrote {folder}: it has no learning.csv") from None
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def plot(figure: Figure, found: dict[str, dict[str, list[float]]]) -> str:
    axes = figure.subplots()
    for (run, columns), colour in zip(found.items(), COLOURS):
        tokens = [n / 1e6 for n in columns["tokens"]]
        drafts = [name for name in columns if name not in ("tokens", "loss")]
        for name, style in zip(drafts, STYLES):
            shares = [100 * share for share in columns[name]]
            axes.plot(tokens, shares, style, color=colour, label=f"{run}, {name}")
    axes.set(xlabel="million tokens trained on", ylabel="same token as the exit (%)", ylim=(0, 100))
    axes.legend()
    return (
        "On held-out text: how often each draft in a row is the token that the head's exit picks."
    )


if __name__ == "__main__":
    command(main, "stopped")
