"""The machine: device, driver, clocks and versions, and the rates of a large copy and of a large product."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gpu.made import Absent

from stallfree.perf import hardware
from stallfree.perf.hardware import Hardware

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "transformers", "flashinfer-python")
SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def cases(device: str, quick: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    return [("machine", lambda: machine(device)), ("rates", lambda: named(device)), ("hardware", lambda: known(device))]


def machine(device: str) -> dict[str, Any]:
    if device == "cuda" and not torch.cuda.is_available():
        raise Absent("torch finds no GPU; --device cpu is a dry run")
    facts: dict[str, Any] = {"device": "processor", "cores": os.cpu_count(), "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts |= {"memory, GiB": properties.total_memory / 2**30, "processors": properties.multi_processor_count}
        facts |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
        facts |= smi()
    return facts | {name: version(name) for name in PACKAGES} | {"date": time.strftime("%Y-%m-%d")}


def smi() -> dict[str, str]:
    """The values of nvidia-smi; empty where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (value.strip() for value in output.splitlines()[0].split(",")), strict=False))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str, least: int = 5, most: int = 30, enough_s: float = 0.7) -> list[float]:
    """Times of `run` with the device's work, after two that do not count: `least` times, then until `enough_s`, at most `most`."""
    times: list[float] = []
    for turn in range(2 + most):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times += [time.perf_counter() - began] if turn > 1 else []
        if len(times) >= least and sum(times) > enough_s:
            break
    return times


@cache
def rates(device: str) -> tuple[float, float]:
    """Bytes per second of a copy (read plus written), and FLOP/s of a bfloat16 product; both of random numbers."""
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 22, 128)
    block = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    into = torch.empty_like(block)
    copy = 2 * size / statistics.median(seconds(lambda: into.copy_(block), device))
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return copy, 2 * side**3 / statistics.median(seconds(lambda: a @ b, device))


def named(device: str) -> dict[str, Any]:
    copy, product = rates(device)
    return {"copy, GB/s": copy / 1e9, "product, TFLOP/s": product / 1e12}


@cache
def data_sheet(device: str) -> Hardware | None:
    """This device in `stallfree.perf`; of several, the nearest in memory; None if it is unknown there."""
    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    alike = [hardware.load(name) for name in hardware.names() if name.partition("-")[0] in properties.name.lower()]
    return min(alike, key=lambda sheet: abs(sheet.memory - properties.total_memory), default=None)


def known(device: str) -> dict[str, Any]:
    sheet = data_sheet(device)
    if sheet is None:
        raise Absent("stallfree.perf has no such device: nothing is predicted")
    return {"predicted as": sheet.name}
