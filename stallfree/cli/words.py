"""Turns a dataclass into the options of a command: each field's type, default and help (its own, or that of `HELP`). It also reads
the same options from a TOML file. It knows how options come in, not what they mean.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from stallfree.cli import options
from stallfree.core.nearest import nearest
from stallfree.workload.traffic import Traffic

if TYPE_CHECKING:
    from stallfree.core.classes import Classes
    from stallfree.sim.deployment import Deployment

ENGINE = "An engine of a year: vllm-2026, fused, graph, eager-2024, vllm-2023, lightllm-2023."
"""The engines of `perf.roofline`, which is not loaded for a help text. A test compares them."""

HELP: dict[str, tuple[str, str | None]] = {
    # Traffic
    "arrivals": (
        "poisson, gamma:cv=2 (a larger cv is burstier), bursts:on=10s,off=50s, diurnal:period=24h,swing=0.8, or trace: the file's "
        "times.",
        None,
    ),
    "lengths": (
        "Prompt/output tokens: 512/128, median=200,p90=800/median=60,p90=150, uniform=16..256/zipf=16..256,s=1.1; openchat or "
        "arxiv, the paper's datasets; a FILE.csv with prompt_tokens, output_tokens and optionally arrived_at, or BurstGPT's; or "
        "Mooncake's FILE.jsonl. Several may be mixed: 512/128 + 5%:2000/64.",
        None,
    ),
    "max_total": ("Most tokens of a request, prompt and output. Longer ones are drawn again.", "no limit"),
    "rate": ("Mean requests per second. A trace has its own rate.", "none"),
    "requests": ("How many requests.", "200; simulated 2,048; all of a trace"),
    "duration": ("Seconds of arrivals, instead of a number of requests.", "none"),
    "seed": ("The same seed draws the same arrivals and lengths.", None),
    "mix": (
        "Whose the requests are: 'acme: 75% class=interactive; crawler: 25% class=batch priority=1'. A .csv may say it itself, in "
        "columns tenant, class and priority.",
        "nobody's",
    ),
    "adapters": ("Different LoRA adapters that the requests ask for.", "none"),
    "adapter_zipf": ("How unevenly: the k-th most popular adapter has a share that falls as 1 / k^this.", None),
    # Deployment
    "model": ("A name of `stallfree list models`, or a Hugging Face config.json.", "none"),
    "hardware": ("A name of `stallfree list hardware`, a device's .toml, or this-cpu, as calibrated.", None),
    "tp": ("Tensor parallelism.", None),
    "pp": ("Pipeline parallelism.", None),
    "sp": ("Sequence parallelism: groups of --tp devices that share each iteration's tokens.", None),
    "weights": ("Precision of the weights: bf16, fp16, fp8, fp8-block, int8 or int4.", None),
    "kv": ("Precision of the KV cache: bf16, fp16, fp8, u8, or u4 (keys have 8 bits).", None),
    "engine": (f"{ENGINE[:-1]}; or a DistServe profile, a .json.", None),
    "node": ("Devices used on each node.", "all it has"),
    "network": ("The link between nodes.", "the device's first"),
    "policy": ("Scheduling policy (see `stallfree list policies`), or ./file.py:Class.", None),
    "policy_option": ("An option of the policy, as NAME=VALUE. May be given several times.", "none"),
    "token_budget": ("Tokens per iteration, for policies that take a budget.", "the policy's"),
    "slo": (
        "Latency targets, as tbt=100ms@p99 or ttft=2s@p90,tpot=50ms; or of classes, the first for requests without one: "
        "'interactive: ttft=1s,tbt=50ms; batch: ttlt=10min'.",
        "none; with policy slo, 5 small decode iterations",
    ),
    "tenant_weights": ("Tenants' weights: acme=3,crawler=1.", "1 each"),
    "max_seqs": ("Most requests running at once.", None),
    "max_tokens": ("Most tokens in one iteration, whatever the policy.", None),
    "max_model_len": ("Longest request, in tokens, prompt and output.", "the model's context"),
    "block_size": ("Tokens of a KV block.", None),
    "gpu_memory_utilization": ("Share of the devices' memory for weights and KV.", None),
    "watermark": ("Share of the KV blocks that an admission leaves free.", None),
    "max_output": ("The max_tokens that each request declares; the actual output may be shorter.", "the actual output"),
    "rank": ("Ranks of the adapters, in turn: 8 or 8,16,32.", "no adapters"),
    "adapter_modules": ("What adapters change: attention, or all matrices.", None),
    "draft_acceptance": ("How likely a guessed token is right, from 0 to 1.", "nothing is guessed"),
    "draft_tokens": ("The most tokens guessed for a stream in an iteration.", None),
    "draft_model": ("A smaller model that guesses, on the same devices: a name or a config.json.", "guesses take no time"),
    "on_late": ("Requests whose first token would miss its target by the policy's forecast: refuse, or serve.", None),
    # Site
    "gpus": ("All devices, evenly spread over the nodes.", None),
    "nodes": ("Nodes with these devices.", None),
    "link": ("Link between nodes, one port each: ib-400g, ib-200g, ib-100g, eth-100g, eth-25g, eth-10g.", None),
    "replicas": ("Copies of the engine, each on its own devices.", None),
    "router": ("Which replica a request goes to: round-robin, least-loaded, shortest-queue, prefix-affinity, least-ttft.", None),
    "prefill_replicas": (
        "In a system of two kinds (distserve, splitwise, hybrid, taichi, dynaserve), replicas that compute prompts, or have large "
        "chunks.",
        "half",
    ),
    "prefix_cache": ("Share the KV of equal prompt beginnings.", None),
}
"""The help of each field, and the words that --help shows for a default of None."""

_IN_TOML: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text in quotes"),
    list: ((list,), "a list of texts in quotes"),
}
_kinds: dict[str, type] = {}
"""The types of all commands' options, and of the model, by their names."""
_CONFIGURATIONS = "configurations"


