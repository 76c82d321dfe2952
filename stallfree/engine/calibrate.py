"""Times a few dozen iterations on an executor and fits the cost model to them; remembers the result for the same machine, model and
executor. It knows shapes and seconds, not what a policy does with them.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from stallfree.core.plan import Capacity, Plan, Shape, Work
from stallfree.executors.base import Executor
from stallfree.executors.sampling import Sampling
from stallfree.perf.fitted import Errors, Fitted, Sample

log = logging.getLogger(__name__)

VERSION = 4
PATIENCE_S = 8.0
"""Seconds after which a calibration makes do with what it has."""

SHORT_S = 0.1
"""Seconds from which an iteration is timed once: what the first of its shape costs more does not show."""

RING, CHUNK = 4096, 512
"""Tokens of KV that the calibration uses, and writes in chunks before."""

SAMPLING = Sampling(temperature=1.0, top_p=0.9, presence_penalty=1.0)
"""What the decodes of `_sampled` ask for."""

TILES = (64, 32, 16, 8)
"""Sizes of tiles, in tokens, that executors may work in."""

Progress = Callable[[int, int], None]
"""Called with the iterations timed so far, and all that are to be timed."""


def calibrate(executor: Executor, progress: Progress = lambda done, of: None) -> tuple[Fitted, Errors]:
    """Run iterations on an idle `executor`, whose KV is written over, and fit a model to them; and how well it describes them."""
    shapes = [shape for shape in _shapes(executor.capacity) if _fits(shape, executor.capacity)]
    sampled = [shape for shape in _sampled(executor.capacity) if _fits(shape, executor.capacity)]
    sizes = {tile * (64 // tile + 1) + extra for tile in TILES for extra in (0, 1)} | {64, 65}
    probes = [[(0, size)] for size in sorted(sizes) if _fits([(0, size)], executor.capacity)]
    end = time.perf_counter() + PATIENCE_S
    _fill(executor)
    samples: list[Sample] = []
    # Twice over if there is time, so that a slow moment of the machine does not fall on one kind of iteration alone.
    plan = [*shapes, *probes, *sampled, *shapes, *sampled]
    for shape in plan:
        if len(samples) >= len(shapes) and time.perf_counter() > end:
            break
        samples.append((shape, _time(executor, shape)))
        progress(len(samples), len(plan))
    times = {shape[0][1]: seconds for shape, seconds in samples[len(shapes) : len(shapes) + len(probes)]}
    model = Fitted.fit(samples, _quantum(times))
    progress(len(plan), len(plan))
    return model, model.errors(samples)


def remembered(key: Mapping[str, object], folder: Path) -> Fitted | None:
    """The model calibrated before for `key`, if there is one. A file that cannot be read is named in the log, and passed over."""
    file = _file(key, folder)
    try:
        saved = json.loads(file.read_text())
        if saved["version"] != VERSION:
            return None
        return Fitted.from_state(saved["model"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the calibration in %s cannot be read (%s); calibrating again replaces it", file, error)
        return None


def calibrated_at(key: Mapping[str, object], folder: Path) -> datetime | None:
    """When the model for `key` was calibrated, in local time; None if it was not, or could not be kept."""
    with suppress(OSError):
        return datetime.fromtimestamp(_file(key, folder).stat().st_mtime)
    return None


class Calibrated(NamedTuple):
    """A calibration of this machine: the cost model, the `name` of the served model's file, what the executor held, and how the
    timed iterations scattered about what the cost model says (`perf.fitted.Errors`).
    """

    cost: Fitted
    name: str
    capacity: Capacity
    scatter: tuple[float, ...]


def latest(folder: Path, model: str | None = None) -> Calibrated:
    """The calibration that was remembered last on this machine; of those in whose name `model` is, if it is given. Raises
    ValueError if there is none.
    """
    found: list[tuple[float, Calibrated]] = []
    for file in folder.glob("*.json"):
        try:
            saved = json.loads(file.read_text())
            block_size, num_blocks, longest = map(int, saved["capacity"])
            key, capacity = saved["of"], Capacity(block_size, num_blocks, longest)
            name, scatter = str(key["model"][0]), tuple(map(float, saved["errors"]["scatter"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        if machine().items() <= key.items() and (model is None or model.lower() in name.lower()):
            fitted = remembered(key, folder)
            if fitted is not None:
                found.append((file.stat().st_mtime, Calibrated(fitted, name, capacity, scatter)))
    if not found:
        of = "" if model is None else f" of a model named {model!r}"
        raise ValueError(f"this machine has no calibration{of}; `stallfree calibrate` makes one")
    return max(found, key=lambda one: one[0])[1]


def remember(model: Fitted, errors: Errors, key: Mapping[str, object], folder: Path, capacity: Capacity) -> Path:
    """Keep `model` for `key`, and the `capacity` of its executor; where it is kept. A disk that is full costs the next start some
    seconds, and a line here."""
    file = _file(key, folder)
    errors_too = {"median": errors.median, "p90": errors.p90, "largest": errors.largest, "worst": list(errors.worst)}
    errors_too["scatter"] = list(errors.scatter)
    held = [capacity.block_size, capacity.num_blocks, capacity.max_model_len]
    saved = {"version": VERSION, "of": dict(key), "capacity": held, "model": model.state(), "errors": errors_too}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(saved, indent=1))
        part.replace(file)
    except OSError as error:
        log.warning("the calibration cannot be kept in %s: %s", file, error)
    return file


def machine() -> dict[str, Any]:
    """What of this machine decides how fast it is."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def _file(key: Mapping[str, object], folder: Path) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:16]}.json"


