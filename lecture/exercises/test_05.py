import random
from dataclasses import replace

import pytest


def simulated(t, n_d, n_i, rounds=20000):
    """Milliseconds a token, by drawing whether each token is right."""
    rng, tokens, ms = random.Random(1), 0, 0.0

    def right(rate, n):
        kept = 0
        while kept < n and rng.random() < rate:
            kept += 1
        return kept + 1

    for _ in range(rounds):
        gathered = 0
        while gathered < n_i:
            gathered += right(t.alpha, n_d)
            ms += n_d * t.draft + t.middle
        tokens += right(t.beta, gathered)
        ms += t.full
    return ms / tokens


def test_a_single_layer(work):
    t = work.TABLE
    for a, n in ((0.5, 1), (0.5, 3), (0.9, 8)):
        # one that verifies each draft as it comes, for nothing, and gathers n, is a single layer
        alone = simulated(replace(t, alpha=0.0, beta=a, middle=0.0), 1, n)
        assert work.single_layer(a, t.draft, t.full, n) == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("windows", [(1, 1), (2, 4), (4, 6), (3, 12)])
def test_hispec(work, windows):
    for t in (work.TABLE, replace(work.TABLE, alpha=0.8, beta=0.95)):
        assert work.hispec(t, *windows) == pytest.approx(simulated(t, *windows), rel=0.03)


def test_the_best_windows(work):
    t = work.TABLE
    for beta in (t.beta, 0.5):
        n = work.best_single_layer(beta, t.middle, t.full)
        every = [work.single_layer(beta, t.middle, t.full, k) for k in range(1, 25)]
        assert every[n - 1] == min(every)
    t = replace(t, alpha=0.85, draft=0.3)
    every = [work.hispec(t, d, i) for d in range(1, 7) for i in range(d, 17)]
    assert work.hispec(t, *work.best_hispec(t)) <= 1.02 * min(every)
    assert work.best_hispec(t) != work.best_hispec(replace(t, beta=0.4))
