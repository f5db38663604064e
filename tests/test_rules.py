"""The comparison of acceptance rules: passes counted, windows chosen for each rule."""

from types import SimpleNamespace

import pytest
from conftest import random_model

from hispec import Generation
from lab import rules


def test_full_passes_are_those_behind_the_prompts_own():
    row = rules.count(random_model(n_layers=9, max_seq_len=256), [[1, 2], [3]], 300, "8(6)", 1.0)
    assert row["tokens"] >= 300 and row["passes"].keys() == rules.RULES.keys()
    assert all(1 / 7 < passes <= 1 for passes in row["passes"].values())


def test_each_rule_is_timed_with_its_own_fastest_windows(monkeypatch):
    fastest = {rules.TokenByToken: (2, 4), rules.Decoder: (3, 8)}

    def generate(model, prompt, n, *, windows, decoder, **options):
        slower = sum(abs(a - b) for a, b in zip(windows, fastest[decoder]))
        return Generation([0] * n, [], n / (200.0 - slower))

    monkeypatch.setattr(rules, "generate", generate)
    found = rules.race(SimpleNamespace(), [[1], [2], [3]], 500, 0.8)
    assert found["token by token"] == {
        "ladder": "2(2) 8(4)",
        "tokens_per_second": pytest.approx(200),
    }
    assert found["block"] == {"ladder": "2(3) 8(8)", "tokens_per_second": pytest.approx(200)}
