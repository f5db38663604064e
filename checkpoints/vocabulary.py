"""Vocabularies: of a Hugging Face folder, of a GGUF file or learned; to a `Tokenizer`, and to JSON.

tokenizers takes any of them. tiktoken has one number for a token's id and its merge priority, and
merges any two pieces whose union is a token, where the others merge listed pairs in listed order.
Both give the same ids on every text if the list is in id order and its merges make every token from
the token's own bytes: where pieces of a text meet whose union is a token, they are then the listed
pair, since what stands around them has not changed what became of them. `_fast` checks both.

A byte the vocabulary lacks gets an id past it, since tiktoken needs all 256. SmolLM2 lacks 21, met
by only six control characters and far planes of Unicode. The model has neither embedding nor logit
for such an id: it is never emitted and must not be fed.

Sources: docs/gguf.md of ggml-org/ggml, the pre-tokenizers and the sentencepiece merges of
ggml-org/llama.cpp, the tokenizer of meta-llama/llama-models.
"""

import base64
import json
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import tiktoken
import tokenizers

from checkpoints.files import only, read_json
from checkpoints.tokenizer import BYTES, Library, Tiktoken, Tokenizer

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
SPLITS |= dict.fromkeys(["llama-bpe", "llama3", "llama-v3"], LLAMA3)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # GGUF's token types


