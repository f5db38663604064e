"""Watch a ladder decode: python hispec.py "a prompt"

Each token has the colour of the level that wrote it: a draft that every deeper level accepted, the correction or
bonus of a level in between, the full model's own. Drafts that fell are struck through, in red, where they stood.
The text appears as the full model settles it; --step waits for Enter before each of its verifications.
Without a terminal, or with NO_COLOR set, the plain text is printed. --html also writes a web page that plays it back.
"""

import argparse
import codecs
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import page
from checkpoints import load
from checkpoints.files import must_be_writable
from hispec import Event, Generation, generate
from tune import best_threads, default_exits

COLOURS = ("\033[36m", "\033[33m", "\033[35m", "\033[34m")  # by level: cyan, yellow, magenta, blue
FULL, FALLEN, PLAIN = "\033[1;32m", "\033[9;31m", "\033[0m"  # bold green; struck through, red


class Painter:
    """Turns the events of a generation into coloured text, a piece for each verification by the full model.

    exits: the ladder's. spell: a token id to its bytes; a character that several tokens spell waits for its last byte.
    """

    def __init__(self, exits: tuple[int, ...], spell: Callable[[int], bytes]):
        self.exits, self.spell = exits, spell
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.colours = (*(COLOURS[k % len(COLOURS)] for k in range(len(exits))), FULL)
        self.writers: dict[int, int] = {}  # position -> the level whose own token stands there
        self.fallen: dict[int, list[list[int]]] = {}  # position -> the drafts that were rejected from there on

    def see(self, event: Event) -> str | None:
        """Take one event; the text it settles, coloured, if it is the full model's, else None."""
        end = event.base + len(event.text)
        if event.kept < len(event.drafts):
            self.fallen.setdefault(event.base + event.kept, []).append(event.drafts[event.kept :])
        if event.level == 1 and self.exits[0] == 0:  # a look-up has no events of its own
            self.writers.update(dict.fromkeys(range(event.base, end), 0))
        if event.kept < len(event.text):
            self.writers[end - 1] = event.level
        if event.level < len(self.exits):
            return None
        pieces = []
        for position, token in zip(range(event.base, end), event.text, strict=True):
            for drafts in self.fallen.pop(position, []):
                pieces.append(FALLEN + b"".join(map(self.spell, drafts)).decode("utf-8", "replace") + PLAIN)
            pieces.append(self.colours[self.writers[position]] + self.characters.decode(self.spell(token)) + PLAIN)
        self.fallen.clear()
        return "".join(pieces)

    def legend(self) -> str:
        names = ["look-up" if exit == 0 else f"exit {exit}" for exit in self.exits] + ["full model"]
        return "  ".join(colour + name + PLAIN for colour, name in zip(self.colours, names, strict=True))


def statistics(out: Generation) -> str:
    """One line on a generation: speed, tokens a full pass, and how many drafts each level had accepted."""
    full = out.levels[-1]
    kept = ", ".join(f"exit {s.exit} {s.accepted}/{s.proposed}" for s in out.levels[:-1])
    speed = len(out.tokens) / out.seconds
    passes = f"{len(out.tokens)} tokens in {full.calls} full passes, {speed:.1f} tokens/s"
    return f"{passes}; accepted: {kept}" if kept else passes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python hispec.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", help="what the model is asked")
    parser.add_argument(
        "--model", default="tiny", help="tiny, smollm2, a folder or owner/name of Hugging Face's, or a .gguf file"
    )
    parser.add_argument(
        "--chat", choices=["auto", "never"], default="auto", help="never: plain text, whatever the model"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="write so many at most (default 64)"
    )
    parser.add_argument(
        "--exits", type=int, nargs="*", metavar="E", help="the ladder's, 0 for a look-up; default: two of the model's"
    )
    parser.add_argument(
        "--windows", type=int, nargs="*", metavar="W", help="tokens gathered at each exit; default: 2, 4, 8, ..."
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    parser.add_argument("--step", action="store_true", help="wait for Enter before each verification by the full model")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a web page that plays the generation back"
    )
    args = parser.parse_args()
    try:
        show(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{PLAIN if coloured() else ''}\nstopped")


def coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def show(args: argparse.Namespace) -> None:
    if args.html:
        must_be_writable(args.html)  # said now, not when everything is generated
    model, tokenizer = load(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and the prompt is text")
    if not torch.cuda.is_available():
        torch.set_num_threads(best_threads(model))
    exits = default_exits(model)[:2] if args.exits is None else tuple(args.exits)
    windows = tuple(2 ** (k + 1) for k in range(len(exits))) if args.windows is None else tuple(args.windows)
    if args.chat == "never":
        tokenizer.template = None
    prompt = tokenizer.chat([args.prompt])
    print("prompt:", tokenizer.prompt)
    painter, events = Painter(exits, tokenizer.spell), []

    def watch(event: Event) -> None:
        events.append(event)
        piece = painter.see(event)
        if piece is None or not coloured():
            return
        if args.step:
            input()
        print(piece, end="", flush=True)

    if coloured():
        print(painter.legend())
    out = generate(
        model, prompt, args.max_new_tokens, exits=exits, windows=windows, temperature=args.temperature,
        seed=args.seed, stop=tokenizer.stop, watch=watch if coloured() or args.html else None,
    )  # fmt: skip
    print(painter.characters.decode(b"", final=True) if coloured() else tokenizer.decode(out.tokens))
    print(statistics(out))
    if args.html:
        depths = (*exits, model.config.n_layers)
        page.write(args.html, page.trace(args.model, args.prompt, prompt, depths, events, tokenizer.decode))
        print(f"to play it back: {args.html}")
