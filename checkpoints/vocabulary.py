"""Vocabularies: read from a Hugging Face folder or a GGUF file, or learned, and written back.

The library tokenizers reads vocabularies from files: tokenizer.json is its format, and a GGUF
file's vocabulary is converted to it. tiktoken handles vocabularies made by `learn` and Llama 3's
tokenizer.model, in which a token's id is also its rank among the merges.

Sources: docs/gguf.md of ggml-org/ggml; the pre-tokenizers and the sentencepiece merges of
ggml-org/llama.cpp; the tokenizer of meta-llama/llama-models.
"""

import base64
import json
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import tiktoken
import tokenizers

from checkpoints.files import need, only, read_json
from checkpoints.tokenizer import BYTES, Library, Tiktoken, Tokenizer

END = "<|endoftext|>"  # between documents, in a learned vocabulary
_CHARS = {b: c for c, b in BYTES.items()}

# How text is cut into pieces before any merge. Each pattern matches any character; none is lost.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's, after each digit has been cut out: what stands before a digit ends there, so white space
# stays whole, while GPT-2 would leave its last space to the next word
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit by itself
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (  # Mistral's: a word ends before a capital letter
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# For learned vocabularies, meant for code. A newline is a piece by itself and so is the indentation
# after it, so that a text may end after either and continue as in the training files.
LEARNED = r"\n| {2,}|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
# by their names in a GGUF file
SPLITS = {"smollm": SMOLLM, "gpt-2": GPT2, "qwen2": QWEN2, "tekken": TEKKEN}
SPLITS |= dict.fromkeys(["llama-bpe", "llama3", "llama-v3"], LLAMA3)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # GGUF's token types


def from_folder(folder: Path, config: dict, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None if it has none. config: its config.json.

    Its answers end at the eos_token_id of config.json and of generation_config.json; if neither has
    one, at tokenizer_config.json's eos_token. ValueError if a file is damaged or contradicts
    another.
    """
    settings = read_json(folder / "special_tokens_map.json")
    settings |= read_json(folder / "tokenizer_config.json")
    where = folder / "tokenizer_config.json"  # where the template is, for its errors
    if (folder / "chat_template.jinja").is_file():
        where = folder / "chat_template.jinja"
        settings["chat_template"] = where.read_text("utf-8")
    # tokenizer.json first: unlike tokenizer.model it has the split and the special tokens
    engine: Library | Tiktoken
    if (folder / "tokenizer.json").is_file():
        engine = _from_json(folder / "tokenizer.json", settings)
    elif (folder / "tokenizer.model").is_file():
        engine = _from_model((folder / "tokenizer.model").read_bytes())
        settings = {"bos_token": "<|begin_of_text|>", "add_bos_token": True} | settings
    else:
        return None
    stop, generation = [], read_json(folder / "generation_config.json")
    for name, said in (("config.json", config), ("generation_config.json", generation)):
        ends = said.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(isinstance(id, int) and id >= 0 for id in ends):
            raise ValueError(f"{name}: eos_token_id must be a token id or several, got {ends}")
        for id in ends:
            _inside(f"{name}: eos_token_id {id}", id, vocab_size)
        stop += ends
    return _checked(Tokenizer(engine, settings, stop, str(where)), vocab_size)


def _checked(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Refuse a tokenizer whose BOS, EOS or framing tokens are not in the model's vocabulary."""
    template = tokenizer.template
    used = {"bos_token": tokenizer.bos, "eos_token": tokenizer.stop}
    used["chat template's"] = [
        id for token, id in tokenizer.special.items() if template and token in template.literals
    ]
    for name, ids in used.items():
        for id in ids:
            _inside(
                f"the tokenizer's {name} {tokenizer.decode([id])!r} has id {id}",
                id,
                vocab_size,
            )
    return tokenizer


def _inside(what: str, id: int, vocab_size: int) -> None:
    if id >= vocab_size:
        raise ValueError(f"{what}, outside the vocabulary of {vocab_size}")


def from_gguf(meta: dict, vocab_size: int, where: str = "") -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, None if it has none. ValueError if unsupported."""
    if "tokenizer.ggml.model" not in meta:
        return None
    only("tokenizer.ggml.model", meta["tokenizer.ggml.model"], "gpt2", "llama")
    own = {key.removeprefix("tokenizer.").removeprefix("ggml."): meta[key] for key in meta}
    tokens, types = (need(meta, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens repeats a token, or does not fit token_type")
    added = {token for token, kind in zip(tokens, types) if kind not in (NORMAL, BYTE)}
    plain = {token for token, kind in zip(tokens, types) if kind == USER}
    if own["model"] == "gpt2":
        only("tokenizer.ggml.pre", own.get("pre"), *SPLITS)
        split = SPLITS[own["pre"]]
        whole = split in (LLAMA3, TEKKEN)  # as llama.cpp has it, BOS too
        own = {"add_bos_token": whole} | own
        merges = [tuple(merge.split(" ")) for merge in need(meta, "tokenizer.ggml.merges")]
        engine = _byte_level(vocab, merges, split, whole)
        if split == QWEN2:
            engine.normalizer = tokenizers.normalizers.NFC()
    else:
        own = {"add_bos_token": True, "bos_token_id": 1, "eos_token_id": 2} | own
        scores = need(meta, "tokenizer.ggml.scores")
        engine = _sentencepiece(vocab, types, scores, bool(own.get("add_space_prefix", True)))
    named = ("bos", "unknown", "eos", "eot", "eom")
    ids = {key: own[f"{key}_token_id"] for key in named if f"{key}_token_id" in own}
    for key, id in ids.items():
        _inside(f"tokenizer.ggml.{key}_token_id {id}", id, min(vocab_size, len(tokens)))
    settings = {key: own.get(key) for key in ("add_bos_token", "chat_template")}
    names = {"bos": "bos_token", "unknown": "unk_token", "eos": "eos_token"}
    settings |= {name: tokens[ids[key]] for key, name in names.items() if key in ids}
    stop = [ids[key] for key in ("eos", "eot", "eom") if key in ids]
    tokenizer = Tokenizer(Library(_content(engine, added, plain)), settings, stop, where)
    return _checked(tokenizer, vocab_size)


def learn(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909) of at most vocab_size tokens, the last of them END."""
    engine = _byte_level({}, [], LEARNED, True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(BYTES), show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    vocab = engine.get_vocab()
    return Tokenizer(
        _tiktoken(_ranks(vocab), {END: len(vocab)}, LEARNED),
        {"eos_token": END, "engine": "tiktoken"},
    )


def to_files(tokenizer: Tokenizer) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, for the same ids here and in transformers."""
    # without this class transformers would build a Llama-2 tokenizer around the vocabulary, and it
    # reads special tokens only as plain texts
    settings = tokenizer.settings | tokenizer.names
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    engine = tokenizer.engine
    if isinstance(engine, Library):
        content = engine.content
    else:
        ranks = engine.encoding._mergeable_ranks
        written = {token: "".join(_CHARS[b] for b in token) for token in ranks}
        made = [_pieces(token, ranks) for token in sorted(ranks, key=ranks.__getitem__)]
        merges = [(written[pair[0]], written[pair[1]]) for pair in made if len(pair) == 2]
        special = {token: id for token, (id, _) in engine.added.items()}
        vocab = {written[token]: id for token, id in ranks.items()} | special
        content = _content(_byte_level(vocab, merges, engine.encoding._pat_str, True), special)
        settings["engine"] = "tiktoken"
    if tokenizer.bos and not engine.opening:  # the only place where transformers looks for it
        bos = tokenizer.names["bos_token"]
        framed = tokenizers.Tokenizer.from_str(content)
        framed.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, *tokenizer.bos)]
        )
        content = framed.to_str()
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=1)}


def _from_json(file: Path, settings: dict) -> Library | Tiktoken:
    content = read_json(file)
    added = content.get("added_tokens") or ()
    if settings.get("engine") == "tiktoken":  # written by `to_files`
        special = {token["content"]: token["id"] for token in added}
        vocab = {t: id for t, id in content["model"]["vocab"].items() if t not in special}
        # a saved SmolLM2 vocabulary lacks some bytes, which tiktoken needs
        if BYTES.keys() <= vocab.keys() and all(token["special"] for token in added):
            split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            return _tiktoken(_ranks(vocab), special, split)
    listed = {token["id"]: token for token in added}
    listed |= {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
    return Library(file.read_text("utf-8"), listed)


def _from_model(data: bytes) -> Tiktoken:
    """Llama 3's tokenizer.model (a base64 token and its rank per line), with 3.1's additions."""
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        what = "tokenizer.model is not Llama 3's; for a sentencepiece one give tokenizer.json"
        raise ValueError(what) from error
    names = """
        begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
        finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image
    """.split()
    names += [f"reserved_special_token_{i}" for i in range(2, 246)]  # 256 in all
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    return _tiktoken(ranks, special, LLAMA3)


def _ranks(vocab: dict[str, int]) -> dict[bytes, int]:
    return {bytes(map(BYTES.__getitem__, token)): id for token, id in vocab.items()}


def _tiktoken(ranks: dict[bytes, int], special: dict[str, int], split: str) -> Tiktoken:
    encoding = tiktoken.Encoding(
        "bpe", pat_str=split, mergeable_ranks=ranks, special_tokens=special
    )
    return Tiktoken(encoding, special)


def _pieces(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the pieces of a token's bytes after all merges of a lower rank than its own."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    own = ranks[token]
    while True:
        pairs = [ranks.get(a + b, own) for a, b in pairwise(pieces)]
        if not pairs or (best := min(pairs)) >= own:
            return pieces
        at = pairs.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def _byte_level(vocab: dict, merges: list, split: str, whole: bool) -> tokenizers.Tokenizer:
    """Return byte-level BPE. whole: a piece that is a token becomes it even without merges."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=whole))
    pre = tokenizers.pre_tokenizers
    to_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(split), "isolated"), to_bytes])
    engine.decoder = tokenizers.decoders.ByteLevel()
    return engine


