"""The fast step: the same tokens as the plain one, and the same bits whatever else is in a pass."""

import pytest
import torch
from conftest import Case, cases, greedy, random_model
from hypothesis import given

import checkpoints
import hispec
from faststep import PROMPT, WIDTH, FixedStep
from hispec import generate
from kvcache import KVCache
from lab.prompts import default_prompts, read_prompts
from model import ExitHead


def fast_for(case: Case) -> FixedStep:
    return FixedStep(case.model, len(case.prompt) + case.max_new_tokens)


def run_twice(case: Case, **options):
    """The plain step's Generation, and the fast one's: the second on a cache that holds an earlier text."""
    fast = fast_for(case)
    generate(
        case.model, case.prompt[::-1], case.max_new_tokens, **case.arguments, **options, fast=fast
    )
    plain = generate(case.model, case.prompt, case.max_new_tokens, **case.arguments, **options)
    return plain, generate(
        case.model, case.prompt, case.max_new_tokens, **case.arguments, **options, fast=fast
    )


@given(cases())
def test_it_is_lossless(case):
    plain, out = run_twice(case)
    assert out.tokens == greedy(case)
    assert out.levels == plain.levels  # so each position passes through each segment exactly once


@given(cases())
def test_it_samples_what_the_plain_step_samples(case):
    plain, out = run_twice(case, temperature=0.9, seed=7)
    assert out.tokens == plain.tokens and out.levels == plain.levels


def test_prompts_and_windows_wider_than_a_pass():
    model = random_model(5, max_seq_len=2 * PROMPT + 64)
    case = Case(model, [], 20, (1, 3), (WIDTH + 3, 2 * WIDTH), ())
    for length in (WIDTH, WIDTH + 1, 40, PROMPT - 1, PROMPT, PROMPT + 1, 2 * PROMPT + 5):
        case.prompt = ([3, 1, 4, 1, 5] * length)[:length]
        assert run_twice(case)[1].tokens == greedy(case)


def test_a_prompt_is_read_in_few_wide_passes(monkeypatch):
    keys, real = [], FixedStep.run
    monkeypatch.setattr(FixedStep, "run", lambda fast, *key: (keys.append(key), real(fast, *key)))
    model, n = random_model(max_seq_len=800), 2 * PROMPT + 5
    generate(model, [1] * n, 1, exits=(2,), windows=(2,), fast=FixedStep(model, n + 1))
    ends = [PROMPT, 2 * PROMPT, 3 * PROMPT]
    read = [(PROMPT, start, depth, end) for start, depth in [(0, 2), (2, 5)] for end in ends]
    assert keys == [*read, (PROMPT, 5)]


def bits(model, ids: list[int], exits: tuple[int, ...], sizes: list[int]):
    """Hidden states, keys, values, and logits of every level at every position, advancing by sizes in turn."""
    fast = FixedStep(model, len(ids))
    depths, tokens = (*exits, model.config.n_layers), torch.tensor(ids + WIDTH * [0])
    logits, at = [[] for _ in depths], 1
    with torch.inference_mode(), fast.open(model, exits, len(ids)) as cache:
        fast(model, cache, depths, tokens, 1, len(exits), 1)  # the prompt
        while at < len(ids):
            n = min(sizes[at % len(sizes)], len(ids) - at)
            for k in range(len(depths)):
                logits[k].append(fast(model, cache, depths, tokens, at + n, k, n))
            at += n
    kept = [t[..., : len(ids), :] for t in (*cache.hidden.values(), cache.keys, cache.values)]
    return [*kept, *map(torch.cat, logits)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [[2], [3, 1], [7, 16, 5], [15], [16], [1, 40]])
def test_a_position_has_the_same_bits_in_any_company(dtype, sizes):
    model = random_model(
        2, scale=3, vocab_size=300, dim=64, ffn_dim=160, n_layers=6, max_seq_len=128
    )
    model.exit_heads["2"] = ExitHead(model.config, width=16, vocab=list(range(0, 300, 3)))
    torch.nn.init.normal_(model.exit_heads["2"].block.attn.out.weight)
    model = model.to(dtype).eval()
    ids = torch.randint(300, (100,)).tolist()
    for one_by_one, mine in zip(bits(model, ids, (2, 4), [1]), bits(model, ids, (2, 4), sizes)):
        assert torch.isfinite(mine[mine > -torch.inf]).all()
        assert torch.equal(one_by_one, mine)


