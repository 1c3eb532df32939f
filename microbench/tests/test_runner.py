"""The measuring run itself, on a CPU with engines that pretend: rows, reasons, files, a context that breaks."""

import collections

import pytest
import torch
from microbench_examples import HEAD, CountingEngine, FakeEngine

from blackwell_kernels.microbench import bounds, ours, results, runner
from blackwell_kernels.microbench import implementations as registry
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.runner import Bench, ContextLost
from blackwell_kernels.microbench.timing import Timing
from blackwell_kernels.microbench.workloads import generate

RATES = {"copy_tbps": 4.0, "fp8_tflops": 1000.0, "bf16_tflops": 500.0, "launch_us": 0.001}


def bench(tmp_path, **more):
    settings = {
        "engines": [CountingEngine([])],
        "head": HEAD,
        "rates": RATES,
        "rounds": 5,
        "root": tmp_path,
        "tables_root": tmp_path / "tables",
        "l2_bytes": 1,
    }
    return Bench(device=torch.device("cpu"), **{**settings, **more})


def case_of(definition, part=""):
    return next(c for c in select(sets=("cpu",)) if c.definition == definition and part in c.name)


@pytest.mark.parametrize("definition", ["moe_fp8_block", "gdn_decode_state_bf16", "dsa_topk2048", "gdn_core_prefill"])
def test_a_row(definition, tmp_path):
    case = case_of(definition)
    (row,) = bench(tmp_path).run([case])
    mine = row.impls["ours"]
    assert (mine.n, mine.us, mine.error, mine.method) == (5, float(row.sets), None, "graph")
    assert 0 <= mine.accuracy < 1e-3
    assert row.sets == 2
    assert {i.error for name, i in row.impls.items() if name != "ours"} == {"needs a CUDA device"}
    assert (row.best_peer, row.ratio_stock, row.dispatched) == (None, None, row.stock)
    assert row.stock in row.impls
    assert row.axes == case.full_axes()
    path = results.path_of("h200", case.spec.op, tmp_path)
    assert results.load(path).rows == [row]
    assert results.audit(results.load(path)) == []


def test_small_inputs_are_rotated_until_they_exceed_the_cache(tmp_path):
    engine = CountingEngine([])
    case = case_of("gdn_decode_state_bf16", "batch_size=1")
    (row,) = bench(tmp_path, engines=[engine], l2_bytes=2 << 20).run([case])
    assert row.rotated_bytes > 2 * (2 << 20)
    assert engine.log == [row.sets]
    assert 2 < row.sets <= runner.MAX_SETS


def test_the_floor_is_the_mean_of_what_the_rotated_inputs_hit(tmp_path):
    case = case_of("moe_fp8_block_ep", "num_tokens=1")
    (row,) = bench(tmp_path, l2_bytes=1 << 20).run([case])
    hit = [bounds.cost(case, generate(case, seed=i)).bytes for i in range(row.sets)]
    assert len(set(hit)) > 1
    assert row.bytes == sum(hit) // row.sets
    assert row.floor_us == pytest.approx(row.bytes / RATES["copy_tbps"] / 1e6)


def test_rows_of_a_second_run_replace_and_add(tmp_path):
    first, second = (case_of("gdn_decode_state_bf16", f"batch_size={b}") for b in (1, 5))
    list(bench(tmp_path).run([first]))
    list(bench(tmp_path, head={**HEAD, "commit": "later"}).run([first, second]))
    found = results.load(results.path_of("h200", "gdn_decode", tmp_path))
    assert [row.case for row in found.rows] == [first.name, second.name]
    assert {row.commit for row in found.rows} == {"later"}


def break_ours(monkeypatch, function, result):
    monkeypatch.setattr(ours, function, lambda x: lambda: result(x))


def test_a_wrong_implementation_is_not_timed(tmp_path, monkeypatch):
    break_ours(monkeypatch, "gdn_decode", lambda x: (torch.zeros(5, 4, 128, dtype=torch.bfloat16), x["state"]))
    (row,) = bench(tmp_path).run([case_of("gdn_decode_state_bf16", "batch_size=5")])
    mine = row.impls["ours"]
    assert mine.us is None
    assert mine.error.startswith("wrong: output: 1 - similarity is")
    assert row.dispatched in row.impls


def test_a_failing_implementation_says_why_and_the_run_goes_on(tmp_path, monkeypatch):
    def fail(x):
        raise RuntimeError("no such kernel\nand a long trace")

    break_ours(monkeypatch, "gdn_decode", fail)
    cases = [case_of("gdn_decode_state_bf16", "batch_size=5"), case_of("moe_routing_softmax_topk10")]
    rows = list(bench(tmp_path).run(cases))
    assert rows[0].impls["ours"].error == "RuntimeError: no such kernel"
    assert rows[1].impls["ours"].us is not None


