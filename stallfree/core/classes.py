"""Service classes: several sets of latency targets under one roof, each with a name, in words:
`interactive: ttft=1s,tbt=50ms; batch: ttlt=10min`. It says what is promised, not to whom."""

import re
from collections.abc import Iterator, Mapping
from typing import Self

from stallfree.core.nearest import nearest
from stallfree.core.slo import Slo

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_EXAMPLE = 'write --slo "interactive: ttft=1s,tbt=50ms; batch: ttlt=10min"'


class Classes(Mapping[str, Slo]):
    """The targets of each class, by its name. `default`: those of requests that name none, which are the first that were written.
    Targets without a name are the only class, and it is called "".
    """

    def __init__(self, targets: Mapping[str, Slo]):
        """Raises ValueError if there is no class."""
        if not targets:
            raise ValueError(f"there is no class; {_EXAMPLE}")
        self._targets = dict(targets)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Classes from words: NAME: TARGETS, separated by semicolons, with targets as `Slo.parse` reads them; or targets alone.
        Raises ValueError that says what to write instead.
        """
        if ":" not in text and ";" not in text:
            return cls({"": Slo.parse(text)})
        targets: dict[str, Slo] = {}
        for item in text.split(";"):
            if not item.strip():
                continue
            name, colon, words = item.partition(":")
            name = name.strip()
            if not colon or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{item.strip()!r} does not begin with the name of a class (1 to 64 letters, digits, dots, dashes or "
                    f"underscores) and a colon; {_EXAMPLE}"
                )
            if not words.strip():
                raise ValueError(f"class {name!r} has no targets; {_EXAMPLE}")
            if name in targets:
                raise ValueError(f"class {name!r} is there twice; give each its own name")
            targets[name] = Slo.parse(words)
        return cls(targets)

    @property
    def default(self) -> Slo:
        return next(iter(self._targets.values()))

    def find(self, name: str) -> Slo:
        """The targets of a class that a request names. Raises ValueError if there is none."""
        if name not in self._targets:
            known = [known for known in self._targets if known]
            some = f"known: {', '.join(known)}" if known else f"this server has none; {_EXAMPLE}"
            raise ValueError(f"unknown class {name!r}{nearest(name, known)}; {some}")
        return self._targets[name]

    def __getitem__(self, name: str) -> Slo:
        return self._targets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __str__(self) -> str:
        """The words that `parse` reads."""
        return "; ".join(f"{name}: {slo}" if name else str(slo) for name, slo in self._targets.items())
