"""Models that the exercises share.

This file also puts the project's root on the path, so it is imported before the project's own
modules.

python lecture/exercises/common.py 04

runs exercise 4 with its solution in place of the stub's code.
"""

import sys
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints import load  # noqa: E402
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


def exercise(number: str, solved: bool) -> ModuleType:
    """An exercise as a module. solved: its solution is executed after it, in the same module."""
    stub = next(HERE.glob(f"{number}_*.py"))
    module = ModuleType(stub.stem)
    for file in (stub, *[HERE / "solutions" / stub.name] * solved):
        exec(compile(file.read_text("utf-8"), file, "exec"), vars(module))
    return module


if __name__ == "__main__":
    exercise(sys.argv[1], solved=True).main()
