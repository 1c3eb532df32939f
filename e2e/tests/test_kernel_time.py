"""A step's time by kernel: from traces written by hand, and from a stand-in that writes them."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackwell_kernels.e2e import kernel_time, step_report
from blackwell_kernels.e2e.kernel_time import Shape
from blackwell_kernels.e2e.server import Server
from blackwell_kernels.e2e.streams import Streams
from blackwell_kernels.errors import ServerError

DECODE = Shape("decode", 2, 64)
RECORDED = json.loads((Path(__file__).parent / "data" / "compare-h200.json").read_text())
Kernels = list[tuple[str, float, float]]  # name, begin after the step's begin, duration


def trace(steps: list[tuple[str, Kernels]], every: float = 1000.0) -> list[dict[str, Any]]:
    """A chrome trace: each step is annotated on the host and launches its kernels, which start later."""
    events: list[dict[str, Any]] = []
    for i, (what, kernels) in enumerate(steps):
        begin = i * every
        events.append({"ph": "X", "cat": "user_annotation", "name": what, "ts": begin, "dur": 20.0})
        for name, after, us in kernels:
            args = {"correlation": len(events)}
            events.append({"ph": "X", "cat": "cuda_runtime", "name": "launch", "ts": begin + 5, "dur": 1, "args": args})
            device = {"ph": "X", "cat": "kernel", "name": name, "tid": 7, "args": args}
            events.append({**device, "ts": begin + 300 + after, "dur": us})
    return events


def decode(n: int) -> str:
    return f"execute_context_0(0)_generation_{n}({n})"


def test_the_median_step_by_group_with_overlap_counted_once() -> None:
    kernels: Kernels = [("fused_moe_kernel", 0, 100), ("nvjet_sm90_tst", 50, 100), ("nccl_all_reduce", 200, 30)]
    slow: Kernels = [("fused_moe_kernel", 0, 900), *kernels[1:]]
    steps = [(decode(2), kernels), (decode(2), slow), (decode(2), kernels), (decode(3), slow), ("execute_context_", [])]
    found = kernel_time.digest(trace(steps), DECODE, seconds=400e-6)
    assert found["why"] is None
    assert found["steps"] == 3, "the step of three requests is not of this kind"
    us = {group: value["us"] for group, value in found["groups"].items()}
    assert us == {"moe": 100, "GEMM": 100, "communication": 30, "gaps": 400 - 180}
    assert found["busy_us"] == 180
    assert found["kernels"][0][:3] == ["fused_moe_kernel", "moe", 1]


def test_a_kernel_belongs_to_the_step_that_launched_it_and_the_last_step_may_be_cut_off() -> None:
    # the second step's kernels start after the third step has begun on the host
    events = trace([(decode(2), [("gemm", 0, 10)]), (decode(2), [("gemm", 1200, 30)]), (decode(2), [("gemm", 0, 500)])])
    events += [
        {"ph": "X", "cat": "kernel", "name": "gemm", "tid": 7, "ts": 1.0, "dur": 9e9, "args": {"correlation": -1}}
    ]
    found = kernel_time.digest(events, DECODE, seconds=1e-3)
    assert found["steps"] == 2
    assert found["groups"]["GEMM"]["us"] == 20


def test_a_prefill_of_several_steps_is_one() -> None:
    step = "execute_context_1(4096)_generation_0(0)"
    events = trace([(step, [("flash::fwd", 0, 10)]), (step, [("flash::fwd", 0, 30)]), (decode(1), [("gemm", 0, 99)])])
    found = kernel_time.digest(events, Shape("prefill", 1, 8192), seconds=1e-4)
    assert found["groups"]["attention"]["us"] == 40
    assert found["steps"] == 1
    assert "GEMM" not in found["groups"]


def test_what_was_not_traced_is_said() -> None:
    none = kernel_time.digest(trace([(decode(7), [("gemm", 0, 10)])]), DECODE, 1e-3)
    assert (none["groups"], none["why"]) == ({}, "not measured: no step of this kind was traced")
    host = kernel_time.digest(trace([(decode(2), [])]), DECODE, 1e-3)
    assert host["why"] == "not measured: no GPU kernel was traced"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...", "attention"),
        ("void cutlass::device_kernel<vllm::cutlass_3x_gemm_fp8_blockwise<cutlass::bfloat16_t, 1, 128>>", "GEMM"),
        ("void per_token_group_quant_8bit_kernel<c10::BFloat16, c10::Float8_e4m3fn, true>", "quantise"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "compiled"),
        ("fused_recurrent_gated_delta_rule_packed_decode_kernel", "gdn_decode"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "gdn_prefill"),
        (
            "void cutlass::device_kernel<flat::kernel::FlatKernelTmaWarpSpecializedDeltaRule<flat::c",
            "gdn_prefill",
        ),
        ("_causal_conv1d_update_kernel", "gdn_conv"),
        ("void vllm::moe::topkGating<...>", "moe_routing"),
        ("void vllm::moe::moe_align_block_size_kernel<int>", "moe"),
        ("sm90_fp8_paged_mqa_logits<...>", "dsa_indexer"),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8, true>", "norm"),
        ("layer_norm_fwd_kernel", "norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("batch_memcpy_kernel", "copy"),
        ("void at::native::reduce_kernel<512, 1>", "other"),
    ],
)
def test_stocks_kernels_are_known_by_name(name: str, group: str) -> None:
    assert kernel_time.classify(name) == (group, False)


def test_ours_are_known_by_our_sources() -> None:
    for name, group in (
        ("gdn_decode_kernel", "gdn_decode"),
        ("gate_up_kernel", "moe"),
        ("grouped_topk_kernel", "moe_routing"),
        ("topk_kernel", "dsa_topk"),
        ("sparse_mla_kernel", "dsa_sparse_mla"),
    ):
        assert kernel_time.classify(name) == (group, True)
    assert kernel_time.classify("a_grouped_topk_kernel_of_somebody") == ("moe_routing", False)


def test_quantisation_within_stocks_experts_is_theirs() -> None:
    names = [
        "per_token_quant",
        "moe_align_block",
        "fused_moe_kernel",
        "act_and_mul",
        "per_token_quant",
        "moe_sum_kernel",
    ]
    names += ["per_token_quant", "act_and_mul"]
    kernels = [{"name": name, "ts": i, "tid": 7} for i, name in enumerate(names)]
    # another stream runs the shared expert meanwhile
    kernels.append({"name": "act_and_mul", "ts": 2.5, "tid": 8})
    found = [(event["tid"], group) for event, group, _ in kernel_time.classified(kernels)]
    assert [group for tid, group in found if tid == 7] == ["quantise", *["moe"] * 5, "quantise", "activation"]
    assert [group for tid, group in found if tid == 8] == ["activation"]


TORCH_SUM = "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, ...sum_functor<c10::BFloat16"


@pytest.mark.parametrize("sort", [["moe_align_block_size_kernel", "count_and_sort_expert_tokens"], []], ids=str)
@pytest.mark.parametrize(("end", "group"), [(TORCH_SUM, "moe"), ("moe_sum", "moe"), ("nvjet_tst", "GEMM")])
def test_stocks_experts_end_where_their_results_are_summed(sort: list[str], end: str, group: str) -> None:
    """Of one token nothing is sorted; 10 experts a token are summed by torch; some back ends sum in the GEMM."""
    layer = [
        "topkGating",
        "per_token_group_quant_8bit",
        *sort,
        "fused_moe_kernel",
        "act_and_mul",
        "per_token_group_quant",
    ]
    layer += ["fused_moe_kernel", end, "per_token_group_quant", "Memcpy DtoD", "act_and_mul", TORCH_SUM]
    expected = ["moe_routing", "quantise", *["moe"] * (len(sort) + 4), group, "quantise", "copy", "activation", "other"]
    events = [{"name": name, "ts": i, "tid": 7} for i, name in enumerate(layer * 2)]
    assert [found for _, found, _ in kernel_time.classified(events)] == expected * 2


def test_a_step_that_is_shorter_than_its_kernels_is_an_error() -> None:
    """Recorded: 64 requests' tokens came in bursts, and the median gap between two was 32 µs."""
    stock, plugin = (RECORDED["profiles"][arm] for arm in ("stock", "plugin"))
    assert "32 µs a step, and kernels that run for 5362 µs" in str(kernel_time.mistimed(stock["decode 64"]))
    assert kernel_time.judged(stock["decode 64"])["why"] == kernel_time.mistimed(stock["decode 64"])
    for step in (*plugin.values(), stock["decode 1"], stock["prefill 4096"]):
        assert kernel_time.mistimed(step) is None
    busy = {"busy_us": 1000.0, "why": None}
    assert kernel_time.mistimed({**busy, "seconds": 0.000949})
    assert not kernel_time.mistimed({**busy, "seconds": 0.000951}), "the profiler makes kernels a little slower"
    assert kernel_time.mistimed({"busy_us": None, "seconds": 0.0}) is None

    rows = [row for row in step_report.step_rows(RECORDED["profiles"]) if row[0] == "decode 64"]
    assert rows[0] == ["decode 64", "step, by the client's clock", "–", "–", "7053", "100%", "–"]
    assert rows[1][1].startswith("stock: not timed right")
    times = {row[1]: row[2:] for row in rows}
    assert times["moe"][:3] == ["3609", "–", "3256"]
    assert times["gaps"][:3] == ["–", "–", "2007"]
    assert not any(cell.endswith("%") and float(cell[:-1]) > 100 for row in rows for cell in row)


