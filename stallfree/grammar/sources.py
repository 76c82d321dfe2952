"""A grammar as a text for llguidance, from what a request asks for: a JSON schema, a regular expression, a choice, or a grammar.

It only writes texts. Whether they compile, `compiling` finds out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from stallfree.parsers.grammars import quoted

MOST_CHARS = 64 << 10
"""Characters of the longest grammar. One of 1,500 properties has 45,000 and compiles in 0.15 s on a Zen 4."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
"""Between two parts of a JSON text. Without a bound, a small model may write line breaks up to its token limit."""


class Grammar(NamedTuple):
    """`source`: for llguidance. `field`: the part of the request that it came from. `opens`: once it is complete, any token may
    follow; otherwise the answer ends there. `after`: it holds only an answer that begins with this token, after it."""

    source: str
    field: str
    opens: bool = False
    after: int | None = None


def of_schema(schema: Mapping[str, Any] | bool | str) -> str:
    """JSON that `schema` (as JSON or values) allows. Raises ValueError if it is no schema, or if it allows nothing."""
    if schema is False:
        raise ValueError("the schema false allows no answer at all")
    schema = {} if schema is True else schema
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})


def of_regex(pattern: str) -> str:
    return _source({"lark_grammar": f"start: ANSWER\nANSWER: /{_slashed(pattern)}/"})


def of_lark(text: str) -> str:
    """A grammar in Lark's form."""
    return _source({"lark_grammar": text})


def of_choice(choices: Sequence[str]) -> str:
    """One of these texts."""
    return of_lark(f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choices))}")


def of_grammar(text: str) -> str:
    """A grammar in Lark's form, or in GBNF (`root ::= ...`), which `as_lark` converts later."""
    return _source({"gbnf_grammar": text}) if "::=" in text else of_lark(text)


def as_lark(source: str) -> str:
    """The source with its GBNF as Lark. It takes time that grows with the square of the rules. Raises ValueError for bad GBNF."""
    if '"gbnf_grammar"' not in source:
        return source
    grammars = json.loads(source)["grammars"]
    for grammar in grammars:
        if "gbnf_grammar" in grammar:
            try:
                grammar["lark_grammar"] = any_to_lark(grammar.pop("gbnf_grammar"))
            except Exception as error:  # the converter also raises bare Exception
                raise ValueError(f"bad GBNF: {str(error)[:200]}") from None
    return _source(*grammars)


def either(first: str, second: str) -> str:
    """What one of two sources allows."""
    return _source({"lark_grammar": "start: @first | @second"}, *_named(first, "first"), *_named(second, "second"))


class Mark(NamedTuple):
    """A mark of a reasoning section, and its id if it is a token of its own; otherwise it is text."""

    text: str
    token: int | None

    @property
    def lark(self) -> str:
        return quoted(self.text) if self.token is None else f"<[{self.token}]>"


def reasoning(close: int, most_tokens: int) -> str:
    """The rest of a reasoning section, of at most so many tokens, up to the token that closes it."""
    return of_lark(f"start: thought\n{_thought(Mark('', close), most_tokens)}")


def after_reasoning(answer: str, opening: Mark | None, close: Mark, most_tokens: int | None) -> str:
    """A reasoning section, and then what the source `answer` allows. `opening`: of a section that may be left out; None: the prompt
    already ends within it. `most_tokens` in the section; only for a mark that is a token."""
    section = "thought BLANK @answer"
    if opening is not None:
        section = f"{opening.lark} {section} | @answer"
    lark = f"start: {section}\nBLANK: /\\n{{0,2}}/\n{_thought(close, most_tokens)}"
    return _source({"lark_grammar": lark}, *_named(answer, "answer"))


def _thought(close: Mark, most_tokens: int | None) -> str:
    if close.token is None:
        return f"thought[stop={close.lark}]: /(?s:.*)/\n"
    limit = "" if most_tokens is None else f"[max_tokens={most_tokens}]"
    return f"thought: text {close.lark}\ntext{limit}: /(?s:.*)/\n"


def _slashed(pattern: str) -> str:
    """A regular expression, as it stands between slashes in Lark."""
    return re.sub(r"\\.|/", lambda match: r"\/" if match[0] == "/" else match[0], pattern, flags=re.DOTALL)


def _source(*grammars: dict[str, Any]) -> str:
    return json.dumps({"grammars": grammars})


def _named(source: str, name: str) -> list[dict[str, Any]]:
    """The grammars of a source, the first of them under a name by which others can refer to it."""
    first, *others = json.loads(source)["grammars"]
    return [first | {"name": name}, *others]
