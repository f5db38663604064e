import pytest
import torch

import hispec

HALF = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])


def pairs():
    torch.manual_seed(0)
    yield HALF
    for _ in range(20):
        q, p = torch.rand(2, 6).double().pow(4)
        yield q / q.sum(), p / p.sum()


def written(q, p, weights):
    """The distribution of what is written if these weights replace a rejected draft."""
    kept = torch.minimum(q, p)
    return kept + (1 - kept.sum()) * weights / weights.sum()


def test_how_far_a_draw_from_p_is_off(work):
    assert work.off(*HALF) == pytest.approx(0.25)
    for q, p in pairs():
        assert work.off(q, p) == pytest.approx(float((written(q, p, p) - p).abs().sum() / 2))


def test_with_the_residual_what_is_written_is_distributed_as_p(work):
    for q, p in pairs():
        weights = work.replacement(q, p)
        assert weights.min() >= 0
        assert torch.allclose(written(q, p, weights), p)


def test_samples_follow_p(work):
    rng, (q, p) = torch.Generator().manual_seed(0), HALF
    drawn = [work.verify(hispec.draw(q, rng), q, p, rng) for _ in range(2000)]
    assert abs(drawn.count(0) / 2000 - 0.5) < 0.06  # five standard deviations
