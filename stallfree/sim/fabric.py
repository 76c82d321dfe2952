"""KV on its way between replicas: bytes that flow over shared ports, as fast as those let them.

A port is one direction of a node's network or of a replica's own links; whatever passes it at the same time shares its bandwidth
evenly. It knows bytes and seconds, not what they are for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf


@dataclass(eq=False, slots=True)
class Port:
    """`bandwidth` in bytes per second. `moved`: bytes that have passed."""

    bandwidth: float
    moved: float = 0.0
    flows: int = 0


@dataclass(eq=False, slots=True)
class Flow:
    """`left` bytes on their way through all of `ports`; `done` is called with the moment when the last is there."""

    left: float
    ports: tuple[Port, ...]
    done: Callable[[float], None]
    begin: float
    rate: float = 0.0


@dataclass(slots=True)
class Fabric:
    """All flows. `due`: when one of them begins or ends next, if no other comes; inf without any."""

    due: float = inf
    _now: float = 0.0
    _coming: list[Flow] = field(default_factory=list)
    _flowing: list[Flow] = field(default_factory=list)

    def send(self, size: float, ports: tuple[Port, ...], begin: float, done: Callable[[float], None]) -> None:
        """`size` bytes flow from `begin` on, which is not before the moment to which the fabric has run."""
        self._coming.append(Flow(size, ports, done, begin))
        self.due = min(self.due, begin)

    def run(self) -> None:
        """Go on to `due`: what is there is told, and what begins shares from now on."""
        now, flowing = self.due, self._flowing
        for flow in flowing:
            part = min(flow.left, flow.rate * (now - self._now))
            # What is due is due, whatever is left of it by rounding.
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
