"""The demo: a real `vllm serve --plugin blackwell_kernels`, a minute of agent traffic, and how fast and how exact.

Whatever ends the run (the clock, Ctrl-C, a server that dies), everything started is stopped and a report is written
from what was measured until then.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from blackwell_kernels import __version__
from blackwell_kernels.e2e import checkpoints, load, metrics, models, probe, report, sessions, warm_up
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.processes import signals_stop
from blackwell_kernels.e2e.server import VLLM, Server
from blackwell_kernels.errors import BlackwellKernelsError, ServerError

OK, FAILED, ENVIRONMENT, INTERRUPTED = 0, 1, 3, 130
USERS = 8
WARMED = ("cuda",)  # where kernels are compiled; on a CPU ours are references


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str = "qwen3-next"
    seconds: float = 60.0
    out: Path = Path("out/demo")
    quant: str = "fp8"
    port: int | None = None
    users: int = USERS
    plugin: str | None = "blackwell_kernels"
    seed: int = 0
    as_json: bool = False
    server_command: Sequence[str] = VLLM
    command: str = field(default_factory=lambda: shlex.join(["blackwell-kernels", *sys.argv[1:]]))


def detect_backend() -> str:
    """ "cuda" or "cpu", by the vLLM that is installed and the devices torch sees. Raises when vLLM is missing."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ServerError("vLLM is not installed here; `make demo` installs the right one in its own .venv") from error
    import torch

    return "cuda" if torch.cuda.is_available() and not version.endswith("+cpu") else "cpu"


def server_args(backend: str, model: str) -> list[str]:
    """Arguments of `vllm serve` for the demo's model."""
    if backend == "cpu":
        return ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    # full graphs for decode and no torch.compile: ready in half a minute rather than four
    args = ["--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']
    # a cache of a known size is not profiled for: a neighbour that comes or goes on the card meanwhile stops no start
    args += ["--max-model-len", "8192", "--max-num-seqs", "32"]
    args += ["--kv-cache-memory-bytes", str(2 << 30), "--gpu-memory-utilization", "0.1"]
    # what vLLM would choose for the dense layers is compiled with nvcc first, for minutes
    args += ["--linear-backend", "cutlass"]
    return [*args, *(["--gdn-prefill-backend", "triton"] if model == "qwen3-next" else [])]


def scenario(backend: str, seed: int) -> sessions.Scenario:
    """The demo's traffic: on a GPU with longer contexts, so that sparse attention has something to leave out."""
    if backend == "cpu":
        return sessions.named("demo", seed=seed)
    return sessions.named("demo", seed=seed, context_scale=1 / 24, output_scale=1 / 4, max_context=8000)


def run(options: Options, steps: Steps | None = None, console: Console | None = None) -> int:
    """The whole demo; returns the exit code."""
    steps, console = steps or Steps(), console or Console()
    result, code = blank(options), OK
    folder = fresh_folder(options.out)
    try:
        with signals_stop():
            measure(options, result, folder, steps)
    except KeyboardInterrupt as stop:
        result["state"], code = f"stopped by {stop}.", INTERRUPTED
    except ServerError as error:
        result["state"], code = f"{error}", ENVIRONMENT
    except BlackwellKernelsError as error:
        result["state"], code = f"{error}", FAILED
    rows, complaints = load.read(folder)
    result["load"] = metrics.summarise(rows)
    result["complaints"] = complaints
    read_status(result, folder)
    if result["state"] == "complete":
        result["checks"] = checks(result)
        code = OK if all(check["passed"] for check in result["checks"]) else FAILED
    paths = report.write_all(result, rows, folder)
    if options.as_json:
        console.file.write(paths["json"].read_text() + "\n")
        return code
    report.terminal(result, console)
    for check in result["checks"]:
        mark = "ok    " if check["passed"] else "FAILED"
        console.print(f"{mark} {check['name']}: {check['detail']}", highlight=False, markup=False)
    if result["state"] != "complete":
        console.print(f"error: {result['state']}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {paths['html']}", highlight=False, soft_wrap=True)
    following = f"blackwell-kernels e2e demo --model {other_model(options.model)}" if code == OK else "doctor"
    console.print("next: " + (following if code == OK else f"blackwell-kernels {following}"), highlight=False)
    return code


def measure(options: Options, result: dict[str, Any], folder: Path, steps: Steps) -> None:
    """Everything that needs the server; fills `result` as figures come in."""
    backend = result["backend"] = detect_backend()
    result["versions"], result["machine"] = versions(), machine(backend)
    model = models.canonical(options.model)
    size = "tiny" if backend == "cpu" else "small"
    steps.say(f"{backend.upper()}: vLLM {result['versions']['vllm']}, {model} ({size}, {options.quant})")
    checkpoint = checkpoints.build(model, size=size, quant=options.quant, seed=options.seed, say=steps.say)
    vocab = models.hf_config(model, size)["vocab_size"]
    server = Server(
        checkpoint,
        folder,
        plugin=options.plugin,
        port=options.port,
        args=server_args(backend, model),
        # a demo shows our operators; which is faster on this GPU is what `bench` and `compare` find out
        env={"BLACKWELL_KERNELS_FORCE": "all"} if options.plugin and backend == "cuda" else {},
        cuda=backend == "cuda",
        command=options.server_command,
    )
    result["server_command"] = shlex.join(server.command)
    with probe.References(checkpoint, cuda=backend == "cuda") as references, server:
        result["ready_s"] = server.wait_ready(steps)
        steps.say(f"vLLM is ready after {result['ready_s']:.0f} s")
        traffic = scenario(backend, options.seed)
        if backend in WARMED:
            result["warm_up"] = while_serving(server, lambda: warm_up.run(server, vocab, traffic.max_context, steps))
        result["exactness"] = while_serving(server, lambda: exactness(server, references, vocab, steps))
        result["scenario"] = traffic.to_dict()
        before = server.metrics()
        load.run(server, traffic, folder, load.Plan(options.users, options.seconds), steps)
        result["server"] = metrics.server_side(before, server.metrics())
        result["state"] = "complete"
    steps.say("server stopped")


def exactness(server: Server, references: probe.References, vocab: int, steps: Steps) -> dict[str, Any]:
    """Compare with transformers."""
    with steps.waiting("log-probabilities against transformers") as wait:
        wait.update()
        found = probe.check(server.base_url, references, vocab)
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["seconds"].items())
    steps.say(f"mean |Δ log p| against transformers: {found['overall']['mean']:.4f} ({took})")
    return found


