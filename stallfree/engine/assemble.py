"""From names to a running engine: finds the model, opens its checkpoint, makes executor, text, policy and engine. Only this module
knows them all. It does not know how they work.
"""

import inspect
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stallfree import __version__, extra, policies, user_classes
from stallfree.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from stallfree.checkpoint.adapter import MAX_RANK
from stallfree.checkpoint.fetch import EMBEDDED, cache_folder, locate, named
from stallfree.checkpoint.generation import EMBEDDED_SAMPLING, recommended
from stallfree.checkpoint.identity import identity
from stallfree.core.classes import Classes
from stallfree.core.ledger import Limits
from stallfree.core.nearest import nearest
from stallfree.core.plan import Capacity
from stallfree.core.policy import Policy, Setup, Tuned
from stallfree.core.record import Fingerprints, Run
from stallfree.core.slo import Slo
from stallfree.core.speculation import Speculation
from stallfree.elastic import policies as elastic
from stallfree.elastic.policy import Policy as GroupPolicy
from stallfree.engine import calibrate, formats, groups, proposing
from stallfree.engine.adapters import Library, folders
from stallfree.engine.engine import Engine
from stallfree.engine.host_tier import HostTier
from stallfree.engine.text import Text
from stallfree.executors.base import Executor, RunsGroups, TakesFew
from stallfree.executors.host_memory import check_model, default_kv_bytes, weight_bytes
from stallfree.executors.machine import machine
from stallfree.executors.sampling import Sampling
from stallfree.perf.fitted import Errors, Fitted
from stallfree.policies.slo import SMALL_BATCH, STRICT, possible, usual

if TYPE_CHECKING:
    from stallfree.executors.torch import Options as TorchOptions

SMALL = 32 << 20
"""Weights in files of at most this many bytes are converted at each start: it takes less than a second."""

Stage = Callable[[str], None]
"""Is told what is done with a model now, such as loading."""

Progress = Callable[[str], calibrate.Progress]
"""Gives what is called while something that has this label takes its time."""

SIMULATED = (0.008, 0.04, 0.005, 0.005, 0.0, 0.0)
"""The prices of the simulated executor's iterations, as in the cost model."""

EXECUTORS = {
    "openvino": "runs a model on this machine's processor",
    "torch": "runs any supported model on a processor or on GPUs, in one process or several; needs the extra torch",
    "simulated": "sleeps as a cost model says; no model",
}

LOSSES = ("fail", "restart")
GENERATION_CONFIGS = ("auto", "none")


