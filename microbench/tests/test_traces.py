"""CUPTI's record as torch.profiler exports it: what belongs to a call, gaps, launches, and what is no trace."""

import json

import pytest
import torch

from blackwell_kernels.microbench import profile_target, traces
from blackwell_kernels.microbench.cases import select


def kernel(name, ts, dur, grid=(8, 2, 1), block=(128, 1, 1), cat="kernel"):
    args = {"grid": list(grid), "block": list(block), "registers per thread": 32} if cat == "kernel" else {}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def calls(count, *, gap=1.5):
    """Two kernels and a memset a call, not in the order of time, among what else a trace holds."""
    events = [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cpu_op", "name": "aten::empty", "ts": 1, "dur": 2},
    ]
    for i in range(count):
        start = 100.0 * i
        events += [
            kernel("second", start + 12.0 + 2 * gap, 5.0 + i, grid=(4, 1, 1)),
            kernel("first", start, 10.0),
            kernel("Memset (Device)", start + 10.0 + gap, 2.0, cat="gpu_memset"),
            {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": start, "dur": 3.0},
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemsetAsync", "ts": start, "dur": 50.0},
        ]
    return events


def test_a_call_is_its_kernels_in_their_order_with_median_times():
    groups = traces.per_call(calls(3), 3)
    found = traces.kernels(groups)
    assert [(k.name, k.us, k.blocks, k.threads) for k in found] == [
        ("first", 10.0, 16, 128),
        ("Memset (Device)", 2.0, 1, 1),
        ("second", 6.0, 4, 128),
    ]
    assert traces.gap(groups) == pytest.approx(1.5)
    assert traces.launch(calls(3)) == 3.0
    assert traces.launch([]) is None
    assert traces.gap([[kernel("one", 0.0, 1.0)]]) is None, "one kernel has no neighbour"
    assert traces.gap([[kernel("a", 0.0, 9.0), kernel("b", 5.0, 1.0)]]) == 0.0, "kernels that overlap leave no gap"


@pytest.mark.parametrize(
    ("events", "count", "why"),
    [
        ([], 2, "no kernels: CUPTI is not there"),
        ([*calls(3)[:-1], kernel("third", 400.0, 1.0)], 3, "10 kernels in 3 calls"),
        ([kernel("a", 0.0, 1.0), kernel("b", 2.0, 1.0)], 2, "does not always launch the same kernels"),
    ],
)
def test_what_cannot_be_told_apart_is_no_trace(events, count, why):
    with pytest.raises(ValueError, match=why):
        traces.per_call(events, count)


def test_overhead_is_what_the_host_takes_beyond_the_kernels():
    found = traces.kernels(traces.per_call(calls(1), 1))
    assert traces.Trace(kernels=found, host_us=50.0).overhead_us == 50.0 - 17.0
    assert traces.Trace(kernels=found, host_us=5.0).overhead_us == 0.0


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """The profiled process on a machine without a GPU: its inputs and calls are on the CPU, CUDA's calls do nothing."""
    generate = profile_target.generate
    monkeypatch.setattr(profile_target, "generate", lambda case, seed, device: generate(case, seed=seed))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: None)
    monkeypatch.setattr(traces, "warm_up", lambda: None)
    return [(case.definition, case.name) for case in select(sets=("cpu",), op="moe_routing")[:2]]


def test_the_profiled_process_writes_a_line_a_case(no_gpu_needed, tmp_path, monkeypatch):
    told = iter([traces.Trace(kernels=[], host_us=1.0), ValueError("no kernels")])

    def record(call):
        assert call()[0].shape[0] in (1, 65), "the operator itself is called"
        found = next(told)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(traces, "record", record)
    profile_target.main(str(tmp_path / "out"), *(part for pair in no_gpu_needed for part in pair))
    first, second = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert first["trace"]["host_us"] == 1.0
    assert second == {"error": "ValueError: no kernels"}


def test_for_ncu_every_case_is_marked_even_one_that_cannot_run(no_gpu_needed, monkeypatch):
    log = []

    class Mark:
        def __getitem__(self, grid):
            return lambda x: log.append("mark")

    warm = profile_target._warm
    monkeypatch.setattr(profile_target, "begin_case", Mark())
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))

    def once(case):
        if "num_tokens=65" in case.name:
            raise RuntimeError("out of memory")
        call = warm(case)
        return lambda: log.append("call") or call()

    monkeypatch.setattr(profile_target, "_warm", once)
    profile_target.main("-", *(part for pair in no_gpu_needed for part in pair))
    assert log == ["mark", "start", "mark", "call", "stop", "start", "mark", "stop"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_is_traced_on_a_gpu():
    x = torch.ones(1 << 20, device="cuda")

    def call():
        return x.mul(2.0).add(1.0)

    call()
    traces.warm_up()
    found = traces.record(call)
    assert len(found.kernels) == 2
    assert found.busy_us > 0
    assert found.no_graph == ""
    assert found.graph_gap_us is not None


@pytest.mark.aot
def test_the_separator_is_named_as_it_is_looked_for():
    from blackwell_kernels.common.testing.compile import compile_only
    from blackwell_kernels.microbench import counters

    with compile_only(90) as launched:
        profile_target.begin_case[(1,)](torch.zeros(1))
    assert [one.kernel.metadata.name for one in launched] == [counters.SEPARATOR]
