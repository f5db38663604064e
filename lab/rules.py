"""Compare two acceptance rules on sampled text: full passes per token, and tokens per second.

    python -m lab.rules --tokens 8000 --json results/cpu-tiny-rules.json

Full passes (steps of the last level) are counted, not timed, with ladders of one, two and three
levels that verify. Both rules sample from the same distribution, with the same prompts, seeds and
ladders. Then the windows of a ladder of two exits are tuned for each rule: all pairs are run on a
few prompts, and the fastest of these on every third prompt. The fastest of each rule then take
turns on as many tokens again.
"""

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from arguments import ladder_text, parse_ladder
from checkpoints import load
from checkpoints.console import Parser, command, say, table
from checkpoints.files import describe, must_be_writable, write_whole
from hispec import Decoder, TokenByToken, generate
from model import Llama

PROMPTS = Path(__file__).parent.parent / "prompts" / "python.jsonl"
RULES = {"token by token": TokenByToken, "block": Decoder}
EXITS = (2, 8)
LADDERS = ("8(6)", "2(3) 8(6)", "1(2) 2(3) 8(6)")  # one, two and three levels that verify
TEMPERATURES = (0.8, 1.0)
LENGTH = 128  # tokens of a text
WINDOWS = tuple(product((1, 2, 3, 4, 6), (3, 4, 6, 8, 12)))  # of exits 2 and 8, tried for each rule
FEW, LEFT = 4, 3  # prompts on which all pairs are run; how many pairs are run on more prompts


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=8000, help="per row (default 8000)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.json:
        must_be_writable(args.json)
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, "cpu", torch.float32)
    assert tokenizer is not None
    questions = map(json.loads, PROMPTS.read_text("utf-8").splitlines())
    prompts = [tokenizer.chat(question["turns"][:1]) for question in questions]
    rows = [count(model, prompts, args.tokens, *of) for of in settings()]
    say(table([["full passes a token", "temperature", *RULES, "saved"], *map(in_words, rows)]))
    speeds = [race(model, prompts, args.tokens, TEMPERATURES[0])]
    heads = ["tokens/s, tuned windows", "temperature", *RULES, "faster"]
    say(table([heads, *map(speed_in_words, speeds)]))
    header = describe(args.model, "cpu", torch.float32)
    if args.json:
        found = {**header, "rows": rows, "speeds": speeds}
        write_whole(args.json, json.dumps(found, indent=1) + "\n")


def settings() -> list[tuple[str, float]]:
    return [(ladder, temperature) for ladder in LADDERS for temperature in TEMPERATURES]


def count(model, prompts, least: int, text: str, temperature: float) -> dict:
    """Count full passes per token with both rules, without the prompts' passes and first tokens."""
    ladder, found = parse_ladder(text), {}
    options: dict[str, Any] = {"exits": ladder.exits, "windows": ladder.windows}
    for name, decoder in RULES.items():
        passes = tokens = seed = 0
        while tokens < least:
            prompt = prompts[seed % len(prompts)]
            made = generate(
                model, prompt, LENGTH, **options, temperature=temperature, seed=seed,
                decoder=decoder,
            )  # fmt: skip
            passes += made.levels[-1].calls - 1
            tokens += len(made.tokens) - 1
            seed += 1
        found[name] = passes / tokens
    return {"ladder": text, "temperature": temperature, "tokens": tokens, "passes": found}


def race(model: Llama, prompts: list, least: int, temperature: float) -> dict:
    """Measure tokens per second with both rules, each with the windows that are fastest for it."""
    writes = {
        (name, windows): partial(
            generate, model, exits=EXITS, windows=windows, temperature=temperature, decoder=decoder
        )
        for name, decoder in RULES.items()
        for windows in WINDOWS
    }
    speeds = tokens_per_second(writes, prompts[:FEW])
    for left in (LEFT, 1):
        best = [
            sorted((w for w in writes if w[0] == name), key=speeds.__getitem__) for name in RULES
        ]
        writes = {each: writes[each] for ranked in best for each in ranked[-left:]}
        some = prompts[::3] * (-(-3 * least // (LENGTH * len(prompts))) if left == 1 else 1)
        speeds = tokens_per_second(writes, some)
    found: dict[str, Any] = {"temperature": temperature}
    for (name, windows), speed in speeds.items():
        found[name] = {"ladder": ladder_text(EXITS, windows), "tokens_per_second": speed}
    return found


def tokens_per_second(writes: dict, prompts: list) -> dict:
    """Measure tokens per second of each of `writes`, in turns, over the texts after all prompts."""
    tokens, seconds = dict.fromkeys(writes, 0), dict.fromkeys(writes, 0.0)
    for seed, prompt in enumerate(prompts):
        for name, write in writes.items():
            made = write(prompt, LENGTH, seed=seed)
            tokens[name] += len(made.tokens)
            seconds[name] += made.seconds
    return {name: tokens[name] / seconds[name] for name in writes}


def in_words(row: dict) -> list[str]:
    plain, block = (row["passes"][name] for name in RULES)
    each = [f"{passes:.3f}" for passes in (plain, block)]
    return [row["ladder"], f"{row['temperature']:g}", *each, f"{1 - block / plain:.1%}"]


def speed_in_words(found: dict) -> list[str]:
    plain, block = (found[name] for name in RULES)
    each = [f"{one['tokens_per_second']:.1f}, {one['ladder']}" for one in (plain, block)]
    ratio = block["tokens_per_second"] / plain["tokens_per_second"]
    return ["", f"{found['temperature']:g}", *each, f"{ratio:.3f}x"]


if __name__ == "__main__":
    command(main, "stopped: no result was written")
