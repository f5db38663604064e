"""Agreement between levels, worked out a second way."""

import pytest
import torch
from conftest import random_model

from hispec import generate
from lab.agreement import choices, level_agreement
from lab.prompts import Request


def test_agreement_and_false_rejects_by_hand():
    """Agreement equals what the oracle's forward passes say, token by token."""
    model = random_model()
    requests = [Request("chat", [1, 2], generate(model, [1, 2], 20).tokens)]
    said = choices(model, {1, 2, 3}, requests)
    out = level_agreement(said, (1, 3))
    assert level_agreement(said, (0, 3)).keys() == {"agreement"}  # a look-up predicts nothing
    ids = torch.tensor([requests[0].prompt + requests[0].greedy])
    draft, middle, full = (model(ids, exit)[0, 1:-1].argmax(-1).tolist() for exit in (1, 3, 5))
    assert full == requests[0].greedy
    refused = [(d, f) for d, m, f in zip(draft, middle, full, strict=True) if d != m]
    assert out["agreement"]["1-3"] == pytest.approx(
        sum(d == m for d, m in zip(draft, middle, strict=True)) / 20
    )
    assert out["agreement"]["3-5"] == pytest.approx(
        sum(m == f for m, f in zip(middle, full, strict=True)) / 20
    )
    assert out["false_rejects"] == pytest.approx(sum(d == f for d, f in refused) / len(refused))
