"""Calibration: times a few dozen iterations on an executor, fits the cost model to them, and remembers it for the same machine,
model and executor. It knows shapes and seconds, not what a policy does with them.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from stallfree.core.plan import Capacity, Plan, Shape, Work
from stallfree.executors import machine as machines
from stallfree.executors.base import Executor, MovesKV, TakesFew
from stallfree.executors.sampling import Sampling
from stallfree.perf.fitted import Errors, Fitted, Sample

log = logging.getLogger(__name__)

VERSION = 6
PATIENCE_S = 8.0
"""Seconds after which a calibration ends, if it has timed every shape once."""

SHORT_S = 0.1
"""Seconds up to which an iteration is run twice. In a longer one, the extra cost of the first of its shape does not show."""

RING, CHUNK = 4096, 512
"""Tokens of KV that the calibration uses, and the most tokens of the chunks in which it writes them first."""

SAMPLING = Sampling(temperature=1.0, top_p=0.9, presence_penalty=1.0)
"""The sampling of the decodes of `_sampled`."""

FEW, FEW_TURNS, FEW_S = (1, 2, 4, 8, 12, 16, 32, 64, 128), 5, 1.0
"""Numbers of tokens for which the two ways of an executor are compared (`TakesFew`), how often, and after how many seconds of a
number no more."""
FEW_DECODES = 16
"""Of more tokens than these, the others are a prompt's."""

TILES = (64, 32, 16, 8)
"""Sizes of the tiles, in tokens, in which executors may work, the largest first."""

Progress = Callable[[int, int], None]
"""Called with the number of iterations timed so far, and of all."""


