"""The model equals transformers' Llama, and itself when run by segments and at exits."""

import pytest
import torch
from conftest import random_model

from hispec import generate
from kvcache import KVCache, Plan
from model import Config, ExitHead, Llama, RopeScaling, rotate

IDS = torch.arange(40).view(2, 20) * 7 % 11


def twin(model: Llama):
    """transformers' Llama with the same weights, in the same dtype."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        s = c.rope_scaling
        rope |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        rope |= {"high_freq_factor": s.high_freq_factor}
        rope |= {"original_max_position_embeddings": s.original_max_seq_len}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
            intermediate_size=c.ffn_dim, rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len,
            tie_word_embeddings=c.tie_embeddings, rope_parameters=rope,
        )
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
    }
    weights["lm_head.weight"] = model.head.weight
    for i, layer in enumerate(model.layers):
        sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
        q, k, v = layer.attn.qkv.weight.split(sizes)
        gate, up = layer.mlp.gate_up.weight.chunk(2)
        names = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attn.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down.weight, "input_layernorm": layer.attn_norm.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
        }  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in names.items()}
    theirs.load_state_dict(weights)
    return theirs.to(model.embed.weight.dtype).eval()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads, head_dim", [(4, None), (2, None), (1, None), (2, 10)])
def test_logits_equal_transformers(tied, kv_heads, head_dim, scaled):
    # a short original context puts frequencies on both sides of the blend and inside it
    scaling = RopeScaling(8.0, 1.0, 4.0, original_max_seq_len=32) if scaled else None
    shape = dict(tie_embeddings=tied, n_kv_heads=kv_heads, head_dim=head_dim, rope_scaling=scaling)
    model = random_model(scale=5, **shape)  # larger weights amplify the rounding named below
    for norm in (
        model.norm,
        *(n for layer in model.layers for n in (layer.attn_norm, layer.mlp_norm)),
    ):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        ours, theirs = model(IDS), twin(model)(IDS).logits
    # in float64, except the rotary angles on both sides and their norms, which are float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rope_scaling_changes_the_logits():
    scaling = RopeScaling(8.0, 1.0, 4.0, original_max_seq_len=32)
    plain, scaled = random_model(scale=5), random_model(scale=5, rope_scaling=scaling)
    assert not torch.allclose(plain(IDS), scaled(IDS), atol=1e-3)


def test_segments_and_chunks_equal_one_pass():
    model = random_model()
    cache = KVCache(model, (), 20)
    with torch.no_grad():
        whole = model(IDS[:1])
        for start, stop in ((0, 4), (4, 5), (5, 12), (12, 20)):
            plan = cache.plan(start, stop)
            h = model.embed(IDS[:1, start:stop])
            for first, last in ((0, 2), (2, 3), (3, 5)):
                h = model.run(h, first, last, plan)
            torch.testing.assert_close(
                model.logits(h, 5), whole[:, start:stop], rtol=1e-9, atol=1e-9
            )


def test_an_exit_is_the_model_cut_there():
    model = random_model()
    cut = random_model(n_layers=3)
    weights = model.state_dict()
    cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
    assert torch.equal(model(IDS, exit=3), cut(IDS))
    assert torch.equal(model(IDS, exit=5), model(IDS))
    assert not torch.allclose(model(IDS, exit=3), model(IDS))


def test_a_fresh_exit_head_is_the_shared_one():
    model = random_model()
    shared = model(IDS, exit=2)
    model.exit_heads["2"] = ExitHead(model.config, width=8).double()
    assert torch.equal(model(IDS, exit=2), shared)  # the norm starts at one, the block adds nothing
    for weight in (
        model.exit_heads["2"].block.attn.out.weight,
        model.exit_heads["2"].block.mlp.down.weight,
    ):
        torch.nn.init.normal_(weight)
        assert not torch.allclose(model(IDS, exit=2), shared)
        torch.nn.init.zeros_(weight)


def test_a_reduced_vocabulary_reads_those_rows_only():
    model = random_model()
    shared = model(IDS, exit=2)
    model.exit_heads["2"] = ExitHead(model.config, vocab=[7, 0, 3]).double()
    assert model.exit_heads["2"].vocab.tolist() == [
        0,
        3,
        7,
    ]  # ascending, so that ties fall as in the full row
    reduced = model(IDS, exit=2)
    assert torch.equal(reduced.isfinite().nonzero()[:, 2].unique(), torch.tensor([0, 3, 7]))
    torch.testing.assert_close(reduced[..., [0, 3, 7]], shared[..., [0, 3, 7]])


def test_rotary_angles_stay_float32_in_bfloat16():
    model = random_model(max_seq_len=4096).bfloat16()
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    far = rotate(x, model.rope(torch.tensor([4095])))
    angle = torch.tensor([4095.0, 4095.0 / 100], dtype=torch.float64)  # theta 10,000, head size 4
    c, s = angle.cos(), angle.sin()
    exact = torch.cat([x[..., :2] * c - x[..., 2:] * s, x[..., 2:] * c + x[..., :2] * s], -1)
    torch.testing.assert_close(
        far, exact, rtol=1e-3, atol=1e-3
    )  # bfloat16 angles would be off by up to 16


def test_training_after_decoding():
    model = Llama(Config(11, 16, 2, 4, 2, 24))
    with torch.inference_mode():
        model(IDS)
    model(IDS).sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0


def test_training_an_exit_after_decoding():
    model = Llama(Config(11, 16, 2, 4, 2, 24)).eval()
    model.exit_heads["1"] = ExitHead(model.config, width=8, vocab=[1, 2, 5]).eval()
    generate(model, [1, 2], 5, exits=(1,), windows=(2,))
    model(IDS, exit=1)[..., 1].sum().backward()
    assert model.exit_heads["1"].norm.weight.grad.abs().sum() > 0


def test_a_tree_of_drafts_is_a_plan():
    """Two continuations of one text in one pass: each sees the text and its own branch alone."""
    model, text, branches = random_model(), [3, 1, 4, 1], [[5, 9], [2, 6]]
    cache = KVCache(model, (), 8)
    with torch.no_grad():
        model.run(model.embed(torch.tensor([text])), 0, 5, cache.plan(0, 4))
        sees = torch.zeros(4, 8, dtype=torch.bool)
        sees[:, :4] = True
        for row, slots in enumerate([[4], [4, 5], [6], [6, 7]]):
            sees[row, slots] = True
        at = torch.tensor([4, 5, 4, 5])
        plan = Plan(cache, positions=at, slots=torch.arange(4, 8), mask=sees)
        tree = model.logits(
            model.run(model.embed(torch.tensor([sum(branches, [])])), 0, 5, plan), 5
        )
        for i, branch in enumerate(branches):
            alone = model(torch.tensor([text + branch]))[0, -2:]
            torch.testing.assert_close(tree[0, 2 * i : 2 * i + 2], alone, rtol=1e-9, atol=1e-9)
