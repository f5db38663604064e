"""Text to token ids and back, as a checkpoint's files define it.

Two libraries do the work, behind one interface. `Library` uses Hugging Face's tokenizers, which
reads any vocabulary from a file. `Tiktoken` is byte-level BPE with the library of that name, for
vocabularies that are learned here and for Llama 3's tokenizer.model. `vocabulary` chooses.
"""

import os.path
import re
import secrets
from collections.abc import Iterable
from itertools import groupby

import tiktoken
import tokenizers

from checkpoints.template import Template

# GPT-2 spells bytes as characters: visible Latin-1 ones as they are, the others from U+0100 up
_HIDDEN = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
BYTES = {chr(256 + _HIDDEN.index(b) if b in _HIDDEN else b): b for b in range(256)}
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """special: the ids of the tokens that no text can spell. stop: the ids that end an answer.

    n_vocab: one more than the largest id. template: None if conversations are plain text.
    settings: the content of tokenizer_config.json (or its equivalent in a GGUF file). names: its
    bos_token and the like, without their flags. Made by `load`.
    """

    def __init__(
        self, engine: "Library | Tiktoken", settings: dict,
        stop: Iterable[int] = (), where: str = "",
    ):  # fmt: skip
        self.engine, self.settings, self.n_vocab = engine, settings, engine.n_vocab
        said = {key: t.get("content") if isinstance(t, dict) else t for key, t in settings.items()}
        texts = {key: t for key, t in said.items() if isinstance(t, str) and t}
        self.names = {key: t for key, t in texts.items() if key.endswith("_token")}
        bos, eos = (engine.id_of(self.names.get(key, "")) for key in ("bos_token", "eos_token"))
        added = [bos] if bos is not None and settings.get("add_bos_token") else []
        self.bos = engine.opening or added
        self.stop = tuple(dict.fromkeys(stop)) or (() if eos is None else (eos,))
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {t["name"]: t["template"] for t in source}.get("default")
        self.template = Template(source, where, self.names) if source else None
        # a token that a template writes counts as special, unless it is a word or blanks, since
        # DeepSeek's <｜User｜> is not marked as special
        written = self.template.literals if self.template else ""
        self.special = {
            token: id
            for token, (id, special) in engine.added.items()
            if special or token in written and not token.strip().isalnum() and not token.isspace()
        }
        engine.reserve(self.special)
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, BOS first if the files ask for it. No text spells special tokens."""
        return [*self.bos, *self.engine.ids([text])]

    def decode(self, ids: list[int], after: list[int] | None = None) -> str:
        """The text of these ids. Ids without a token, as in padded vocabularies, add nothing.

        after: the ids that come before, such as an answer's prompt. A sentencepiece vocabulary
        drops the blank that begins a text, but not one that begins a continuation.
        """
        if after is None:
            return self.engine.decode(ids)
        before, whole = self.engine.decode(after), self.engine.decode([*after, *ids])
        return whole[len(os.path.commonprefix([before, whole])) :]

    def spell(self, id: int) -> bytes:
        """The bytes of one token, which may be part of a character, or empty."""
        return self.engine.spell(id)

    def chat(self, turns: list[str]) -> list[int]:
        """Token ids of a conversation (user, assistant, user, ...), ready for the next answer.

        The checkpoint's chat template is used; without one, BOS and the turns, separated by
        newlines. Special tokens are recognised only in the template's own text, so that no turn can
        forge an end of turn. Raises ValueError if the last turn is not the user's, or the template
        refuses.
        """
        if isinstance(turns, str):
            raise ValueError("a conversation is a list of turns, got a text")
        if len(turns) % 2 == 0:
            raise ValueError(f"a conversation ends with the user's turn, got {len(turns)} turns")
        if self.template is None:
            return self.encode("\n".join(turns))
        parts: list[str | int] = []
        for k, piece in enumerate(self.template.cut(turns)):
            if k % 2 == 0:  # the template's own
                parts += [self.special.get(part, part) for part in self._special.split(piece)]
            else:
                parts.append(piece)
        return self.engine.ids(parts)

    @property
    def prompt(self) -> str:
        """In words, how `chat` writes a conversation."""
        plain = "plain text with BOS" if self.bos else "plain text"
        return "chat template of the model" if self.template else plain


class Library:
    """A tokenizer.json, read by tokenizers. Raises ValueError if it is damaged or refused.

    listed: tokens by id that tokenizer.json and tokenizer_config.json add; some are only in the
    second. Tokens that must not be read from a text are made special, and special tokens are not
    recognised. Where one is meant, a random name that no text contains stands for it, with the same
    flags, so that the library cuts and strips around it as around the token.
    """

    def __init__(self, content: str, listed: dict[int, dict] | None = None):
        self.content = content
        try:
            self._engine = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library has no type for this error
            raise ValueError(f"tokenizer.json: {error}") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True
        self.id_of = self._engine.token_to_id
        held = self._engine.get_added_tokens_decoder()
        for id, flags in sorted((listed or {}).items()):
            token = tokenizers.AddedToken(**{k: v for k, v in flags.items() if k in _FLAGS})
            if id not in held and self.id_of(token.content) in (id, None):
                self._engine.add_tokens([token])
            if self.id_of(token.content) != id:
                raise ValueError(f"the tokenizer's {token.content!r} cannot have id {id}")
        self.n_vocab = max(self._engine.get_vocab().values(), default=-1) + 1
        framed = self._engine.encode("a")  # with what the file's post-processor puts before a text
        self.opening = framed.ids[: [*framed.special_tokens_mask, 0].index(0)]
        held = self._engine.get_added_tokens_decoder()
        self.added = {token.content: (id, token.special) for id, token in held.items()}
        self._bytes = "ByteLevel" in str(self._engine.decoder)
        self._unknown = self.id_of(getattr(self._engine.model, "unk_token", None) or "")

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._engine.encode_special_tokens = True  # the library does not copy this

    def reserve(self, special: dict[str, int]) -> None:
        held, tokens = self._engine.get_added_tokens_decoder(), []
        self._names = {id: secrets.token_hex(12) for id in special.values()}
        for id, name in self._names.items():
            token = held[id]
            token.special = True
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "normalized")}
            tokens += [token, tokenizers.AddedToken(name, **flags)]
        self._engine.add_tokens(tokens)
        self._meant = {self.id_of(name): id for id, name in self._names.items()}

    def ids(self, parts: list[str | int]) -> list[int]:
        text = "".join(self._names[p] if isinstance(p, int) else p for p in parts)
        # half a surrogate pair cannot be encoded as bytes
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._engine.encode(text, add_special_tokens=False).ids
        for id in ids:
            if id in self._names and id != self._unknown:
                token = self._engine.id_to_token(id)
                raise ValueError(f"the text spells {token!r} as an ordinary word would be")
        return [self._meant.get(id, id) for id in ids]

    def decode(self, ids: list[int]) -> str:
        known = [id for id in ids if 0 <= id < self.n_vocab]
        return self._engine.decode(known, skip_special_tokens=False)

    def spell(self, id: int) -> bytes:
        token = (self._engine.id_to_token(id) if 0 <= id < self.n_vocab else None) or ""
        if token in self.added:
            return token.encode()
        if self._bytes and set(token) <= BYTES.keys():
            return bytes(BYTES[c] for c in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


class Tiktoken:
    """Byte-level BPE with tiktoken. special: the ids of the tokens that no merges produce."""

    def __init__(self, encoding: tiktoken.Encoding, special: dict[str, int]):
        self.encoding, self.n_vocab, self.id_of = encoding, encoding.n_vocab, special.get
        self.added = {token: (id, True) for token, id in special.items()}
        self.opening: list[int] = []

    def reserve(self, special: dict[str, int]) -> None:
        """All special tokens are reserved already."""

    def ids(self, parts: list[str | int]) -> list[int]:
        ids: list = []
        for kind, run in groupby(parts, type):
            stretch: list = list(run)
            ids += self.encoding.encode_ordinary("".join(stretch)) if kind is str else stretch
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.spell, ids)).decode("utf-8", "replace")

    def spell(self, id: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(id)
        except (KeyError, OverflowError):  # no token has this id
            return b""
