"""A certificate and its private key, checked before the model loads. It knows files and OpenSSL's errors, and serves nothing."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Tls:
    """The PEM files of a `certificate` (its chain below it) and of its private `key`, which match and can be read."""

    certificate: Path
    key: Path

    @classmethod
    def of(cls, certificate: Path | None, key: Path | None) -> Self | None:
        """The pair of --tls-certificate and --tls-key; None without either. Raises ValueError if one is missing, if a file cannot
        be read or is not PEM, if the key is encrypted, and if the two do not match. The message names both files.
        """
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            given, missing = ("--tls-key", "--tls-certificate") if certificate is None else ("--tls-certificate", "--tls-key")
            raise ValueError(f"{given} {certificate or key} needs its other half; give {missing} too, or neither")
        if (fault := _fault(certificate, key)) is not None:
            raise ValueError(f"--tls-certificate {certificate} and --tls-key {key}: {fault}")
        return cls(certificate, key)


def _fault(certificate: Path, key: Path) -> str | None:
    for file, option in ((certificate, "--tls-certificate"), (key, "--tls-key")):
        try:
            file.read_bytes()
        except OSError as error:
            return f"{file} cannot be read ({error.strerror}); name a PEM file with {option}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_refuse)
    except _Encrypted:
        return f"the key is encrypted, and the server cannot ask for its password; write a plain one with `openssl pkey -in {key}`"
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            return "the key is not the certificate's; name the key that the certificate was made with"
        why = f" ({error.reason})" if error.reason else ""
        return f"they are not a certificate and a private key in PEM that OpenSSL takes{why}; name the PEM files"
    return None


class _Encrypted(Exception):
    """OpenSSL asks for a password."""


def _refuse() -> str:
    raise _Encrypted
