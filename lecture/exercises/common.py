"""What the exercises share: models to try things on, and a way to run a changed ladder.

It also puts the project's root on the path, so it is imported before the project's own modules.

python lecture/exercises/common.py 4

runs exercise 4 with its solution put in.
"""

import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import hispec  # noqa: E402
from arguments import Generation  # noqa: E402
from checkpoints import load  # noqa: E402
from lab.costs import Costs, Trace  # noqa: E402
from model import Config, Llama  # noqa: E402

torch.set_num_threads(1)
CODE = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
)


def tiny():
    """The model that ships, and its tokenizer, on the CPU."""
    return load("tiny", device="cpu")


def random_model(seed: int = 0, **shape) -> Llama:
    """A float64 Llama with weights so large that its exits disagree."""
    torch.manual_seed(seed)
    small = dict(vocab_size=11, dim=16, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=24)
    model = Llama(Config(**{**small, "max_seq_len": 64, **shape}))
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(20)
    return model.double().eval()


def generate_with(ladder: type, model: Llama, prompt: list[int], n: int, **options) -> Generation:
    """`hispec.generate` with another class in place of Ladder."""
    with mock.patch.object(hispec, "Ladder", ladder):
        return hispec.generate(model, prompt, n, **options)


def exercise(number: str, solved: bool):
    """The module of an exercise; solved: what its solution defines stands in for the stub's."""
    files = [next(HERE.glob(f"{number}_*.py"))]
    files += [HERE / "solutions" / files[0].name] * solved
    stub, *solution = map(run_file, files)
    for module in solution:
        vars(stub).update({name: x for name, x in vars(module).items() if name[:2] != "__"})
    return stub


def run_file(file: Path):
    """A file as a module, whose name need not be one that can be imported."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded() -> dict:
    """What record.py wrote, numbers of layers as numbers."""
    found = json.loads((HERE / "recorded.json").read_text("utf-8"))
    for trace in found["traces"]:
        trace["by_depth"] = {int(depth): x for depth, x in trace["by_depth"].items()}
    costs = found["costs"]
    trunk, head, loop = (
        {int(depth): x for depth, x in costs[part].items()} for part in ("trunk", "head", "loop")
    )
    return found | {"costs": Costs(trunk, head, costs["doubt"], loop)}


def as_trace(one: dict, sure=lambda best, second, entropy: best) -> Trace:
    """A recorded text for `lab.costs.replay`; sure: what a level takes its certainty from."""
    by_depth = one["by_depth"]
    return Trace(
        one["prompt"],
        one["prefill"],
        {depth: x["choices"] for depth, x in by_depth.items()},
        {
            depth: [sure(*each) for each in zip(x["best"], x["second"], x["entropy"], strict=True)]
            for depth, x in by_depth.items()
        },
    )


if __name__ == "__main__":
    exercise(sys.argv[1].zfill(2), solved=True).main()
