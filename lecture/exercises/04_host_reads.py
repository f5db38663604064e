"""Exercise 4, fifteen minutes: count what the host reads.

python lecture/exercises/04_host_reads.py

On a GPU the host queues work and runs ahead. Each `item` or `tolist` makes it wait until the queue
is empty, so a draft that the host looks at while it is made costs more than its layers.

(a) `reads`: count the calls of `Tensor.item` and `Tensor.tolist` that some work makes.
(b) `expected`: predict how many a generation makes, from its levels' calls and its thresholds.

`Decoder.settle` reads once per verification, and `probability` once per step of a level that has a
threshold. Does level 0 of a ladder read at all? Does greedy decoding?
"""

from collections.abc import Callable
from functools import partial

from common import CODE, tiny

from arguments import Generation
from hispec import generate

LADDERS = {
    "greedy": dict(),
    "exit 8": dict(exits=(8,), windows=(4,)),
    "HiSpec": dict(exits=(2, 8), windows=(2, 4)),
    "HiSpec, in doubt": dict(exits=(2, 8), windows=(4, 8), thresholds=(0.5, 0.0)),
}


def reads(work: Callable[[], object]) -> int:
    """How many times `work()` calls Tensor.item or Tensor.tolist."""
    work()
    return 0  # your turn (a): a torch.overrides.TorchFunctionMode sees every call


def expected(out: Generation, thresholds: tuple[float, ...]) -> int:
    """The reads of a generation without `watch`. thresholds: one for each exit, or none."""
    return 0  # your turn (b): out.levels[k].calls


def main() -> None:
    model, tokenizer = tiny()
    prompt, n = tokenizer.chat([CODE]), 48
    for name, ladder in LADDERS.items():
        run = partial(generate, model, prompt, n, **ladder)
        counted, guess = reads(run), expected(run(), ladder.get("thresholds", ()))
        print(f"{name}: {counted} reads for {n} tokens, expected {guess}")


if __name__ == "__main__":
    main()
