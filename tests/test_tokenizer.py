"""Vocabularies: learned ones, Llama 3's tokenizer.model, added tokens, ends, chat."""

import base64
import copy
import json
import pickle

import pytest
import tiktoken
import tokenizers
from conftest import random_model
from hypothesis import example, given
from hypothesis import strategies as st
from texts import CHATML, HOSTILE, PROSE, SPECIAL, SPLITS, byte_bpe, llama_2, write_family

from checkpoints import load, save, vocabulary
from checkpoints.tokenizer import Tiktoken, Tokenizer
from hispec import generate

# ---- learned -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    code = "def f(x):\n    return x\n" * 20
    other = "naïve café ½ _under__score '日本語' \U0001f600 aaaa\t\r\n" * 20
    return vocabulary.learn([code, other], 400)


@given(st.text())
@example("aaaaaaa")
@example("<|endoftext|> is text, not a mark")
@example("\x00\x1c\u2028\u200d e\u0301 ½²٣ _a__b \ud7ff")
def test_a_learned_vocabulary_gives_any_text_back(learned, text):
    ids = learned.encode(text)
    assert learned.decode(ids) == text == b"".join(map(learned.spell, ids)).decode()


def test_a_learned_vocabulary_merges_what_is_common(learned):
    """A newline is never merged with its neighbours, so a text may end there and go on."""
    assert len(learned.encode("    return x\n")) < 6 and learned.n_vocab <= 400
    assert learned.stop == (learned.n_vocab - 1,) and learned.bos == []
    text = "def f(n):\n    if n:\n        return 12\n\n\nclass A:\n    x = 1\n" * 50
    tokenizer = vocabulary.learn([text], 400)
    tokens = [tokenizer.spell(id) for id in tokenizer.encode(text[:64])]
    assert {b"\n", b"    ", b"        "} <= set(tokens)
    assert not any(b"\n" in token and len(token) > 1 for token in tokens)


def assert_the_same(ours, again, theirs):
    for text in [PROSE, *HOSTILE]:
        assert again.encode(text) == ours.encode(text), repr(text)
        assert ours.encode(text) == theirs(text).input_ids, repr(text)
    assert again.special == ours.special and again.stop == ours.stop and again.bos == ours.bos
    assert theirs.decode(ours.encode(PROSE), skip_special_tokens=True) == PROSE


