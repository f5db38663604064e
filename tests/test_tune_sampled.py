"""Tuning for sampled text: the levels' choices along it; the bench uses the ladders found."""

import pytest
import test_bench
import test_tune
import torch

from lab import tune
from lab.costs import Trace, coupled

small_bench, free = test_bench.small_bench, test_tune.free


def test_choices_along_sampled_text_follow_each_exits_law_and_agree_as_drafts_would_be_kept():
    """Checked over many positions with the same distributions; the text is the last level's."""
    n, V, rng = 200_000, 5, torch.Generator().manual_seed(0)
    rows = {exit: torch.rand(V, generator=rng, dtype=torch.float64).square() for exit in (1, 2, 4)}
    rows[2][3] = 0.0
    p = {exit: (row / row.sum()).expand(n, -1) for exit, row in rows.items()}
    text = p[4][0].multinomial(n, replacement=True, generator=rng).tolist()
    found = coupled(Trace([0], 0.0, {4: text}, {4: [1.0] * n}, p), (0, 1, 2), 4, seed=1)
    assert found.choices[4] == text and found.choices.keys() == {1, 2, 4}
    for exit in (1, 2):
        chosen = torch.tensor(found.choices[exit])
        law = torch.bincount(chosen, minlength=V) / n
        torch.testing.assert_close(law.double(), p[exit][0], rtol=0, atol=0.005)
        assert found.sure[exit][:9] == p[exit][0][chosen[:9]].tolist()
    for below, above in ((1, 2), (2, 4)):
        same = sum(a == b for a, b in zip(found.choices[below], found.choices[above])) / n
        assert same == pytest.approx(
            torch.minimum(p[below][0], p[above][0]).sum().item(), abs=0.005
        )


def test_sampled_text_is_decoded_with_ladders_of_its_own(small_bench, monkeypatch, free):
    """They are found by --tune, kept, and used again; kinds not tuned for it use greedy text's
    ladders.
    """
    monkeypatch.setattr(tune, "WINDOWS", (3, 6))
    monkeypatch.setattr(tune, "COARSE", (3, 6))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    asked: list[dict] = []

    def search(kinds, predicted, attempt, make_decoder):
        asked.append(kinds)
        window = (3, 6)[len(asked) - 1]  # greedy text first
        ladders = {"hispec": ((1, 2), (window, 6)), "draft alone": ((1,), (window,))}
        assert all(predicted((*ladder, (0.0,) * len(ladder[0]))) > 0 for ladder in ladders.values())
        entry = {"measured": 1.0, "predicted": 1.0, "ran": []}
        return {
            name: entry | {"exits": e, "windows": w, "thresholds": (0.0,) * len(e)}
            for name, (e, w) in ladders.items()
        }

    monkeypatch.setattr(tune, "search", search)
    for again in (["--tune"], []):
        _, run = small_bench("--quick", "--max-new-tokens", "5", *again)
        methods = {method["name"]: method for method in run["methods"]}
        for name, windows in (("hispec", [3, 6]), ("draft alone", [3])):
            assert methods[name]["windows"] == windows
            assert methods[name]["sampled"]["windows"] == [6, *windows[1:]]
        assert methods["single-layer"]["sampled"]["windows"] == methods["single-layer"]["windows"]
    assert len(asked) == 2 and "three exits" not in asked[1]


def test_a_sampled_run_counts_each_seed_and_a_greedy_one_its_faster_turn():
    seeds = []

    def decode(prompt, n, stop, seed=None, temperature=0.0):
        seeds.append(seed)
        return test_tune.Generation([1], [], len(seeds))

    ladder = ((1,), (2,), (0.0,))
    made = tune.run({ladder: decode}, [[0]], 4, (), {"temperature": 0.8, "seed": 5})
    assert len(made[ladder]) == tune.SEEDS and len({*seeds}) == tune.SEEDS
    seeds.clear()
    assert [g.seconds for g in tune.run({ladder: decode}, [[0]], 4, ())[ladder]] == [1]
