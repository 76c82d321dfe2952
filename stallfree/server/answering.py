"""From a query to an answer, for every API: its tenant is charged, its grammar is compiled, its requests go to the engine, and its
outputs to the client."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from stallfree.core import request as core
from stallfree.engine.prefetch import Transfer
from stallfree.engine.thread import Outputs, TooLate, Unavailable
from stallfree.server import intake, targets
from stallfree.server.dialects.call import Call, Choice
from stallfree.server.errors import ApiError
from stallfree.server.intake import CUT, HERE, PREFILL
from stallfree.server.reading import Query
from stallfree.server.request_log import Entry
from stallfree.server.schema import CompletionRequest
from stallfree.server.service import Service
from stallfree.server.sse import EventStream, watching
from stallfree.transfer.cut import WHOLE, Cut

Kind = TypeVar("Kind", bound=Call)


async def ask(service: Service, kind: type[Kind], query: Query, request: Request) -> Kind:
    """Queue the requests of `query`, if its tenant's limits allow it, once its grammar is compiled. The call's class, `kind`,
    writes the answer. Raises ApiError for a class or target that cannot be promised."""
    entry, body = Entry.of(request.scope), query.body
    tenant = service.tenants.of(entry.key, body.user or body.safety_identifier, request.headers)
    promise = targets.promise(body, request.headers, service.classes, service.live.slo, tenant.service_class)
    number = len(query.prompts) * (body.n or 1)
    try:
        charge = service.tenants.take(tenant, number, intake.tokens(query), service.engine.clock())
    except ApiError as refusal:
        service.refused(tenant.name, "limit")
        raise intake.over_limit(refusal, body).renamed(kind.fields) from None
    try:
        constraints = () if query.grammar is None else await service.grammars.constraints(query.grammar, number)
        adapter = service.models.adapter(body.model)
        namespace = service.tenants.namespace(entry.key)
        requests = intake.requests(service.engine, query, tenant, promise, adapter, constraints, namespace=namespace)
        outputs = _submit(service, kind, query, requests, request)
    except Unavailable as refusal:
        charge.cancel()
        service.refused(tenant.name, "late" if isinstance(refusal, TooLate) else "queue")
        raise
    except BaseException:
        charge.cancel()
        raise
    call = kind(
        body.model if adapter and body.model else service.name,
        service.engine.text,
        outputs,
        _choices(query, requests),
        len(requests) // len(query.prompts),
        entry,
        service_tier=promise.answered,
    )
    call.ended = lambda: charge.settle(call.prompt_tokens + call.completion_tokens, service.engine.clock())
    return call


async def answer(call: Call, request: Request, *, stream: bool) -> Response:
    """The answer of `call`, whole or as a stream."""
    if stream:
        return _Stream(call)
    try:
        async with watching(call.outputs, request.receive):
            return Response(await call.whole(), media_type="application/json")
    finally:
        call.ended()


class _Stream(EventStream):
    """A stream that says when its call has ended."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.ended()


def _submit(service: Service, kind: type[Call], query: Query, requests: Sequence[core.Request], request: Request) -> Outputs:
    """Queue these requests of `query`. Raises ApiError if they can never be served."""
    if service.traces is not None:
        service.traces.note_call([r.id for r in requests], kind.operation, request.headers)
    try:
        transfer = _transfers(service, request.headers.get(PREFILL), request.headers.get(CUT))
        if intake.prompt_logprobs(query.body) is not None:
            transfer = _nowhere  # the logits of the whole prompt are needed here
        slo = query.body.slo
        serve_late = service.serve_late if slo is None or slo.on_late is None else slo.on_late == "serve"
        return service.thread.submit(
            requests, intake.reading(query), transfer=transfer, serve_late=serve_late or transfer is not _nowhere
        )
    except core.Refused as refusal:
        raise intake.refused(refusal, query.body, [ids for ids, _ in query.prompts]).renamed(kind.fields) from None


def _choices(query: Query, requests: Sequence[core.Request]) -> list[Choice]:
    body, form = query.body, query.form
    n = len(requests) // len(query.prompts)
    return [
        Choice(
            index,
            each,
            query.prompts[index // n][1],
            form.parser(),
            hides_reasoning=form.hides_reasoning,
            parallel=form.parallel,
            is_echo=body.max_tokens == 0,
            echoes_scores=isinstance(body, CompletionRequest) and bool(body.echo) and body.logprobs is not None,
            shows_scores=body.prompt_logprobs is not None,
        )
        for index, each in enumerate(requests)
    ]


def _transfers(service: Service, name: str | None, cut: str | None) -> Callable[[core.Request], Transfer | None]:
    """A function that makes each request's KV transfer, or None. `name`: the prefill engine that the router chose. `cut`: how much
    of a request this one computes, in words.
    """
    try:
        wanted = WHOLE if cut is None else Cut.parse(cut)
    except ValueError as error:
        raise ApiError(400, f"{CUT}: {error}", param=CUT) from None
    if service.asking is not None and name != HERE:
        return service.asking.transfers(name, wanted)
    for header, value in ((PREFILL, name), (CUT, cut)):
        if value not in (None, HERE) and service.asking is None:
            raise ApiError(400, f"{header}: this server computes its prompts itself; it is not of --role decode", param=header)
    return _nowhere


def _nowhere(request: core.Request) -> None:
    """No transfer: the prompt is computed here."""
