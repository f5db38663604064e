"""The bench: its options, its arithmetic on made-up runs, and whole runs on a small random model."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import random_model
from test_console import nobody_reads

import bench
from arguments import parse_ladder
from bench import GREEDY, Method, Request, differing_tokens, figures
from checkpoints import ladders, machine
from checkpoints.tokenizer import Tiktoken, Tokenizer
from hispec import Generation, LevelStats, generate
from model import DraftHead


@pytest.fixture
def small_bench(monkeypatch, tmp_path):
    """bench.main on a random model whose tokens are bytes; returns run(*arguments) -> the JSON."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = Tokenizer(Tiktoken(encoding, {}), {})
    model = random_model(vocab_size=256, max_seq_len=256).float()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(machine, "memory_speed", lambda model: 1e9)  # takes seconds
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ladders, "best_threads", lambda model: 1)
    monkeypatch.setattr(ladders, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(bench, "load", lambda *_, **options: (model, tokenizer))
    prompts = [
        ("chat", ["Hello", "And then?"]),
        ("chat", ["Again"]),
        ("code", ["def f():"]),
        ("code", ["x" * 300]),
    ]
    lines = [json.dumps({"category": category, "turns": turns}) for category, turns in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def run(*arguments):
        argv = ["bench.py", "--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl")]
        argv += ["--dtype", "float32", "--json", str(tmp_path / "out.json"), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        bench.main()
        return model, json.loads((tmp_path / "out.json").read_text())

    run.tokenizer = tokenizer
    return run


# ---- whole runs ---------------------------------------------------------------------------------

OF_A_RUN = {"device", "threads", "dtype", "step", "model", "versions", "command", "sampling"}
OF_TEXTS = {"tokens_per_second", "speedup_vs_greedy", "speedup_vs_draft_alone",
            "speedup_vs_single_layer", "tokens_per_target_pass", "acceptance", "positions",
            "prefill_seconds", "decode_seconds", "distinct", "looping", "prompts", "tokens"}  # fmt: skip
OF_A_METHOD = {"name", "exits", "windows", "thresholds", "by_category", "sampled", "peak_bytes",
               "identical", "differing_tokens", "time_share", "time_share_loop"}  # fmt: skip
OF_A_LADDER = {"acceptance_by_position", "accepted_length", "agreement"}
LIMITS = {"bytes_per_second", "pass_bytes", "greedy_tokens_per_second", "pass_seconds",
          "layer_seconds", "layers", "head_seconds"}  # fmt: skip


def test_a_whole_run(small_bench, capsys, tmp_path):
    model, result = small_bench("--quick")
    assert result.keys() == OF_A_RUN | {"limit", "methods", "ladders"}
    assert result["limit"].keys() == LIMITS and result["limit"]["layers"] == 5
    assert "bench.py --device cpu" in result["command"] and result["dtype"] == "float32"
    methods = {method["name"]: method for method in result["methods"]}
    assert list(methods) == ["greedy", "single-layer", "hispec", "draft alone", "paper windows",
                             "look-up", "look-up, exit"]  # fmt: skip
    for name, method in methods.items():
        keys = OF_TEXTS | OF_A_METHOD
        if any(method["exits"]):
            keys |= OF_A_LADDER | ({"false_rejects"} if method["exits"] == [1, 2] else set())
        elif name == "look-up":  # it predicts nothing
            keys |= OF_A_LADDER - {"agreement"}
        assert method.keys() == keys, name
        assert method["identical"] == method["prompts"] == 3  # two turns of chat and one of code
        assert method["differing_tokens"] == 0 and method["tokens"] == 3 * 24
        assert method["by_category"]["chat"]["prompts"] == 2
        assert method["by_category"]["code"].keys() == OF_TEXTS | {"identical", "differing_tokens"}
        assert sum(method["time_share"]) + method["time_share_loop"] == pytest.approx(1)
        drawn = method["sampled"]  # one of each category
        assert (
            drawn.keys() == OF_TEXTS | {"by_category", "exits", "windows", "thresholds"}
            and drawn["tokens"] == 2 * 24
        )
        assert method["peak_bytes"] is None
    assert result["sampling"] == {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "seed": 0}
    hispec = methods["hispec"]
    assert (hispec["exits"], hispec["windows"]) == ([1, 2], [2, 4])
    assert [len(level) for level in hispec["acceptance_by_position"]] == [2, 5]  # and a bonus
    assert hispec["agreement"].keys() == {"1-2", "1-5", "2-5"}
    # of the same ladder: measured once
    assert methods["paper windows"]["tokens_per_second"] == hispec["tokens_per_second"]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    # no half-written file, and nothing where results are shipped
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json", "cache"}


def test_a_row_is_printed_after_each_prompt(small_bench, monkeypatch):
    """Before the next prompt is decoded for the first time."""
    done, real = [], bench.generate
    monkeypatch.setattr(bench, "say", lambda *words, **_: done.append(" ".join(map(str, words))))
    monkeypatch.setattr(
        bench,
        "generate",
        lambda m, prompt, *a, **o: done.append(prompt) or real(m, prompt, *a, **o),
    )
    small_bench("--temperature", "0", "--max-new-tokens", "2")
    rows = [
        i for i, x in enumerate(done) if isinstance(x, str) and x[:5].strip() in ("chat", "code")
    ]
    assert len(rows) == 4
    prompts = [{tuple(x) for x in done[a:b] if not isinstance(x, str)}
               for a, b in zip([0, *rows], rows)]  # fmt: skip
    assert [len(some) for some in prompts] == [1] * 4 and len(set.union(*prompts)) == 4


def test_how_long_it_takes_is_said_once_one_text_is_written():
    methods = [
        Method(name, ladder, None)
        for name, ladder in (("a", ((1,),)), ("b", ((2,),)), ("c", ((2,),)))
    ]
    said = bench.how_long([{"turns": ["x", "y"]}, {"turns": ["z"]}], methods, 2.0)
    assert (
        said == "(up to 15 texts; if all took 2.0 s as the first, 0.5 minutes)"
    )  # 3 x (1 + 2 x 2)


def test_ladders_of_ones_own_and_their_drafts_alone(small_bench, capsys):
    own = ["--ladder", "1(1) 2(2 <0.2) 4(4)", "--ladder", "3(2)4(4)"]
    _, result = small_bench("--quick", "--temperature", "0", "--max-new-tokens", "6", *own)
    methods = {method["name"]: method for method in result["methods"][7:]}
    assert list(methods) == ["1(1) 2(2 <0.2) 4(4)", "3(2) 4(4)", "exit 3 alone"]
    first = methods["1(1) 2(2 <0.2) 4(4)"]
    assert (first["exits"], first["windows"], first["thresholds"]) == (
        [1, 2, 4],
        [1, 2, 4],
        [0, 0.2, 0],
    )
    alone = next(m for m in result["methods"] if m["name"] == "draft alone")
    assert alone["exits"] == [1]
    ratio = first["tokens_per_second"] / alone["tokens_per_second"]
    assert first["speedup_vs_draft_alone"] == pytest.approx(ratio)
    assert methods["exit 3 alone"]["speedup_vs_draft_alone"] == 1
    assert "3(4), exit 3 alone, was not tuned" in capsys.readouterr().out


def test_a_ladder_with_a_draft_head(small_bench):
    model = bench.load(None, None, None, None)[0]
    model.draft_heads["2"] = DraftHead(model.config)
    _, result = small_bench("--quick", "--max-new-tokens", "6", "--ladder", "2'(3) 2(4)")
    method = result["methods"][-1]
    assert (method["name"], method["draft_head"], method["exits"]) == ("2'(3) 2(4)", 2, [0, 2])
    assert method["identical"] == 3 and method["speedup_vs_draft_alone"] is None


def test_a_ladder_that_is_too_deep_is_refused_before_anything_is_decoded(small_bench, monkeypatch):
    monkeypatch.setattr(bench, "ask", lambda *arguments: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=r"within 0\.\.4"):
        small_bench("--ladder", "2(2) 5(4)")


def test_temperature_0_leaves_the_sampled_part_out(small_bench, capsys):
    _, result = small_bench("--quick", "--temperature", "0")
    assert result["sampling"] == {}
    assert not any("sampled" in method for method in result["methods"])
    assert "temperature" not in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [(3, 4), (2**63 - 1, 0)])
def test_what_the_sampled_part_draws_from(small_bench, monkeypatch, seeds):
    asked = []

    def watched(model, prompt, n, **options):
        drawing = {key: options.pop(key, None) for key in ("temperature", "top_p", "top_k", "seed")}
        asked.append(tuple(drawing.values()))
        return generate(model, prompt, n, **options)

    monkeypatch.setattr(bench, "generate", watched)
    drawing = ("--temperature", "1.5", "--top-p", "0.9", "--top-k", "5", "--seed", str(seeds[0]))
    small_bench("--quick", "--max-new-tokens", "4", *drawing)
    drawn = [(1.5, 0.9, 5, seed) for seed in seeds]  # of two categories one request each
    assert [asked.count(x) for x in drawn] == [6, 6]  # seven methods, six ladders
    assert {*asked} == {*drawn, (None,) * 4}


def test_chat_never_leaves_the_template_out(small_bench, capsys):
    class Shout:
        def cut(self, turns):
            return ["!", turns[0], "!"]

    for flag, line in ((), "chat template of the model"), (("--chat", "never"), "plain text"):
        small_bench.tokenizer.template = Shout()
        small_bench("--quick", "--temperature", "0", *flag)
        assert f"\nprompt: {line}\n" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["plain", "packed", "fixed"])
