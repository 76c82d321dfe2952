"""KV transfers between replicas as bytes that flow through shared ports.

A port is one direction of a node's network or of a replica's own links. Flows that pass it at the same time share its bandwidth
evenly. It knows bytes and seconds, not what they are for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf


@dataclass(eq=False, slots=True)
class Port:
    """`bandwidth` in bytes per second. `moved`: bytes that have passed. `flows`: how many flows pass it now."""

    bandwidth: float
    moved: float = 0.0
    flows: int = 0


@dataclass(eq=False, slots=True)
class Flow:
    """`left` bytes that pass all of `ports` from `begin` (s) on. `done` is called with the moment of the last byte."""

    left: float
    ports: tuple[Port, ...]
    done: Callable[[float], None]
    begin: float
    rate: float = 0.0


@dataclass(slots=True)
class Fabric:
    """All flows. `due`: when the next flow begins or ends, if none is added; inf without flows."""

    due: float = inf
    _now: float = 0.0
    _coming: list[Flow] = field(default_factory=list)
    _flowing: list[Flow] = field(default_factory=list)

    def send(self, size: float, ports: tuple[Port, ...], begin: float, done: Callable[[float], None]) -> None:
        """Add a flow of `size` bytes from `begin` on, which must not be before the last `run`."""
        self._coming.append(Flow(size, ports, done, begin))
        self.due = min(self.due, begin)

    def run(self) -> None:
        """Go on to `due`. Flows that have ended are reported; flows that begin share bandwidth from now on."""
        now, flowing = self.due, self._flowing
        for flow in flowing:
            part = min(flow.left, flow.rate * (now - self._now))
            # A flow that is due has ended, whatever rounding leaves of it.
            if now >= self._now + flow.left / flow.rate:
                part = flow.left
            flow.left -= part
            for port in flow.ports:
                port.moved += part
        self._now = now
        ended = [flow for flow in flowing if flow.left <= 0]
        begun = [flow for flow in self._coming if flow.begin <= now]
        self._flowing = flowing = [flow for flow in flowing if flow.left > 0] + begun
        self._coming = [flow for flow in self._coming if flow.begin > now]
        for flow in ended:
            for port in flow.ports:
                port.flows -= 1
        for flow in begun:
            for port in flow.ports:
                port.flows += 1
        self.due = min([flow.begin for flow in self._coming], default=inf)
        for flow in flowing:
            flow.rate = min([port.bandwidth / port.flows for port in flow.ports])
            self.due = min(self.due, now + flow.left / flow.rate)
        for flow in ended:
            flow.done(now)
