"""Scheduling policies, one file each; this folder is their registry. It does not know what they do.

A policy's file holds one class with its name in capitals (`prefill-first` is `PrefillFirst` in `prefill_first.py`). A policy from
elsewhere is named `path/to/file.py:Class`, or `package.module:Class`; the module may be in the current folder.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

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
    parameters = inspect.signature(cls if of is None else of).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: parameter for key, parameter in list(parameters.items())[of is not None :] if parameter.kind in named}


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
    place, colon, attribute = name.rpartition(":")
    if colon:
        module = _module(name, place)
        file = module.__file__ or place
        own = [key for key, value in vars(module).items() if isinstance(value, type) and hasattr(value, "plan")]
        cls = getattr(module, attribute, None)
        if cls is None:
            has = f"it has {', '.join(own)}" if own else "it has no class with a method `plan`"
            raise ValueError(f"policy {name!r}: {file} has no {attribute!r}{nearest(attribute, own)}; {has}")
        if not isinstance(cls, type) or not callable(getattr(cls, "plan", None)):
            raise ValueError(f"policy {name!r}: {attribute} in {file} is not a class with a method `plan`")
        if lacks := [key for key in ("reserve", "stall_free") if not hasattr(cls, key)]:
            raise ValueError(f"policy {name!r}: {attribute} in {file} has no {lacks[0]}; see docs/extending.md")
        return cls
    if name.endswith(".py"):
        raise ValueError(f"policy {name!r} is a file; name the class in it: {name}:Class")
    if name not in names():
        known = f"known: {', '.join(names())}; or path/to/file.py:Class, package.module:Class"
        raise ValueError(f"unknown policy {name!r}{nearest(name, names())}; {known}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    policy: type = getattr(module, name.title().replace("-", ""))
    return policy


def _module(name: str, place: str) -> ModuleType:
    """The module of the policy `name`; `place` is a file or a dotted module name. Raises ValueError if it cannot be imported."""
    try:
        return _of_file(place) if place.endswith(".py") else _of_name(place)
    except FileNotFoundError:
        folder = Path(place).parent
        near = nearest(Path(place).name, (file.name for file in folder.glob("*.py")))
        raise ValueError(f"policy {name!r}: there is no file {place}{near}") from None
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            where = f"{place.replace('.', '/')}.py in {Path.cwd()}"
            raise ValueError(f"policy {name!r}: there is no module {error.name}, and no {where}") from None
        raise ValueError(f"policy {name!r}: {_raised(error)}") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(f"policy {name!r}: {_raised(error)}") from error


def _of_name(place: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"{place!r} is neither a module nor a file that ends in .py")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that no file there hides a library
    return importlib.import_module(place)


def _of_file(place: str) -> ModuleType:
    """The module of a file, which runs once per process. Its name has a hash of the path, so that equal file names differ."""
    path = Path(place).expanduser().resolve(strict=True)
    name = f"{path.stem}_{sha256(bytes(path)).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} cannot be imported")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _raised(error: BaseException) -> str:
    """Where and why the import of a user's module failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    where = f"{frames[0].filename}, line {frames[0].lineno}: " if frames else ""
    return f"{where}{type(error).__name__}: {error}" if frames else str(error)