@dataclass(frozen=True)
class Options:
    """What an engine is made of. `weights`, `kv`: number formats (None: the executor's own). `kv_memory`: bytes (None: a quarter of
    the free memory, at most 4 GiB and what the weights leave; on GPUs the rest of `gpu_memory_utilization`, a share of their
    memory). `token_budget`, `max_model_len`: tokens (None: the policy's and the model's own). `policy_option`: the policy's
    options, each NAME=VALUE. `threads`: None means one for each core of a socket, within the container's quota. `slo`: latency
    targets in words, for policies that take them and to count late tokens; of several classes, the policy gets those of the first.
    `kv_host_memory`: bytes of this machine's memory that keep evicted KV (None: none).

    For the torch executor: `device` (None: cuda if there is a GPU, else cpu). `tp` ranks share each layer, `sp` groups of ranks
    each request's tokens, and `pp` stages the layers. With a `policy` of `elastic.policies.POLICIES`, the `sp` groups are instances
    that are together anew in each iteration. `workers`: who places the ranks. `adapter`: LoRA adapters, each NAME=FOLDER;
    `adapters`: a folder whose sub-folders are adapters under their own names; `max_adapter_rank`: the largest that is accepted.
    `generation_config`: "auto" takes the sampling values that the model's makers recommend as defaults, "none" the model's own
    distribution. `on_worker_loss`: running requests fail or restart when a worker is lost. `speculate`: who guesses tokens:
    "ngram", "draft:MODEL", a class of the user's, or None for nobody; `draft_tokens`: the most for a stream in an iteration.

    Raises ValueError for fewer than one of any kind of ranks.
    """

    model: str | None = None
    executor: str = "openvino"
    policy: str = "sarathi"
    policy_option: Sequence[str] | None = None
    slo: str | None = None
    token_budget: int | None = None
    weights: str | None = None
    kv: str | None = None
    kv_memory: int | None = None
    kv_host_memory: int | None = None
    max_model_len: int | None = None
    max_seqs: int = 256
    max_tokens: int = 8192
    prefix_cache: bool = True
    threads: int | None = None
    device: str | None = None
    tp: int = 1
    sp: int = 1
    pp: int = 1
    workers: str = "local"
    gpu_memory_utilization: float = 0.9
    generation_config: str = "auto"
    on_worker_loss: str = "fail"
    speculate: str | None = None
    draft_tokens: int = 7
    adapter: Sequence[str] | None = None
    adapters: Path | None = None
    max_adapter_rank: int = MAX_RANK

    def __post_init__(self) -> None:
        for name in ("tp", "sp", "pp"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {number}, expected at least 1")

    @property
    def ranks(self) -> int:
        """Processes that run the model together."""
        return self.tp * self.sp * self.pp

    @property
    def grouped(self) -> bool:
        """Whether the policy plans groups of instances."""
        return self.policy in elastic.POLICIES

    @property
    def alone(self) -> bool:
        """Whether the engine's own process runs the model."""
        return self.tp == self.sp == self.pp == 1 and self.workers == "local"


@dataclass(frozen=True)
class Assembled:
    """An engine, the `library` of its adapters, and what its server tells about it. `name`: under which the model is served;
    `weights`: in words; `slo`: the latency targets, if any; `classes`: the targets of each class, if any were given; `slo_basis`:
    the source of the default targets in words, "" if the user gave all; `run`: the first line of its record; `identity` of the
    model: engines may exchange KV only if it is equal. `speculation`: who guesses tokens, in words, "" if nobody does.
    """

    engine: Engine
    library: Library
    name: str
    weights: str
    slo: Slo | None
    classes: Classes | None
    slo_basis: str
    run: Run
    identity: str
    speculation: str


def assemble(
    options: Options,
    *,
    fingerprints: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda label: lambda done, of: None,
) -> Assembled:
    """Make an engine. Raises ValueError, FetchError or MemoryError with a message for the user. Options that need no model are
    checked first. The caller sets `Engine.record`; with `fingerprints`, records hold what replay needs. `say` gets lines for the
    user. `progress(label)` gives what is called while something that has the label takes its time.
    """
    classes = None if options.slo is None else Classes.parse(options.slo)
    targets = None if classes is None else classes.default
    policy_options: dict[str, object] = {}
    tuned = False
    if options.grouped:
        groups.check(options)
    else:
        if options.policy not in policies.names() and (near := nearest(options.policy, elastic.POLICIES)):
            raise ValueError(f"unknown policy {options.policy!r}{near}")
        policy_options = policies.options(options.policy, options.token_budget, options.policy_option)
        tuned = policies.wants_setup(options.policy)
        if not tuned:
            policies.load(options.policy, Setup(), **policy_options)
    limits = Limits(options.max_seqs, options.max_tokens)
    check_executor(options.executor)
    if options.generation_config not in GENERATION_CONFIGS:
        known = ", ".join(GENERATION_CONFIGS)
        raise ValueError(f"generation_config {options.generation_config!r} is unknown; known are {known}")
    proposing.check(options.speculate, options.draft_tokens)
    if options.on_worker_loss not in LOSSES:
        raise ValueError(f"on_worker_loss {options.on_worker_loss!r} is unknown; known are {', '.join(LOSSES)}")
    adapters = folders(options.adapter or (), options.adapters)
    executor, text, name, weights, key, model_identity, sampling, config = _parts(options, say, progress)
    cost, source = None, ""
    if tuned or options.speculate is not None:
        cost = _cost(executor, key, config, say, progress("calibrating"))
    if tuned and cost is not None:
        if targets is None or targets.tbt is targets.tpot is targets.ttlt is None:
            source = basis(cost, key)
        _check_possible(classes or {}, cost)
    policy: Policy | GroupPolicy
    if isinstance(executor, RunsGroups):
        prices = groups.prices(executor, key or {}, cache_folder() / "calibration", say, progress("calibrating"))
        if options.policy == "elastic" and (targets is None or targets.tbt is targets.tpot is targets.ttlt is None):
            targets = (targets or Slo()).within(Slo(tbt=usual(prices.costs[0])))
            source = basis(prices.costs[0], groups.of(key or {}, options.sp, 1))
        for wanted in (targets or Slo(), *(classes or {}).values()):
            possible(wanted, prices.costs[0])
        policy = elastic.load(options.policy, prices, options.sp, targets or Slo())
    else:
        policy = policies.load(options.policy, Setup(cost, targets), **policy_options)
    capacity = executor.capacity
    prints = Fingerprints(capacity.block_size, secrets.token_bytes(16)) if fingerprints else None
    restart = options.on_worker_loss == "restart"
    engine = Engine(
        executor,
        text,
        policy,
        limits,
        reuse=options.prefix_cache,
        prints=prints,
        restart=restart,
        sampling=sampling,
        speculation=None if cost is None else _speculation(options, executor, text, config, cost, say),
    )
    host = None
    if options.kv_host_memory is not None:
        pool, in_host = engine.scheduler.ledger.pool, _in_host(options)
        host = engine.host = HostTier(executor, pool, options.kv_host_memory, in_host=in_host)
    library = Library(engine.adapters, config, options.max_adapter_rank)
    named = {text.partition("=")[0] for text in options.adapter or ()}
    for title, adapter in library.open_all(adapters).items():
        if title in named:  # of a whole folder, only the headers are read now: thousands of files would take minutes
            adapter.check()
        library.add(title, adapter)
    engine.adapters.warm_up()
    slo = policy.slo if isinstance(policy, Tuned) else targets
    run = Run(
        options.policy,
        capacity,
        limits,
        engine.scheduler.ledger.pool.reuse,
        "" if slo is None else str(slo),
        policy_options | dict(policy.options if isinstance(policy, Tuned) else {}),
        None if cost is None else cost.state(),
        host_blocks=0 if host is None else host.index.num_slots,
        host_moves=0 if host is None else host.index.most,
    )
    guesses = "" if options.speculate is None else f"{options.speculate}, at most {options.draft_tokens} tokens a stream"
    return Assembled(engine, library, name, weights, slo, classes, source if slo is not None else "", run, model_identity, guesses)


def check_executor(name: str) -> None:
    """Raises ValueError unless `name` is an executor's, or names a class of the user's that is one."""
    if ":" in name:
        user_classes.find("executor", name, method="submit")
    elif name not in EXECUTORS:
        known = ", ".join(EXECUTORS)
        raise ValueError(f"unknown executor {name!r}{nearest(name, EXECUTORS)}; known: {known}; or {user_classes.FORMS}")


def recalibrate(options: Options, say: Callable[[str], None], progress: Progress) -> tuple[Fitted, Errors, Path]:
    """Calibrate the model of `options` on this machine again. Returns the cost model, its errors, and the file that keeps it."""
    executor, _, _, _, key, _, _, config = _parts(options, say, progress)
    try:
        if key is None:
            raise ValueError(f"executor {options.executor!r} sleeps as its cost model says: nothing to time; calibrate another one")
        model, errors = calibrate.calibrate(executor, progress("calibrating"), unmet=0.0 if config is None else config.unmet)
    finally:
        executor.close()
    folder = cache_folder() / "calibration"
    return model, errors, calibrate.remember(model, errors, key, folder, executor.capacity)


def _cost(
    executor: Executor,
    key: Mapping[str, object] | None,
    config: ModelConfig | None,
    say: Callable[[str], None],
    progress: calibrate.Progress,
) -> Fitted:
    """The cost model of `executor`: the one remembered for `key`, or else a new one, which is then remembered."""
    if key is None:
        return Fitted(SIMULATED)
    folder = cache_folder() / "calibration"
    model = calibrate.remembered(key, folder)
    if model is not None and model.few <= (executor.most_few if isinstance(executor, TakesFew) else 0):
        if isinstance(executor, TakesFew):
            executor.few = model.few
        return model
    say("calibrating: timing iterations on this machine, once (`stallfree calibrate` does it again)")
    model, errors = calibrate.calibrate(executor, progress, unmet=0.0 if config is None else config.unmet)
    calibrate.remember(model, errors, key, folder, executor.capacity)
    return model


def _speculation(
    options: Options, executor: Executor, text: Text, config: ModelConfig | None, cost: Fitted, say: Callable[[str], None]
) -> Speculation | None:
    if options.speculate is None:
        return None

    def small(checkpoint: Checkpoint, share: float) -> Executor:
        own = completed(replace(options, max_model_len=None, tp=1, sp=1, pp=1, adapter=None, adapters=None), checkpoint)
        memory = int(share * (own.kv_memory or _kv_bytes(own, checkpoint)))
        make = MAKERS.get(options.executor, (_own, None, None))[0]
        path = checkpoint.path
        return make(
            checkpoint,
            replace(own, kv_memory=memory),
            lambda stage: say(f"{stage} the draft model {path.name}"),
            lambda done, of: None,
        )

    proposer = proposing.proposer(options.speculate, executor, text, config, small, say)
    return Speculation(proposer, cost, options.draft_tokens, None if config is None else config.vocab_size)


def _check_possible(classes: Mapping[str, Slo], cost: Fitted) -> None:
    """Raises ValueError for a class with a target that not even a lone request could meet. The policy checks the first class."""
    for name, slo in list(classes.items())[1:]:
        try:
            possible(slo, cost)
        except ValueError as error:
            raise ValueError(f"class {name!r}: {error}") from None


def basis(cost: Fitted, key: Mapping[str, object] | None) -> str:
    """The source of the default target of policy slo, in words."""
    when = None if key is None else calibrate.calibrated_at(key, cache_folder() / "calibration")
    source = "as simulated" if key is None else "as calibrated" + ("" if when is None else f" {when:%Y-%m-%d %H:%M}")
    iteration = f"an iteration of {len(SMALL_BATCH)} decodes {source}"
    return f"default, the paper's strict SLO: {STRICT} x {1e3 * cost.seconds(SMALL_BATCH):.1f} ms, {iteration}"


def completed(options: Options, checkpoint: Checkpoint) -> Options:
    """`options` with what the executor takes by default: formats, and on a processor memory for KV. `threads` stays None where the
    runtime's own choice is `Machine.threads`. Nothing is loaded."""
    _, weights, kv = MAKERS.get(options.executor, (_own, None, None))
    options = replace(options, weights=None if options.weights == "auto" else options.weights, kv=options.kv or kv)
    if options.executor == "torch":
        options = replace(options, device=_device(options))
    if options.executor not in MAKERS or options.device == "cuda":
        return replace(options, weights=options.weights or weights)
    here = machine()
    # OpenVINO itself takes one thread for each core of a socket. It knows which cores it may use, but no quotas.
    limited = here.threads if options.executor == "openvino" and here.threads < here.socket_cores else None
    options = replace(options, threads=options.threads or limited)
    options = replace(options, weights=options.weights or weights or formats.chosen(checkpoint, options.threads).weights)
    memory = options.kv_memory or _kv_bytes(options, checkpoint) // options.ranks
    return replace(options, kv_memory=memory)


def arithmetic(options: Options, checkpoint: Checkpoint) -> str:
    """The number format in which an executor of `MAKERS` computes all but products of quantised weights, for `completed` options.
    Raises what the executor would raise before it loads: ValueError for a bad option, MemoryError for a model that does not fit
    this machine's memory.
    """
    if options.executor == "openvino":
        from stallfree.executors.openvino import check

        form = check(
            checkpoint, options.weights or "", options.kv or "", options.kv_memory or 0, options.max_model_len, options.threads
        )
        return str(form.get_type_name())
    from stallfree.executors.torch.runner import TYPES
    from stallfree.executors.torch.weights import FORMATS

    torch_options = _torch_options(options)
    torch_options.check(checkpoint.config, options.ranks if options.workers == "local" else 1)
    if options.device == "cpu" and options.workers == "local":
        kv_bytes = options.ranks * (options.kv_memory or 0)
        check_model(checkpoint, torch_options.weights, torch_options.kv, kv_bytes, FORMATS, options.sp)
    return next(name for name, kind in TYPES.items() if kind == torch_options.activations)


def calibration_key(options: Options, path: Path, max_model_len: int) -> dict[str, object]:
    """What the times of iterations depend on, for `completed` options: the machine, the model's file, the executor and formats."""
    stat = path.stat()
    key: dict[str, object] = calibrate.machine() | {
        "executor": options.executor,
        "model": [path.name, stat.st_size, stat.st_mtime_ns],
        "weights": options.weights,
        "kv": options.kv,
        "max_model_len": max_model_len,
        "release": __version__,
        "threads": options.threads,
    }
    if options.executor == "torch":
        from stallfree.executors.torch import device_name

        key["device"] = device_name(options.device or "")
        if not options.alone:
            key |= {"tp": options.tp, "pp": options.pp, "workers": options.workers}
        if options.sp > 1:
            key["sp"] = options.sp
    elif options.executor == "openvino":
        found = formats.graph(path, options.weights or "", options.kv or "", options.threads)
        key["graph"] = found is None or found.wanted
    elif options.executor not in MAKERS:
        cls = user_classes.find("executor", options.executor, method="submit")
        key["file"] = Path(inspect.getfile(cls)).stat().st_mtime_ns
    return key


Parts = tuple[Executor, Text, str, str, dict[str, object] | None, str, Sampling, ModelConfig | None]
"""An executor, its text, the model's name, its weights in words, what its speed depends on (None: nothing to measure), the model's
identity, the sampling values for what a request leaves open, and the model's numbers, if it has any."""


def _parts(options: Options, say: Callable[[str], None], progress: Progress) -> Parts:
    if options.executor == "simulated":
        return _simulated(options)
    path = locate(options.model, say)
    checkpoint = open_checkpoint(path)
    path = checkpoint.path
    size, metadata = checkpoint.config.vocab_size, checkpoint.metadata
    text = Text.from_folder(path, size) if metadata is None else Text.from_gguf(metadata, size)
    make = MAKERS.get(options.executor, (_own, None, None))[0]
    if options.executor == "openvino" and options.weights in (None, "auto"):
        usual = completed(options, checkpoint)
        options = replace(options, weights=formats.tried(checkpoint, usual.kv or "", usual.threads, say).weights)
    options = completed(options, checkpoint)
    if options.device != "cuda" and options.threads and (objection := machine().objection(options.threads)):
        say(f"warning: {objection}")
    recommendation = EMBEDDED_SAMPLING if named(options.model) is None else recommended(path, checkpoint.metadata)
    if options.generation_config == "none":
        recommendation = {}
    sampling = Sampling(**recommendation)  # type: ignore[arg-type]  # top_k is an int
    executor = make(checkpoint, options, lambda stage: say(f"{stage} {path.name}"), progress("converting"))
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)  # a model in several files has one name
    name = EMBEDDED if options.model is None else options.model if not Path(options.model).exists() else stem
    key = calibration_key(options, path, executor.capacity.max_model_len)
    weights, kv = options.weights or "its own", options.kv or "its own"
    whole = f"{identity(checkpoint)} with {weights} weights"
    return executor, text, name, f"{weights} weights, {kv} KV", key, whole, sampling, checkpoint.config


