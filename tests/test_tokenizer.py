"""Vocabularies: tiktoken's ids are tokenizers', tokenizer.model, added tokens, ends, chat."""

import base64
import json

import pytest
import tiktoken
from conftest import random_model
from hypothesis import example, given
from hypothesis import strategies as st
from texts import CHATML, HOSTILE, PROSE, SPLITS, TRICKY, byte_bpe, llama_2

from checkpoints import load, save, vocabulary
from checkpoints.tokenizer import BYTES, Tiktoken, Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def fast(theirs, split) -> Tokenizer:
    """The tokenizers object's vocabulary by tiktoken."""
    model = json.loads(theirs.to_str())["model"]
    named = {t.content: id for id, t in theirs.get_added_tokens_decoder().items()}
    vocab = {token: id for token, id in model["vocab"].items() if token not in named}
    engine = vocabulary._fast(vocab, model["merges"], named, split, 400, model["ignore_merges"])
    return engine and Tokenizer(engine, {})


PATTERNS = {"gpt2": vocabulary.GPT2, "smollm": vocabulary.SMOLLM, "llama3": vocabulary.LLAMA3}


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request):
    theirs = byte_bpe(SPLITS[request.param], SPECIAL)
    return fast(theirs, PATTERNS[request.param]), theirs


def test_tiktoken_gives_tokenizers_ids_on_hostile_text(pair):
    ours, theirs = pair
    for string in [PROSE, *HOSTILE]:
        ids = ours.encode(string)
        assert ids == theirs.encode(string).ids, repr(string)
        assert ours.decode(ids) == string


@given(
    TRICKY.filter(lambda string: "<|" not in string)
)  # they would read special tokens out of the text
def test_tiktoken_gives_tokenizers_ids_on_any_text(pair, string):
    ours, theirs = pair
    assert ours.encode(string) == theirs.encode(string).ids


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
    st.text("abc", max_size=14),
)
def test_accepted_merge_lists_give_tokenizers_ids(choices, string):
    """Random merge lists, most of them never trained: what `_fast` accepts, tiktoken encodes the same."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens, merges = list("abc"), []
    for i, j in choices:
        a, b = tokens[i % len(tokens)], tokens[j % len(tokens)]
        if a + b not in tokens:
            tokens.append(a + b)
            merges.append((a, b))
    vocab = {token: i for i, token in enumerate(tokens)}
    ours = vocabulary._fast(vocab, merges, {}, vocabulary.GPT2, len(vocab), False)
    if ours is not None:
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        assert ours.ids([string]) == theirs.encode(string).ids


def test_a_merge_that_can_never_happen_is_not_tiktokens():
    """ "ab" comes before "bc", so a list whose "abc" is a + bc never makes abc; tiktoken would, from ab + c."""
    vocab = {c: i for c, i in zip("abc", range(3))} | {"ab": 3, "bc": 4, "abc": 5}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    made = vocabulary._fast(vocab, merges, {}, vocabulary.GPT2, 6, False)
    assert made.ids(["abc"]) == [5]
    for others in ([*merges[:2], ("a", "bc")], merges[:2], [merges[1], merges[0], merges[2]]):
        assert vocabulary._fast(vocab, others, {}, vocabulary.GPT2, 6, False) is None
        assert vocabulary._fast(vocab, others, {}, vocabulary.GPT2, 6, True) is None


def test_missing_bytes_get_ids_past_the_vocabulary():
    spelled = {b: c for c, b in BYTES.items()}
    vocab = {spelled[b]: b for b in range(255)}
    ours = Tokenizer(vocabulary._fast(vocab, [], {}, vocabulary.GPT2, 300, False), {})
    assert ours.spell(300) == b"\xff" and ours.n_vocab == 301 and ours.spell(299) == b""
    assert "\\u00ff" not in vocabulary.to_files(ours, 300)["tokenizer.json"]


def test_save_keeps_what_tiktoken_reads_fast(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, theirs = pair
    ours.settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    for _ in range(2):  # a second round trip adds nothing
        save(random_model(vocab_size=400), ours, tmp_path)
        again = load(tmp_path, "cpu")[1]
        assert isinstance(again.engine, Tiktoken) and again.special == ours.special
        assert again.engine.encoding._mergeable_ranks == ours.engine.encoding._mergeable_ranks
        ours = again
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for string in [PROSE, *HOSTILE]:
        assert read(string, add_special_tokens=False).input_ids == ours.encode(string)
    assert read.decode(ours.encode(PROSE)) == PROSE


# ---- Llama 3's tokenizer.model -------------------------------------------------------------------------


def llama3_model(folder):
    tokens = [bytes([b]) for b in range(256)] + [
        b"he",
        b"ll",
        b"hell",
        b"hello",
        b" w",
        b"\n\n",
        b"us",
        b"user",
    ]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return len(tokens)


def test_llama_3s_tokenizer_model(tmp_path):
    n = llama3_model(tmp_path)
    ours = vocabulary.from_folder(tmp_path, {"eos_token_id": [n + 1, n + 9]}, n + 256)
    assert ours.n_vocab == n + 256 and len(ours.special) == 256
    places = {
        "begin_of_text": 0,
        "end_of_text": 1,
        "finetune_right_pad_id": 4,
        "start_header_id": 6,
    }
    places |= {
        "end_header_id": 7,
        "eom_id": 8,
        "eot_id": 9,
        "python_tag": 10,
        "reserved_special_token_245": 255,
    }
    for name, place in places.items():
        assert ours.special[f"<|{name}|>"] == n + place
    assert ours.encode("hello world") == [n, 259, 260, *b"orld"]  # the reference puts BOS first
    assert ours.chat(["hello", "hell", "12345"]) == [
        n,
        259,
        10,
        258,
        10,
        *b"12345",
    ]  # no template: plain
    assert ours.stop == (n + 1, n + 9) and ours.prompt == "plain text with BOS"
    assert (
        vocabulary.from_folder(tmp_path, {}, 301).encode("hello")[0] == n
    )  # special tokens past the vocabulary


def test_tokenizer_json_comes_first(tmp_path):
    llama3_model(tmp_path)
    byte_bpe(SPLITS["gpt2"], SPECIAL).save(str(tmp_path / "tokenizer.json"))
    assert "<|eot_id|>" not in vocabulary.from_folder(tmp_path, {}, 600).special


def test_a_sentencepiece_model_is_refused(tmp_path):
    for content in (
        b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\n\n\x03<s>",
        b"aGk= one\n",
        b"aGk=\n",
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(
            ValueError, match="not Llama 3's; for a sentencepiece one give tokenizer.json"
        ):
            vocabulary.from_folder(tmp_path, {}, 600)


# ---- added tokens, BOS, ends ---------------------------------------------------------------------------


def test_added_tokens_are_one_id_each(tmp_path):
    """special: false in text, blanks taken in on either side, and tokens that only tokenizer_config.json has."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    for theirs in (byte_bpe(SPLITS["gpt2"], SPECIAL), llama_2()):
        theirs.add_tokens([tokenizers.AddedToken("<tool>", special=False, normalized=False)])
        theirs.add_tokens(
            [tokenizers.AddedToken("<left>", special=False, normalized=False, lstrip=True)]
        )
        theirs.add_tokens([tokenizers.AddedToken("<right>", special=False, rstrip=True)])
        theirs.add_special_tokens(
            [tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)]
        )
        transformers.PreTrainedTokenizerFast(tokenizer_object=theirs).save_pretrained(tmp_path)
        last = theirs.get_vocab_size()
        flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=False)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"] = {str(last): {"content": "<late>", **flags}}
        settings["chat_template"] = (
            "{% for m in messages %}a <mask> {{ m['content'] }} <mask>{% endfor %}"
        )
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = vocabulary.from_folder(tmp_path, {}, last)
        for text in [
            "a<tool>b <tool> c",
            "a  <left>  b",
            "a <right>  b",
            "<late> <late>x",
            " <late>",
            "x<left><right>",
        ]:
            assert ours.encode(text) == theirs(text).input_ids, text
            messages = [dict(role="user", content=text)]
            assert ours.chat([text]) == theirs.apply_chat_template(messages, return_dict=False)
        assert last in ours.encode("<late>") and ours.spell(last) == b"<late>"


