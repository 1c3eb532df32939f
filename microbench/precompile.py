"""Compile tuning candidates ahead of their timing: on all cores at once, in processes that never touch the GPU.

A job calls an operator as the benchmark binds it, with meta tensors of a case's shapes, while every launch compiles
instead (`common/testing/compile.py`): Triton's disk cache then holds what the same call needs on the GPU. A process
each, forked from one that has everything imported: a compiler that dies or hangs costs its candidate.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blackwell_kernels import env
from blackwell_kernels.common import ahead, tables
from blackwell_kernels.common.library import NAMESPACE
from blackwell_kernels.common.testing.compile import ARCHS, compile_only
from blackwell_kernels.common.testing.gates import MAX_SHARED
from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.implementations import OURS, find
from blackwell_kernels.microbench.spec import dtype_of, shape_of

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Job:
    """Compile what `op` needs with `config` on `cases`, which differ in sizes but hardly in kernels."""

    op: str
    config: Mapping[str, tables.Scalar]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Failure:
    """Why a job was not compiled. final: the compiler's verdict, which a GPU would repeat."""

    why: str
    final: bool


class _CallTriton(TorchDispatchMode):
    """Our operators on meta tensors run their Triton implementation, as they do on a GPU."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.implementations = importlib.import_module(f"blackwell_kernels.{family}.op")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            return getattr(self.implementations, f"{func.overloadpacket.__name__}_triton")(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def meta_inputs(case: Case) -> dict[str, Any]:
    """Inputs of `case` by shape and dtype only; scalars are 1."""
    axes = case.full_axes()

    def made(tensor: str) -> Any:
        shape = shape_of(tensor)
        dtype = getattr(torch, dtype_of(tensor))
        if shape is None:
            return 1.0 if dtype.is_floating_point else 1
        return torch.empty([axes[axis] for axis in shape], dtype=dtype, device="meta")

    return {name: made(tensor) for name, tensor in case.spec.inputs.items()}


def call(case: Case) -> None:
    """Our call of a case with inputs of no contents, up to its launches: what those do is the caller's business."""
    with _CallTriton(case.spec.op.split("_")[0]):
        find(case.spec.name, OURS).bind(meta_inputs(case))()


def compile_job(job: Job, sm: int) -> str | None:
    """Compile a job in this process for sm_<sm>a; why its configuration cannot be launched, or None.

    Raises: what the operator or the compiler raised.
    """
    with compile_only(sm) as compiled, tables.override(job.op, dict(job.config)), _CallTriton(env.HOOK_OPS[job.op]):
        for case in job.cases:
            find(case.spec.name, OURS).bind(meta_inputs(case))()
    for launch in compiled:
        needed = launch.kernel.metadata.shared
        if needed > MAX_SHARED:
            return f"{launch.name} needs {needed} B of shared memory, a block can have {MAX_SHARED}"
    return None


def _child(send: Any, job: Job, sm: int) -> None:
    torch.set_num_threads(1)
    try:
        why = compile_job(job, sm)
        failure = None if why is None else Failure(why, final=True)
    except Exception as error:
        failure = Failure(ahead.in_a_line(error), final=type(error).__module__.startswith("triton"))
    send.send(failure)


def compile_all(
    jobs: Sequence[Job], sm: int, processes: int, done: Callable[[Job], None], child: Callable[..., None] = _child
) -> list[Failure | None]:
    """For each job why it failed, or None. `done` hears of each as it ends, in this thread.

    sm: compute capability; where there is no ahead-of-time target for it nothing is compiled.
    """
    if sm not in ARCHS:
        return [None] * len(jobs)
    context = multiprocessing.get_context("forkserver")
    # torch imports its compiler for the first tensor that is made in a dispatch mode
    context.set_forkserver_preload([__name__, "torch._dynamo", "triton.compiler"])
    failures: dict[int, Failure | None] = {}
    for i, answer in ahead.in_processes(context, child, [(job, sm) for job in jobs], processes, TIMEOUT_S):
        failures[i] = Failure(answer.why, final=True) if isinstance(answer, ahead.Lost) else answer
        done(jobs[i])
    return [failures[i] for i in range(len(jobs))]


def default_jobs() -> int:
    """As many processes as this one may use cores, 16 at most."""
    return ahead.cores(16)
