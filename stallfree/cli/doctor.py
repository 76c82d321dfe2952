"""`stallfree doctor`: prints what this machine is, what a server would choose on it, and what is in the way, to paste into a bug
report. `engine.doctor` finds it out.
"""

import json
from collections.abc import Iterator
from typing import Any

import typer

from stallfree.cli import options

NAMES = {
    "few_tokens": "few tokens",
    "kv": "KV",
    "kv_memory": "KV memory",
    "kv_tokens": "tokens of KV",
    "max_model_len": "longest sequence",
    "max_seqs": "requests",
    "max_tokens": "tokens",
    "slo": "target",
}
"""What a choice is called, where its key is not a word."""


def doctor(
    model: options.Model = None,
    weights: options.Weights = None,
    kv: options.Kv = None,
    kv_memory: options.KvMemory = None,
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
    executor: options.Executor = "openvino",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """What this machine is, what a server would choose on it and why, what that costs, and what would be faster or safer. Fetches
    and loads nothing. The exit code is 1 if something prevents serving."""
    from stallfree.engine.assemble import Options
    from stallfree.engine.doctor import checkup

    chosen = Options(
        model,
        executor,
        "slo",
        weights=weights,
        kv=kv,
        kv_memory=kv_memory,
        max_model_len=max_model_len,
        threads=threads,
        device=device,
    )
    report = checkup(chosen)
    typer.echo(json.dumps(report, indent=1) if as_json else "\n".join(lines(report)))
    if report["prevents"]:
        raise typer.Exit(1)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text, in sections."""
    yield from _section("versions", report["versions"])
    yield from _section("machine", _machine(report["machine"]))
    yield from _section("model", _model(report))
    if "chosen" in report:
        chosen = {
            NAMES.get(name, name): f"{_value(name, choice['value']):<12} {choice['why']}"
            for name, choice in report["chosen"].items()
        }
        yield from _section("chosen, and why", chosen)
    if "costs" in report:
        yield from _section("costs", _costs(report["costs"]))
    for title, nothing in (("findings", "nothing would be faster or safer"), ("prevents", "nothing prevents serving")):
        yield f"\n{title}"
        yield from (f"  - {text}" for text in report[title] or [nothing])


def _section(title: str, rows: dict[str, str]) -> Iterator[str]:
    yield f"\n{title}"
    yield from (f"  {name:<17} {text}" for name, text in rows.items())


def _machine(facts: dict[str, Any]) -> dict[str, str]:
    quota, memory = facts["quota"], facts["memory"]
    processors = _count(facts["processors"], "processor")
    usable = f"{_count(facts['usable_cores'], 'core')} with {_count(facts['usable_processors'], 'processor')}"
    rows = {
        "processor": f"{facts['processor']} ({facts['kind']})",
        "instructions": " ".join(facts["sets"]) or "none of AVX2, AVX-512, VNNI, AMX",
        "has": f"{processors}, {facts['processors_per_core']} a core, on {_count(facts['sockets'], 'socket')}; "
        f"{_count(facts['nodes'], 'NUMA node')}",
        "may be used": usable,
        "quota": "none" if quota is None else f"{quota['processors']:g} processors, by {quota['file']}",
        "memory": "unknown" if memory is None else f"{_gib(memory['free'])} free of {_gib(memory['limit'])}, by {memory['file']}",
        "huge pages": facts["huge_pages"] or "none",
        "load": "unknown" if facts["load"] is None else f"{facts['load']:.2f} in the last minute",
    }
    return rows | ({"frequency": ", ".join(facts["governors"])} if facts["governors"] else {})


def _model(report: dict[str, Any]) -> dict[str, str]:
    facts, memory = report["model"], report.get("memory")
    absent = "not found" if report["prevents"] else f"not fetched; `stallfree models pull {facts['name']}` fetches it"
    rows = {"name": facts["name"], "path": facts["path"] or absent}
    if facts["name"] == "simulated":
        rows["path"] = "none; the executor sleeps as a cost model says"
    if "family" in facts:
        rows["is"] = (
            f"{facts['family']}, {facts['parameters'] / 1e6:,.0f} million weights, at most {facts['max_model_len']:,} tokens"
        )
    if memory is not None:
        kv = "the rest of the GPU" if memory["kv"] is None else _gib(memory["kv"])
        free = "" if memory["free"] is None or memory["kv"] is None else f", of {_gib(memory['free'])} that are free"
        rows["takes"] = f"{_gib(memory['weights'])} for weights, {kv} for KV{free}"
    return rows


def _costs(costs: dict[str, Any]) -> dict[str, str]:
    if not costs:
        return {"not calibrated": "run `stallfree calibrate` with the same model and options, or serve it once"}
    ms = {name: f"{1000 * seconds:.1f} ms" for name, seconds in costs["seconds"].items()}
    return {
        "calibrated": costs["calibrated"],
        "one decode": f"{ms['decode']}, after 512 tokens",
        "16 decodes": f"{ms['decodes_16']}, after 512 tokens each",
        "prefill of 512": f"{ms['prefill_512']}, {costs['prefill_tokens_per_s']:,.0f} tokens/s",
    }


def _value(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name == "kv_memory":
        return _gib(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
