"""Record what exercises 6 and 7 replay: costs of this machine, and what every exit says.

python lecture/exercises/record.py

Takes a minute, and writes recorded.json beside this file. The exercises read the file alone, so
that they give the same numbers on every machine; after a change to `tiny` it can be made anew.
"""

import json
from functools import partial

import torch
from common import HERE, ROOT, tiny

from checkpoints.files import describe
from hispec import generate
from lab.costs import measure_costs, trace
from lab.prompts import default_prompts, read_prompts

DEPTHS = (1, 2, 3, 4, 6, 8, 12)
PROMPTS, TOKENS = 6, 48
REPEATS = 6  # of which the fastest counts: other work of the machine can only add


@torch.inference_mode()
def doubts(model, ids: torch.Tensor, first: int, depth: int) -> tuple[list[float], list[float]]:
    """The second-best probability and the entropy in nats, from position `first` on."""
    p = model(ids, depth)[0, first:].double().softmax(-1)
    second = p.topk(2).values[:, 1]
    entropy = torch.special.entr(p).sum(-1)
    return [[round(x, 4) for x in values.tolist()] for values in (second, entropy)]


def fewest(repeats: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """Seconds by depth and width, each the smallest of the repeats."""
    return {e: [round(min(s), 7) for s in zip(*(r[e] for r in repeats))] for e in repeats[0]}


def record(model, tokenizer, prompt: list[int]) -> dict:
    decode = partial(generate, model)
    known = trace(model, prompt, TOKENS, tokenizer.stop, DEPTHS, decode)
    text = known.choices[model.config.n_layers]
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
    questions = read_prompts(default_prompts(tokenizer))
    firsts = {question["category"]: question for question in reversed(questions)}
    prompts = [tokenizer.chat(q["turns"][:1]) for q in list(firsts.values())[::-1][:PROMPTS]]
    costs = [measure_costs(model, DEPTHS, partial(generate, model), None) for _ in range(REPEATS)]
    about = describe("tiny", model.embed.weight.device, model.embed.weight.dtype)
    about |= {"threads": 1, "command": f"python {(HERE / 'record.py').relative_to(ROOT)}"}
    found = {
        "setting": about,
        "n_layers": model.config.n_layers,
        "costs": {
            "trunk": fewest([c.trunk for c in costs]),
            "head": fewest([c.head for c in costs]),
            "loop": round(min(c.loop for c in costs), 7),
        },
        "traces": [record(model, tokenizer, prompt) for prompt in prompts],
    }
    (HERE / "recorded.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
