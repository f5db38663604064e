"""Exercise 1, five minutes: make the middle level lie.

python lecture/exercises/01_lie.py

`Decoder.run` returns a level's logits. Let the middle level return their negative, so that it
prefers the tokens that it should like least. Before you run it, predict what happens to the text,
to the share of drafts that this level keeps, and to the share of its tokens that the full model
keeps.
"""

from common import CODE, tiny

from hispec import Decoder, generate

LADDER = dict(exits=(2, 8), windows=(2, 4))


class Liar(Decoder):
    """A decoder whose middle level says the opposite of what it has computed."""

    def run(self, k: int, base: int):
        return super().run(k, base)  # your turn: the negative, for the middle level


def accepted(out) -> list[float]:
    """The share of each level's tokens that the level above kept, shallow to deep."""
    return [level.accepted / max(level.proposed, 1) for level in out.levels[:-1]]


def main() -> None:
    model, tokenizer = tiny()
    prompt = tokenizer.chat([CODE])
    honest = generate(model, prompt, 48, **LADDER)
    liar = generate(model, prompt, 48, **LADDER, decoder=Liar)
    print("same text:", liar.tokens == honest.tokens)
    for name, out in (("honest", honest), ("liar", liar)):
        shares = ", ".join(f"{share:.0%}" for share in accepted(out))
        print(f"{name}: accepted {shares}; {out.levels[-1].calls} full passes for 48 tokens")


if __name__ == "__main__":
    main()
