"""One part of `gpu_all.py`, in its own process. It runs the part's cases in order, from number FIRST on, and writes a line to FILE
when a case begins and when it ends. If an error leaves the device unusable, the process ends; `gpu_all.py` goes on with the next
case in another process.

    python -m gpu.part NAME DEVICE QUICK FIRST FILE
"""

import gc
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu.made import Absent

BROKEN = 3
"""The exit status of a process whose device accepts no more work."""


def row(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The case's values and status. If it gives an `error`, that must be at most its `limit`."""
    began = time.perf_counter()
    try:
        values = run()
        off = "error" in values and not values["error"] <= values["limit"]  # NaN is off too
        status = {"status": "failed", "why": "the error is above its limit"} if off else {"status": "ok"}
    except Absent as reason:
        values, status = {}, {"status": "needs cuda" if str(reason) == "needs cuda" else "absent", "why": str(reason)}
    except Exception as wrong:
        traceback.print_exc()
        values, status = {}, {"status": "failed", "why": f"{type(wrong).__name__}: {wrong}"[:300]}
    # JSON has no numbers that are not finite.
    values = {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
    return values | status | {"seconds": round(time.perf_counter() - began, 3)}


def usable(device: str) -> bool:
    """Whether the device still works. Frees what a failed case held."""
    gc.collect()
    if device != "cuda" or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as wrong:
        print(f"the device takes no more work: {wrong}", file=sys.stderr)
        return False
    return True


def main() -> None:
    name, device, quick, first, file = sys.argv[1:]
    with Path(file).open("a") as to:

        def say(**line: Any) -> None:
            to.write(json.dumps(line) + "\n")
            to.flush()

        cases = importlib.import_module(f"gpu.{name}").cases(device, quick == "True")
        say(cases=[case for case, _ in cases])
        for number, (case, run) in enumerate(cases[int(first) :], int(first)):
            say(begin=number)
            print(f"--- {case}", file=sys.stderr, flush=True)
            say(end=number, row={"case": case} | row(run))
            if not usable(device):
                sys.exit(BROKEN)


if __name__ == "__main__":
    main()