def test_what_one_arm_does_in_one_kernel_is_compared_in_one_sum() -> None:
    rows = {(row[0], row[1]): row[2:] for row in step_report.step_rows(RECORDED["profiles"])}
    groups = {arm: RECORDED["profiles"][arm]["prefill 4096"]["groups"] for arm in ("stock", "plugin")}
    cells = rows["prefill 4096", "together: experts + quantisation + activation"]
    for cell, of in zip(cells[::2], groups.values(), strict=False):
        parts = sum(of[group]["us"] for group in ("moe", "quantise", "activation") if group in of)
        assert float(cell) == pytest.approx(parts, abs=0.5)


def test_bars_of_both_arms_are_measured_by_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of half the length is drawn half as high."""
    monkeypatch.setattr("blackwell_kernels.e2e.report.to_html", lambda figure: figure)
    groups = {"moe": {"us": 60.0}, "GEMM": {"us": 20.0}, "gaps": {"us": 20.0}}
    halves = {group: {"us": value["us"] / 2} for group, value in groups.items()}
    figure: Any = step_report.plot({"stock": {"x": {"groups": groups}}, "plugin": {"x": {"groups": halves}}})
    assert {bar.name: list(bar.y) for bar in figure.data} == {"moe": [0.6, 0.3], "GEMM": [0.2, 0.1], "gaps": [0.2, 0.1]}
    many: Any = step_report.plot({"stock": {"x": {"groups": {str(i): {"us": 1.0} for i in range(20)}}}, "plugin": None})
    assert len({bar.marker.color for bar in many.data}) == 20, "groups are told apart"
    alone: Any = step_report.plot({"stock": None, "plugin": {"x": {"groups": halves}}})
    assert sum(bar.y[0] for bar in alone.data) == pytest.approx(1)


def test_a_trace_is_read_zipped_or_not(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": [{"name": "x"}]}).encode()
    (tmp_path / "a.json").write_bytes(text)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text))
    assert (
        kernel_time.read_trace(tmp_path / "a.json") == kernel_time.read_trace(tmp_path / "a.json.gz") == [{"name": "x"}]
    )


def test_a_server_is_captured(fake: list[str], tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    shapes = kernel_time.SHAPES["cpu"]
    with Server(tmp_path, tmp_path, command=fake, args=kernel_time.arguments(traces)) as server:
        server.wait_ready(quiet())
        found = kernel_time.capture(server, traces, 1000, shapes)
    assert list(found) == ["decode 1", "decode 4", "prefill 256"]
    for name, step in found.items():
        assert step["why"] is None, name
        if step["kind"] == "decode":
            assert step["seconds"] == step["server_s"] == pytest.approx(0.005), "the server's clock, where it has one"
            assert step["client_s"] >= 0.005, "the stand-in makes a token every 5 ms"
            assert step["server_blocks"]
        else:
            assert step["seconds"] == step["client_s"], "the stand-in has no clock for the first token"
        assert step["host"]["launches"] == 2
        assert step["groups"]["moe"]["us"] == 400
        assert step["groups"]["GEMM"]["us"] == 100
        assert step["groups"]["gaps"]["us"] == pytest.approx(step["seconds"] * 1e6 - 500)
        assert step["n"] == len(step["samples_s"])


def page(tokens: int, took: float, first: tuple[int, float] = (0, 0.0)) -> str:
    return (
        f"vllm:inter_token_latency_seconds_count {tokens}\nvllm:inter_token_latency_seconds_sum {took}\n"
        f"vllm:time_to_first_token_seconds_count {first[0]}\nvllm:time_to_first_token_seconds_sum {first[1]}\n"
    )


class Scripted:
    """A server of which only /metrics is asked: one page after the other."""

    base_url = "http://nowhere"

    def __init__(self, pages: list[str]) -> None:
        self.pages = iter(pages)

    def metrics(self) -> str:
        return next(self.pages)


def test_decode_is_timed_by_the_engine_though_its_tokens_come_in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine makes a token every 5 ms; the client gets 64 at once, then nothing for long."""
    streams = Streams("http://nowhere", [[1]])
    streams.rows[0]["tokens"] = [0.32 * (i // 64) + 1e-5 * i for i in range(200)]
    monkeypatch.setattr(kernel_time, "_decoding", lambda *_: nullcontext(streams))
    monkeypatch.setattr("time.time", lambda: -1.0)
    # looks at the clock: the third finds nothing new
    made = [0, 8, 8, *(8 * i for i in range(2, 16))]
    server: Any = Scripted([page(100 + n, 1.0 + 0.005 * n) for n in made])
    found = kernel_time._time_decode(server, 9, Shape("decode", 1, 64), 0)
    assert found["seconds"] == found["server_s"] == pytest.approx(0.005)
    assert [n for n, _ in found["server_blocks"]] == [8.0] * 15
    assert all(took == pytest.approx(0.04) for _, took in found["server_blocks"])
    assert np.median(found["samples_s"]) < 1e-4, "what the client saw is no step's time"


def test_a_prefill_is_timed_by_the_server_and_one_slow_attempt_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_time, "_first_token", lambda *_: 0.2)
    firsts = [(7, 1.0), (8, 1.1), (9, 2.0), (10, 2.12)]
    server: Any = Scripted([page(0, 0.0, first) for first in firsts])
    found = kernel_time._time_prefill(server, 9, Shape("prefill", 1, 64), 0)
    assert found["seconds"] == found["server_s"] == pytest.approx(0.12)
    assert found["client_s"] == 0.2
    server = Scripted([page(0, 0.0)] * 4)
    found = kernel_time._time_prefill(server, 9, Shape("prefill", 1, 64), 0)
    assert (found["seconds"], found["server_s"]) == (0.2, None), "without such a clock the client's"


def test_a_step_says_whose_clock_timed_it() -> None:
    step = {"kind": "decode", "requests": 1, "why": None, "busy_us": None, "groups": {}}
    engine, client = ({**step, "seconds": 1e-3, "server_s": s} for s in (1e-3, None))
    for arms, label in (
        ((engine, engine), "step, by the engine's clock"),
        ((client, client), "step, by the client's clock"),
        ((engine, client), "step, by the engine's and the client's clock"),
        (({**engine, "why": "not measured: no GPU kernel was traced"}, engine), "step, by the engine's clock"),
        (({**engine, "busy_us": 2e3}, client), "step, by the client's clock"),
    ):
        rows = step_report.step_rows({"stock": {"x": arms[0]}, "plugin": {"x": arms[1]}})
        assert rows[0][1] == label


def test_everything_is_timed_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that was on once makes the launches after it slower."""
    order = []

    def timed(server: Any, vocab: int, shape: Shape, seed: int) -> dict[str, Any]:
        order.append(f"time {shape.name}")
        return {"seconds": 1e-3}

    def traced(*_: Any) -> list[dict[str, Any]]:
        order.append("trace")
        return trace([(decode(1), [("gemm", 0, 10)])] * 2)

    monkeypatch.setattr(kernel_time, "_time_decode", timed)
    monkeypatch.setattr(kernel_time, "_time_prefill", timed)
    monkeypatch.setattr(kernel_time, "_profiled", traced)
    monkeypatch.setattr(kernel_time, "_decoding", lambda *_: nullcontext())
    nowhere: Any = None
    found = kernel_time.capture(nowhere, Path(), 9, [Shape("prefill", 1, 64), Shape("decode", 1, 64)])
    assert order == ["time prefill 64", "time decode 1", "trace", "trace"]
    assert found["decode 1"]["busy_us"] == 10
    assert found["prefill 64"]["why"] == "not measured: no step of this kind was traced"


def test_a_server_without_a_profiler_says_so(fake: list[str], tmp_path: Path) -> None:
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        with pytest.raises(ServerError, match="refused /start_profile"):
            kernel_time.capture(server, tmp_path, 1000, kernel_time.SHAPES["cpu"][:1])


def test_a_stream_that_is_refused_is_an_error(fake: list[str], tmp_path: Path) -> None:
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        with Streams(server.base_url, [[5000]]) as streams, pytest.raises(ServerError, match="HTTP 400"):
            streams.wait_tokens(1)


def quiet() -> Any:
    import io

    from rich.console import Console

    from blackwell_kernels.e2e.console import Steps

    return Steps(Console(file=io.StringIO()))


def test_tokens_count_from_when_every_request_decodes() -> None:
    streams = Streams("http://nowhere", [[1], [2]])
    streams.rows[0]["tokens"] = [1.0, 2.0, 3.0, 4.0, 5.0]
    streams.rows[1]["tokens"] = [2.5, 3.5, 4.5]
    begun = streams.everyone_has(2)
    assert begun == 3.5
    assert streams.fewest() == 3
    assert streams.fewest(begun) == 1


def test_the_pace_of_a_stream_is_not_fooled_by_bursts() -> None:
    streams = Streams("http://nowhere", [[1], [2], [3]])
    steady, bursts = [1.0 + 2.0 * i for i in range(17)], [9.0 + 8.0 * (i // 4) for i in range(17)]
    streams.rows[0]["tokens"], streams.rows[1]["tokens"], streams.rows[2]["tokens"] = steady, bursts, [0.5]
    assert streams.paces(1.0) == [2.0, 2.0], "a request without two tokens has none"
    assert streams.paces(9.0) == [2.0, 2.0]
    assert streams.paces(1.0, 8) == [2.0] * 4
    # recorded on an H200: the first requests of 64, whose step was some 5 ms
    gaps = RECORDED["gaps_s"]["stock"][:47]
    assert np.median(gaps) < 50e-6
    streams.rows = [{"tokens": [0.0, *np.cumsum(gaps)]}]
    assert 4e-3 < streams.paces(0.0)[0] < 7e-3


def test_a_stream_that_ends_early_is_an_error(fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blackwell_kernels.e2e.streams.TOKENS", 3)
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        with Streams(server.base_url, [[5]]) as streams, pytest.raises(ServerError, match="ended after 3 of 4 tokens"):
            streams.wait_tokens(4)
