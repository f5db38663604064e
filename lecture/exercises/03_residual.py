"""Exercise 3, fifteen minutes: the residual, and what a draw from p would do.

python lecture/exercises/03_residual.py

A draft x, drawn from q, is kept with probability min(1, p(x) / q(x)). The verification below
replaces a rejected draft by a draw from p. That looks innocent, but it is wrong.

(a) `off`: by how much? Compute (do not sample) half the sum of |written - p| over the vocabulary,
where `written` is the distribution of the resulting token.
(b) `replacement`: what must be drawn from instead, so that the result is distributed as p?

Why does this mistake do no harm at temperature 0?
"""

import torch
from common import CODE, tiny
from torch import Tensor

import hispec


def off(q: Tensor, p: Tensor) -> float:
    """How far the result is from p (V,) if a rejected draft is replaced by a draw from p.

    The draft is a sample of q (V,).
    """
    return 0.0  # your turn (a)


def replacement(q: Tensor, p: Tensor) -> Tensor:
    """The weights (V,) of the token that replaces a rejected draft; they need not sum to 1."""
    return p  # your turn (b)


def verify(draft: Tensor, q: Tensor, p: Tensor, rng: torch.Generator) -> int:
    """The token that is written in place of one draft (1,), a sample of q (V,)."""
    if hispec.coin(p[draft] / q[draft], rng):
        return int(draft)
    return int(hispec.draw(replacement(q, p), rng))


def main() -> None:
    rng, q, p = torch.Generator().manual_seed(0), torch.tensor([1.0, 0]), torch.tensor([0.5, 0.5])
    written = [verify(hispec.draw(q, rng), q, p, rng) for _ in range(4000)]
    print(f"q = (1, 0), p = (.5, .5): token 0 in {written.count(0) / 4000:.3f} of 4000 samples")
    print(f"computed: a draw from p is off by {off(q, p):.3f}")
    model, tokenizer = tiny()
    ids = torch.tensor([tokenizer.chat([CODE])])
    with torch.inference_mode():
        rows = [model(ids, depth)[0].double().softmax(-1) for depth in (2, None)]
    far = [off(q, p) for q, p in zip(*rows, strict=True)]
    print(f"tiny, exit 2 drafting for all 32 layers: off by {sum(far) / len(far):.3f} on average")


if __name__ == "__main__":
    main()
