"""Watch a ladder decode: python -m show "a prompt"

Each token has the colour of the level that wrote it: a draft that every deeper level accepted, the
correction or bonus of a level in between, the full model's own. Drafts that fell are struck
through, in red, where they stood, with the level that rejected them behind. The text appears as the
full model settles it; --pause waits for Enter before it shows what was settled, and the speeds are
without these waits. Without a terminal, or with NO_COLOR set, the plain text is printed. --html
also writes a web page that plays it back.

The ladder is HiSpec's that `python bench.py --tune` found for the model, or the fastest of any kind
where that loses; where none was found, two of the model's exits.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from arguments import Event, Generation, Options, ladder_text
from checkpoints import load
from checkpoints.console import Parser, coloured, command, say, visible
from checkpoints.files import describe, must_be_writable
from checkpoints.ladders import Ladder, default_exits, kept_dtype, kept_ladder, kept_threads
from checkpoints.tokenizer import Tokenizer
from hispec import Step, generate
from model import Llama
from show import page
from show.terminal import DIM, PLAIN, Painter, statistics

try:
    import fast
except ModuleNotFoundError:  # the wing is not there: every pass is plain
    fast = None  # type: ignore[assignment]

FIRST = 16  # tokens by which the full model's speed without a ladder is measured


def main() -> None:
    args = parse_arguments()
    tell = partial(say, keep_going=bool(args.html))  # the page is written though nobody reads on
    model, tokenizer, header = loaded(args)
    ladder, why = choose(args.exits, args.windows, model, header)
    prompt = tokenizer.chat([args.prompt])
    step = make_step(model, len(prompt) + args.max_new_tokens)
    tell(f"{header['model']} in {header['dtype']} on {header['device']}")
    tell("prompt:", tokenizer.prompt)
    if tokenizer.template is None and args.prompt[-1:].isspace():
        tell("it ends in a blank or a new line, after which some models go on badly: leave it out")
    tell(f"ladder: {ladder_text(*ladder) or 'none'}, {why}")

    alone: Callable[..., Generation] = partial(
        generate, model, prompt, stop=tokenizer.stop, fast=step, **sampling(args)
    )
    exits, windows, thresholds = ladder
    run: Callable[..., Generation] = partial(
        alone, exits=exits, windows=windows, thresholds=thresholds
    )
    run(2)  # the first passes of a process are slower than all that follow
    painter, colour = Painter(exits, tokenizer.spell), coloured()
    watcher = Watcher(painter if colour else None, args.pause)
    if colour:
        print(painter.legend())
        follows = tokenizer.decode(prompt).endswith(args.prompt)  # no chat format stands between
        print(DIM + visible(args.prompt) + PLAIN, end="" if follows else "\n", flush=True)
    out = run(args.max_new_tokens, watch=watcher if colour or args.html else None)
    out.seconds -= watcher.waited
    tell(painter.rest() if colour else tokenizer.decode(out.tokens, after=prompt))

    greedy: list[Event] = []
    if args.html:
        one = alone(args.max_new_tokens, watch=greedy.append)
        depths, sampled = (*exits, model.config.n_layers), args.temperature > 0
        trace = page.trace(
            args.model, args.prompt, prompt, depths, windows, watcher.events, greedy,
            tokenizer.spell, sampled,
        )  # fmt: skip
        page.write(args.html, trace)
    else:
        one = alone(min(FIRST, args.max_new_tokens))
    tell("\n".join(statistics(out, one, "plain" if args.temperature > 0 else "greedy")))
    if args.html:
        tell(f"to play it back: {args.html}")


class Watcher:
    """Keeps the events of a generation, and prints what they settle if it has a painter."""

    def __init__(self, painter: Painter | None, pause: bool):
        self.painter, self.pause = painter, pause
        self.events: list[Event] = []
        self.waited = 0.0  # seconds, for Enter

    def __call__(self, event: Event) -> None:
        self.events.append(replace(event, seconds=event.seconds - self.waited))
        piece = self.painter.see(event) if self.painter else None
        if piece is None:
            return
        if self.pause:
            began = time.perf_counter()
            with suppress(EOFError):  # nobody there
                input()
            self.waited += time.perf_counter() - began
        print(piece, end="", flush=True)


def loaded(args: argparse.Namespace) -> tuple[Llama, Tokenizer, dict]:
    """The model in the dtype that is faster here, its tokenizer, and what files say of a run."""
    model, tokenizer = load(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and the prompt is text")
    if args.chat == "never":
        tokenizer.template = None
    Options(tuple(args.exits or ()), (1,) * len(args.exits or ())).check_model(model.config)
    weight = model.embed.weight
    name = model.fast.name if model.fast else "rounds" if fast and weight.is_cuda else "plain"
    header = {"step": name, **describe(args.model, weight.device, weight.dtype)}
    if not weight.is_cuda:
        if model.fast:
            header["dtype"] = kept_dtype(header, lambda dtype: load_as(args.model, dtype))
            if header["dtype"] != str(weight.dtype).removeprefix("torch."):
                model = load_as(args.model, header["dtype"])
        torch.set_num_threads(kept_threads(header, model))
    return model, tokenizer, header


def load_as(name: str, dtype: str) -> Llama:
    return load(name, dtype=getattr(torch, dtype))[0]


def make_step(model: Llama, room: int) -> Step:
    """The fastest that starts at once, for texts of at most `room` tokens."""
    if model.embed.weight.is_cuda and fast:
        return fast.step_for(model, min(room, model.config.max_seq_len), compiled=False)
    return model.fast or Step(model)


def choose(exits, windows, model: Llama, header: dict) -> tuple[Ladder, str]:
    """The ladder asked for, or the one tuning found, or two of the model's exits; and why."""
    if exits is None and windows is None and (kept := kept_ladder(header, model)):
        return kept
    why = "as asked" if exits is not None else "the model's own exits"
    exits = default_exits(model)[:2] if exits is None else tuple(exits)
    windows = windows or [2 ** (k + 1) for k in range(len(exits))]
    return (exits, tuple(windows), (0.0,) * len(exits)), why


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
    own = "0 for a look-up; default: the kept ladder's, or two of the model's"
    add("--exits", type=int, nargs="*", metavar="E", help=own)
    each = "tokens gathered at each exit; default: the kept ladder's, or 2, 4, 8, ..."
    add("--windows", type=int, nargs="*", metavar="W", help=each)
    likeliest = "0 (default): the likeliest token"
    add("--temperature", type=float, default=0.0, metavar="T", help=likeliest)
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (0: all)")
    fewest = "sample from the fewest that hold P of the probability (default 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=fewest)
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    pause = "wait for Enter before showing what the full model settled"
    add("--pause", action="store_true", help=pause)
    back = "also write a web page that plays the generation back"
    add("--html", type=Path, metavar="FILE", help=back)
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {args.max_new_tokens}")
    # windows alone are those of two exits, though it is not yet known which
    exits = (0, 1) if args.exits is None and args.windows is not None else args.exits or ()
    windows = [1] * len(exits) if args.windows is None else args.windows
    Options(tuple(exits), tuple(windows), **sampling(args))
    if args.html:
        must_be_writable(args.html)  # said now, not when everything is generated
    return args


def sampling(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}


if __name__ == "__main__":
    command(main, f"{PLAIN if coloured() else ''}stopped")
