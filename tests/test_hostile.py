"""Damaged and hostile tokenizers and templates end in one line."""

import json
import time

import pytest
from conftest import random_model
from test_tokenizer import byte_level
from texts import SPLITS, byte_bpe

from checkpoints import load, save, vocabulary

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def json_of(change):
    content = json.loads(byte_bpe(SPLITS["gpt2"], SPECIAL).to_str())
    change(content)
    return json.dumps(content)


JSON_REFUSED = {
    "tokenizer.json is not JSON": lambda: "{",
    "tokenizer.json is not JSON ": lambda: "[" * 100_000,
    "tokenizer.json is not a JSON object": lambda: "[]",
    "tokenizer.json has no model": lambda: "{}",
    "model 'Unigram' is not supported, only 'BPE'": lambda: json_of(lambda t: t["model"].update(type="Unigram")),
    "model has no vocab": lambda: json_of(lambda t: t["model"].pop("vocab")),
    "Token `zz` out of vocabulary": lambda: json_of(lambda t: t["model"]["merges"].append(["a", "zz"])),
    "two tokens share an id": lambda: json_of(lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<n>"})),
    "two tokens share an id ": lambda: json_of(lambda t: t["model"]["vocab"].update({"<n>": 7})),
    "'<n>' cannot have id 999": lambda: json_of(lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<n>", "id": 999})),
    "tokenizer.json: ": lambda: json_of(lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False})),
    "tokenizer.json:": lambda: json_of(lambda t: t.update(normalizer={"type": "Unheard of"})),
}  # fmt: skip


@pytest.mark.parametrize("message", JSON_REFUSED)
def test_damaged_tokenizers_end_in_one_line(tmp_path, message):
    save(random_model(vocab_size=400), None, tmp_path)
    (tmp_path / "tokenizer.json").write_text(JSON_REFUSED[message]())
    with pytest.raises(ValueError, match=message.strip()) as error:
        load(tmp_path, "cpu")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
TEMPLATES = {
    "is not valid Jinja": "{% for %}",
    "is not valid Jinja ": 7,
    "refuses: Conversation roles": "{{ raise_exception('Conversation\n roles') }}",
    "refuses: it loops too long": LOOPS.replace("BODY", ""),
    "refuses: it loops too long ": LOOPS.replace("BODY", "{% set a = 1 %}"),
    "refuses: it loops too long  ": "{% for i in range(99999) if false %}{% endfor %}" * 999,
    "refuses: it loops too long   ": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "refuses: it makes too long a text": "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "refuses: it makes too long a text ": "{{ 'a' * 10 ** 10 }}",
    "refuses: it makes too long a text  ": LOOPS.replace("BODY", "{{ 'a' * 10000 }}"),
    "refuses: it makes too long a text   ": LOOPS.replace("BODY", "a" * 10_000),
    "refuses: it makes too long a text    ": "{% for i in range(9999) %}{{ 'a' * -9999 }}{{ 'a' * 9999 }}{% endfor %}",
    "refuses: a number is too large": "{{ 'a'.center(10 ** 10) }}",
    "refuses: a number is too large ": "{{ 'a' | center(10 ** 10) }}",
    "refuses: a number is too large  ": "{{ 'a' | indent(width=10 ** 10, first=true) }}",
    "refuses: a number is too large   ": "{{ '%9999999999d' % 1 }}",
    "refuses: a number is too large    ": "{{ '%*d' % (10 ** 10, 1) }}",
    "refuses: a number is too large     ": "{{ '{:>9999999999}'.format(1) }}",
    "refuses: a number is too large      ": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "refuses: a number is too large       ": "{{ '%9999999999d' | format(1) }}",
    "refuses: maximum recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "refuses: access to attribute '__class__'": "{{ ''.__class__.__mro__ }}",
    "refuses: access to attribute 'append'": "{{ messages.append(1) }}",
    "refuses: access to attribute '__globals__'": "{{ raise_exception.__globals__.os }}",
    "refuses: division by zero": "{{ 1 / 0 }}",
    "refuses: 'tool' is undefined": "{{ tool.name }}",
    "drops, moves or repeats a turn": "Hello",
    "drops, moves or repeats a turn ": "{{ messages[0].content }}{{ messages[0].content }}",
}


@pytest.mark.parametrize("message", TEMPLATES)
def test_bad_templates_end_in_one_line(message):
    began = time.monotonic()
    with pytest.raises(
        ValueError, match="template file: the chat template " + message.strip()
    ) as error:
        byte_level(template=TEMPLATES[message]).chat(["hi"])
    assert "\n" not in str(error.value) and time.monotonic() - began < 8


def test_numbers_in_a_turn_are_just_text():
    template = (
        "{% for m in messages %}{{ ('%s' % m.content) | trim }}{{ '{}'.format('') }}{% endfor %}"
    )
    assert byte_level(template=template).chat(["call 5551234567 * 2 "]) == [*b"call 5551234567 * 2"]


def test_a_template_trims_and_cuts_as_it_will():
    """What the template makes of a turn is the turn's; what stands around it is the template's."""
    ours = byte_level(
        special={"<e>": 256},
        template="{% for m in messages %}{{ '<e>' + m.content.split('#')[-1]|trim }}{% endfor %}<e>",
    )
    assert ours.chat([" a ", "x#\tb ", "<e>"]) == [256, *b"a", 256, *b"b", 256, *b"<e>", 256]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_template_that_refuses_names_its_file(tmp_path, file):
    byte_bpe(SPLITS["gpt2"], SPECIAL).save(str(tmp_path / "tokenizer.json"))
    refusing = "{{ raise_exception('no') }}"
    text = refusing if file.endswith(".jinja") else json.dumps({"chat_template": refusing})
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: the chat template refuses: no"):
        vocabulary.from_folder(tmp_path, {}, 400).chat(["hi"])
