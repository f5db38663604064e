"""The bench: its options, its arithmetic on made-up runs, and whole runs on a small random model."""

import json
import re
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, random_model
from test_console import nobody_reads

import bench
from arguments import parse_ladder
from bench import Method, Request, differing_tokens, figures
from checkpoints import ladders, machine
from checkpoints.tokenizer import Tokenizer
from hispec import Generation, LevelStats, generate
from model import DraftHead


@pytest.fixture
def small_bench(monkeypatch, tmp_path):
    """bench.main on a random model whose tokens are bytes; returns run(*arguments) -> the JSON."""
    tokenizer, model = byte_tokenizer(), random_model(vocab_size=256, max_seq_len=256).float()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(machine, "memory_speed", lambda model: 1e9)  # takes seconds
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ladders, "best_threads", lambda model: 1)
    monkeypatch.setattr(ladders, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(bench, "load", lambda *_, **options: (model, tokenizer))
    chat, code = (["Hello", "And then?"], ["Again"]), (["def f():"], ["x" * 300])
    prompts = [("chat", turns) for turns in chat] + [("code", turns) for turns in code]
    lines = [json.dumps({"category": category, "turns": turns}) for category, turns in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def run(*arguments):
        argv = ["bench.py", "--device", "cpu", "--prompts", str(tmp_path / "prompts.jsonl")]
        argv += ["--dtype", "float32", "--json", str(tmp_path / "out.json"), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        bench.main()
        return model, json.loads((tmp_path / "out.json").read_text())

    run.tokenizer, run.model = tokenizer, model
    return run


# ---- whole runs ---------------------------------------------------------------------------------


def test_a_whole_run(small_bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Tokenizer, "decode", lambda *_, **__: "\x1b[2Jgone\x08")
    model, result = small_bench("--quick")
    assert "bench.py --device cpu" in result["command"] and result["dtype"] == "float32"
    methods = {method["name"]: method for method in result["methods"]}
    assert list(methods) == ["greedy", "single-layer", "hispec", "draft alone", "paper windows",
                             "look-up", "look-up, exit"]  # fmt: skip
    for method in methods.values():
        assert method["identical"] == method["prompts"] == 3  # two turns of chat and one of code
        assert method["differing_tokens"] == 0 and method["tokens"] == 3 * 24
        assert [method["by_category"][c]["prompts"] for c in ("chat", "code")] == [2, 1]
        assert sum(method["time_share"]) + method["time_share_loop"] == pytest.approx(1)
        assert method["sampled"]["tokens"] == 2 * 24  # one of each category
        assert method["peak_bytes"] is None
    assert result["sampling"] == {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "seed": 0}
    hispec = methods["hispec"]
    assert (hispec["exits"], hispec["windows"]) == ([1, 2], [2, 4])
    assert [len(level) for level in hispec["acceptance_by_position"]] == [2, 5]  # and a bonus
    assert hispec["agreement"].keys() == {"1-2", "1-5", "2-5"} and "false_rejects" in hispec
    # of the same ladder: measured once
    assert methods["paper windows"]["tokens_per_second"] == hispec["tokens_per_second"]
    # a model's text cannot move the cursor
    assert "Sample (chat): ␛[2Jgone␈" in capsys.readouterr().out
    # no half-written file, and nothing where results are shipped
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.json", "cache"}


def test_a_row_is_printed_after_each_prompt(small_bench, monkeypatch):
    """The row appears before the next prompt is decoded for the first time."""
    done, real = [], bench.generate

    def watched(model, prompt, *others, **options):
        done.append(tuple(prompt))
        return real(model, prompt, *others, **options)

    monkeypatch.setattr(bench, "generate", watched)
    monkeypatch.setattr(bench, "say", lambda *words, **_: done.append(str(words[0])[:4]))
    small_bench("--temperature", "0", "--max-new-tokens", "2")
    done = [x for x in done if isinstance(x, tuple) or x in ("chat", "code")]
    turns = [x for x, _ in groupby(done)]  # a prompt, its row, the next prompt, its row, and so on
    assert turns[1::2] == ["chat", "chat", "chat", "code"] and len({*turns[::2]}) == 4


def test_ladders_of_ones_own_and_their_drafts_alone(small_bench, capsys):
    """One ladder has a draft head. Temperature 0 leaves the sampled part out."""
    model = bench.load(None, None, None, None)[0]
    model.draft_heads["2"] = DraftHead(model.config)
    names = ["1(1) 2(2 <0.2) 4(4)", "3(2) 4(4)", "exit 3 alone", "2'(3) 2(4)"]
    own = ["--ladder", names[3], "--ladder", names[0], "--ladder", "3(2)4(4)"]
    _, result = small_bench("--quick", "--temperature", "0", "--max-new-tokens", "6", *own)
    methods = {method["name"]: method for method in result["methods"]}
    assert [*methods][7:] == ["head, exit", names[3], *names[:3]]
    first, head, alone = methods[names[0]], methods[names[3]], methods["draft alone"]
    assert first["exits"] == first["windows"] == [1, 2, 4] and first["thresholds"] == [0, 0.2, 0]
    ratio = first["tokens_per_second"] / alone["tokens_per_second"]
    assert alone["exits"] == [1] and first["speedup_vs_draft_alone"] == pytest.approx(ratio)
    assert methods["exit 3 alone"]["speedup_vs_draft_alone"] == 1
    assert "3(4), exit 3 alone, was not tuned" in capsys.readouterr().out
    assert (head["draft_head"], head["exits"], head["identical"]) == (2, [0, 2], 3)
    assert head["speedup_vs_draft_alone"] is None
    assert result["sampling"] == {} and not any("sampled" in m for m in methods.values())


def test_a_ladder_that_is_too_deep_is_refused_before_anything_is_decoded(small_bench, monkeypatch):
    monkeypatch.setattr(bench, "ask", lambda *arguments: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=r"within 0\.\.4"):
        small_bench("--ladder", "2(2) 5(4)")


@pytest.mark.parametrize("seeds", [(3, 4), (2**63 - 1, 0)])
def test_what_the_sampled_part_draws_from(small_bench, monkeypatch, seeds):
    asked = []

    def watched(model, prompt, n, **options):
        asked.append(tuple(map(options.get, ("temperature", "top_p", "top_k", "seed"))))
        return generate(model, prompt, n, **options)

    monkeypatch.setattr(bench, "generate", watched)
    drawing = ("--temperature", "1.5", "--top-p", "0.9", "--top-k", "5", "--seed", str(seeds[0]))
    small_bench("--quick", "--max-new-tokens", "4", *drawing)
    drawn = [(1.5, 0.9, 5, seed) for seed in seeds]  # of two categories one request each
    # seven methods, six ladders, and before the first of all a warm-up
    assert [asked.count(x) for x in drawn] == [12, 6]
    assert {*asked} == {*drawn, (None,) * 4}


def test_chat_never_leaves_the_template_out(small_bench, capsys):
    class Shout:
        def cut(self, turns):
            return ["!", turns[0], "!"]

    for flag, line in ((), "chat template of the model"), (("--chat", "never"), "plain text"):
        small_bench.tokenizer.template = Shout()
        small_bench("--quick", "--temperature", "0", *flag)
        assert f"\nprompt: {line}\n" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["plain", "packed", "fixed", "rounds"])
def test_every_step_answers_alike_what_fits_the_context(small_bench, capsys, step):
    """Room is reserved before any answer is known, and no prompt that fits may be left out."""
    _, result = small_bench("--max-new-tokens", "16", "--step", step, "--temperature", "0")
    assert result["step"] == step and "out.json" in result["command"]
    for method in result["methods"]:
        assert method["tokens"] == 4 * 16 and method["differing_tokens"] == 0
    seconds = [*result["limit"]["pass_seconds"].values(), result["limit"]["layer_seconds"]]
    assert len(seconds) == 6 and min(seconds) > 0
    out = capsys.readouterr().out
    assert out.count("left out: code, 300 tokens") == 1
    assert ("(4 = 2 steps)" in out) == (step == "rounds")  # HiSpec's second window


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


def test_the_faster_dtype_is_the_default_on_a_cpu(small_bench, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench, "kept_dtype", lambda *of: asked.append(of) or "float32")
    small_bench("--quick", "--temperature", "0")
    assert asked == []  # --dtype said it
    sys.argv[:] = [word for word in sys.argv if word not in ("--dtype", "float32")]
    bench.main()
    assert "of float32 and bfloat16 the faster here: float32\n" in capsys.readouterr().out
    ((setting, *_),) = asked
    assert (setting["step"], setting["model"]) == ("packed", "tiny")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--json no/such/folder/out.json", "cannot write to 'no/such/folder/out.json'"),
        ("--json .", "cannot write to '.'"),
        ("--figures file", "cannot write to 'file'"),
        ("--figures file/below", "cannot write to 'file/below'"),
        ("--device cpu --tune", "cannot write to 'file"),  # what is found could not be kept
        ("--device cpu --tune --ship", "cannot write to 'file"),
        ("--device cpu --prompts none.jsonl", "cannot read the prompts none.jsonl"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("--temperature -1", "temperature must be a finite number of at least 0"),
        ("--top-p 0", "top_p must be a probability"),
        ("--top-k -2", "top_k must be a number of tokens"),
        ("--seed -3", "seed must be None or a whole number"),
        ("--ladder 2,8", "a ladder is written as"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device mps --dtype float64", "--device mps --dtype float64 cannot be used here: "),
    ],
)
def test_bad_options_end_at_once(monkeypatch, tmp_path, arguments, message):
    """The folder holds a file named `file`, in the place where ladders would be kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    monkeypatch.setattr(ladders, "SHIPPED", Path("file/ladders.json"))
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    monkeypatch.setattr(bench, "load", lambda *arguments: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=re.escape(message)):
        bench.main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_results_are_written_though_nobody_reads_the_lines(small_bench):
    """As with `bench.py --json F | head -4`."""
    with nobody_reads():
        _, result = small_bench("--quick", "--max-new-tokens", "2", "--temperature", "0")
    assert len(result["methods"]) == 7


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
    usual = {
        "single-layer": ((3,), (8,), (0.1,)),
        "hispec": ((2, 4), (3, 6), (0.5, 0.0)),
        "draft alone": ((2,), (1,), (0.0,)),
        "look-up": ((0,), (12,), (0.0,)),
    }
    tuned = usual | {"three exits": ((1, 2, 4), (1, 1, 3), (0.0, 0.0, 0.0))}
    methods = chosen(tuned, [parse_ladder("0(2) 3(2)")])
    assert {name: methods[name].ladder for name in tuned if name in methods} == usual
    assert methods["paper windows"].ladder == ((2, 4), (2, 4), (0.0, 0.0))
    assert methods["hispec"].draft == methods["paper windows"].draft == tuned["draft alone"]
    assert methods["0(2) 3(2)"].draft == tuned["look-up"]
    methods = chosen(tuned, every_kind=True)
    assert methods["three exits"].draft == methods["exit 1 alone"].ladder == ((1,), (4,), (0.0,))
    # the best single exit is the draft: it is its own draft alone too
    single = {"single-layer": ((2,), (3,), (0.0,)), "hispec": tuned["hispec"]}
    assert chosen(single)["draft alone"].ladder == single["single-layer"]


# ---- arithmetic ---------------------------------------------------------------------------------

METHODS = [*chosen({}).values()][:4]  # greedy, single-layer, hispec, draft alone


def generation(tokens, seconds, *levels, prefill=0.0):
    return Generation(tokens, [LevelStats(*level) for level in levels], seconds, prefill)


def made_up():
    """Two requests. Greedy takes 4 s for 4 tokens and 1 s for 2; the others are faster, and HiSpec
    has one wrong token.
    """
    chat = [
        generation([5, 6, 7, 8], 4.0, (5, 4)),
        generation([5, 6, 7, 8], 2.0, (2, 6, 6, 3), (5, 2)),
        generation([5, 6, 9, 8], 1.0, (1, 4, 4, 2), (2, 2, 4, 3), (5, 1)),
        generation([5, 6, 7, 8], 3.0, (1, 5, 5, 2), (5, 3)),
    ]
    code = [
        generation([5, 6], 1.0, (5, 2)),
        generation([5, 6], 0.5, (2, 2, 2, 1), (5, 1)),
        generation([5, 6], 1.0, (1, 2, 2, 2), (2, 1, 0, 0), (5, 1)),
        generation([5, 6], 1.0, (1, 2, 2, 0), (5, 2)),
    ]
    return [Request("chat", [1], [5, 6, 7, 8], chat), Request("code", [1], [5, 6], code)]


def test_figures_over_all_requests_and_of_one_category():
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
    requests = made_up()
    requests[1].ending = "newline"
    found = bench.by_category(METHODS, requests, 2, figures)
    code = found["by_category"]["code"]
    assert found["by_ending"] == {"newline": code}
    assert code["speedup_vs_single_layer"] == pytest.approx(0.5) and code["identical"] == 1
    assert code["acceptance"] == [1.0, None]  # nothing was proposed there


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


def test_differing_tokens():
    pairs = [([1, 2], [1, 2]), ([1, 2], [1, 3]), ([1], [1, 2, 3]), ([2, 1, 1], [1])]
    assert [differing_tokens(a, b) for a, b in pairs] == [0, 1, 2, 3]


def test_methods_take_turns_in_a_rotating_order_and_the_same_ladder_once():
    order = []

    def decode(name):
        made = generation([5], 1.0, (5, 1))
        return lambda prompt, n, **options: order.append((name, options)) or made

    methods = [Method(name, ((i,), (1,), ()), decode(name)) for i, name in enumerate("abc")]
    methods.append(Method("c again", methods[2].ladder, decode("c")))
    requests = []
    for category in "xxxxy":
        request = Request(category, [1], [5], watched={m.ladder: None for m in methods})
        bench.measure(request, requests, methods, (4, ()), {"temperature": 0.8, "seed": 7})
        requests.append(request)
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(name for name, _ in turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0][0] for turn in turns} == {"a", "b", "c"}  # none is always the first
    seeds = [turn[0][1].get("seed") for turn in turns]
    assert seeds.count(None) == 1 + 5  # a warm-up
    assert [s for s in seeds if s] == [7, 7, 8, 9]  # so too; every third of a category, a seed each
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
