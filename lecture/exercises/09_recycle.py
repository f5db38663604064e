"""Exercise 9, forty minutes: recycle the levels' choices.

python lecture/exercises/09_recycle.py

A verification computes what the level would write after each draft, even after drafts that it
rejects, and all of this is thrown away. Keep it (Token Recycling, arXiv 2408.08696): note for every
token the choice that a verifying level last made after it. A draft then costs nothing: take the
choice noted for the last token, then the choice noted for that one, and so on.

Two arguments of `generate` take part. The decoder sees the levels' logits: `Remembering` is a
decoder that takes notes. The drafter reads the notes: `Recycled` drafts at depth 0, as drafters.py
says.

(a) `judge`: note what the level chooses. logits[i] predicts the token after the i-th of the n+1
tokens self.tokens[base - 1 : self.length].
(b) `draft`: a look-up copies what followed the same tokens earlier. If at least the last two tokens
occur earlier in the text, it is the better guess. If not, follow the notes. The look-up has to be
asked at each step, so that its index `places` knows the text; there you can also see whether the
last two tokens occurred before.

The notes begin with the first exit's choices along the prompt, which it has read anyway. On a GPU,
what do notes cost that a plain verification does not? Could they cost nothing?
"""

import json

from common import ROOT, tiny
from torch import Tensor

from drafters import LookUp
from hispec import Decoder, generate

LADDER = dict(exits=(0, 8), windows=(4, 8))
TOKENS = 48
Notes = dict[int, int]  # token -> the token last chosen after it


class Remembering(Decoder):
    """A decoder that notes for each token what a verifying level last chose after it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes: Notes = {}

    def read_prompt(self) -> None:
        super().read_prompt()
        depth = self.depths[1]
        if depth in self.cache.hidden:  # an exit's states; those of the full model are not kept
            logits = self.step.logits(self.cache.hidden[depth][0, : self.start], depth)
            self.note(self.tokens[: self.start], logits)

    def judge(self, k: int, base: int, q, logits: Tensor):
        """logits (n+1, V): those of level k for the n drafts from `base` on and the token after."""
        return super().judge(k, base, q, logits)  # your turn (a)

    def note(self, tokens: Tensor, logits: Tensor) -> None:
        """Note for each of tokens (n,) the likeliest by logits (n, V) for the token after it."""
        self.notes.update(zip(tokens.tolist(), logits.argmax(-1).tolist(), strict=True))


class Recycled(LookUp):
    """Drafts the choices that levels made before, where a look-up has little to go by."""

    def draft(self, decoder: Remembering, want: int) -> tuple[list[int], None]:
        return super().draft(decoder, want)  # your turn (b)


def steps(drafter, decoder) -> list[int]:
    """How many steps each level took in total, for one prompt of each category of the bench."""
    model, tokenizer = tiny()
    lines = (ROOT / "prompts" / "python.jsonl").read_text("utf-8").splitlines()
    prompts = {q["category"]: q["turns"] for q in map(json.loads, lines)}
    total = [0, 0, 0]
    for turns in prompts.values():
        parts = dict(drafter=drafter, decoder=decoder)
        out = generate(model, tokenizer.chat(turns[:1]), TOKENS, **LADDER, **parts)
        total = [a + level.calls for a, level in zip(total, out.levels)]
    return total


def main() -> None:
    for name, drafter, decoder in (
        ("look-up", LookUp(), Decoder),
        ("recycled", Recycled(), Remembering),
    ):
        _, middle, full = steps(drafter, decoder)
        print(f"{name}: {middle} steps of exit 8, {full} full passes")


if __name__ == "__main__":
    main()
