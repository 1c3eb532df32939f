"""`blackwell-kernels e2e …`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Serve a model for real: agent traffic, speed and exactness.", no_args_is_help=True, add_completion=False
)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SloTtft = Annotated[float, typer.Option(min=1e-6, help="SLO: seconds to the first token.")]
SloItl = Annotated[float, typer.Option(min=1e-6, help="SLO: mean seconds between tokens.")]
Model = Annotated[str, typer.Option("--model", help="qwen3-next or deepseek.")]


@contextmanager
def _usage() -> Iterator[None]:
    """What was asked for cannot be: one line and exit code 2, no traceback."""
    from blackwell_kernels.errors import BlackwellKernelsError, ServerError

    try:
        yield
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    except (BlackwellKernelsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


@app.callback()
def _commands() -> None:
    """Keeps the commands' names when there is only one."""


@app.command()
def demo(
    model: Model = "qwen3-next",
    seconds: Annotated[float, typer.Option(min=1.0, help="How long agents send requests.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder for the report, records and logs.")] = Path("out/demo"),
    quant: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    users: Annotated[int, typer.Option(min=1, help="Sessions that can run at once.")] = 8,
    port: Annotated[int | None, typer.Option(help="Loopback port; default: a free one.")] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Without the plugin.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights and the traffic.")] = 0,
    as_json: Json = False,
) -> None:
    """A minute of agent sessions on a tiny real model: what runs, how fast, how exact."""
    from blackwell_kernels.e2e import demo as module
    from blackwell_kernels.e2e import models

    plugin = None if stock else "blackwell_kernels"
    with _usage():
        models.hf_config(models.canonical(model), "tiny", quant)
        options = module.Options(model, seconds, out, quant, port, users, plugin, seed, as_json)
    raise typer.Exit(module.run(options))


