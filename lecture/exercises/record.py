"""Record what exercises 6 and 7 replay: costs of this machine, and what every exit says.

python lecture/exercises/record.py

Takes a minute, and writes recorded.json beside this file. The exercises read the file alone, so
that they give the same numbers on every machine; after a change to `tiny` it can be made anew.
"""

import json
from functools import partial

import torch
from common import HERE, ROOT, tiny

from bench import PROMPTS as QUESTIONS
from bench import decode_with, read_prompts
from checkpoints.files import describe
from lab.costs import Trace, trace
from lab.tune import costs_of_ladders

DEPTHS = (1, 2, 3, 4, 6, 8, 12)
PROMPTS, TOKENS = 6, 48


def rounded(seconds: list[float]) -> list[float]:
    return [round(x, 7) for x in seconds]


@torch.inference_mode()
def doubts(model, ids: torch.Tensor, first: int, depth: int) -> tuple[list[float], list[float]]:
    """The second-best probability and the entropy in nats, from position `first` on."""
    p = model(ids, depth)[0, first:].double().softmax(-1)
    second = p.topk(2).values[:, 1]
    entropy = torch.special.entr(p).sum(-1)
    return [[round(x, 4) for x in values.tolist()] for values in (second, entropy)]


def record(model, known: Trace) -> dict:
    text, prompt = known.choices[model.config.n_layers], known.prompt
    ids = torch.tensor([prompt + text[:-1]])
    by_depth = {}
    for depth in (*DEPTHS, model.config.n_layers):
        second, entropy = doubts(model, ids, len(prompt) - 1, depth)
        by_depth[depth] = {
            "choices": known.choices[depth],
            "best": [round(x, 4) for x in known.sure[depth]],
            "second": second,
            "entropy": entropy,
        }
    return {"prompt": prompt, "prefill": known.prefill, "by_depth": by_depth}


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = tiny()
    questions = read_prompts(QUESTIONS / "python.jsonl")
    firsts = {question["category"]: question for question in reversed(questions)}
    prompts = [tokenizer.chat(q["turns"][:1]) for q in list(firsts.values())[::-1][:PROMPTS]]
    limits, make_decoder = (TOKENS, tokenizer.stop), partial(decode_with, model, model.fast)
    traces = [trace(model, prompt, *limits, DEPTHS, make_decoder()) for prompt in prompts]
    costs = costs_of_ladders(model.fast, DEPTHS, traces, *limits, make_decoder)
    about = describe("tiny", model.embed.weight.device, model.embed.weight.dtype)
    about |= {"threads": 1, "command": f"python {(HERE / 'record.py').relative_to(ROOT)}"}
    found = {
        "setting": about,
        "n_layers": model.config.n_layers,
        "costs": {
            "trunk": {e: rounded(row) for e, row in costs.trunk.items()},
            "head": {e: rounded(row) for e, row in costs.head.items()},
            "doubt": round(costs.doubt, 7),
            "loop": {e: round(seconds, 7) for e, seconds in costs.loop.items()},
        },
        "traces": [record(model, known) for known in traces],
    }
    (HERE / "recorded.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
