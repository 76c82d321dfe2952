"""Which format of weights the default takes, and whether the runtime's graph is wanted: what trials on this machine have found for
a model's file, remembered beside its calibration. The executor makes them; this module does not know how.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.fetch import cache_folder
from stallfree.engine import calibrate
from stallfree.executors.host_memory import mib, weight_bytes
from stallfree.executors.machine import memory

if TYPE_CHECKING:
    from stallfree.executors.openvino.trial import Graph, Trial

log = logging.getLogger(__name__)

USUAL = "int8"
LARGE = 256 << 20
"""Weights in files of more bytes are packed while requests are served, or not at all: that of fewer takes less than a second."""
VERSION = 3
"""Of what a trial is. Another one makes those that are remembered void."""


class Choice(NamedTuple):
    """`weights`: the format; `why`, in words."""

    weights: str
    why: str


def is_large(checkpoint: Checkpoint) -> bool:
    return checkpoint.num_bytes > LARGE


def chosen(checkpoint: Checkpoint, threads: int | None) -> Choice:
    """What the executor openvino takes by default, as far as it is known without a trial."""
    return _settled(checkpoint, threads) or Choice(USUAL, "no trial was made yet; the first start makes it")


def tried(checkpoint: Checkpoint, kv: str, threads: int | None, say: Callable[[str], None]) -> Choice:
    """As `chosen`, after a trial if one is needed, which is then remembered. `say` gets a line of a new one."""
    from stallfree.executors.openvino.trial import FORMS

    if (settled := _settled(checkpoint, threads)) is not None:
        return settled
    say("trying the file's own bits and int8 on this machine, once")
    found = Choice(*_trial(checkpoint, FORMS, kv, threads)[:2])
    _remember(found, _file(checkpoint.path, threads))
    say(f"weights {found.weights}: {found.why}")
    return found


def graph(path: Path, weights: str, kv: str, threads: int | None) -> "Graph | None":
    """What a trial has found about the graph for the model at `path`; None if none was made."""
    from stallfree.executors.openvino.trial import Graph

    with suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(_file(path, threads, weights, kv).read_text())
        return Graph(saved["wanted"] is not False, str(saved["why"]))
    return None


def graph_tried(checkpoint: Checkpoint, weights: str, kv: str, threads: int | None, trying: Callable[[], None]) -> "Graph":
    """As `graph`, after a trial if none was made. `trying` is called before it."""
    if (found := graph(checkpoint.path, weights, kv, threads)) is not None:
        return found
    trying()
    return _trial(checkpoint, (weights,), kv, threads).graphs[weights]


def _trial(checkpoint: Checkpoint, forms: Sequence[str], kv: str, threads: int | None) -> "Trial":
    """A trial. Remembers what it finds about graphs."""
    from stallfree.executors.openvino.trial import choose

    found = choose(checkpoint, forms, kv, threads, large=is_large(checkpoint))
    for form, graph in found.graphs.items():
        _remember(graph, _file(checkpoint.path, threads, form, kv))
    return found


def _remember(found: "Choice | Graph", file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found._asdict()))
        part.replace(file)
    except OSError as error:
        log.warning("what the trial found cannot be kept in %s: %s", file, error)


def _settled(checkpoint: Checkpoint, threads: int | None) -> Choice | None:
    """The choice that needs no trial any more; None if it needs one."""
    from stallfree.executors.openvino.trial import has_codes

    if not has_codes(checkpoint):
        return Choice(USUAL, "the file has no matrices of 4 or 8 bits whose codes could be kept")
    if "e2m1" in checkpoint.codes.values():
        return Choice("file", "int8 of numbers in MXFP4 costs 2.5 % of perplexity")
    if (found := _remembered(checkpoint, threads)) is not None:
        return found
    room = memory()
    if room is not None and weight_bytes(checkpoint, USUAL) > room.free >= weight_bytes(checkpoint, "file"):
        return Choice("file", f"int8 would take more than the {mib(room.free)} of free memory")
    return None if checkpoint.config.mixture is None else Choice(USUAL, "experts are not tried; --weights file keeps their bits")


def _remembered(checkpoint: Checkpoint, threads: int | None) -> Choice | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(_file(checkpoint.path, threads).read_text())
        if saved["weights"] in ("file", USUAL):
            return Choice(saved["weights"], str(saved["why"]))
    return None


def _file(path: Path, threads: int | None, *formats: str) -> Path:
    """Where the trial of the weights is kept, or that of the graph with these `formats`."""
    stat = path.stat()
    model = [path.name, stat.st_size, stat.st_mtime_ns]
    versions = {"openvino": metadata.version("openvino"), "version": VERSION}
    key = calibrate.machine() | {"model": model, "threads": threads, "formats": formats} | versions
    return calibrate.file_of(key, cache_folder() / "trials")
