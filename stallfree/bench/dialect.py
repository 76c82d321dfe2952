"""Probes which requests a server takes, and writes such requests of any length. It knows no arrivals and no measurements.

Prompts are random and new in every run: with the prompts of the last run, a server with a prefix cache would compute almost
nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from stallfree.bench.client import Client, Failed
from stallfree.bench.events import Events

REFUSALS = (400, 422, 500, 501)
"""Statuses with which servers answer unknown fields; 500 comes from servers that do not check them."""
ID_RANGES = ((1000, 30_000), (32, 250))
"""Ranges of ordinary token ids: in real vocabularies, above the ids of bytes and control tokens; and in toy vocabularies."""
OPTIONS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("ignore_eos", True, ("every", "end", "")),
    ("stream_options", {"include_usage": True, "continuous_usage_stats": True}, ("every",)),
    ("stream_options", {"include_usage": True}, ("every", "end")),
)
"""Optional fields of requests, the best form first, each with the values of `Events.usage` that show that the server obeys it: a
server may accept a field and ignore it."""
PROBE_TOKENS = 32
"""Tokens of the probes' prompts: enough that some ids are outside a small vocabulary."""
# All equally long. Each is, with its space, a single token in most vocabularies.
WORDS = (
    "time year work life hand part home name book word side kind head room case week city fact idea body face door line game "
    "team town road mind back four five nine blue cold dark deep easy fast fine free full good hard high kept last late left"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """The requests that a server takes. Prompts are token ids in the range `ids`, or words: a text of n words has about `words[0] +
    n * words[1]` tokens. `options`: more fields of the body.
    """

    model: str | None
    ids: tuple[int, int] | None
    words: tuple[float, float]
    options: dict[str, Any]

    @classmethod
    async def probe(cls, client: Client, model: str | None = None) -> Self:
        """Find the dialect with a few short requests. `model` None: the first that the server lists. Raises ValueError, with the
        reason, if the server does not answer the plainest request.
        """
        try:
            model = model or (await client.ask("models"))["data"][0]["id"]
        except (LookupError, TypeError):
            model = None
        except Failed as failed:
            if failed.status is None:
                raise ValueError(f"no server answers at {client.url} ({failed}); start one there or give another URL") from failed
        plain = cls(model, None, (0.0, 1.0), {})
        try:
            await client.stream(plain.body(np.random.default_rng(), 4, 2), 2, [])
        except Failed as failed:
            remedy = {401: "; give its API key", 404: "; give the name of a model that it serves"}.get(failed.status or 0, "")
            raise ValueError(f"{client.url} does not complete a plain prompt ({failed}){remedy}") from failed
        options: dict[str, Any] = {}
        for name, value, usage in OPTIONS:
            if name in options:
                continue
            events = await _taken(client, cls(model, None, (0.0, 1.0), options | {name: value}))
            if events is not None and events.usage in usage:
                options[name] = value
        for ids in ID_RANGES:
            events = await _taken(client, with_ids := cls(model, ids, (0.0, 1.0), options))
            # The server may add a token for the beginning of the text.
            if events is not None and (events.prompt_tokens is None or events.prompt_tokens - PROBE_TOKENS in (0, 1)):
                return with_ids
        return cls(model, None, await _tokens_of_words(client, plain), options)

    def body(
        self, rng: np.random.Generator, prompt_tokens: int, output_tokens: int, own: Mapping[str, Any] = MappingProxyType({})
    ) -> bytes:
        """The body of a streamed request of these lengths, with its `own` fields. A text's length is estimated by `words`."""
        return json.dumps(self._fields(rng, prompt_tokens, output_tokens) | {"stream": True, **self.options, **own}).encode()

    def _fields(self, rng: np.random.Generator, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
        prompt: list[int] | str
        if self.ids is not None:
            prompt = rng.integers(*self.ids, prompt_tokens).tolist()
        else:
            base, each = self.words
            prompt = " ".join(rng.choice(WORDS.split(), max(1, round((prompt_tokens - base) / each))))
        fields = {"prompt": prompt, "max_tokens": output_tokens, "temperature": 0}
        return fields if self.model is None else fields | {"model": self.model}

    def __str__(self) -> str:
        prompts = "token ids" if self.ids is not None else f"text, of {self.words[1]:.3g} tokens a word"
        ends = "ignore_eos" if "ignore_eos" in self.options else "no ignore_eos, so outputs may end early"
        usage = self.options.get("stream_options", {})
        counts = "usage in every event" if len(usage) > 1 else "usage at the end" if usage else "no usage, so an event is a token"
        return f"model {self.model or 'unnamed'}; prompts as {prompts}; {ends}; {counts}"


async def _taken(client: Client, dialect: Dialect) -> Events | None:
    """The answer to a short request; None if the server refuses it. Raises ValueError for other failures."""
    try:
        return await client.stream(dialect.body(np.random.default_rng(), PROBE_TOKENS, 2), 2, [])
    except Failed as failed:
        if failed.status not in REFUSALS and failed.kind != "malformed":
            raise ValueError(f"{client.url} failed at {dialect}: {failed}") from failed
        return None


async def _tokens_of_words(client: Client, plain: Dialect) -> tuple[float, float]:
    """The tokens of an empty text and of each word, from two texts; 0 and 1 if the server does not report its usage."""
    few, many, counts = 20, 120, []
    for words in (few, many):
        try:
            answer = await client.ask("completions", plain._fields(np.random.default_rng(), words, 1))
            counts.append(int(answer["usage"]["prompt_tokens"]))
        except (Failed, LookupError, TypeError, ValueError):
            return 0.0, 1.0
    each = (counts[1] - counts[0]) / (many - few)
    return (counts[0] - few * each, each) if each > 0 else (0.0, 1.0)
