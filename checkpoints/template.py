"""Chat templates: a checkpoint's own program for what stands around the turns of a conversation.

The program comes from a file, so it runs in jinja2's sandbox, with what transformers gives it and
no more. The sandbox keeps it away from the machine; nothing bounds how long it runs.
`Template.cut` tells what the template wrote from what a turn says: only in the first may special
tokens be read. Knows no tokens.
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
        self._mark = secrets.token_hex(12)  # no turn can hold what it cannot know
        sandbox = _sandbox()
        try:
            # what an assistant says may be marked for training: here it is a block like any other
            source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
            source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source)
            tree = sandbox.parse(source)
            self._program = sandbox.from_string(source)
        except (TemplateError, RecursionError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}: the chat template is not valid Jinja: {error}") from error
        constants = [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
        written = [n.data for n in tree.find_all(nodes.TemplateData)]
        self.literals = "\0".join(written + constants)  # what it can write by itself

    def __reduce__(self):
        return Template, (self.source, self.where, self.names)  # a compiled program is not copied

    def cut(self, turns: list[str]) -> list[str]:
        """The template's own text and the turns' by turns, its own at both ends.

        A mark in place of every turn shows where the template's own text ends; then one turn after
        the other is shown as it is, to see what the template makes of it (most trim it, some cut a
        train of thought). Raises ValueError if the template fails, or drops or repeats a turn.
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
        """What the template makes of the turns, cut at the marks among them."""
        roles = ("user", "assistant")
        messages = [{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)]
        given = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        try:
            text = self._program.render(given, **self.names)
        except Exception as error:  # whatever a program from a file can do
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.where}: the chat template refuses: {reason}") from error
        mark = self._mark + r"\d{6}"
        if re.findall(mark, text) != [turn for turn in turns if re.fullmatch(mark, turn)]:
            raise ValueError(f"{self.where}: the chat template drops, moves or repeats a turn")
        return re.split(mark, text)


def _sandbox() -> ImmutableSandboxedEnvironment:
    """What transformers runs a template in: the same extension, filters and functions."""
    loops = ["jinja2.ext.loopcontrols"]  # break and continue
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    # jinja2's own filter escapes what HTML would read
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def _refuse(message: str):
    raise TemplateError(message)