def test_every_step_answers_alike(small_bench, step):
    model, result = small_bench("--quick", "--max-new-tokens", "9", "--step", step)
    assert result["step"] == step and "out.json" in result["command"]
    for method in result["methods"]:
        assert method["tokens"] == 3 * 9 and method["differing_tokens"] == 0
    seconds = [*result["limit"]["pass_seconds"].values(), result["limit"]["layer_seconds"]]
    assert len(seconds) == 6 and min(seconds) > 0


def test_what_does_not_fit_the_context_is_left_out_and_nothing_else(small_bench, capsys):
    """The room is taken before any answer is known: no prompt that would fit may be left out."""
    for step in "packed", "fixed":
        _, result = small_bench("--max-new-tokens", "30", "--step", step, "--temperature", "0")
        assert result["methods"][0]["prompts"] == 4
        assert capsys.readouterr().out.count("left out: code, 300 tokens") == 1


def test_turns_contain_the_answers_before_them_without_stop_tokens(small_bench, monkeypatch):
    tokenizer = small_bench.tokenizer
    model = bench.load(None, None, None, None)[0]
    first = generate(model, tokenizer.encode("Hello"), 24).tokens
    stop, asked, real = first[5], [], Tokenizer.chat
    monkeypatch.setattr(tokenizer, "stop", (stop,))
    monkeypatch.setattr(bench, "most_tokens", lambda *arguments: 256)
    chat = lambda self, turns: asked.append(list(turns)) or real(self, turns)  # noqa: E731
    monkeypatch.setattr(Tokenizer, "chat", chat)
    small_bench("--quick", "--temperature", "0")
    answer = bytes(first[: first.index(stop)]).decode(errors="replace")
    assert asked[:2] == [["Hello"], ["Hello", answer, "And then?"]]


