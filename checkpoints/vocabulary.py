"""Vocabularies: from a Hugging Face folder, a GGUF file's metadata or a text corpus to a
`Tokenizer`, and to JSON.

tokenizers takes any of them. tiktoken has one number for a token's id and its merge priority, and
merges any two pieces whose union is a token, where the others merge listed pairs in listed order.
Both give the same ids on every text if the list is in id order and its merges make every token from
the token's own bytes: where pieces of a text meet whose union is a token, they are then the listed
pair, since what stands around them has not changed what became of them. `_fast` checks both.

A byte the vocabulary lacks gets an id past it, since tiktoken needs all 256. SmolLM2 lacks 21: 0x04
06 13 14 16 1D C0 C1 F1 F2 F5-FF, so only six control characters and far planes of Unicode meet
them. The model has neither embedding nor logit for such an id: it is never emitted and must not be
fed.

Sources: docs/gguf.md of ggml-org/ggml, the pre-tokenizers and the sentencepiece merges of
ggml-org/llama.cpp, the tokenizer of meta-llama/llama-models.
"""

import base64
import json
from itertools import pairwise
from pathlib import Path

import tiktoken
import tokenizers

from checkpoints.tokenizer import BYTES, Library, Tiktoken, Tokenizer, spelled

END = "<|endoftext|>"  # what a learned vocabulary has between documents
_CHARS = {b: c for c, b in BYTES.items()}

# How text is cut into pieces before any merge. Each pattern matches every character: none is lost.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's after each digit was cut out: a digit ends the text for what stands before it, so white
# space there stays whole, where GPT-2 would leave its last space to the next word
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"smollm": SMOLLM, "gpt-2": GPT2}
SPLITS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3)
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # GGUF's token types


def from_folder(folder: Path, config: dict, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None if it has none. config: its config.json.

    Its answers end at the eos_token_id of config.json and of generation_config.json; if neither has
    one, at tokenizer_config.json's eos_token. Raises ValueError if a file is damaged or
    contradicts.
    """
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(folder / name) if (folder / name).is_file() else {}
    where = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        where = folder / "chat_template.jinja"
        settings["chat_template"] = where.read_text("utf-8")
    # tokenizer.json first: it states the split and the special tokens, as the other does not
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        _check_json(content)
        engine: Library | Tiktoken | None = None
        if settings.get("engine") == "tiktoken":  # `save` wrote it
            engine = _from_byte_level(content, vocab_size)
        extra = {int(id): flags for id, flags in settings.get("added_tokens_decoder", {}).items()}
        engine = engine or Library((folder / "tokenizer.json").read_text("utf-8"), extra)
        for token in content.get("added_tokens") or ():
            if engine.id_of(token["content"]) != token["id"]:
                raise ValueError(
                    f"tokenizer.json: {token['content']!r} cannot have id {token['id']}"
                )
    elif (folder / "tokenizer.model").is_file():
        engine = _from_model((folder / "tokenizer.model").read_bytes(), vocab_size)
        settings = {"bos_token": "<|begin_of_text|>", "add_bos_token": True} | settings
    else:
        return None
    stop = _ends(config, "config.json")
    if (folder / "generation_config.json").is_file():
        stop |= _ends(read_json(folder / "generation_config.json"), "generation_config.json")
    last = engine.id_of(spelled(settings.get("eos_token")))
    if not stop and last is not None:
        stop = {last: None}
    return Tokenizer(engine, settings, tuple(stop), str(where))


def from_gguf(meta: dict, vocab_size: int, where: str = "") -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, None if there is none. Raises ValueError if
    unsupported.
    """
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    if "tokenizer.ggml.model" not in meta:
        return None
    kind, pre = own["model"], own.get("pre", "")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' and 'llama'")
    if kind == "gpt2" and pre not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported, only {', '.join(SPLITS)}")
    lists = ["tokens", "token_type", "merges" if kind == "gpt2" else "scores"]
    for key in lists:
        if not isinstance(own.get(key), list):
            raise ValueError(f"tokenizer.ggml.{key} is missing, or no list")
        if key != "merges" and len(own[key]) != len(own["tokens"]):
            raise ValueError(
                f"tokenizer.ggml.{key} has {len(own[key])} entries, tokens {len(own['tokens'])}"
            )
    tokens = own["tokens"]
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice")
    if kind == "gpt2":
        engine = _byte_level_gguf(own, vocab, vocab_size)
    else:
        engine = Library(_sentencepiece(own, vocab))
    settings = {"add_bos_token": own.get("add_bos_token", kind == "llama" or SPLITS[pre] == LLAMA3)}
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
    ):
        id = own.get(key, {"bos_token": 1, "eos_token": 2}.get(name) if kind == "llama" else None)
        if id is not None and 0 <= id < len(tokens):
            settings[name] = tokens[id]
    if "tokenizer.chat_template" in meta:
        settings["chat_template"] = meta["tokenizer.chat_template"]
    stop = {
        own[key]: None for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in own
    }
    return Tokenizer(engine, settings, tuple(stop), where)


