"""Exercise 9, forty minutes: recycle what the levels have said.

python lecture/exercises/09_recycle.py

A verification says for each draft what the level would have written behind it, also behind drafts
that it rejects, and all of it is thrown away. Keep it (Token Recycling, arXiv 2408.08696): for
every token the choice that a verifying level last made after it. A draft then costs nothing:
behind the last token its choice, behind that one its choice, and so on.

Two objects of `generate` take part. The decoder sees what levels say: `Remembering` is one that
notes it. The drafter reads the notes: `Recycled` drafts at depth 0, as drafters.py says.

(a) `judge`: note what the level chooses. logits[i] predicts what follows the i-th of the n+1 tokens
self.tokens[base - 1 : self.length].
(b) `draft`: a look-up copies what followed the same words before. Where at least two tokens stand
as they did, it is the better guess. Where they do not, follow the notes.

The notes begin with what the first exit says along the prompt: it has read it anyway. On a GPU,
what do notes cost that a plain verification does not? Could they cost nothing?
"""

import json

from common import ROOT, tiny
from torch import Tensor

from drafters import LookUp, look_up
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
        """logits (n+1, V) of level k, for the n drafts from `base` on and one token more."""
        return super().judge(k, base, q, logits)  # your turn (a)

    def note(self, tokens: Tensor, logits: Tensor) -> None:
        """Of tokens (n,), and of the logits (n, V) of what follows each."""
        self.notes.update(zip(tokens.tolist(), logits.argmax(-1).tolist(), strict=True))


class Recycled:
    """Drafts what was chosen before."""

    def draft(self, decoder: Remembering, want: int) -> tuple[list[int], None]:
        return look_up(decoder.text, want), None  # your turn (b)


def steps(drafter, decoder) -> list[int]:
    """How many steps each level took, over one prompt of each kind that the bench has."""
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
