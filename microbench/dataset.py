"""A FlashInfer-Bench data set in a directory: definitions, solutions, workloads, safetensors. Made on demand.

Blobs are seeded, so nothing but their index is kept in the repository. `flashinfer-bench run --local DIR` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from flashinfer_bench.data import Trace, TraceSet, Workload, save_jsonl_file
from safetensors.torch import save_file

from blackwell_kernels.microbench import generate
from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.workloads import generate as make_inputs


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/blackwell_kernels/microbench, or ~/.cache/...."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "blackwell_kernels" / "microbench"


def materialize(root: Path, cases: Iterable[Case], *, seed: int = 0) -> TraceSet:
    """Write definitions, solutions and workloads of `cases` under `root` and load them; existing blobs are reused."""
    cases = list(cases)
    for name, text in generate.files(list({case.spec.name: case.spec for case in cases}.values())).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    traces: dict[str, list[Trace]] = {}
    for case in cases:
        traces.setdefault(case.spec.name, []).append(
            Trace(definition=case.spec.name, workload=_workload(root, case, seed))
        )
    for name, listed in traces.items():
        save_jsonl_file(listed, root / "workloads" / listed_op(cases, name) / f"{name}.jsonl")
    return TraceSet.from_path(str(root))


def listed_op(cases: Iterable[Case], definition: str) -> str:
    """The operator of a definition among `cases`."""
    return next(case.spec.op for case in cases if case.spec.name == definition)


def _workload(root: Path, case: Case, seed: int) -> Workload:
    uuid = f"{case.uuid}-s{seed}"
    relative = Path("blob") / "workloads" / case.spec.op / case.spec.name / f"{uuid}.safetensors"
    inputs = make_inputs(case, seed=seed)
    tensors = {name: x.contiguous() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, str(new))
    os.replace(new, path)
    specs = {
        name: {"type": "safetensors", "path": str(relative), "tensor_key": name}
        if name in tensors
        else {"type": "scalar", "value": x}
        for name, x in inputs.items()
    }
    return Workload.model_validate({"axes": case.axes, "inputs": specs, "uuid": uuid})