def while_serving(server: Server, action: Callable[[], Any]) -> Any:
    """Run an action against the server; if that fails because the server died, say how it died instead."""
    try:
        return action()
    except ServerError:
        server.check()
        raise


def checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold for the demo to be called a success."""
    summary, exact = result["load"], result["exactness"]
    errors = sum(summary["errors"].values())
    found = [
        {
            "name": "answers",
            "passed": summary["completed"] > 0 and errors == 0,
            "detail": f"{summary['completed']} of {summary['requests']} requests complete, {errors} errors",
        },
        {
            "name": "exactness",
            "passed": exact["passed"],
            "detail": "mean |Δ log p| over what rounding alone gives: "
            + ", ".join(f"{name} {phase['ratio']:.2f}" for name, phase in exact["phases"].items())
            + f"; at most {exact['factor']:g}",
        },
    ]
    if result["plugin"]:
        served = {row["op"] for row in result["activation"] if row["impl"] != "stock"}
        missing = sorted(set(models.HOOK_OPS[result["model"]]) - served)
        detail = f"not served by ours: {', '.join(missing)}" if missing else f"ours: {', '.join(sorted(served))}"
        found.append({"name": "operators", "passed": not missing, "detail": detail})
    return found


def read_status(result: dict[str, Any], folder: Path) -> None:
    """What the plugin's processes said about themselves; empty without the plugin."""
    from blackwell_kernels import status

    found = status.read_all(folder / "status")
    result["status"], result["activation"] = found, status.activation_rows(found)
    result["complaints"] += [f"status file {name} is unreadable" for name in found["unreadable"]]


def blank(options: Options) -> dict[str, Any]:
    """A result with nothing measured yet."""
    model = models.canonical(options.model)
    title = f"{model} under agent sessions, {'plugin' if options.plugin else 'stock vLLM'}"
    return {**report.blank(title, options.command), "model": model, "plugin": options.plugin}


def fresh_folder(out: Path) -> Path:
    """The output folder without an earlier run's files of ours; anything else in it stays."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("server.log", "locust.log", "result.json", "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)
    for path in out.glob("records*.jsonl"):
        path.unlink()
    shutil.rmtree(out / "status", ignore_errors=True)
    return out


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"blackwell-kernels": __version__, "python": platform.python_version()}
    for name in ("vllm", "torch", "triton", "transformers", "locust"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def sources() -> str:
    """12 hex digits over the code and the tables that serve: the plugin's, its hooks' and its kernels'."""
    digest = hashlib.sha256()
    for part in ("", ".model_patches", ".common", ".moe", ".dsa", ".gdn"):
        spec = importlib.util.find_spec(f"blackwell_kernels{part}")
        for folder in spec.submodule_search_locations or () if spec else ():
            files = [*Path(folder).glob("*.py"), *Path(folder).glob("configs/**/*.json")]
            for path in sorted(files):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def machine(backend: str) -> dict[str, Any]:
    """Processor, cores and GPUs."""
    found: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "cpu": platform.processor()}
    if backend == "cuda":
        import torch

        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def other_model(model: str) -> str:
    """The model the demo did not show."""
    return next(name for name in models.MODELS if name != models.canonical(model))
