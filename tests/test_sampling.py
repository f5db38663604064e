"""The distribution of sampled text, checked exactly by enumerating every random choice of the real
loop.
"""

from collections import defaultdict
from itertools import product

import pytest
import torch
from conftest import random_model

import hispec
from hispec import generate
from model import Config, ExitHead, Llama


class Choices:
    """Replaces `coin` and `draw`: follows a given path of choices, then always takes the first
    possible one.
    """

    def __init__(self, path):
        self.path, self.taken, self.weight, self.others = path, [], 1.0, []

    def choose(self, probs: list[float]) -> int:
        i = len(self.taken)
        possible = [option for option, prob in enumerate(probs) if prob > 0]
        option = self.path[i] if i < len(self.path) else possible[0]
        if i >= len(self.path):
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(option)
        self.weight *= probs[option]
        return option

    def coin(self, prob, rng):
        return torch.tensor(
            [self.choose([1 - p, p]) == 1 for p in prob.clamp(max=1).tolist()], dtype=torch.bool
        )

    def draw(self, weights, rng):
        if weights.sum() == 0:  # p and q differ only by rounding, and that was drawn
            assert self.weight < 1e-12
            return torch.zeros(1, dtype=torch.long)
        return torch.tensor([self.choose((weights / weights.sum()).tolist())])


def output_law(monkeypatch, run) -> dict[tuple[int, ...], float]:
    """The exact distribution of run()'s tokens over everything `coin` and `draw` can do."""
    law, paths = defaultdict(float), [[]]
    while paths:
        choices = Choices(paths.pop())
        monkeypatch.setattr(hispec, "coin", choices.coin)
        monkeypatch.setattr(hispec, "draw", choices.draw)
        law[tuple(run())] += choices.weight
        paths += choices.others
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    return law


def distance(law, target) -> float:
    return max(abs(law.get(key, 0) - target.get(key, 0)) for key in {*law, *target})


def table_ladder(tables, decoder=hispec.Decoder, context=16):
    """A ladder whose exit at depth d predicts by tables[d-1] (V, V): row = last token. Returns run(n, windows)."""
    tables = [torch.tensor(table, dtype=torch.float64) for table in tables]
    V, L = len(tables[0]), len(tables)
    model = Llama(Config(V, 2, L, 1, 1, 2, max_seq_len=context)).double()

    class Tables(hispec.Step):
        def run(self, cache, tokens, length, k, n):
            for j in range(k + 1):
                cache.advance(j, length)
            return tables[cache.depths[k] - 1].log()[tokens[length - n : length]]

    class PromptRead(decoder):
        """Skips the prompt's own pass: its token is the full model's own, so it would only add to
        the enumeration.
        """

        def read_prompt(self):
            self.cache.lengths = [1] * len(self.cache.lengths)

    def run(n, windows, thresholds=(), prompt=(0,), look_up=False, drafter=None, **cut):
        first = 0 if look_up or drafter else 1
        options = dict(exits=range(first, L), windows=windows, thresholds=thresholds, **cut)
        options |= dict(temperature=1.0, seed=0, fast=Tables(model), decoder=PromptRead)
        options["drafter"] = drafter
        return generate(model, prompt, n, **options).tokens

    return run


def markov_law(table, n):
    law = {}
    for tokens in product(range(len(table)), repeat=n):
        weight, last = 1.0, 0
        for token in tokens:
            weight, last = weight * table[last][token], token
        law[tokens] = weight
    return law


@torch.no_grad()
def law_of_two(model, prompt, temperature):
    """The distribution of a model's next two tokens, from passes over whole texts, uncached."""
    law, last = {}, len(prompt) - 1
    for tokens in product(range(model.config.vocab_size), repeat=2):
        rows = torch.softmax(model(torch.tensor([[*prompt, *tokens]]))[0] / temperature, -1)
        law[tokens] = float(rows[last, tokens[0]] * rows[last + 1, tokens[1]])
    return law


