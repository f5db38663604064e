"""Chat templates: a checkpoint's own program that writes the text around a conversation's turns.

The program comes from a file, so it runs in jinja2's sandbox, with the functions that transformers
gives it and no more. The sandbox keeps it away from the machine; nothing limits how long it runs.
`Template.cut` separates the template's own text from the turns, since only the former may contain
special tokens. This file knows nothing of tokens.
"""

import functools
import json
import re
import secrets
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Template:
    """where: the file the source is from, for errors. names: bos_token and the like."""

    def __init__(self, source: str, where: str, names: dict[str, str]):
        self.source, self.where, self.names = source, where, names
        self._mark = secrets.token_hex(12)  # random, so no turn can contain it
        sandbox = _sandbox()
        try:
            # {% generation %} marks an assistant's text for training: here it is an ordinary block
            source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
            source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source)
            tree = sandbox.parse(source)
            self._program = sandbox.from_string(source)
        except (TemplateError, RecursionError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}: the chat template is not valid Jinja: {error}") from error
        constants = [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
        written = [n.data for n in tree.find_all(nodes.TemplateData)]
        self.literals = "\0".join(written + constants)  # all text that it can write by itself

    def __reduce__(self):
        return Template, (self.source, self.where, self.names)  # a compiled program is not copied

    def cut(self, turns: list[str]) -> list[str]:
        """The template's own text and the turns in alternation; its own is at both ends.

        With a mark in place of every turn, the template's own text can be told apart. Then it is
        given one real turn at a time, to see what it makes of that turn (most templates trim it,
        some cut out reasoning). ValueError if the template fails, or drops or repeats a turn.
        """
        marks = [f"{self._mark}{k:06}" for k in range(len(turns))]
        own = self._between(marks)
        pieces = own[:1]
        for k, (turn, before, after) in enumerate(zip(turns, own, own[1:])):
            seen = self._between([*marks[:k], turn, *marks[k + 1 :]])[k]
            end = len(seen) - len(after)
            if seen.startswith(before) and seen.endswith(after) and end >= len(before):
                turn = seen[len(before) : end]
            pieces += [turn, after]
        return pieces

    def _between(self, turns: list[str]) -> list[str]:
        """The text that the template writes for these turns, split at the marks among them."""
        roles = ("user", "assistant")
        messages = [{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)]
        given = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        try:
            text = self._program.render(given, **self.names)
        except Exception as error:  # a program from a file can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.where}: the chat template refuses: {reason}") from error
        mark = self._mark + r"\d{6}"
        if re.findall(mark, text) != [turn for turn in turns if re.fullmatch(mark, turn)]:
            raise ValueError(f"{self.where}: the chat template drops, moves or repeats a turn")
        return re.split(mark, text)


def _sandbox() -> ImmutableSandboxedEnvironment:
    """A sandbox like that of transformers: the same extension, filters and functions."""
    loops = ["jinja2.ext.loopcontrols"]  # break and continue
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    # jinja2's own filter also escapes for HTML
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def _refuse(message: str):
    raise TemplateError(message)
