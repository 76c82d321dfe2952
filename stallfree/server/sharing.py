"""Prometheus metrics by tenant and by service class, with a limit on how many tenants have series of their own.

It reads what the account of stalls found, and is told of refusals. It does not know who the tenants are.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from stallfree.metrics.stalls import Ended, StallAccount

MOST_LABELS = 32
"""Tenants, and classes, with series of their own: those seen first. Each series costs memory here and in Prometheus for ever, and a
client may make up any number of names."""
REST = "other"
"""The label of all the others."""


class Labels:
    """The labels of names: the names themselves for the first `MOST_LABELS`, then `REST`."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        if name not in self._known and len(self._known) < MOST_LABELS:
            self._known.add(name)
        return name if name in self._known else REST


class Sharing:
    """Counts by tenant and by class. Its caller makes sure that only one thread uses it at a time."""

    def __init__(self) -> None:
        self._tenants, self._classes = Labels(), Labels()
        self._requests, self._tokens = Counter[str](), Counter[str]()
        self._looked_up, self._found = Counter[str](), Counter[str]()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._of_class = {name: Counter[str]() for name in CLASS_TEXTS}

    def record(self, account: StallAccount) -> None:
        """Count what `account` found in the latest record."""
        for tenant, tokens in account.served.items():
            if tenant:
                self._tokens[self._tenants.of(tenant)] += tokens
        for tenant, (looked_up, found) in account.lookups.items():
            if tenant:
                self._looked_up[self._tenants.of(tenant)] += looked_up
                self._found[self._tenants.of(tenant)] += found
        for ended in account.ended:
            if ended.tenant:
                self._requests[self._tenants.of(ended.tenant)] += 1
            if ended.service_class and ended.reason in ("stop", "length"):
                self._judge(ended, self._classes.of(ended.service_class))

    def refuse(self, tenant: str, reason: str) -> None:
        """A request of `tenant` was refused. `reason`: one of a few words."""
        self._refused[self._tenants.of(tenant), reason] += 1

    def families(self) -> Iterator[Metric]:
        yield _counter("tenant_requests", "Requests that ended, by tenant.", self._requests, "tenant")
        yield _counter("tenant_tokens", "Tokens computed, prefill and decode, by tenant.", self._tokens, "tenant")
        looked_up, found = "Tokens looked up in the prefix cache, by tenant.", "Tokens found there, by tenant."
        yield _counter("tenant_prefix_lookup_tokens", looked_up, self._looked_up, "tenant")
        yield _counter("tenant_cached_tokens", found, self._found, "tenant")
        refused = CounterMetricFamily("stallfree_refused", "Requests that were refused.", labels=["tenant", "reason"])
        for labels, number in self._refused.items():
            refused.add_metric(list(labels), number)
        yield refused
        for name, text in CLASS_TEXTS.items():
            yield _counter(name, text, self._of_class[name], "class")

    def _judge(self, ended: Ended, service_class: str) -> None:
        counts = {
            "class_requests": ended.in_time is not None,
            "class_requests_in_time": ended.in_time is True,
            "class_tokens": ended.judged_tokens,
            "class_late_tokens": ended.late_tokens,
        }
        for name, number in counts.items():
            self._of_class[name][service_class] += number


CLASS_TEXTS = {
    "class_requests": "Requests with a target that were neither aborted nor failed, by class.",
    "class_requests_in_time": "Of these requests, those that met all targets of their class.",
    "class_tokens": "Tokens after the first one that had a deadline, of the requests that ended, by class.",
    "class_late_tokens": "Of these tokens, those that came late.",
}


def _counter(name: str, text: str, values: Mapping[str, int], label: str) -> Metric:
    family = CounterMetricFamily(f"stallfree_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
