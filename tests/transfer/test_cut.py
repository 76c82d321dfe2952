"""A request is cut at any token: in its prompt, or after the first tokens of its output. The tokens are those of one engine, and
each is shown once, whatever breaks in between."""

import asyncio
import random
from contextlib import suppress
from dataclasses import replace

import pytest

from stallfree import policies
from stallfree.core.plan import StepResult
from stallfree.core.policy import Setup
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.core.speculation import Speculation
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.streams import Reading
from stallfree.executors.sampling import Fixed, Sampling, TokenLogprob
from stallfree.executors.simulated import Linear
from stallfree.perf.fitted import Fitted
from stallfree.transfer.cut import Cut
from stallfree.transfer.frames import send
from tests.transfer.conftest import GREEDY, Remembering, breaks, decoding, engine, expected, free, prefilling, read
from tests.transfer.test_peers import Peer, all_blocks, blocks, close, done, terms
from tests.waiting import PATIENCE_S, comes

PROMPT = [(7 * i) % 251 for i in range(61)]
LENGTHS = (1, 2, 4, 5, 8, 61)
OUTPUT = 9


def cut_at(asks, tokens):
    return asks.transfers(None, Cut(tokens))


async def serve(thread, asks, prompts, cut, max_tokens=OUTPUT):
    """The tokens of each prompt, all at once, cut after so many tokens."""
    requests = [Request(f"r{i}", prompt, max_tokens, arrival=i, sampling=GREEDY) for i, prompt in enumerate(prompts)]
    outputs = await read(thread.submit(requests, transfer=cut_at(asks, cut)))
    return [[token for o in outputs if o.id == r.id for token in o.tokens] for r in requests]


def tokens_of(records, id="r0"):
    """How many tokens of a request are in the records: shown or delivered, and sampled here."""
    elsewhere = [other for r in records for other, _ in r.sampled_elsewhere]
    return elsewhere.count(id), [other for r in records for other in r.emitted].count(id)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7, 8, 9, 32, 59, 60, 61, 62, 63, 64, 65, 68, 69, 70, 1000])
def test_at_any_cut_the_tokens_are_those_of_one_engine(cut, overlap, way):
    records = []
    decoder, prefiller = engine(Remembering(overlap=overlap), records=records), engine(Remembering(overlap=overlap))
    prompts = [PROMPT[:length] for length in LENGTHS]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            answers = await serve(thread, asks, prompts, cut)
            await read(thread.submit([Request("last", [9], 2, sampling=GREEDY)]))  # an iteration, whose record tells of all before
            return answers

    assert [expected(prompt, OUTPUT) for prompt in prompts] == asyncio.run(run())
    for number, length in enumerate(LENGTHS):
        there = max(0, min(cut - length + 1, OUTPUT))
        assert (there, OUTPUT - there) == tokens_of(records, f"r{number}")
    computed = sum(count for r in records for id, start, count in r.work if start < len(PROMPT) and id == "r5")
    assert max(0, len(PROMPT) - cut) == computed
    free(decoder)
    free(prefiller)