def test_a_wrong_token_is_counted_and_shown(small_bench, monkeypatch, capsys):
    def lossy(model, prompt, n, *, exits=(), **options):
        out = generate(model, prompt, n, exits=exits, **options)
        if exits == (1, 2):
            out.tokens[3:4] = [(out.tokens[3] + 1) % 256]
        return out

    monkeypatch.setattr(bench, "generate", lossy)
    model, result = small_bench("--quick", "--temperature", "0")
    hispec = result["methods"][2]
    assert (hispec["identical"], hispec["differing_tokens"]) == (0, 3)
    prompt = small_bench.tokenizer.encode("Hello")
    ids = torch.tensor([prompt + generate(model, prompt, 3).tokens])
    with torch.inference_mode():  # as the bench does: with gradients norms round differently
        best, second = model(ids)[0, -1].topk(2).values.tolist()
    said = f"hispec differs (chat) from token 3: logits {best:.6g} and {second:.6g}\n"
    assert said in capsys.readouterr().out


def test_peers_decode_the_same_weights(small_bench):
    pytest.importorskip("transformers")
    _, result = small_bench("--quick", "--peers", "--max-new-tokens", "8")
    greedy, *_, theirs, early_exit, lookup = result["methods"]
    assert theirs["name"] == "transformers"
    assert theirs["identical"] == greedy["prompts"] and theirs["tokens"] == greedy["tokens"]
    assert theirs["tokens_per_target_pass"] is None  # their passes are not counted
    assert theirs["speedup_vs_greedy"] > 0 and theirs["speedup_vs_draft_alone"] is None
    assert theirs["sampled"]["tokens"] == greedy["sampled"]["tokens"]


