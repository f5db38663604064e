"""The bench's arithmetic on made-up runs, and what is measured beside what."""

import pytest
from conftest import random_model

import bench
from bench import Method, differing_tokens, figures
from hispec import Generation, LevelStats
from lab.prompts import Request
from lab.report import print_samples

METHODS = [
    Method("greedy", (), (), None),
    Method("single-layer", (1,), (2,), None),
    Method("hispec", (1, 3), (2, 4), None),
]
REQUESTS = [Request("chat", [1], [5, 6, 7, 8]), Request("code", [1], [5, 6])]


def generation(tokens, seconds, *levels, prefill=0.0):
    return Generation(tokens, [LevelStats(*level) for level in levels], seconds, prefill)


def made_up_runs():
    """Two repeats. Greedy: 4 tokens in 4 s and 2 in 1 s; the others faster, HiSpec with one wrong
    token."""
    greedy = [generation([5, 6, 7, 8], 4.0, (5, 4)), generation([5, 6], 1.0, (5, 2))]
    single = [
        generation([5, 6, 7, 8], 2.0, (1, 6, 6, 3), (5, 2)),
        generation([5, 6], 0.5, (1, 2, 2, 1), (5, 1)),
    ]
    ladder = [
        generation([5, 6, 9, 8], 1.0, (1, 4, 4, 2), (3, 2, 4, 3), (5, 1)),
        generation([5, 6], 1.0, (1, 2, 2, 2), (3, 1, 0, 0), (5, 1)),
    ]
    slower = [
        [generation(g.tokens, 2 * g.seconds) for g in method] for method in (greedy, single, ladder)
    ]
    for method, original in zip(slower, (greedy, single, ladder), strict=True):
        for copy, g in zip(method, original, strict=True):
            copy.levels = g.levels
    return [[greedy, single, ladder], slower]


def test_figures_over_all_requests():
    result = figures(METHODS, REQUESTS, made_up_runs(), 2, lambda category: True)
    assert result["tokens_per_second"] == pytest.approx((6 / 2 + 6 / 4) / 2)  # median of 3 and 1.5
    assert result["speedup_vs_greedy"] == pytest.approx((6 / 2) / (6 / 5))
    assert result["speedup_vs_single_layer"] == pytest.approx((6 / 2) / (6 / 2.5))
    assert result["tokens_per_target_pass"] == 6 / 2
    assert result["acceptance"] == [4 / 6, 3 / 4]
    assert (result["identical"], result["prompts"]) == (1, 2)
    assert (result["tokens"], result["differing_tokens"]) == (6, 1)


def test_speedups_are_medians_of_ratios_within_a_repeat():
    # ratios 2, 1, 3; the ratio of the medians would be 9/5
    seconds = [(10, 9, 5), (6, 9, 6), (9, 9, 3)]
    runs = [[[generation([5], s, (5, 1))] for s in repeat] for repeat in seconds]
    result = figures(METHODS, [Request("chat", [1], [5])], runs, 2, "chat".__eq__)
    assert result["speedup_vs_greedy"] == pytest.approx(2)
    assert result["speedup_vs_single_layer"] == pytest.approx(9 / 5)


def test_positions_are_those_after_the_prompt_for_each_token():
    request = Request("chat", [1, 2, 3], [5, 6])
    one, two = (
        generation([5, 6], 1.0, (5, 2, 2, 2, 4)),
        generation([5, 6], 1.0, (1, 2, 2, 2, 8), (5, 1, 2, 2, 5)),
    )
    assert figures(METHODS, [request], [[[one], [two], [one]]], 0, "chat".__eq__)["positions"] == [
        (4 - 3) / 2
    ]
    assert figures(METHODS, [request], [[[one], [two], [one]]], 1, "chat".__eq__)["positions"] == [
        (8 - 3) / 2,
        2 / 2,
    ]


def test_figures_of_one_category():
    result = figures(METHODS, REQUESTS, made_up_runs(), 2, "code".__eq__)
    assert result["tokens_per_second"] == pytest.approx((2 / 1 + 2 / 2) / 2)
    assert result["speedup_vs_greedy"] == pytest.approx(1.0)
    assert result["speedup_vs_single_layer"] == pytest.approx(0.5)
    assert result["acceptance"] == [1.0, None]  # nothing was proposed there
    assert (result["identical"], result["prompts"]) == (1, 1)


