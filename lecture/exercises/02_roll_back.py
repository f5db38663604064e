"""Exercise 2, ten minutes: forget to roll back, then write the rollback.

python lecture/exercises/02_roll_back.py

The line in question is the second to last of `Decoder.settle`, in hispec.py:

    self.cache.rollback(min(base + n, self.length))

Here it calls a cache whose `rollback` does nothing. Run this and see how often the text is still
right. Then write `rollback`: it sets integers and copies nothing. Why is it `base + n`, and not
`base + n + 1`, although n drafts are kept and one token is appended to them?
"""

from contextlib import contextmanager

from common import random_model

from hispec import Step, generate
from kvcache import KVCache


class Cache(KVCache):
    """The project's cache, without the method that this exercise is about."""

    def rollback(self, length: int) -> None:
        """Forget what any segment holds at positions >= length."""
        # your turn: self.lengths has one integer per segment


class OnCache(Step):
    """The plain step, on that cache."""

    @contextmanager
    def open(self, exits, max_len, draft_head=0):
        yield Cache(self.model, exits, max_len, draft_head)


def outcome(seed: int) -> str:
    """How a generation on a random model ends: "right", "wrong" or "crash"."""
    model, prompt = random_model(seed), [1, 2, 3]
    ladder = dict(exits=(1, 3), windows=(2, 4))
    try:
        tokens = generate(model, prompt, 20, **ladder, fast=OnCache(model)).tokens
    except (RuntimeError, IndexError, ValueError):
        return "crash"
    return "right" if tokens == generate(model, prompt, 20).tokens else "wrong"


def main() -> None:
    seen = [outcome(seed) for seed in range(40)]
    for kind in ("right", "wrong", "crash"):
        print(f"{kind}: {seen.count(kind)} of {len(seen)}")


if __name__ == "__main__":
    main()
