"""Full passes a token, by acceptance rule and number of levels that verify, on sampled text.

    python -m lab.rules --tokens 8000 --json results/cpu-tiny-rules.json

Nothing is timed: a full pass is a step of the last level, counted. Both rules sample from the same
distribution, after the same prompts and from the same seeds, with the same ladders.
"""

import json
from pathlib import Path
from typing import Any

import torch

from arguments import parse_ladder
from checkpoints import load
from checkpoints.console import Parser, command, say, table
from checkpoints.files import describe, must_be_writable, write_whole
from hispec import Decoder, TokenByToken, generate

PROMPTS = Path(__file__).parent.parent / "prompts" / "python.jsonl"
RULES = {"token by token": TokenByToken, "block": Decoder}
LADDERS = ("8(6)", "2(3) 8(6)", "1(2) 2(3) 8(6)")  # one, two and three levels that verify
TEMPERATURES = (0.8, 1.0)
LENGTH = 128  # tokens of a text


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=8000, help="of each row (default 8000)")
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
    header = describe(args.model, "cpu", torch.float32)
    if args.json:
        write_whole(args.json, json.dumps({**header, "rows": rows}, indent=1) + "\n")
    heads = ["ladder", "temperature", *RULES, "saved"]
    say(table([heads, *(in_words(row) for row in rows)]))


def settings() -> list[tuple[str, float]]:
    return [(ladder, temperature) for ladder in LADDERS for temperature in TEMPERATURES]


def count(model, prompts, least: int, text: str, temperature: float) -> dict:
    """Full passes a token of both rules, the prompts' own passes and tokens left out."""
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


def in_words(row: dict) -> list[str]:
    plain, block = (row["passes"][name] for name in RULES)
    each = [f"{passes:.3f}" for passes in (plain, block)]
    return [row["ladder"], f"{row['temperature']:g}", *each, f"{1 - block / plain:.1%}"]


if __name__ == "__main__":
    command(main, "stopped: no result was written")