def test_a_learned_vocabulary_is_saved_and_read_by_transformers(learned, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = learned
    for _ in range(2):  # a second round trip adds nothing
        save(random_model(vocab_size=400), ours, tmp_path)
        ours = load(tmp_path, "cpu")[1]
        assert_the_same(learned, ours, transformers.AutoTokenizer.from_pretrained(tmp_path))
        assert isinstance(ours.engine, Tiktoken)  # training reads a corpus with it


# ---- Llama 3's tokenizer.model -------------------------------------------------------------------


def llama3_model(folder):
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"he", b"ll", b"hell", b"hello", b" w", b"\n\n", b"us", b"user"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return len(tokens)


def test_llama_3s_tokenizer_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    n = llama3_model(tmp_path)
    ours = vocabulary.from_folder(tmp_path, {"eos_token_id": [n + 1, n + 9]}, n + 256)
    assert ours.n_vocab == n + 256 and len(ours.special) == 256
    places = {"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4}
    places |= {"start_header_id": 6, "end_header_id": 7, "eom_id": 8, "eot_id": 9}
    places |= {"python_tag": 10, "reserved_special_token_245": 255}
    for name, place in places.items():
        assert ours.special[f"<|{name}|>"] == n + place
    assert ours.encode("hello world") == [n, 259, 260, *b"orld"]  # the reference puts BOS first
    assert ours.chat(["hello", "hell", "12345"]) == [n, 259, 10, 258, 10, *b"12345"]
    assert ours.stop == (n + 1, n + 9) and ours.prompt == "plain text with BOS"
    save(random_model(vocab_size=n + 256), ours, tmp_path / "again")
    again = load(tmp_path / "again", "cpu")[1]
    assert_the_same(ours, again, transformers.AutoTokenizer.from_pretrained(tmp_path / "again"))


def test_tokenizer_json_comes_first_and_a_sentencepiece_model_is_refused(tmp_path):
    for content in (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n", b"aGk= one\n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="for a sentencepiece one give tokenizer.json"):
            vocabulary.from_folder(tmp_path, {}, 600)
    byte_bpe(SPLITS["gpt2"], SPECIAL).save(str(tmp_path / "tokenizer.json"))
    assert "<|im_end|>" in vocabulary.from_folder(tmp_path, {}, 600).special


# ---- added tokens, BOS, ends ---------------------------------------------------------------------


ADDED = {
    "<tool>": dict(special=False),
    "<left>": dict(special=False, lstrip=True),
    "<right>": dict(special=False, rstrip=True, normalized=True),
    "<mask>": dict(special=True, lstrip=True, rstrip=True),
}


@pytest.mark.parametrize("kind", ["byte-level", "llama-2"])
def test_added_tokens_are_one_id_each(tmp_path, kind):
    """They may be not special, absorb blanks, or be only in tokenizer_config.json."""
    transformers = pytest.importorskip("transformers")
    theirs = llama_2() if kind == "llama-2" else byte_bpe(SPLITS["gpt2"], SPECIAL)
    for name, flags in ADDED.items():
        theirs.add_tokens([tokenizers.AddedToken(name, **{"normalized": False} | flags)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=theirs).save_pretrained(tmp_path)
    late = theirs.get_vocab_size()
    flags = dict.fromkeys(["lstrip", "rstrip", "normalized", "single_word", "special"], False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(late): {"content": "<late>", **flags}}
    template = "{% for m in messages %}a <mask> {{ m['content'] }} <mask>{% endfor %}"
    settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = vocabulary.from_folder(tmp_path, {}, late)
    texts = ["a<tool>b <tool> c", "a  <left>  b", "a <right>  b", "<late> <late>x"]
    for text in [*texts, "x<left><right>"]:
        assert ours.encode(text) == theirs(text).input_ids, text
        messages = [dict(role="user", content=text)]
        assert ours.chat([text]) == theirs.apply_chat_template(messages, return_dict=False)
    assert late in ours.encode("<late>") and ours.spell(late) == b"<late>"


BEGINNINGS = [
    (True, {}, [1]),
    (True, {"add_bos_token": False}, [1]),  # so transformers 5: the post-processor has the say
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
    settings = {"bos_token": {"content": "<s>"}, **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = vocabulary.from_folder(tmp_path, {}, 600)
    assert ours.bos == bos and ours.prompt == ("plain text with BOS" if bos else "plain text")
    save(random_model(vocab_size=600), ours, tmp_path / "again")
    again = load(tmp_path / "again", "cpu")[1]
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert ours.encode("hello") == again.encode("hello") == read("hello").input_ids


ENDS = [
    ({"eos_token_id": 5}, None, (5,)),
    ({"eos_token_id": [5, 7]}, None, (5, 7)),
    ({}, {"eos_token_id": [7, 5]}, (7, 5)),
    ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
    ({"eos_token_id": 5}, {"eos_token_id": [5, 9]}, (5, 9)),
    ({}, {}, (2,)),
]


@pytest.mark.parametrize("config, generation, stop", ENDS)
def test_the_end_is_what_the_files_name(tmp_path, config, generation, stop):
    llama_2().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert vocabulary.from_folder(tmp_path, config, 600).stop == stop


def test_a_token_past_the_vocabulary_loads_but_must_not_be_asked_for(tmp_path):
    """Asked for as an end in either file, as BOS, or by the chat template: `load` refuses, not
    `generate`.
    """
    theirs = llama_2(["<late>"])
    late = theirs.token_to_id("<late>")
    theirs.post_processor = None
    save(random_model(vocab_size=late), None, tmp_path)
    theirs.save(str(tmp_path / "tokenizer.json"))
    model, ours = load(tmp_path, "cpu")
    assert ours.special["<late>"] == late == model.config.vocab_size
    with pytest.raises(ValueError, match=str(late)):
        generate(model, [late], 1)
    begin, write = {"bos_token": "<late>", "add_bos_token": True}, "{{ messages[0].content }}<late>"
    config = {"config.json": json.loads((tmp_path / "config.json").read_text())}
    for file, settings, message in [
        ("config", {"eos_token_id": late}, f"config.json: eos_token_id {late}, outside"),
        ("config", {"eos_token_id": "</s>"}, "config.json: eos_token_id must be a token id"),
        ("config", {"eos_token_id": [1, -1]}, "config.json: eos_token_id must be a token id"),
        ("generation_config", {"eos_token_id": [2, late + 5]}, f"eos_token_id {late + 5}, outside"),
        ("tokenizer_config", {"eos_token": "<late>"}, f"eos_token '<late>' has id {late}"),
        ("tokenizer_config", begin, f"bos_token '<late>' has id {late}, outside"),
        ("tokenizer_config", {"chat_template": write}, f"chat template's '<late>' has id {late}"),
    ]:
        written = config | {f"{file}.json": config.get(f"{file}.json", {}) | settings}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            (tmp_path / name).write_text(json.dumps(written.get(name, {})))
        with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
            load(tmp_path, "cpu")


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "deepseek", "learned"])
def test_a_copied_tokenizer_is_the_same(tmp_path, learned, name):
    """This holds across processes too, and a turn cannot forge special tokens there either."""
    if name != "learned":
        write_family(name, tmp_path)
    ours = learned if name == "learned" else vocabulary.from_folder(tmp_path, {}, 600)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for text in [PROSE, *ours.special]:
            assert again.encode(text) == ours.encode(text), text
            assert again.chat([text, "yes", text]) == ours.chat([text, "yes", text])
        assert again.stop == ours.stop and again.decode(ours.encode(PROSE)).endswith(PROSE)


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "chatml"])
def test_a_continuation_is_what_follows_its_prompt(tmp_path, name):
    write_family(name, tmp_path)
    ours = vocabulary.from_folder(tmp_path, {}, 600)
    for text in [PROSE[:100], *HOSTILE]:
        ids = ours.encode(text)
        for cut in range(len(ids)):
            before = ours.decode(ids[:cut])
            if "\ufffd" not in before:  # which would end in the middle of a character
                rest = ours.decode(ids[cut:], after=ids[:cut])
                assert before + rest == ours.decode(ids), (text, cut)


# ---- chat ----------------------------------------------------------------------------------------


def byte_level(vocab=256, special=(), template=None):
    """A tokenizer whose tokens are bytes; bytes from vocab on have ids past the vocabulary."""
    ranks = {bytes([b]): b if b < vocab else vocab + b for b in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=vocabulary.GPT2, mergeable_ranks=ranks, special_tokens=dict(special)
    )
    engine = Tiktoken(encoding, dict(special))
    return Tokenizer(engine, {"chat_template": template}, where="template file")


def test_chat_without_a_template_is_plain_text_and_ends_with_the_user():
    plain = byte_level(special={"<|im_start|>": 256})
    assert plain.chat(["a", "b", "<|im_start|>"]) == [*b"a\nb\n<|im_start|>"]
    assert plain.stop == () and plain.prompt == "plain text"
    for turns in ([], ["a", "b"]):
        with pytest.raises(ValueError, match=f"got {len(turns)} turns"):
            plain.chat(turns)
    with pytest.raises(ValueError, match="a list of turns, got a text"):
        plain.chat("abc")


def test_a_template_trims_and_cuts_as_it_will():
    """Text that the template makes of a turn counts as the turn's; text around it is the
    template's.
    """
    each = "{{ '<e>' + m.content.split('#')[-1]|trim }}"
    template = f"{{% for m in messages %}}{each}{{% endfor %}}<e>"
    ours = byte_level(special={"<e>": 256}, template=template)
    assert ours.chat([" a ", "x#\tb ", "<e>"]) == [256, *b"a", 256, *b"b", 256, *b"<e>", 256]


def test_a_template_may_come_by_name_or_in_its_own_file(tmp_path):
    byte_bpe(SPLITS["gpt2"], SPECIAL).save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    ids = vocabulary.from_folder(tmp_path, {}, 400).chat(["hi"])
    assert ids.count(1) == 2 and ids.count(2) == 1
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    ours = vocabulary.from_folder(tmp_path, {}, 400)
    assert ours.decode(ours.chat(["hi"])) == "hi!"


# ---- damaged files and templates end in one line ---------------------------------------------------


def late(id):
    return lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"content": "<n>", "id": id})


