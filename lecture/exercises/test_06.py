from unittest import mock

import torch
from common import random_model

import hispec


def test_it_is_a_factor(work):
    for best, second, entropy in ((1.0, 0.0, 0.0), (0.5, 0.5, 0.69), (0.1, 0.1, 3.0)):
        assert 0 <= work.certainty(best, second, entropy) <= 1


def test_it_beats_the_product_of_probabilities(work):
    plain, _ = work.speed_up(lambda best, second, entropy: best)
    assert work.speed_up(work.certainty)[0] > 1.001 * plain


def test_the_text_stays(work):
    def probability(tokens, p):
        rows = p[: len(tokens)]
        two, entropy = rows.topk(2).values, torch.special.entr(rows).sum(-1)
        sure = 1.0
        for (best, second), nats in zip(two.tolist(), entropy.tolist(), strict=True):
            sure *= work.certainty(best, second, nats)
        return sure

    model, ladder = random_model(2), dict(exits=(1, 3), windows=(4, 8), thresholds=(0.5, 0.3))
    plain = hispec.generate(model, [1, 2, 3], 24).tokens
    with mock.patch.object(hispec, "probability", probability):
        assert hispec.generate(model, [1, 2, 3], 24, **ladder).tokens == plain
