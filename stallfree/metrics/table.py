"""Reports as rows of text: side by side, then a row for each class, and a row for each tenant. It measures nothing."""

from collections.abc import Mapping
from dataclasses import fields

from stallfree.metrics.report import Attainment, Quantiles, Report

Rows = list[list[str]]


def table(reports: Mapping[str, Report]) -> Rows:
    """Reports side by side as text: a row of their names, then a row for each figure. Times are in milliseconds."""
    each = list(reports.values())
    rows = [
        ["", *reports],
        ["completed", *(str(r.completed) for r in each)],
        ["errors", *(", ".join(f"{n} {kind}" for kind, n in r.errors.items()) or "0" for r in each)],
        ["unfinished", *(str(r.unfinished) for r in each)],
        ["requests/s, nominal", *(_number(r.request_rate.nominal) for r in each)],
        ["requests/s, actual", *(_number(r.request_rate.actual) for r in each)],
        ["output tokens/s", *(_number(r.output_tokens_per_s) for r in each)],
    ]
    if any(r.cached_tokens for r in each):
        rows.append(["prompt tokens from the prefix cache", *(cached_share(r) for r in each)])
    for name in ("ttft", "tbt", "tpot", "e2e"):
        quantiles = [getattr(r, f"{name}_s") for r in each]
        for f in fields(Quantiles):
            values = (None if q is None else getattr(q, f.name) * 1e3 for q in quantiles)
            rows.append([f"{name.upper()} {f.name}, ms", *map(_number, values)])
    rows.append(["stalls", *("-" if r.stalls is None else f"{r.stalls.count} (> {r.stalls.after_s * 1e3:.4g} ms)" for r in each)])
    waits = (r.long_waits for r in each)
    rows.append(["waits for a first token", *(f"{w.count} (> {w.after_s:.4g} s), longest {w.longest_s:.3g} s" for w in waits)])
    for name, target in dict.fromkeys((name, attained.target) for r in each for name, attained in r.slo_attainment.items()):
        rows.append([f"within {name}={target}", *(_in_time(r.slo_attainment.get(name)) for r in each)])
    if any(r.goodput for r in each):
        rows.append(["requests within all targets", *("-" if r.goodput is None else f"{r.goodput.share:.2%}" for r in each)])
        rows.append(["goodput, requests/s", *(_number(None if r.goodput is None else r.goodput.requests_per_s) for r in each)])
    return rows


def cached_share(report: Report) -> str:
    """The share of the prompt tokens that were found in the prefix cache, in words."""
    return "-" if report.cached_tokens is None else f"{report.cached_tokens / max(1, report.prompt_tokens):.1%}"


def classes(reports: Mapping[str, Report]) -> Rows:
    """A row of names, then one for each service class in each report; no rows without classes. Times are in milliseconds."""
    heads = ["class", "requests", *_heads("TTFT"), *_heads("TBT"), "within all targets", "goodput, requests/s", "within each"]
    rows = [
        [
            _named(name, service_class, reports),
            str(part.requests),
            *_times(part.ttft_s),
            *_times(part.tbt_s),
            "-" if part.goodput is None else f"{part.goodput.share:.2%}",
            _number(None if part.goodput is None else part.goodput.requests_per_s),
            ", ".join(f"{target}={met.target} {_in_time(met)}" for target, met in part.slo_attainment.items()),
        ]
        for name, report in reports.items()
        for service_class, part in report.classes.items()
    ]
    return [heads, *rows] if rows else []


def tenants(reports: Mapping[str, Report]) -> Rows:
    """A row of names, then one for each tenant in each report, the one with most tokens first; no rows without tenants."""
    heads = ["tenant", "requests", "share of the tokens", "tokens", *_heads("TTFT")]
    rows = [
        [_named(name, tenant or "none", reports), str(part.requests), f"{part.share:.1%}", str(part.tokens), *_times(part.ttft_s)]
        for name, report in reports.items()
        for tenant, part in sorted(report.tenants.items(), key=lambda pair: -pair[1].tokens)
    ]
    return [heads, *rows] if rows else []


def _named(run: str, part: str, reports: Mapping[str, Report]) -> str:
    return part if len(reports) == 1 else f"{run}: {part}"


def _heads(name: str) -> list[str]:
    return [f"{name} p50, ms", f"{name} p99, ms"]


def _times(quantiles: Quantiles | None) -> list[str]:
    return ["-", "-"] if quantiles is None else [_number(1e3 * quantiles.p50), _number(1e3 * quantiles.p99)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _in_time(attained: Attainment | None) -> str:
    if attained is None or attained.in_time is None:
        return "-"
    return f"{attained.in_time:.2%} {'met' if attained.met else 'MISSED'}"
