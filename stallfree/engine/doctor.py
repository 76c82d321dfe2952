"""What this machine is, what a server would choose on it, what that costs, and what is in the way: without a network, and without
loading the model. It chooses nothing; it asks `assemble`, which does.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from stallfree import __version__
from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.checkpoint.fetch import EMBEDDED, PACKAGED, cache_folder, check_room, existing, present
from stallfree.checkpoint.identity import identity
from stallfree.engine import assemble, calibrate, formats
from stallfree.executors.host_memory import MOST_KV, SPARE, kv_bytes_per_token, mib, weight_bytes
from stallfree.executors.machine import Machine, governors, huge_pages, load, machine, memory
from stallfree.policies.slo import Slo

PACKAGES = ("openvino", "torch", "numba", "numpy", "tokenizers")
"""The packages whose versions decide what runs, and how fast."""

CHUNK = 512
"""Tokens of the prefill that is priced."""

COSTS = {"decode": [(512, 1)], "decodes_16": [(512, 1)] * 16, "prefill_512": [(0, CHUNK)]}
"""The iterations that are priced: decodes with 512 tokens of context, and a chunk."""

BUSY = 0.5
"""The load, as a share of the processors, from which on other processes slow this one."""

KEPT = 64 << 20
"""Bytes that should be free in the cache folder. Calibrations are kept there."""

FOLLOWING = ("intel_pstate", "amd-pstate-epp")
"""Drivers whose governor powersave follows the load. With the others it is the lowest frequency."""


def checkup(options: assemble.Options) -> dict[str, Any]:
    """All that is known, in sections: `versions`, `machine`, `model`, `chosen`, `costs`, `memory`, `findings` (what would be faster
    or safer) and `prevents` (why no server can start). Sections without the model's files are short. Sizes are in bytes, times in
    seconds. The home folder is ~.
    """
    here = machine()
    name = "simulated" if options.executor == "simulated" else options.model or EMBEDDED
    report: dict[str, Any] = {"versions": _versions(), "machine": _machine(here), "model": {"name": name, "path": None}}
    findings, prevents = [*_slower(here), *_cache(cache_folder()), *_mismatched()], []
    try:
        assemble.check_executor(options.executor)
        path = None if options.executor == "simulated" else present(options.model)
        if path is not None:
            report["model"]["path"] = str(path)
        elif name.lower() in PACKAGED:
            check_room(name.lower())
        if path is not None and options.executor in assemble.MAKERS:
            checkpoint = open_checkpoint(path)
            config, complete = checkpoint.config, assemble.completed(options, checkpoint)
            report["model"] |= {"family": config.family, "parameters": config.parameters, "max_model_len": config.max_model_len}
            report["memory"] = _memory(complete, checkpoint)
            report["costs"] = _costs(complete, checkpoint)
            report["chosen"] = _chosen(options, complete, checkpoint, report, here)
            findings += [*_safer(complete, report, here), *_converted(complete, checkpoint, report["memory"]["weights"])]
            report["chosen"]["arithmetic"] = _choice(form := assemble.arithmetic(complete, checkpoint), _reason(here))
            if form == "f32" and here.has_bf16():
                findings.append("the processor multiplies in bf16, and f32 was chosen; --weights int8 with --kv u8 is faster")
    except ImportError as error:
        prevents.append(f"executor {options.executor} needs {error.name}, which cannot be imported; install stallfree again")
    except (ValueError, MemoryError, OSError) as error:
        prevents.append(str(error))
    return dict(_without_home(report | {"findings": findings, "prevents": prevents}))


def _versions() -> dict[str, str]:
    versions = {"stallfree": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    system = [platform.system(), platform.release(), platform.machine()]
    with suppress(OSError):
        system.insert(0, platform.freedesktop_os_release().get("PRETTY_NAME", ""))
    return versions | {"system": " ".join(filter(None, system))}


def _mismatched() -> Iterator[str]:
    """Packages in other versions than the one that this release was made with."""
    with suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("stallfree") or ():
            if pinned := re.fullmatch(r"([\w-]+)==([\w.]+)", requirement):
                name, version = pinned.groups()
                if (installed := metadata.version(name)) != version:
                    yield f"{name} {installed} is installed, and this release was made with {version}; pip install {requirement}"


def _machine(here: Machine) -> dict[str, Any]:
    room = memory()
    return {
        "processor": here.name,
        "kind": here.kind,
        "sets": list(here.sets),
        "sockets": here.sockets,
        "nodes": here.nodes,
        "processors": here.processors,
        "processors_per_core": here.smt,
        "usable_cores": len(here.cores),
        "usable_processors": sum(len(core.processors) for core in here.cores),
        "quota": None if here.quota is None else asdict(here.quota),
        "memory": None if room is None else asdict(room),
        "huge_pages": huge_pages(),
        "load": load(),
        "governors": sorted(governors()),
    }


def _memory(options: assemble.Options, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model takes; None for what a GPU's memory decides."""
    room, weights = memory(), weight_bytes(checkpoint, options.weights or "")
    per_token = kv_bytes_per_token(checkpoint.config, options.kv or "")
    kv = options.kv_memory
    return {
        "weights": weights,
        "kv": kv,
        "kv_per_token": per_token,
        "kv_tokens": None if kv is None else kv // per_token,
        "free": None if room is None else room.free,
        "limit": None if room is None else str(room),
    }