@pytest.mark.parametrize("cut", [10, 40, 44, 45, 46, 60, 61, 64])
def test_what_is_in_the_prefix_cache_is_not_sent(cut):
    records = []
    decoder, prefiller = engine(records=records), engine()
    follow = [*PROMPT[:40], *expected(PROMPT[:40], 6), *[5] * 15]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT[:40]], 40, 6), await serve(thread, asks, [follow], cut, 12)

    assert ([expected(PROMPT[:40], 6)], [expected(follow, 12)]) == asyncio.run(run())
    last = [d for r in records for d in r.delivered][-1]
    assert (44, 64 * max(0, -(-cut // 4) - 11)) == (last.cached, last.num_bytes)


@pytest.mark.parametrize(("blocks", "others"), [(40, 60), (60, 40)])
def test_with_little_room_all_are_served_whatever_the_cut(blocks, others):
    """Requests are preempted on both sides."""
    rng = random.Random(1)
    decoder, prefiller = engine(Remembering(blocks=blocks)), engine(Remembering(blocks=others))
    prompts = [[rng.randrange(251) for _ in range(rng.randrange(1, 70))] for _ in range(40)]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            requests = [Request(str(i), prompt, 20, arrival=i, sampling=GREEDY) for i, prompt in enumerate(prompts)]
            await asyncio.gather(*(read(thread.submit([r], transfer=cut_at(asks, rng.randrange(1, 100)))) for r in requests))
            return [r.output for r in requests]

    assert [expected(prompt, 20) for prompt in prompts] == asyncio.run(run())
    free(decoder)
    free(prefiller)


def test_the_first_tokens_are_shown_while_the_prefill_engine_goes_on():
    decoder, prefiller = engine(), engine(Remembering(turns=7))  # four iterations for the prompt, three for tokens after the first

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            request = Request("a", PROMPT, 30, sampling=GREEDY)
            outputs = thread.submit([request], transfer=cut_at(asks, 61 + 20))
            shown = []
            while len(shown) < 4:
                shown += [token for output in await anext(outputs) for token in output.tokens]
            assert decoder.prefetch.under_way
            assert prefiller.scheduler.ledger.running
            prefiller.executor.go()
            return shown + [token for output in await read(outputs) for token in output.tokens]

    assert expected(PROMPT, 30) == asyncio.run(run())
    free(decoder)


ENDS = {
    "a stop id": ({"max_tokens": 30, "stop_ids": frozenset({expected(PROMPT, 3)[2]})}, "stop"),
    "max_tokens": ({"max_tokens": 3}, "length"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_request_that_ends_in_its_first_tokens_leaves_nothing_on_either_side(end):
    fields, reason = ENDS[end]
    request = Request("a", PROMPT, sampling=GREEDY, **fields)
    records = []
    decoder, prefiller = engine(records=records), engine()

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            outputs = await read(thread.submit([request], transfer=cut_at(asks, 61 + 20)))
            await comes(lambda: not decoder.busy and not prefiller.busy)
            assert not asks.peers[0].transfers
            return outputs, await serve(thread, asks, [[9, 9]], 1)

    outputs, after = asyncio.run(run())
    assert (expected(PROMPT, 3), reason) == ([t for o in outputs for t in o.tokens], outputs[-1].finish_reason)
    assert [expected([9, 9], OUTPUT)] == after
    assert (3, 0) == tokens_of(records, "a")
    free(decoder)
    free(prefiller)


def test_a_stop_string_in_the_first_tokens_ends_the_request():
    decoder, prefiller = engine(), engine()
    letters = set(decoder.text.encode("abcdefghijklmnopqrstuvwxyz", special=False))
    prompts = [[i % 97 + 3, i % 251] for i in range(3000)]
    prompt = next(prompt for prompt in prompts if all(token in letters for token in expected(prompt, 4)[2:]))
    tokens = expected(prompt, 4)
    stop = decoder.text.decode(tokens[2:])

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            request = Request("a", prompt, 30, sampling=GREEDY)
            outputs = await read(thread.submit([request], Reading(stop=[stop]), transfer=cut_at(asks, 20)))
            await comes(lambda: not decoder.busy and not prefiller.busy)
            return outputs

    outputs = asyncio.run(run())
    assert (tokens, "stop", stop) == (
        [t for o in outputs for t in o.tokens],
        outputs[-1].finish_reason,
        outputs[-1].stop_reason,
    )
    assert stop not in "".join(o.text for o in outputs)
    free(decoder)
    free(prefiller)


@pytest.mark.parametrize("cut", [30, 61 + 20])
def test_a_client_that_leaves_in_the_middle_frees_both_sides(cut, way):
    decoder, prefiller = engine(), engine(Remembering(turns=1 if cut < 61 else 6))

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            outputs = thread.submit([Request("gone", PROMPT, 30, sampling=GREEDY)], transfer=cut_at(asks, cut))
            if cut > 61:
                await anext(outputs)
            else:
                await comes(lambda: prefiller.scheduler.ledger.running)
            outputs.close()
            await comes(lambda: not decoder.busy)
            free(decoder)
            prefiller.executor.go()
            await comes(lambda: not prefiller.busy)
            return await serve(thread, asks, [PROMPT], cut)

    assert [expected(PROMPT, OUTPUT)] == asyncio.run(run())
    free(decoder)
    free(prefiller)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("cut", [50, 61 + 20])
def test_a_peer_that_goes_in_the_middle_loses_and_repeats_no_token(cut, others, hurried):
    records = []
    decoder = engine(records=records)
    first, second = engine(Remembering(turns=2 if cut < 61 else 6)), engine()

    async def run():
        async with (
            prefilling(second) as spare,
            prefilling(first) as address,
            decoding(decoder, address, *[spare] * others) as (thread, asks),
        ):
            request = Request("r0", PROMPT, 30, sampling=GREEDY)
            outputs = thread.submit([request], transfer=cut_at(asks, cut))
            shown = []
            while cut > 61 and len(shown) < 3:
                shown += [token for output in await anext(outputs) for token in output.tokens]
            if cut < 61:
                await comes(lambda: asks.peers[0].transfers and next(iter(asks.peers[0].transfers.values()))._num_bytes)
            asks.peers[0].link.close()
            first.executor.go()
            return shown + [token for output in await read(outputs) for token in output.tokens]

    assert expected(PROMPT, 30) == asyncio.run(run())
    moved = others and cut < 61  # a token that was shown is not asked for again
    assert (moved, 1 - moved) == (sum(len(r.delivered) for r in records), sum(len(r.recalled) for r in records))
    assert 30 == sum(tokens_of(records))
    free(decoder)
    free(first)


def token(sock, header, **fields):
    send(sock, {"type": "token", "number": header["number"], "token": expected(PROMPT, 1)[0], "details": None} | fields)


MISDEEDS = {
    "a token for a part": (40, lambda sock, header: token(sock, header)),
    "all blocks of the prompt for a part": (40, lambda sock, header: blocks(sock, header, 0, 16)),
    "a part without its last block": (41, lambda sock, header: (blocks(sock, header, 0, 10), done(sock, header))),
    "a part without a token": (40, lambda sock, header: (blocks(sock, header, 0, 10), done(sock, header, token=None))),
    "a token for a whole prompt": (61, lambda sock, header: token(sock, header)),
    "a token that there is not": (70, lambda sock, header: token(sock, header, token=256)),
    "details that are none": (70, lambda sock, header: token(sock, header, details=[1])),
    "a token and an end": (70, lambda sock, header: (token(sock, header), close(sock))),
    "a token and a failure": (
        70,
        lambda sock, header: (token(sock, header), send(sock, {"type": "failed", "number": header["number"], "why": "no"})),
    ),
    "a last token without all KV": (
        70,
        lambda sock, header: (blocks(sock, header, 0, 15), token(sock, header), done(sock, header)),
    ),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_peer_that_sends_what_it_must_not_changes_no_token(misdeed, hurried):
    cut, act = MISDEEDS[misdeed]
    records = []
    decoder = engine(records=records)

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT], cut)

    with Peer(terms(decoder), act) as peer:
        assert [expected(PROMPT, OUTPUT)] == asyncio.run(run(peer.address))
    assert ["r0"] == [id for r in records for id in r.recalled]
    assert OUTPUT == sum(tokens_of(records))
    free(decoder)


def test_a_peer_of_an_older_release_hands_over_after_the_first_token(hurried):
    """It does not know the field `tokens`. The blocks that it sends are zeros, so the tokens here are not those of the prompt."""
    records = []
    decoder = engine(Unchecked(), records=records)

    def old(sock, header):
        all_blocks(sock, header)
        done(sock, header, token=expected(PROMPT[:50], 1)[0])

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT[:50]], 55)

    with Peer(terms(decoder), old) as peer:
        (tokens,) = asyncio.run(run(peer.address))
    assert expected(PROMPT[:50], 1) == tokens[:1]
    assert (1, OUTPUT - 1) == tokens_of(records)
    assert ["r0"] == [d.id for r in records for d in r.delivered]
    free(decoder)


class Verifying(Remembering):
    """Checks drafts, and writes their KV."""

    verifies = True

    def submit(self, plan):
        tokens = {}
        for w in plan.work:
            sampled = []
            for position, token in enumerate(w.tokens, w.start):
                self.kv[w.blocks[position // 4], position % 4] = token, position
                if w.decode or position == w.start + w.count - 1:
                    seen = self.kv[list(w.blocks)].reshape(-1, 2)[: position + 1]
                    sampled.append(int((seen[:, 0] * (seen[:, 1] + 7)).sum()) % 251)
            if w.samples:
                tokens[w.id] = w.verified(sampled)
        self.results.append(StepResult(plan.step, tokens, 0.001))


class Guessing:
    """Guesses right and wrong tokens."""

    draft_s = 0.0

    def propose(self, requests, most):
        return [
            [token if at % 3 else 250 - token for at, token in enumerate(expected(r.tokens(0, r.num_tokens), number), r.num_tokens)]
            for r, number in zip(requests, most, strict=True)
        ]


@pytest.mark.parametrize("cut", [62, 63, 64, 65, 66, 68, 72, 80])
def test_a_prefill_engine_that_guesses_sends_no_kv_of_a_wrong_guess(cut):
    speculation = Speculation(Guessing(), Linear(1.0, 0.0, 0.0), 4)
    decoder = engine()
    prefiller = Engine(Verifying(), bytes_as_text(), policies.load("sarathi", token_budget=16), speculation=speculation)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT, PROMPT[:60], PROMPT[:59]], cut, 24)

    assert [expected(prompt, 24) for prompt in (PROMPT, PROMPT[:60], PROMPT[:59])] == asyncio.run(run())
    assert cut < 64 or 0 < speculation.accepted < speculation.drafted
    free(decoder)
    free(prefiller)


class Unchecked(Remembering):
    """Its KV may be anything."""

    def submit(self, plan):
        for work in plan.work:
            end = work.start + work.count
            for position in range(end):
                self.kv[work.blocks[position // 4], position % 4, 1] = position
        super().submit(plan)


class Whole:
    """A policy that computes whole prompts only."""

    reserve = "prompt"
    stall_free = True

    def plan(self, draft):
        draft.decode_all()
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break


def test_of_a_request_that_ends_there_no_kv_comes_and_none_is_taken_for_cached():
    records = []
    decoder, prefiller = engine(records=records), engine()

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            answers = [await serve(thread, asks, [prompt], 1000) for prompt in ([3], PROMPT)]
            assert not decoder.busy
            return [*answers, await serve(thread, asks, [PROMPT], 1)]

    assert [[expected(prompt, OUTPUT)] for prompt in ([3], PROMPT, PROMPT)] == asyncio.run(run())
    (transfer,) = [d for r in records for d in r.delivered]
    assert 0 == transfer.cached
    free(decoder)
    free(prefiller)


def test_a_peer_of_an_older_release_that_does_not_end_it_is_no_reason_to_go_on_without_kv(hurried):
    records = []
    decoder = engine(records=records)

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT[:50]], 1000)

    with Peer(terms(decoder), done) as peer:
        assert [expected(PROMPT[:50], OUTPUT)] == asyncio.run(run(peer.address))
    assert ["r0"] == [id for r in records for id in r.recalled]
    free(decoder)


@pytest.mark.parametrize("policy", [Whole(), policies.load("orca")])
def test_a_policy_that_never_goes_on_with_a_part_gets_the_whole_prompt(policy):
    records = []
    decoder = Engine(Remembering(), bytes_as_text(), policy, record=records.append)
    prefiller = engine()

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT], 30)

    assert [expected(PROMPT, OUTPUT)] == asyncio.run(run())
    assert [None] == [d.cut for r in records for d in r.delivered]


