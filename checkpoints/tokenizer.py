"""A checkpoint's own vocabulary around a `tiktoken.Encoding`; chat format, end of an answer.

tiktoken has one number for a token's id and its merge priority, and merges any two pieces whose union is
a token; Hugging Face and llama.cpp merge listed pairs in listed order. Both give the same ids on every
text if the list is in id order and every token, built from its bytes by the merges below it, ends in a
listed pair. `build` checks both and refuses what fails.

A byte the vocabulary lacks gets an id from vocab_size up, since tiktoken needs all 256. SmolLM2 lacks 21:
0x04 06 13 14 16 1D C0 C1 F1 F2 F5-FF, so only six control characters and far planes of Unicode meet
them. The model has neither embedding nor logit for such an id: it is never emitted and must not be fed.

Sources: docs/gguf.md of ggml-org/ggml and the pre-tokenizers of ggml-org/llama.cpp; the tokenizer and
chat format of meta-llama/llama-models; SmolLM2's chat template.
"""

import base64
import heapq
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import tiktoken

END = "<|endoftext|>"  # what a learned vocabulary has between documents
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # SmolLM2's own default
STOPS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", END)

# How text is cut into pieces before any merge. Each pattern matches every character: none is lost.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's after each digit was cut out: a digit ends the text for what stands before it, so white space
# there stays whole, where GPT-2 would leave its last space to the next word
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back, whatever library does it.

    stop: ids that end an answer. special: the ids of the special tokens. n_vocab: one more than the largest id.
    """

    def __init__(self, engine: tiktoken.Encoding):
        self.engine = engine
        self.special = dict(engine._special_tokens)
        self.stop = tuple(self.special[s] for s in STOPS if s in self.special)
        self.n_vocab = engine.n_vocab

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are never read out of it."""
        return self.engine.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.engine.decode(ids)

    def spell(self, id: int) -> bytes:
        """The bytes of one token, maybe a part of a character."""
        return self.engine.decode_single_token_bytes(id)

    def chat(self, turns: list[str]) -> list[int]:
        """Token ids of a conversation (user, assistant, user, ...), ready for the assistant's answer.

        ChatML with SmolLM2's system message if the tokenizer has <|im_start|>, Llama 3's format if it has
        <|start_header_id|>, else the plain turns, a newline between them. Turns are never read as special
        tokens, so a user cannot forge an end of turn. Raises ValueError if the last turn is not the user's.
        """
        if len(turns) % 2 == 0:
            raise ValueError(f"a conversation must end with the user's turn, got {len(turns)} turns")
        special, text = self.special, self.encode
        messages = [("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]
        if "<|im_start|>" in special:
            start, end = special["<|im_start|>"], special["<|im_end|>"]
            ids = []
            for role, turn in [("system", SYSTEM), *messages]:
                ids += [start, *text(f"{role}\n{turn}"), end, *text("\n")]
            return [*ids, start, *text("assistant\n")]
        if "<|start_header_id|>" in special:
            start, end, eot = (special[s] for s in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
            ids = [special["<|begin_of_text|>"]]
            for role, turn in messages:
                ids += [start, *text(role), end, *text(f"\n\n{turn.strip()}"), eot]
            return [*ids, start, *text("assistant"), end, *text("\n\n")]
        return text("\n".join(turns))


def from_gguf(meta: dict, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, None if there is none. Raises ValueError if unsupported."""
    if "tokenizer.ggml.model" not in meta:
        return None
    if (kind := meta["tokenizer.ggml.model"]) != "gpt2":
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' (byte-level BPE)")
    splits = {"smollm": SMOLLM, "llama-bpe": LLAMA3, "gpt-2": GPT2}
    if (pre := meta.get("tokenizer.ggml.pre")) not in splits:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported, only {', '.join(splits)}")
    if absent := [k for k in ("tokens", "token_type", "merges") if f"tokenizer.ggml.{k}" not in meta]:
        raise ValueError(f"tokenizer.ggml.{absent[0]} is missing")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == 1}
    special = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind != 1}  # control, user-defined, unused
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    return Tokenizer(build(vocab, merges, special, splits[pre], vocab_size, ignore_merges=pre == "llama-bpe"))


def from_folder(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None if there is none. Raises ValueError if unsupported."""
    # tokenizer.json first: it states the split and the special tokens, which tokenizer.model leaves to code
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(_from_json(read_json(folder / "tokenizer.json"), vocab_size))
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(_from_tiktoken((folder / "tokenizer.model").read_bytes(), vocab_size))
    return None


def to_json(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """The tokenizer as the content of a Hugging Face tokenizer.json that gives the same ids."""
    ranks = {token: i for token, i in tokenizer.engine._mergeable_ranks.items() if i < vocab_size}
    merges = [_pieces(token, ranks) for token in sorted(ranks, key=ranks.__getitem__)]
    special = tokenizer.special
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.engine._pat_str}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, "special": True, **flags} for t, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token is taken whole, as tiktoken does
            "vocab": {_written(token): i for token, i in ranks.items()} | special,
            "merges": [[_written(piece) for piece in pair] for pair in merges if len(pair) == 2],
        },
    }


def build(
    vocab: dict[str, int],
    merges: list[tuple[str, ...]],
    special: dict[str, int],
    split: str,
    vocab_size: int,
    ignore_merges: bool,
) -> tiktoken.Encoding:
    """The byte-level BPE with these tokens (in GPT-2's spelling) and merges, ids 0..vocab_size-1.

    ignore_merges: a piece that is a token is taken whole even if no merges lead to it. Raises ValueError
    where tiktoken would give other ids than the merge list.
    """
    if odd := [token for token in vocab if not set(token) <= BYTES.keys()]:
        raise ValueError(f"token {odd[0]!r} is not spelled in bytes")
    ranks = {bytes(BYTES[c] for c in token): i for token, i in vocab.items()}
    listed = {tuple(bytes(BYTES.get(c, 32) for c in part) for part in pair) for pair in merges}
    order = [vocab.get("".join(pair), -1) for pair in merges]
    if order != sorted(order) or -1 in order:
        raise ValueError("the merges are not in the order of their tokens' ids, which tiktoken cannot express")
    for token in ranks:
        pieces = _pieces(token, ranks)
        if len(pieces) == 2 and tuple(pieces) not in listed or len(pieces) > 2 and not ignore_merges:
            raise ValueError(f"no merge makes token {_written(token)!r}, but tiktoken would")
    return _encoding(ranks, special, split, vocab_size)


def _encoding(ranks: dict[bytes, int], special: dict[str, int], split: str, vocab_size: int) -> tiktoken.Encoding:
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids):
        raise ValueError("two tokens of the tokenizer share an id")
    if beyond := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"the tokenizer has token {beyond[0]}, the model's vocabulary ends at {vocab_size - 1}")
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks = ranks | {byte: vocab_size + i for i, byte in enumerate(missing)}
    return tiktoken.Encoding("checkpoint", pat_str=split, mergeable_ranks=ranks, special_tokens=special)


