"""The bench's arithmetic on made-up runs, its prompts, and one whole run on a small random model."""

import json
import sys
from functools import partial

import pytest
import tiktoken
import torch
from conftest import random_model

import bench
import tune
from bench import Method, Request, differing_tokens, figures, read_prompts
from checkpoints.tokenizer import Tiktoken, Tokenizer
from hispec import Generation, LevelStats, generate

METHODS = [
    Method("greedy", (), (), None),
    Method("single-layer", (1,), (2,), None),
    Method("hispec", (1, 3), (2, 4), None),
]
REQUESTS = [Request("chat", [1], [5, 6, 7, 8]), Request("code", [1], [5, 6])]


def generation(tokens, seconds, *levels):
    return Generation(tokens, [LevelStats(*level) for level in levels], seconds)


def made_up_runs():
    """Two repeats. Greedy: 4 tokens in 4 s and 2 in 1 s; the others faster, HiSpec with one wrong token."""
    greedy = [generation([5, 6, 7, 8], 4.0, (5, 4)), generation([5, 6], 1.0, (5, 2))]
    single = [
        generation([5, 6, 7, 8], 2.0, (1, 6, 6, 3), (5, 2)),
        generation([5, 6], 0.5, (1, 2, 2, 1), (5, 1)),
    ]
    ladder = [
        generation([5, 6, 9, 8], 1.0, (1, 4, 4, 2), (3, 2, 4, 3), (5, 1)),
        generation([5, 6], 1.0, (1, 2, 2, 2), (3, 1, 0, 0), (5, 1)),
    ]
    slower = [[generation(g.tokens, 2 * g.seconds) for g in method] for method in (greedy, single, ladder)]
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
    seconds = [(10, 9, 5), (6, 9, 6), (9, 9, 3)]  # ratios 2, 1, 3; the ratio of the medians would be 9/5
    runs = [[[generation([5], s, (5, 1))] for s in repeat] for repeat in seconds]
    result = figures(METHODS, [Request("chat", [1], [5])], runs, 2, "chat".__eq__)
    assert result["speedup_vs_greedy"] == pytest.approx(2)
    assert result["speedup_vs_single_layer"] == pytest.approx(9 / 5)


def test_positions_are_those_after_the_prompt_for_each_token():
    request = Request("chat", [1, 2, 3], [5, 6])
    one, two = generation([5, 6], 1.0, (5, 2, 2, 2, 4)), generation([5, 6], 1.0, (1, 2, 2, 2, 8), (5, 1, 2, 2, 5))
    assert figures(METHODS, [request], [[[one], [two], [one]]], 0, "chat".__eq__)["positions"] == [(4 - 3) / 2]
    assert figures(METHODS, [request], [[[one], [two], [one]]], 1, "chat".__eq__)["positions"] == [(8 - 3) / 2, 2 / 2]


def test_figures_of_one_category():
    result = figures(METHODS, REQUESTS, made_up_runs(), 2, "code".__eq__)
    assert result["tokens_per_second"] == pytest.approx((2 / 1 + 2 / 2) / 2)
    assert result["speedup_vs_greedy"] == pytest.approx(1.0)
    assert result["speedup_vs_single_layer"] == pytest.approx(0.5)
    assert result["acceptance"] == [1.0, None]  # nothing was proposed there
    assert (result["identical"], result["prompts"]) == (1, 1)


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
    assert all(isinstance(run, Generation) for repeat in runs for method in repeat for run in method)


def test_greedy_is_its_own_yardstick():
    result = figures(METHODS, REQUESTS, made_up_runs(), 0, lambda category: True)
    assert result["speedup_vs_greedy"] == 1
    assert result["tokens_per_target_pass"] == 1
    assert result["acceptance"] == []


@pytest.mark.parametrize(
    "a, b, count", [([], [], 0), ([1, 2], [1, 2], 0), ([1, 2], [1, 3], 1), ([1], [1, 2, 3], 2), ([2, 1, 1], [1], 3)]
)
def test_differing_tokens(a, b, count):
    assert differing_tokens(a, b) == count