def test_the_faster_dtype_is_the_default_on_a_cpu(small_bench, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(
        bench, "kept_dtype", lambda *arguments: asked.append(arguments) or "float32"
    )
    small_bench("--quick", "--temperature", "0")
    assert asked == []  # --dtype said it
    argv = ["bench.py", "--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl"), "--quick"]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    assert "of float32 and bfloat16 the faster here: float32\n" in capsys.readouterr().out
    (asked,) = asked
    assert asked[0]["step"] == "packed" and asked[0]["model"] == "tiny"


def test_it_runs_without_the_wings(tmp_path):
    """In a copy of the tree without lab/, show/, lecture/ and fast/."""
    wings = ("lab", "show", "lecture", "fast", "tests", "figures", ".*", "__pycache__", "smollm2")
    root = Path(bench.__file__).parent
    shutil.copytree(root, tmp_path, ignore=shutil.ignore_patterns(*wings), dirs_exist_ok=True)

    def run(*arguments):
        command = [sys.executable, "bench.py", *arguments]
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""}
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    (tmp_path / "one.jsonl").write_text('{"category": "x", "turns": ["def f("]}')
    brief = ["--quick", "--max-new-tokens", "8", "--json", "out.json", "--prompts", "one.jsonl"]
    ran = run(*brief)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["step"] == "plain"
    assert all(method["differing_tokens"] == 0 for method in result["methods"])
    refused = run(*brief, "--tune", "--figures", "x", "--peers", "--prompts", "held-out")
    asked = "--tune, --figures, --peers, --prompts held-out"
    assert refused.stderr == f"error: {asked}: needs lab/, which is not here\n"
    assert "needs fast/, which is not here" in run(*brief, "--step", "packed").stderr


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
        (["--ladder", "2 8"], "a ladder is written as"),
        (["--ladder", "8(2) 2(2)"], "exits must ascend strictly"),
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


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/none"])
def test_figures_that_cannot_be_written_end_at_once(monkeypatch, tmp_path, folder):
    (tmp_path / "file").touch()
    test_bad_options_end_at_once(monkeypatch, ["--figures", str(tmp_path / folder)],
                                 f"cannot write to '{tmp_path / folder}'")  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_results_are_written_though_nobody_reads_the_lines(small_bench):
    """As with `bench.py --json F | head -4`."""
    with nobody_reads():
        _, result = small_bench("--quick", "--max-new-tokens", "2", "--temperature", "0")
    assert len(result["methods"]) == 7


def test_what_a_model_writes_cannot_move_the_cursor(small_bench, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens, after=(): "\x1b[2Jgone\x08")
    small_bench("--quick", "--max-new-tokens", "2", "--temperature", "0")
    assert "Sample (chat): ␛[2Jgone␈" in capsys.readouterr().out


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch):
    def zeros(*shape, device, dtype):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype\nas MPS has none")
        return torch.ones(1)

    monkeypatch.setattr(bench.torch, "zeros", zeros)
    message = "--device mps --dtype float64 cannot be used here: Cannot convert a MPS Tensor"
    test_bad_options_end_at_once(monkeypatch, ["--device", "mps", "--dtype", "float64"], message)


@pytest.mark.parametrize("ship", [[], ["--ship"]])
def test_tuning_that_could_not_be_kept_ends_at_once(monkeypatch, tmp_path, ship):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(ladders, "SHIPPED", tmp_path / "file" / "ladders.json")
    asked = ["--device", "cpu", "--tune", *ship]
    test_bad_options_end_at_once(monkeypatch, asked, f"cannot write to '{tmp_path / 'file'}")


def test_prompts_that_cannot_be_read_end_at_once(monkeypatch):
    asked = ["--device", "cpu", "--prompts", "none.jsonl"]
    test_bad_options_end_at_once(monkeypatch, asked, "cannot read the prompts none.jsonl")


# ---- which ladders ------------------------------------------------------------------------------


def chosen(tuned, own=(), every_kind=False):
    decoder = partial(bench.decode_with, None, None)
    methods = bench.choose_methods(random_model(), tuned, list(own), decoder, every_kind)
    return {method.name: method for method in methods}


def test_untuned_ladders_are_the_papers_for_every_method_alike():
    methods = chosen({})
    assert {name: method.ladder[:2] for name, method in methods.items()} == {
        "greedy": ((), ()), "single-layer": ((2,), (4,)), "hispec": ((1, 2), (2, 4)),
        "draft alone": ((1,), (4,)), "paper windows": ((1, 2), (2, 4)), "look-up": ((0,), (4,)),
        "look-up, exit": ((0, 2), (4, 4)),
    }  # fmt: skip
    assert methods["hispec"].draft == methods["draft alone"].ladder
    assert methods["look-up, exit"].draft == methods["look-up"].ladder
    assert methods["single-layer"].draft == methods["single-layer"].ladder
    assert methods["greedy"].draft is None


