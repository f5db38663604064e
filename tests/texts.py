"""Small vocabularies, made by tokenizers, and chat templates of the families that a Llama
checkpoint may come from.
"""

import json

import pytest
from hypothesis import strategies as st

from checkpoints import vocabulary

PROSE = (
    "hello world, it's 12 o'clock: don't we'll go? \n\n\tdef f(a):  return a + 1  # naïve übermäßig 日本語 😀\r\n "
    * 3
)
HOSTILE = [
    "", " ", "  ", "   a", "a   ", "\t\tif x:\n\n\n    y", "a \n b", " \n", "\r\n\r\n x", "\u00a0\u00a0a \u00a0 1",
    "   1", " 1", "  12  34 ", "\n\n1", "\t 7\n8", "a1b2", "3.14e-10", "1,000,000", "x²y ½ Ⅷ ٣٤٥ ৪ 五 ①", " ²", "  ½ Ⅷ",
    "it's we'll I'VE 'sdm ''s 're1 's1 '1s don\u2019t", "ſ 'ſ", "😀", "👨‍👩‍👧‍👦 👩🏽‍💻 🇩🇪 e\u0301 ä ﬁ", "日本語のテキスト", "שלום مرحبا",
    "for(int i=0;i<10;++i){a[i]+=1;}", "a_b__c-->d", "<|im_start>", "\u200b\u200d\ufeff", "!?!?  ...", "▁ ▁a",
    "\u0085\u2028\u2029 x", "\x0b\x0c1", "a" * 300, " " * 300 + "1" * 300,
]  # fmt: skip

# both libraries know every character of Unicode 16; of 17, one calls 13 new digits digits and the other does not
TRICKY = st.text(
    st.sampled_from("ab'sdmtlrev .!?\t\n\r\u00a0\u3000\u0085\x0b19²½Ⅷ٣é日😀\u200dſ")
    | st.characters(exclude_categories=["Cs", "Cn"])
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content ="
    " bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
INST = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
QWEN_25 = (  # tools are told of in another system message, which no turn asks for
    "{%- if tools %}\n    {{- '<|im_start|>system\\n<tools>' }}\n    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}\n"
    "    {{- '</tools>, called in <tool_call></tool_call><|im_end|>\\n' }}\n{%- else %}\n"
    "    {%- if messages[0]['role'] != 'system' %}\n        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n    {%- endif %}\n"
    "{%- endif %}\n{%- for message in messages %}\n    {%- if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
QWEN_3 = (  # thoughts are kept after the last question only, where no turn of a conversation is
    "{%- set ns = namespace(searching=true, last=messages | length - 1) %}\n{%- for message in messages[::-1] %}\n"
    "    {%- if ns.searching and message.role == 'user' and message.content is string and not message.content.startswith('<tool_response>') %}\n"
    "        {%- set ns.searching = false %}\n        {%- set ns.last = messages | length - 1 - loop.index0 %}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
    "        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {%- set content, thought = message.content, '' %}\n        {%- if '</think>' in content %}\n"
    "            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\n"
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
    "        {%- if loop.index0 > ns.last and thought %}\n            {%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}\n"
    "        {%- endif %}\n        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)
SYSTEM = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}",
)
TEMPLATES = {"tinyllama": ZEPHYR, "llama-2 first": INST, "llama-3": LLAMA_3, "smollm 2": SYSTEM}
TEMPLATES |= {"deepseek": DEEPSEEK, "chatml": "{{ bos_token }}" + CHATML, "mistral": MISTRAL}
TEMPLATES |= {"mistral nemo": MISTRAL, "qwen 2.5": QWEN_25, "qwen 3": QWEN_3}
FAMILIES = ["llama-2", *TEMPLATES]


def byte_bpe(split, special, *, first=True, ignore_merges=False):
    """A small byte-level BPE, its special tokens first or, as in Llama 3, last."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    theirs.pre_tokenizer = split(tokenizers.pre_tokenizers)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=alphabet,
        special_tokens=special if first else [],
        show_progress=False,
    )
    theirs.train_from_iterator([PROSE], trainer)
    if not first:
        theirs.add_special_tokens(special)
    return theirs


def split_then_bytes(pattern):
    def build(pre):
        import tokenizers

        split = pre.Split(tokenizers.Regex(pattern), behavior="isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


SPLITS = {
    "gpt2": lambda pre: pre.ByteLevel(add_prefix_space=False),
    "smollm": lambda pre: pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": split_then_bytes(vocabulary.LLAMA3),
    # as the families' own files have them
    "qwen2": split_then_bytes(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": split_then_bytes(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def sentencepiece(extra=()):
    """vocab, scores and merges as sentencepiece's BPE has them: three controls, 256 bytes, pieces by rank."""
    tokenizers = pytest.importorskip("tokenizers")
    base = pytest.importorskip("transformers.tokenization_utils_base")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, show_progress=False)
    theirs.train_from_iterator([line.replace(" ", "▁") for line in PROSE.splitlines()], trainer)
    found = sorted(
        json.loads(theirs.to_str())["model"]["vocab"].items(),
        key=lambda item: (len(item[0]) < 2, item[1]),
    )
    pieces = [piece for piece, _ in found]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *extra]
    vocab = {token: id for id, token in enumerate(tokens)}
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    merges = base.generate_merges({p: vocab[p] for p in pieces}, scores)
    return vocab, scores, merges