def spread(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces a command's dataclass parameters by options, one for each field. The fields `without` get no
    option; they keep their defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        spreads: dict[str, tuple[type, list[str]]] = {}
        for parameter in inspect.signature(command).parameters.values():
            hint = hints[parameter.name]
            if not hasattr(hint, "__dataclass_fields__"):
                parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            types = get_type_hints(hint, include_extras=True)
            shown_fields = [field for field in fields(hint) if field.name not in without]
            spreads[parameter.name] = hint, [field.name for field in shown_fields]
            for field in shown_fields:
                annotation: Any = types[field.name]
                if get_origin(annotation) is not Annotated:
                    help, shown = HELP[field.name]
                    annotation = Annotated[annotation, typer.Option(help=help, show_default=shown or True)]
                parameters.append(
                    inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
                )

        @wraps(command)
        def run(**values: Any) -> None:
            whole = {name: cls(**{field: values.pop(field) for field in names}) for name, (cls, names) in spreads.items()}
            command(**whole, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@contextmanager
def mistakes() -> Iterator[None]:
    """A ValueError inside is a mistake of the user: print it in one line and end with exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Take the values in `file` as defaults of the command's options. Each must have the option's type."""
    if file is None:
        return None
    with mistakes():
        try:
            table = tomllib.loads(file.read_text())
        except OSError as error:
            raise ValueError(f"--config {file} cannot be read: {error.strerror}; name a .toml") from None
        except ValueError as error:
            raise ValueError(f"--config {file} is not TOML: {error}") from None
        tables = _tables(table.pop(_CONFIGURATIONS, {}), context, file)
        if tables and "policies" not in {parameter.name for parameter in context.command.params}:
            raise ValueError(f"{file}: this command takes one configuration; the simulated `capacity` and `compare` take several")
        context.meta[_CONFIGURATIONS] = tables
        context.default_map = _checked(table, context, str(file))
    return file


def _tables(tables: Any, context: typer.Context, file: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ValueError(f"{file}: configurations are tables with names, such as [configurations.relaxed]")
    return {name: _checked(table, context, f"{file}, [configurations.{name}]") for name, table in tables.items()}


def _checked(table: Mapping[str, Any], context: typer.Context, where: str) -> dict[str, Any]:
    known = [name for parameter in context.command.params if (name := parameter.name) in _kinds and name not in ("named", "config")]
    names = [name.replace("_", "-") for name in known]
    either_way = any(parameter.name == "named" for parameter in context.command.params)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"{where}: unknown option {key!r}{nearest(key, names)}; known: {', '.join(names)}")
        types, words = _IN_TOML[_kinds[name]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"{where}: {key} is {value!r}, expected {words}")
        values["named" if name == "model" and either_way else name] = value
    return values


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_configure,
        help="A TOML file with any of these options, by name. Options on the command line override it.",
        show_default=False,
    ),
]


