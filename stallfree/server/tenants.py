"""Who shares the server: the tenants in a file, and whose each request is. The file can be read again while requests run.

It knows the file's format and the keys. What a tenant has used is in `allowance`; what a weight or a priority does, the scheduler
decides.
"""

import logging
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.types import Scope

from stallfree.core.classes import Classes
from stallfree.core.nearest import nearest
from stallfree.core.slo import Slo
from stallfree.server.allowance import Allowance, Charge, Tenant
from stallfree.server.errors import shown
from stallfree.server.keys import NAME, Keys, digest_of

log = logging.getLogger(__name__)

FAIRNESS = "x-llm-d-inference-fairness-id"
"""Header in which llm-d's gateway names whose a request is."""
LONGEST_NAME = 64
"""Characters of a tenant's name that a client chose. Names are kept while requests run."""
_DIGITS = "make them with `printf %s KEY | sha256sum`"


class Field(NamedTuple):
    """A value in the file. `fits`: whether a value is one. `form`: what it must be, in words."""

    fits: Callable[[Any], bool]
    form: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_LIMIT = Field(lambda value: _is_whole(value) and value >= 1, "a whole number from 1 on; leave it out for no limit")
FIELDS = {
    "weight": Field(
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value and math.isfinite(value),
        "a number above 0; leave it out for 1",
    ),
    "priority": Field(lambda value: _is_whole(value) and abs(value) < 2**31, "a whole number; lower is served first"),
    "class": Field(lambda value: isinstance(value, str), "the name of a class in --slo, in quotes"),
    "requests_per_minute": _LIMIT,
    "tokens_per_minute": _LIMIT,
    "running": _LIMIT,
}
"""The values of a tenant besides its keys. `class` is `Tenant.service_class`, the others have the names that they have there."""


class Tenants:
    """The tenants in `file`, and the `keys` that open the server: theirs and `others`. Without a file there are none, and whose a
    request is says its key or its client. Used in one thread.
    """

    def __init__(
        self,
        file: Path | None = None,
        others: Keys | None = None,
        classes: Classes | None = None,
        *,
        share_prefixes: bool = False,
    ):
        """`share_prefixes`: tenants find each other's cached prefixes. Raises ValueError for a file that cannot be read, or that
        says what cannot be. No message has a key or its digest."""
        self._file, self._others = file, others or Keys()
        self._share_prefixes = share_prefixes
        self._classes = classes or Classes({"": Slo()})
        self._allowances: dict[str, Allowance] = {}
        self._tenants: Mapping[str, Tenant] = {}
        self._keys = self._others
        if file is not None:
            log.setLevel(logging.INFO)  # who sends a signal wants to see what became of it
            self._read(file)

    def check(self, scope: Scope) -> str | None:
        """As `Keys.check`, with the keys that are in force."""
        return self._keys.check(scope)

    def reload(self) -> None:
        """Read the file again. If it cannot be used, the tenants stay as they are, and the log says why. Running requests go on."""
        if self._file is None:
            return
        try:
            self._read(self._file)
        except ValueError as error:
            log.warning("the tenants stay as they are: %s", error)
        else:
            log.info("--tenants %s is in force; tenants: %d", self._file, len(self._tenants))

    def of(self, key: str | None, user: str | None, headers: Headers) -> Tenant:
        """Whose a request is: the tenant of its key's name `key`. Without a key, the client says it: `user` of its body, or else
        the header `FAIRNESS`."""
        if key is not None:
            return self._tenants.get(key) or Tenant(key)
        return Tenant(_printable(user or headers.get(FAIRNESS, "")))

    def namespace(self, key: str | None) -> str:
        """Whose cached prefixes a request with this key's name may find: those of the same namespace. Otherwise the time to a first
        token would tell one tenant what another has asked. "": those of all who have no key."""
        return "" if key is None or self._share_prefixes else key

    def take(self, tenant: Tenant, choices: int, tokens: int, now: float) -> Charge:
        """Charge `tenant` for a request. See `Allowance.take`. Only tenants of the file are remembered."""
        allowance = self._allowances[tenant.name] if tenant.name in self._allowances else Allowance()
        return allowance.take(tenant, choices, tokens, now)

    def _read(self, file: Path) -> None:
        tenants, names = read(file, self._classes)
        for digest, name in self._others.names.items():
            if name in tenants:
                raise ValueError(f"{_at(file, name)}: --api-key or --api-key-file has a key of this name; rename one of them")
            if digest in names:
                raise ValueError(f"{_at(file, names[digest])}: a key is also that of {name!r} in --api-key or --api-key-file")
        self._allowances = {name: self._allowances.get(name) or Allowance() for name in tenants}
        self._tenants, self._keys = tenants, Keys({**self._others.names, **names})