def test_all_ladders_write_the_same_text_in_bfloat16():
    model, tokenizer = checkpoints.load("tiny", "cpu", torch.bfloat16)
    questions = read_prompts(default_prompts(tokenizer))
    ladders = [((), ()), ((8,), (6,)), ((2, 8), (2, 6)), ((0, 8), (8, 8)), ((1, 2, 8), (1, 3, 5))]
    fast = FixedStep(model, 800)
    for question in {q["category"]: q for q in questions}.values():
        prompt = tokenizer.chat(question["turns"][:1])
        texts = [
            generate(model, prompt, 32, exits=e, windows=w, stop=tokenizer.stop, fast=fast).tokens
            for e, w in ladders
        ]
        assert all(text == texts[0] for text in texts)


def test_it_is_not_used_for_what_it_was_not_made_for():
    model, other = random_model(1), random_model(2)
    fast = FixedStep(model, 20)
    generate(model, [1, 2], 18, exits=(2,), windows=(3,), fast=fast)
    generate(model, [1, 2], 5, exits=(1, 3), windows=(1, 2), fast=fast)  # any ladder will do
    with pytest.raises(ValueError, match="another model"):
        generate(other, [1, 2], 5, exits=(2,), windows=(3,), fast=fast)
    with pytest.raises(ValueError, match="at most 20 tokens, this may take 21"):
        generate(model, [1, 2], 19, exits=(2,), windows=(3,), fast=fast)
    model.exit_heads["2"] = ExitHead(model.config, width=8).double()
    with pytest.raises(ValueError, match="other exit heads since"):
        generate(model, [1, 2], 5, exits=(2,), windows=(3,), fast=fast)
    fast = FixedStep(model, 20)
    with pytest.raises(ValueError, match="another dtype"):
        generate(model.float(), [1, 2], 5, exits=(2,), windows=(3,), fast=fast)


def test_the_plain_step_is_left_alone(monkeypatch):
    monkeypatch.setattr(hispec, "step", None)  # to call it would fail
    model = random_model(1)
    assert (
        len(generate(model, [1, 2], 10, exits=(2,), windows=(3,), fast=FixedStep(model, 12)).tokens)
        == 10
    )


def test_it_serves_one_generation_at_a_time():
    model = random_model(1)
    fast = FixedStep(model, 20)
    options = dict(exits=(2,), windows=(3,), fast=fast)
    with pytest.raises(ValueError, match="in use"):
        generate(
            model, [1, 2], 10, **options, watch=lambda event: generate(model, [1], 5, **options)
        )
    assert (
        generate(model, [1, 2], 10, **options).tokens == generate(model, [1, 2], 10).tokens
    )  # and is free again


def test_nothing_of_an_earlier_generation_is_left():
    """A NaN that one text left behind a mask would spoil all later ones, since 0 x NaN is NaN."""
    model = random_model(1)
    fast = FixedStep(model, 60)
    plain = generate(model, [1, 2], 30).tokens
    weight = model.layers[2].attn.qkv.weight.data.clone()
    model.layers[2].attn.qkv.weight.data.fill_(torch.nan)
    generate(model, [3] * 20, 40, exits=(1, 3), windows=(2, 4), fast=fast)
    assert fast.cache.keys.isnan().any()
    model.layers[2].attn.qkv.weight.data.copy_(weight)
    for exits, windows in [((), ()), ((1,), (3,)), ((1, 3), (2, 4)), ((0, 3), (2, 4))]:
        assert generate(model, [1, 2], 30, exits=exits, windows=windows, fast=fast).tokens == plain


def test_an_interrupted_generation_leaves_the_step_usable():
    model = random_model(1)
    fast = FixedStep(model, 60)
    options = dict(exits=(1, 3), windows=(2, 4), fast=fast)

    def interrupt(event):
        if event.base > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [1, 2], 30, **options, watch=interrupt)
    assert generate(model, [1, 2], 30, **options).tokens == generate(model, [1, 2], 30).tokens


def test_a_pass_that_sees_what_lies_ahead_is_caught(monkeypatch):
    def blind(self, at, parts):
        real(self, at, parts)
        for _, mask in self.parts:
            mask.zero_()

    real = KVCache.begin
    monkeypatch.setattr(KVCache, "begin", blind)
    cases = [Case(random_model(seed), [1, 2, 3], 12, (2, 4), (2, 3), ()) for seed in range(5)]
    with torch.inference_mode():
        assert any(run_twice(case)[1].tokens != greedy(case) for case in cases)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captured graphs need CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_passes_write_the_same_text(dtype):
    model, tokenizer = checkpoints.load("tiny", "cuda", dtype)
    prompt = tokenizer.encode("def add(a, b):")
    texts = [
        generate(model, prompt, 100, exits=e, windows=w, fast=FixedStep(model, 200)).tokens
        for e, w in [((), ()), ((8,), (6,)), ((2, 8), (2, 6)), ((0, 8), (8, 8))]
    ]
    assert all(text == texts[0] for text in texts)