def test_the_shipped_prompts():
    questions = read_prompts(bench.Path(bench.__file__).parent / "prompts.jsonl")
    per_category = {c: sum(q["category"] == c for q in questions) for c in {q["category"] for q in questions}}
    assert set(per_category) == {"chat", "code", "summary", "maths", "translation", "retrieval"}
    assert min(per_category.values()) >= 4
    assert any(len(question["turns"]) > 1 for question in questions)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"turns": ["a"]}', '{"category": "x"}', '{"category": "x", "turns": []}',
             '{"category": "x", "turns": [""]}', '{"category": 1, "turns": ["a"]}', '{"category": "x", "turns": "a"}']
)  # fmt: skip
def test_bad_prompts_name_the_line(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"category": "x", "turns": ["a"]}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3.*category.*turns"):
        read_prompts(path)


def test_missing_or_empty_prompts(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")


@pytest.fixture
def small_bench(monkeypatch, tmp_path):
    """bench.main on a random model whose tokens are bytes; returns run(*arguments) -> the JSON it wrote."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer(Tiktoken(encoding, {}), {})
    model = random_model(vocab_size=256, max_seq_len=256).float()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "results" / "ladders.json")
    monkeypatch.setattr(bench, "load", lambda name, device, dtype: (model, tokenizer))
    prompts = [("chat", ["Hello", "And then?"]), ("chat", ["Again"]), ("code", ["def f():"]), ("code", ["x" * 300])]
    lines = [json.dumps({"question_id": i, "category": c, "turns": t}) for i, (c, t) in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def run(*arguments):
        argv = ["bench.py", "--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl")]
        monkeypatch.setattr(sys, "argv", [*argv, "--json", str(tmp_path / "out.json"), *arguments])
        bench.main()
        return model, json.loads((tmp_path / "out.json").read_text())

    run.tokenizer = tokenizer
    run.first = lambda: (tokenizer.encode("Hello"), generate(model, tokenizer.encode("Hello"), 24).tokens)
    return run


def test_a_whole_run(small_bench, capsys, tmp_path):
    model, result = small_bench("--quick")
    assert result.keys() == {"device", "threads", "dtype", "step", "model", "versions", "command", "limit", "methods"}
    assert result["dtype"] == "float32"
    assert "bench.py --device cpu" in result["command"]
    greedy, single, ladder = result["methods"]
    assert [m["name"] for m in result["methods"]] == ["greedy", "single-layer", "hispec"]
    assert (ladder["exits"], ladder["windows"]) == ([1, 2], [2, 4])
    for method in result["methods"]:
        assert method["identical"] == method["prompts"] == 3  # two turns of chat and one of code
        assert method["differing_tokens"] == 0 and method["tokens"] == 3 * 24
        assert method["by_category"]["chat"]["prompts"] == 2
        assert sum(method["time_share"]) + method["time_share_loop"] == pytest.approx(1)
        assert min(method["time_share"]) > 0
    assert single["agreement"].keys() == {"1-5"}
    assert ladder["agreement"].keys() == {"1-2", "1-5", "2-5"}
    assert 0 <= ladder["false_rejects"] <= 1
    assert "identical" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json"}  # and no half-written file


def test_chat_never_leaves_the_template_out(small_bench, capsys):
    class Shout:
        def cut(self, turns):
            return ["!", turns[0], "!"]

    for flag, line in ((), "chat template of the model"), (("--chat", "never"), "plain text"):
        small_bench.tokenizer.template = Shout()
        small_bench("--quick", *flag)
        assert f"\nprompt: {line}\n" in capsys.readouterr().out


def test_the_fixed_step_answers_alike(small_bench, capsys):
    _, plain = small_bench("--quick", "--max-new-tokens", "9")
    _, fixed = small_bench("--quick", "--max-new-tokens", "9", "--step", "fixed")
    assert (plain["step"], fixed["step"]) == ("plain", "fixed")
    for ours, theirs in zip(fixed["methods"], plain["methods"]):
        assert ours["tokens"] == 3 * 9 and ours["differing_tokens"] == 0
        assert ours["acceptance"] == theirs["acceptance"]
        assert min(ours["time_share"]) > 0
    assert all(fixed["limit"][part] > 0 for part in ("pass_seconds", "layer_seconds", "head_seconds"))
    assert "a full pass takes" in capsys.readouterr().out


def test_the_longest_conversation_fits(small_bench):
    """The bound is taken before any answer is known: no prompt that would fit may be left out."""
    model, result = small_bench("--max-new-tokens", "30", "--step", "fixed")
    assert result["methods"][0]["prompts"] == 4


def test_what_does_not_fit_the_context_is_left_out(small_bench):
    _, result = small_bench()  # all prompts: only the one of 300 characters does not fit
    assert result["methods"][0]["prompts"] == 4


def test_turns_contain_the_answers_before_them(small_bench, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "most_tokens", lambda *args: 256)
    monkeypatch.setattr(Tokenizer, "chat", lambda self, turns: asked.append(list(turns)) or [1])
    small_bench("--quick")
    assert [len(turns) for turns in asked[:2]] == [1, 3]
    assert asked[1][0] == "Hello" and asked[1][2] == "And then?"


def test_a_wrong_token_is_shown(small_bench, monkeypatch, capsys):
    def lossy(model, prompt, n, *, exits=(), windows=(), thresholds=(), stop=(), fast=None):
        out = generate(model, prompt, n, exits=exits, windows=windows, stop=stop)
        if len(exits) == 2:
            out.tokens[3] += 1
        return out

    monkeypatch.setattr(bench, "generate", lossy)
    model, result = small_bench("--quick")
    ladder = result["methods"][2]
    assert (ladder["identical"], ladder["differing_tokens"]) == (0, 3)
    first = bench.Request("chat", *small_bench.first())
    ids = torch.tensor([first.prompt + first.greedy[:3]])
    best, second = model(ids)[0, -1].topk(2).values.tolist()
    assert f"hispec differs (chat) from token 3: logits {best:.6g} and {second:.6g}\n" in capsys.readouterr().out


def test_tuning_takes_the_fastest_and_the_next_run_uses_it(small_bench, monkeypatch):
    def clocked(model, prompt, n, *, exits=(), windows=(), thresholds=(), stop=(), fast=None):
        out = generate(model, prompt, n, exits=exits, windows=windows, thresholds=thresholds, stop=stop)
        cost = {((2,), (6,)): 1.0, ((1, 2), (3, 3)): 1.0}.get((exits, windows), 2.0)
        return Generation(out.tokens, out.levels, cost)

    monkeypatch.setattr(tune, "WINDOWS", (3, 6))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(tune, "RUN", 100)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "generate", clocked)
        _, tuned = small_bench("--quick", "--tune")
    kept = next(iter(json.loads(tune.LADDERS.read_text()).values()))
    assert len(kept["single-layer"]["ran"]) == 4 and len(kept["hispec"]["ran"]) == 3  # all there are
    _, later = small_bench("--quick")
    for result in (tuned, later):
        ours = [(m["exits"], m["windows"]) for m in result["methods"]]
        assert ours[:3] == [([], []), ([2], [6]), ([1, 2], [3, 3])]
    assert [m["name"] for m in tuned["methods"]][3:] == ["look-up", "look-up, exit"]  # beyond the paper: while tuning
    assert len(ours) == 3


def test_stop_tokens_stay_out_of_the_conversation(small_bench, monkeypatch):
    first = small_bench.first()[1]
    stop = first[5]
    asked = []
    monkeypatch.setattr(small_bench.tokenizer, "stop", (stop,))
    monkeypatch.setattr(bench, "most_tokens", lambda *args: 256)
    real = Tokenizer.chat
    monkeypatch.setattr(Tokenizer, "chat", lambda self, turns: asked.append(list(turns)) or real(self, turns))
    small_bench("--quick")
    answer = bytes(first[: first.index(stop)]).decode(errors="replace")
    assert asked[1][1] == answer


def test_peers_decode_the_same_weights(small_bench):
    pytest.importorskip("transformers")
    _, result = small_bench("--quick", "--peers")
    greedy, *_, theirs, early_exit, lookup = result["methods"]
    assert theirs["name"] == "transformers"
    assert theirs["identical"] == greedy["prompts"] and theirs["tokens"] == greedy["tokens"]
    assert theirs["tokens_per_target_pass"] is None  # their passes are not counted
    assert theirs["speedup_vs_greedy"] > 0


def test_agreement_and_false_rejects_by_hand(monkeypatch):
    """Agreement equals what the oracle's forward passes say, token by token."""
    model = random_model()
    requests = [Request("chat", [1, 2], generate(model, [1, 2], 20).tokens)]
    out = bench.level_agreement(model, METHODS[2], requests)
    ids = torch.tensor([requests[0].prompt + requests[0].greedy])
    draft, middle, full = (model(ids, exit)[0, 1:-1].argmax(-1).tolist() for exit in (1, 3, 5))
    assert full == requests[0].greedy
    refused = [(d, f) for d, m, f in zip(draft, middle, full, strict=True) if d != m]
    assert out["agreement"]["1-3"] == pytest.approx(sum(d == m for d, m in zip(draft, middle, strict=True)) / 20)
    assert out["agreement"]["3-5"] == pytest.approx(sum(m == f for m, f in zip(middle, full, strict=True)) / 20)
    assert out["false_rejects"] == pytest.approx(sum(d == f for d, f in refused) / len(refused))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "no/such/folder/out.json"], "--json"),
        (["--json", "."], "--json"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),
    ],
)
def test_bad_options_end_at_once_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        bench.parse_arguments()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_no_prompt_that_fits(small_bench, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"category": "x", "turns": ["y" * 999]}))
    with pytest.raises(ValueError, match="no prompt fits.*256"):
        small_bench("--prompts", str(tmp_path / "long.jsonl"))


