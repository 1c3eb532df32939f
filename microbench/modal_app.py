"""`blackwell-kernels validate` on a rented B200, from a clone: `pip install modal; modal run microbench/modal_app.py`.

Results are written to the volume `blackwell-kernels-validate` as they come: a second run resumes, however the first one
ended, and `modal volume get` fetches them.
This has not been run by its authors on that service.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import modal

HERE = Path(__file__).resolve().parent.parent
GPU = "B200"
REPOSITORY, OUT = "/repository", "/out"
HOURS = 6
KEPT = ("microbench/results", "kernels/moe/configs", "kernels/dsa/configs", "kernels/gdn/configs")
LEFT_OUT = [".git", ".venv", ".cache", "build", "out", "**/__pycache__"]

app = modal.App("blackwell-kernels-validate")
volume = modal.Volume.from_name("blackwell-kernels-validate", create_if_missing=True)
image = (
    # FlashInfer and DeepGEMM compile some of the peers' kernels at first use, with nvcc
    modal.Image.from_registry("nvidia/cuda:13.0.1-devel-ubuntu24.04", add_python="3.12")
    .pip_install("vllm==0.24.0", "nvidia-cutlass-dsl>=4.5.0", "fla-core")
    .pip_install("pytest", "pytest-timeout", "hypothesis")
    .add_local_dir(HERE, REPOSITORY, copy=True, ignore=LEFT_OUT)
    .run_commands(f"pip install -e '{REPOSITORY}[bench,e2e]'")
)


def command(arguments: str) -> list[str]:
    """What runs there: the same command as anywhere."""
    return ["blackwell-kernels", "validate", "--folder", f"{OUT}/validate", *arguments.split()]


@app.function(gpu=GPU, image=image, volumes={OUT: volume}, timeout=HOURS * 3600)
def validate(arguments: str = "") -> int:
    """Run it; what it measures and the tables it writes lie in the volume, beside its report."""
    for kept in KEPT:
        _keep(Path(REPOSITORY, kept), Path(OUT, kept))
    try:
        return subprocess.run(command(arguments), cwd=REPOSITORY).returncode
    finally:
        volume.commit()


def _keep(place: Path, kept: Path) -> None:
    """Make `place` a link to `kept`, which gets what it lacks: what an earlier run left there wins."""
    if place.is_symlink():  # the container of an earlier call
        return
    kept.mkdir(parents=True, exist_ok=True)
    for path in place.rglob("*"):
        target = kept / path.relative_to(place)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    shutil.rmtree(place, ignore_errors=True)
    os.symlink(kept, place)


def commit() -> str:
    """This checkout's, which does not travel along; nothing outside one."""
    asked = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@app.local_entrypoint()
def main(arguments: str = "") -> None:
    """`--arguments "--only bench"` and the like are validate's own."""
    at = f"--commit {commit()} " if commit() else ""
    raise SystemExit(validate.remote(at + arguments))
