"""Chat templates: a model's own Jinja program that writes a conversation as one text, rendered as `transformers` renders it.

Templates come with models from anywhere, so they run in Jinja's sandbox, with a limit of steps, and their errors become TextErrors.
It knows no tokens.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from stallfree.engine.errors import TextError

MOST_STEPS = 200_000
"""Steps of loops and calls in one rendering, which take about 0.1 s. A conversation of 1,000 messages takes some 10,000."""
MOST_PRODUCT, MOST_POWER, MOST_TEXT = 1_000_000, 64, 16 << 20
"""The largest product of a text's or list's length, or of numbers; the largest exponent; and the longest text or list that is put
together, four times the largest body."""

MOST_QUOTED = 300
"""The most characters of a template's error that are quoted, because it may hold the whole conversation."""


class Template:
    """A compiled chat template. It is pickled as its `source`. Raises TextError if the source does not parse."""

    def __init__(self, source: str):
        self.source = source
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0)
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except Exception as error:  # TemplateSyntaxError, or RecursionError and SyntaxError from Python's compiler
            raise TextError(f"the model's chat template does not parse: {_quoted(error)}") from error
        self._budget = environment.budget
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.texts = frozenset(texts)
        """The texts that are written in the template."""

    def __reduce__(self) -> tuple[type["Template"], tuple[str]]:
        return Template, (self.source,)

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for `values`: `messages`, `add_generation_prompt`, `tools`, `documents`, the special tokens, and others. Raises
        TextError, which quotes the template's error."""
        self._budget.left = MOST_STEPS
        try:
            return self._template.render(values)
        except Exception as error:  # a template is a program: it may divide by zero, recurse, or ask for too much memory
            raise TextError(f"the model's chat template refuses these messages: {_quoted(error)}") from error


class _Budget(threading.local):
    """The steps that a rendering may still take, in each thread."""

    left = MOST_STEPS


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which no template runs for ever: steps of loops are counted, and products and powers are kept small."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.budget = _Budget()
        self.filters["_counted"] = self._counted
        self.filters["_joined"] = self._joined
        for name in ("center", "format", "indent"):
            self.filters[name] = _with_small_numbers(self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return cast(nodes.Template, _Bounded().visit(tree))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        if all(isinstance(size, int | float) for size in sizes):
            first, second = map(abs, sizes)
            too_large = {
                "**": first > 1 and second > MOST_POWER,
                "*": first * second > MOST_PRODUCT,
                "+": isinstance(left, str | list | tuple) and first + second > MOST_TEXT,
            }
            if too_large.get(operator):
                raise TemplateError(f"{operator} makes a value that is too large")
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        self._step()
        if isinstance(function, BuiltinMethodType):  # a method of a text or a list, such as ljust
            _check_numbers((*arguments, *named.values()))
        return super().call(context, function, *arguments, **named)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _joined(self, parts: list[Any]) -> str:
        """The texts of `a ~ b`, as one."""
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > MOST_TEXT:
            raise TemplateError("~ makes a value that is too large")
        return "".join(texts)

    def _step(self) -> None:
        self.budget.left -= 1
        if self.budget.left < 0:
            raise TemplateError(f"it takes more than {MOST_STEPS:,} steps")


class _Bounded(NodeTransformer):
    """Puts the filters that count and bound around what a template loops over and joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses widths and numbers that would make a text too large."""

    @wraps(function)
    def bounded(value: Any, *arguments: Any, **named: Any) -> Any:
        _check_numbers((*arguments, *named.values()))
        if isinstance(value, str) and function.__name__ == "do_format":
            _check_widths(value)
        return function(value, *arguments, **named)

    return bounded


def _check_numbers(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MOST_PRODUCT for value in values):
        raise TemplateError(f"a number above {MOST_PRODUCT:,} is too large here")


def _check_widths(form: str) -> None:
    if re.search(r"%[^a-zA-Z%]*[0-9]{6}", form):
        raise TemplateError("a width of more than five digits is too large")


class _Generation(Extension):
    """`{% generation %}`, which marks text that a model is trained on. It does not change the text."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # As in a call block, variables set inside do not exist outside.
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        return str(caller())


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as `transformers` writes it: Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _quoted(error: Exception) -> str:
    text = str(error) if isinstance(error, TemplateError) and str(error) else f"{type(error).__name__}: {error}"
    return text if len(text) <= MOST_QUOTED else text[:MOST_QUOTED] + " ..."
