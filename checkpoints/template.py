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
from collections.abc import Callable
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 20_000  # rounds of loops and calls of macros
SECONDS = 5.0
LENGTH = 4_000_000  # characters printed, or in one value


class Template:
    """where: the file the source is from, for errors. names: bos_token and the like."""

    def __init__(self, source: str, where: str, names: dict[str, str]):
        self.source, self.where, self.names = source, where, names
        self._mark = secrets.token_hex(12)  # no turn can hold what it cannot know
        self._sandbox = _Sandbox()
        try:
            self._program = self._sandbox.from_string(source)
            tree = self._sandbox.parse(source)
        except (jinja2.TemplateError, RecursionError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}: the chat template is not valid Jinja: {error}") from error
        constants = [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
        written = [n.data for n in tree.find_all(nodes.TemplateData)]
        self.literals = "\0".join(written + constants)  # what it can write by itself

    def cut(self, turns: list[str]) -> list[str]:
        """The conversation in pieces: the template's own text and the turns' by turns, its own at
        both ends, so that piece 2k + 1 is what turn k reads like there.

        A mark in place of every turn shows where the template's own text ends; then one turn after
        the other is shown as it is, to see what the template makes of it (most trim it, some cut a
        train of thought). Raises ValueError if the template fails, or drops or repeats a turn.
        """
        marks = [f"{self._mark}{k:06}" for k in range(len(turns))]
        own = self._between(marks, marks)
        pieces = [own[0]]
        for k, turn in enumerate(turns):
            others = marks[:k] + marks[k + 1 :]
            seen = self._between([*marks[:k], turn, *marks[k + 1 :]], others)[k]
            before, after = own[k], own[k + 1]
            fits = len(seen) >= len(before) + len(after)
            if fits and seen.startswith(before) and seen.endswith(after):
                turn = seen[len(before) : len(seen) - len(after)]
            pieces += [turn, after]
        return pieces

    def _between(self, turns: list[str], marks: list[str]) -> list[str]:
        text, pieces = self._render(turns), []
        for mark in marks:
            piece, found, text = text.partition(mark)
            if not found or mark in text:
                raise ValueError(f"{self.where}: the chat template drops, moves or repeats a turn")
            pieces.append(piece)
        return [*pieces, text]

    def _render(self, turns: list[str]) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)]
        self._sandbox.begin()
        try:
            return self._program.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.names,
            )
        except (Exception, MemoryError) as error:  # whatever a program from a file can do
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.where}: the chat template refuses: {reason}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which a program also comes to an end."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self):
        loops = "jinja2.ext.loopcontrols"
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loops])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]  # fills pages by itself
        self.filters = {name: _modest(name, work) for name, work in self.filters.items()}
        self.begin()

    def begin(self) -> None:
        self.steps, self.printed, self.deadline = 0, 0, time.monotonic() + SECONDS

    def _parse(self, *source):
        return _Counted().visit(super()._parse(*source))

    def step(self) -> bool:
        self.steps += 1
        if self.steps > STEPS or time.monotonic() > self.deadline:
            _refuse("it loops too long")
        return True

    def bounded(self, value):
        if isinstance(value, (str, list, tuple)) and len(value) > LENGTH:
            _refuse("it makes too long a text")
        return value

    def shown(self, value):
        self.printed += len(self.bounded(value)) if isinstance(value, str) else 1
        if self.printed > LENGTH:
            _refuse("it makes too long a text")
        return value

    def call(self, context, work, /, *arguments, **options):
        _check_numbers(arguments, options)
        if getattr(work, "__name__", "") in ("format", "format_map"):  # the sandbox wraps them
            text = getattr(getattr(work, "__wrapped__", work), "__self__", "")
            _check_format(text, ())
        return super().call(context, work, *arguments, **options)

    def call_binop(self, context, operator, left, right):
        if operator == "%":
            _check_format(left, right)
        if operator == "**" and not (abs(left) < 1e6 and abs(right) < 100):
            _refuse("a power is too large")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and len(text) * times > LENGTH:
                    _refuse("it makes too long a text")
        return self.bounded(super().call_binop(context, operator, left, right))


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
        return _call("bounded", self.generic_visit(node))

    def visit_Output(self, node):
        self.generic_visit(node)
        node.nodes = [
            n if isinstance(n, nodes.TemplateData) else _call("shown", n) for n in node.nodes
        ]
        return node


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


class _Generation(Extension):
    """{% generation %} marks what an assistant says, for training: here its body alone."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _modest(name: str, work: Callable) -> Callable:
    """The filter `work`, refused numbers that ask for pages of blanks."""

    @functools.wraps(work)  # keeps what jinja2 has noted on it
    def checked(*arguments, **options):
        _check_numbers(arguments[1:], options)
        _check_format(arguments[0] if name == "format" else "", ())
        return work(*arguments, **options)

    return checked


def _check_numbers(*values) -> None:
    for value in values:
        if isinstance(value, int) and value > LENGTH:
            _refuse("a number is too large")
        if isinstance(value, (tuple, list, dict)):
            _check_numbers(*(value.values() if isinstance(value, dict) else value))


def _check_format(text, values) -> None:
    """Widths stand in a format as numbers, or * asks for one of the values."""
    if isinstance(text, str) and re.search(r"\d{7}", text):
        _refuse("a number is too large")
    if isinstance(text, str) and "*" in text:
        _check_numbers(values)


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: jinja2's own escapes what HTML would read."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
