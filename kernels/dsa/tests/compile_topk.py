"""Compile launches of the row top-k, one a line of standard input, for `test_topk_ptx.py`: it runs in a process that
interprets, and only one that does not can compile. A line of standard output is a launch's `ptx.Source`, all JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from blackwell_kernels.common.testing.compile import compile_only
from blackwell_kernels.common.testing.ptx import Source
from blackwell_kernels.dsa import topk
from blackwell_kernels.dsa.config import TopkConfig


def main() -> None:
    most_here = topk.MOST_HERE
    for line in sys.stdin:
        case = json.loads(line)
        logits, indices = (
            torch.empty_strided((case["rows"], width), (stride, 1), dtype=dtype, device="meta")
            for width, stride, dtype in (
                (case["columns"], case["stride_logits"], torch.float32),
                (case["k"], case["stride_indices"], torch.int32),
            )
        )
        starts, ends = (torch.empty(case["rows"], dtype=torch.int32, device="meta") for _ in range(2))
        topk.MOST_HERE = most_here if case["here"] else 0
        with compile_only(case["arch"]) as compiled:
            topk.launch(logits, starts, ends, indices, TopkConfig(**case["config"]))
        (launched,) = compiled
        print(json.dumps(asdict(Source.of(launched))))


if __name__ == "__main__":
    main()