def test_a_broken_context_ends_the_process_and_names_who_did_it(tmp_path, monkeypatch):
    def crash(x):
        monkeypatch.setattr(Bench, "_synchronize", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error")))
        raise RuntimeError("illegal memory access")

    break_ours(monkeypatch, "gdn_decode", crash)
    cases = [case_of("moe_routing_softmax_topk10"), case_of("gdn_decode_state_bf16", "batch_size=5")]
    rows: list[results.Row] = []
    with pytest.raises(ContextLost, match="ours: it broke the CUDA context: RuntimeError: illegal") as lost:
        collections.deque(map(rows.append, bench(tmp_path).run(cases)))
    assert lost.value.implementation == "ours"
    assert [row.op for row in rows] == ["moe_routing"]
    assert results.load(results.path_of("h200", "moe_routing", tmp_path)).rows == rows


def test_what_ended_an_earlier_process_is_left_out(tmp_path):
    case, other = (case_of("gdn_decode_state_bf16", f"batch_size={n}") for n in (1, 5))
    skip = {
        (case.definition, case.name, "ours"): "killed: no end after 9 s",
        (case.definition, "*", "vllm.packed_decode"): "again",
    }
    rows = list(bench(tmp_path, skip=skip).run([case, other]))
    assert rows[0].impls["ours"].error == "killed: no end after 9 s"
    assert rows[1].impls["ours"].us is not None
    assert [row.impls["vllm.packed_decode"].error for row in rows] == ["again", "again"]


def test_an_implementation_that_changes_an_input_is_wrong(tmp_path, monkeypatch):
    original = ours.gdn_decode

    def spoil(x):
        call = original(x)
        return lambda: (call(), x["a"].add_(1))[0]

    monkeypatch.setattr(ours, "gdn_decode", spoil)
    (row,) = bench(tmp_path).run([case_of("gdn_decode_state_bf16", "batch_size=5")])
    assert row.impls["ours"].error == "wrong: input a was changed"


class Stranger(registry.Implementation):
    """Ours, until something happens."""

    def unavailable(self, case, device):
        return None

    def bind(self, inputs, shared=None):
        call = ours.moe_routing_softmax(inputs)
        return lambda: self.made(call())


def test_a_third_partys_solution_is_checked_again_on_other_inputs_after_it_was_timed(tmp_path, monkeypatch):
    calls = []

    def made(self, out):
        calls.append(None)
        return out if len(calls) < 3 else (out[0].zero_(), out[1])

    monkeypatch.setattr(Stranger, "made", made, raising=False)
    case = case_of("moe_routing_softmax_topk10")
    stranger = Stranger("them", case.definition, "", "")
    (row,) = bench(tmp_path, extra=(stranger,)).run([case])
    assert row.impls["them"].us is None
    assert row.impls["them"].error.startswith("after timing, wrong: topk_weights")
    calls.clear()
    monkeypatch.setattr(Stranger, "made", lambda self, out: out)
    (row,) = bench(tmp_path, extra=(stranger,)).run([case])
    assert row.impls["them"].us is not None


def test_a_third_partys_solution_is_timed_on_eight_inputs_or_more(tmp_path, monkeypatch):
    monkeypatch.setattr(Stranger, "made", lambda self, out: out, raising=False)
    case = case_of("moe_routing_softmax_topk10")
    (row,) = bench(tmp_path, extra=(Stranger("them", case.definition, "", ""),)).run([case])
    (alone,) = bench(tmp_path).run([case])
    assert (row.sets, alone.sets) == (8, 2)


def test_a_solution_that_patches_the_clock_while_it_is_timed_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.guards.time, "perf_counter", runner.guards.time.perf_counter)  # put back at the end

    def made(self, out):
        runner.guards.time.perf_counter = lambda: 0.0
        return out

    monkeypatch.setattr(Stranger, "made", made, raising=False)
    case = case_of("moe_routing_softmax_topk10")
    with pytest.raises(ContextLost, match=r"them: it changed time\.perf_counter"):
        list(bench(tmp_path, extra=(Stranger("them", case.definition, "", ""),)).run([case]))


def test_a_less_accurate_peer_is_timed_and_flagged_and_ours_is_not(tmp_path, monkeypatch):
    """Weights requantised to power-of-two scales, as vLLM does for DeepGEMM."""
    from blackwell_kernels.microbench import peers_moe

    def coarse(x):
        weights = {}
        for name in ("w13", "w2"):
            scale = x[f"{name}_scale"]
            grown = x[name].float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
            power = (scale.log2().ceil() + 1).exp2()
            spread = power.repeat_interleave(128, 1).repeat_interleave(128, 2)
            weights |= {name: (grown / spread).to(torch.float8_e4m3fn), f"{name}_scale": power}
        return original({**x, **weights})

    original = ours.moe_fp8_block
    monkeypatch.setattr(registry.Implementation, "unavailable", lambda self, case, device: None)
    monkeypatch.setattr(peers_moe, "deep_gemm", coarse)
    case = case_of("moe_fp8_block", "num_tokens=33")
    (row,) = bench(tmp_path, only=("vllm.DeepGemmExperts",)).run([case])
    peer = row.impls["vllm.DeepGemmExperts"]
    assert peer.us is not None
    assert 1e-3 < peer.accuracy < 4e-3
    assert peer.flag.startswith("output: 1 - similarity is")
    assert row.best_peer == "vllm.DeepGemmExperts", "it counts"
    assert row.impls["ours"].flag is None
    monkeypatch.setattr(ours, "moe_fp8_block", coarse)
    (row,) = bench(tmp_path, only=("nobody",)).run([case])
    assert row.impls["ours"].us is None
    assert row.impls["ours"].error.startswith("wrong: output: 1 - similarity is")


