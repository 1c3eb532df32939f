"""Without a GPU: every definition through FlashInfer-Bench's classes, ours right, peers saying why they did not run."""

import math

import pytest
import torch
from flashinfer_bench.apply.config import ApplyConfig
from flashinfer_bench.bench.config import BenchmarkConfig
from flashinfer_bench.bench.evaluators import resolve_evaluator
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.data import Definition, EvaluationStatus, Solution, TraceSet

from blackwell_kernels.microbench import evaluator, generate
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.correctness import SKIPPED, check
from blackwell_kernels.microbench.dataset import materialize
from blackwell_kernels.microbench.implementations import OURS, SPECS_BY_ANY_NAME, implementations
from blackwell_kernels.microbench.specs import OPS

CONFIG = BenchmarkConfig(num_trials=1, profile_baseline=False, log_dir="unused")


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "fib"))
    yield
    BuilderRegistry.get_instance().cleanup()


@pytest.mark.parametrize("op", OPS)
def test_ours_agrees_with_every_reference(op, tmp_path):
    cases = select(sets=("cpu",), op=op)
    verdicts = list(check(cases, root=tmp_path))
    ours = [v for v in verdicts if v.implementation == OURS]
    assert len(ours) == len(cases) > 0
    assert [v for v in ours if v.status != "PASSED"] == []
    assert all(v.why == SKIPPED for v in ours)
    assert all(v.error is not None and v.error < 1e-3 for v in ours)
    peers = [v for v in verdicts if v.implementation != OURS]
    assert len(peers) == sum(len(implementations(case.spec.name)) - 1 for case in cases)
    assert all((v.status, v.why) == ("UNAVAILABLE", "needs a CUDA device") for v in peers)
    # the traces are FlashInfer-Bench's own, and can be loaded by it
    traces = [t for listed in TraceSet.from_path(str(tmp_path)).traces.values() for t in listed]
    assert len(traces) == len(cases)
    assert all(t.evaluation.status == EvaluationStatus.PASSED and t.evaluation.log == SKIPPED for t in traces)


def test_what_passed_is_kept_by_flashinfer_benchs_filters_only_if_they_are_told_to(tmp_path):
    definition = "gdn_decode_state_bf16"
    verdicts = [v for v in check(select(sets=("cpu",), definition=definition), root=tmp_path) if v.status == "PASSED"]
    data = TraceSet.from_path(str(tmp_path))
    default, told = ApplyConfig(), ApplyConfig(max_atol=math.inf, max_rtol=math.inf)
    assert len(data.filter_traces(definition, told.max_atol, told.max_rtol)) == len(verdicts) > 0
    assert data.filter_traces(definition, default.max_atol, default.max_rtol) == []


def judge(case, source: str, tmp_path, *, dps: bool = False):
    """FlashInfer-Bench's verdict on a solution given as text."""
    evaluator.register()
    data = materialize(tmp_path, [case])
    definition = data.definitions[case.spec.name]
    raw = generate.solution(implementations(case.spec.name)[0])
    raw["name"], raw["sources"] = f"{definition.name}__text", [{"path": "main.py", "content": source}]
    raw["spec"]["destination_passing_style"] = dps
    runnable = BuilderRegistry.get_instance().build(definition, Solution.model_validate(raw))
    cls = resolve_evaluator(definition)
    baseline = cls.build_baseline(definition, data.workloads[definition.name][0].workload, CONFIG, "cpu", tmp_path)
    return cls.check_correctness(definition, runnable, baseline.inputs, baseline.outputs, CONFIG, "", "cpu")


def small(definition: str, part: str = ""):
    return next(c for c in select(sets=("cpu",)) if c.definition == definition and part in c.name)


RAGGED = "def run(q, k, k_scale, weights, row_starts, row_ends{extra}):\n"
LOGITS = """
    scores = torch.relu(torch.einsum("mhd,nd->mhn", q.float(), k.float()))
    result = torch.einsum("mh,mhn->mn", weights, scores) * k_scale
"""


