"""Generated weights inside `vllm serve`: made on the device while the model loads, nothing on disk, any depth.

vLLM spawns its engine and its ranks as fresh processes, and a load format must be known in each of them, in stock's as
well as in the plugin's. A `sitecustomize` on PYTHONPATH is what every Python process runs first; ours waits until
vLLM's loaders are imported and adds the format to them. It changes nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from blackwell_kernels.e2e import checkpoints

_SITE = '''"""Written by blackwell-kernels: teaches vLLM to make weights. Safe to remove."""

from blackwell_kernels.e2e import in_server

in_server.install()
'''


def install() -> None:
    """Add the load format as soon as vLLM's loaders are imported; cheap until then."""
    from blackwell_kernels.import_hooks import when_imported

    def register(_: object) -> None:
        from blackwell_kernels.e2e.engine import register_loader

        register_loader()

    when_imported("vllm.model_executor.model_loader", register)


def write(model: str, size: str, quant: str, layers: int | None, seed: int) -> Path:
    """The folder that stands for a checkpoint: configuration, tokenizer, the generator's settings, the hook."""
    from blackwell_kernels.e2e.engine import GENERATOR_FILE

    folder = checkpoints.without_weights(model, size, quant, layers, seed)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(_SITE)
    (folder / GENERATOR_FILE).write_text(json.dumps({"seed": seed, "predictable": False}))
    return folder


def arguments() -> list[str]:
    """What `vllm serve` is told."""
    from blackwell_kernels.e2e.engine import LOAD_FORMAT

    return ["--load-format", LOAD_FORMAT]


def environment(folder: Path) -> dict[str, str]:
    """What a server of such a folder needs."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str((folder / "site").absolute()), *([before] if before else [])])}
