"""Every error is answered with OpenAI's error object, `{"error": {"message", "type", "param", "code"}}`, and the fitting status.

It knows HTTP and the exceptions of the layers below; it does not know what the routes do.
"""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from stallfree.engine.text import TextError
from stallfree.engine.thread import TooLate, Unavailable
from stallfree.grammar.compiling import Busy, GrammarError

UNKNOWN_PARAMETER, UNSUPPORTED_PARAMETER = "unknown_parameter", "unsupported_parameter"
"""Error codes for unknown fields, and for OpenAI's fields that this server does not serve."""
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
MESSAGES = "/v1/messages"
"""The paths of Anthropic's API begin with this."""
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 3


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


class AnthropicError(BaseModel):
    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    type: Literal["error"]
    error: AnthropicError


_MEANINGS: dict[int | str, str] = {
    400: "The request is at fault; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "No such route or model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full, a tenant's limit is exceeded, or the first token would come too late. Try again after the seconds in "
    "`Retry-After`.",
    500: "The engine failed this request.",
    503: "The server is shutting down, its engine has failed, or too many large bodies are arriving.",
    "default": "Any other error.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}
"""Error answers that every route may give, for the OpenAPI schema."""
ANTHROPIC_RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": AnthropicErrorBody} for status in _MEANINGS}
"""The same for the routes of Anthropic's API."""


class ApiError(Exception):
    """An error for the client: its HTTP `status`, and the field `param` that is at fault, if one is. `details`: numbers that a
    program wants, by name; they are beside the message in the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, float] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers
        self.details = dict(details or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _api_error, (self.status, self.message, self.param, self.code, self.headers)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The error for an API that has other `names` for a chat's fields. A message's number is left out, because the translation
        may have other messages than the request."""
        name = (self.param or "").partition(".")[0].partition("[")[0]
        if name not in names:
            return self
        inner = re.sub(r"^messages(\[[0-9]+\])?", "messages", self.param or "")
        param = names[name] + inner[len(name) :]
        place = f"a message in {param}" if inner == "messages" != self.param else param
        message = self.message.replace(self.param or "", place, 1)
        return type(self)(self.status, message, param=param, code=self.code, headers=self.headers)

    def body(self, *, anthropic: bool = False) -> bytes:
        """The error object as JSON, in OpenAI's form or in Anthropic's. It is ASCII, so that half a surrogate pair in a client's
        field name cannot break it."""
        if anthropic:
            kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return json.dumps({"type": "error", "error": {"type": kind, "message": self.message, **self.details}}).encode()
        type_ = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": type_, "param": self.param, "code": self.code, **self.details}
        return json.dumps({"error": error}).encode()

    def response(self, route: str) -> Response:
        """The answer on the path `route`, which decides about its form."""
        return Response(self.body(anthropic=route.startswith(MESSAGES)), self.status, self.headers, "application/json")


def _api_error(status: int, message: str, param: str | None, code: str | None, headers: Mapping[str, str] | None) -> ApiError:
    """Unpickle an error that was raised in another process."""
    return ApiError(status, message, param=param, code=code, headers=headers)


def shown(value: object) -> str:
    """A client's value for an error message: printable, and shortened to about 80 characters."""
    return _short.repr(value)


def unavailable(error: Unavailable) -> ApiError:
    if error.retry_after is None:
        return ApiError(503, str(error), code="unavailable")
    headers = {"Retry-After": str(error.retry_after)}
    if isinstance(error, TooLate):
        times = {"predicted_ttft_ms": round(1000 * error.late.predicted, 1), "target_ttft_ms": round(1000 * error.late.target, 1)}
        return ApiError(429, str(error), code="too_late", headers=headers, details=times)
    return ApiError(429, str(error), code="queue_full", headers=headers)


def install(app: FastAPI) -> None:
    """Make `app` answer with an error object when a client is at fault, or the engine is unavailable for a while."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response(request.scope["path"])

    @app.exception_handler(GrammarError)
    async def no_grammar(request: Request, error: GrammarError) -> Response:
        return ApiError(400, str(error), param=error.field, code="invalid_grammar").response(request.scope["path"])

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return ApiError(429, str(error), code="grammars_busy", headers={"Retry-After": "1"}).response(request.scope["path"])

    @app.exception_handler(TextError)
    async def text_error(request: Request, error: TextError) -> Response:
        return ApiError(400, str(error), param="messages").response(request.scope["path"])

    @app.exception_handler(Unavailable)
    async def not_now(request: Request, error: Unavailable) -> Response:
        return unavailable(error).response(request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors(), error.body).response(request.scope["path"])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = shown(request.scope["path"])  # not request.url, which fails if the Host header is invalid
        message = {
            404: f"there is no route {path}",
            405: f"{request.method} is not allowed on {path}",
            400: "the body cannot be read",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response(request.scope["path"])


def path(*steps: str | int) -> str:
    """The place of a value in a body, such as messages[2].content[0].type or logit_bias["12"]."""
    written = ""
    for step in steps:
        if isinstance(step, int):
            written += f"[{step}]"
        elif step.isascii() and step.isidentifier():
            written += f".{step[:80]}" if written else step[:80]
        else:
            written += f"[{json.dumps(step[:80])}]" if written else step[:80]
    return written


def of_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The error for the first field at fault, with all that would be valid there (a union fails once for each member)."""
    first = errors[0]
    if not isinstance(body, dict) and first["loc"] == ("body",):
        return ApiError(400, "the body is empty or not a JSON object", code="invalid_json")
    error, steps = _nearest([_Fault.of(error, body) for error in errors])
    where, type_ = path(*steps), error["type"]
    if type_ in (UNKNOWN_PARAMETER, UNSUPPORTED_PARAMETER):
        name, near = error["ctx"]["name"], error["ctx"].get("near")
        where = path(*steps, name)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"unknown field {where!r}{hint}" if type_ == UNKNOWN_PARAMETER else f"{where} is not supported by this server"
        return ApiError(400, message, param=where, code=type_)
    if type_ == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    own = [e for e in errors if _Fault.of(e, body).steps == steps]
    fitting = [e for e in own if not str(e["type"]).endswith("_type")] or own  # in a union, members of the value's type
    messages = [str(e["msg"]).removeprefix("Value error, ") for e in fitting]
    reasons = dict.fromkeys(message[:1].lower() + message[1:] for message in messages)
    return ApiError(400, f"{where}: {' or '.join(list(reasons)[:4])}, not {shown(error['input'])}", param=where)


class _Fault(NamedTuple):
    """A validation error. `steps`: its place in the body. `member`: the names that pydantic adds to the place for the member of a
    union that was tried. `union`: the steps to the first union on the way.
    """

    error: Mapping[str, Any]
    steps: tuple[str | int, ...]
    member: tuple[str, ...]
    union: tuple[str | int, ...]

    @classmethod
    def of(cls, error: Mapping[str, Any], body: Any) -> Self:
        kind, *location = error["loc"]
        steps: list[str | int] = []
        member: list[str] = []
        union: tuple[str | int, ...] | None = None
        for number, step in enumerate(location):
            if (isinstance(body, dict) and step in body) or (isinstance(body, list) and step in range(len(body))):
                body = body[step]
                steps.append(step)
            elif kind != "body" or (error["type"] == "missing" and number == len(location) - 1):
                steps.append(step)
            else:
                member.append(str(step))
                union = tuple(steps) if union is None else union
        return cls(error, tuple(steps), tuple(member), tuple(steps) if union is None else union)


def _nearest(errors: Sequence[_Fault]) -> tuple[Mapping[str, Any], tuple[str | int, ...]]:
    """The first error and its place. In a union that of the member that fits best: deepest in the body, with fewest errors."""
    first = errors[0]
    members: dict[tuple[str, ...], list[_Fault]] = {}
    for error in errors:
        if error.union == first.union and bool(error.member) == bool(first.member):
            members.setdefault(error.member, []).append(error)

    def misfit(own: list[_Fault]) -> tuple[int, int, int]:
        last = own[0].steps[-1] if own[0].steps else 0
        return -max(len(error.steps) for error in own), len(own), -last if isinstance(last, int) else 0

    best = min(members.values(), key=misfit)[0]
    return best.error, best.steps
