"""Agreement by bytes, jointly and in a row, which the lecture shows next to the formula."""

import numpy as np
import pytest
import torch
from test_tune import ONE_A_PASS

from lab import bytes as lab_bytes
from lab.costs import Trace

SPELL = [b"a", b"ab", b"b", b"ac"]


def test_an_exits_byte_is_the_likeliest_behind_those_before_it():
    p = torch.tensor([[0.3, 0.2, 0.1, 0.4], [0.1, 0.1, 0.7, 0.1]], dtype=torch.float64)
    tokens = Trace([0, 3], 0.0, {1: [3, 2], 5: [1, 2]}, {}, {1: p, 5: p})
    read = lab_bytes.as_bytes(tokens, SPELL)
    assert bytes(read.prompt) == b"aac" and bytes(read.choices[5]) == b"abb"
    assert bytes(read.choices[1]) == b"acb"  # behind "a", "ac" is likelier than "ab"


def test_agreement_jointly_in_a_row_and_what_independence_would_give():
    full, middle, draft = [1] * 8, [1] * 6 + [0] * 2, [1, 1, 1, 1, 0, 0, 0, 1]
    trace = Trace([0], 0.0, {1: draft, 2: middle, 4: full}, {e: [1.0] * 8 for e in (1, 2, 4)})
    found = lab_bytes.compared([trace], ONE_A_PASS, (1, 2), 4)
    jointly = {"both": 4 / 8, "none": 1 / 8, "draft only": 1 / 8, "middle only": 2 / 8}
    assert found["jointly"] == jointly
    assert found["jointly_if_independent"]["both"] == pytest.approx(5 / 8 * 6 / 8)
    assert found["in_a_row"][:2] == [5 / 8, 3 / 7]
    assert found["in_a_row_if_independent"][1] == pytest.approx((5 / 8) ** 2)
    assert found["replay"]["hispec"] > 0 and np.isfinite(found["formula"]["hispec"])
