"""`stallfree perf`: the price of an iteration on a device, kernel by kernel; `stallfree perf check`: the error of such prices. It
runs no model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.cli import options
from stallfree.cli.words import ENGINE, mistakes

if TYPE_CHECKING:
    from stallfree.perf.hardware import Hardware
    from stallfree.perf.roofline import Roofline
    from stallfree.perf.shape import Sharded

app = typer.Typer(
    invoke_without_command=True, help="Price an iteration, or compare prices with measured kernels.", rich_markup_mode=None
)

THIS_CPU = "this-cpu"
_PART = re.compile(r"(?:(?P<decodes>\d+)@(?P<context>\d+)|(?:(?P<start>\d+)\+)?(?P<count>\d+))")
_GRAMMAR = (
    "write 32@2048 for 32 decodes after 2,048 tokens each, 512 for a first chunk, 4096+512 for one after 4,096, or 32@2048,512"
)


@app.callback()
def perf(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A built-in name, or a Hugging Face config.json.", show_default=False)
    ] = None,
    hardware: Annotated[str, typer.Option(help="A device, the path of a .toml, or this-cpu, as calibrated.")] = "a100-80g",
    tp: Annotated[int, typer.Option(help="Tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallelism.")] = 1,
    sp: Annotated[int, typer.Option(help="Sequence parallelism: groups of --tp devices that share each prompt's tokens.")] = 1,
    shape: Annotated[
        str, typer.Option(help="32@2048: 32 decodes after 2,048 tokens each; 512: a first chunk; 4096+512: one after 4,096.")
    ] = "32@2048,512",
    weights: Annotated[str, typer.Option(help="bf16, fp16, fp8, fp8-block, int8 or int4.")] = "fp16",
    kv: Annotated[str, typer.Option(help="bf16, fp16, fp8, u8 or u4.")] = "fp16",
    engine: Annotated[str, typer.Option(help=ENGINE)] = "vllm-2026",
    node: Annotated[int | None, typer.Option(help="Devices used on each node.", show_default="all it has")] = None,
    network: Annotated[str | None, typer.Option(help="The link between nodes.", show_default="the device's first")] = None,
    as_json: options.Json = False,
) -> None:
    """Price one iteration, operator by operator, each with its limit: compute, bandwidth, link or launch."""
    if context.invoked_subcommand is not None:
        return
    with mistakes():
        work = parse(shape)
        if hardware == THIS_CPU:
            _this_cpu(model, work, as_json)
            return
        from stallfree.perf import hardware as devices
        from stallfree.perf import shape as models
        from stallfree.perf.roofline import Roofline

        if model is None:
            raise ValueError(f"which model? give --model one of {', '.join(models.names())}, or the path of a config.json")
        device = devices.load(hardware)
        sharded = models.Sharded(models.load(model), tp, pp, weights, kv)
        cost = Roofline(device, sharded, engine, node=node, network=network, sp=sp)
        room = sp * sharded.kv_tokens(device.memory)
        tokens = sum(start + count for start, count in work)
        if tokens > room:
            raise ValueError(
                f"the KV of {tokens:,} tokens does not fit beside the weights, {room:,} do; give fewer with --shape (now {shape}), "
                "or --kv fp8"
            )
    longest = max(start + count for start, count in work)
    if longest > (most := sharded.model.max_model_len):
        typer.echo(f"note: {sharded.model.name} was made for {most:,} tokens, this is priced at {longest:,}", err=True)
    _price(device, sharded, cost, work, sp, room, as_json)


def _price(
    device: Hardware, sharded: Sharded, cost: Roofline, work: list[tuple[int, int]], sp: int, room: int, as_json: bool
) -> None:
    seconds, tokens, number = cost.seconds(work), sum(count for _, count in work), sp * sharded.tp * sharded.pp
    dollars = device.price * number * seconds / 3600 / tokens * 1e6
    operators = cost.operators(work)
    if as_json:
        rows = [
            {"operator": op.name, "times": op.count, "seconds": op.count * op.cost.seconds}
            | {"limit": op.cost.limit[0] if op.cost.limit[1] else None, "limit_seconds": op.count * op.cost.limit[1]}
            for op in operators
        ]
        totals = {"seconds": seconds, "stages": cost.stages(work), "tokens": tokens, "dollars_per_million_tokens": dollars}
        totals |= {"weight_bytes": sharded.weight_bytes, "kv_bytes_per_token": sharded.kv_bytes_per_token, "kv_tokens": room}
        typer.echo(json.dumps(totals | {"operators": rows}))
        return

    from stallfree.cli.measuring import print_grid

    lines = [("operator", "times", "ms", "share", "limit", "ms at the limit", "reached")]
    for op in operators:
        took, (limit, least) = op.count * op.cost.seconds, op.cost.limit
        at_limit = (limit, f"{1000 * op.count * least:.3f}", f"{least / op.cost.seconds:.0%}") if least else ("", "", "")
        lines.append((op.name, str(op.count), f"{1000 * took:.3f}", f"{took / seconds:.1%}", *at_limit))
    print_grid(lines)
    devices = f"{number} x {device.name}" if number > 1 else device.name
    typer.echo(f"{sharded.model.name} on {devices}: {1000 * seconds:.2f} ms, {tokens:,} tokens, ${dollars:.3f} per million of them")
    if sharded.pp > 1:
        typer.echo(f"stages: {', '.join(f'{1000 * stage:.2f}' for stage in cost.stages(work))} ms")
    typer.echo(f"engine: {cost.engine.about}")
    holds = f"the KV of {room // sp:,} tokens" + (f", all {sp} groups of {room:,}" if sp > 1 else "")
    typer.echo(f"each holds {sharded.weight_bytes / 1e9:.1f} GB of weights and {holds} in 90 % of its memory")


@app.command(short_help="Compare prices with measured kernels.")
def check(
    folder: Annotated[Path, typer.Argument(help="Profiles, as a100_Llama-2-7b-hf.csv or a100_dgx_all_reduce.csv.")],
    as_json: options.Json = False,
) -> None:
    """Compare prices with measured kernels: the error of each operator in each file, and of each kind of operator in all.
    Deployments (DEVICE_MODEL_ENGINE_deployments.csv) are simulated."""
    from stallfree.perf.aiconfigurator import left_out
    from stallfree.perf.profiles import DEPLOYMENTS, KINDS, Error, by, read
    from stallfree.sim import deployed

    with mistakes():
        deployments = sorted(folder.rglob(f"*{DEPLOYMENTS}"))
        points, others = read(folder, some=not deployments)
        points += [point for file in deployments for point in deployed.read(file)]
        if deployments:
            typer.echo("simulating the deployments: about half a second each", err=True)
        files = {key: Error.of(group) for key, group in by(points, lambda point: f"{point.file}\t{point.operator}").items()}
        groups = by(points, lambda point: KINDS.get(point.operator, point.operator))
        kinds = {kind: Error.of(group) for kind, group in groups.items()}
        unpriced = left_out(folder)
    if as_json:
        rows = [dict(zip(("file", "operator"), key.split("\t"), strict=True)) | asdict(error) for key, error in files.items()]
        without = [{"file": name, "dtype": dtype, "rows": number} for (name, dtype), number in unpriced.items()]
        by_kind = {kind: asdict(error) for kind, error in kinds.items()}
        typer.echo(json.dumps({"operators": rows, "kinds": by_kind, "left_out": without}))
        return

    from stallfree.cli.measuring import print_grid

    def cells(error: Error) -> tuple[str, ...]:
        return str(error.points), f"{error.median:.1%}", f"{error.p90:.1%}", f"{error.bias:+.1%}"

    lines: list[tuple[str, ...]] = [("file", "operator", "points", "median", "P90", "signed median")]
    lines += [(*key.split("\t"), *cells(error)) for key, error in files.items()]
    lines += [("all files", kind, *cells(error)) for kind, error in kinds.items()]
    print_grid(lines)
    for (name, dtype), number in unpriced.items():
        typer.echo(f"left out, because {dtype} has no price: {number:,} row{'s' if number > 1 else ''} of {name}", err=True)
    for file in others:
        typer.echo(f"ignored, because its columns are not those of a profile: {file}", err=True)


def parse(text: str) -> list[tuple[int, int]]:
    """The (start, count) of each piece of work in text such as 32@2048,512,4096+512. Raises ValueError that says what to write."""
    work: list[tuple[int, int]] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part!r} in the shape {text!r} is not understood; {_GRAMMAR}")
        if match["decodes"] is not None:
            work += [(int(match["context"]), 1)] * int(match["decodes"])
        elif int(match["count"]):
            work.append((int(match["start"] or 0), int(match["count"])))
    if not work:
        raise ValueError(f"the shape {text!r} holds no tokens; {_GRAMMAR}")
    return work


def _this_cpu(model: str | None, work: list[tuple[int, int]], as_json: bool) -> None:
    """Print the prices of this machine's calibration: of an iteration's features, not of kernels."""
    from stallfree.checkpoint.fetch import cache_folder
    from stallfree.engine.calibrate import latest
    from stallfree.perf.fitted import FEATURES

    fitted, model_name, _, _ = latest(cache_folder() / "calibration", model)
    rows = {name: price * amount for name, price, amount in zip(FEATURES, fitted.prices, fitted.features(work), strict=True)}
    seconds = fitted.seconds(work)
    if as_json:
        typer.echo(json.dumps({"seconds": seconds, "model": model_name, "features": rows}))
        return
    for name, took in rows.items():
        typer.echo(f"{name:<18}{1000 * took:9.2f} ms {took / seconds:6.1%}")
    typer.echo(f"{model_name} on this machine, as calibrated: {1000 * seconds:.2f} ms, {sum(count for _, count in work):,} tokens")