def test_peers_can_be_left_out_and_ours_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.Implementation, "unavailable", lambda self, case, device: None)
    (row,) = bench(tmp_path, only=("nobody",)).run([case_of("gdn_decode_state_bf16")])
    assert row.impls["ours"].us is not None
    assert {i.error for name, i in row.impls.items() if name != "ours"} == {"left out of this run"}


def test_a_peer_beside_ours_gives_ratios(tmp_path, monkeypatch):
    """ours again under a peer's name: the ratio of one alternating run."""
    from blackwell_kernels.microbench import peers_gdn

    monkeypatch.setattr(registry.Implementation, "unavailable", lambda self, case, device: None)
    monkeypatch.setattr(peers_gdn, "packed_decode", ours.gdn_decode)
    monkeypatch.setattr(peers_gdn, "flashinfer_decode", lambda x: lambda: (None, None))
    (row,) = bench(tmp_path).run([case_of("gdn_decode_state_bf16")])
    assert (row.stock, row.best_peer) == ("vllm.packed_decode", "vllm.packed_decode")
    assert row.ratio_stock == row.ratio_best_peer == 1.0
    # an implementation without a single output to compare proves nothing
    assert row.impls["flashinfer.gdn_decode"].error is not None


def test_large_cases_check_a_sample_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CHECKED_ROWS", 7)
    case = case_of("moe_fp8_block", "num_tokens=33")
    seen = []
    original = runner.references.run_moe_fp8_block

    def noting(*arguments):
        seen.append([len(arguments[i]) for i in (0, 1, 6)])
        return original(*arguments)

    monkeypatch.setattr(runner.references, "run_moe_fp8_block", noting)
    (row,) = bench(tmp_path).run([case])
    assert seen == [[7, 32, 7]], "tokens are sampled, weights are not"
    assert row.impls["ours"].accuracy < 1e-3


def test_an_engine_that_fails_is_an_entry(tmp_path):
    class Refusing(FakeEngine):
        def prepare(self, calls):
            raise RuntimeError("stream capture failed")

    (row,) = bench(tmp_path, engines=[Refusing([])]).run([case_of("moe_routing_softmax_topk10")])
    assert row.impls["ours"].error == "graph: RuntimeError: stream capture failed"
    assert row.impls["ours"].accuracy == 0.0


def test_flashinfer_benchs_own_timing_is_a_second_column(tmp_path):
    (row,) = bench(tmp_path, fib_timer=lambda call: 42.0).run([case_of("moe_routing_softmax_topk10")])
    assert row.impls["ours"].fib_us == 42.0
    assert isinstance(Timing((1.0,), "graph").us, float)


def test_host_times_are_taken_in_turns_and_who_fails_has_none(tmp_path, monkeypatch):
    from blackwell_kernels.microbench import peers_gdn

    monkeypatch.setattr(registry.Implementation, "unavailable", lambda self, case, device: None)
    for peer in ("packed_decode", "flashinfer_decode"):
        monkeypatch.setattr(peers_gdn, peer, ours.gdn_decode)
    turns: list[str] = []
    costs = {"ours": iter([900.0, 800.0, 700.0, 5.0, 3.0, 1.0, 2.0, 4.0]), "vllm.packed_decode": iter([50.0] * 8)}

    def timer(call):
        return next(costs[turns[-1]])

    made = bench(tmp_path, host_timer=timer)
    made.on_step = lambda name, phase: turns.append(name) if phase == "host time" else None
    costs["flashinfer.gdn_decode"] = iter(())  # StopIteration: it fails in its first turn
    (row,) = made.run([case_of("gdn_decode_state_bf16")])
    found = {name: impl.host_us for name, impl in row.impls.items()}
    assert found == {"ours": 3.0, "vllm.packed_decode": 50.0, "flashinfer.gdn_decode": None}, (
        "warm-up counts for nothing"
    )
    assert row.impls["flashinfer.gdn_decode"].us is not None
    assert turns[:5] == [*row.impls, *list(row.impls)[:2]]
    assert set(zip(turns[3::2], turns[4::2], strict=True)) == {("ours", "vllm.packed_decode")}
    assert results.load(results.path_of("h200", "gdn_decode", tmp_path)).rows == [row]
