"""Chat templates: a checkpoint's own program for what stands around the turns of a conversation.

The program comes from a file, so it runs in jinja2's sandbox, with what transformers gives it and
no more, and a bounded number of steps. `Template.cut` tells what the template wrote from what a
turn says: only in the first may special tokens be read. Knows no tokens.
"""

import functools
import json
import re
import secrets
import time
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 20_000  # rounds of loops and calls of macros
SECONDS = 5.0
LENGTH = 40_000_000  # characters in all that it makes or prints


class Template:
    """where: the file the source is from, for errors. names: bos_token and the like."""

    def __init__(self, source: str, where: str, names: dict[str, str]):
        self.where, self.names = where, names
        self._mark = secrets.token_hex(12)  # no turn can hold what it cannot know
        self._sandbox = _Sandbox()
        try:
            # what an assistant says may be marked for training: here it is a block like any other
            source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
            source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source)
            tree = self._sandbox.parse(source)
            self._program = self._sandbox.from_string(source)
        except (TemplateError, RecursionError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}: the chat template is not valid Jinja: {error}") from error
        constants = [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
        written = [n.data for n in tree.find_all(nodes.TemplateData)]
        self.literals = "\0".join(written + constants)  # what it can write by itself

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
        self._sandbox.begin()
        try:
            text = self._program.render(given, **self.names)
        except (Exception, MemoryError) as error:  # whatever a program from a file can do
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.where}: the chat template refuses: {reason}") from error
        mark = self._mark + r"\d{6}"
        if re.findall(mark, text) != [turn for turn in turns if re.fullmatch(mark, turn)]:
            raise ValueError(f"{self.where}: the chat template drops, moves or repeats a turn")
        return re.split(mark, text)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which a program also comes to an end."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self):
        loops = ["jinja2.ext.loopcontrols"]  # break and continue
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=loops)
        # as transformers has it: jinja2's own escapes what HTML would read
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.filters = {name: self._modest(name, work) for name, work in self.filters.items()}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]  # fills pages by itself
        self.begin()

    def begin(self) -> None:
        self.steps, self.made, self.deadline = 0, 0, time.monotonic() + SECONDS

    def _parse(self, *source):
        return _Counted().visit(super()._parse(*source))

    def step(self) -> bool:
        self.steps += 1
        if self.steps > STEPS or time.monotonic() > self.deadline:
            _refuse("it loops too long")
        return True

    def count(self, value):
        self.made += len(value) if isinstance(value, (str, list, tuple)) else 1
        if self.made > LENGTH:
            _refuse("it makes too long a text")
        return value

    def call(self, context, work, /, *arguments, **options):
        method = getattr(work, "__wrapped__", work)  # the sandbox wraps these two
        formats = getattr(method, "__name__", "") in ("format", "format_map")
        _check(arguments, options, form=method.__self__ if formats else "")
        return self.count(super().call(context, work, *arguments, **options))

    def call_binop(self, context, operator, left, right):
        if operator == "%":
            _check(right, form=left)
        if operator == "**" and not (abs(left) < 1e6 and abs(right) < 100):
            _refuse("a power is too large")
        sizes = [len(value) if hasattr(value, "__len__") else value for value in (left, right)]
        if operator == "*" and sizes[0] * sizes[1] > LENGTH:
            _refuse("it makes too long a text")
        return self.count(super().call_binop(context, operator, left, right))

    def _modest(self, name, work):
        """The filter `work`, refused numbers that ask for pages of blanks."""

        @functools.wraps(work)  # keeps what jinja2 has noted on it
        def checked(*arguments, **options):
            _check(arguments[1:], options, form=arguments[0] if name == "format" else "")
            return self.count(work(*arguments, **options))

        return checked


class _Counted(NodeTransformer):
    """Puts a call of `step` into each loop and macro, and one of a check around each text made."""

    def _looped(self, node):
        self.generic_visit(node)
        if getattr(node, "test", None) is not None:  # a loop's own filter runs without its body
            node.test = nodes.And(_call("step"), node.test)
        node.body.insert(0, nodes.ExprStmt(_call("step")))
        return node

    visit_For = visit_Macro = visit_CallBlock = _looped

    def visit_Concat(self, node):
        return _call("count", self.generic_visit(node))

    def visit_Output(self, node):
        self.generic_visit(node)
        node.nodes = [_call("count", part) for part in node.nodes]
        return node


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


def _check(*values, form="") -> None:
    """Refuse large numbers, the widths that stand in a format among them."""
    if isinstance(form, str) and re.search(r"\d{7}", form):
        _refuse("a number is too large")
    for value in values:
        if isinstance(value, int) and value > LENGTH:
            _refuse("a number is too large")
        if isinstance(value, (tuple, list, dict)):
            _check(*(value.values() if isinstance(value, dict) else value))


def _refuse(message: str):
    raise TemplateError(message)