def _openvino(checkpoint: Checkpoint, options: Options, stage: Stage, converting: calibrate.Progress) -> Executor:
    from stallfree.executors.openvino import OpenVINOExecutor, Packs, check
    from stallfree.executors.openvino.few import obstacle

    if not options.alone or options.device not in (None, "cpu"):
        takes = "--executor torch takes device, tp, sp and pp"
        raise ValueError(f"executor openvino is one process on this machine's processor; {takes}")
    packs: Packs = "now"
    weights, kv = options.weights or "", options.kv or ""
    check(checkpoint, weights, kv, options.kv_memory or 0, options.max_model_len, options.threads)
    if formats.is_large(checkpoint) and not obstacle(checkpoint, weights, kv, copies=1):
        trying = partial(stage, "trying with and without the runtime's graph, once on this machine,")
        packs = "later" if formats.graph_tried(checkpoint, weights, kv, options.threads, trying).wanted else "never"
    stage("loading")
    return OpenVINOExecutor(
        checkpoint,
        weights=weights,
        kv=kv,
        kv_bytes=options.kv_memory or 0,
        max_model_len=options.max_model_len,
        threads=options.threads,
        folder=cache_folder() / "converted" if checkpoint.num_bytes > SMALL else None,
        progress=converting,
        compiling=lambda: stage("compiling, once on this machine, what few tokens take in"),
        packs=packs,
    )


