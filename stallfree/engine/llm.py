"""The engine for scripts: prompts in, completions out, no server. It drives the engine in the caller's thread."""

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, Self

from stallfree.core.request import Refused, Request
from stallfree.engine.assemble import Options, assemble
from stallfree.engine.streams import Output, Reading

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """The result for one prompt: `text`, `tokens` (ids), and why it ended ("stop", "length" or "error", with `error`)."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    error: str | None = None


class LLM:
    """`LLM()` is the embedded model; `LLM("model.gguf", policy="orca", ...)` takes the fields of `Options`.

    Sampling arguments of the methods: `max_tokens` (default: what fits), `min_tokens`, `stop` (a string or several), `ignore_eos`,
    `adapter` (the name of one of the option `adapter`; default: the model as it is), and the fields of
    `executors.sampling.Sampling`. The default seed is random; the other defaults are those that the model's makers recommend
    (`checkpoint.generation`). Unknown names raise TypeError. A request that cannot be served raises `Refused`.
    """

    def __init__(self, model: str | None = None, **options: Any):
        self._assembled = assemble(Options(model=model, **options))
        self._engine = self._assembled.engine
        self._ids = itertools.count()
        self._pending: dict[str, list[Output]] = {}

    def generate(self, prompts: Prompt | Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """Complete one prompt or many, texts or token ids, in one batch. Returns the completions in the prompts' order."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        batch: Sequence[Any] = [prompts] if single else prompts
        texts = [""] * len(batch)
        tokens: list[tuple[int, ...]] = [()] * len(batch)
        last: dict[int, Output] = {}
        for index, output in self._serve(batch, sampling):
            texts[index] += output.text
            tokens[index] += output.tokens
            last[index] = output
        return [Completion(texts[i], tokens[i], last[i].finish_reason or "error", last[i].error) for i in range(len(batch))]

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """The completion's text as it comes. Raises RuntimeError if the executor fails. Closing the iterator ends the request."""
        return self._stream(prompt, sampling, continues=True)

    def _stream(self, prompt: Prompt, sampling: Mapping[str, Any], continues: bool) -> Iterator[str]:
        for _, output in self._serve([prompt], sampling, continues):
            if output.error:
                raise RuntimeError(output.error)
            if output.text:
                yield output.text

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> str:
        """The answer to a conversation: messages with `role` and `content`, through the model's template."""
        return "".join(self.stream_chat(messages, **sampling))

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Iterator[str]:
        return self._stream(self._engine.text.chat(messages), sampling, continues=False)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(
        self, prompts: Sequence[Prompt], sampling: Mapping[str, Any], continues: bool = True
    ) -> Iterator[tuple[int, Output]]:
        """The outputs of `prompts` as they come, each with its prompt's index. Outputs of other calls are kept for these.

        All prompts are submitted or none. When the iterator closes, unfinished requests are aborted.
        """
        ids: list[str] = []
        try:
            for prompt in prompts:
                ids.append(self._submit(prompt, sampling, continues).id)
                self._pending[ids[-1]] = []
            unfinished = set(ids)
            while unfinished:
                for output in self._engine.step():
                    self._pending[output.id].append(output)
                if self._engine.waits:
                    self._engine.adapters.join()
                for index, id in enumerate(ids):
                    outputs, self._pending[id] = self._pending[id], []
                    for output in outputs:
                        if output.finish_reason is not None:
                            unfinished.discard(id)
                        yield index, output
        finally:
            for id in ids:
                self._engine.abort(id)
                self._pending.pop(id, None)

    def _submit(self, prompt: Prompt, sampling: Mapping[str, Any], continues: bool) -> Request:
        from stallfree.executors.sampling import Sampling

        arguments = dict(sampling)
        stop = arguments.pop("stop", ())
        max_tokens = arguments.pop("max_tokens", None)
        ignore_eos = arguments.pop("ignore_eos", False)
        adapter = self._assembled.library.key(name) if (name := arguments.pop("adapter", "")) else ""
        if adapter is None:
            raise Refused(f"adapter {name!r} is not loaded{self._assembled.library.nearest(name)}", "adapter")
        unknown = arguments.keys() - {f.name for f in fields(Sampling) if f.init}
        if unknown:
            raise TypeError(f"unknown sampling argument {sorted(unknown)[0]!r}")
        ids = self._engine.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        stop_ids = arguments.pop("stop_ids", frozenset()) | (frozenset() if ignore_eos else self._engine.text.eos_ids)
        biased = list(arguments.get("logit_bias", ()))
        for field, tokens in (("prompt", ids), ("stop_ids", list(stop_ids)), ("logit_bias", biased)):
            if (wrong := self._engine.text.lacks(tokens)) is not None:
                size = self._engine.text.vocab_size
                raise Refused(f"{field}: token id {wrong} is outside the vocabulary (0 to {size - 1})", field)
        arguments.setdefault("seed", secrets.randbits(32))
        room = self._engine.scheduler.ledger.max_len - len(ids)
        request = Request(
            str(next(self._ids)),
            ids,
            max(1, room) if max_tokens is None else max_tokens,
            stop_ids=stop_ids,
            min_tokens=arguments.get("min_tokens", 0),
            arrival=self._engine.clock(),
            adapter=adapter,
            sampling=replace(self._engine.sampling, stop_ids=stop_ids, **arguments),
        )
        self._engine.submit(request, Reading((stop,) if isinstance(stop, str) else tuple(stop), continues=continues))
        return request