def _shapes(capacity: Capacity) -> Iterator[list[tuple[int, int]]]:
    """What a server meets: batches of decodes, chunks at the beginning of a prompt and late in it, and both together."""
    long = min(2048, capacity.max_model_len * 3 // 4)
    middle = long // 4
    for context in (16, middle, long):
        for batch in (1, 4, 12, 32):
            yield [(context, 1)] * batch
    for start in (0, middle, long):
        for count in (16, 48, 128):
            yield [(start, count)]
            yield [(middle, 1)] * 12 + [(start, count)]
    yield [(0, 384)]
    yield [(middle, 256)]


def _sampled(capacity: Capacity) -> Iterator[list[tuple[int, int]]]:
    """Decodes that ask much of sampling: only by these a row has a price that is not the decode's own."""
    for batch in (4, 12, 32):
        yield [(min(512, capacity.max_model_len * 3 // 16), 1)] * batch + [(batch * SAMPLING.extra_rows, 0)]


def _fits(shape: Shape, capacity: Capacity) -> bool:
    return all(start + count <= min(capacity.max_model_len, capacity.num_blocks * capacity.block_size) for start, count in shape)


def _fill(executor: Executor) -> None:
    """Write the KV that the timed iterations read: memory never written is not there, and quicker to read than it will be."""
    size, capacity = executor.capacity.block_size, executor.capacity
    for first in range(0, _ring(capacity) * size - CHUNK + 1, CHUNK):
        if _fits([(0, CHUNK)], capacity):
            blocks = tuple(first // size + k for k in range(-(-CHUNK // size)))
            work = Work("calibration", 0, CHUNK, False, False, (0,) * CHUNK, blocks, None, "", (0,) * CHUNK, ())
            _seconds(executor, Plan(0, 0.0, (work,)))


def _ring(capacity: Capacity) -> int:
    """How many KV blocks the calibration goes round in: more than a processor's caches hold, and few to fill."""
    return min(capacity.num_blocks, RING // capacity.block_size)


def _time(executor: Executor, shape: Sequence[tuple[int, int]]) -> float:
    """Seconds of an iteration of `shape`; of a short one the second of two, since the first of a shape may compile or allocate."""
    work, block = [], 0
    sampling = None if all(count for _, count in shape) else SAMPLING
    for i, (start, count) in enumerate(piece for piece in shape if piece[1]):
        blocks = -(-(start + count) // executor.capacity.block_size)
        table = tuple((block + k) % _ring(executor.capacity) for k in range(blocks))
        prompt = (0,) * (start + count)
        block += blocks
        work.append(Work(f"calibration-{i}", start, count, True, count == 1, prompt[start:], table, sampling, "", prompt, ()))
    plan = Plan(0, 0.0, tuple(work))
    seconds = _seconds(executor, plan)
    return seconds if seconds > SHORT_S else _seconds(executor, plan)


def _seconds(executor: Executor, plan: Plan) -> float:
    executor.submit(plan)
    result = executor.collect()
    if result.error is not None:
        raise RuntimeError(f"calibration failed: {result.error}")
    return result.seconds


def _quantum(times: Mapping[int, float]) -> int:
    """The size of the tiles that the executor works in: the largest of which each new one costs at least a quarter of itself with
    its first token. 1 if none does."""
    if not times:
        return 1
    sizes = sorted(times)
    slope = (times[sizes[-1]] - times[sizes[0]]) / max(1, sizes[-1] - sizes[0])
    for tile in TILES:
        steps = [times[size + 1] - times[size] for size in sizes if not size % tile and size + 1 in times]
        if steps and sorted(steps)[len(steps) // 2] > slope * tile / 4:
            return tile
    return 1