def _torch(checkpoint: Checkpoint, options: Options, stage: Stage, converting: calibrate.Progress) -> Executor:
    from stallfree.executors import torch as executors

    arithmetic(options, checkpoint)
    torch_options = _torch_options(options)
    stage("loading")
    if options.alone:
        return executors.TorchExecutor(checkpoint, torch_options, options.kv_memory)
    workers, memory, tp, sp = executors.workers(options.workers), options.kv_memory, options.tp, options.sp
    if options.grouped:
        return executors.Cluster(checkpoint, torch_options, memory, tp=tp, instances=sp, workers=workers)
    return executors.ParallelExecutor(checkpoint, torch_options, memory, tp=tp, sp=sp, pp=options.pp, workers=workers)


def _torch_options(options: Options) -> "TorchOptions":
    from stallfree.executors.torch import Options as TorchOptions

    return TorchOptions(
        options.weights or "",
        options.kv or "",
        options.max_model_len,
        options.device or "",
        options.threads,
        options.gpu_memory_utilization,
        options.max_tokens,
        adapters=bool(options.adapter or options.adapters),
    )


def _in_host(options: Options) -> bool:
    """Whether the executor's KV is in this machine's own memory."""
    return options.executor != "torch" or _device(options) == "cpu"


def _device(options: Options) -> str:
    """Where the torch executor runs. Raises ValueError without torch."""
    try:
        from stallfree.executors.torch import usual_device
    except ImportError as error:
        raise ValueError(f"executor torch needs {error.name}, which is not installed: {extra('torch')}") from None
    return options.device or usual_device()


