"""Block verification: the enumerated distribution of whole texts; and it never keeps less than
token by token.
"""

import random
from itertools import product

import pytest
import torch
from conftest import random_model
from test_sampling import Choices, cut, distance, markov_law, output_law, table_ladder

import hispec
from hispec import Decoder, accept_block, accept_tokens, generate
from model import ExitHead

KINDS = ["any", "zeros", "ties", "near", "disjoint"]


def random_tables(rng: random.Random, n: int, V: int, kind: str) -> list[list[list[float]]]:
    """n tables (V, V) of conditional distributions, of a kind that is difficult for the rule."""

    def row(i: int) -> list[float]:
        weights = [rng.random() ** 3 + 1e-3 for _ in range(V)]
        if kind == "zeros":
            weights[rng.randrange(V)] = 0.0
        if kind == "ties":
            weights = [float(rng.choice([1, 1, 2])) for _ in range(V)]
        if kind == "disjoint":  # even levels and odd ones share one token
            weights = [w if v == 0 or v % 2 == i % 2 else 0.0 for v, w in enumerate(weights)]
        return [w / sum(weights) for w in weights]

    tables = [[row(i) for _ in range(V)] for i in range(n)]
    if kind == "near":  # all levels the same, except for a small change in one row
        tables = [[list(r) for r in tables[0]] for _ in tables]
        tables[0][0] = row(0)
    return tables


def cases(levels: int, n: int):
    for seed in range(n):
        rng = random.Random(1000 * levels + seed)
        V, kind = (3 if levels == 2 else 2), KINDS[seed % len(KINDS)]
        windows = [rng.randint(1, 4 if levels == 2 else 2) for _ in range(levels - 1)]
        thresholds = [rng.choice([0.0, 0.0, 0.3, 0.6]) for _ in windows]
        yield random_tables(rng, levels, V, kind), windows, thresholds


@pytest.mark.parametrize("levels, texts, n", [(2, 3, 12), (3, 3, 10), (4, 2, 6)])
def test_whole_texts_follow_the_target_exactly(monkeypatch, levels, texts, n):
    for tables, windows, thresholds in cases(levels, n):
        run = table_ladder(tables)
        law = output_law(monkeypatch, lambda run=run, w=windows, t=thresholds: run(texts, w, t))
        assert distance(law, markov_law(tables[-1], texts)) < 1e-12


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("options", [dict(top_k=2), dict(top_p=0.7)], ids=str)
def test_truncated_texts_follow_the_target_exactly(monkeypatch, levels, options):
    for tables, windows, _ in cases(levels, 5):
        run = table_ladder(tables)
        law = output_law(monkeypatch, lambda run=run, w=windows: run(2, w, **options))
        target = [cut(row, **options) for row in tables[-1]]
        assert distance(law, markov_law(target, 2)) < 1e-12


@pytest.mark.parametrize("levels", [2, 3])
def test_stops_and_the_contexts_end_leave_the_law_alone(monkeypatch, levels):
    for tables, windows, _ in cases(levels, 5):
        run = table_ladder(tables, context=4)
        law = output_law(monkeypatch, lambda run=run, w=windows: run(4, w, stop=[1]))
        target: dict[tuple[int, ...], float] = {}
        for text, weight in markov_law(tables[-1], 3).items():  # three fit behind the prompt
            text = text[: text.index(1) + 1] if 1 in text else text
            target[text] = target.get(text, 0.0) + weight
        assert distance(law, target) < 1e-12


@pytest.mark.parametrize("exits, windows", [((1,), (3,)), ((1, 2), (2, 2)), ((0, 2), (2, 2))])
def test_a_real_model_with_a_draft_vocabulary_and_look_ups(monkeypatch, exits, windows):
    model = random_model(5, vocab_size=3, n_layers=3)
    model.exit_heads["1"] = ExitHead(model.config, vocab=[0, 2]).double()
    options = dict(temperature=3.0, seed=0)
    run = lambda **ladder: generate(model, [2, 0, 2], 2, **ladder, **options).tokens  # noqa: E731
    law = output_law(monkeypatch, lambda: run(exits=exits, windows=windows))
    assert distance(law, output_law(monkeypatch, run)) < 1e-12


# ---- what it keeps ------------------------------------------------------------------------------