def test_tuned_ladders_take_their_place():
    tuned = {
        "single-layer": ((3,), (8,), (0.1,)),
        "hispec": ((2, 4), (3, 6), (0.5, 0.0)),
        "draft alone": ((2,), (1,), (0.0,)),
        "look-up": ((0,), (12,), (0.0,)),
        "three exits": ((1, 2, 4), (1, 1, 3), (0.0, 0.0, 0.0)),
    }
    methods = chosen(tuned, [parse_ladder("0(2) 3(2)")])
    assert "three exits" not in methods
    assert {name: methods[name].ladder for name in tuned if name in methods} == {
        name: ladder for name, ladder in tuned.items() if name != "three exits"
    }
    assert methods["paper windows"].ladder == ((2, 4), (2, 4), (0.0, 0.0))
    assert methods["hispec"].draft == methods["paper windows"].draft == tuned["draft alone"]
    assert methods["0(2) 3(2)"].draft == tuned["look-up"]
    methods = chosen(tuned, every_kind=True)
    assert methods["three exits"].draft == methods["exit 1 alone"].ladder == ((1,), (4,), (0.0,))
    # the best single exit is the draft: it is its own draft alone too
    single = {"single-layer": ((2,), (3,), (0.0,)), "hispec": tuned["hispec"]}
    assert chosen(single)["draft alone"].ladder == single["single-layer"]


# ---- arithmetic ---------------------------------------------------------------------------------

METHODS = [
    Method("greedy", GREEDY, None),
    Method("single-layer", ((2,), (2,), (0.0,)), None, ((2,), (2,), (0.0,))),
    Method("hispec", ((1, 3), (2, 4), (0.0, 0.0)), None, ((1,), (4,), (0.0,))),
    Method("draft alone", ((1,), (4,), (0.0,)), None, ((1,), (4,), (0.0,))),
]


def generation(tokens, seconds, *levels, prefill=0.0):
    return Generation(tokens, [LevelStats(*level) for level in levels], seconds, prefill)


def made_up():
    """Two requests. Greedy: 4 tokens in 4 s and 2 in 1 s; the others faster, HiSpec with one wrong token."""
    chat, code = Request("chat", [1], [5, 6, 7, 8]), Request("code", [1], [5, 6])
    made = {
        chat.category: [
            ([5, 6, 7, 8], 4.0, (5, 4)),
            ([5, 6, 7, 8], 2.0, (2, 6, 6, 3), (5, 2)),
            ([5, 6, 9, 8], 1.0, (1, 4, 4, 2), (3, 2, 4, 3), (5, 1)),
            ([5, 6, 7, 8], 3.0, (1, 5, 5, 2), (5, 3)),
        ],
        code.category: [
            ([5, 6], 1.0, (5, 2)),
            ([5, 6], 0.5, (2, 2, 2, 1), (5, 1)),
            ([5, 6], 1.0, (1, 2, 2, 2), (3, 1, 0, 0), (5, 1)),
            ([5, 6], 1.0, (1, 2, 2, 0), (5, 2)),
        ],
    }
    for request in (chat, code):
        request.made = [generation(*each) for each in made[request.category]]
    return [chat, code]


def test_figures_over_all_requests():
    result = figures(METHODS, made_up(), 2)
    assert result["tokens_per_second"] == pytest.approx(6 / 2)
    assert result["speedup_vs_greedy"] == pytest.approx((6 / 2) / (6 / 5))
    assert result["speedup_vs_single_layer"] == pytest.approx((6 / 2) / (6 / 2.5))
    assert result["speedup_vs_draft_alone"] == pytest.approx((6 / 2) / (6 / 4))
    assert result["tokens_per_target_pass"] == 6 / 2
    assert result["acceptance"] == [4 / 6, 3 / 4]
    assert (result["identical"], result["prompts"]) == (1, 2)
    assert (result["tokens"], result["differing_tokens"]) == (6, 1)
    greedy = figures(METHODS, made_up(), 0)
    assert greedy["speedup_vs_greedy"] == greedy["tokens_per_target_pass"] == 1
    assert greedy["acceptance"] == [] and greedy["speedup_vs_draft_alone"] is None


