"""A latency target, in words and in numbers: `ttft=2s@p90,tbt=100ms@p99`. It says what is wanted, not how."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0, "min": 1 / 60, "h": 1 / 3600}
"""Units per second. Dividing by this gives the float nearest to the written number, so words and numbers agree."""
_ITEM = re.compile(
    r"(?P<name>[^=@]*)=\s*(?P<number>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?P<unit>[a-zA-Z]*)(?:@(?P<percentile>.*))?"
)
_EXAMPLE = "write ttft=2s@p90,tbt=100ms@p99, or a part of it"


@dataclass(frozen=True, slots=True)
class Target:
    """At most `seconds`, in `percentile` per cent of all cases."""

    seconds: float
    percentile: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"a latency target is a time above 0, not {self.seconds:g} s; {_EXAMPLE}")
        if not 50 <= self.percentile < 100:
            raise ValueError(f"p{self.percentile:g} cannot be promised; take a percentile from p50 to below p100, such as p99")

    @property
    def late_share(self) -> float:
        """The share of the cases that may be late."""
        return 1 - self.percentile / 100

    def __str__(self) -> str:
        milliseconds = self.seconds * 1e3
        time = f"{milliseconds:.15g}ms" if milliseconds < 1000 else f"{self.seconds:.15g}s"
        return f"{time}@p{self.percentile:.15g}"


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets; None: no such target. `ttft`: arrival to first token. `tbt`: each gap between two consecutive tokens of a
    request. `tpot`: token i is due i times this after the first token was due, so early tokens save slack for later ones. `ttlt`:
    arrival to last token; nothing before it is urgent.
    """

    ttft: Target | None = None
    tbt: Target | None = None
    tpot: Target | None = None
    ttlt: Target | None = None

    def __post_init__(self) -> None:
        if self.tbt is not None and self.tpot is not None:
            raise ValueError("tbt and tpot both say when the next token is due; give one of them")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Targets from words: name=time[@percentile], separated by commas; times in us, ms, s, min or h. The default percentile is
        p99, for ttft p90. Raises ValueError that says what to write instead.
        """
        targets: dict[str, Target] = {}
        known = [f.name for f in fields(cls)]
        for item in text.split(","):
            match = _ITEM.fullmatch(item.strip())
            if match is None:
                raise ValueError(f"{item.strip()!r} is not a latency target; {_EXAMPLE}")
            name, number, unit = match["name"].strip(), match["number"], match["unit"]
            if name not in known:
                raise ValueError(f"unknown latency target {name!r}; known are {', '.join(known)}")
            if name in targets:
                raise ValueError(f"two targets for {name}; give one")
            if unit not in UNITS:
                wrong = f"has the unknown unit {unit!r}" if unit else "has no unit"
                raise ValueError(f"{name}={number} {wrong}; write {name}={number}ms or {name}={number}s")
            targets[name] = Target(
                _number(number, item) / UNITS[unit], _percentile(match["percentile"], 90.0 if name == "ttft" else 99.0)
            )
        return cls(**targets)

    @classmethod
    def of(cls, milliseconds: Mapping[str, float], default: "Slo") -> Self:
        """Targets from the milliseconds of each, by name, with the percentiles of `default`. Raises ValueError as `parse` does."""
        usual = {"ttft": default.ttft or Target(1, 90), "tbt": default.tbt or default.tpot or Target(1, 99)}
        usual["tpot"] = usual["tbt"]
        usual["ttlt"] = default.ttlt or Target(1, 99)
        for name in milliseconds:
            if name not in usual:
                raise ValueError(f"unknown latency target {name!r}; known are {', '.join(usual)}")
        return cls(**{name: Target(value / 1000, usual[name].percentile) for name, value in milliseconds.items()})

    def within(self, default: "Slo") -> "Slo":
        """These targets, completed by those of `default`. `tbt` and `tpot` are completed together. Targets with a `ttlt` are
        complete: who wants the whole answer by some time did not ask for its tokens one by one."""
        if self.ttlt is not None:
            return self
        pace = {"tbt": self.tbt, "tpot": self.tpot} if self.tbt or self.tpot else {"tbt": default.tbt, "tpot": default.tpot}
        return replace(default, ttft=self.ttft or default.ttft, **pace)

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) is not None)


def _number(text: str, item: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} in {item.strip()!r} is not a number; {_EXAMPLE}") from None


def _percentile(text: str | None, default: float) -> float:
    if text is None:
        return default
    match = re.fullmatch(r"[pP]?([0-9]+(?:\.[0-9]+)?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a percentile; write @p99")
    return float(match[1])
