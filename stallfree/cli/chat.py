"""`stallfree chat`: a conversation in the terminal. It uses the engine in this process, and no server."""

from typing import Annotated

import typer

from stallfree.cli import options


def chat(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: options.Temperature = None,
    weights: options.Weights = None,
    kv: options.Kv = None,
    threads: options.Threads = None,
    executor: options.Executor = "openvino",
    device: options.Device = None,
    adapter: options.OneAdapter = None,
) -> None:
    """Talk to a model. /new begins again; an empty line, /quit or Ctrl-D ends; Ctrl-C stops an answer."""
    from rich.console import Console

    from stallfree.core.request import Refused
    from stallfree.engine.llm import LLM

    console = Console()
    chosen = {"temperature": temperature, "adapter": adapter and adapter.partition("=")[0]}
    sampling = {key: value for key, value in chosen.items() if value is not None}
    adapters = None if adapter is None else [adapter]
    with LLM(model, weights=weights, kv=kv, threads=threads, executor=executor, device=device, adapter=adapters) as llm:
        beginning = [{"role": "system", "content": system}] if system else []
        messages = list(beginning)
        while True:
            try:
                line = console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if line in ("", "/quit"):
                break
            if line == "/new":
                messages = list(beginning)
                continue
            if line.startswith("/") and " " not in line:
                console.print(f"there is no command {line}: /new begins again, /quit ends")
                continue
            answer = ""
            try:
                for piece in llm.stream_chat([*messages, {"role": "user", "content": line}], **sampling):
                    answer += piece
                    console.print(piece, end="", markup=False, highlight=False)
            except KeyboardInterrupt:
                pass
            except Refused as refusal:
                console.print(f"[red]{refusal}[/red]; /new begins again", end="")
                answer = ""
            console.print()
            if answer:
                messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