@pytest.mark.parametrize(("cut", "elsewhere"), [(30, 0), (70, 1)])
def test_a_constraint_stays_here_after_the_first_token(cut, elsewhere):
    records = []
    decoder, prefiller = engine(records=records), engine()
    anything = Fixed([(b"", "")] * 20, 0)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            request = Request("r0", PROMPT, OUTPUT, sampling=Sampling(temperature=0, constraint=anything))
            return await read(thread.submit([request], transfer=cut_at(asks, cut)))

    assert expected(PROMPT, OUTPUT) == [token for output in asyncio.run(run()) for token in output.tokens]
    assert elsewhere == tokens_of(records)[0]


def test_a_part_is_due_after_its_share_of_the_time():
    cost = Fitted((0.001, 0.1, 0.0, 0.0, 0.0, 0.0))
    decoder = Engine(Remembering(), bytes_as_text(), policies.load("slo", Setup(cost, Slo.parse("ttft=6.1s,tbt=10s"))))
    prefiller = engine(Remembering(turns=0))

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            request = Request("a", PROMPT, 30, sampling=Sampling(seed=5), salt="mine", tenant="acme")
            outputs = thread.submit([request], transfer=cut_at(asks, 30))
            await comes(lambda: prefiller.scheduler.ledger.running)
            (twin,) = prefiller.scheduler.ledger.running
            outputs.close()
            prefiller.executor.go()
            await comes(lambda: not prefiller.busy)
            return twin

    twin = asyncio.run(run())
    assert (30, 1, "mine", "acme") == (len(twin.prompt), twin.max_tokens, twin.salt, twin.tenant)
    assert pytest.approx(3.0) == twin.slo.ttft.seconds
    assert GREEDY == twin.sampling, "the token after a part is nobody's"


