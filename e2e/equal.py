"""Is the plugin's model stock vLLM's model? Real layer dimensions, generated FP8 weights, one process per arm.

Arms, each loading the model once:
  stock   no plugin, CUDA graphs: both compositions (their difference is the noise)
  plugin  ours, CUDA graphs: both compositions, and a profiler trace by phase
  eager   ours without graphs: tokens counted by operator, layer and phase, a trace that ties kernels to operators,
          and composition A once more with each operator corrupted in turn, which the comparison must notice

Every arm writes its results as they come; a second call with the same options does only what is missing.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from blackwell_kernels.e2e import arm as arms
from blackwell_kernels.e2e import judge, models, plan, processes
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.report import write_atomic
from blackwell_kernels.e2e.server import COMMON_ENV, CPU_ENV, CUDA_ENV, free_port
from blackwell_kernels.errors import BlackwellKernelsError

OK, FAILED, ENVIRONMENT, INTERRUPTED = 0, 1, 3, 130
ARMS = ("stock", "plugin", "eager")
DEPTH = {"qwen3-next": 8, "deepseek-v3.2": 5}
CAPTURE_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96]


@dataclass(frozen=True)
class Options:
    """What the command line says. Sizes, tokens and seconds as named there."""

    model: str
    out: Path
    size: str = "real"
    layers: int | None = None
    quant: str = "fp8"
    tp: int = 1
    ep: bool = False
    kv_cache_dtype: str = "auto"
    speculative: int = 0
    compile: bool = False
    force_ops: str = "all"
    corrupt: tuple[str, ...] = ("all",)
    moe_backend: str | None = None
    arms: tuple[str, ...] = ARMS
    requests: int = plan.REQUESTS
    forced: int = 48
    seed: int = 0
    time_limit: float = 3600.0
    commit: str | None = None
    llm: dict[str, Any] = field(default_factory=dict)
    as_json: bool = False
    command: str = field(default_factory=lambda: shlex.join(["blackwell-kernels", *sys.argv[1:]]))

    def corrupted_ops(self) -> list[str]:
        """Hooks to corrupt: all of the model's, those named, or none."""
        known = models.HOOK_OPS[models.canonical(self.model)]
        if self.corrupt == ("all",):
            return list(known)
        if self.corrupt == ("none",):
            return []
        if unknown := [op for op in self.corrupt if op not in known]:
            raise BlackwellKernelsError(
                f"{self.model} has no operator {', '.join(unknown)} to corrupt; it has {', '.join(known)}; or all, none"
            )
        return list(self.corrupt)


def run(options: Options, steps: Steps | None = None) -> int:
    """All arms that are asked for and missing, then the verdict; returns the exit code."""
    steps = steps or Steps()
    name, out = models.canonical(options.model), options.out
    deadline = time.monotonic() + options.time_limit
    specs = {which: spec(options, which) for which in ARMS}
    config = write_model(options, out / "model")
    problem, code = None, None
    try:
        with processes.signals_stop():
            for which in options.arms:
                run_arm(specs[which], options, deadline, steps)
                conclude(options, name, config, specs, None)
    except KeyboardInterrupt as stop:
        problem, code = f"stopped by {stop}", INTERRUPTED
    except BlackwellKernelsError as error:
        problem, code = str(error), ENVIRONMENT
    result = conclude(options, name, config, specs, problem)
    if options.as_json:
        print(json.dumps(result, indent=1))
        return exit_code(code, result)
    print(judge.markdown(result))
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    print(f"results: {out / 'equal.json'} and {out / 'equal.md'}")
    missing = result["missing"]
    print("next: " + (f"the same command again, for {', '.join(missing)}" if missing else "blackwell-kernels e2e demo"))
    return exit_code(code, result)


def exit_code(code: int | None, result: dict[str, Any]) -> int:
    """What ended the run, else the verdict; no verdict yet is no failure."""
    return code if code is not None else FAILED if result["passed"] is False else OK


def model_config(options: Options) -> dict[str, Any]:
    """The config.json of the model that is compared."""
    name = models.canonical(options.model)
    layers = options.layers or (DEPTH[name] if options.size == "real" else None)
    return models.hf_config(name, options.size, options.quant, layers)


def write_model(options: Options, folder: Path) -> dict[str, Any]:
    """The folder that stands for the checkpoint: configuration and generator's settings; weights are made on load."""
    from blackwell_kernels.e2e.checkpoints import write_config
    from blackwell_kernels.e2e.engine import GENERATOR_FILE

    config = model_config(options)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    generator = {"seed": options.seed, "predictable": bool(options.speculative)}
    (folder / GENERATOR_FILE).write_text(json.dumps(generator))
    return config


def spec(options: Options, which: str) -> arms.Spec:
    """What one arm is and does."""
    name = models.canonical(options.model)
    config = model_config(options)
    tiny = options.size == "tiny"
    settings: dict[str, Any] = {
        "max_model_len": 1024 if tiny else 8192,
        "max_num_seqs": 96,
        "max_num_batched_tokens": 512 if tiny else 4096,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": options.tp,
        "enable_expert_parallel": options.ep,
        "distributed_executor_backend": "external_launcher" if options.tp > 1 else "uni",
        "disable_log_stats": True,
    }
    if not tiny:
        settings["gpu_memory_utilization"] = 0.75  # the rest is for the prompts' log-probabilities: tokens x vocabulary
        if name == "qwen3-next":
            settings["gdn_prefill_backend"] = "triton"  # FlashInfer's takes ten minutes of nvcc
    if tiny or which == "eager":
        settings["enforce_eager"] = True
    elif not options.compile:
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": CAPTURE_SIZES}
        settings["compilation_config"] = graphs
    if which == "stock" and options.moe_backend:
        settings["moe_backend"] = options.moe_backend
    if options.speculative:
        settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": options.speculative}
    tasks = ["compose:A", "compose:B"] if which != "eager" else ["counters", "trace", "compose:A"]
    tasks += ["trace"] if which == "plugin" else []
    tasks += [f"corrupt:{op}" for op in options.corrupted_ops()] if which == "eager" else []
    env = {"BLACKWELL_KERNELS": "0"}
    if which != "stock":
        env = {"BLACKWELL_KERNELS": "1", "BLACKWELL_KERNELS_FORCE": options.force_ops}
    return arms.Spec(
        name=which,
        folder=str(options.out / "model"),
        out=str(options.out),
        vocab=config["vocab_size"],
        settings={**settings, **options.llm},
        tasks=tuple(tasks),
        seed=options.seed,
        requests=options.requests,
        forced=options.forced,
        scale=0.1 if tiny else 1.0,
        greedy=bool(options.speculative),
        env=env,
    )


