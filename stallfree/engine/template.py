"""Chat templates: a model's own Jinja program that writes a conversation as one text, rendered as `transformers` renders it.

Templates come with models from anywhere, so they run in Jinja's sandbox, with a limit of steps, and their errors become TextErrors.
It knows no tokens.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stallfree.engine.errors import TextError

MOST_STEPS = 200_000
"""Steps of loops and calls in one rendering, which take about 0.1 s. A conversation of 1,000 messages takes some 10,000."""
MOST_PRODUCT, MOST_POWER = 1_000_000, 64
"""The largest product of a text's or list's length, or of numbers; and the largest exponent."""

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

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.budget = _Budget()
        self.filters["_counted"] = self._counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else abs(value) for value in (left, right)]
        if (operator == "**" and (sizes[0] > 1 and sizes[1] > MOST_POWER)) or (
            operator == "*" and sizes[0] * sizes[1] > MOST_PRODUCT
        ):
            raise TemplateError(f"{operator} makes a value that is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        self._step()
        return super().call(context, function, *arguments, **named)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _step(self) -> None:
        self.budget.left -= 1
        if self.budget.left < 0:
            raise TemplateError(f"it takes more than {MOST_STEPS:,} steps")


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
