"""Record what exercises 6 and 7 replay: this machine's costs, and what every exit predicts.

python lecture/exercises/record.py

This takes a minute and writes recorded.json next to this file. The exercises use only that file, so
they give the same numbers on every machine. After a change to `tiny` it can be made again.
"""

import json
from functools import partial

import torch
from common import HERE, ROOT, tiny

from checkpoints.files import describe
from hispec import Step, generate
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
    lines = (ROOT / "prompts" / "python.jsonl").read_text("utf-8").splitlines()
    firsts = {q["category"]: q["turns"][:1] for q in map(json.loads, reversed(lines))}
    prompts = [tokenizer.chat(turns) for turns in list(firsts.values())[::-1][:PROMPTS]]

    def decoder(exits=(), windows=(), thresholds=()):
        return partial(generate, model, exits=exits, windows=windows, thresholds=thresholds)

    limits = TOKENS, tokenizer.stop
    traces = [trace(model, prompt, *limits, DEPTHS, decoder()) for prompt in prompts]
    costs = costs_of_ladders(model.fast or Step(model), DEPTHS, traces, *limits, decoder)
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
