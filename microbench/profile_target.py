"""What Nsight Compute runs: one call of ours on one case, marked, after one that warmed everything up.

python -m blackwell_kernels.microbench.profile_target DEFINITION CASE
"""

from __future__ import annotations

import sys

import torch

from blackwell_kernels.microbench.cases import all_cases
from blackwell_kernels.microbench.implementations import OURS, find
from blackwell_kernels.microbench.workloads import generate


def main(definition: str, name: str) -> None:
    """Profile one call."""
    case = next(c for c in all_cases() if (c.definition, c.name) == (definition, name))
    call = find(case.spec.name, OURS).bind(generate(case, seed=0, device=torch.device("cuda")))
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
