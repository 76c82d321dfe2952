"""The API keys that open the server, by name. Of each key only its SHA-256 stays in memory.

It knows the two headers that carry a key, and the format of a file of keys. It does not know what a key may do.
"""

import hmac
import re
import stat
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Self

from starlette.types import Scope

from stallfree.server.errors import ApiError

ALONE = "default"
"""The name of the key that --api-key gives: this option has no room for a name."""

FORMS = "write name:key, or name:sha256=HEX with the 64 hex digits of the key's SHA-256"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What may be the name of a key. Names are in the log and in metrics."""
_DIGEST = re.compile(r"sha256=([0-9a-fA-F]{64})")


class Keys:
    """`names` has the name of each key, by the key's SHA-256, 32 bytes. Several keys may have the same name. Without any key,
    requests need none."""

    def __init__(self, names: Mapping[bytes, str] | None = None):
        self._names = dict(names or {})

    def __bool__(self) -> bool:
        return bool(self._names)

    @property
    def names(self) -> Mapping[bytes, str]:
        """The name of each key, by its SHA-256."""
        return self._names

    @classmethod
    def of(cls, key: str | None, file: Path | None = None) -> Self:
        """The `key` of --api-key, named `ALONE`, and those in the `file` of --api-key-file. Raises ValueError for an empty key, and
        for a file that cannot be read, has no keys or has a bad line. No message has a key.
        """
        names = {} if file is None else {digest: name for name, digest in _read(file).items()}
        if key is not None:
            if not key:
                raise ValueError("--api-key is empty; give a key, or leave the option out")
            if ALONE in names.values():
                raise ValueError(f"--api-key-file {file} has a key named {ALONE!r}, the name of --api-key; rename it in the file")
            names.setdefault(sha256(key.encode()).digest(), ALONE)
        return cls(names)

    def check(self, scope: Scope) -> str | None:
        """The name of the key in a request's headers, `Authorization: Bearer KEY` or `x-api-key: KEY`; None if no key is needed.
        Raises ApiError if it has no key, or a wrong one. The time that this takes tells nothing about the keys.
        """
        if not self._names:
            return None
        headers = dict(scope["headers"])
        names = [name for key in _sent(headers) if (name := self._name(key)) is not None]
        if names:
            return names[0]
        absent = not headers.keys() & {b"authorization", b"x-api-key"}
        fault = "missing: send `Authorization: Bearer <key>` or `x-api-key: <key>`" if absent else "wrong"
        raise ApiError(401, f"the API key is {fault}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _name(self, key: bytes) -> str | None:
        """The name of `key`. Every digest is compared in full, so that the time does not depend on which one matches."""
        digest = sha256(key).digest()
        same = [name for known, name in self._names.items() if hmac.compare_digest(digest, known)]
        return same[0] if same else None


def digest_of(text: str) -> bytes | None:
    """The 32 bytes in "sha256=HEX", a key's SHA-256; None if the text is anything else."""
    match = _DIGEST.fullmatch(text)
    return None if match is None else bytes.fromhex(match[1])


def open_to_others(file: Path) -> bool:
    """Whether users other than the owner and the group of `file` may read or write it. Raises OSError if it is not there."""
    return bool(file.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))


def _sent(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """The keys in a request's headers."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    keys = [bearer.strip(), headers.get(b"x-api-key", b"")] if scheme.lower() == b"bearer" else [headers.get(b"x-api-key", b"")]
    return [key for key in keys if key]


def _read(file: Path) -> dict[str, bytes]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--api-key-file {file} cannot be read: {error.strerror}; name a file with lines name:key") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--api-key-file {file} is not UTF-8 text at byte {error.start}; {FORMS}") from None
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, digest = _key(text, f"--api-key-file {file}, line {number}")
        if name in digests:
            raise ValueError(f"--api-key-file {file}, line {number}: the name {name!r} is there twice; give each key its own")
        if digest in digests.values():
            raise ValueError(f"--api-key-file {file}, line {number}: {name!r} has the key of an earlier line; give it its own")
        digests[name] = digest
    if not digests:
        raise ValueError(f"--api-key-file {file} has no keys; {FORMS}")
    return digests


def _key(text: str, where: str) -> tuple[str, bytes]:
    """The name and the digest in a line. The messages do not quote the line: a part of it is a secret."""
    name, colon, key = text.partition(":")
    name, key = name.strip(), key.strip()
    if not colon:
        raise ValueError(f"{where}: there is no colon; {FORMS}")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{where}: the name before the colon must be 1 to 64 letters, digits, dots, dashes or underscores; {FORMS}"
        )
    if not key:
        raise ValueError(f"{where}: {name!r} has no key; {FORMS}")
    if key.startswith("sha256="):
        if (digest := digest_of(key)) is None:
            raise ValueError(
                f"{where}: after sha256= of {name!r} there are not 64 hex digits; make them with `printf %s KEY | sha256sum`"
            )
        return name, digest
    if not key.isprintable() or " " in key:
        raise ValueError(f"{where}: the key of {name!r} has a space or a character that cannot be printed; take these out")
    return name, sha256(key.encode()).digest()
