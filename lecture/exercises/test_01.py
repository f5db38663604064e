from common import CODE, tiny

from hispec import generate


def test_the_text_stays_and_acceptance_falls(work):
    model, tokenizer = tiny()
    prompt, ladder = tokenizer.chat([CODE]), dict(exits=(2, 8), windows=(2, 4))
    plain, honest = generate(model, prompt, 32), generate(model, prompt, 32, **ladder)
    liar = generate(model, prompt, 32, **ladder, decoder=work.Liar)
    assert liar.tokens == plain.tokens
    shares = [out.levels[1].accepted / out.levels[1].proposed for out in (honest, liar)]
    assert shares[1] < shares[0] / 4
    assert liar.levels[-1].calls > honest.levels[-1].calls
    single = generate(model, prompt, 8, exits=(8,), windows=(4,), decoder=work.Liar)
    assert single.tokens == plain.tokens[:8]  # of two levels, the last has to stay honest
