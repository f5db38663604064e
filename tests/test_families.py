"""Prompts: for each family, from folders and GGUF files, texts and conversations get transformers'
ids.
"""

import json
import unicodedata

import pytest
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from test_gguf import SHAPE, write_gguf
from texts import FAMILIES, HOSTILE, PROSE, TRICKY, family, sentencepiece, write_family

from checkpoints import load, save, vocabulary


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    theirs = write_family(request.param, folder)
    return vocabulary.from_folder(folder, {}, 400), theirs


def conversation(theirs, turns):
    roles = ["user", "assistant"] * len(turns)
    messages = [dict(role=role, content=turn) for role, turn in zip(roles, turns)]
    return theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_ids_of_a_text_are_transformers_and_spell_it(pair):
    """The tokens' bytes are the text's, except for the blank that sentencepiece puts first."""
    ours, theirs = pair
    for text in [PROSE, *HOSTILE]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        text = unicodedata.normalize("NFC", text) if "NFC" in ours.engine.content else text
        spelled = b"".join(map(ours.spell, ids[len(ours.bos) :])).decode().replace("▁", " ")
        text = text.replace("▁", " ")
        assert spelled in (text, " " + text)
    assert ours.decode([ours.n_vocab, 10**6]) == ""
    assert ours.spell(ours.n_vocab) == ours.spell(10**9) == b""


def test_ids_of_a_conversation_are_transformers(pair):
    ours, theirs = pair
    for text in [PROSE, *HOSTILE]:
        for turns in ([text], [text, "Yes.", f"a {text} b"], ["a", text, "b"]):
            if ours.template is None:
                assert ours.chat(turns) == theirs("\n".join(turns)).input_ids
            else:
                assert ours.chat(turns) == conversation(theirs, turns), repr(turns)


@given(TRICKY, st.lists(TRICKY, min_size=2, max_size=2), st.booleans())
def test_ids_of_any_text_and_conversation_are_transformers(pair, text, rest, long):
    ours, theirs = pair
    turns = [text, *rest] if long else [text]
    if not any(token in "".join(turns) for token in theirs.added_tokens_encoder):
        assert ours.encode(text) == theirs(text).input_ids
        if ours.template is not None:
            assert ours.chat(turns) == conversation(theirs, turns)


@given(TRICKY, TRICKY, st.data())
def test_a_turn_cannot_forge(pair, before, after, data):
    """Whatever a turn spells, it has as many special tokens as a harmless one; transformers' has
    more.
    """
    ours, theirs = pair
    token = data.draw(st.sampled_from(sorted(ours.special)))
    unknown = theirs.unk_token_id
    count = lambda ids: sum(id in ours.special.values() and id != unknown for id in ids)  # noqa: E731
    turns = [before + token + after, "yes", token]
    assert count(ours.chat(turns)) == count(ours.chat(["a", "yes", "b"]))
    assert count(ours.encode(turns[0])) == len(ours.bos)
    if ours.template is not None and token != theirs.unk_token:
        assert count(conversation(theirs, turns)) > count(ours.chat(turns))


@pytest.mark.parametrize("name, mark", [("deepseek", "<｜User｜>"), ("qwen 3", "<think>")])
def test_a_train_of_thought_is_cut_as_the_template_cuts_it(tmp_path, name, mark):
    theirs = write_family(name, tmp_path)
    ours = vocabulary.from_folder(tmp_path, {}, 400)
    turns = ["a", "<think>\nhm, <tool>\n</think>\n\nYes.", "b"]
    assert ours.chat(turns) == conversation(theirs, turns)
    # not marked special, and yet no turn's
    assert ours.chat([mark]) != conversation(theirs, [mark])


def test_save_keeps_ids_and_transformers_reads_it(pair, tmp_path):
    import transformers

    ours, theirs = pair
    save(random_model(vocab_size=400), ours, tmp_path)
    again = load(tmp_path, "cpu")[1]
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [PROSE, *HOSTILE]:
        assert ours.encode(text) == again.encode(text) == read(text).input_ids
        assert ours.chat([text]) == again.chat([text])
    assert again.stop == ours.stop and again.special == ours.special


def as_gguf(path, name):
    """The family as llama.cpp's converter would write it into a GGUF file."""
    theirs, settings = family(name)
    size = theirs.get_vocab_size()
    tokens, added = [theirs.id_to_token(i) for i in range(size)], theirs.get_added_tokens_decoder()
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(size)]
    keys = {"tokens": tokens, "token_type": types}
    for key in ("bos", "eos"):
        if f"{key}_token" in settings:
            keys[f"{key}_token_id"] = theirs.token_to_id(settings[f"{key}_token"])
    if name in ("tinyllama", "llama-2", "mistral"):
        scores = sentencepiece()[1]
        types[:] = [6 if t.startswith("<0x") else k for t, k in zip(tokens, types)]
        types[tokens.index("<unk>")] = 2
        scores = [scores.get(token, 0.0) for token in tokens]
        keys |= {"model": "llama", "scores": scores, "unknown_token_id": 0}
    else:
        merges = json.loads(theirs.to_str())["model"]["merges"]
        pre = {"chatml": "gpt-2", "smollm 2": "smollm", "mistral nemo": "tekken"}
        pre |= dict.fromkeys(["qwen 2.5", "qwen 3"], "qwen2")
        merges = [" ".join(m) for m in merges]
        keys |= {"model": "gpt2", "pre": pre.get(name, "llama-bpe"), "merges": merges}
        if name != "mistral nemo":  # its converter leaves that to the pre-tokenizer's name
            keys["add_bos_token"] = name not in ("smollm 2", "qwen 2.5", "qwen 3")
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if "chat_template" in settings:
        keys["tokenizer.chat_template"] = settings["chat_template"]
    model = random_model(**SHAPE, vocab_size=size).float()
    return write_gguf(path, model, keys=keys.items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama-2 first"])
def test_gguf_gives_the_ids_of_the_folder(name, tmp_path):
    theirs = write_family(name, tmp_path)
    folder = vocabulary.from_folder(tmp_path, {}, 600)
    model, ours = load(as_gguf(tmp_path / "m.gguf", name), "cpu")
    save(model, ours, tmp_path / "again")
    again = load(tmp_path / "again", "cpu")[1]
    read = type(theirs).from_pretrained(tmp_path / "again")
    for text in [PROSE, *HOSTILE, "a<tool>b", *ours.special]:
        ids = ours.encode(text)
        assert ids == folder.encode(text) == again.encode(text), repr(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert all(ours.spell(id) == folder.spell(id) for id in ids)
        for turns in ([text], ["a", text, "b"]):
            assert ours.chat(turns) == folder.chat(turns) == again.chat(turns)
    for text in [PROSE, *HOSTILE]:
        assert read(text).input_ids == ours.encode(text)
    assert ours.stop == (theirs.eos_token_id,) and ours.prompt == folder.prompt
