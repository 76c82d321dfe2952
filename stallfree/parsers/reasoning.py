"""The section in which a model reasons before it answers, between two marks at the beginning of an answer. It does not know what
the rest of the answer means: another parser gets it.
"""

import re

from stallfree.parsers.pieces import Parser
from stallfree.parsers.reading import SPACE, Marks, Steps, Wrapping

KNOWN = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""The marks of Qwen 3, DeepSeek-R1 and SmolLM3, and of Magistral."""
LINES = re.compile("[\r\n]+")


def marks(template: str) -> tuple[str, str] | None:
    """The marks of the reasoning section that a chat template knows, by its source text. None if it knows none."""
    return next((pair for pair in KNOWN if pair[1] in template), None)


class ReasoningParser(Wrapping):
    """Text between the marks `open` and `close` is `Reasoning`, and `inner` gets the text after it. `inside`: the prompt has the
    open mark already. Without a section at the beginning, `inner` gets everything. Line breaks next to the marks are left out: one
    after the open mark, one before the close mark, all after it. A section that is not closed goes on to the end.
    """

    def __init__(self, inner: Parser, open: str, close: str, inside: bool):
        self._open = open
        self._close = Marks(f"\r\n{close}", f"\n{close}", close)
        self._inside = inside
        super().__init__(inner)

    def _read(self) -> Steps[None]:
        source = self._source
        if not self._inside:
            blank = yield from source.whole(SPACE)
            if not (yield from source.starts(self._open)):
                self._rest(blank)
                yield from source.rest(self._rest)
                return
            source.take(len(self._open))
        for line_break in ("\r\n", "\n"):
            if (yield from source.starts(line_break)):
                source.take(len(line_break))
                break
        if (yield from self._close.find(source, self._reasoning)):
            yield from source.whole(LINES)
        yield from source.rest(self._rest)