def _own(checkpoint: Checkpoint, options: Options, stage: Stage, converting: calibrate.Progress) -> Executor:
    """An executor that a user wrote: its class gets the checkpoint, and those of these options that its parameters name."""
    cls, name = user_classes.find("executor", options.executor, method="submit"), options.executor
    parameters = user_classes.parameters(cls, skip=1)
    taken = ", ".join(parameters) or "no options"
    values = {key: getattr(options, key) for key in ("weights", "kv", "max_model_len", "threads", "device")}
    values = {key: value for key, value in values.items() if value is not None}
    for key in values:
        if key not in parameters:
            raise ValueError(f"executor {name!r} takes no {key}; it takes {taken}")
    if not options.alone:
        raise ValueError(f"executor {name!r} is one process; --executor torch takes tp, sp, pp and workers")
    if "kv_bytes" in parameters:
        values["kv_bytes"] = options.kv_memory or _kv_bytes(options, checkpoint)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in values:
            raise ValueError(f"executor {name!r} needs {key}, which was not given (--{key.replace('_', '-')})")
    stage("loading")
    executor: Executor = cls(checkpoint, **values)
    return executor


MAKERS = {"openvino": (_openvino, None, "u8"), "torch": (_torch, "bf16", "bf16")}
"""What makes an executor, and its default formats of weights (None: by a trial) and KV."""


def _kv_bytes(options: Options, checkpoint: Checkpoint) -> int:
    """The default KV memory of all ranks on a processor, in bytes."""
    return default_kv_bytes(options.sp * weight_bytes(checkpoint, options.weights or ""))


def _simulated(options: Options) -> Parts:
    from stallfree.executors.simulated import SimulatedExecutor

    length = options.max_model_len or 8192
    capacity = Capacity(block_size=32, num_blocks=(options.kv_memory or 1 << 30) // (32 * 13_000), max_model_len=length)
    text = bytes_as_text()
    return (
        SimulatedExecutor(capacity, text.encode("abcdefghijklmnopqrstuvwxyz ")),
        text,
        "simulated",
        "none",
        None,
        "simulated",
        Sampling(),
        None,
    )


def bytes_as_text() -> Text:
    """The text of a simulated model: a token is a byte, and a conversation is its messages, one per line."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Text(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ())