def learn(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909) of at most vocab_size tokens, the last of them END."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(SMOLLM), behavior="isolated")
    engine.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    model = json.loads(engine.to_str())["model"]
    vocab, merges, named = model["vocab"], model["merges"], {END: len(model["vocab"])}
    fast = _fast(vocab, merges, named, SMOLLM, len(vocab) + 1, True)
    content = _byte_level(vocab, merges, named, frozenset(), SMOLLM, True)
    return Tokenizer(fast or Library(content), {"eos_token": END}, (named[END],))


def to_files(tokenizer: Tokenizer, vocab_size: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, for the same ids here and in transformers."""
    engine, settings = tokenizer.engine, dict(tokenizer.settings)
    # without this line transformers would rebuild a Llama-2 tokenizer around the vocabulary
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(engine, Library):
        content = engine.content
    else:
        ranks = {
            token: i for token, i in engine.encoding._mergeable_ranks.items() if i < vocab_size
        }
        vocab = {_written(token): i for token, i in ranks.items()}
        made = (_pieces(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
        merges = [[_written(piece) for piece in pair] for pair in made if len(pair) == 2]
        content = _byte_level(
            vocab, merges, engine.named, engine.plain, engine.encoding._pat_str, True
        )
        settings["engine"] = "tiktoken"
    if tokenizer.bos and not engine.opening():  # transformers has it from here alone
        content = json.dumps(
            json.loads(content) | {"post_processor": _opened(settings, tokenizer.bos)}
        )
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=1)}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _ends(config: dict, name: str) -> dict[int, None]:
    """The eos_token_id of a configuration, one or several, in the order it names them."""
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(id, int) and id >= 0 for id in ids):
        raise ValueError(f"{name}: eos_token_id must be a token id or a list of them, got {ids}")
    return dict.fromkeys(ids)


# ---- byte-level BPE ------------------------------------------------------------------------------


def _byte_level_gguf(own: dict, vocab: dict[str, int], vocab_size: int) -> Library | Tiktoken:
    types = own["token_type"]
    named = {token: id for token, id in vocab.items() if types[id] != NORMAL}
    plain = frozenset(token for token, id in named.items() if types[id] == USER)
    ordinary = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    merges = [merge.split(" ") for merge in own["merges"]]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= ordinary.keys():
            raise ValueError(
                f"tokenizer.ggml.merges has {' '.join(merge)!r}, of tokens that are not there"
            )
    split = SPLITS[own["pre"]]
    whole_pieces = split == LLAMA3
    fast = _fast(ordinary, merges, named, split, vocab_size, whole_pieces, plain)
    return fast or Library(_byte_level(ordinary, merges, named, plain, split, whole_pieces))


def _from_byte_level(content: dict, vocab_size: int) -> Tiktoken | None:
    """What `to_files` wrote of a `Tiktoken`."""
    model, added = content["model"], content["added_tokens"]
    named = {token["content"]: token["id"] for token in added}
    plain = frozenset(token["content"] for token in added if not token["special"])
    vocab = {token: id for token, id in model["vocab"].items() if token not in named}
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return _fast(vocab, model["merges"], named, split, vocab_size, True, plain)


def _fast(
    vocab: dict[str, int], merges: list, named: dict[str, int], split: str, vocab_size: int,
    ignore_merges: bool, plain: frozenset[str] = frozenset(),
) -> Tiktoken | None:  # fmt: skip
    """The byte-level BPE with these tokens (in GPT-2's spelling) and merges; None if tiktoken would
    differ.

    ignore_merges: a piece that is a token is taken whole even if no merges lead to it.
    """
    order = [vocab.get("".join(pair), -1) for pair in merges]
    if order != sorted(order) or -1 in order[:1] or not set().union(*vocab) <= BYTES.keys():
        return None
    ranks = {bytes(map(BYTES.__getitem__, token)): id for token, id in vocab.items()}
    model = tokenizers.models.BPE(vocab, list(map(tuple, merges)))
    for token, (spelling, id) in zip(ranks, vocab.items()):
        made = model.tokenize(spelling)
        if len(made) == 1 and made[0].id == id:
            continue
        if not ignore_merges or len(_pieces(token, ranks)) <= 2:
            return None
    return _tiktoken(ranks, named, plain, split, vocab_size)


def _tiktoken(
    ranks: dict[bytes, int], named: dict, plain: frozenset, split: str, vocab_size: int
) -> Tiktoken:
    ids = [*ranks.values(), *named.values()]
    if len(set(ids)) < len(ids):
        raise ValueError("two tokens of the tokenizer share an id")
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    past = max([vocab_size - 1, *ids]) + 1
    ranks = ranks | {byte: past + i for i, byte in enumerate(missing)}
    encoding = tiktoken.Encoding(
        "checkpoint", pat_str=split, mergeable_ranks=ranks, special_tokens=named
    )
    return Tiktoken(encoding, named, plain)


def _from_model(data: bytes, vocab_size: int) -> Tiktoken:
    """Llama 3's tokenizer.model, a base64 token and its rank a line; the special tokens follow,
    named as since 3.1.
    """
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(
            "tokenizer.model is not Llama 3's; for a sentencepiece one give tokenizer.json"
        ) from error
    names = """
        begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
        finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id
        python_tag image
    """.split()
    names += [f"reserved_special_token_{i}" for i in range(2, 258 - len(names))]  # 256 in all
    named = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    return _tiktoken(ranks, named, frozenset(), LLAMA3, vocab_size)


def _written(token: bytes) -> str:
    return "".join(_CHARS[b] for b in token)


def _pieces(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What token's bytes have become when every merge of a lower rank than its own is done."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    own = ranks[token]
    while True:
        pairs = [ranks.get(a + b, own) for a, b in pairwise(pieces)]
        if not pairs or (best := min(pairs)) >= own:
            return pieces
        at = pairs.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


# ---- the content of a tokenizer.json -------------------------------------------------------------


def _byte_level(vocab, merges, named, plain, split: str, ignore_merges: bool) -> str:
    split_step = {
        "type": "Split",
        "pattern": {"Regex": split},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_step = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    pre = {"type": "Sequence", "pretokenizers": [split_step, bytes_step]}
    model = {"ignore_merges": ignore_merges, "vocab": vocab | named, "merges": merges}
    return _bpe(model, named, plain, pre_tokenizer=pre, decoder=bytes_step)


def _sentencepiece(own: dict, vocab: dict[str, int]) -> str:
    """sentencepiece's BPE joins the neighbours whose union scores best, however they came about.

    As a list: for each token all pairs that make it, best score first. Each stretch of text between
    special tokens begins with a blank, as llama.cpp has it and most files of Llama 2 do.
    """
    types, scores = own["token_type"], own["scores"]
    normal = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    merges = []
    for token, id in normal.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in normal and right in normal:
                merges.append((-scores[id], normal[left], normal[right], [left, right]))
    merges.sort(key=lambda merge: merge[:3])
    unknown = next((token for token, id in vocab.items() if types[id] == UNKNOWN), None)
    named = {token: id for token, id in vocab.items() if types[id] in (UNKNOWN, CONTROL, USER)}
    plain = frozenset(token for token, id in named.items() if types[id] == USER)
    blank = own.get("add_space_prefix", True)
    model = {
        "unk_token": unknown, "fuse_unk": True, "byte_fallback": BYTE in types,
        "vocab": vocab, "merges": [pair for *_, pair in merges],
    }  # fmt: skip
    to_bars = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_blanks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    before = [{"type": "Prepend", "prepend": "▁"}] * blank + [to_bars]
    after = [to_blanks, {"type": "ByteFallback"}, {"type": "Fuse"}]
    after += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * blank
    return _bpe(
        model, named, plain,
        normalizer={"type": "Sequence", "normalizers": before},
        decoder={"type": "Sequence", "decoders": after},
    )  # fmt: skip


def _bpe(model: dict, named: dict[str, int], plain: frozenset[str], **steps) -> str:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_id = sorted(named.items(), key=lambda item: item[1])
    added = [{"id": id, "content": t, "special": t not in plain, **flags} for t, id in by_id]
    content: dict = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
    }
    content |= {"post_processor": None, "decoder": None, **steps, "model": {"type": "BPE", **model}}
    return json.dumps(content, indent=1)


def _opened(settings: dict, ids: list[int]) -> dict:
    bos = spelled(settings.get("bos_token"))
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    token = {bos: {"id": bos, "ids": ids, "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": token}


def _check_json(content: dict) -> None:
    """What the library would take without a word, or refuse in words of its own."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError("tokenizer.json has no model")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"tokenizer.json: model {model['type']!r} is not supported, only 'BPE'")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError("tokenizer.json: the model has no vocab")
    ids = vocab | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    if len(set(ids.values())) < len(ids):
        raise ValueError("tokenizer.json: two tokens share an id")