def _costs(options: assemble.Options, checkpoint: Checkpoint) -> dict[str, Any]:
    """Seconds of `COSTS` by the calibration that is kept for these options, and its date; empty if none is."""
    longest = options.max_model_len or checkpoint.config.max_model_len
    key, folder = assemble.calibration_key(options, checkpoint.path, longest), cache_folder() / "calibration"
    cost, when = calibrate.remembered(key, folder), calibrate.calibrated_at(key, folder)
    if cost is None or when is None:
        return {}
    seconds = {name: cost.seconds(shape) for name, shape in COSTS.items()}
    speed = CHUNK / seconds["prefill_512"]
    target = {"slo": str(Slo(cost=cost).slo), "slo_basis": assemble.basis(cost, key)}
    found = {
        "calibrated": when.isoformat(" ", "minutes"),
        "seconds": seconds,
        "prefill_tokens_per_s": speed,
        "few_tokens": cost.few,
    }
    return found | target


def _chosen(
    given: assemble.Options, options: assemble.Options, checkpoint: Checkpoint, report: dict[str, Any], here: Machine
) -> dict[str, dict[str, Any]]:
    """Each choice, and its reason. `given`: the options before they were completed."""
    size, costs, config = report["memory"], report["costs"], report["model"]
    usual = f"the default of executor {options.executor}"
    if given.weights not in (None, "auto"):
        why_weights = "asked for"
    else:
        why_weights = formats.chosen(checkpoint, options.threads).why if options.executor == "openvino" else usual
    if given.kv_memory is not None:
        why_kv = "asked for"
    elif options.kv_memory is None:
        why_kv = f"the rest of --gpu-memory-utilization {options.gpu_memory_utilization:g}"
    elif options.kv_memory == MOST_KV:
        why_kv = "the most by default"
    else:
        quarter = size["free"] is not None and abs(4 * options.kv_memory / size["free"] - 1) < 0.02  # it changes all the time
        why_kv = "a quarter of the free memory" if quarter else f"what the weights leave of {SPARE:.0%} of the free memory"
    if given.threads is not None:
        why_threads = "asked for"
    elif here.threads < here.socket_cores and here.quota is not None:
        why_threads = f"the whole processors that {here.quota.file} allows"
    else:
        why_threads = "one for each core of a socket that this process may use"
    return {
        "executor": _choice(options.executor, assemble.EXECUTORS[options.executor]),
        "weights": _choice(options.weights, why_weights),
        "kv": _choice(options.kv, "asked for" if given.kv else usual),
        "threads": _choice(options.threads or here.threads, why_threads),
        "kv_memory": _choice(options.kv_memory, why_kv),
        "kv_tokens": _choice(size["kv_tokens"], f"{size['kv_per_token']:,} bytes each"),
        "max_model_len": _choice(
            options.max_model_len or config["max_model_len"], "asked for" if options.max_model_len else "the model's"
        ),
        "max_seqs": _choice(options.max_seqs, "most requests at once, by default"),
        "max_tokens": _choice(options.max_tokens, "most tokens of an iteration, by default; the policy takes fewer"),
        **_few_tokens(options, checkpoint, costs),
        "slo": _choice(costs.get("slo"), costs.get("slo_basis", "5 small decode iterations, once they are calibrated")),
    }