@app.command()
def equal(
    model: Annotated[str, typer.Argument(help="qwen3-next or deepseek.")],
    out: Annotated[Path | None, typer.Option(help="Folder of results; default out/equal/MODEL.")] = None,
    size: Annotated[
        str | None, typer.Option(help="real, small or tiny; default: real on a GPU, tiny on a CPU.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Depth; default: 8 (Qwen3-Next), 5 (DeepSeek-V3.2).")] = None,
    quant: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    ep: Annotated[bool, typer.Option("--ep", help="Expert parallelism over the ranks.")] = False,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM's: auto, fp8, ...")] = "auto",
    speculative: Annotated[int, typer.Option(min=0, help="Draft tokens of Qwen3-Next's MTP layer; 0: none.")] = 0,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile as vLLM defaults to.")] = False,
    force_ops: Annotated[str, typer.Option(help="BLACKWELL_KERNELS_FORCE of the plugin's arms.")] = "all",
    corrupt: Annotated[str, typer.Option(help="Operators to corrupt: all, none, or a list.")] = "all",
    moe_backend: Annotated[str | None, typer.Option(help="--moe-backend of the stock arm.")] = None,
    arms: Annotated[str, typer.Option(help="Which to run now, of stock, plugin, eager.")] = "stock,plugin,eager",
    requests: Annotated[int, typer.Option(min=1)] = 96,
    forced: Annotated[int, typer.Option(min=1, help="Forced tokens a request.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the weights and the requests.")] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no arm goes on.")] = 3600.0,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    llm: Annotated[str, typer.Option(help="More arguments of vLLM's LLM(...), as JSON, for every arm.")] = "{}",
    as_json: Json = False,
) -> None:
    """Plugin against stock on the same tokens: equal within the noise, every operator executed, faults noticed."""
    from blackwell_kernels.e2e import demo, models
    from blackwell_kernels.e2e import equal as module

    with _usage():
        name = models.canonical(model)
        options = module.Options(
            model=name,
            out=out or Path("out/equal") / name,
            size=size or ("real" if demo.detect_backend() == "cuda" else "tiny"),
            layers=layers,
            quant=quant,
            tp=tp,
            ep=ep,
            kv_cache_dtype=kv_cache_dtype,
            speculative=speculative,
            compile=compile_,
            force_ops=force_ops,
            corrupt=module.parse_list(corrupt),
            moe_backend=moe_backend,
            arms=module.parse_list(arms, module.ARMS),
            requests=requests,
            forced=forced,
            seed=seed,
            time_limit=time_limit,
            commit=commit,
            llm=json.loads(llm),
            as_json=as_json,
        )
        module.model_config(options)
        options.corrupted_ops()
    raise typer.Exit(module.run(options))


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="qwen3-next or deepseek.")],
    scenario: Annotated[
        str | None, typer.Option(help="Named traffic; default: agent64k on a GPU, demo on a CPU.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE: change a scenario setting.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Recorded sessions instead of made ones: a file of a known format.")
    ] = None,
    rates: Annotated[
        str,
        typer.Option(help="Sessions per second, as a list; auto: three up to the knee, found by search, and twice it."),
    ] = "auto",
    first_rate: Annotated[float, typer.Option(min=0.02, help="Where the search starts.")] = 0.25,
    seconds: Annotated[float, typer.Option(min=1.0, help="Measured time of a load point.")] = 120.0,
    ramp: Annotated[float | None, typer.Option(help="Seconds before it that do not count; default: a fifth.")] = None,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds after it for answers to end.")] = 20.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of traffic after a start, thrown away.")] = 30.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each arm, in turn: A B A B.")] = 2,
    gpus: Annotated[
        str,
        typer.Option(help="GPU indices, as nvidia-smi counts; with twice --tp both arms run at once, and swap."),
    ] = "",
    profile: Annotated[
        bool | None,
        typer.Option(help="Profile a step of each arm and predict the gains first; default: on a GPU."),
    ] = None,
    measured: Annotated[
        Path, typer.Option(help="The kernels' measured times, for the prediction, and the tables searched for stock.")
    ] = Path("microbench/results"),
    searched: Annotated[
        bool,
        typer.Option(help="Give both servers the tables that were searched for vLLM's Triton experts on this GPU."),
    ] = True,
    time_limit: Annotated[
        float | None,
        typer.Option(min=1.0, help="Seconds, report included; what would end later is left to the next call."),
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="Sessions that can run at once.")] = 256,
    processes: Annotated[int, typer.Option(min=1, help="Load processes.")] = 1,
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.05,
    size: Annotated[
        str | None, typer.Option(help="real, small or tiny; default: real on a GPU, tiny on a CPU.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Depth; default: the model's.")] = None,
    quant: Annotated[str | None, typer.Option(help="fp8 or bf16; default: fp8 on a GPU, bf16 on a CPU.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="disk, generated (made while loading) or dummy; default: generated for the real size."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    server_args: Annotated[str, typer.Option(help="More arguments of `vllm serve`, for both arms.")] = "",
    stock_args: Annotated[str, typer.Option(help="... for stock only.")] = "",
    plugin_args: Annotated[str, typer.Option(help="... for the plugin only.")] = "",
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for both servers.")] = None,
    stock_env: Annotated[list[str] | None, typer.Option(help="... for stock only.")] = None,
    plugin_env: Annotated[
        list[str] | None, typer.Option(help="... for the plugin only, e.g. BLACKWELL_KERNELS_FORCE=all.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Loopback port; default: a free one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the traffic.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of results; default out/compare/MODEL.")] = None,
    as_json: Json = False,
) -> None:
    """Plugin against stock under agent traffic: tokens/s and the tail, with intervals. Goes on where it was stopped."""
    import shlex

    from blackwell_kernels.e2e import compare as module
    from blackwell_kernels.e2e import demo, metrics, points, predict, serving

    with _usage():
        both = serving.parse_env(env or [])
        if searched and demo.detect_backend() == "cuda":
            tables = predict.searched_tables(measured, demo.machine("cuda")["gpu"])
            both = ({predict.TABLES: str(tables)} if tables else {}) | both
        chosen = serving.Serving.choose(
            model,
            size=size,
            quant=quant,
            layers=layers,
            weights=weights,
            tp=tp,
            seed=seed,
            args=tuple(shlex.split(server_args)),
            only={"stock": tuple(shlex.split(stock_args)), "plugin": tuple(shlex.split(plugin_args))},
            env={
                "stock": both | serving.parse_env(stock_env or []),
                "plugin": both | serving.parse_env(plugin_env or []),
            },
        )
        traffic = serving.traffic(chosen, scenario, serving.parse_settings(set_ or []), seed)
        wanted = () if rates == "auto" else tuple(float(rate) for rate in rates.split(","))
        setup = points.Setup(
            seconds=seconds,
            ramp_s=seconds / 5 if ramp is None else ramp,
            drain_s=drain,
            users=users,
            processes=processes,
            gpus=tp,
            source=source,
            slo=metrics.Slo(ttft_s=slo_ttft, itl_s=slo_itl),
        )
        cards = tuple(int(index) for index in gpus.split(",") if index.strip())
        options = module.Options(
            serving=chosen,
            scenario=traffic,
            setup=setup,
            out=out or Path("out/compare") / chosen.model,
            rates=wanted,
            first_rate=first_rate,
            warmup_s=warmup,
            repeats=repeats,
            gpus=cards,
            profile=chosen.backend == "cuda" if profile is None else profile,
            measured=measured,
            time_limit_s=time_limit,
            port=port,
            as_json=as_json,
        )
    raise typer.Exit(module.run(options))


@app.command()
def soak(
    model: Annotated[str, typer.Argument(help="qwen3-next or deepseek.")] = "qwen3-next",
    seconds: Annotated[float, typer.Option(min=1.0, help="How long.")] = 3600.0,
    rate: Annotated[float, typer.Option(min=0.001, help="Sessions per second, in bursts.")] = 0.25,
    ramp: Annotated[float, typer.Option(help="Seconds at the start that do not count.")] = 60.0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE: change a scenario setting.")] = None,
    source: Annotated[Path | None, typer.Option(help="Recorded sessions instead of made ones.")] = None,
    users: Annotated[int, typer.Option(min=1, help="Sessions that can run at once.")] = 256,
    processes: Annotated[int, typer.Option(min=1, help="Load processes.")] = 1,
    faults_every: Annotated[float, typer.Option(min=0.1, help="Seconds between rounds of malformed requests.")] = 30.0,
    stock: Annotated[bool, typer.Option("--stock", help="Without the plugin.")] = False,
    size: Annotated[
        str | None, typer.Option(help="real, small or tiny; default: real on a GPU, tiny on a CPU.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Depth; default: the model's.")] = None,
    quant: Annotated[str | None, typer.Option(help="fp8 or bf16; default: fp8.")] = None,
    weights: Annotated[str | None, typer.Option(help="As for compare.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    server_args: Annotated[str, typer.Option(help="More arguments of `vllm serve`.")] = "",
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the server.")] = None,
    port: Annotated[int | None, typer.Option(help="Loopback port; default: a free one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the traffic.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("out/soak"),
    as_json: Json = False,
) -> None:
    """Hours of mixed traffic with dropped and malformed requests: no errors, flat memory, no drift, nothing left."""
    import shlex

    from blackwell_kernels.e2e import points, serving
    from blackwell_kernels.e2e import soak as module

    arm = "stock" if stock else "plugin"
    with _usage():
        chosen = serving.Serving.choose(
            model,
            size=size,
            quant=quant or (None if stock else "fp8"),
            layers=layers,
            weights=weights,
            tp=tp,
            seed=seed,
            args=tuple(shlex.split(server_args)),
            env={arm: serving.parse_env(env or [])},
        )
        traffic = module.fitted(chosen, rate, serving.parse_settings(set_ or []), seed)
    setup = points.Setup(seconds, ramp, 20.0, users, processes, tp, source)
    options = module.Options(chosen, traffic, setup, out, arm, faults_every, port, as_json)
    raise typer.Exit(module.run(options))


@app.command()
def store(
    out: Annotated[
        Path | None, typer.Argument(exists=True, file_okay=False, help="--out of a comparison or soak.")
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Instead: a kept comparison, whose prediction is judged anew."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit that was measured; default: this checkout's.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of results; default: e2e/results.")] = None,
    remark: Annotated[
        list[str] | None,
        typer.Option(help="What the figures do not say of themselves; --again: in place of what it has."),
    ] = None,
) -> None:
    """Keep a result with its provenance, and write the page about all that are kept (without a result: only that)."""
    from blackwell_kernels.e2e import equal as checkout
    from blackwell_kernels.e2e import pages

    with _usage():
        if again:
            pages.judge_again(again, remark or ())
        elif out:
            print(pages.store(out, commit or checkout.commit(), root or pages.ROOT, remark or ()))
        print(pages.write(root or pages.ROOT))


@app.command()
def golden(
    model: Model = "qwen3-next",
    out: Annotated[Path, typer.Option(help="Folder for the server's log.")] = Path("out/golden"),
) -> None:
    """Serve a tiny model and write its greedy answers as the golden ones of the tests. Look at the difference first."""
    from blackwell_kernels.e2e import golden as module
    from blackwell_kernels.e2e import models
    from blackwell_kernels.e2e.console import Steps

    with _usage():
        name = models.canonical(model)
    print(module.write(name, out, Steps()))


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Files that locustfile.py wrote.")],
    ramp: Annotated[float, typer.Option(help="Seconds at the start that do not count.", min=0.0)] = 0.0,
    gpu_count: Annotated[int, typer.Option(help="GPUs of the server, for tokens/s of each.", min=1)] = 1,
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.05,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/report"),
    as_json: Json = False,
) -> None:
    """Figures with intervals and a report from raw records, of any server."""
    from rich.console import Console

    from blackwell_kernels.e2e import metrics
    from blackwell_kernels.e2e import report as module

    rows, complaints = metrics.read_records(records)
    if not rows:
        print(f"error: no record in {', '.join(map(str, records))}; give files that --records named", file=sys.stderr)
        raise typer.Exit(2)
    slo = metrics.Slo(ttft_s=slo_ttft, itl_s=slo_itl)
    started = [row["started"] for row in rows if row["kind"] == "start"]
    sent = [row["scheduled"] for row in rows if row["kind"] == "request"]
    window = (min(started) + ramp, max(sent)) if ramp and started and sent else None
    if window and window[0] >= window[1]:
        print(f"error: --ramp {ramp:g}: requests were sent for {max(sent) - min(started):.1f} s", file=sys.stderr)
        raise typer.Exit(2)
    load = metrics.summarise(rows, slo=slo, window=window, gpus=gpu_count, intervals=True)
    options = {"--ramp": (ramp, 0.0), "--gpu-count": (gpu_count, 1)}
    options |= {"--slo-ttft": (slo_ttft, 2.0), "--slo-itl": (slo_itl, 0.05)}
    given = [word for name, (value, usual) in options.items() if value != usual for word in (name, f"{value:g}")]
    command = shlex.join(["blackwell-kernels", "e2e", "report", *map(str, records), *given])
    result = module.blank(f"Agent sessions: {', '.join(path.stem for path in records)}", command)
    scenario: dict[str, object] = next((row["scenario"] for row in rows if row["kind"] == "start"), {})
    result |= {"state": "complete", "load": load, "complaints": complaints, "scenario": scenario}
    paths = module.write_all(result, rows, out)
    if as_json:
        print(paths["json"].read_text())
        return
    module.terminal(result, Console())
    print(f"report: {paths['html']}\nnext: blackwell-kernels e2e demo")