def _sentencepiece(
    vocab: dict[str, int], types: list[int], scores: list[float], blank: bool
) -> tokenizers.Tokenizer:
    """sentencepiece's BPE joins the neighbours whose union scores best, however they came about.

    So the merges are, for each token, all pairs that make it, best score first. blank: put a blank
    before each stretch of text between special tokens, as llama.cpp and most Llama 2 files do.
    """
    normal = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    merges = sorted(
        (-scores[id], normal[token[:at]], normal[token[at:]], token[:at], token[at:])
        for token, id in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    )
    model = tokenizers.models.BPE(
        vocab,
        [merge[3:] for merge in merges],
        fuse_unk=True,
        byte_fallback=BYTE in types,
        unk_token=next((token for token, id in vocab.items() if types[id] == UNKNOWN), None),
    )
    engine = tokenizers.Tokenizer(model)
    n, d = tokenizers.normalizers, tokenizers.decoders
    engine.normalizer = n.Sequence([n.Prepend("▁")] * blank + [n.Replace(" ", "▁")])
    after = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse()]
    engine.decoder = d.Sequence(after + [d.Strip(" ", 1, 0)] * blank)
    return engine


def _content(
    engine: tokenizers.Tokenizer, added: Collection[str], plain: Collection[str] = ()
) -> str:
    """The tokenizer.json of an engine with these tokens added; those in `plain` are not special."""
    engine.add_tokens(
        [tokenizers.AddedToken(t, special=t not in plain, normalized=False) for t in added]
    )
    return engine.to_str()
