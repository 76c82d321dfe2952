"""Of whom requests are here, from records: each tenant's weight, how many of its requests wait, and how many tokens an iteration
computed for it. It judges nothing, and forgets a tenant with its last request.
"""

from stallfree.core.record import StepRecord


class Tenant:
    """A tenant of whom requests are here: its `weight`, that of its last request, how many of its requests have not ended
    (`present`), and how many of these have no first token (`waiting`)."""

    __slots__ = ("present", "waiting", "weight")

    def __init__(self) -> None:
        self.weight = 1.0
        self.present = self.waiting = 0


class Tenants:
    """`here`: the tenants by name; "" has the requests without one. Another thread may read it."""

    def __init__(self) -> None:
        self.here: dict[str, Tenant] = {}
        self._whose: dict[str, str] = {}
        self._unanswered: set[str] = set()

    def arrive(self, step: StepRecord) -> None:
        """The requests of a record have arrived."""
        owners = {id: (tenant, weight) for id, tenant, weight in step.tenants}
        for request in step.arrived:
            name, weight = owners.get(request.id, ("", 1.0))
            self._whose[request.id] = name
            self._unanswered.add(request.id)
            tenant = self.here.get(name) or self.here.setdefault(name, Tenant())
            tenant.weight = weight
            tenant.present += 1
            tenant.waiting += 1

    def of(self, id: str) -> str:
        """The tenant of a request that has not ended; "" for none."""
        return self._whose[id]

    def answer(self, id: str) -> None:
        """A request has its first token. A second call does nothing."""
        if id in self._unanswered:
            self._unanswered.discard(id)
            self.here[self._whose[id]].waiting -= 1

    def end(self, id: str) -> str:
        """A request has ended. Returns its tenant."""
        self.answer(id)
        name = self._whose.pop(id)
        self.here[name].present -= 1
        if not self.here[name].present:
            del self.here[name]
        return name

    def served(self, step: StepRecord) -> dict[str, int]:
        """Tokens that an iteration computed, by tenant; none while no request here has a tenant."""
        served: dict[str, int] = {}
        if not self.here.keys() - {""}:
            return served
        for id, _, count in step.work:
            if (name := self._whose.get(id)) is not None:
                served[name] = served.get(name, 0) + count
        return served