def calibrate(
    executor: Executor, progress: Progress = lambda done, of: None, wanted: Sequence[Shape] = (), *, unmet: float = 0.0
) -> tuple[Fitted, Errors]:
    """Time iterations on an idle `executor` and fit a model to them. Returns the model and its errors. Overwrites the KV.

    `wanted`: the shapes to time, for an executor whose sampling takes no time on the host; by default, those of a processor.
    `unmet`: the share of experts that a token does not meet (`Fitted`). An executor that takes few tokens another way is set to do
    so as long as that is quicker.
    """
    capacity, few = executor.capacity, 0
    shapes = [shape for shape in wanted or processor_shapes(capacity) if _fits(shape, capacity)]
    sampled = [] if wanted else [shape for shape in _sampled(capacity) if _fits(shape, capacity)]
    sizes = {tile * (64 // tile + 1) + extra for tile in TILES for extra in (0, 1)} | {64, 65}
    probes = [[(0, size)] for size in sorted(sizes) if not wanted and _fits([(0, size)], capacity)]
    if isinstance(executor, TakesFew):
        executor.settle()
    end = time.perf_counter() + PATIENCE_S
    _fill(executor, min(CHUNK, max(sum(count for _, count in shape) for shape in shapes)))
    if isinstance(executor, TakesFew):
        few = executor.few = quicker_few(executor)
    samples: list[Sample] = []
    # Shapes are timed twice if there is time, so that a slow moment of the machine does not affect one kind of iteration alone.
    plan = [*shapes, *probes, *sampled, *shapes, *sampled]
    for shape in plan:
        if len(samples) >= len(shapes) and time.perf_counter() > end:
            break
        samples.append((shape, timed(executor, shape)))
        progress(len(samples), len(plan))
    times = {shape[0][1]: seconds for shape, seconds in samples[len(shapes) : len(shapes) + len(probes)]}
    model = Fitted.fit(samples, _quantum(times), unmet, few)
    progress(len(plan), len(plan))
    return model, model.errors(samples)


def remembered(key: Mapping[str, object], folder: Path) -> Fitted | None:
    """The model calibrated for `key`; None if there is none. A file that cannot be read is logged and ignored."""
    file = file_of(key, folder)
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
    """When the model for `key` was calibrated, in local time; None if no file keeps it."""
    with suppress(OSError):
        return datetime.fromtimestamp(file_of(key, folder).stat().st_mtime)
    return None


class Calibrated(NamedTuple):
    """A calibration of this machine. `cost`: the cost model; `name`: of the model's file; `capacity`: the executor's; `scatter`:
    measured over expected times of the timed iterations (`perf.fitted.Errors`).
    """

    cost: Fitted
    name: str
    capacity: Capacity
    scatter: tuple[float, ...]


def latest(folder: Path, model: str | None = None) -> Calibrated:
    """The newest calibration of this machine, and of a model file with `model` in its name, if given. Raises ValueError if there is
    none.
    """
    calibrations: list[tuple[float, Calibrated]] = []
    here = machine()
    for file in folder.glob("*.json"):
        try:
            saved = json.loads(file.read_text())
            block_size, num_blocks, longest = map(int, saved["capacity"])
            key, capacity = saved["of"], Capacity(block_size, num_blocks, longest)
            name, scatter = str(key["model"][0]), tuple(map(float, saved["errors"]["scatter"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        if here.items() <= key.items() and (model is None or model.lower() in name.lower()):
            fitted = remembered(key, folder)
            if fitted is not None:
                calibrations.append((file.stat().st_mtime, Calibrated(fitted, name, capacity, scatter)))
    if not calibrations:
        of = "" if model is None else f" of a model named {model!r}"
        raise ValueError(f"this machine has no calibration{of}; `stallfree calibrate` makes one")
    return max(calibrations, key=lambda dated: dated[0])[1]


def remember(model: Fitted, errors: Errors, key: Mapping[str, object], folder: Path, capacity: Capacity) -> Path:
    """Keep `model` for `key`, with its errors and the executor's `capacity`. Returns the file. If the disk is full, this only logs
    a warning, and the next start calibrates again."""
    file = file_of(key, folder)
    fit = {"median": errors.median, "p90": errors.p90, "largest": errors.largest, "worst": list(errors.worst)}
    fit["scatter"] = list(errors.scatter)
    held = [capacity.block_size, capacity.num_blocks, capacity.max_model_len]
    saved = {"version": VERSION, "of": dict(key), "capacity": held, "model": model.state(), "errors": fit}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(saved, indent=1))
        part.replace(file)
    except OSError as error:
        log.warning("the calibration cannot be kept in %s: %s", file, error)
    return file


def machine() -> dict[str, Any]:
    """The properties of this machine that decide its speed: the processor, its instruction sets, and the processors that this
    process may use at once."""
    here = machines.machine()
    return {"cpu": here.name, "sets": list(here.sets), "cores": here.usable}


def file_of(key: Mapping[str, object], folder: Path) -> Path:
    """The file in `folder` that keeps what was found out for `key`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:16]}.json"


def processor_shapes(capacity: Capacity) -> Iterator[list[tuple[int, int]]]:
    """Shapes as a server on a processor meets them: batches of decodes, chunks at the beginning of a prompt and late in it, and
    both together."""
    long = min(2048, capacity.max_model_len * 3 // 4)
    middle = long // 4
    for context in (16, middle, long):
        for batch in (1, 2, 4, 12, 32):
            yield [(context, 1)] * batch
    for start in (0, middle, long):
        for count in (16, 48, 128):
            yield [(start, count)]
            yield [(middle, 1)] * 12 + [(start, count)]
    yield [(0, 384)]
    yield [(middle, 256)]


def _sampled(capacity: Capacity) -> Iterator[list[tuple[int, int]]]:
    """Decodes with costly sampling. Only these show the price of a row apart from that of a decode."""
    for batch in (4, 12, 32):
        yield [(min(512, capacity.max_model_len * 3 // 16), 1)] * batch + [(batch * SAMPLING.extra_rows, 0)]


def _fits(shape: Shape, capacity: Capacity) -> bool:
    return all(start + count <= min(capacity.max_model_len, capacity.num_blocks * capacity.block_size) for start, count in shape)


def _fill(executor: Executor, chunk: int) -> None:
    """Write the KV that the timed iterations read: memory that was never written is not allocated, and too quick to read. An
    executor that does not take bytes computes it, `chunk` tokens at once; any other computes one chunk, as its first."""
    capacity = executor.capacity
    size, tokens = capacity.block_size, _ring(capacity) * capacity.block_size
    if isinstance(executor, MovesKV):
        for block in range(_ring(capacity)):
            executor.write_blocks((block,), memoryview(bytearray(executor.block_bytes)))
        tokens = min(tokens, chunk)
    for first in range(0, tokens - chunk + 1, chunk):
        if _fits([(0, chunk)], capacity):
            blocks = tuple(first // size + k for k in range(-(-chunk // size)))
            work = Work("calibration", 0, chunk, False, False, (0,) * chunk, blocks, None, "", (0,) * chunk, ())
            _seconds(executor, Plan(0, 0.0, (work,)))


def _ring(capacity: Capacity) -> int:
    """The number of KV blocks that the calibration uses in turn: more than a processor's caches hold, and quick to fill."""
    return min(capacity.num_blocks, RING // capacity.block_size)


def timed(executor: Executor, shape: Sequence[tuple[int, int]]) -> float:
    """Seconds of an iteration of `shape`. A short one runs twice and the second counts: the first may compile or allocate."""
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


def quicker_few(executor: TakesFew) -> int:
    """Up to how many tokens, with some context, the other way of `executor` is quicker. Overwrites KV."""
    context, quicker = min(256, executor.capacity.max_model_len // 2), 0
    for tokens in FEW:
        shape = [(context, 1)] * min(tokens, FEW_DECODES) + [(context, tokens - FEW_DECODES)] * (tokens > FEW_DECODES)
        if tokens > executor.most_few or not _fits(shape, executor.capacity):
            break
        times: list[list[float]] = [[], []]
        end = time.perf_counter() + FEW_S
        while len(times[0]) < FEW_TURNS and (not times[0] or time.perf_counter() < end):
            for way, few in enumerate((0, tokens)):
                executor.few = few
                times[way].append(timed(executor, shape))
        if median(times[1]) >= median(times[0]):
            break
        quicker = tokens
    return quicker


def _seconds(executor: Executor, plan: Plan) -> float:
    executor.submit(plan)
    result = executor.collect()
    if result.error is not None:
        raise RuntimeError(f"calibration failed: {result.error}")
    return result.seconds


def _quantum(times: Mapping[int, float]) -> int:
    """The size of the tiles in which the executor works, in tokens: the largest tile whose first token costs at least a quarter of
    the tile. 1 if there is none."""
    if not times:
        return 1
    sizes = sorted(times)
    slope = (times[sizes[-1]] - times[sizes[0]]) / max(1, sizes[-1] - sizes[0])
    for tile in TILES:
        steps = [times[size + 1] - times[size] for size in sizes if not size % tile and size + 1 in times]
        if steps and sorted(steps)[len(steps) // 2] > slope * tile / 4:
            return tile
    return 1
