"""Lets pages of other sites call the server from a browser (CORS, Fetch standard). It knows the origins, not the routes.

A browser asks before most requests of a page (the preflight), without a key. So this is outside the door.
"""

import re
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

_ORIGIN = re.compile(r"https?://(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_USUAL_PORTS = {"http://": ":80", "https://": ":443"}

EXPOSED = ("X-Request-Id", "Retry-After")
"""Response headers that a page may read, beyond those that every page may."""


def check(origins: Sequence[str]) -> None:
    """Raises ValueError for an entry that is neither `*` nor an origin as a browser sends it (RFC 6454, section 6.2)."""
    for origin in origins:
        match = _ORIGIN.fullmatch(origin)
        unusual = match is None or (match[1] is not None and not 0 < int(match[1]) < 65536)
        if origin != "*" and unusual:
            form = "write http://host or https://host:port, in lower case and without a path"
            raise ValueError(f"--allow-origin {origin!r} is not an origin; {form}; or * for all")
        for scheme, port in _USUAL_PORTS.items():
            if origin.startswith(scheme) and origin.endswith(port):
                raise ValueError(f"--allow-origin {origin!r}: browsers leave out {port}; write {origin.removesuffix(port)}")


def allow(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these `origins` (`*`: of all) call `app`. Call it after all middleware that answers with errors was added."""
    app.add_middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=EXPOSED
    )
