"""The bench's options and prompts, and whole runs on a small random model."""

import json
import re
import sys

import pytest
import tiktoken
import torch
from conftest import random_model

import bench
from checkpoints.tokenizer import Tiktoken, Tokenizer
from hispec import Generation, generate
from lab import tune
from lab.prompts import Request


@pytest.fixture
def small_bench(monkeypatch, tmp_path):
    """bench.main on a random model whose tokens are bytes; returns run(*arguments) -> the JSON it
    wrote."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = Tokenizer(Tiktoken(encoding, {}), {})
    model = random_model(vocab_size=256, max_seq_len=256).float()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(tune, "LADDERS", tmp_path / "results" / "ladders.json")
    monkeypatch.setattr(bench, "load", lambda name, device, dtype: (model, tokenizer))
    prompts = [
        ("chat", ["Hello", "And then?"]),
        ("chat", ["Again"]),
        ("code", ["def f():"]),
        ("code", ["x" * 300]),
    ]
    lines = [
        json.dumps({"question_id": i, "category": c, "turns": t})
        for i, (c, t) in enumerate(prompts)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def run(*arguments):
        argv = ["bench.py", "--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl")]
        argv += ["--dtype", "float32"] * run.in_float32
        monkeypatch.setattr(sys, "argv", [*argv, "--json", str(tmp_path / "out.json"), *arguments])
        bench.main()
        return model, json.loads((tmp_path / "out.json").read_text())

    run.tokenizer, run.in_float32 = tokenizer, True
    run.first = lambda: (
        tokenizer.encode("Hello"),
        generate(model, tokenizer.encode("Hello"), 24).tokens,
    )
    return run


def test_a_whole_run(small_bench, capsys, tmp_path):
    model, result = small_bench("--quick")
    assert result.keys() == {
        "device",
        "threads",
        "dtype",
        "step",
        "model",
        "versions",
        "command",
        "sampling",
        "limit",
        "methods",
    }
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
        drawn = method["sampled"]
        assert drawn["prompts"] == 2 and drawn["tokens"] == 2 * 24  # one of each
        assert drawn["by_category"].keys() == {"chat", "code"}
        assert not {"identical", "differing_tokens"} & {*drawn, *drawn["by_category"]["code"]}
    assert greedy["sampled"]["speedup_vs_greedy"] == single["sampled"]["speedup_vs_single_layer"]
    assert result["sampling"] == {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "seed": 0}
    assert [len(level) for level in ladder["acceptance_by_position"]] == [2, 5]  # and a bonus
    assert len(ladder["accepted_length"]) == 2
    assert single["agreement"].keys() == {"1-5"}
    assert ladder["agreement"].keys() == {"1-2", "1-5", "2-5"}
    assert 0 <= ladder["false_rejects"] <= 1
    assert "identical" in capsys.readouterr().out
    # and no half-written file; results holds the number of threads
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json", "results"}


def test_temperature_0_leaves_the_sampled_part_out(small_bench, capsys):
    _, result = small_bench("--quick", "--temperature", "0")
    assert result["sampling"] == {}
    assert not any("sampled" in method for method in result["methods"])
    assert "temperature" not in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [(3, 4), (2**63 - 1, 0)])
def test_what_the_sampled_part_draws_from(small_bench, monkeypatch, seeds):
    asked = []

    def watched(model, prompt, n, **options):
        law = {key: options.pop(key, None) for key in ("temperature", "top_p", "top_k", "seed")}
        asked.append(tuple(law.values()))
        return generate(model, prompt, n, **options)

    monkeypatch.setattr(bench, "generate", watched)
    law = ("--temperature", "1.5", "--top-p", "0.9", "--top-k", "5", "--seed", str(seeds[0]))
    small_bench("--quick", "--max-new-tokens", "4", *law)
    drawn = [(1.5, 0.9, 5, seed) for seed in seeds]  # of two categories one request each
    assert [asked.count(law) for law in drawn] == [3, 3]
    assert {*asked} == {*drawn, (None,) * 4}


def test_chat_never_leaves_the_template_out(small_bench, capsys):
    class Shout:
        def cut(self, turns):
            return ["!", turns[0], "!"]

    for flag, line in ((), "chat template of the model"), (("--chat", "never"), "plain text"):
        small_bench.tokenizer.template = Shout()
        small_bench("--quick", *flag)
        assert f"\nprompt: {line}\n" in capsys.readouterr().out


def test_prompts_that_suit_the_model_where_none_are_given(small_bench, monkeypatch, tmp_path):
    asked, own = [], tmp_path / "own.jsonl"
    own.write_text('{"category": "own", "turns": ["def g():"]}')
    monkeypatch.setattr(bench, "default_prompts", lambda tokenizer: asked.append(tokenizer) or own)
    _, given = small_bench("--quick")
    assert asked == [] and "own" not in given["methods"][0]["by_category"]
    argv = ["bench.py", "--device", "cpu", "--quick", "--json", str(tmp_path / "own.json")]
    argv += ["--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    greedy = json.loads((tmp_path / "own.json").read_text())["methods"][0]
    assert asked == [small_bench.tokenizer] and greedy["by_category"].keys() == {"own"}


def test_the_fixed_step_answers_alike(small_bench, capsys):
    _, plain = small_bench("--quick", "--max-new-tokens", "9")
    _, fixed = small_bench("--quick", "--max-new-tokens", "9", "--step", "fixed")
    assert (plain["step"], fixed["step"]) == ("plain", "fixed")
    for ours, theirs in zip(fixed["methods"], plain["methods"]):
        assert ours["tokens"] == 3 * 9 and ours["differing_tokens"] == 0
        assert ours["acceptance"] == theirs["acceptance"]
        assert min(ours["time_share"]) > 0
    assert fixed["limit"]["pass_seconds"].keys() == {"1", "2", "4", "8", "16"}
    seconds = [*fixed["limit"]["pass_seconds"].values()]
    assert min(*seconds, fixed["limit"]["layer_seconds"], fixed["limit"]["head_seconds"]) > 0
    assert "a full pass over one position takes" in capsys.readouterr().out


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
    def lossy(model, prompt, n, *, exits=(), windows=(), stop=(), **options):
        out = generate(model, prompt, n, exits=exits, windows=windows, stop=stop)
        if len(exits) == 2:
            out.tokens[3] += 1
        return out

    monkeypatch.setattr(bench, "generate", lossy)
    model, result = small_bench("--quick", "--temperature", "0")
    ladder = result["methods"][2]
    assert (ladder["identical"], ladder["differing_tokens"]) == (0, 3)
    first = Request("chat", *small_bench.first())
    ids = torch.tensor([first.prompt + first.greedy[:3]])
    with torch.inference_mode():  # as the bench does: with gradients norms round differently
        best, second = model(ids)[0, -1].topk(2).values.tolist()
    assert (
        f"hispec differs (chat) from token 3: logits {best:.6g} and {second:.6g}\n"
        in capsys.readouterr().out
    )


def test_tuning_takes_the_fastest_and_the_next_run_uses_it(small_bench, monkeypatch):
    def clocked(model, prompt, n, *, exits=(), windows=(), **options):
        out = generate(model, prompt, n, exits=exits, windows=windows, **options)
        cost = {((2,), (6,)): 1.0, ((1, 2), (3, 3)): 1.0}.get((exits, windows), 2.0)
        return Generation(out.tokens, out.levels, cost)

    monkeypatch.setattr(tune, "WINDOWS", (3, 6))
    monkeypatch.setattr(tune, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(tune, "RUN", 100)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "generate", clocked)
        _, tuned = small_bench("--quick", "--tune", "--temperature", "0")
    kept = next(iter(json.loads(tune.LADDERS.read_text()).values()))
    # all there are
    assert len(kept["single-layer"]["ran"]) == 4 and len(kept["hispec"]["ran"]) == 3
    _, later = small_bench("--quick")
    for result in (tuned, later):
        ours = [(m["exits"], m["windows"]) for m in result["methods"]]
        assert ours[:3] == [([], []), ([2], [6]), ([1, 2], [3, 3])]
    # beyond the paper: while tuning
    names = ["look-up", "look-up, exit", "paper windows"]
    assert [m["name"] for m in tuned["methods"]][3:] == names
    assert [m["name"] for m in later["methods"]][3:] == names[2:]


def test_stop_tokens_stay_out_of_the_conversation(small_bench, monkeypatch):
    first = small_bench.first()[1]
    stop = first[5]
    asked = []
    monkeypatch.setattr(small_bench.tokenizer, "stop", (stop,))
    monkeypatch.setattr(bench, "most_tokens", lambda *args: 256)
    real = Tokenizer.chat
    monkeypatch.setattr(
        Tokenizer, "chat", lambda self, turns: asked.append(list(turns)) or real(self, turns)
    )
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
    assert theirs["sampled"]["tokens"] == greedy["sampled"]["tokens"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "no/such/folder/out.json"], "cannot write to 'no/such/folder/out.json'"),
        (["--json", "."], "cannot write to '.'"),
        (["--step", "none"], "--step: invalid choice: 'none'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--temperature", "-1"], "temperature must be a finite number of at least 0"),
        (["--top-p", "0"], "top_p must be a probability"),
        (["--top-k", "-2"], "top_k must be a number of tokens"),
        (["--seed", "-3"], "seed must be None or a whole number"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),
    ],
)
def test_bad_options_end_at_once(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    monkeypatch.setattr(bench, "load", lambda *arguments: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=re.escape(message)):
        bench.main()


def test_no_prompt_that_fits(small_bench, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"category": "x", "turns": ["y" * 999]}))
    with pytest.raises(ValueError, match="no prompt fits.*256"):
        small_bench("--prompts", str(tmp_path / "long.jsonl"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_faster_dtype_is_the_default_on_a_cpu(small_bench, monkeypatch, capsys, dtype):
    loaded, searched, real = [], [], bench.load
    small_bench.in_float32 = False

    def load(name, device, wanted):
        loaded.append(wanted)
        model, tokenizer = real(name, device, wanted)
        return model.to(wanted), tokenizer

    def kept(header, load_float, anew):
        assert load_float().embed.weight.dtype == torch.float32
        assert header["step"] == "plain" and header["model"] == "tiny"
        searched.append(anew)
        return getattr(torch, dtype)

    monkeypatch.setattr(bench, "load", load)
    monkeypatch.setattr(bench, "kept_dtype", kept)
    _, result = small_bench("--quick")
    assert searched == [False] and loaded == [torch.float32, getattr(torch, dtype)]
    assert result["dtype"] == dtype
    printed = capsys.readouterr().out
    assert f"of float32 and bfloat16 the faster here: {dtype}\n" in printed


def test_the_dtype_that_is_asked_for_is_taken(small_bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "kept_dtype", lambda *arguments: pytest.fail("it was searched"))
    assert small_bench("--quick")[1]["dtype"] == "float32"
    assert "the faster here" not in capsys.readouterr().out
