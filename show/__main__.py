"""Watch a ladder decode: python -m show "a prompt"

Each token has the colour of the level that wrote it: a draft that every deeper level accepted, the
correction or bonus of a level in between, the full model's own. Drafts that fell are struck
through, in red, where they stood, with the level that rejected them behind. The text appears as the
full model settles it; --pause waits for Enter before it shows what was settled, and the speeds are
without these waits. Without a terminal, or with NO_COLOR set, the plain text is printed. --html
also writes a web page that plays it back.

The ladder is HiSpec's that `python bench.py --tune` kept for the model, or the fastest of any kind
where that loses; where none was kept, two of the model's exits.
"""

import argparse
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from arguments import Event, Options, ladder_text
from checkpoints import load
from checkpoints.console import Parser, check_exits, coloured, command
from checkpoints.files import describe, must_be_writable
from checkpoints.ladders import default_exits, kept_dtype, kept_ladder, kept_threads
from checkpoints.tokenizer import Tokenizer
from hispec import generate
from model import Config, Llama
from show import page
from show.terminal import DIM, PLAIN, Painter, statistics

FIRST = 16  # tokens by which the full model's speed without a ladder is measured


def main() -> None:
    args = parse_arguments()
    model, tokenizer, header = loaded(args)
    ladder, why = choose(args.exits, args.windows, model, header)
    if args.chat == "never":
        tokenizer.template = None
    prompt = tokenizer.chat([args.prompt])
    run = partial(
        generate, model, prompt, stop=tokenizer.stop, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    if not model.embed.weight.is_cuda:
        torch.set_num_threads(kept_threads(header, model))
    print(f"{header['model']} in {header['dtype']} on {header['device']}")
    print("prompt:", tokenizer.prompt)
    print(f"ladder: {ladder_text(*ladder.values()) or 'none'}, {why}")
    run(2, **ladder)  # the first passes of a process are slower than all that follow

    painter, events = Painter(tuple(ladder["exits"]), tokenizer.spell), []
    if coloured():
        print(painter.legend())
        follows = tokenizer.decode(prompt).endswith(args.prompt)  # no chat format stands between
        print(DIM + args.prompt + PLAIN, end="" if follows else "\n", flush=True)

    waited = 0.0  # for Enter

    def watch(event: Event) -> None:
        nonlocal waited
        events.append(replace(event, seconds=event.seconds - waited))
        piece = painter.see(event)
        if piece is None or not coloured():
            return
        if args.pause:
            began = time.perf_counter()
            with suppress(EOFError):  # nobody there
                input()
            waited += time.perf_counter() - began
        print(piece, end="", flush=True)

    out = run(args.max_new_tokens, **ladder, watch=watch if coloured() or args.html else None)
    out.seconds -= waited
    rest = painter.characters.decode(b"", final=True)
    print(rest if coloured() else tokenizer.decode(out.tokens))
    greedy: list[Event] = []
    tokens = args.max_new_tokens if args.html else min(FIRST, args.max_new_tokens)
    alone = run(tokens, watch=greedy.append if args.html else None)
    sampled = args.temperature > 0
    print("\n".join(statistics(out, alone, "plain" if sampled else "greedy")))
    if args.html:
        depths = (*ladder["exits"], model.config.n_layers)
        trace = page.trace(
            args.model, args.prompt, prompt, depths, ladder["windows"], events, greedy,
            tokenizer.spell, sampled,
        )  # fmt: skip
        page.write(args.html, trace)
        print(f"to play it back: {args.html}")


def loaded(args: argparse.Namespace) -> tuple[Llama, Tokenizer, dict]:
    """The model in the dtype that is faster here, its tokenizer, and what files say of a run."""
    model, tokenizer = load(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and the prompt is text")
    if args.exits is not None:
        check_exits(args.exits, 0, model.config.n_layers)  # again, now that the depth is known
    weight = model.embed.weight
    step = model.fast.name if model.fast else "plain"
    header = {"step": step, **describe(args.model, weight.device, weight.dtype)}
    if step == "packed":
        header["dtype"] = kept_dtype(header, lambda name: load_as(args.model, name))
        if header["dtype"] != str(weight.dtype).removeprefix("torch."):
            model = load_as(args.model, header["dtype"])
    return model, tokenizer, header


def load_as(name: str, dtype: str) -> Llama:
    return load(name, dtype=getattr(torch, dtype))[0]


def choose(exits, windows, model: Llama, header: dict) -> tuple[dict, str]:
    """The ladder asked for, or the one tuning kept, or two of the model's exits; and why."""
    if exits is None and windows is None and (kept := kept_ladder(header, model)):
        return dict(zip(("exits", "windows", "thresholds"), kept[0])), kept[1]
    why = "as asked" if exits is not None else "the model's own exits"
    exits = default_exits(model)[:2] if exits is None else tuple(exits)
    windows = windows or [2 ** (k + 1) for k in range(len(exits))]
    return {"exits": exits, "windows": windows, "thresholds": ()}, why


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
    exits = args.exits
    if exits is not None:
        check_exits(exits, 0)
    elif args.windows is not None:  # two exits, though not yet known which
        exits = (0, 1)
    windows = [1] * len(exits or ()) if args.windows is None else args.windows
    # as `generate` will check them, for a model of which nothing is known but that it is deep
    deep = Config(1, 2, max(exits or (0,)) + 1, 1, 1, 1, max_seq_len=args.max_new_tokens + 1)
    sampling = args.temperature, args.top_k, args.top_p, args.seed
    Options(exits or (), windows, (), *sampling).check_model(deep)
    if args.html:
        must_be_writable(args.html)  # said now, not when everything is generated
    return args


if __name__ == "__main__":
    command(main, f"{PLAIN if coloured() else ''}stopped")