def test_a_token_past_the_vocabulary_loads(tmp_path):
    from hispec import generate

    theirs = byte_bpe(SPLITS["gpt2"], SPECIAL)
    size = theirs.get_vocab_size()
    theirs.add_special_tokens(["<pad>"])
    save(random_model(vocab_size=size), None, tmp_path)
    theirs.save(str(tmp_path / "tokenizer.json"))
    model, ours = load(tmp_path, "cpu")
    assert ours.special["<pad>"] == size == model.config.vocab_size
    with pytest.raises(ValueError, match=str(size)):
        generate(model, [size], 1)


BEGINNINGS = [
    (True, {}, [1]),
    (True, {"add_bos_token": True}, [1]),
    (
        True,
        {"add_bos_token": False},
        [1],
    ),  # so transformers 5, which reads the post-processor alone
    (False, {}, []),
    (False, {"add_bos_token": False}, []),
    (False, {"add_bos_token": True}, [1]),  # transformers 4, and the llama.cpp converter
]


@pytest.mark.parametrize("processor, settings, bos", BEGINNINGS)
def test_bos_is_the_post_processors_or_the_configs(tmp_path, processor, settings, bos):
    transformers = pytest.importorskip("transformers")
    content = json.loads(llama_2().to_str())
    content["post_processor"] = content["post_processor"] if processor else None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>"},
        **settings,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = vocabulary.from_folder(tmp_path, {}, 600)
    assert ours.bos == bos and ours.prompt == ("plain text with BOS" if bos else "plain text")
    save(random_model(vocab_size=600), ours, tmp_path / "again")
    assert vocabulary.from_folder(tmp_path / "again", {}, 600).encode("hello") == ours.encode(
        "hello"
    )
    settings["bos_token"] = "<s>"
    (tmp_path / "again" / "tokenizer_config.json").write_text(json.dumps(settings))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert ours.encode("hello") == read("hello").input_ids


