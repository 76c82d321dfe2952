"""Checks and measures the torch executor on one GPU, in one command of at most nine minutes: is every kernel, graph and way to run
a model exact, and how long does an iteration take?

    python benchmarks/gpu_all.py --out FOLDER

It needs torch, triton, numpy, tokenizers and this checkout; no model file and no network. Each part runs in its own processes,
with a limit in seconds; the most important part runs first. A part that fails, crashes or hangs costs only itself. Whatever does
not fit into --minutes is reported as "not run". FOLDER gets results.json, tables.md and each part's log, after every part.
`--device cpu` is a dry run of the same code on tiny sizes, with kernels in Triton's interpreter: it measures nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "facts": 40, "attention": 140, "models": 170, "transfer": 60, "operators": 60, "steps": 130, "adapters": 90, "engines": 75,
    "striped": 90, "theirs": 60,
}  # fmt: skip
"""Limit of each part in seconds. The order shows errors first. The limits add up to more than the time available; each only keeps
a part that hangs from taking the others' time."""
CASE_S = 90.0
"""Seconds in which a case must end, including its process's start. Only a hang takes longer: kernels compile in seconds."""
LAST_S = 5.0
"""Seconds kept in reserve for ending a process and writing the results."""
LEAST_S = 15.0
"""A part is not begun with fewer seconds left: loading torch and compiling would take them."""
TITLES = {
    "facts": "Machine",
    "attention": "Exactness: attention",
    "models": "Exactness: whole models",
    "operators": "Exactness: operators, products and sampling",
    "transfer": "Exactness: KV transfer between two processes",
    "steps": "One iteration",
    "adapters": "Adapters: exactness, and one iteration",
    "engines": "Iterations of an engine",
    "striped": "Sequence parallelism on one GPU: exactness, and attention of a layer",
    "theirs": "One iteration, by transformers",
}


def begin(name: str, args: argparse.Namespace, first: int, file: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a process that runs the part's cases from number `first` on."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    small = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
    command = [sys.executable, "-m", "gpu.part", name, args.device, str(args.quick), str(first), str(file)]
    with log.open("ab") as to:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=to,
            env=os.environ | small | {"PYTHONPATH": path},
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started. If it is not gone after 10 s, it is left alone."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)


def lines(file: Path) -> list[dict[str, Any]]:
    """The part's messages so far, without a line that is still being written."""
    whole = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in whole]


def part(name: str, args: argparse.Namespace, folder: Path, until: float) -> dict[str, Any]:
    """The part's status and a row for each case. If its process ends early, only the case that ran is lost."""
    began, file, log = time.monotonic(), folder / f"{name}.lines", folder / f"{name}.log"
    ended: dict[int, dict[str, Any]] = {}
    names: list[str] = []
    first, why = 0, ""
    while not why and (not names or first < len(names)):
        process = begin(name, args, first, file, log)
        try:
            why, lost = watch(process, file, until)
        finally:
            end(process)
        messages = lines(file)
        names = next((line["cases"] for line in messages if "cases" in line), [])
        ended |= {line["end"]: line["row"] for line in messages if "end" in line}
        started = max((line["begin"] for line in messages if "begin" in line), default=-1)
        if started >= first and started not in ended:
            ended[started] = {"case": names[started], "status": "failed", "why": lost}
        if started < first:  # not even one case began
            why = why or lost
        first = started + 1
    rows = [ended.get(i, {"case": case, "status": "not run", "why": why}) for i, case in enumerate(names)]
    counts = Counter(row["status"] for row in rows)
    # A part has the status of its worst case; a part without any message has failed.
    order = ("failed", "not run", "ok", "absent", "needs cuda")
    status = next((status for status in order if counts[status]), "failed")
    result = {"status": status, "why": why, "seconds": round(time.monotonic() - began, 1), "counts": counts, "rows": rows}
    if status == "failed":
        result["log"] = log.read_text(errors="replace")[-3000:]
    return result


def watch(process: subprocess.Popen[bytes], file: Path, until: float) -> tuple[str, str]:
    """Wait for the process. Gives why the whole part is over (or ""), and why a case that still ran has not ended."""
    size, news = -1, time.monotonic()
    while process.poll() is None:
        now, current = time.monotonic(), file.stat().st_size if file.exists() else 0
        if current != size:
            size, news = current, now
        if now > until:
            return "no time left", "it was cut off: no time left"
        if now - news > CASE_S:
            return "", f"it was cut off: nothing was heard for {CASE_S:g} s"
        time.sleep(0.05)
    return "", f"its process ended with status {process.returncode}"


def text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")


def table(name: str, result: dict[str, Any]) -> str:
    """A part as a Markdown table, as in docs/torch.md."""
    heading = f"## {TITLES[name]}: {result['status']}" + f" ({result['why']})" * bool(result["why"])
    rows = result["rows"]
    if name == "facts":  # few cases with many values: a line for each value
        rows = [{"case": key, "value": value} for row in rows for key, value in row.items() if key not in ("case", "seconds")]
        rows = [row for row in rows if row["case"] not in ("status", "why")]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys = [key for key in keys if key not in ("status", "why")] + [key for key in ("status", "why") if key in keys]
    aligned = ["---:" if any(isinstance(row.get(key), float | int) for row in rows) else "---" for key in keys]
    body = [keys, aligned, *([text(row.get(key)) for key in keys] for row in rows)]
    return "\n".join([heading, "", *("| " + " | ".join(cells) + " |" for cells in body if keys), ""])


def write(results: dict[str, Any], args: argparse.Namespace, folder: Path) -> str:
    """Writes the tables and the JSON; gives the tables."""
    tables = "\n".join(table(name, result) for name, result in results["parts"].items())
    (folder / "tables.md").write_text(tables)
    whole = json.dumps(results, indent=1) + "\n"
    for file in (folder / "results.json", *([args.json] if args.json else [])):
        file.write_text(whole)
    return tables


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases; for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results, tables and logs; without it a temporary folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is not run (default: %(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}; facts always run")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_all.py was told to end"))  # ends its processes too
    over = time.monotonic() + 60 * args.minutes - LAST_S
    folder = args.out or Path(tempfile.mkdtemp(prefix="gpu_all-"))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.lines"):
        old.unlink()
    results: dict[str, Any] = {"title": "gpu_all", "device": args.device, "command": " ".join(sys.argv), "parts": {}}
    wanted = ["facts", *(name for name in PARTS if name != "facts" and name in (args.only or PARTS))]
    for name in wanted:
        now = time.monotonic()
        if over - now < LEAST_S:
            result = {"status": "not run", "why": "no time left", "seconds": 0.0, "counts": {}, "rows": []}
        else:
            result = part(name, args, folder, min(over, now + PARTS[name]))
        results["parts"][name] = result
        write(results, args, folder)
        counted = ", ".join(f"{number} {status}" for status, number in result["counts"].items())
        print(f"{name}: {result['status']} in {result['seconds']:g} s" + f" ({counted or result['why']})", flush=True)
        if name == "facts" and result["rows"] and result["rows"][0]["status"] == "absent":
            sys.exit(f"gpu_all.py needs a GPU: {result['rows'][0]['why']}")
    print("\n" + write(results, args, folder))
    print(f"{folder}: results.json, tables.md and the parts' logs")
    if any(result["status"] == "failed" for result in results["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