def test_prefill_is_apart_and_what_was_written_is_told():
    """Prefill: means of 2.5 and 1.5 seconds in two repeats; decoding: of 2 and 1."""
    row, loop = list(range(20)), [7] * 24
    repeats = [
        [generation(row, 4.0, (5, 20), prefill=3.0), generation(loop, 5.0, (5, 24), prefill=2.0)],
        [generation(row, 2.0, (5, 20), prefill=1.0), generation(loop, 3.0, (5, 24), prefill=2.0)],
    ]
    methods = [Method(name, (), (), None) for name in ("greedy", "single-layer")]
    requests = [Request("chat", [1], row), Request("code", [1], loop)]
    runs = [[repeat, repeat] for repeat in repeats]
    result = figures(methods, requests, runs, 0, lambda category: True)
    assert (result["prefill_seconds"], result["decode_seconds"]) == (2.0, 1.5)
    assert result["distinct"] == (20 + 1) / 2
    assert result["looping"] == 16 / 44  # all but the first eight of the loop
    result = figures(methods, requests, runs, 0, "code".__eq__)
    assert (result["prefill_seconds"], result["distinct"], result["looping"]) == (2.0, 1, 16 / 24)
    theirs = [[[generation(row, 4.0)] * 2] * 2]  # a peer's levels are not known
    result = figures(methods, requests, theirs, 0, lambda category: True)
    assert result["prefill_seconds"] is result["decode_seconds"] is None


def test_sampled_texts_are_not_compared():
    greedy = figures(METHODS, REQUESTS, made_up_runs(), 2, lambda category: True)
    sampled = figures(METHODS, REQUESTS, made_up_runs(), 2, lambda category: True, sampled=True)
    assert greedy == sampled | {"identical": 1, "differing_tokens": 1}
    whole = bench.summarise(METHODS, REQUESTS, made_up_runs(), True)[2]
    code = figures(METHODS, REQUESTS, made_up_runs(), 2, "code".__eq__, sampled=True)
    assert whole["by_category"]["code"] == code


def test_each_request_is_sampled_from_its_own_seed():
    asked = []

    def decode(prompt, n, *, stop, **law):
        return asked.append(law) or generation([5], 1.0)

    methods = [Method(name, (), (), decode) for name in "ab"]
    bench.measure(methods, REQUESTS, 4, (), 1, {"temperature": 0.8, "seed": 7})
    assert asked == [{"temperature": 0.8, "seed": seed} for seed in (7, 7, 8, 8)]
    asked.clear()
    bench.measure(methods, REQUESTS, 4, (), 1, {})
    assert asked == [{}] * 4


@pytest.mark.parametrize(
    "ladder, added",
    [
        ({"exits": [1, 2], "windows": [2, 4]}, False),
        ({"exits": [1, 2], "windows": (2, 4), "thresholds": (0.0, 0.0)}, False),
        ({"exits": [1, 2], "windows": [2, 4], "thresholds": [0.3, 0.0]}, True),
        ({"exits": [1, 3], "windows": [3, 4]}, True),
    ],
)
def test_the_papers_windows_beside_others(ladder, added):
    more = {"look-up": {"exits": [0], "windows": [8]}}
    ladders = bench.all_ladders(random_model(), {"hispec": ladder, **more})
    papers = [("paper windows", (tuple(ladder["exits"]), (2, 4), ()))]
    assert [x for x in ladders.items() if x[0] == "paper windows"] == papers * added
    assert [*ladders][:3] == ["greedy", "single-layer", "hispec"]


def test_a_sample_of_each_category_is_its_first(capsys):
    class Spell:
        def decode(self, tokens):
            return " " + "".join(chr(96 + token) for token in tokens)

    requests = [Request(c, [1], text) for c, text in (("x", [1, 2]), ("y", [3]), ("x", [4]))]
    print_samples(requests, Spell())
    assert capsys.readouterr().out == "\nSample (x): ab\n\nSample (y): c\n"


def test_acceptance_has_an_entry_for_each_level_but_the_last():
    deep = generation([5], 1.0, (1, 8, 8, 6), (2, 4, 6, 3), (3, 2, 4, 1), (5, 1, 1, 1))
    runs = [[[generation([5], 1.0, (5, 1))], [generation([5], 1.0, (5, 1))], [deep]]]
    result = figures(METHODS, [Request("chat", [1], [5])], runs, 2, "chat".__eq__)
    assert result["acceptance"] == [6 / 8, 3 / 6, 1 / 4]


def test_methods_take_turns_in_a_rotating_order():
    order = []

    def decode(name):
        return lambda prompt, n, *, stop: order.append(name) or generation([5], 1.0)

    methods = [Method(name, (), (), decode(name)) for name in "abc"]
    runs = bench.measure(methods, REQUESTS, 4, (), 3)
    assert len(order) == 3 * 2 * 3
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0] for turn in turns} == {"a", "b", "c"}  # none is always the first
    assert all(
        isinstance(run, Generation) for repeat in runs for method in repeat for run in method
    )


def test_greedy_is_its_own_yardstick():
    result = figures(METHODS, REQUESTS, made_up_runs(), 0, lambda category: True)
    assert result["speedup_vs_greedy"] == 1
    assert result["tokens_per_target_pass"] == 1
    assert result["acceptance"] == []


@pytest.mark.parametrize(
    "a, b, count",
    [
        ([], [], 0),
        ([1, 2], [1, 2], 0),
        ([1, 2], [1, 3], 1),
        ([1], [1, 2, 3], 2),
        ([2, 1, 1], [1], 3),
    ],
)
def test_differing_tokens(a, b, count):
    assert differing_tokens(a, b) == count
