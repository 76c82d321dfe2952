"""The token at which a request goes from a prefill engine to a decode engine, in the words of a header. It does not know which cuts
are possible (`engine.prefetch` does).
"""

import re
from dataclasses import dataclass
from typing import Self

_WORDS = re.compile(r"(?P<tokens>[0-9]{1,9})|(?P<percent>[0-9]{1,2}(\.[0-9]{1,9})?)%")


@dataclass(frozen=True, slots=True)
class Cut:
    """The first `tokens` of a request, or of its prompt so many `percent`, are computed elsewhere. Neither: its prompt is."""

    tokens: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a number of tokens, at least 1, or a share of the prompt below 100%. Raises ValueError."""
        match = _WORDS.fullmatch(text.strip())
        tokens, percent = match.group("tokens", "percent") if match else (None, None)
        if not float(tokens or percent or 0):
            raise ValueError(f"{text[:40]!r} is no cut; write a number of tokens, at least 1, or a share of the prompt such as 60%")
        return cls(None if tokens is None else int(tokens), None if percent is None else float(percent))

    def of(self, prompt_tokens: int) -> int | None:
        """The tokens of a request with this prompt that are computed elsewhere, at least 1; None: its prompt."""
        return self.tokens if self.percent is None else max(1, int(prompt_tokens * self.percent / 100))

    def __str__(self) -> str:
        return f"{self.tokens}" if self.percent is None else f"{self.percent:.6f}%"


WHOLE = Cut()
