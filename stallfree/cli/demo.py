"""`stallfree demo`: the same burst under a fixed token budget and under the SLO policy, drawn live. It opens no port.

Both run in this process and on one model. They take turns, an iteration each, so that they have the same machine.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer

from stallfree.cli import options

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from stallfree.core.policy import Policy
    from stallfree.core.request import Request
    from stallfree.core.slo import Slo
    from stallfree.engine.turns import Player
    from stallfree.executors.base import Executor
    from stallfree.metrics.report import Quantiles, Report

STREAMS, STREAM_PROMPT, STREAM_TOKENS = 8, 64, 250
PROMPTS, LONG_PROMPT, LONG_TOKENS = 4, 1500, 16
FIRST_S, EVERY_S = 2.0, 1.0
"""Seconds until the first long prompt arrives, and between two of them."""
LAST_S = 20.0
"""Seconds on a run's own clock after which it ends, even unfinished: a slow machine must also need less than a minute."""
REDRAW_S = 0.125
BESIDE = 76
"""Terminal columns from which on two charts stand beside each other."""
HEAD = f"""\
{STREAMS} streams; from {FIRST_S:g} s on {PROMPTS} prompts of {LONG_PROMPT:,} tokens arrive. One model, in turns.
Above: longest wait for a token, ms (dashed: SLO). Below: tokens an iteration."""