ENDS = [
    ({"eos_token_id": 5}, None, (5,)),
    ({"eos_token_id": [5, 7]}, None, (5, 7)),
    ({}, {"eos_token_id": [7, 5]}, (7, 5)),
    ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
    ({"eos_token_id": 5}, {"eos_token_id": [5, 9]}, (5, 9)),
    ({}, None, (2,)),
    ({}, {}, (2,)),
]


@pytest.mark.parametrize("config, generation, stop", ENDS)
def test_the_end_is_what_the_files_name(tmp_path, config, generation, stop):
    llama_2().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert vocabulary.from_folder(tmp_path, config, 600).stop == stop


def test_an_end_must_be_an_id(tmp_path):
    llama_2().save(str(tmp_path / "tokenizer.json"))
    for ends in ("</s>", [1, "2"], -1, 1.5):
        with pytest.raises(ValueError, match="config.json: eos_token_id must be a token id"):
            vocabulary.from_folder(tmp_path, {"eos_token_id": ends}, 600)


@pytest.mark.parametrize("where", ["number", "list", "generation_config only"])
def test_greedy_text_ends_where_transformers_ends(tmp_path, where):
    import torch

    from hispec import generate

    transformers = pytest.importorskip("transformers")
    model = random_model(5, vocab_size=600)
    save(model, None, tmp_path)
    llama_2().save(str(tmp_path / "tokenizer.json"))
    free = generate(model, [1, 5, 9], 30).tokens
    ends = {
        "number": free[7],
        "list": [599, free[7], free[11]],
        "generation_config only": [free[4], 598],
    }[where]
    config = json.loads((tmp_path / "config.json").read_text())
    name = "generation_config.json" if "only" in where else "config.json"
    content = {"eos_token_id": ends} if "only" in where else config | {"eos_token_id": ends}
    (tmp_path / name).write_text(json.dumps(content))
    ours, tokenizer = load(tmp_path, "cpu", torch.float64)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    written = theirs.generate(
        torch.tensor([[1, 5, 9]]), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    tokens = generate(ours, [1, 5, 9], 30, stop=tokenizer.stop).tokens
    assert tokens == written[0, 3:].tolist() and len(tokens) < 30


# ---- chat ----------------------------------------------------------------------------------------------


def byte_level(vocab=256, special=(), template=None):
    ranks = {bytes([b]): b if b < vocab else vocab + b for b in range(256)}
    named = dict(special)
    encoding = tiktoken.Encoding(
        "bytes", pat_str=vocabulary.GPT2, mergeable_ranks=ranks, special_tokens=named
    )
    return Tokenizer(Tiktoken(encoding, named), {"chat_template": template}, where="template file")


def test_chat_without_a_template_is_plain_text():
    plain = byte_level(special={"<|im_start|>": 256, "<|start_header_id|>": 257})
    assert (
        plain.chat(["a", "b", "c"]) == [*b"a\nb\nc"]
        and plain.stop == ()
        and plain.prompt == "plain text"
    )


def test_chat_ends_with_the_user():
    for turns in ([], ["a", "b"]):
        with pytest.raises(ValueError, match=f"got {len(turns)} turns"):
            byte_level().chat(turns)
    with pytest.raises(ValueError, match="a list of turns, got a text"):
        byte_level().chat("abc")


def test_a_template_may_come_by_name_or_in_its_own_file(tmp_path):
    byte_bpe(SPLITS["gpt2"], SPECIAL).save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    ids = vocabulary.from_folder(tmp_path, {}, 400).chat(["hi"])
    assert ids.count(1) == 2 and ids.count(2) == 1
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    ours = vocabulary.from_folder(tmp_path, {}, 400)
    assert ours.decode(ours.chat(["hi"])) == "hi!"


# ---- learned ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    texts = [
        "def f(x):\n    return x\n" * 20,
        "naïve café ½ _under__score '日本語' \U0001f600 aaaa\t\r\n" * 20,
    ]
    return vocabulary.learn(texts, 400)


@given(st.text())
@example("aaaaaaa")
@example("<|endoftext|> is text, not a mark")
@example("\x00\x1c\u2028\u200d e\u0301 ½²٣ _a__b \ud7ff")
def test_a_learned_vocabulary_gives_any_text_back(learned, text):
    assert learned.decode(learned.encode(text)) == text


def test_a_learned_vocabulary_merges_what_is_common(learned, tmp_path):
    assert isinstance(learned.engine, Tiktoken) and len(learned.encode("    return x\n")) < 6
    assert learned.n_vocab <= 400 and learned.special[vocabulary.END] == learned.n_vocab - 1
    save(random_model(vocab_size=learned.n_vocab).float(), learned, tmp_path)
    text = "def f(x):\n    return naïve_1\t\U0001f600\x00"
    again = load(tmp_path, "cpu")[1]
    assert again.encode(text) == learned.encode(text) and again.stop == learned.stop == (
        learned.n_vocab - 1,
    )
