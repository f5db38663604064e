from functools import partial

import pytest
import torch
from common import random_model

from hispec import generate

LADDERS = [
    ((), (), ()),
    ((2,), (3,), ()),
    ((1, 3), (2, 4), ()),
    ((1, 3), (3, 4), (0.5, 0.0)),
    ((1, 3), (3, 6), (0.0, 0.4)),
    ((1, 2, 3), (2, 3, 4), (0.6, 0.0, 0.3)),
]


def test_it_counts(work):
    x = torch.arange(3)
    assert work.reads(lambda: [x.tolist(), x[0].item(), x + 1]) == 2
    assert x.tolist() == [0, 1, 2]  # and it leaves everything as it was


@pytest.mark.parametrize("exits, windows, thresholds", LADDERS)
def test_the_reads_of_a_generation(work, exits, windows, thresholds):
    options = dict(exits=exits, windows=windows, thresholds=thresholds)
    run = partial(generate, random_model(4), [1, 2, 3], 24, **options)
    assert work.reads(run) == work.expected(run(), thresholds) > 0