# Choosing ladders


@pytest.mark.parametrize(
    "costs, best",
    [
        ({3: (1, 2), 6: (3, 1)}, 3),  # fastest in all, though not on the last prompt
        ({3: (1, 5), 6: (2, 1)}, 6),  # fastest in all, though not on the first
    ],
)
def test_tuning_adds_up_over_the_prompts(monkeypatch, costs, best):
    def clocked(exits=(), windows=(), thresholds=()):
        def decode(prompt, n, *, stop=()):
            seconds = costs.get(windows[0], (9, 9))[prompt[0]] if exits == (1,) else 10
            return Generation([3] * 4, [], seconds)

        return decode

    monkeypatch.setattr(tune, "WINDOWS", (3, 6, 8))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(tune, "RUN", 100)
    chosen = tune.tune(random_model(), [[0], [1]], 4, (), clocked, False)["single-layer"]
    assert (chosen["exits"], chosen["windows"]) == ((1,), (best,))
    assert chosen["measured"] == pytest.approx(20 / sum(costs[best]))


@pytest.mark.parametrize("fastest", [1, 6, 16])
def test_tuning_climbs_to_the_fastest_windows_from_wherever_it_begins(monkeypatch, fastest):
    def clocked(exits=(), windows=(), thresholds=()):
        seconds = 20.0 + sum(abs(tune.WINDOWS.index(w) - tune.WINDOWS.index(fastest)) for w in windows)
        return lambda prompt, n, *, stop=(): Generation([3] * 4, [], seconds if windows else 40.0)

    monkeypatch.setattr(tune, "RUN", 1)
    for name, best in tune.tune(random_model(), [[0]], 4, (), clocked, False).items():
        assert best["windows"] == (fastest,) * tune.KINDS[name][0]
        assert best["measured"] == 2