def from_folder(folder: Path, config: dict, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None if it has none. config: its config.json.

    Its answers end at the eos_token_id of config.json and of generation_config.json; if neither has
    one, at tokenizer_config.json's eos_token. ValueError if a file is damaged or contradicts.
    """
    settings = read_json(folder / "special_tokens_map.json")
    settings |= read_json(folder / "tokenizer_config.json")
    where = folder / "tokenizer_config.json"  # of the template, which may refuse later
    if (folder / "chat_template.jinja").is_file():
        where = folder / "chat_template.jinja"
        settings["chat_template"] = where.read_text("utf-8")
    # tokenizer.json first: it states the split and the special tokens, as the other does not
    engine: Library | Tiktoken
    if (folder / "tokenizer.json").is_file():
        file = folder / "tokenizer.json"
        engine = _from_json(read_json(file), file.read_text("utf-8"), settings, vocab_size)
    elif (folder / "tokenizer.model").is_file():
        engine = _from_model((folder / "tokenizer.model").read_bytes(), vocab_size)
        settings = {"bos_token": "<|begin_of_text|>", "add_bos_token": True} | settings
    else:
        return None
    stop, generation = [], read_json(folder / "generation_config.json")
    for name, said in (("config.json", config), ("generation_config.json", generation)):
        ends = said.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(isinstance(id, int) and id >= 0 for id in ends):
            raise ValueError(f"{name}: eos_token_id must be a token id or several, got {ends}")
        stop += ends
    return Tokenizer(engine, settings, stop, str(where))


def from_gguf(meta: dict, vocab_size: int, where: str = "") -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, None if it has none. ValueError if unsupported."""
    if "tokenizer.ggml.model" not in meta:
        return None
    own = {key.removeprefix("tokenizer.").removeprefix("ggml."): meta[key] for key in meta}
    kind = own["model"]
    only("tokenizer.ggml.model", kind, "gpt2", "llama")
    if kind == "gpt2":
        only("tokenizer.ggml.pre", own.get("pre"), *SPLITS)
        own = {"add_bos_token": SPLITS[own["pre"]] == LLAMA3} | own
    else:
        own = {"add_bos_token": True, "bos_token_id": 1, "eos_token_id": 2} | own
    for key in ("tokens", "token_type", "merges" if kind == "gpt2" else "scores"):
        if not isinstance(own.get(key), list):
            raise ValueError(f"tokenizer.ggml.{key} is missing, or no list")
        count, tokens = len(own[key]), own["tokens"]
        if key != "merges" and count != len(tokens):
            raise ValueError(f"tokenizer.ggml.{key} has {count} entries, tokens {len(tokens)}")
    types, vocab = own["token_type"], {token: id for id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice")
    normal = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    named = {token: id for token, id in vocab.items() if types[id] not in (NORMAL, BYTE)}
    plain = {token for token, id in named.items() if types[id] == USER}
    engine: Library | Tiktoken | None = None
    if kind == "gpt2":
        split, merges = SPLITS[own["pre"]], [tuple(merge.split(" ")) for merge in own["merges"]]
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= normal.keys():
                what = f"tokenizer.ggml.merges has {' '.join(pair)!r}"
                raise ValueError(f"{what}, of tokens that are not there")
        engine = _fast(normal, merges, named, split, vocab_size, split == LLAMA3, plain)
        if engine is None:
            slow = _byte_level(vocab, merges, split, split == LLAMA3)
    else:
        slow = _sentencepiece(own, vocab, normal)
    engine = engine or Library(_content(slow, named, plain))
    settings = {key: own.get(key) for key in ("add_bos_token", "chat_template")}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
        id = own.get(f"{key}_token_id")
        if id is not None and 0 <= id < len(tokens):
            settings[f"{name}_token"] = tokens[id]
    ends = [f"{key}_token_id" for key in ("eos", "eot", "eom")]
    return Tokenizer(engine, settings, [own[key] for key in ends if key in own], where)


def learn(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909) of at most vocab_size tokens, the last of them END."""
    engine = _byte_level({}, [], SMOLLM, True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(BYTES), show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    engine.add_special_tokens([END])
    text, settings = engine.to_str(), {"eos_token": END, "engine": "tiktoken"}
    made = _from_json(json.loads(text), text, settings, engine.get_vocab_size())
    return Tokenizer(made, settings)


def to_files(tokenizer: Tokenizer, vocab_size: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, for the same ids here and in transformers."""
    # without this line transformers would rebuild a Llama-2 tokenizer around the vocabulary
    settings = tokenizer.settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    engine = tokenizer.engine
    if isinstance(engine, Library):
        content = engine.content
    else:
        held = sorted(engine.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        ranks = {token: id for token, id in held if id < vocab_size}
        written = {token: "".join(_CHARS[b] for b in token) for token in ranks}
        vocab = {written[token]: id for token, id in ranks.items()} | engine.named
        made = [_pieces(token, ranks) for token in ranks]
        merges = [(written[pair[0]], written[pair[1]]) for pair in made if len(pair) == 2]
        slow = _byte_level(vocab, merges, engine.encoding._pat_str, True)
        content = _content(slow, engine.named, engine.plain)
        settings["engine"] = "tiktoken"
    if tokenizer.bos and not engine.opening:  # transformers has it from here alone
        bos = tokenizer.names["bos_token"]
        framed = tokenizers.Tokenizer.from_str(content)
        framed.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, *tokenizer.bos)]
        )
        content = framed.to_str()
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=1)}