class Scored(Remembering):
    """Tells the log-probability of each token."""

    def collect(self):
        result = super().collect()
        details = {id: [TokenLogprob(-float(token), ()) for token in tokens] for id, tokens in result.tokens.items()}
        return replace(result, details=details)


@pytest.mark.parametrize("cut", [30, 64])
def test_details_of_the_first_tokens_come_with_them(cut):
    decoder, prefiller = engine(Scored()), engine(Scored())

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await read(thread.submit([Request("a", PROMPT, 9, sampling=GREEDY)], transfer=cut_at(asks, cut)))

    for output in asyncio.run(run()):
        assert TokenLogprob(-float(output.tokens[0]), ()) == output.details


def test_many_requests_with_random_cuts_aborts_and_breaks_never_get_a_wrong_token(hurried, way):
    rng = random.Random(2)
    decoder, prefiller, other = engine(Remembering(80, overlap=True)), engine(Remembering(60)), engine(Remembering(overlap=True))
    prompts = [[rng.randrange(251) for _ in range(rng.randrange(1, 100))] for _ in range(100)]
    received: dict[int, list[int]] = {}
    whole: set[int] = set()

    async def client(thread, asks, number):
        await asyncio.sleep(rng.random())
        aborted = rng.random() < 0.3
        if not aborted:
            whole.add(number)
        request = Request(str(number), prompts[number], 24, arrival=number, sampling=GREEDY)
        with thread.submit([request], transfer=cut_at(asks, rng.randrange(1, 120))) as outputs:
            tokens = received.setdefault(number, [])
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.random() * 0.3 if aborted else PATIENCE_S):
                    async for batch in outputs:
                        tokens += [token for output in batch for token in output.tokens]

    async def run():
        async with prefilling(prefiller) as a, prefilling(other) as b, decoding(decoder, a, b) as (thread, asks):
            breaker = asyncio.create_task(breaks(asks, rng))
            await asyncio.gather(*(client(thread, asks, i) for i in range(len(prompts))))
            breaker.cancel()
            await comes(lambda: not decoder.busy and not prefiller.busy and not other.busy)

    asyncio.run(run())
    assert set(range(len(prompts))) == set(received)
    for number, tokens in received.items():
        assert expected(prompts[number], 24)[: 24 if number in whole else len(tokens)] == tokens
    for each in (decoder, prefiller, other):
        free(each)
