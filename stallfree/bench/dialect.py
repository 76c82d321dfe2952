"""What a server takes, found out by asking it, and prompts of any length in its way. It knows no arrivals and no measurements.

Prompts mean nothing and are new in every run: with the same ones as in the last run, a server with a prefix cache would compute
next to nothing.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from stallfree.bench.client import Client, Failed
from stallfree.bench.events import Events

REFUSALS = (400, 422, 500, 501)
"""Statuses with which servers answer to what they do not know; 500 is those that do not check what they get."""
ID_RANGES = ((1000, 30_000), (32, 250))
"""Token ids that are ordinary tokens: in vocabularies of real size, above those for bytes and control; in toy ones."""
OPTIONS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("ignore_eos", True, ("every", "end", "")),
    ("stream_options", {"include_usage": True, "continuous_usage_stats": True}, ("every",)),
    ("stream_options", {"include_usage": True}, ("every", "end")),
)
"""What is asked beyond the plain request if the server takes it, the best form first, and `Events.usage` as it must be then: a
server may accept what it then ignores."""
PROBE_TOKENS = 32
"""Tokens of the probes' prompts, enough that ids which are not in the vocabulary are among them."""
# As long as one another and each, with its space, a single token in most vocabularies.
WORDS = (
    "time year work life hand part home name book word side kind head room case week city fact idea body face door line game "
    "team town road mind back four five nine blue cold dark deep easy fast fine free full good hard high kept last late left"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """Requests as a server takes them: prompts of token ids in the range `ids`, or of words, of which a text of n has
    `words[0] + n * words[1]` tokens; `options` as fields of the body.
    """

    model: str | None
    ids: tuple[int, int] | None
    words: tuple[float, float]
    options: dict[str, Any]

    @classmethod
    async def probe(cls, client: Client, model: str | None = None) -> Self:
        """Ask with a few short requests. `model` None: the first that the server lists. Raises ValueError if it does not answer to
        the plainest of them, saying why.
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
            way = {401: "; give its API key", 404: "; give the name of a model that it serves"}.get(failed.status or 0, "")
            raise ValueError(f"{client.url} does not complete a plain prompt ({failed}){way}") from failed
        options: dict[str, Any] = {}
        for name, value, usage in OPTIONS:
            if name in options:
                continue
            events = await _taken(client, cls(model, None, (0.0, 1.0), options | {name: value}))
            if events is not None and events.usage in usage:
                options[name] = value
        for ids in ID_RANGES:
            events = await _taken(client, found := cls(model, ids, (0.0, 1.0), options))
            # A token for the beginning of the text may come on top.
            if events is not None and (events.prompt_tokens is None or events.prompt_tokens - PROBE_TOKENS in (0, 1)):
                return found
        return cls(model, None, await _tokens_of_words(client, plain), options)

    def body(self, rng: np.random.Generator, prompt_tokens: int, output_tokens: int) -> bytes:
        """A streamed request of these lengths. A text's length is what `words` leads to expect."""
        return json.dumps(self._fields(rng, prompt_tokens, output_tokens) | {"stream": True} | self.options).encode()

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
    """The answer to a short request; None if it is refused."""
    try:
        return await client.stream(dialect.body(np.random.default_rng(), PROBE_TOKENS, 2), 2, [])
    except Failed as failed:
        if failed.status not in REFUSALS and failed.kind != "malformed":
            raise ValueError(f"{client.url} failed at {dialect}: {failed}") from failed
        return None


async def _tokens_of_words(client: Client, plain: Dialect) -> tuple[float, float]:
    """Tokens of an empty text, and of each word, from two texts; a token a word if the server does not tell its usage."""
    few, many, told = 20, 120, []
    for words in (few, many):
        try:
            answer = await client.ask("completions", plain._fields(np.random.default_rng(), words, 1))
            told.append(int(answer["usage"]["prompt_tokens"]))
        except (Failed, LookupError, TypeError, ValueError):
            return 0.0, 1.0
    each = (told[1] - told[0]) / (many - few)
    return (told[0] - few * each, each) if each > 0 else (0.0, 1.0)