def _from_json(content: dict, text: str, settings: dict, vocab_size: int) -> Library | Tiktoken:
    """Checked is what the library would take without a word, or refuse in words of its own."""
    model, added = content.get("model"), content.get("added_tokens") or ()
    if not isinstance(model, dict):
        raise ValueError("tokenizer.json has no model")
    only("tokenizer.json: model", model.get("type", "BPE"), "BPE")
    if not isinstance(model.get("vocab"), dict):
        raise ValueError("tokenizer.json: the model has no vocab")
    named = {token["content"]: token["id"] for token in added}
    ids = model["vocab"] | named
    if len(set(ids.values())) < len(ids):
        raise ValueError("tokenizer.json: two tokens share an id")
    fast = None
    if settings.get("engine") == "tiktoken":  # it is of `_byte_level`, as `to_files` writes it
        merges, whole = model["merges"], model["ignore_merges"]
        split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        plain = {token["content"] for token in added if not token["special"]}
        vocab = {token: id for token, id in ids.items() if token not in named}
        fast = _fast(vocab, merges, named, split, vocab_size, whole, plain)
    listed = {token["id"]: token for token in added}
    listed |= {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
    return fast or Library(text, listed)


def _fast(
    vocab: dict[str, int], merges: list, named: dict[str, int], split: str, vocab_size: int,
    ignore_merges: bool, plain: Collection[str] = (),
) -> Tiktoken | None:  # fmt: skip
    """The byte-level BPE of these tokens (in GPT-2's spelling); None if tiktoken would differ.

    ignore_merges: a piece that is a token is taken whole even if no merges lead to it.
    """
    order = [vocab.get("".join(pair), -1) for pair in merges]
    if order != sorted(order) or -1 in order[:1] or not set().union(*vocab) <= BYTES.keys():
        return None
    ranks = {bytes(map(BYTES.__getitem__, token)): id for token, id in vocab.items()}
    model = tokenizers.models.BPE(vocab, list(map(tuple, merges)))
    for token, (spelling, id) in zip(ranks, vocab.items()):
        if [made.id for made in model.tokenize(spelling)] != [id]:
            if not ignore_merges or len(_pieces(token, ranks)) <= 2:
                return None
    return _tiktoken(ranks, named, plain, split, vocab_size)


def _tiktoken(ranks: dict, named: dict, plain: Collection, split: str, vocab_size: int) -> Tiktoken:
    past = max([vocab_size - 1, *ranks.values(), *named.values()]) + 1
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks = ranks | {byte: past + i for i, byte in enumerate(missing)}
    encoding = tiktoken.Encoding("bpe", pat_str=split, mergeable_ranks=ranks, special_tokens=named)
    return Tiktoken(encoding, named, plain)


def _from_model(data: bytes, vocab_size: int) -> Tiktoken:
    """Llama 3's tokenizer.model, a base64 token and its rank a line, and what 3.1 adds to it."""
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("ranks must count up from 0")
    except ValueError as error:
        what = "tokenizer.model is not Llama 3's; for a sentencepiece one give tokenizer.json"
        raise ValueError(what) from error
    names = """
        begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
        finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image
    """.split()
    names += [f"reserved_special_token_{i}" for i in range(2, 246)]  # 256 in all
    named = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    return _tiktoken(ranks, named, (), LLAMA3, vocab_size)


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


def _byte_level(vocab: dict, merges: list, split: str, whole: bool) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=whole))
    pre = tokenizers.pre_tokenizers
    to_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(split), "isolated"), to_bytes])
    engine.decoder = tokenizers.decoders.ByteLevel()
    return engine


def _sentencepiece(own: dict, vocab: dict, normal: dict[str, int]) -> tokenizers.Tokenizer:
    """sentencepiece's BPE joins the neighbours whose union scores best, however they came about.

    As a list: for each token all pairs that make it, best score first. Each stretch of text between
    special tokens begins with a blank, as llama.cpp has it and most files of Llama 2 do.
    """
    types, scores = own["token_type"], own["scores"]
    merges = sorted(
        (-scores[id], normal[token[:at]], normal[token[at:]], token[:at], token[at:])
        for token, id in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    )
    model = tokenizers.models.BPE(
        vocab, [merge[3:] for merge in merges], fuse_unk=True, byte_fallback=BYTE in types,
        unk_token=next((token for token, id in vocab.items() if types[id] == UNKNOWN), None),
    )  # fmt: skip
    engine, blank = tokenizers.Tokenizer(model), bool(own.get("add_space_prefix", True))
    n, d = tokenizers.normalizers, tokenizers.decoders
    engine.normalizer = n.Sequence([n.Prepend("▁")] * blank + [n.Replace(" ", "▁")])
    after = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse()]
    engine.decoder = d.Sequence(after + [d.Strip(" ", 1, 0)] * blank)
    return engine


def _content(engine: tokenizers.Tokenizer, named: dict[str, int], plain: Collection[str]) -> str:
    """The tokenizer.json of an engine to which these tokens are added."""
    added = [tokenizers.AddedToken(t, special=t not in plain, normalized=False) for t in named]
    engine.add_tokens(added)
    return engine.to_str()