def llama_2(extra=(), scheme="prepend"):
    """A tokenizer.json of Llama 2's kind: byte fallback, a blank before each stretch of text or before the first."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab, _, merges = sentencepiece(extra)
    model = tokenizers.models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    theirs = tokenizers.Tokenizer(model)
    n, d = tokenizers.normalizers, tokenizers.decoders
    if scheme == "prepend":
        theirs.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    else:
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            "▁", prepend_scheme=scheme, split=False
        )
    theirs.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    added = tokenizers.AddedToken
    theirs.add_special_tokens(
        [added(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", *extra)]
    )
    bos = ("<s>", vocab["<s>"])
    theirs.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [bos])
    return theirs


def family(name):
    """The tokenizers object of a family and what its tokenizer_config.json adds: settings for transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    settings = {"chat_template": TEMPLATES[name]} if name in TEMPLATES else {}

    def plain(theirs, *tokens):  # added, but not special
        for token in tokens:
            theirs.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False)])
        return theirs

    def begins(theirs, bos):
        frame = [(bos, theirs.token_to_id(bos))]
        return tokenizers.processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", frame)

    if "llama-2" in name or name in ("tinyllama", "mistral", "mistral nemo"):
        settings |= dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        if name == "mistral":
            return llama_2(["[INST]", "[/INST]"]), settings | dict(add_bos_token=True)
        if name != "mistral nemo":
            return llama_2(scheme="first" if name == "llama-2 first" else "prepend"), settings
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        theirs = byte_bpe(SPLITS["tekken"], special, ignore_merges=True)
        theirs.post_processor = begins(theirs, "<s>")
        return theirs, settings
    if name.startswith("qwen"):
        theirs = byte_bpe(SPLITS["qwen2"], SPECIAL, first=False)
        theirs.normalizer = tokenizers.normalizers.NFC()
        settings |= dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False)
        return plain(theirs, "<tool_call>", "</tool_call>", "<think>", "</think>"), settings
    if name == "llama-3":
        names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
        special, processors = [f"<|{name}|>" for name in names], tokenizers.processors
        theirs = byte_bpe(SPLITS["llama3"], special, first=False, ignore_merges=True)
        theirs.post_processor = processors.Sequence(
            [processors.ByteLevel(), begins(theirs, special[0])]
        )
        return theirs, settings | dict(bos_token=special[0], eos_token=special[1])
    if name == "deepseek":
        special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
        theirs = byte_bpe(SPLITS["llama3"], special, first=False, ignore_merges=True)
        plain(theirs, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<tool>")
        settings |= dict(bos_token=special[0], eos_token=special[1])
        return theirs, settings | dict(add_bos_token=True, add_eos_token=False)
    settings |= dict(bos_token="<|endoftext|>", eos_token="<|im_end|>")
    settings |= dict(add_bos_token=True) if name == "chatml" else {}
    return byte_bpe(SPLITS["gpt2" if name == "chatml" else "smollm"], SPECIAL), settings


def write_family(name, folder):
    """Let transformers write the family's tokenizer into the folder; return transformers' own tokenizer."""
    transformers = pytest.importorskip("transformers")
    theirs, settings = family(name)
    transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, **settings).save_pretrained(
        folder
    )
    return transformers.AutoTokenizer.from_pretrained(folder)
