"""Scheduling policies, one file each; this folder is their registry. It does not know what they do.

A policy's file holds one class with its name in capitals (`prefill-first` is `PrefillFirst` in `prefill_first.py`). One from
elsewhere is named `package.module:Class`.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path

from stallfree.core.policy import Policy


def names() -> list[str]:
    """The policies in this folder."""
    return sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[a-z]*.py"))


def takes(name: str) -> list[str]:
    """The options of policy `name`, or `package.module:Class`. Raises ValueError as `load` does."""
    return list(inspect.signature(_find(name)).parameters)


def load(name: str, **options: object) -> Policy:
    """Make the policy `name`, or `package.module:Class`, with those of `options` that are not None.

    Raises ValueError naming the nearest policy if there is none of that name, or the options that it does take.
    """
    check(name, **options)
    return _find(name)(**{key: value for key, value in options.items() if value is not None})  # type: ignore[no-any-return]


def check(name: str, **options: object) -> None:
    """Raises ValueError as `load` does, but for values, which only the policy itself can judge."""
    known = takes(name)
    for key in (key for key, value in options.items() if value is not None and key not in known):
        if key == "token_budget" and "cost" in known:
            raise ValueError(f"policy {name!r} takes no token_budget: it finds its own; take policy sarathi for a fixed one")
        raise ValueError(f"policy {name!r} takes no {key}; it takes {', '.join(known) or 'no options'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the known one that is nearest, if any is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _find(name: str) -> type:
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"policy {name!r}: {error}") from error
        if not isinstance(found, type) or not hasattr(found, "plan"):
            raise ValueError(f"policy {name!r} is not a class with a `plan` method")
        return found
    if name not in names():
        raise ValueError(f"unknown policy {name!r}{nearest(name, names())}; known: {', '.join(names())}, or package.module:Class")
    found = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    cls: type = getattr(found, name.title().replace("-", ""))
    return cls
