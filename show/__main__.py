"""Watch a ladder decode: python -m show "a prompt"

Each token has the colour of the level that wrote it: a draft that every deeper level accepted, the
correction or bonus of a level in between, the full model's own. Drafts that fell are struck
through, in red, where they stood. The text appears as the full model settles it; --pause waits for
Enter before each of its verifications. Without a terminal, or with NO_COLOR set, the plain text is
printed. --html also writes a web page that plays it back.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from checkpoints import load
from checkpoints.files import describe, must_be_writable
from hispec import Event, generate
from lab.commands import Parser, check_exits, command
from lab.tune import default_exits, kept_threads
from show import page
from show.terminal import PLAIN, Painter, statistics


def main() -> None:
    args = parse_arguments()
    model, tokenizer = load(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and the prompt is text")
    exits = default_exits(model)[:2] if args.exits is None else tuple(args.exits)
    check_exits(exits, 0, model.config.n_layers)  # again, now that the depth is known
    doubling = [2 ** (k + 1) for k in range(len(exits))]
    windows = doubling if args.windows is None else args.windows
    weight = model.embed.weight
    if not weight.is_cuda:
        header = {"step": "plain", **describe(args.model, weight.device, weight.dtype)}
        torch.set_num_threads(kept_threads(header, model))

    painter, events = Painter(exits, tokenizer.spell), []

    def watch(event: Event) -> None:
        events.append(event)
        piece = painter.see(event)
        if piece is None or not coloured():
            return
        if args.pause:
            input()
        print(piece, end="", flush=True)

    if coloured():
        print(painter.legend())
    if args.chat == "never":
        tokenizer.template = None
    prompt = tokenizer.chat([args.prompt])
    print("prompt:", tokenizer.prompt)
    out = generate(
        model, prompt, args.max_new_tokens, exits=exits, windows=windows, seed=args.seed,
        temperature=args.temperature, stop=tokenizer.stop,
        watch=watch if coloured() or args.html else None,
    )  # fmt: skip
    rest = painter.characters.decode(b"", final=True)
    print(rest if coloured() else tokenizer.decode(out.tokens))
    print(statistics(out))
    if args.html:
        depths = (*exits, model.config.n_layers)
        trace = page.trace(args.model, args.prompt, prompt, depths, events, tokenizer.decode)
        page.write(args.html, trace)
        print(f"to play it back: {args.html}")


def parse_arguments() -> argparse.Namespace:
    """What is asked. Raises ValueError for what is seen to be wrong before a model is loaded."""
    parser = Parser(prog="python -m show", description=__doc__)
    add = parser.add_argument
    add("prompt", help="what the model is asked")
    models = "tiny, smollm2, a folder or owner/name of Hugging Face's, or a .gguf file"
    add("--model", default="tiny", help=models)
    plain = "never: plain text, whatever the model"
    add("--chat", choices=["auto", "never"], default="auto", help=plain)
    add("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default 64)")
    own = "the ladder's, 0 for a look-up; default: two of the model's"
    add("--exits", type=int, nargs="*", metavar="E", help=own)
    each = "tokens gathered at each exit; default: 2, 4, 8, ..."
    add("--windows", type=int, nargs="*", metavar="W", help=each)
    likeliest = "0 (default): the likeliest token"
    add("--temperature", type=float, default=0.0, metavar="T", help=likeliest)
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    pause = "wait for Enter before each verification by the full model"
    add("--pause", action="store_true", help=pause)
    back = "also write a web page that plays the generation back"
    add("--html", type=Path, metavar="FILE", help=back)
    args = parser.parse_args()
    if args.exits is not None:
        check_exits(args.exits, 0)
    if args.html:
        must_be_writable(args.html)  # said now, not when everything is generated
    return args


def coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


if __name__ == "__main__":
    command(main, f"{PLAIN if coloured() else ''}stopped")
