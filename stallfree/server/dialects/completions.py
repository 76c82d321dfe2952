"""OpenAI's completions: the answer is text that continues the prompt. It knows no tools."""

import json
from typing import Any, cast

from stallfree.engine.streams import Output
from stallfree.executors.sampling import TokenLogprob
from stallfree.server.dialects.call import LEAST, Choice, spelt
from stallfree.server.dialects.chunks import Chunked, Columns


class Completions(Chunked):
    prefix, object, chunk_object, operation = "cmpl-", "text_completion", "text_completion", "text_completion"
    lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    nothing = last = '"text": ""'

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._texts = {id: [choice.echo] for id, choice in self.choices.items()}

    def add(self, choice: Choice, output: Output) -> None:
        self._texts[output.id].append(output.text)

    def members(self, choice: Choice) -> str:
        return _text("".join(self._texts[choice.request.id]))

    def first(self, choice: Choice) -> str | None:
        return _text(choice.echo) if choice.echo else None

    def deltas(self, choice: Choice, output: Output) -> list[str]:
        return [_text(output.text)] if output.text else []

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        details = cast(TokenLogprob, output.details)
        token = output.tokens[0]
        top: dict[str, float] = {}
        for id, logprob in details.top:
            top.setdefault(
                spelt(self._text.pieces, id)[0], max(logprob, LEAST)
            )  # several halves of characters have the same text: the first, the likeliest, stays
        return (
            spelt(self._text.pieces, token)[0],
            repr(max(details.logprob, LEAST)),
            "{" + ", ".join([f"{piece}: {logprob!r}" for piece, logprob in top.items()]) + "}",
            str(choice.offset(self._text, token)),
        )


def _text(text: str) -> str:
    return '"text": ' + json.dumps(text)
