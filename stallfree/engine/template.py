"""Chat templates: a model's own Jinja program that writes a conversation as one text, rendered as `transformers` renders it.

Templates come with models from anywhere, so they run in Jinja's sandbox, and their errors become TextErrors. It knows no tokens.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stallfree.engine.errors import TextError

MOST_QUOTED = 300
"""The most characters of a template's error that are quoted, because it may hold the whole conversation."""


class Template:
    """A compiled chat template. It is pickled as its `source`. Raises TextError if the source does not parse."""

    def __init__(self, source: str):
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except Exception as error:  # TemplateSyntaxError, or RecursionError and SyntaxError from Python's compiler
            raise TextError(f"the model's chat template does not parse: {_quoted(error)}") from error
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.texts = frozenset(texts)
        """The texts that are written in the template."""

    def __reduce__(self) -> tuple[type["Template"], tuple[str]]:
        return Template, (self.source,)

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for `values`: `messages`, `add_generation_prompt`, `tools`, `documents`, the special tokens, and others. Raises
        TextError, which quotes the template's error."""
        try:
            return self._template.render(values)
        except Exception as error:  # a template is a program: it may divide by zero, recurse, or ask for too much memory
            raise TextError(f"the model's chat template refuses these messages: {_quoted(error)}") from error


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
