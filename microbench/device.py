"""The machine: what it is, what was installed on it, and what it can do, measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels.common import arch
from blackwell_kernels.microbench.results import Ceilings
from blackwell_kernels.microbench.timing import GraphEngine, quantile

_PACKAGES = ("", ".common", ".moe", ".dsa", ".gdn", ".model_patches", ".microbench")


def version(package: str) -> str:
    """Installed version, or `missing`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def source_hash() -> str:
    """12 hex digits over the Python files that run: equal for a checkout and an installation made from it."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(f"blackwell_kernels{package}")
        origin = spec.origin if spec else None
        assert origin is not None, f"blackwell_kernels{package} has no source"
        for path in sorted(Path(origin).parent.glob("*.py")):
            digest.update(f"{package}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str:
    """The checkout's commit, `+` appended when files differ from it; `unknown` for an installation."""
    try:
        here = Path(__file__).parent
        run = ["git", "-C", str(here)]
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def driver() -> str:
    """The NVIDIA driver's version, or `unknown`."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (found.splitlines() or ["unknown"])[0].strip()


def now() -> str:
    """ISO date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_PLACES = ("--results", "--tables", "--folder", "--output", "--html", "--markdown", "--against", "--compare")


def command(program: str = "blackwell-kernels") -> str:
    """The command line that runs, as results record it: to be repeated anywhere, so without where its files lie."""
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in _PLACES:
            next(words, None)
        elif word != "--json" and not word.startswith(tuple(f"{place}=" for place in _PLACES)):
            kept.append(word)
    return f"{program} {shlex.join(kept)}".strip()


def facts(command: str, at_commit: str | None = None) -> dict[str, Any]:
    """The head of a results file, ceilings aside."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "sm": 10 * major + minor,
        "driver": driver(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": version("vllm"),
        "commit": at_commit or commit(),
        "date": now(),
        "command": command,
        "source": source_hash(),
    }


def _median_us(call: Any, turns: int = 9) -> float:
    call()
    torch.cuda.synchronize()
    sample = GraphEngine().prepare([call])
    for _ in range(3):
        sample()
    return quantile([sample() for _ in range(turns)], 0.5)


def measure_ceilings() -> Ceilings:
    """Large copies (best of several ways: not every copy kernel is good), 8192³ products, one tiny kernel."""
    device = torch.device("cuda")
    best = 0.0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.zeros((2 << 30) // dtype.itemsize, dtype=dtype, device=device)
        y = torch.empty_like(x)
        for call in (lambda x=x, y=y: y.copy_(x), lambda x=x, y=y: torch.neg(x, out=y)):
            best = max(best, 2 * x.nbytes / _median_us(call) / 1e6)
    del x, y
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / _median_us(lambda: a @ b) / 1e6
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    one = torch.ones((), device=device)
    fp8 = 2 * n**3 / _median_us(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)) / 1e6
    small = torch.zeros(1, device=device)
    return Ceilings(copy_tbps=best, fp8_tflops=fp8, bf16_tflops=bf16, launch_us=_median_us(lambda: small.add_(1.0)))


def best_known(measured: Ceilings) -> dict[str, float]:
    """Rates for floors: this run's, or the chip's known measured ones where those are better (a floor is a promise)."""
    rates, known = measured.model_dump(), arch.current_arch("cuda")
    if known.measured:
        for name in ("copy_tbps", "fp8_tflops", "bf16_tflops"):
            rates[name] = max(rates[name], getattr(known, name))
        rates["launch_us"] = min(rates["launch_us"], known.launch_us)
    return rates


def fib_timer(device: torch.device) -> Callable[[Callable[[], Any]], float] | None:
    """µs a call as FlashInfer-Bench times it (events around one eager call, L2 overwritten before), if installed."""
    try:
        from flashinfer_bench.bench.timing import do_bench
    except ModuleNotFoundError:
        return None

    def timer(call: Callable[[], Any]) -> float:
        return 1000.0 * float(do_bench(call, warmup=5, rep=30, device=str(device)))  # type: ignore[arg-type]

    return timer