@pytest.mark.parametrize("fixed", [False, True])
def test_tuning_runs_as_many_ladders_of_either_kind(monkeypatch, fixed):
    monkeypatch.setattr(tune, "RUN", 4)
    model = random_model(n_layers=6)
    chosen = tune.tune(model, [[1, 2]], 6, (), partial(bench.decoder, model, 40 if fixed else None), fixed)
    assert list(chosen) == list(tune.KINDS)
    assert chosen["look-up"]["exits"] == (0,) and len(chosen["three exits"]["exits"]) == 3
    for best in chosen.values():
        assert len({(r["exits"], r["windows"], r["thresholds"]) for r in best["ran"]}) == len(best["ran"]) >= 4
        assert best["measured"] == max(r["measured"] for r in best["ran"])


EVERY_WIDTH = range(tune.WIDTHS[-1] + 1)
ONE_A_PASS = tune.Costs(
    {e: [0.0 for _ in EVERY_WIDTH] for e in range(9)}, {e: [1.0 for _ in EVERY_WIDTH] for e in range(1, 9)}, 0.0
)


def test_a_replay_takes_the_steps_that_a_generation_takes():
    """Counted in steps, along a text on which one exit is wrong here and there and the other never."""
    model = random_model(3)
    text = tune.trace(model, [1, 2], 40, (), (1, 3), partial(generate, model))
    for exits, windows in [((), ()), ((1,), (3,)), ((3,), (2,)), ((3,), (6,)), ((0,), (4,)), ((0, 3), (2, 4))]:
        out = generate(model, [1, 2], 40, exits=exits, windows=windows)
        steps = tune.replay(text, (exits, windows, (0.0,) * len(exits)), ONE_A_PASS, model.config.n_layers)
        assert steps == pytest.approx(sum(level.calls for level in out.levels if level.exit > 0), rel=0.1)
    # a draft in doubt stops: at threshold 1 after every token, as a window of 1 does
    doubting = tune.replay(text, ((3,), (6,), (1.0,)), ONE_A_PASS, model.config.n_layers)
    assert doubting == tune.replay(text, ((3,), (1,), (0.0,)), ONE_A_PASS, model.config.n_layers)


