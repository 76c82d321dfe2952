"""OpenAI's completions: the answer is text that continues the prompt. It knows no tools."""

import json
from typing import Any, cast

from stallfree.engine.streams import Output
from stallfree.executors.sampling import Score, TokenLogprob
from stallfree.server.dialects.call import LEAST, Choice, Offsets, breathe, spelt
from stallfree.server.dialects.chunks import SOME, Chunked, Columns


class Completions(Chunked):
    prefix, object, chunk_object, operation = "cmpl-", "text_completion", "text_completion", "text_completion"
    lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    nothing = last = '"text": ""'

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._texts = {id: [choice.echo] for id, choice in self.choices.items()}

    def add(self, choice: Choice, output: Output) -> None:
        if not choice.is_echo:
            self._texts[output.id].append(output.text)

    def members(self, choice: Choice) -> str:
        return _text("".join(self._texts[choice.request.id]))

    def first(self, choice: Choice) -> str | None:
        return _text(choice.echo) if choice.echo else None

    def deltas(self, choice: Choice, output: Output) -> list[str]:
        return [_text(output.text)] if output.text and not choice.is_echo else []

    async def of_prompt(self, choice: Choice) -> list[Columns]:
        if not choice.echoes_scores:
            return []
        offsets, columns = Offsets(self._text.pieces), []
        for token, score in zip(choice.request.prompt, (None, *choice.scores), strict=True):
            columns.append(self._columns_of(offsets, token, cast(Score | None, score)))
            if len(columns) % SOME == 0:
                await breathe()
        return columns

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        if choice.offsets is None:
            choice.offsets = Offsets(self._text.pieces, choice.request.prompt, len(choice.echo))
        return self._columns_of(choice.offsets, output.tokens[0], cast(TokenLogprob, output.details))

    def _columns_of(self, offsets: Offsets, token: int, details: TokenLogprob | Score | None) -> Columns:
        """The entries of a token. The first one of a prompt has no details."""
        text = spelt(self._text.pieces, token)[0]
        if details is None:
            return text, "null", "null", str(offsets.next(token))
        top: dict[str, float] = {}
        for id, logprob in details.top:
            top.setdefault(
                spelt(self._text.pieces, id)[0], max(logprob, LEAST)
            )  # several halves of characters have the same text: the first, the likeliest, stays
        alternatives = "{" + ", ".join([f"{piece}: {logprob!r}" for piece, logprob in top.items()]) + "}"
        return text, repr(max(details.logprob, LEAST)), alternatives, str(offsets.next(token))


def _text(text: str) -> str:
    return '"text": ' + json.dumps(text)