RULES = [hispec.Decoder, hispec.TokenByToken]
DRAFT2, MIDDLE2, TARGET2 = (
    [[0.9, 0.1], [0.2, 0.8]],
    [[0.4, 0.6], [0.7, 0.3]],
    [[0.3, 0.7], [0.55, 0.45]],
)
DRAFT3 = [[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]]  # zeros: tokens that are never drafted
TARGET3 = [[0.2, 0.3, 0.5], [0.0, 0.9, 0.1], [0.25, 0.5, 0.25]]


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("tables", [[DRAFT2, TARGET2], [DRAFT3, TARGET3], [TARGET2, TARGET2]])
@pytest.mark.parametrize("rule", RULES)
def test_two_levels_follow_the_target_exactly(monkeypatch, tables, window, rule):
    run = table_ladder(tables, rule)
    law = output_law(monkeypatch, lambda: run(3, [window]))
    assert distance(law, markov_law(tables[-1], 3)) < 1e-12


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.0), (0.0, 0.2), (0.5, 0.1)])
@pytest.mark.parametrize("windows", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_three_levels_follow_the_target_exactly(monkeypatch, windows, thresholds, rule):
    run = table_ladder([DRAFT2, MIDDLE2, TARGET2], rule)
    law = output_law(monkeypatch, lambda: run(3, windows, thresholds))
    assert distance(law, markov_law(TARGET2, 3)) < 1e-12


@pytest.mark.parametrize("windows", [(1,), (2,), (3,), (1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_a_look_up_below_follows_the_target_exactly(monkeypatch, windows, rule):
    run = table_ladder([MIDDLE2, TARGET2][-len(windows) :], rule)
    law = output_law(monkeypatch, lambda: run(3, windows, prompt=[0, 1, 0, 0, 1, 0], look_up=True))
    assert distance(law, markov_law(TARGET2, 3)) < 1e-12


def cut(row, top_k=0, top_p=1.0):
    """A distribution cut to its top_k likeliest, then to the fewest that hold top_p, with ties
    kept: written out.
    """
    if top_k:
        least = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        row = [p if p >= least else 0.0 for p in row]
        row = [p / sum(row) for p in row]
    held, least = 0.0, 0.0
    for p in sorted(row, reverse=True):
        if held < top_p:
            held, least = held + p, p
    row = [p if p >= least else 0.0 for p in row]
    return [p / sum(row) for p in row]


CUTS = [
    dict(top_k=1),
    dict(top_k=2),
    dict(top_p=0.4),
    dict(top_p=0.7),
    dict(top_k=2, top_p=0.6),
    dict(top_p=1e-9),
]
TIES3 = [[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.25, 0.375, 0.375]]  # the last kept has a twin


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("tables", [[DRAFT3, TARGET3], [TARGET3, TIES3], [TIES3, TARGET3]])
@pytest.mark.parametrize("rule", RULES)
def test_two_levels_follow_the_truncated_target_exactly(monkeypatch, tables, options, rule):
    run = table_ladder(tables, rule)
    law = output_law(monkeypatch, lambda: run(3, [2], **options))
    assert distance(law, markov_law([cut(row, **options) for row in tables[-1]], 3)) < 1e-12


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_k=2), dict(top_p=0.65)], ids=str)
@pytest.mark.parametrize("windows", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_three_levels_follow_the_truncated_target_exactly(monkeypatch, windows, options, rule):
    run = table_ladder([DRAFT3, TIES3, TARGET3], rule)
    law = output_law(monkeypatch, lambda: run(2, windows, **options))
    assert distance(law, markov_law([cut(row, **options) for row in TARGET3], 2)) < 1e-12


def test_truncating_only_the_last_level_is_caught(monkeypatch):
    """Planted bug: drafts are drawn from the whole distribution but treated as drawn from the
    truncated one.
    """
    run = table_ladder([TARGET3, TIES3], hispec.TokenByToken)
    real = hispec.accept_tokens
    whole = torch.tensor(TARGET3, dtype=torch.float64)

    def drawn_from_all(drafts, q, p, rng):
        if len(drafts):
            return real(drafts, q.clamp(min=1e-300), p, rng)
        return hispec.draw(whole[0], rng), torch.zeros(1, dtype=torch.long), p

    monkeypatch.setattr(hispec, "accept_tokens", drawn_from_all)
    law = output_law(monkeypatch, lambda: run(2, [1], top_k=2))
    assert distance(law, markov_law([cut(row, top_k=2) for row in TIES3], 2)) > 1e-3


real_accept_tokens = hispec.accept_tokens


def resampling_from_p(drafts, q, p, rng):
    """Planted bug: after a rejection it draws from p instead of the residual."""
    x = drafts.unsqueeze(1)
    accepted = hispec.leading(hispec.coin((p[:-1].gather(1, x) / q.gather(1, x)).squeeze(1), rng))
    return hispec.draw(p[accepted].squeeze(0), rng), accepted, p


def test_a_middle_level_that_resamples_from_p_is_caught(monkeypatch):
    half = [[0.5, 0.5], [0.5, 0.5]]
    run = table_ladder([[[1.0, 0.0], [1.0, 0.0]], half, half], hispec.TokenByToken)
    exact = output_law(monkeypatch, lambda: run(1, [1, 1]))
    monkeypatch.setattr(hispec, "accept_tokens", resampling_from_p)
    wrong = output_law(monkeypatch, lambda: run(1, [1, 1]))
    assert exact == pytest.approx({(0,): 0.5, (1,): 0.5}, abs=1e-12)
    assert wrong == pytest.approx({(0,): 0.75, (1,): 0.25}, abs=1e-12)


class KeepsEverything(hispec.Decoder):
    """A lossy rule in the middle: level 1 keeps every draft, and returns q as the distribution
    written.
    """

    def accept(self, k, drafts, q, p):
        if k != 1:
            return super().accept(k, drafts, q, p)
        own = hispec.draw(p[-1], self.rng)
        return own, torch.full((1,), len(drafts)), torch.cat([q, p[-1:]])


@pytest.mark.parametrize("windows", [(1, 1), (2, 2), (1, 3)])
def test_a_lossy_rule_in_the_middle_leaves_the_last_levels_law_unharmed(monkeypatch, windows):
    certain = [[1.0, 0.0], [1.0, 0.0]]
    for tables in ([certain, [[0.5, 0.5]] * 2, [[0.5, 0.5]] * 2], [DRAFT2, MIDDLE2, TARGET2]):
        run = table_ladder(tables, KeepsEverything)
        law = output_law(monkeypatch, lambda run=run: run(2, windows))
        assert distance(law, markov_law(tables[-1], 2)) < 1e-12


class KeepsTheLikeliest(hispec.Decoder):
    """A lossy rule that also rejects: level 1 keeps its two likeliest tokens, and otherwise draws
    from p.
    """

    def accept(self, k, drafts, q, p):
        if k != 1:
            return super().accept(k, drafts, q, p)
        likely = torch.zeros_like(q).scatter_(1, p[:-1].topk(2).indices, 1.0)  # (n, V)
        kept = hispec.leading(likely.gather(1, drafts[:, None]).squeeze(1) > 0)
        own = hispec.draw(p.index_select(0, kept).squeeze(0), self.rng)
        refused = (q * (1 - likely)).sum(-1, keepdim=True)
        return own, kept, torch.cat([q * likely + refused * p[:-1], p[-1:]])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("windows", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_lossy_rule_that_refuses_leaves_the_last_levels_law_unharmed(monkeypatch, windows, n):
    run = table_ladder([DRAFT3, TIES3, TARGET3], KeepsTheLikeliest)
    law = output_law(monkeypatch, lambda: run(n, windows))
    assert distance(law, markov_law(TARGET3, n)) < 1e-12


def test_a_wrong_account_of_what_a_lossy_rule_writes_is_caught(monkeypatch):
    """Planted bug: what is refused is summed over all drafts, which one draft at a time hides."""

    class SumsOverAll(KeepsTheLikeliest):
        def accept(self, k, drafts, q, p):
            own, kept, written = super().accept(k, drafts, q, p)
            if k == 1:
                likely = torch.zeros_like(q).scatter_(1, p[:-1].topk(2).indices, 1.0)
                rows = q * likely + (q * (1 - likely)).sum() * p[:-1]
                written = torch.cat([rows / rows.sum(-1, keepdim=True), p[-1:]])
            return own, kept, written

    run = table_ladder([DRAFT3, TIES3, TARGET3], SumsOverAll)
    assert distance(output_law(monkeypatch, lambda: run(3, (2, 2))), markov_law(TARGET3, 3)) > 1e-3


def test_a_lossy_rule_that_claims_to_be_exact_is_caught(monkeypatch):
    class Lies(KeepsEverything):
        def accept(self, k, drafts, q, p):
            own, kept, _ = super().accept(k, drafts, q, p)
            return own, kept, p

    certain, half = [[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]
    law = output_law(monkeypatch, lambda: table_ladder([certain, half, half], Lies)(1, [1, 1]))
    assert law == pytest.approx({(0,): 1.0}, abs=1e-12)


def test_a_level_that_forgets_a_row_is_caught(monkeypatch):
    """Planted bug: the middle level hands up its draft's distributions instead of its own."""
    run = table_ladder([DRAFT2, MIDDLE2, TARGET2], hispec.TokenByToken)

    def forgetful(drafts, q, p, rng):
        own, kept, p = real_accept_tokens(drafts, q, p, rng)
        p[: len(q)] = q
        return own, kept, p

    monkeypatch.setattr(hispec, "accept_tokens", forgetful)
    law = output_law(monkeypatch, lambda: run(2, [1, 1]))
    assert distance(law, markov_law(TARGET2, 2)) > 1e-3


@pytest.mark.parametrize(
    "exits, windows, draft_vocab",
    [((1,), (2,), None), ((1, 2), (1, 2), None), ((1, 2), (2, 1), [0, 2])],
)
def test_a_real_model_follows_its_own_law(monkeypatch, exits, windows, draft_vocab):
    model = random_model(5, vocab_size=3, n_layers=3)
    if draft_vocab:
        model.exit_heads["1"] = ExitHead(model.config, vocab=draft_vocab).double()
    options = dict(exits=exits, windows=windows, temperature=3.0, seed=0)
    law = output_law(monkeypatch, lambda: generate(model, [2, 0], 2, **options).tokens)
    assert distance(law, law_of_two(model, [2, 0], 3.0)) < 1e-12


def test_coin_and_draw_are_what_the_enumeration_takes_them_for():
    rng = torch.Generator().manual_seed(0)
    coins = (
        hispec.coin(torch.tensor([0.3, 1.0, 0.0, 7.0]).double().expand(20_000, 4), rng)
        .double()
        .mean(0)
    )
    assert coins[1] == 1 and coins[2] == 0 and coins[3] == 1
    assert abs(coins[0] - 0.3) < 0.02  # six standard deviations
    weights = torch.tensor([1.0, 0.0, 3.0]).double()  # unnormalised
    drawn = (
        torch.cat([hispec.draw(weights, rng) for _ in range(4_000)]).bincount(minlength=3) / 4_000
    )
    assert drawn[1] == 0
    assert abs(drawn[2] - 0.75) < 0.05


def test_a_tiny_temperature_is_greedy():
    model = random_model(1)
    plain = generate(model, [1], 20).tokens
    assert (
        generate(model, [1], 20, exits=(1, 3), windows=(2, 3), temperature=1e-30, seed=0).tokens
        == plain
    )


def test_a_seed_makes_sampling_reproducible():
    model = random_model(1)
    arguments = dict(exits=(1, 3), windows=(2, 3), temperature=5.0)
    first = generate(model, [1], 30, seed=7, **arguments).tokens
    assert generate(model, [1], 30, seed=7, **arguments).tokens == first
    assert generate(model, [1], 30, seed=8, **arguments).tokens != first
    assert (
        generate(model, [1], 30, **arguments).tokens != generate(model, [1], 30, **arguments).tokens
    )


def test_sampled_output_ends_at_stop_and_limit():
    model = random_model(1, max_seq_len=20)
    for seed in range(30):
        out = generate(
            model, [1, 2], 18, exits=(1, 3), windows=(2, 3), temperature=2.0, seed=seed, stop=[3]
        ).tokens
        assert (out[-1] == 3 and 3 not in out[:-1]) or (len(out) == 18 and 3 not in out)
