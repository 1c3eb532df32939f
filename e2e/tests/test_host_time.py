"""What the host did while the device idled: from a made-up trace, whose figures can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from blackwell_kernels.e2e import host_time, kernel_time, step_report

Event = dict[str, Any]


def event(cat: str, name: str, ts: float, dur: float, **more: Any) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, **more}


def trace() -> list[Event]:
    """One prefill of two steps: a long wait in the first, a kernel that is loaded in the second, and what follows."""
    step = "execute_context_1(2048)_generation_0(0)"
    host = [
        *(event("user_annotation", step, 0.0, 400.0), event("user_annotation", step, 500.0, 400.0)),
        event("user_annotation", "execute_context_0(0)_generation_1(1)", 2000.0, 50.0),
        *(event("cpu_op", "model", 0.0, 390.0), event("cpu_op", "aten::item", 130.0, 160.0)),
        event("cuda_runtime", "cudaStreamSynchronize", 140.0, 140.0),
        event("cpu_op", "blackwell_kernels::moe_fp8_block_scale", 620.0, 180.0),
        event("cuda_driver", "cuModuleLoadData", 625.0, 150.0),
        event("cuda_runtime", "cudaLaunchKernel", 800.0, 0.0, args={"correlation": 99}),  # no kernel of these
        {"ph": "i", "cat": "cpu_op", "name": "no span", "ts": 1.0},
    ]
    made, kernels = (
        [],
        [
            ("gemm_a", 10.0, 100.0, 40.0, "cudaLaunchKernel"),
            ("gemm_b", 20.0, 120.0, 12.0, "cudaLaunchKernelExC"),  # ends within a
            ("gate_up_kernel", 300.0, 320.0, 100.0, "cuLaunchKernelEx"),  # idle 140-320
            ("gemm_c", 510.0, 610.0, 10.0, "cudaLaunchKernel"),  # idle 420-610
            ("down_kernel", 790.0, 810.0, 90.0, "cuLaunchKernel"),  # idle 620-810
            ("gemm_d", 880.0, 903.0, 10.0, "cudaGraphLaunch"),  # idle 900-903: two that wait for each other
        ],
    )
    for i, (name, launched, ts, dur, call) in enumerate(kernels):
        args = {"correlation": i}
        cat = "cuda_driver" if call.startswith("cu") and not call.startswith("cuda") else "cuda_runtime"
        made += [event(cat, call, launched, 4.0, args=args), event("kernel", name, ts, dur, tid=7, args=args)]
    return host + made


def test_idle_stretches_are_named_by_what_the_host_did() -> None:
    found = kernel_time.digest(trace(), kernel_time.Shape("prefill", 1, 4096), seconds=1e-3)["host"]
    assert found["kernels"] == 6
    assert (found["span_us"], found["idle_us"]) == (813.0, 180.0 + 190.0 + 190.0 + 3.0)
    assert (found["launches"], found["driver_launches"], found["graphs"]) == (5, 2, 1)
    assert found["sync_us"] == 140.0
    assert found["ops_us"] == 290.0 + 180.0
    # from the first kernel's begin on: the first two launches were before
    assert found["runtime_us"] == 140.0 + 4 + 4 + 150.0 + 4 + 4
    step = "execute_context_1(2048)_generation_0(0)"
    moe = "blackwell_kernels::moe_fp8_block_scale"
    assert found["longest"] == [
        [190.0, "gate_up_kernel", step, None, "cudaLaunchKernel"],
        [190.0, "gemm_c", step, moe, "cuModuleLoadData"],
        [180.0, "gemm_a", step, "model", "cudaStreamSynchronize"],
    ]
    assert found["causes"] == {"loading a kernel": 190.0, "launches": 190.0, "synchronisation": 180.0}
    assert found["pairs"] == [
        [190.0, 1.0, "gate_up_kernel", "gemm_c"],
        [190.0, 1.0, "gemm_c", "down_kernel"],
        [180.0, 1.0, "gemm_a", "gate_up_kernel"],
        [3.0, 1.0, "down_kernel", "gemm_d"],
    ]


def test_a_stretch_without_the_host_says_so() -> None:
    kernels = [event("kernel", "a", 0.0, 10.0), event("kernel", "b", 100.0, 10.0)]
    found = host_time.digest(kernels, [kernels])
    assert found["causes"] == {host_time.NOTHING: 90.0}
    assert found["longest"] == [[90.0, "a", None, None, None]]
    noted = host_time.digest([*kernels, event("user_annotation", "sample", 20.0, 50.0)], [kernels])
    assert noted["causes"] == {"within sample": 90.0}
    compiled = host_time.digest([*kernels, event("cpu_op", "Torch-Compiled Region: 0/0", 0.0, 99.0)], [kernels])
    assert compiled["causes"] == {"operator Torch-Compiled Region: 0/0": 90.0}, "it is running, not being compiled"


def test_figures_are_medians_of_steps() -> None:
    steps = [
        [event("kernel", "a", t, 10.0), event("kernel", "b", t + idle, 10.0)]
        for t, idle in ((0, 20), (100, 30), (200, 90))
    ]
    found = host_time.digest([], steps)
    assert (found["idle_us"], found["span_us"], found["between_us"]) == (20.0, 40.0, 65.0)
    assert found["causes"] == {host_time.NOTHING: pytest.approx((10 + 70 + 20 + 60 + 80) / 3)}, "between them, too"
    assert found["longest"][0][:2] == [80.0, "a"]


def test_both_arms_stand_side_by_side_and_old_profiles_are_left_out() -> None:
    host = kernel_time.digest(trace(), kernel_time.Shape("prefill", 1, 4096), seconds=1e-3)["host"]
    timed = {"host": host, "server_s": 0.09, "client_s": 0.1}
    rows = step_report.host_rows({"stock": {"prefill 4096": timed}, "plugin": {"prefill 4096": {}}})
    told = {row[1]: row[2:] for row in rows}
    assert told["without it: the server's clock, µs"] == ["90000", "–"]
    assert told["of it without a kernel, µs"] == ["563", "–"]
    assert told["idle meanwhile: synchronisation, µs"] == ["180", "–"]
    assert "cuModuleLoadData" in told["idle stretch 2"][0]
    assert told["idle between two, 1"] == ["190 µs in 1 waits of gemm_c after gate_up_kernel", "–"]
    assert step_report.host_rows({"stock": {"prefill 4096": {}}, "plugin": None}) == []
