"""Makes the engine's requests from a body: missing fields get their defaults, and contradicting fields are refused.

`schema` defines the bodies and `reading` reads them. Whether a request fits, the scheduler decides.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from stallfree.core.request import Refused, Request
from stallfree.engine.engine import Engine
from stallfree.engine.streams import Reading
from stallfree.executors.sampling import Constraint
from stallfree.server.allowance import Tenant
from stallfree.server.errors import ApiError
from stallfree.server.reading import Query, check_ids
from stallfree.server.schema import ChatRequest, CompletionRequest, Generation
from stallfree.server.targets import Promise

COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` for completions; for a chat it is all that fits."""

MOST_SCORES = 500_000
"""Log-probabilities of prompts in one answer. Each takes some 100 bytes until the answer is sent."""

PREFILL = "x-stallfree-prefill"
"""Header in which a router names the prefill engine (host:port) that computes a request's prompt, or `HERE`."""
HERE = "none"
"""Value of that header: the server itself computes the prompt."""
CUT = "x-stallfree-cut"
"""Header that says how many of a request's first tokens the prefill engine computes (`transfer.cut`); without it, its prompt."""


def requests(
    engine: Engine,
    query: Query,
    tenant: Tenant,
    promise: Promise,
    adapter: str = "",
    constraints: Sequence[Constraint] = (),
    *,
    namespace: str = "",
) -> list[Request]:
    """`n` requests for each prompt of `query`, of this `tenant`, with what it is promised and for this `adapter`. Choice k of a
    prompt samples with `seed` + k. `constraints`: one for each of them, or none. Sampling that the body leaves open is the engine's
    default. They find cached prefixes of the same `namespace` and the same `cache_salt` only. Raises ApiError for fields that
    contradict each other.
    """
    body = query.body
    n = 1 if body.n is None else body.n
    max_tokens, _ = _max_tokens(body)
    min_tokens = body.min_tokens or 0
    priority = tenant.priority_of(body.priority)
    _check(query, n)
    check_ids(body.stop_token_ids or [], engine.text, "stop_token_ids")
    stop_ids = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else engine.text.eos_ids)
    fields = {
        name: value
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    fields |= {"logit_bias": query.bias, "logprobs": _logprobs(body), "prompt_logprobs": prompt_logprobs(body)}
    fields |= {"min_tokens": min_tokens, "stop_ids": stop_ids} | ({} if body.top_k is None else {"top_k": max(0, body.top_k)})
    seed = secrets.randbits(48) if body.seed is None else body.seed
    samplings = [replace(engine.sampling, seed=seed + k, **fields) for k in range(n)]
    salt = body.cache_salt or ""
    if namespace:
        salt = f"{namespace}\0{salt}"  # no namespace has a zero
    arrival = engine.clock()
    requests: list[Request] = []
    for prompt, _ in query.prompts:
        room = max(1, engine.scheduler.ledger.max_len - len(prompt))
        default = min(COMPLETION_TOKENS, room) if isinstance(body, CompletionRequest) else room
        for sampling in samplings:
            if constraints:
                sampling = replace(sampling, constraint=constraints[len(requests)])
            requests.append(
                Request(
                    secrets.token_hex(12),
                    prompt,
                    default if max_tokens is None else max(1, max_tokens),  # 0 asks for the prompt alone
                    stop_ids=stop_ids,
                    min_tokens=min_tokens,
                    arrival=arrival,
                    priority=priority,
                    tenant=tenant.name,
                    weight=tenant.weight,
                    slo=promise.slo,
                    service_class=promise.service_class,
                    adapter=adapter,
                    salt=salt,
                    sampling=sampling,
                )
            )
    return requests


def tokens(query: Query) -> int:
    """The tokens that a query asks for: its prompts, each once, and the `max_tokens` of each answer. A chat that leaves max_tokens
    out asks for its prompt alone."""
    max_tokens, _ = _max_tokens(query.body)
    if max_tokens is None:
        max_tokens = COMPLETION_TOKENS if isinstance(query.body, CompletionRequest) else 0
    prompts = [len(prompt) for prompt, _ in query.prompts]
    return sum(prompts) + len(prompts) * (query.body.n or 1) * max_tokens


def _check(query: Query, n: int) -> None:
    """Raises ApiError for fields that contradict each other, and for too many log-probabilities of prompts."""
    body = query.body
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, f"best_of is {body.best_of}; it is supported only as equal to n ({n})", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams only; set stream to true", param="stream_options")
    max_tokens, field = _max_tokens(body)
    if max_tokens == 0 and not (isinstance(body, CompletionRequest) and body.echo):
        raise ApiError(400, "max_tokens is 0; only with echo may an answer have no token", param="max_tokens")
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise ApiError(400, f"min_tokens ({body.min_tokens}) is more than {field} ({max_tokens})", param="min_tokens")
    if query.grammar is not None and not query.grammar.opens and body.ignore_eos:
        message = f"ignore_eos and {query.grammar.field} contradict each other: a complete answer must end; leave ignore_eos out"
        raise ApiError(400, message, param="ignore_eos")
    alternatives = prompt_logprobs(body)
    if alternatives is not None:
        number = sum(len(prompt) for prompt, _ in query.prompts) * n * (alternatives + 1)
        if number > MOST_SCORES:
            field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            most = f"at most {MOST_SCORES:,} are served at once"
            raise ApiError(400, f"{field}: the prompts would have {number:,} log-probabilities, and {most}", param=field)


def reading(query: Query) -> Reading:
    """How the engine turns the tokens of the answer into text."""
    body = query.body
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Reading(
        stop, bool(body.include_stop_str_in_output), isinstance(body, CompletionRequest), query.form.visible, query.form.section
    )


def refused(refusal: Refused, body: Generation, prompts: Sequence[Sequence[int]]) -> ApiError:
    """The scheduler's refusal with the body's names of fields: a chat has `messages` where the scheduler has `prompt`."""
    code = "context_length_exceeded" if refusal.field == "prompt" and all(prompts) else None
    field = refusal.field
    if isinstance(body, ChatRequest):
        field = {"prompt": "messages", "max_tokens": _max_tokens(body)[1]}.get(field, field)
    return ApiError(400, str(refusal), param=field, code=code)


def over_limit(refusal: ApiError, body: Generation) -> ApiError:
    """A tenant's refusal with the body's name of `max_tokens`."""
    return refusal.renamed({"max_tokens": _max_tokens(body)[1]})


def _max_tokens(body: Generation) -> tuple[int | None, str]:
    """The limit, and the name of the field that set it."""
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens"


def _logprobs(body: Generation) -> int | None:
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None
    if isinstance(body, CompletionRequest):
        return body.logprobs
    return None


def prompt_logprobs(body: Generation) -> int | None:
    """How many alternatives to report for each token of the prompt; None: nothing is reported. Raises ApiError for a stream."""
    wanted, field = body.prompt_logprobs, "prompt_logprobs"
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        wanted, field = max(body.logprobs, wanted or 0), "logprobs"
    if wanted is not None and body.stream:
        raise ApiError(400, f"{field} of a prompt is for whole answers only; leave stream out", param=field)
    return wanted
