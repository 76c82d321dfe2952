"""From a query to an answer, for every API: its grammar is compiled, its requests go to the engine, and its outputs to the
client."""

from collections.abc import Callable
from typing import TypeVar

from fastapi import Request, Response

from stallfree.core.request import Refused
from stallfree.engine.prefetch import Transfer
from stallfree.server import intake
from stallfree.server.dialects.call import Call, Choice
from stallfree.server.errors import ApiError
from stallfree.server.intake import HERE, PREFILL
from stallfree.server.reading import Query
from stallfree.server.request_log import Entry
from stallfree.server.schema import CompletionRequest
from stallfree.server.service import Service
from stallfree.server.sse import EventStream, watching

Kind = TypeVar("Kind", bound=Call)


async def ask(service: Service, kind: type[Kind], query: Query, request: Request) -> Kind:
    """Queue the requests of `query`, once its grammar is compiled. The call's class, `kind`, writes the answer."""
    body, prompts, form = query.body, query.prompts, query.form
    targets = intake.targets(body, request.headers, service.live.slo)
    number = len(prompts) * (body.n or 1)
    constraints = () if query.grammar is None else await service.grammars.constraints(query.grammar, number)
    requests = intake.requests(service.engine, query, targets, constraints)
    n = len(requests) // len(prompts)
    if service.traces is not None:
        service.traces.note_call([r.id for r in requests], kind.operation, request.headers)
    try:
        transfer = _transfers(service, request.headers.get(PREFILL))
        if intake.prompt_logprobs(body) is not None:
            transfer = _nowhere  # the logits of the whole prompt are needed here
        outputs = service.thread.submit(requests, intake.reading(query), transfer=transfer)
    except Refused as refusal:
        raise intake.refused(refusal, body, [ids for ids, _ in prompts]).renamed(kind.fields) from None
    choices = [
        Choice(
            index,
            each,
            prompts[index // n][1],
            form.parser(),
            hides_reasoning=form.hides_reasoning,
            parallel=form.parallel,
            is_echo=body.max_tokens == 0,
            echoes_scores=isinstance(body, CompletionRequest) and bool(body.echo) and body.logprobs is not None,
            shows_scores=body.prompt_logprobs is not None,
        )
        for index, each in enumerate(requests)
    ]
    return kind(service.name, service.engine.text, outputs, choices, n, Entry.of(request.scope))


async def answer(call: Call, request: Request, *, stream: bool) -> Response:
    """The answer of `call`, whole or as a stream."""
    if stream:
        return EventStream(call)
    async with watching(call.outputs, request.receive):
        return Response(await call.whole(), media_type="application/json")


def _transfers(service: Service, name: str | None) -> Callable[[], Transfer | None]:
    """A function that makes each request's KV transfer, or None. `name`: the prefill engine that the router chose."""
    if service.asking is not None and name != HERE:
        return service.asking.transfers(name)
    if name not in (None, HERE):
        raise ApiError(400, f"{PREFILL}: this server computes its prompts itself; it is not of --role decode", param=PREFILL)
    return _nowhere


def _nowhere() -> None:
    """No transfer: the prompt is computed here."""
