"""Text to token ids and back, as a checkpoint's files say: what begins a text, frames a turn, ends
an answer.

Two libraries do the work behind one face. `Library` is Hugging Face's tokenizers, which defines
tokenizer.json and reads all of it. `Tiktoken` is byte-level BPE in the library of that name, the
faster of the two. `vocabulary` chooses.
"""

import re
import secrets
from typing import Any

import tiktoken
import tokenizers

from checkpoints.template import Template

# GPT-2's spelling of bytes as visible characters: printable Latin-1 as it is, others from U+0100 up
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTES = {chr(b): b for b in _PRINTABLE}
BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class Tokenizer:
    """special: the ids of the tokens that no text can spell. stop: the ids that end an answer.

    n_vocab: one more than the largest id. template: None if a conversation is told as plain text.
    settings: what tokenizer_config.json says (or would, for a GGUF file). Made by `load`.
    """

    def __init__(
        self,
        engine: "Library | Tiktoken",
        settings: dict,
        stop: tuple[int, ...] = (),
        where: str = "",
    ):
        self.engine, self.settings, self.stop, self.n_vocab = engine, settings, stop, engine.n_vocab
        tokens = {key: spelled(token) for key, token in settings.items() if key.endswith("_token")}
        names = {key: token for key, token in tokens.items() if token}
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {t["name"]: t["template"] for t in source}.get("default")
        self.template = Template(source, where, names) if source else None
        # what a template writes itself is as good as special: <｜User｜> of DeepSeek is not marked
        self.special = engine.reserve(self.template.literals if self.template else "")
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        first = engine.id_of(names.get("bos_token", ""))
        added = [first] if settings.get("add_bos_token") and first is not None else []
        self.bos = engine.opening() or added

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, BOS first if the files ask for it. Special tokens are never read out
        of it.
        """
        return [*self.bos, *self.engine.ids([text])]

    def decode(self, ids: list[int]) -> str:
        """The text; an id without a token, as padded vocabularies have them, adds nothing."""
        return self.engine.decode(ids)

    def spell(self, id: int) -> bytes:
        """The bytes of one token: a part of a character, maybe, or none at all."""
        return self.engine.spell(id)

    def chat(self, turns: list[str]) -> list[int]:
        """Token ids of a conversation (user, assistant, user, ...), ready for the assistant's
        answer.

        As the checkpoint's chat template has it; without one, BOS and the turns, a newline between
        them. Special tokens are read only in what the template writes, so that no turn can forge an
        end of turn. Raises ValueError if the last turn is not the user's, or the template refuses.
        """
        if len(turns) % 2 == 0:
            raise ValueError(
                f"a conversation must end with the user's turn, got {len(turns)} turns"
            )
        if self.template is None:
            return self.encode("\n".join(turns))
        parts: list[str | int] = []
        for k, piece in enumerate(self.template.cut([*map(whole, turns)])):
            at = 0
            for match in self._special.finditer(piece) if k % 2 == 0 else ():
                parts += [piece[at : match.start()], self.special[match.group()]]
                at = match.end()
            parts.append(piece[at:])
        return self.engine.ids(parts)

    @property
    def prompt(self) -> str:
        """How `chat` tells a conversation, in words."""
        return (
            "chat template of the model"
            if self.template
            else "plain text" + " with BOS" * bool(self.bos)
        )


class Library:
    """A tokenizer.json, by tokenizers. Raises ValueError if it is damaged, or the library refuses
    it.

    extra: tokens that only tokenizer_config.json lists, by id. What must not be read out of a text
    is made special, and special tokens are off; where one is meant, a name that no text can hold
    stands for it, with the same flags, so that the library cuts and strips around it as it would.
    """

    def __init__(self, content: str, extra: dict[int, dict] | None = None):
        self.content = content
        try:
            self._engine = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library has no type of its own for it
            raise ValueError(f"tokenizer.json: {error}") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True
        held = self._engine.get_added_tokens_decoder()
        for id, flags in sorted((extra or {}).items()):
            token = tokenizers.AddedToken(**{k: v for k, v in flags.items() if k in _FLAGS})
            if id not in held and self._engine.token_to_id(token.content) in (id, None):
                self._engine.add_tokens([token])
            if self._engine.token_to_id(token.content) != id:
                raise ValueError(f"tokenizer_config.json: {token.content!r} cannot have id {id}")
        self.n_vocab = max(self._engine.get_vocab().values(), default=-1) + 1
        self._added = set(self._engine.get_added_tokens_decoder())
        self._bytes = "ByteLevel" in str(self._engine.decoder)
        self._unknown = self._engine.token_to_id(
            getattr(self._engine.model, "unk_token", None) or ""
        )
        self._names: dict[int, str] = {}  # by the id of a reserved token
        self._meant: dict[int, int] = {}  # the id a name has in the library: that of its token

    def reserve(self, written: str) -> dict[str, int]:
        added = self._engine.get_added_tokens_decoder()
        chosen = {id: t for id, t in added.items() if t.special or marks(t.content, written)}
        for token in chosen.values():
            token.special = True
        self._engine.add_special_tokens(list(chosen.values()))
        for id, token in chosen.items():
            self._names[id] = secrets.token_hex(12)
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "normalized")}
            name = tokenizers.AddedToken(self._names[id], single_word=False, special=False, **flags)
            self._engine.add_tokens([name])
            self._meant[self._engine.token_to_id(self._names[id]) or 0] = id
        return {token.content: id for id, token in chosen.items()}

    def opening(self) -> list[int]:
        """What the file's post-processor puts before a text."""
        framed = self._engine.encode("a")
        return framed.ids[: [*framed.special_tokens_mask, 0].index(0)]

    def id_of(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def ids(self, parts: list[str | int]) -> list[int]:
        text = "".join(self._names[p] if isinstance(p, int) else whole(p) for p in parts)
        ids = self._engine.encode(text, add_special_tokens=False).ids
        for id in ids:
            if id in self._names and id != self._unknown:
                raise ValueError(
                    f"the text spells {self._engine.id_to_token(id)!r} as an ordinary word would be"
                )
        return [self._meant.get(id, id) for id in ids]

    def decode(self, ids: list[int]) -> str:
        return self._engine.decode(
            [i for i in ids if 0 <= i < self.n_vocab], skip_special_tokens=False
        )

    def spell(self, id: int) -> bytes:
        token = self._engine.id_to_token(id) if 0 <= id < self.n_vocab else None
        if token is None or id in self._added:
            return (token or "").encode()
        if self._bytes and set(token) <= BYTES.keys():
            return bytes(BYTES[c] for c in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


class Tiktoken:
    """Byte-level BPE, by tiktoken. named: the tokens that merges do not make, and their ids.

    Of these the text may spell those in `plain`.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        named: dict[str, int],
        plain: frozenset[str] = frozenset(),
    ):
        self.encoding, self.named, self.plain = encoding, named, plain
        self.n_vocab = encoding.n_vocab

    def reserve(self, written: str) -> dict[str, int]:
        self.plain = frozenset(token for token in self.plain if not marks(token, written))
        return {token: id for token, id in self.named.items() if token not in self.plain}

    def opening(self) -> list[int]:
        return []

    def id_of(self, token: str) -> int | None:
        return self.named.get(token)

    def ids(self, parts: list[str | int]) -> list[int]:
        ids: list[int] = []
        text = ""
        for part in (*parts, -1):
            if isinstance(part, str):
                text += part
            else:
                ids += [
                    *self.encoding.encode(text, allowed_special=self.plain, disallowed_special=()),
                    part,
                ]
                text = ""
        return ids[:-1]

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.spell, ids)).decode("utf-8", "replace")

    def spell(self, id: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(id)
        except (KeyError, OverflowError):
            return b""


_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def spelled(token: Any) -> str:
    """A token as tokenizer_config.json names it, plainly or with its flags; empty if none."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def marks(token: str, written: str) -> bool:
    """Whether a template that writes this text writes the token, as more than a word or blanks."""
    return token in written and not token.isspace() and not token.strip().isalnum()


def whole(text: str) -> str:
    """The text without half surrogate pairs, which no encoding of bytes can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