def verdicts(monkeypatch, rule, drafts, q, p) -> dict[tuple[int, ...], float]:
    """The probability of each (own token, drafts kept) by a rule, enumerated."""

    def run():
        own, kept, _ = rule(torch.tensor(drafts), q, p, None)
        return (int(own), int(kept))

    return output_law(monkeypatch, run)


def rows(rng: random.Random, n: int, V: int) -> torch.Tensor:
    made = [random_tables(rng, 1, V, "any")[0][0] for _ in range(n)]
    return torch.tensor(made, dtype=torch.float64)


def test_it_keeps_no_fewer_drafts_and_often_more(monkeypatch):
    gained = 0.0
    for seed in range(20):
        rng = random.Random(seed)
        n, V = rng.randint(1, 4), 3
        q, p = rows(rng, n, V), rows(rng, n + 1, V)
        expected = {accept_tokens: 0.0, accept_block: 0.0}
        for drafts in product(range(V), repeat=n):
            weight = float(torch.stack([q[i, x] for i, x in enumerate(drafts)]).prod())
            for rule in expected:
                law = verdicts(monkeypatch, rule, drafts, q, p)
                expected[rule] += weight * sum(w * kept for (_, kept), w in law.items())
        assert expected[accept_block] >= expected[accept_tokens] - 1e-12
        assert n > 1 or expected[accept_block] == pytest.approx(expected[accept_tokens], abs=1e-12)
        gained += expected[accept_block] - expected[accept_tokens]
    assert gained > 0.1


def test_with_one_draft_or_copied_drafts_it_is_token_by_token(monkeypatch):
    for seed in range(10):
        rng = random.Random(seed)
        n, V = (1 if seed % 2 else 3), 3
        p, drafts = rows(rng, n + 1, V), [rng.randrange(V) for _ in range(n)]
        copied = torch.nn.functional.one_hot(torch.tensor(drafts), V).double()
        q = rows(rng, n, V) if n == 1 else copied
        both = [verdicts(monkeypatch, rule, drafts, q, p) for rule in (accept_block, accept_tokens)]
        assert distance(*both) < 1e-12


# ---- planted bugs -------------------------------------------------------------------------------


def block(drafts, q, p, rng, bug):
    """A second implementation of the rule, with one of four mistakes or with none."""
    g, b = len(drafts), [1.0]
    for i, x in enumerate(drafts.tolist()):
        b.append(b[-1] * float(p[i, x] / q[i, x]))
        b[-1] = b[-1] if bug == "not capped" else min(1.0, b[-1])
    h = []
    for i in range(1, g + 1):
        at = i - 1 if bug == "one position off" else i
        if i < g or bug == "the last as the others":
            left = float((b[i] * p[at] - q[min(at, g - 1)]).clamp(min=0).sum())
            h.append(left / max(left + 1 - b[i], 1e-300))
        else:
            h.append(b[i])
    passed = hispec.coin(torch.tensor(h, dtype=torch.float64), rng).tolist() if g else []
    kept = max([0, *(i + 1 for i, ok in enumerate(passed) if ok)])
    share = 1.0 if bug == "residual without b" else b[kept]
    weights = p[g] if kept == g else (share * p[kept] - q[kept]).clamp(min=0)
    return hispec.draw(weights, rng), torch.tensor([kept]), p


BUGS = ["one position off", "not capped", "residual without b", "the last as the others"]


# rows by the last token; b is 0.9 after draft 1, and two tokens are left in the residual behind it
DRAFT = [[0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]
TARGET = [[0.15, 0.45, 0.4], [0.3, 0.6, 0.1], [0.25, 0.5, 0.25]]


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bugs_are_caught(monkeypatch, bug):
    class Planted(Decoder):
        def accept(self, k, drafts, q, p):
            return block(drafts, q, p, self.rng, bug)

    run = table_ladder([DRAFT, TARGET], Planted)
    try:
        law = output_law(monkeypatch, lambda: run(3, [2]))
    except AssertionError:  # a draw from nothing
        law = {}
    wrong = distance(law, markov_law(TARGET, 3))
    assert wrong < 1e-12 if bug is None else wrong > 1e-3


def test_choices_weigh_what_they_take():
    """In the enumeration, each path's weight is the product of its choices' probabilities."""
    choices = Choices([1])
    assert choices.choose([0.25, 0.75]) == 1 and choices.choose([0.0, 0.5, 0.5]) == 1
    assert choices.weight == 0.375 and choices.others == [[1, 2]]
