"""Scheduling policies, one file each; this folder is their registry. It does not know what they do.

A policy's file holds one class with its name in capitals (`prefill-first` is `PrefillFirst` in `prefill_first.py`). One from
elsewhere is named `path/to/file.py:Class`, or `package.module:Class`, also of a module in the current folder.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import get_args

from stallfree.core.nearest import nearest
from stallfree.core.policy import Policy, Reserve


def names() -> list[str]:
    """The policies in this folder."""
    return sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[a-z]*.py"))


def takes(name: str) -> list[str]:
    """The options of policy `name`, or of one from elsewhere. Raises ValueError as `load` does."""
    return list(inspect.signature(_find(name)).parameters)


def load(name: str, **options: object) -> Policy:
    """Make the policy `name`, or one from elsewhere, with those of `options` that are not None.

    Raises ValueError naming the nearest policy if there is none of that name, the file of one from elsewhere that cannot be used,
    or the options that it does take.
    """
    check(name, **options)
    found = _find(name)
    needed = [
        key for key, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and options.get(key) is None
    ]  # fmt: skip
    if needed:
        raise ValueError(f"policy {name!r} needs {needed[0]}, which was not given")
    policy: Policy = found(**{key: value for key, value in options.items() if value is not None})
    for key, known in (("reserve", get_args(Reserve)), ("stall_free", (True, False))):
        if (value := getattr(policy, key)) not in known:
            raise ValueError(f"policy {name!r}: its {key} is {value!r}, expected {' or '.join(map(repr, known))}")
    return policy


def check(name: str, **options: object) -> None:
    """Raises ValueError as `load` does, but for values, which only the policy itself can judge."""
    known = takes(name)
    for key in (key for key, value in options.items() if value is not None and key not in known):
        if key == "token_budget" and "cost" in known:
            raise ValueError(f"policy {name!r} takes no token_budget: it finds its own; take policy sarathi for a fixed one")
        raise ValueError(f"policy {name!r} takes no {key}; it takes {', '.join(known) or 'no options'}")


def _find(name: str) -> type:
    place, colon, attribute = name.rpartition(":")
    if colon:
        module = _module(name, place)
        file = module.__file__ or place
        own = [key for key, value in vars(module).items() if isinstance(value, type) and hasattr(value, "plan")]
        found = getattr(module, attribute, None)
        if found is None:
            has = f"it has {', '.join(own)}" if own else "it has no class with a method `plan`"
            raise ValueError(f"policy {name!r}: {file} has no {attribute!r}{nearest(attribute, own)}; {has}")
        if not isinstance(found, type) or not callable(getattr(found, "plan", None)):
            raise ValueError(f"policy {name!r}: {attribute} in {file} is not a class with a method `plan`")
        if lacks := [key for key in ("reserve", "stall_free") if not hasattr(found, key)]:
            raise ValueError(f"policy {name!r}: {attribute} in {file} has no {lacks[0]}; see docs/extending.md")
        return found
    if name.endswith(".py"):
        raise ValueError(f"policy {name!r} is a file; name the class in it: {name}:Class")
    if name not in names():
        known = f"known: {', '.join(names())}; or path/to/file.py:Class, package.module:Class"
        raise ValueError(f"unknown policy {name!r}{nearest(name, names())}; {known}")
    found = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    cls: type = getattr(found, name.title().replace("-", ""))
    return cls


def _module(name: str, place: str) -> ModuleType:
    """The module at `place` of the policy `name`: a file, or the dotted name of what can be imported."""
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
    except (Exception, SystemExit) as error:  # what a file does when it is imported is its author's
        raise ValueError(f"policy {name!r}: {_raised(error)}") from error


def _of_name(place: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"{place!r} is neither a module nor a file that ends in .py")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that no file there is taken for a library
    return importlib.import_module(place)


def _of_file(place: str) -> ModuleType:
    """The module of a file, which is run once a process; its name is its path's, so that two of one name are two."""
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
    """Where and why the import of somebody's module failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    where = f"{frames[0].filename}, line {frames[0].lineno}: " if frames else ""
    return f"{where}{type(error).__name__}: {error}" if frames else str(error)
