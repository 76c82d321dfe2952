"""`stallfree calibrate`: times iterations on this machine, and prints their prices and the cost model's error. It fits no model."""

import json

import typer

from stallfree.cli import options


def calibrate(
    model: options.Model = None,
    weights: options.Weights = None,
    kv: options.Kv = None,
    kv_memory: options.KvMemory = None,
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
    executor: options.Executor = "openvino",
    device: options.Device = None,
    tp: options.Tp = 1,
    sp: options.Sp = 1,
    pp: options.Pp = 1,
    gpu_memory_utilization: options.GpuMemory = 0.9,
    as_json: options.Json = False,
) -> None:
    """Time iterations of a model on this machine, and keep their prices for `serve`."""
    from stallfree.engine.assemble import Options, recalibrate
    from stallfree.perf.fitted import FEATURES, SCALE

    chosen = Options(
        model,
        executor,
        weights=weights,
        kv=kv,
        kv_memory=kv_memory,
        max_model_len=max_model_len,
        threads=threads,
        device=device,
        tp=tp,
        sp=sp,
        pp=pp,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    fitted, errors, file = recalibrate(chosen, lambda line: typer.echo(line, err=True), options.progress)
    if as_json:
        result = {"file": str(file), "prices_s": fitted.prices, "scale": SCALE, "quantum": fitted.quantum}
        result |= {"error_median": errors.median, "error_p90": errors.p90, "error_largest": errors.largest}
        typer.echo(json.dumps(result))
        return
    for name, price, scale in zip(FEATURES, fitted.prices, SCALE, strict=True):
        typer.echo(f"{name:<18}{1000 * price:8.2f} ms for {scale:,.0f}")
    typer.echo(f"efficient sizes: multiples of {fitted.quantum} tokens")
    shares = f"median {errors.median:.1%}, p90 {errors.p90:.1%}, largest {errors.largest:.1%}"
    typer.echo(f"error over {errors.iterations} iterations: {shares}")
    typer.echo(f"kept in {file}")
