"""`blackwell-kernels validate` on a rented B200, from a clone: `pip install modal; modal run microbench/modal_app.py`.

Results stay in the volume `blackwell-kernels-validate`: a second run resumes, `modal volume get` fetches them.
This has not been run by its authors on that service.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import modal

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
    .pip_install("vllm==0.24.0", "nvidia-cutlass-dsl>=4.5.0", "fla-core", "pytest", "pytest-timeout")
    .add_local_dir(Path(__file__).resolve().parent.parent, REPOSITORY, copy=True, ignore=LEFT_OUT)
    .run_commands(f"pip install -e '{REPOSITORY}[bench,e2e]'")
)


def command(arguments: str) -> list[str]:
    """What runs there: the same command as anywhere."""
    return ["blackwell-kernels", "validate", "--folder", f"{OUT}/validate", *arguments.split()]


@app.function(gpu=GPU, image=image, volumes={OUT: volume}, timeout=HOURS * 3600)
def validate(arguments: str = "") -> int:
    """Run it, and keep what it measured and the tables it wrote beside its report."""
    for kept in KEPT:  # of an interrupted run, so that this one resumes
        _copy(f"{OUT}/{kept}", f"{REPOSITORY}/{kept}")
    try:
        return subprocess.run(command(arguments), cwd=REPOSITORY).returncode
    finally:
        for kept in KEPT:
            _copy(f"{REPOSITORY}/{kept}", f"{OUT}/{kept}")
        volume.commit()


def _copy(source: str, target: str) -> None:
    if Path(source).is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


@app.local_entrypoint()
def main(arguments: str = "") -> None:
    """`--arguments "--only bench"` and the like are validate's own."""
    raise SystemExit(validate.remote(arguments))