def test_a_replay_charges_each_segment_the_difference_of_its_depths():
    """All drafts right, two a step: level 0 runs layers 0..2, the full model 3..7, a head each."""
    trunk = {e: [e**2 * w for w in EVERY_WIDTH] for e in (0, 2, 7)}
    costs = tune.Costs(trunk, {2: [0.5 for _ in EVERY_WIDTH], 7: [3.0 for _ in EVERY_WIDTH]}, 0.25)
    text = tune.Trace([1], 0.0, {2: [5] * 6, 7: [5] * 6}, {2: [1.0] * 6, 7: [1.0] * 6})
    drafts, checks = 4, 2  # the second round begins with the full model's own token, which level 0 has not run
    layers = 4 * 5 + (49 - 4) * 5  # five positions in all: the first round's drafts and token, then two drafts
    assert tune.replay(text, ((2,), (2,), (0.0,)), costs, 7) == layers + drafts * 0.75 + checks * 3.25


@pytest.mark.parametrize("fixed", [False, True])
def test_costs_are_measured_by_width_or_by_the_pass_if_it_is_fixed(monkeypatch, fixed):
    monkeypatch.setattr(tune, "timed", lambda call, on_gpu: 1.0)
    model = random_model()
    costs = tune.measure_costs(model, (1, 3), bench.decoder(model, 64 if fixed else None), fixed)
    assert costs.trunk.keys() == {0, 1, 3, 5} and costs.head.keys() == {1, 3, 5} and costs.loop >= 0
    assert set(costs.trunk[0]) == {0}
    for row in costs.trunk[5], *costs.head.values():
        assert len(row) == len(EVERY_WIDTH) and row[0] == 0
    # each timing takes a second: the fixed step needs two passes for more than sixteen positions
    assert costs.trunk[5][1:] == [1 + (fixed and w > 16) for w in EVERY_WIDTH[1:]]
    assert costs.trunk[3][1] == pytest.approx(3 / 5 if fixed else 1)