def learn_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909): 256 bytes, then the commonest neighbours merged again and again, then END."""
    # SMOLLM's pieces as Python's own re can say them; where the two differ, only counts do
    split = re.compile(r"\d|'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    pieces = Counter(piece for text in texts for piece in split.findall(text))
    words, counts = [[bytes([b]) for b in piece.encode()] for piece in pieces], list(pieces.values())
    pairs: Counter = Counter()  # how often each pair of neighbours occurs
    where: dict[tuple, set[int]] = defaultdict(set)  # and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    ranks = {bytes([b]): b for b in range(256)}
    while heap and len(ranks) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # an old count: the pair's present one is on the heap too
            continue
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        changed = set()
        for i in where.pop(pair):
            old, words[i] = words[i], _merged(words[i], pair)
            for neighbours in zip(old, old[1:]):
                pairs[neighbours] -= counts[i]
                changed.add(neighbours)
            for neighbours in zip(words[i], words[i][1:]):
                pairs[neighbours] += counts[i]
                where[neighbours].add(i)
                changed.add(neighbours)
        for neighbours in changed - {pair}:
            if pairs[neighbours] > 0:
                heapq.heappush(heap, (-pairs[neighbours], neighbours))
    special = {END: len(ranks)}
    return Tokenizer(tiktoken.Encoding("trained", pat_str=SMOLLM, mergeable_ranks=ranks, special_tokens=special))


# ---- the three formats ---------------------------------------------------------------------------------


def _from_json(t: dict, vocab_size: int) -> tiktoken.Encoding:
    model = t.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer.json: model {model.get('type')!r} is not supported, only 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"tokenizer.json: {key} {model[key]!r} is not supported")
    if t.get("normalizer") is not None:
        raise ValueError(f"tokenizer.json: normalizer {t['normalizer'].get('type')!r} is not supported")
    special = {a["content"]: a["id"] for a in t.get("added_tokens", [])}
    vocab = {token: i for token, i in model.get("vocab", {}).items() if token not in special}
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", [])]
    return build(vocab, merges, special, _split(t.get("pre_tokenizer")), vocab_size, model.get("ignore_merges", False))


def _split(pre: dict | None) -> str:
    """The one pattern that cuts text as tokenizer.json's pre_tokenizer does."""
    steps = (pre or {}).get("pretokenizers", [pre or {}])
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]  # offsets are not used here
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    steps[-1].setdefault("use_regex", True)  # older files leave it out
    if steps == [gpt2]:
        return GPT2
    if steps == [{"type": "Digits", "individual_digits": True}, gpt2]:
        return SMOLLM
    regex = steps[0].get("pattern", {}).get("Regex")
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    if regex is None or steps != [split, {**gpt2, "use_regex": False}]:
        raise ValueError(f"tokenizer.json: pre_tokenizer {pre} is not supported")
    if regex in (GPT2, SMOLLM, LLAMA3) or "(?<gap>" in regex:
        return regex
    # what the pattern leaves out is a piece of its own, which tiktoken would drop
    return rf"(?:{regex})|(?<gap>(?:(?!{regex})[\s\S])+)"


def _from_tiktoken(data: bytes, vocab_size: int) -> tiktoken.Encoding:
    """Llama 3's tokenizer.model, a base64 token and its rank a line; the special tokens follow, named as since 3.1."""
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError("tokenizer.model is not Llama 3's; a sentencepiece model is not supported") from error
    named = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id
        step_id start_header_id end_header_id eom_id eot_id python_tag image""".split()
    named += [f"reserved_special_token_{i}" for i in range(2, 258 - len(named))]  # 256 in all
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(named)}
    return _encoding(ranks, special, LLAMA3, vocab_size)


# ---- bytes and merges ----------------------------------------------------------------------------------

# GPT-2's spelling of bytes as visible characters: printable Latin-1 as it is, the others from U+0100 up
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTES = {chr(b): b for b in _PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_CHARS = {b: c for c, b in BYTES.items()}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


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


def _merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    new: list[bytes] = []
    for part in word:
        if new and (new[-1], part) == pair:
            new[-1] = pair[0] + pair[1]
        else:
            new.append(part)
    return new
