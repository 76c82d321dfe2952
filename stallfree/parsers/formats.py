"""What a tool format is, and the list of them. A new format is a file with a class, and a line here."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from stallfree.parsers.hermes import Hermes
from stallfree.parsers.llama_json import LlamaJson
from stallfree.parsers.mistral import Mistral
from stallfree.parsers.pieces import Parser, Tool
from stallfree.parsers.plain import Plain
from stallfree.parsers.pythonic import Pythonic


class ToolFormat(Protocol):
    """How a family of models writes tool calls. `marks`: the texts of special tokens that its parser must see in the answer."""

    @property
    def name(self) -> str: ...

    @property
    def marks(self) -> tuple[str, ...]: ...

    def suits(self, template: str) -> bool:
        """Whether a chat template, by its source text, has the model write this format."""

    def parser(self, names: Collection[str]) -> Parser:
        """A parser of one answer. `names`: the tools of the request. A call of any other name is content, as it was written."""

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: Mapping[str, int]) -> str:
        """A grammar in llguidance's Lark that allows one call of the tools, or with `parallel` one or more, and nothing else. The
        schema of each tool holds its arguments. `special`: the ids of those marks that are special tokens in the vocabulary
        that llguidance has, because there they have no text; the other marks are text. Raises ValueError without any tool, and for
        tools that the format cannot hold.
        """


_FORMATS: tuple[ToolFormat, ...] = (Hermes(), Mistral(), Pythonic(), LlamaJson(), Plain())
FORMATS: Mapping[str, ToolFormat] = {format.name: format for format in _FORMATS}
"""The formats by name, in order of trial. A template of Llama with a Pythonic prompt also has the tag of `llama_json`."""


def choose(template: str) -> ToolFormat:
    """The first format that suits a chat template, by its source text. `plain` suits all."""
    return next(format for format in FORMATS.values() if format.suits(template))


def named(name: str) -> ToolFormat:
    """The format of this name. Raises ValueError, which lists the known names, for an unknown one."""
    if name not in FORMATS:
        raise ValueError(f"the tool format {name!r} is not known; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