def test_costs_between_the_timed_widths_are_interpolated(monkeypatch):
    model = random_model()
    run = lambda h, first, last, start=0, cache=None: h  # noqa: E731
    monkeypatch.setattr(model, "run", run)
    monkeypatch.setattr(tune, "timed", lambda call, on_gpu: float(call().shape[1]) if call().ndim == 3 else 1.0)
    costs = tune.measure_costs(model, (1, 3), lambda prompt, n: Generation([3] * n, [], 1.0), False)
    assert costs.trunk[3] == pytest.approx([float(w) for w in EVERY_WIDTH])


HEADER = {
    "model": "m",
    "dtype": "float32",
    "step": "plain",
    "device": "cpu",
    "versions": {},
    "command": "python bench.py --tune",
}


def test_ladders_are_kept_by_model_dtype_and_device(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "results" / "ladders.json")
    model = random_model()
    assert tune.saved_ladders(HEADER, model) == {}
    one = {"hispec": {"exits": [1, 2], "windows": [3, 4], "thresholds": [0.5, 0.0]}}
    two = {"single-layer": {"exits": [1], "windows": [2], "thresholds": [0.1]}}
    tune.save_ladders(HEADER, one)
    for key in ("model", "dtype", "device"):
        other = HEADER | {key: "other"}
        assert tune.saved_ladders(other, model) == {}
        tune.save_ladders(other, two)
        assert tune.saved_ladders(other, model) == two
    assert tune.saved_ladders(HEADER, model) == one


@pytest.mark.parametrize(
    "ladder",
    [
        {"exits": [1], "windows": [2]},
        {"exits": [1, 5], "windows": [2, 2]},
        {"exits": [1, 2], "windows": [2, 19]},
        {"exits": [1, 2], "windows": [0, 2]},
        {"exits": [1, 2]},
        [],
        {"exits": 3},
    ],
)
def test_a_ladder_that_does_not_fit_is_refused(monkeypatch, tmp_path, ladder):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "ladders.json")
    tune.save_ladders(HEADER, {"hispec": ladder})
    with pytest.raises(ValueError, match="ladders.json: hispec of m, float32, plain step, cpu does not fit"):
        tune.saved_ladders(HEADER, random_model())


@pytest.mark.parametrize("content", ["{bad", "[]", '{"a": 3}'])
def test_a_damaged_ladder_file_is_named(monkeypatch, tmp_path, content):
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "ladders.json")
    tune.LADDERS.write_text(content)
    with pytest.raises(ValueError, match="ladders.json is damaged"):
        tune.saved_ladders(HEADER, random_model())


def test_default_exits():
    model = random_model(n_layers=30)
    assert tune.default_exits(model) == (4, 8)
    model.exits = (2, 5, 9)
    assert tune.default_exits(model) == (2, 5, 9)
    assert tune.default_exits(random_model(n_layers=3)) == (1, 2)
    for layers in (1, 2):
        with pytest.raises(ValueError, match=f"two exits below .* {layers} layers"):
            tune.default_exits(random_model(n_layers=layers))


@pytest.mark.parametrize(
    "seconds, best", [({1: 1.0, 2: 0.97, 4: 2.0}, 1), ({1: 1.0, 2: 0.5, 4: 0.3}, 4), ({1: 1, 2: 0.8, 4: 3}, 2)]
)
def test_best_threads_is_the_fewest_of_the_fastest(monkeypatch, seconds, best):
    now = {}
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.update(threads=n))
    monkeypatch.setattr(tune, "generate", lambda model, prompt, n: Generation([], [], seconds[now["threads"]]))
    assert tune.best_threads(None) == best


def test_the_memory_limit_counts_each_weight_of_a_pass_once():
    model = random_model(vocab_size=11, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24)  # tied embeddings
    limit = bench.memory_limit(model)
    layer = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert limit["pass_bytes"] == 8 * (2 * layer + 16 + 11 * 16)
    assert limit["greedy_tokens_per_second"] == limit["bytes_per_second"] / limit["pass_bytes"] > 0
