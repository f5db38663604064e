import torch
from common import random_model

from kvcache import KVCache


def test_every_text_is_right(work):
    assert {work.outcome(seed) for seed in range(20)} == {"right"}


def test_it_sets_integers_and_copies_nothing(work):
    model = random_model()
    cache = work.Cache(model, (1, 3), 20)
    assert isinstance(cache, KVCache)
    cache.lengths, kept = [9, 7, 4], torch.ones_like(cache.keys)
    cache.keys.copy_(kept)
    for length, lengths in ((8, [8, 7, 4]), (5, [5, 5, 4]), (6, [5, 5, 4])):
        cache.rollback(length)
        assert cache.lengths == lengths
    assert torch.equal(cache.keys, kept)
