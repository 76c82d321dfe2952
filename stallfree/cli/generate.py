"""`stallfree generate`: completes one prompt with an engine in this process, and no server."""

import json
import sys
import time
from typing import Annotated

import typer

from stallfree.cli import options


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    model: options.ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: options.Temperature = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same tokens.", show_default="random")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output. May be given several times.")] = None,
    weights: options.Weights = None,
    kv: options.Kv = None,
    threads: options.Threads = None,
    executor: options.Executor = "openvino",
    device: options.Device = None,
    adapter: options.OneAdapter = None,
    as_json: options.Json = False,
) -> None:
    """Complete PROMPT, and print the text as it comes. With --json: the whole result at the end."""
    from stallfree.engine.llm import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    chosen = {"temperature": temperature, "seed": seed, "adapter": adapter and adapter.partition("=")[0]}
    sampling = {"max_tokens": max_tokens, "stop": stop or ()} | {key: value for key, value in chosen.items() if value is not None}
    adapters = None if adapter is None else [adapter]
    with LLM(model, weights=weights, kv=kv, threads=threads, executor=executor, device=device, adapter=adapters) as llm:
        if not as_json:
            for piece in llm.stream(text, **sampling):
                typer.echo(piece, nl=False)
            typer.echo()
            return
        began = time.perf_counter()
        (done,) = llm.generate([text], **sampling)
        seconds = time.perf_counter() - began
    typer.echo(json.dumps({"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason, "seconds": seconds}))
