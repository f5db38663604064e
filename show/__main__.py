"""Watch a ladder decode: python -m show "a prompt"

Each token has the colour of the level that wrote it: a draft that every deeper level accepted, a
correction or bonus by a middle level, or the full model's own token. Rejected drafts stay in place,
struck through in red and followed by the level that rejected them. The text appears as the full
model settles it. --pause waits for Enter before each part appears; speeds do not count these waits.
Without a terminal, or with NO_COLOR set, plain text is printed. --html also writes a web page that
plays the generation back, next to other ladders on the same prompt.

--ladder takes a ladder in the notation of the bench, "2(2) 8(4)": draft with exit 2, check two
drafts at a time with exit 8, and four tokens with the full model. The default is HiSpec's ladder as
`python bench.py --tune` found it for the model, or if that is slower than greedy decoding, the
fastest ladder of any kind. If none was found, two of the model's exits are used.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from arguments import Event, Generation, Options, ladder_text, parse_ladder
from checkpoints import load
from checkpoints.console import Parser, coloured, command, say, visible
from checkpoints.files import describe, must_be_writable
from checkpoints.ladders import (
    as_options,
    default_exits,
    kept_dtype,
    kept_ladder,
    kept_ladders,
    kept_threads,
)
from checkpoints.tokenizer import Tokenizer
from hispec import Step, generate
from model import Llama
from show import page
from show.terminal import DIM, PLAIN, Painter, level_names, statistics

try:
    import fast
except ModuleNotFoundError:  # without fast/, every pass is plain
    fast = None  # type: ignore[assignment]

BESIDE = ("draft alone", "look-up, exit", "head, exit")  # tuned ladders also put on the page
FIRST = 16  # tokens from which the full model's speed without a ladder is measured


def main() -> None:
    args = parse_arguments()
    tell = partial(say, keep_going=bool(args.html))  # the page is written in any case
    model, tokenizer, header = loaded(args)
    drawn = sampling(args) | {"stop": tokenizer.stop}
    chosen, why = choose(args.ladder, model, header)
    ladders, plain = [replace(each, **drawn) for each in chosen], Options(**drawn)
    names = level_names(ladders[0])
    prompt = tokenizer.chat([args.prompt])
    step = make_step(model, len(prompt) + args.max_new_tokens)
    tell(f"{header['model']} in {header['dtype']} on {header['device']}")
    tell("prompt:", tokenizer.prompt)
    if tokenizer.template is None and args.prompt[-1:].isspace():
        tell("the prompt ends in white space, after which some models continue badly: leave it out")
    best = ladders[0]
    text = ladder_text(best.exits, best.windows, best.thresholds, best.draft_head)
    tell(f"ladder: {text}, {why}")

    def run(options: Options, tokens: int, watch: Callable | None = None) -> Generation:
        return generate(model, prompt, tokens, watch=watch, fast=step, **asdict(options))

    run(best, 2)  # a process's first passes are slower than later ones
    painter, colour = Painter(names, tokenizer.spell), coloured()
    watcher = Watcher(painter if colour else None, args.pause)
    if colour:
        print(painter.legend())
        follows = tokenizer.decode(prompt).endswith(args.prompt)  # no chat format in between
        print(DIM + visible(args.prompt) + PLAIN, end="" if follows else "\n", flush=True)
    out = run(best, args.max_new_tokens, watcher if colour or args.html else None)
    out.seconds -= watcher.waited
    tell(painter.rest() if colour else tokenizer.decode(out.tokens, after=prompt))

    greedy: list[Event] = []
    as_long = args.max_new_tokens if args.html else min(FIRST, args.max_new_tokens)
    one = run(plain, as_long, greedy.append)
    if args.html:
        recorded = [(best, watcher.events)]
        for ladder in ladders[1:]:
            events: list[Event] = []
            run(ladder, 2)
            run(ladder, args.max_new_tokens, events.append)
            recorded.append((ladder, events))
        about = args.model, model.config.n_layers, args.prompt
        page.write(args.html, page.trace(*about, prompt, recorded, greedy, tokenizer.spell))
    tell("\n".join(statistics(out, names, one, "plain" if args.temperature > 0 else "greedy")))
    if args.html:
        tell(f"to play it back: {args.html}")


class Watcher:
    """Keeps the events of a generation and, if it has a painter, prints the text they settle."""

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
            with suppress(EOFError):  # no one to press Enter
                input()
            self.waited += time.perf_counter() - began
        print(piece, end="", flush=True)


def loaded(args: argparse.Namespace) -> tuple[Llama, Tokenizer, dict]:
    """The model in the dtype that is faster here, its tokenizer, and the setting of the run."""
    model, tokenizer = load(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, which the prompt needs: it is text")
    if args.chat == "never":
        tokenizer.template = None
    for ladder in args.ladder:
        parse_ladder(ladder).check_model(model.config, list(map(int, model.draft_heads)))
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
    """The fastest step that starts without delay, for texts of at most `room` tokens."""
    if model.embed.weight.is_cuda and fast:
        return fast.step_for(model, min(room, model.config.max_seq_len), compiled=False)
    return model.fast or Step(model)


def choose(asked: list[str], model: Llama, header: dict) -> tuple[list[Options], str]:
    """Return the ladders asked for, or those of a tuning, or two of the model's exits; and why."""
    if asked:
        return [*map(parse_ladder, asked)], "as asked"
    if kept := kept_ladder(header, model):
        best, why = kept
        tuned, _ = kept_ladders(header, model)
        beside = [tuned[kind] for kind in BESIDE if kind in tuned]
        return [Options(**as_options(x)) for x in dict.fromkeys([best, *beside])], why
    return [Options(default_exits(model)[:2], (2, 4))], "the model's own exits"


def parse_arguments() -> argparse.Namespace:
    """Return the options. Raises ValueError for what is wrong, before a model is loaded."""
    parser = Parser(prog="python -m show", description=__doc__)
    add = parser.add_argument
    add("prompt", help="the text that the model answers or continues")
    models = "tiny, smollm2, a Hugging Face folder or owner/name, or a .gguf file"
    add("--model", default="tiny", help=models)
    plain = "never: plain text, even for a model that chats"
    add("--chat", choices=["auto", "never"], default="auto", help=plain)
    add("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default 64)")
    notation = "0: a look-up; 8': the draft head on exit 8; with --html may be repeated"
    add("--ladder", action="append", default=[], metavar="L", help=notation)
    likeliest = "0 (default): always take the likeliest token"
    add("--temperature", type=float, default=0.0, metavar="T", help=likeliest)
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (0: all)")
    fewest = "sample from the fewest tokens that hold P of the probability (default 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=fewest)
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    pause = "wait for Enter before showing the text that the full model settled"
    add("--pause", action="store_true", help=pause)
    back = "also write a web page that plays the generation back"
    add("--html", type=Path, metavar="FILE", help=back)
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {args.max_new_tokens}")
    for ladder in args.ladder or ["1(1)"]:
        replace(parse_ladder(ladder), **sampling(args))  # raises errors now
    if len(args.ladder) > 1 and not args.html:
        raise ValueError("several ladders are for a page, next to each other: --html FILE")
    if args.html:
        must_be_writable(args.html)  # raises an error now, not after generating
    return args


def sampling(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}


if __name__ == "__main__":
    command(main, f"{PLAIN if coloured() else ''}stopped")
