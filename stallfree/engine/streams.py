"""Each request's way from tokens to text: it turns the tokens of an iteration into outputs. An error in one request's text ends
only that request. It does not know what ran.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stallfree.core.plan import Work
from stallfree.core.request import Request
from stallfree.engine.detokenizer import Detokenizer, Section, StopStrings
from stallfree.engine.text import Text

log = logging.getLogger(__name__)

Watch = Callable[[Work], None]
"""Called with each piece of a request's work once it is computed, in the engine's thread, while its blocks still hold the KV."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one token brings for one request: new `text` (may be empty) and the token's id in `tokens`, with the executor's
    `details` (log-probabilities, or None). The first has the `scores` of the prompt's tokens but the first, if they are wanted. The
    last output has a `finish_reason`, and the stop string or id, or the `error`; it may have no token.
    """

    id: str
    text: str
    tokens: tuple[int, ...]
    details: object = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    scores: Sequence[object] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request's tokens become its text. The text ends at any of the strings `stop`, which it holds with `include_stop`.

    `continues`: it continues the prompt's text; otherwise it is an answer, which begins without a space. `visible`: special tokens
    that have text. `section`: the opening and closing marks of a reasoning section at its beginning, in which no stop string
    counts, and whether the prompt already ends within it.
    """

    stop: Sequence[str] = ()
    include_stop: bool = False
    continues: bool = True
    visible: frozenset[int] = frozenset()
    section: tuple[str, str, bool] | None = None


AS_IT_COMES = Reading()


class Stream:
    """One request, with the filters that its text runs through."""

    __slots__ = ("detokenizer", "include_stop", "request", "scores", "stops", "visible")

    def __init__(self, request: Request, text: Text, reading: "Reading"):
        self.request = request
        self.include_stop = reading.include_stop
        self.visible = reading.visible
        self.scores: list[object] = []
        self.detokenizer = Detokenizer(text.pieces, request.prompt if reading.continues else ())
        section = None if reading.section is None else Section(*reading.section[:2], inside=reading.section[2])
        self.stops = StopStrings(reading.stop, include=reading.include_stop, section=section)


class Streams:
    """The streams of the requests that have a reader, and the `watches` of some, by id. If a request's text ends it, `end` is
    called with its id and the reason.
    """

    def __init__(self, text: Text, end: Callable[[str, str], None]):
        self._text = text
        self._end = end
        self._streams: dict[str, Stream] = {}
        self.watches: dict[str, Watch] = {}

    def make(self, request: Request, reading: Reading) -> Stream:
        """A stream that has no reader yet."""
        return Stream(request, self._text, reading)

    def read(self, stream: Stream, watch: Watch | None) -> None:
        self._streams[stream.request.id] = stream
        if watch is not None:
            self.watches[stream.request.id] = watch

    def __contains__(self, id: str) -> bool:
        return id in self._streams

    def request(self, id: str) -> Request | None:
        """The request with this id, if it has a reader."""
        stream = self._streams.get(id)
        return None if stream is None else stream.request

    def score(self, id: str, start: int, scores: Sequence[object]) -> None:
        """Keep the scores of prompt tokens from position `start` on, until the first output. A request that is computed again
        brings them again."""
        stream = self._streams.get(id)
        if stream is not None:
            stream.scores[start - 1 :] = scores

    def forget(self, id: str) -> None:
        """Remove the stream and the watch of a request."""
        self._streams.pop(id, None)
        self.watches.pop(id, None)

    def ended(self, id: str, error: str) -> Output:
        """Remove a request that has ended with an error. Returns its last output."""
        self.forget(id)
        return Output(id, "", (), finish_reason="error", error=error)

    def fail(self, id: str, message: str, error: BaseException) -> Output:
        """End a request because of its own error. Returns its last output."""
        log.error("request %s: %s", id, message, exc_info=error)
        self._end(id, "error")
        return self.ended(id, f"{message} ({type(error).__name__}: {error})")

    def output(self, id: str, token: int, details: object, number: int) -> Output:
        """The output of a request that has a reader, for output token `number` of it, counted from 1."""
        try:
            return self._output(self._streams[id], token, details, number)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the tokenizer's library is no Exception
            return self.fail(id, "its tokens cannot be turned into text", error)

    def _output(self, stream: Stream, token: int, details: object, number: int) -> Output:
        request = stream.request
        reason = request.finish_reason if number == len(request.output) else None
        stop: str | int | None = token if reason == "stop" and token in request.stop_ids else None
        text = ""
        if stop is None or (stream.include_stop and token not in self._text.eos_ids):
            text = stream.detokenizer.push(token, special=stop is not None or token in stream.visible)
        if reason is not None:
            text += stream.detokenizer.flush()
        text, stop_string = stream.stops.push(text, ends=number >= request.min_tokens)
        if stop_string is not None:
            stop = stop_string
            if request.finish_reason is None:
                self._end(request.id, "stop")
            reason = "stop"
        elif reason is not None:
            text += stream.stops.flush()
        if reason is not None:
            self.forget(request.id)
        scores, stream.scores = stream.scores, []
        return Output(request.id, text, (token,), details, reason, stop, scores=scores)