JSON_REFUSED = {
    "tokenizer.json is not JSON": "{",
    "tokenizer.json is not a JSON object": "[]",
    "tokenizer.json: Model missing": "{}",
    "Token `zz` out of vocabulary": lambda t: t["model"]["merges"].append(["a", "zz"]),
    "'<n>' cannot have id 999": late(999),
    "'<n>' cannot have id 0": late(0),
    "tokenizer.json: .*Normalizer": lambda t: t.update(normalizer={"type": "Unheard of"}),
}


@pytest.mark.parametrize("message", JSON_REFUSED)
def test_damaged_tokenizers_end_in_one_line(tmp_path, message):
    save(random_model(vocab_size=400), None, tmp_path)
    text = JSON_REFUSED[message]
    if not isinstance(text, str):
        text(content := json.loads(byte_bpe(SPLITS["gpt2"], SPECIAL).to_str()))
        text = json.dumps(content)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}") as error:
        load(tmp_path, "cpu")
    assert "\n" not in str(error.value)


TEMPLATES_REFUSED = {
    "is not valid Jinja": ["{% for %}", 7],
    "refuses: Conversation roles": ["{{ raise_exception('Conversation\n roles') }}"],
    "refuses: maximum recursion": ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
    "refuses: access to attribute '__class__'": ["{{ ''.__class__.__mro__ }}"],
    "refuses: access to attribute 'append'": ["{{ messages.append(1) }}"],
    "refuses: access to attribute '__globals__'": ["{{ raise_exception.__globals__.os }}"],
    "refuses: 'tool' is undefined": ["{{ tool.name }}"],
    "drops, moves or repeats a turn": ["Hello", "{{ messages[0].content * 2 }}"],
}


@pytest.mark.parametrize("message", TEMPLATES_REFUSED)
def test_bad_templates_end_in_one_line(message):
    for template in TEMPLATES_REFUSED[message]:
        with pytest.raises(
            ValueError, match=f"template file: the chat template {message}"
        ) as error:
            byte_level(template=template).chat(["hi"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_template_that_refuses_names_its_file(tmp_path, file):
    byte_bpe(SPLITS["gpt2"], SPECIAL).save(str(tmp_path / "tokenizer.json"))
    refusing = "{{ raise_exception('no') }}"
    text = refusing if file.endswith(".jinja") else json.dumps({"chat_template": refusing})
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: the chat template refuses: no"):
        vocabulary.from_folder(tmp_path, {}, 400).chat(["hi"])
