"""Whole deployments that somebody measured, each with what the simulator says of it: TTFT and TPOT at a fixed concurrency.

DEVICE_MODEL_ENGINE_deployments.csv has one deployment in each row, as in aiconfigurator's measurements. It knows no kernels.
"""

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

from stallfree.core.nearest import nearest
from stallfree.perf import shape
from stallfree.perf.aiconfigurator import DTYPES
from stallfree.perf.hardware import Hardware, profiled
from stallfree.perf.point import Point, Row
from stallfree.perf.profiles import DEPLOYMENTS
from stallfree.sim.closed import closed_loop
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator

COLUMNS = ("gemm_quant_mode", "tp", "concurrency", "prompt_tokens", "output_tokens", "ttft_ms", "tpot_ms")
OPERATORS = ("TTFT of deployments", "TPOT of deployments")
ENGINES = {"vllm": "vllm-2026", "sglang": "vllm-2026", "trtllm": "fused"}
MODELS = {"llama-70b": "llama3-70b", "llama-8b": "llama3-8b"}
"""The model by its name in a file's name; else it is one of `perf.shape.names`."""
ROUNDS = 12
"""Requests of each client. All begin at once, so the first requests wait long, and their number counts in the mean TTFT. The
figures do not say how many there were; this number fits them best."""
SHORTER = 0.2
"""Lengths are up to this share below the nominal ones, evenly: 10 % on average, as the measurements say."""


@dataclass(frozen=True, slots=True)
class Case:
    """One deployment: `weights` and `engine` by their names here; `clients` at a time, prompts and outputs of these tokens."""

    model: str
    engine: str
    weights: str
    tp: int
    clients: int
    prompt: int
    output: int

    def simulated(self, hardware: str) -> tuple[float, float]:
        """Mean TTFT and TPOT in seconds."""
        deployment = Deployment(
            self.model, hardware, self.tp, weights=self.weights, engine=self.engine, policy="vllm-v1", max_model_len=self.longest
        )
        rng = random.Random(0)
        drawn = ((self._drawn(self.prompt, rng), self._drawn(self.output, rng)) for _ in range(self.clients * ROUNDS))
        lines = closed_loop(Simulator(deployment), drawn, self.clients)
        spans = [(line.tokens[-1] - line.tokens[0]) / (len(line.tokens) - 1) for line in lines if len(line.tokens) > 1]
        return mean(line.tokens[0] - line.arrival for line in lines), mean(spans)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(2, self.prompt) + max(2, self.output)

    @staticmethod
    def _drawn(nominal: int, rng: random.Random) -> int:
        return max(2, round(nominal * (1 - SHORTER * rng.random())))


def read(file: Path) -> Iterator[Point]:
    """TTFT and TPOT of each row. Raises ValueError that names file, line and column, or the nearest known name."""
    device, _, rest = file.name.removesuffix(DEPLOYMENTS).partition("_")
    model, _, engine = rest.rpartition("_")
    for name, known in ((model, [*MODELS, *shape.names()]), (engine, [*ENGINES])):
        if name not in known:
            raise ValueError(f"{file}: {name!r} in its name is not known{nearest(name, known)}; known: {', '.join(known)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no csv: {error}") from None
    rows = csv.DictReader(text.splitlines(), restval="")
    for column in COLUMNS:
        if column not in (rows.fieldnames or ()):
            raise ValueError(f"{file}: the column {column} is missing; deployments have {','.join(COLUMNS)}")
    for cells in rows:
        yield from _points(
            file.name, profiled(device), MODELS.get(model, model), ENGINES[engine], Row(cells, f"{file}: line {rows.line_num}")
        )


def _points(file: str, device: Hardware, model: str, engine: str, row: Row) -> Iterator[Point]:
    dtype = row.cells["gemm_quant_mode"]
    if dtype not in DTYPES:
        raise ValueError(f"{row.where}: gemm_quant_mode is {dtype!r}{nearest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    numbers = [row.whole(column) for column in ("tp", "concurrency", "prompt_tokens", "output_tokens")]
    case = Case(model, engine, DTYPES[dtype], *numbers)

    @cache  # one simulation has both
    def simulated(hardware: str) -> tuple[float, float]:
        try:
            return case.simulated(hardware)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None

    def price(which: int) -> Callable[[Hardware], float]:
        return lambda device: simulated(device.name)[which]

    for which, (column, operator) in enumerate(zip(("ttft_ms", "tpot_ms"), OPERATORS, strict=True)):
        seconds = row.measured(column)
        if seconds is not None:
            yield Point(file, device, operator, seconds, price(which))