def demo(
    model: options.Model = None,
    slo: Annotated[str, typer.Option(help="The latency target of the slo policy.")] = "tbt=100ms",
    token_budget: Annotated[int, typer.Option(help="The fixed token budget to compare with.")] = 512,
    executor: options.Executor = "openvino",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Watch streams while long prompts arrive, under a fixed token budget and under the SLO policy. It takes under a minute."""
    from rich.console import Console
    from rich.live import Live

    from stallfree import policies
    from stallfree.core.slo import Slo
    from stallfree.engine.assemble import Options, assemble
    from stallfree.engine.turns import Player, Share

    fixed = policies.load("sarathi", token_budget=token_budget)
    assembled = assemble(
        Options(model, executor=executor, policy="slo", slo=slo, threads=threads),
        say=lambda line: typer.echo(line, err=True),
        progress=options.progress,
    )
    engine, targets = assembled.engine, assembled.slo or Slo()
    chosen = {f"fixed budget, {token_budget} tokens": fixed, f"slo, {targets}": cast("Policy", engine.scheduler.policy)}
    clock = _clock(engine.executor)
    players = {
        name: Player(Share(engine.executor, number, len(chosen)), engine.text, policy, burst(engine.text.vocab_size), clock)
        for number, (name, policy) in enumerate(chosen.items())
    }
    console = Console()
    try:
        if as_json or not console.is_terminal or console.is_dumb_terminal or console.options.ascii_only:
            play(list(players.values()), lambda: None)
        else:
            picture = Picture(console, players, targets)
            with Live(console=console, auto_refresh=False) as live:
                play(list(players.values()), lambda: picture.redraw(live.update))
                live.update(picture.now(), refresh=True)
    finally:
        engine.close()
    results = {name: _reports(player, targets) for name, player in players.items()}
    if as_json:
        runs = ({"all": asdict(overall), "long_prompts": asdict(prompts)} for overall, prompts in results.values())
        typer.echo(
            json.dumps({"target": str(targets), "token_budget": token_budget} | dict(zip(("fixed", "slo"), runs, strict=True)))
        )
    else:
        console.print(_table(results))


def burst(vocabulary: int) -> list[Request]:
    """Requests for streams, and for long prompts that arrive while these decode. Every call draws the same tokens."""
    from stallfree.core.request import Request
    from stallfree.executors.sampling import GREEDY

    rng = random.Random(0)
    streams = [(f"stream-{i}", 0.1 * i, STREAM_PROMPT, STREAM_TOKENS) for i in range(STREAMS)]
    prompts = [(f"prompt-{i}", FIRST_S + EVERY_S * i, LONG_PROMPT, LONG_TOKENS) for i in range(PROMPTS)]
    ordinary = range(vocabulary // 4, vocabulary // 2)
    return [Request(id, rng.choices(ordinary, k=n), out, arrival=at, sampling=GREEDY) for id, at, n, out in streams + prompts]


def play(players: Sequence[Player], watch: Callable[[], None]) -> None:
    """Play all to their end. The player whose clock is furthest behind is next. `watch` is called between turns."""
    while going := [player for player in players if not player.done and player.clock() < LAST_S]:
        min(going, key=lambda player: player.clock()).turn()
        watch()


class Lane:
    """One player's data for its charts. For each iteration: its end (s), the longest wait for a token in it (ms), and its tokens.
    `late`: how many of the `tokens` came after they were due.
    """

    def __init__(self, name: str, player: Player, slo: Slo):
        from stallfree.metrics.stalls import StallAccount

        self.name = name
        self.ends: list[float] = [0.0]
        self.waits: list[float] = [0.0]
        self.sizes: list[float] = [0.0]
        self.tokens = self.late = 0
        self._records = player.records
        self._account = StallAccount(slo)

    def catch_up(self) -> None:
        for record in self._records[len(self.ends) - 1 :]:
            self.late += sum(stall.kind == "late" for stall in self._account.record(record))
            self.tokens += len(self._account.gaps)
            self.ends.append(record.t_end)
            self.waits.append(1e3 * max(self._account.gaps, default=0.0))
            self.sizes.append(sum(count for _, _, count in record.work))

    def bars(self, values: Sequence[float], number: int, seconds: float) -> list[float]:
        """The largest of `values` in each of `number` parts of the first `seconds`."""
        bars = [0.0] * number
        for end, value in zip(self.ends, values, strict=True):
            at = min(int(end / seconds * number), number - 1)
            bars[at] = max(bars[at], value)
        return bars


class Picture:
    """All lanes on the same scales; side by side if the terminal is wide enough."""

    def __init__(self, console: Console, players: Mapping[str, Player], slo: Slo):
        self._console = console
        self._lanes = [Lane(name, player, slo) for name, player in players.items()]
        self._pace = slo.tbt or slo.tpot
        self._drawn = 0.0

    def redraw(self, update: Callable[..., None]) -> None:
        if time.perf_counter() - self._drawn > REDRAW_S:
            update(self.now(), refresh=True)
            self._drawn = time.perf_counter()

    def now(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        for lane in self._lanes:
            lane.catch_up()
        width, height = self._console.size
        beside = len(self._lanes) if width >= BESIDE else 1
        seconds = 5.0 * (1 + max(lane.ends[-1] for lane in self._lanes) // 5)
        room = (height - 1 - len(HEAD.splitlines())) * beside // len(self._lanes)
        grid = Table.grid(padding=(0, 1, 0, 0))
        drawn = [self._draw(lane, width // beside - 1, room, seconds) for lane in self._lanes]
        for first in range(0, len(drawn), beside):
            grid.add_row(*drawn[first : first + beside])
        return Group(Text(HEAD, no_wrap=True, overflow="ellipsis"), grid)

    def _draw(self, lane: Lane, width: int, height: int, seconds: float) -> RenderableType:
        """`height` lines: three of text, and two charts, the lower one smaller."""
        from rich.console import Group
        from rich.text import Text

        from stallfree.cli.chart import LABEL, chart

        number, line = width - LABEL, 1e3 * self._pace.seconds if self._pace else None
        below = 3 if height >= 10 else 2
        above = min(height - 3 - below, 14)
        longest = max(max(lane.waits) for lane in self._lanes)
        most = max(max(lane.sizes) for lane in self._lanes)
        figures = f"late {lane.late / max(1, lane.tokens):.1%}, longest wait {max(lane.waits):.0f} ms"
        axis = f"{'':{LABEL}}0 s{f'{seconds:.0f} s':>{number - 3}}"
        return Group(
            Text(lane.name, "bold", no_wrap=True, overflow="ellipsis"),
            chart(lane.bars(lane.waits, number, seconds), above, max(2 * (line or 1.0), longest), line),
            chart(lane.bars(lane.sizes, number, seconds), below, max(1.0, most)),
            Text(axis, "dim", no_wrap=True),
            Text(figures, no_wrap=True, overflow="ellipsis"),
        )


def _reports(player: Player, slo: Slo) -> tuple[Report, Report]:
    """The reports of all requests, and of the long prompts alone."""
    from stallfree.metrics.report import report
    from stallfree.metrics.timeline import timelines

    lines = timelines(player.records).values()
    return report(lines, slo), report([line for line in lines if line.prompt_tokens == LONG_PROMPT], slo)


def _table(results: Mapping[str, tuple[Report, Report]]) -> Table:
    from rich.table import Column, Table

    table = Table("", *(Column(name, justify="right") for name in results), box=None)
    for name in next(iter(results.values()))[0].slo_attainment:
        attained = [overall.slo_attainment[name] for overall, _ in results.values()]
        late = ("-" if a.in_time is None else f"{1 - a.in_time:.1%}" for a in attained)
        table.add_row(f"tokens late for {name} {attained[0].target}", *late)
    for name, which in (("p50", "p50"), ("p99", "p99"), ("longest", "max")):
        table.add_row(f"TBT {name}, ms", *(_ms(overall.tbt_s, which) for overall, _ in results.values()))
    table.add_row("TTFT p50, ms", *(_ms(overall.ttft_s, "p50") for overall, _ in results.values()))
    table.add_row("TTFT p50 of the long prompts, ms", *(_ms(prompts.ttft_s, "p50") for _, prompts in results.values()))
    table.add_row("output tokens/s", *(f"{overall.output_tokens_per_s:.0f}" for overall, _ in results.values()))
    if any(overall.unfinished for overall, _ in results.values()):
        table.add_row(f"unfinished after {LAST_S:g} s", *(str(overall.unfinished) for overall, _ in results.values()))
    return table


def _ms(seconds: Quantiles | None, which: str) -> str:
    return "-" if seconds is None else f"{1e3 * getattr(seconds, which):.0f}"


def _clock(executor: Executor) -> Callable[[], float]:
    """A clock in seconds. With the simulated executor, sleeping advances the clock at once."""
    from stallfree.executors.simulated import SimulatedExecutor

    if not isinstance(executor, SimulatedExecutor):
        return time.perf_counter
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += seconds

    executor.sleep = sleep
    return lambda: passed[0]