def test_an_independent_solution_passes_in_both_styles(tmp_path):
    case = small("dsa_indexer_logits_ragged")
    text = "import torch\n" + RAGGED + LOGITS
    assert judge(case, text.format(extra="") + "    return result\n", tmp_path / "a")[1] is None
    given = text.format(extra=", logits") + "    logits.copy_(result)\n"
    assert judge(case, given, tmp_path / "b", dps=True)[1] is None


def test_a_partial_write_is_caught_because_outputs_are_poisoned(tmp_path):
    case = small("dsa_indexer_logits_ragged")
    text = "import torch\n" + RAGGED.format(extra=", logits") + LOGITS + "    logits[:-1].copy_(result[:-1])\n"
    _, failed = judge(case, text, tmp_path, dps=True)
    assert failed.status == EvaluationStatus.INCORRECT_NUMERICAL
    assert "not finite" in failed.log


def test_a_changed_input_is_caught(tmp_path):
    case = small("dsa_indexer_logits_ragged")
    text = "import torch\n" + RAGGED.format(extra="") + LOGITS + "    weights.zero_()\n    return result\n"
    _, failed = judge(case, text, tmp_path)
    assert failed.status == EvaluationStatus.INCORRECT_NUMERICAL
    assert "input weights was changed" in failed.log


def test_a_crash_is_a_verdict(tmp_path):
    text = RAGGED.format(extra="") + "    raise RuntimeError('out of luck')\n"
    _, failed = judge(small("dsa_indexer_logits_ragged"), text, tmp_path)
    assert failed.status == EvaluationStatus.RUNTIME_ERROR
    assert "out of luck" in failed.log


def test_a_pool_may_be_updated_in_place(tmp_path):
    case = small("gdn_decode_state_f32")
    reference = generate.definition(case.spec)["reference"].replace("def run(", "def reference(")
    tail = """
def run(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, scale):
    out, new_state = reference(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, scale)
    state.copy_(new_state)
    return out, state
"""
    assert judge(case, reference + tail, tmp_path / "a")[1] is None
    lazy = tail.replace("state.copy_(new_state)", "pass")
    assert judge(case, reference + lazy, tmp_path / "b")[1].status == EvaluationStatus.INCORRECT_NUMERICAL


def test_each_definition_has_exactly_one_evaluator():
    evaluator.register()
    evaluator.register()  # idempotent
    for spec in SPECS_BY_ANY_NAME.values():
        assert resolve_evaluator(Definition.model_validate(generate.definition(spec))) is evaluator.RuleEvaluator
    foreign = generate.definition(SPECS_BY_ANY_NAME["moe_routing_softmax_topk10"])
    for name, expected in {"gemm_n128": "DefaultEvaluator", "moe_fp8_block_scale_other": "_OtherLowBit"}.items():
        assert resolve_evaluator(Definition.model_validate(foreign | {"name": name})).__name__ == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")
def test_a_missing_package_says_so(monkeypatch):
    from blackwell_kernels.microbench import implementations as module

    case = small("gdn_prefill_state_bf16")
    fla = next(i for i in implementations(case.spec.name) if i.name.startswith("fla."))
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "fla" else object())
    assert fla.unavailable(case, "cuda") == "fla-core is not installed"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert fla.unavailable(case, "cuda") is None
    wide = next(c for c in select(sets=("model",)) if c.definition == "dsa_topk2048" and c.axes["num_rows"] == 64)
    reasons = {i.name: i.unavailable(wide, "cuda") for i in implementations(wide.definition)}
    assert reasons["vllm.cooperative_topk"] == "takes at most 32 rows, this case has 64"
    assert reasons["vllm.persistent_topk"] is None
    chunk = next(c for c in select(sets=("agent",)) if c.options.get("requests") == 8)
    reasons = {i.name: i.unavailable(chunk, "cuda") for i in implementations(chunk.definition)}
    assert reasons["vllm.top_k_per_row_prefill"] is None
    assert reasons["flashinfer.top_k"].endswith("this case has those of 8 requests")
    moe = next(c for c in select(sets=("model",)) if c.definition == "moe_fp8_block")
    reasons = {i.name: i.unavailable(moe, "cuda") for i in implementations(moe.definition)}
    assert reasons["vllm.TrtLlmFp8Experts"] == "needs sm100 or sm103, this is sm90"
    assert reasons["vllm.FlashInferExperts"] is None
