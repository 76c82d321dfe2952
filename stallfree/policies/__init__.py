"""Scheduling policies, one file each; this folder is their registry. It does not know what they do.

A policy's file holds one class with its name in capitals (`prefill-first` is `PrefillFirst` in `prefill_first.py`). Users write
others (`stallfree/user_classes.py`).
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import get_args, get_type_hints

from stallfree import user_classes
from stallfree.core.nearest import nearest
from stallfree.core.policy import Policy, Reserve, Setup


def names() -> list[str]:
    """The policies in this folder."""
    return sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[a-z]*.py"))


def takes(name: str) -> list[str]:
    """The names of the policy's own options. Raises ValueError as `load` does."""
    return list(_parameters(_find(name)))


def wants_setup(name: str) -> bool:
    """Whether the policy is made of a `Setup` (see `Tuned`). Raises ValueError as `load` does."""
    return hasattr(_find(name), "of")


def load(name: str, setup: Setup = Setup(), /, **options: object) -> Policy:  # noqa: B008  # it is frozen
    """Make the policy `name` of `setup`, if it wants that, and of its own `options`. Options that are None keep their defaults.

    Raises ValueError that names the nearest policy if there is none of this name, the file or module that cannot be used, or the
    options that the policy takes.
    """
    check(name, **options)
    cls = _find(name)
    values = {key: value for key, value in options.items() if value is not None}
    for key, parameter in _parameters(cls).items():
        if parameter.default is parameter.empty and key not in values:
            raise ValueError(f"policy {name!r} needs {key}, which was not given (--policy-option {key}=...)")
    make = getattr(cls, "of", None)
    policy: Policy = cls(**values) if make is None else make(setup, **values)
    for key, known in (("reserve", get_args(Reserve)), ("stall_free", (True, False))):
        if (value := getattr(policy, key)) not in known:
            raise ValueError(f"policy {name!r}: its {key} is {value!r}, expected {' or '.join(map(repr, known))}")
    return policy


def check(name: str, /, **options: object) -> None:
    """Raises ValueError as `load` does, but does not check the values, which only the policy can judge."""
    known = takes(name)
    for key in (key for key, value in options.items() if value is not None and key not in known):
        if key == "token_budget" and wants_setup(name):
            raise ValueError(f"policy {name!r} takes no token_budget: it finds its own; take policy sarathi for a fixed one")
        raise ValueError(f"policy {name!r} takes no {key}{nearest(key, known)}; it takes {', '.join(known) or 'no options'}")


def options(name: str, token_budget: int | None, texts: Iterable[str] | None) -> dict[str, object]:
    """A policy's own options from `texts`, each NAME=VALUE. `token_budget` is short for the option of this name. Raises ValueError
    as `check` does, and for a text or a value that cannot be read.
    """
    values: dict[str, object] = {} if token_budget is None else {"token_budget": token_budget}
    check(name, **values)
    for text in texts or ():
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"policy option {text!r} is not NAME=VALUE")
        if key in values:
            raise ValueError(f"policy option {key} is given twice; give it once")
        check(name, **{key: value})
        values[key] = _typed(name, key, value.strip())
    return values


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """The policy's own options: the parameters of `of` without the setup, or else those of the class."""
    of = getattr(cls, "of", None)
    return user_classes.parameters(cls if of is None else of, skip=of is not None)


def _typed(name: str, key: str, text: str) -> object:
    """An option's value, in the type of its annotation, or else of its default."""
    cls = _find(name)
    hints = get_type_hints(getattr(cls, "of", vars(cls).get("__init__", cls)))
    default = _parameters(cls)[key].default
    hint = hints.get(key, type(default))
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind in _READ]
    for kind in kinds:
        try:
            return _READ[kind](text)
        except (KeyError, ValueError):
            continue
    if not kinds:
        return text
    expected = " or ".join("true or false" if kind is bool else kind.__name__ for kind in kinds)
    raise ValueError(f"policy {name!r}: {key} is {text!r}, expected {expected}")


_READ: dict[type, Callable[[str], object]] = {bool: {"true": True, "false": False}.__getitem__, int: int, float: float, str: str}


def _find(name: str) -> type:
    if ":" in name:
        return user_classes.find("policy", name, method="plan", attributes=("reserve", "stall_free"))
    if name.endswith(".py"):
        raise ValueError(f"policy {name!r} is a file; name the class in it: {name}:Class")
    if name not in names():
        known = f"known: {', '.join(names())}; or {user_classes.FORMS}"
        raise ValueError(f"unknown policy {name!r}{nearest(name, names())}; {known}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    policy: type = getattr(module, name.title().replace("-", ""))
    return policy
