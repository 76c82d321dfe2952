"""Classes that users write and name on the command line: `path/to/file.py:Class`, or `package.module:Class`, also of a module in
the current folder. It does not know what they are for.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from stallfree.core.nearest import nearest

FORMS = "path/to/file.py:Class, package.module:Class"
"""How such a class is named, for messages."""


def find(kind: str, name: str, *, method: str, attributes: Sequence[str] = ()) -> type:
    """The class `name`, a `kind` (policy, executor), which has `method` and `attributes`. Raises ValueError that names the file and
    what it lacks.
    """
    place, _, attribute = name.rpartition(":")
    what = f"{kind} {name!r}"
    module = _module(what, place)
    file = module.__file__ or place
    own = [key for key, value in vars(module).items() if isinstance(value, type) and hasattr(value, method)]
    cls = getattr(module, attribute, None)
    if cls is None:
        has = f"it has {', '.join(own)}" if own else f"it has no class with a method `{method}`"
        raise ValueError(f"{what}: {file} has no {attribute!r}{nearest(attribute, own)}; {has}")
    if not isinstance(cls, type) or not callable(getattr(cls, method, None)):
        raise ValueError(f"{what}: {attribute} in {file} is not a class with a method `{method}`")
    if lacks := [key for key in attributes if not hasattr(cls, key)]:
        raise ValueError(f"{what}: {attribute} in {file} has no {lacks[0]}; see docs/extending.md")
    return cls


def parameters(make: Callable[..., object], skip: int) -> dict[str, inspect.Parameter]:
    """The parameters of `make` that can be given by name, without the first `skip`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: each for key, each in list(inspect.signature(make).parameters.items())[skip:] if each.kind in named}


def _module(what: str, place: str) -> ModuleType:
    """The module at `place`, a file or a dotted module name. Raises ValueError if it cannot be imported."""
    try:
        return _of_file(place) if place.endswith(".py") else _of_name(place)
    except FileNotFoundError:
        folder = Path(place).parent
        near = nearest(Path(place).name, (file.name for file in folder.glob("*.py")))
        raise ValueError(f"{what}: there is no file {place}{near}") from None
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            where = f"{place.replace('.', '/')}.py in {Path.cwd()}"
            raise ValueError(f"{what}: there is no module {error.name}, and no {where}") from None
        raise ValueError(f"{what}: {_raised(error)}") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(f"{what}: {_raised(error)}") from error


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