def _few_tokens(options: assemble.Options, checkpoint: Checkpoint, costs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Up to how many tokens an iteration does not take the graph, for the executor that has one."""
    if options.executor != "openvino":
        return {}
    from stallfree.executors.openvino.few import MOST, obstacle

    graph = formats.graph(checkpoint.path, options.weights or "", options.kv or "", options.threads)
    if graph is not None and not graph.wanted:
        return {"few_tokens": _choice("all", f"no iteration takes the graph: {graph.why}")}
    if why := obstacle(checkpoint, options.weights or "", options.kv or ""):
        return {"few_tokens": _choice(0, f"every iteration takes the graph; the quicker way for few tokens {why}")}
    few = costs.get("few_tokens")
    when = "as calibrated" if few is not None else f"0 to {MOST}, once calibrated"
    return {"few_tokens": _choice(few, f"an iteration of at most so many does not take the graph: {when}")}


def _choice(value: object, why: str) -> dict[str, Any]:
    return {"value": value, "why": why}


def _reason(here: Machine) -> str:
    return f"for all but products of quantised weights; the processor has {'bf16' if here.has_bf16() else 'no bf16'}"


def _safer(options: assemble.Options, report: dict[str, Any], here: Machine) -> Iterator[str]:
    """What the chosen options make slow or risky."""
    size, longest = report["memory"], report["chosen"]["max_model_len"]["value"]
    if options.threads is not None and (objection := here.objection(options.threads)):
        yield objection
    if size["kv"] is None or size["free"] is None:
        return
    if SPARE * size["free"] < size["weights"] + size["kv"] <= size["free"]:
        yield (
            f"weights and KV take {(size['weights'] + size['kv']) / size['free']:.0%} of the free memory, which leaves little "
            f"for the runtime; give --kv-memory {mib(max(1 << 20, int(SPARE * size['free']) - size['weights']))} or less"
        )
    if 0 < size["kv_tokens"] < longest:
        whole = longest * size["kv_per_token"]
        fits = whole + size["weights"] <= SPARE * size["free"]
        yield (
            f"the KV cache holds {size['kv_tokens']:,} tokens of a sequence, which may have {longest:,}; longer ones are refused; "
            + (f"--kv-memory {mib(whole)} holds a whole one" if fits else "fewer bits (--kv u4) hold more")
        )


def _converted(options: assemble.Options, checkpoint: Checkpoint, needed: int) -> Iterator[str]:
    """What keeps converted weights, of `needed` bytes, from being there at the next start."""
    folder = cache_folder() / "converted"
    if options.executor != "openvino" or any(folder.glob(f"{identity(checkpoint)}-{options.weights}.*")):
        return
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        yield (
            f"the disk of {folder} has {free / 1e6:.0f} MB free, and converted weights take {needed / 1e6:.0f} MB, so every start "
            "converts them again; free some space, or set STALLFREE_CACHE to another folder"
        )


def _slower(here: Machine) -> Iterator[str]:
    """What makes this machine slower than it could be."""
    usable, busy = sum(len(core.processors) for core in here.cores), load()
    if here.quota is not None and here.quota.processors < usable:
        yield (
            f"{here.quota.file} allows {here.quota.processors:g} of the {usable} processors that this process may use, so it "
            f"computes with {here.threads} of them; a larger quota (docker run --cpus, resources.limits.cpu) is faster"
        )
    if len({core.socket for core in here.cores}) > 1:
        yield (
            f"a server uses the {here.socket_cores} cores of one socket; start one for each socket, bound to it, with a router "
            "before them (docs/doctor.md)"
        )
    if busy is not None and busy >= BUSY * usable:
        yield (
            f"in the last minute {busy:.1f} threads ran or waited, on {usable} processors: other processes slow iterations, and a "
            "calibration made now will be wrong"
        )
    if lowest := [pair for pair in governors() if pair.endswith(" powersave") and not pair.startswith(FOLLOWING)]:
        yield f"the frequency governor is {lowest[0]}, the lowest frequency; as root: cpupower frequency-set -g performance"
    if huge_pages() == "never":
        yield (
            "transparent huge pages are off, which makes attention slower; as root: "
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )


def _cache(folder: Path) -> Iterator[str]:
    """What the cache folder lacks."""
    free = shutil.disk_usage(existing(folder)).free
    if not os.access(existing(folder), os.W_OK):
        yield f"{folder} cannot be written, so every start calibrates again; set STALLFREE_CACHE to another folder"
    elif free < KEPT:
        yield f"the disk of {folder} has {free / 1e6:.0f} MB free, so calibrations may not be kept; free some space"


def _without_home(part: Any) -> Any:
    """`part` of a report, in which the home folder is ~: its name is often a person's."""
    if isinstance(part, dict):
        return {key: _without_home(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_without_home(value) for value in part]
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", part) if isinstance(part, str) and home != "/" else part
