"""The live page's files, read once, and their response headers. The data that the page shows is not here.

`page/vendor` holds uPlot 1.6.32 (MIT, see its LICENSE) as its npm package ships it.
"""

from hashlib import sha256
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", "": "text/plain"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Cache-Control": "no-cache",  # browsers ask each time and get a 304: the next release has other files of the same names
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Files:
    """Every file of the page, by its path in `FOLDER`."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, dict[str, str]]] = {}
        for file in FOLDER.rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                headers = {"Content-Type": f"{TYPES[file.suffix]}; charset=utf-8", "ETag": f'"{sha256(content).hexdigest()[:16]}"'}
                self._files[file.relative_to(FOLDER).as_posix()] = content, HEADERS | headers

    def response(self, name: str, request: Request) -> Response:
        """The file, or 304 if the client has it. Raises HTTPException 404 for an unknown `name`."""
        if name not in self._files:
            raise HTTPException(404)
        content, headers = self._files[name]
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)
