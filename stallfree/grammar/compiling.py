"""Compiles grammars where they can hurt nobody: each is tried in a helper process, with a limit of time, before this process takes
it. A process that takes too long or dies is replaced, and its grammar refused.

Requests wait for this in their own coroutine, before they enter the engine's queue. It knows no HTTP and no engine.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from stallfree.engine.text import Text
from stallfree.grammar.constraint import GrammarConstraint, reason
from stallfree.grammar.sources import MOST_CHARS, Grammar, as_lark
from stallfree.processes import Died, Helper, step_back

LIMIT_S = 1.0
"""Seconds in which a grammar must compile and begin."""

WAIT_S = 5.0
"""Seconds that a grammar waits for a free process before its request is refused for now."""

PROCESSES = 2
"""Processes that try grammars: two, so that a slow grammar does not delay the next one."""

KEPT, KEPT_CHARS = 64, 1 << 20
"""Compiled grammars, and refusals, that are remembered: the last ones used, and the characters of their sources. A compiled grammar
takes some 150 bytes for each character of its source, and up to 40 MB for a regular expression with very many states."""

STEPS = 4
"""Tokens that a trial goes on after the start: some grammars only fail after the first bracket."""

LIMITS = LLParserLimits(step_lexer_fuel=100_000, max_lexer_states=20_000)
"""llguidance's own limits, with half its work for one token, about 7 ms, and fewer states of a lexer, about 40 MB."""

SEARCHES = 4
"""Threads that search for allowed tokens: several, so that a slow search delays no other."""


class GrammarError(ValueError):
    """A grammar that cannot be served. `field`: the part of the request that it came from."""

    def __init__(self, why: str, field: str):
        super().__init__(f"{field}: {why}")
        self.field = field


class Busy(RuntimeError):
    """No process became free in time to try a grammar."""


class Grammars:
    """The grammars of a model with `text`. `start` before the first one saves it a second; `close` ends the processes."""

    def __init__(self, text: Text):
        self._text = text
        self._known: OrderedDict[str, LLMatcher | str] = OrderedDict()
        self._known_chars = 0
        self._trials: dict[str, asyncio.Task[LLMatcher | str]] = {}
        self._helpers: list[Helper] = []
        self._free: asyncio.Queue[Helper] = asyncio.Queue()
        self._starting = asyncio.Lock()
        self._compiling = ThreadPoolExecutor(PROCESSES + 1, "grammar", step_back)
        self._searching = ThreadPoolExecutor(SEARCHES, "tokens")

    def start(self) -> None:
        """Start the processes, and prepare the vocabulary in a thread. It takes a while: call it before there are requests."""
        if not self._text.eos_ids:
            return
        for _ in range(PROCESSES - len(self._helpers)):
            self._helpers.append(Helper(_trial, self._text))
            self._free.put_nowait(self._helpers[-1])
        self._compiling.submit(lambda: self._vocabulary)

    async def constraints(self, grammar: Grammar, number: int) -> list[GrammarConstraint]:
        """A constraint for each of `number` requests. Raises GrammarError if the grammar cannot be served, and Busy."""
        if not self._text.eos_ids:
            raise GrammarError("this model has no token that ends an answer, so no grammar can hold it", grammar.field)
        if len(grammar.source) > MOST_CHARS:
            raise GrammarError(f"it has {len(grammar.source):,} characters, and at most {MOST_CHARS:,} are served", grammar.field)
        compiled = await self._compiled(grammar.source)
        if isinstance(compiled, str):
            raise GrammarError(compiled, grammar.field)
        return [GrammarConstraint(compiled, grammar, self._text.vocab_size, self._searching) for _ in range(number)]

    def close(self) -> None:
        for helper in self._helpers:
            helper.close()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._searching.shutdown(wait=False, cancel_futures=True)

    async def _compiled(self, source: str) -> LLMatcher | str:
        """The compiled grammar, or why there is none. Equal grammars are tried once, even if they come at once."""
        if source in self._known:
            self._known.move_to_end(source)
            return self._known[source]
        trial = self._trials.get(source)
        if trial is None:
            trial = self._trials[source] = asyncio.create_task(self._try(source))
            trial.add_done_callback(lambda _: self._trials.pop(source, None))
        return await asyncio.shield(trial)

    async def _try(self, source: str) -> LLMatcher | str:
        async with self._starting:
            if not self._helpers:
                await asyncio.get_running_loop().run_in_executor(self._compiling, self.start)
        try:
            helper = await asyncio.wait_for(self._free.get(), WAIT_S)
        except TimeoutError:
            raise Busy(f"{PROCESSES} processes have been compiling other grammars for {WAIT_S:g} s; try again later") from None
        loop = asyncio.get_running_loop()
        try:
            refusal, converted = await loop.run_in_executor(self._compiling, helper.call, source, LIMIT_S)
        except TimeoutError:  # not remembered: the machine may have been busy
            return f"it takes more than {LIMIT_S:g} s to compile; make it simpler, or try again"
        except Died:
            return "the process that compiled it has died; make it simpler, or try again"
        finally:
            self._free.put_nowait(helper)
        compiled: LLMatcher | str = refusal
        if not refusal:
            compiled = await loop.run_in_executor(self._compiling, self._compile, converted)
        self._known[source] = compiled
        self._known_chars += len(source)
        while len(self._known) > KEPT or self._known_chars > KEPT_CHARS:
            self._known_chars -= len(self._known.popitem(last=False)[0])
        return compiled

    def _compile(self, source: str) -> LLMatcher | str:
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=LIMITS)
        return reason(matcher.get_error()) if matcher.is_error() else matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return vocabulary(self._text)


def vocabulary(text: Text) -> LLTokenizer:
    """The model's tokens for llguidance: each as the bytes that it adds to a text."""
    eos_ids = sorted(text.eos_ids)
    return LLTokenizer(TokenizerWrapper(_Tokens(text, eos_ids[0])), text.vocab_size, eos_ids)


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, text: Text, eos_id: int):
        self._text = text
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.tokens = [text.pieces[id] for id in range(text.vocab_size)]
        self.special_token_ids = sorted(id for id in text.added if id < text.vocab_size)

    def __call__(self, text: bytes | str) -> list[int]:
        return self._text.encode(text if isinstance(text, str) else text.decode(errors="replace"), special=False)


def _trial(text: Text) -> Callable[[str], tuple[str, str]]:
    """In a helper process: a function that says why a source is refused (empty if it is not), and the source to compile."""
    step_back()
    tokens = vocabulary(text)

    def try_it(source: str) -> tuple[str, str]:
        try:
            converted = as_lark(source)
        except ValueError as error:
            return str(error), ""
        return _refusal(tokens, converted), converted

    return try_it


def _refusal(tokens: LLTokenizer, source: str) -> str:
    matcher = LLMatcher(tokens, source, log_level=0, limits=LIMITS)
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = matcher.compute_bitmask()
        first = next((8 * at + (byte & -byte).bit_length() - 1 for at, byte in enumerate(bits) if byte), None)
        if first is None:
            return "no token of this model can begin it"
        matcher.consume_token(first)
    return reason(matcher.get_error()) if matcher.is_error() else ""