def test_figures_of_one_category_and_of_one_kind_of_ending():
    requests = made_up()
    requests[1].ending = "newline"
    found = bench.by_category(METHODS, requests, 2, figures)
    result = found["by_category"]["code"]
    assert found["by_ending"] == {"newline": result}
    assert result["tokens_per_second"] == pytest.approx(2 / 1)
    assert result["speedup_vs_greedy"] == pytest.approx(1.0)
    assert result["speedup_vs_single_layer"] == pytest.approx(0.5)
    assert result["acceptance"] == [1.0, None]  # nothing was proposed there
    assert (result["identical"], result["prompts"]) == (1, 1)


def test_positions_prefill_and_what_was_written():
    row, loop = list(range(20)), [7] * 24
    requests = [Request("chat", [1, 2, 3], row), Request("code", [1], loop)]
    for request, (seconds, prefill) in zip(requests, [(4.0, 3.0), (5.0, 2.0)]):
        level = 5, 20, 0, 0, len(request.prompt) + 21
        request.made = [generation(request.greedy, seconds, level, prefill=prefill)] * 2
    result = figures(METHODS[:2], requests, 0)
    assert (result["prefill_seconds"], result["decode_seconds"]) == (2.5, 2.0)
    assert result["positions"] == [2 * 21 / 44]  # without the prompts
    assert result["distinct"] == (20 + 1) / 2
    assert result["looping"] == 16 / 44  # all but the first eight of the loop
    theirs = Request("chat", [1], row, [generation(row, 4.0)] * 2)  # levels are not known
    result = figures(METHODS[:2], [theirs], 0)
    assert result["prefill_seconds"] is result["decode_seconds"] is None


@pytest.mark.parametrize(
    "a, b, count", [([], [], 0), ([1, 2], [1, 2], 0), ([1, 2], [1, 3], 1), ([1], [1, 2, 3], 2),
                    ([2, 1, 1], [1], 3)],
)  # fmt: skip
def test_differing_tokens(a, b, count):
    assert differing_tokens(a, b) == count


def test_methods_take_turns_in_a_rotating_order_and_the_same_ladder_once():
    order = []

    def decode(name):
        return lambda prompt, n, **options: (
            order.append((name, options)) or generation([5], 1.0, (5, 1))
        )

    methods = [Method(name, ((i,), (1,), ()), decode(name)) for i, name in enumerate("abc")]
    methods.append(Method("c again", methods[2].ladder, decode("c")))
    requests = []
    for category in "xxxxy":
        request = Request(category, [1], [5], watched={m.ladder: None for m in methods})
        law = {"temperature": 0.8, "seed": 7}
        bench.measure(request, requests, methods, (4, ()), law)
        requests.append(request)
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(name for name, _ in turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0][0] for turn in turns} == {"a", "b", "c"}  # none is always the first
    greedily = [turn for turn in turns if "seed" not in turn[0][1]]
    assert len(greedily) == 1 + 5  # a warm-up
    drawn = [turn[0][1]["seed"] for turn in turns if "seed" in turn[0][1]]
    assert drawn == [7, 8, 9]  # every third of a category, each from a seed of its own
    assert [len(request.sampled) for request in requests] == [4, 0, 0, 4, 4]


def test_agreement_and_false_rejects_by_hand():
    """Agreement equals what the oracle's forward passes say, token by token."""
    model = random_model()
    requests = [Request("chat", [1, 2], generate(model, [1, 2], 20).tokens)]
    said = bench.choices(model, {1, 2, 3}, requests)
    out = bench.level_agreement(said, (1, 3))
    assert bench.level_agreement(said, (0, 3)).keys() == {"agreement"}  # a look-up says nothing
    ids = torch.tensor([requests[0].prompt + requests[0].greedy])
    draft, middle, full = (model(ids, exit)[0, 1:-1].argmax(-1).tolist() for exit in (1, 3, 5))
    assert full == requests[0].greedy
    refused = [(d, f) for d, m, f in zip(draft, middle, full, strict=True) if d != m]
    for pair, (a, b) in {"1-3": (draft, middle), "3-5": (middle, full)}.items():
        share = sum(x == y for x, y in zip(a, b, strict=True)) / 20
        assert out["agreement"][pair] == pytest.approx(share)
    assert out["false_rejects"] == pytest.approx(sum(d == f for d, f in refused) / len(refused))