def read(file: Path, classes: Classes) -> tuple[dict[str, Tenant], dict[bytes, str]]:
    """The tenants in `file` by their names, and the name of each of their keys by its SHA-256. Raises ValueError that names the
    file, the tenant, what is wrong and the way out. It never quotes what may be a key.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--tenants {file} cannot be read: {error.strerror}; name a file with tables [tenants.NAME]") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--tenants {file} is not UTF-8 text at byte {error.start}; write it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--tenants {file} is not TOML: {error}; see docs/operate.md for an example") from None
    for name in values:
        if name != "tenants":
            raise ValueError(f"--tenants {file}: unknown table {shown(name)}{nearest(name, ['tenants'])}; write [tenants.NAME]")
    tables = values.get("tenants")
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"--tenants {file} has no tenants; write a table [tenants.NAME] with keys for each")
    tenants: dict[str, Tenant] = {}
    names: dict[bytes, str] = {}
    for name, table in tables.items():
        if not NAME.fullmatch(name):
            raise ValueError(
                f"--tenants {file}: the name {shown(name)} must be 1 to {LONGEST_NAME} letters, digits, dots, dashes or underscores"
            )
        if not isinstance(table, dict):
            raise ValueError(f"{_at(file, name)} is no table; write [tenants.{name}]")
        tenants[name] = _tenant(file, name, table, classes)
        for number, digest in enumerate(_digests(file, name, table), 1):
            if digest in names:
                raise ValueError(f"{_at(file, name)}: keys has at place {number} a key of {names[digest]!r}; give each its own")
            names[digest] = name
    return tenants, names


def _tenant(file: Path, name: str, table: Mapping[str, Any], classes: Classes) -> Tenant:
    for key, value in table.items():
        if key == "keys":
            continue
        if key not in FIELDS:
            known = ", ".join(["keys", *FIELDS])
            raise ValueError(f"{_at(file, name)}: unknown key {shown(key)}{nearest(key, ['keys', *FIELDS])}; known are {known}")
        if not FIELDS[key].fits(value):
            raise ValueError(f"{_at(file, name)}: {key} is {shown(value)}; it must be {FIELDS[key].form}")
    service_class = table.get("class", "")
    if "class" in table:
        try:
            classes.find(service_class)
        except ValueError as error:
            raise ValueError(f"{_at(file, name)}: class: {error}") from None
    values = {key: value for key, value in table.items() if key in FIELDS and key != "class"}
    return replace(Tenant(name, priority=0, service_class=service_class), **values)


def _digests(file: Path, name: str, table: Mapping[str, Any]) -> list[bytes]:
    """The SHA-256 of each key of a tenant."""
    keys = table.get("keys")
    if not isinstance(keys, list) or not keys:
        raise ValueError(f'{_at(file, name)} has no keys; write keys = ["sha256=HEX"] with 64 hex digits, and {_DIGITS}')
    digests = []
    for number, key in enumerate(keys, 1):
        digest = digest_of(key) if isinstance(key, str) else None
        if digest is None:
            wrong = f"keys has at place {number} something else than sha256= and 64 hex digits"
            raise ValueError(f"{_at(file, name)}: {wrong}; {_DIGITS}")
        digests.append(digest)
    return digests


def _at(file: Path, name: str) -> str:
    return f"--tenants {file}, tenant {name!r}"


def _printable(name: str) -> str:
    """A client's name as it is kept: its first printable characters."""
    return "".join([character for character in name if character.isprintable()])[:LONGEST_NAME].strip()