def everywhere(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that all commands have: --config; also --model, if the model is an optional argument."""
    hints = get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints.get(parameter.name, parameter.annotation), kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
    ]
    arguments = [p.name for p in parameters if _is_argument(p.annotation)]
    for parameter in parameters:
        if parameter.name == "model" or (parameter.name not in arguments and parameter.annotation is not typer.Context):
            _kinds[parameter.name] = _kind(parameter.annotation)
    either_way = "model" in arguments
    own_context = next((p.name for p in parameters if p.annotation is typer.Context), None)
    more: dict[str, Any] = {"named": options.ModelOption} if either_way else {}
    if either_way and own_context is None:
        more["context_"] = typer.Context
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (more | {"config": Config}).items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        values.pop("config")
        if either_way:
            named, context = values.pop("named"), values[own_context] if own_context else values.pop("context_")
            in_file = getattr(context.get_parameter_source("named"), "name", "") == "DEFAULT_MAP"
            values["model"] = options.one_model(values["model"], None if in_file and values["model"] else named)
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _is_argument(annotation: Any) -> bool:
    return any(isinstance(part, ArgumentInfo) for part in getattr(annotation, "__metadata__", ()))


def _kind(annotation: Any) -> type:
    """TOML's type for a parameter; text for those that are parsed from text, such as paths and choices."""
    type_ = annotation.__origin__ if get_origin(annotation) is Annotated else annotation
    if any(getattr(part, "parser", None) for part in getattr(annotation, "__metadata__", ())):
        return str
    members = [member for member in (type_, *get_args(type_)) if (get_origin(member) or member) in _IN_TOML]
    return (get_origin(members[0]) or members[0]) if members else str


Trace = Annotated[
    Path | None,
    typer.Option(
        help="Read arrivals and lengths from this trace, a .csv or .jsonl. A rate stretches its times.", show_default=False
    ),
]


def traced(traffic: Traffic, trace: Path | None) -> Traffic:
    """`traffic` with the arrivals and lengths of `trace`, if there is one. Raises ValueError if `traffic` sets them too."""
    if trace is None:
        return traffic
    usual = Traffic()
    if (traffic.arrivals, traffic.lengths) != (usual.arrivals, usual.lengths):
        raise ValueError("--trace has arrivals and lengths of its own; give it alone, or --arrivals and --lengths without it")
    return replace(traffic, arrivals="trace", lengths=str(trace))


def check_classes(traffic: Traffic, targets: Classes | None) -> None:
    """Raises ValueError for a class that requests of `traffic` name, and `targets` do not have."""
    from stallfree.core.classes import Classes
    from stallfree.core.slo import Slo

    known = targets or Classes({"": Slo()})
    for name in sorted(traffic.workload.classes):
        known.find(name)


def configurations(context: typer.Context, deployment: Deployment, policies: list[str]) -> dict[str, Deployment]:
    """Deployments by name: `deployment` with each of the `policies` (such as sarathi:512, or taichi:1 with one replica of the first
    kind), and with the values of each configuration in the file; without either, `deployment` alone. Raises ValueError for a name
    that is there twice.
    """
    from stallfree.sim.systems import SYSTEMS

    deployments: dict[str, Deployment] = {}
    for text in policies:
        name, number = policy(text)
        if text in deployments:
            raise ValueError(f"{text!r} is named twice; name each policy once")
        of_number = "prefill_replicas" if name in SYSTEMS else "token_budget"
        deployments[text] = replace(deployment, policy=name, **{of_number: number})  # type: ignore[arg-type]  # both are int | None
    for name, own in context.meta.get(_CONFIGURATIONS, {}).items():
        if name in deployments:
            raise ValueError(f"{name!r} is named twice, as a policy and as a configuration; rename the configuration")
        alien = sorted(own.keys() - {f.name for f in fields(deployment)})
        if alien:
            raise ValueError(f"[configurations.{name}]: {alien[0]} is the same for all; set it above the tables")
        deployments[name] = replace(deployment, **own)
    return deployments or {deployment.policy: deployment}


def policy(text: str) -> tuple[str, int | None]:
    """A policy's name, and the number that follows, as in sarathi:128."""
    name, colon, number = text.rpartition(":")
    return (name, int(number)) if colon and number.isdecimal() else (text, None)