def environment(spec: arms.Spec, options: Options) -> dict[str, str]:
    """The arm's environment: the plugin on or off by the spec alone, the engine in the arm's own process."""
    import torch

    env = {k: v for k, v in os.environ.items() if not k.startswith("BLACKWELL_KERNELS")}
    env |= COMMON_ENV | (CUDA_ENV if torch.cuda.is_available() else CPU_ENV) | spec.env
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "PYTHONUNBUFFERED": "1"}
    if spec.env["BLACKWELL_KERNELS"] == "1":
        env["BLACKWELL_KERNELS_STATUS_DIR"] = str((options.out / f"status-{spec.name}").absolute())
    return env


def run_arm(spec: arms.Spec, options: Options, deadline: float, steps: Steps) -> None:
    """Run one arm to its end unless its results are all there.

    Raises BlackwellKernelsError when it fails or time is up.
    """
    done, _ = arms.load_results(spec)
    todo = [task for task in spec.tasks if task not in done["tasks"]]
    if not todo:
        steps.say(f"arm {spec.name}: results are there")
        return
    if time.monotonic() > deadline:
        raise BlackwellKernelsError(f"time is up before arm {spec.name}; the same command goes on from here")
    spec_path = options.out / f"spec-{spec.name}.json"
    write_atomic(spec_path, json.dumps(asdict(spec), indent=1))
    shutil.rmtree(options.out / f"status-{spec.name}", ignore_errors=True)
    env, port = environment(spec, options), str(free_port())
    ranks = []
    log = options.out / f"arm-{spec.name}.log"
    try:
        for rank in range(options.tp):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.tp, "LOCAL_WORLD_SIZE": options.tp}
            extra = {k: str(v) for k, v in torchrun.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "-m", "blackwell_kernels.e2e.arm", str(spec_path)]
            rank_log = log if rank == 0 else log.with_suffix(f".{rank}.log")
            ranks.append(processes.spawn(command, rank_log, env | (extra if options.tp > 1 else {})))
        with steps.waiting(f"arm {spec.name} ({len(todo)} tasks)") as wait:
            while any(process.poll() is None for process in ranks):
                processes.raise_if_stopped()
                if time.monotonic() > deadline:
                    raise BlackwellKernelsError(f"time is up in arm {spec.name}; the same command goes on from there")
                if any(process.poll() for process in ranks):
                    break  # one rank failed: the others would wait for it
                wait.update(progress(log))
                time.sleep(0.5)
    finally:
        for process in ranks:
            processes.end(process, stop_s=10.0)
    failed = [process.returncode for process in ranks if process.returncode]
    if failed:
        how = processes.how_it_ended(failed[0])
        raise BlackwellKernelsError(
            f"arm {spec.name} {how}: {arms.last_error(spec)}\nThe end of {log}:\n{processes.tail(log, 15)}"
        )
    steps.say(f"arm {spec.name}: done")


def progress(log: Path) -> str:
    """The last thing an arm said about itself."""
    lines = processes.tail(log, 400).splitlines()
    return next((line for line in reversed(lines) if line.startswith("[arm ")), lines[-1][:80] if lines else "")


def conclude(
    options: Options, name: str, config: dict[str, Any], specs: dict[str, arms.Spec], problem: str | None
) -> dict[str, Any]:
    """Judge what is there, write equal.json and equal.md, return the result."""
    found: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, np.ndarray]] = {}
    for which, one in specs.items():
        found[which], samples[which] = arms.load_results(one)
    result = {
        "schema": 1,
        "model": name,
        "size": options.size,
        "layers": config["num_hidden_layers"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": options.command,
        "commit": options.commit or commit(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "settings": {which: one.settings for which, one in specs.items()},
        "arms": {which: {k: v for k, v in r.items() if k != "key"} for which, r in found.items()},
        "problem": problem,
        "missing": [
            f"{which}/{task}"
            for which in options.arms
            for task in specs[which].tasks
            if task not in found[which]["tasks"]
        ],
        **judge.judge(name, config, options, specs["stock"], found, samples),
    }
    write_atomic(options.out / "equal.json", json.dumps(result, indent=1))
    write_atomic(options.out / "equal.md", judge.markdown(result))
    return result


def commit() -> str:
    """The commit of this checkout, with a mark if it has changes; "unknown" outside one."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return (head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")) if head else "unknown"


def parse_list(text: str, allowed: Sequence[str] | None = None) -> tuple[str, ...]:
    """A comma-separated list. Raises BlackwellKernelsError for a name that is not allowed."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if allowed is not None and (unknown := [n for n in names if n not in allowed]):
        raise BlackwellKernelsError(f"unknown {', '.join(unknown)}; there are {', '.join(allowed)}")
    return names
