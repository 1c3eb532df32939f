"""The comparison around its arms: verdicts, resuming, failures. No model is loaded here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from blackwell_kernels.e2e import arm, corrupt, equal, models, plan, trace
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.errors import BlackwellKernelsError

MODEL = "deepseek-v3.2"
OPS = models.HOOK_OPS[MODEL]


def options(out: Path, **changes: Any) -> equal.Options:
    settings = {"model": MODEL, "out": out, "size": "tiny", "requests": 20, "command": "test", **changes}
    return equal.Options(**settings)


def run(chosen: equal.Options) -> tuple[int, dict[str, Any]]:
    code = equal.run(chosen, Steps(Console(file=io.StringIO())))
    return code, json.loads((chosen.out / "equal.json").read_text())


def store(chosen: equal.Options, which: str, **changes: Any) -> None:
    """Results as the arm would have written them: noise of 0.01, faults of 1, every operator executed."""
    spec = equal.spec(chosen, which)
    made = plan.requests(spec.vocab, seed=spec.seed, n=spec.requests, forced=spec.forced, scale=spec.scale)
    size = plan.groups(made, None)["prompt"].size
    truth = np.random.default_rng(0).normal(-7, 1, size)
    rng = np.random.default_rng(len(which))
    results, samples = arm.load_results(spec)
    results |= {"load_s": 1.0, "device": "a made-up GPU", "versions": {"vllm": "0"}}
    for task in spec.tasks:
        kind, _, argument = task.partition(":")
        found: dict[str, Any] = {"seconds": 1.0}
        if kind == "compose":
            samples[argument] = (truth + rng.laplace(0, 0.01, size)).astype(np.float32)
        elif kind == "corrupt":
            samples[f"corrupt-{argument}"] = (truth + rng.laplace(0, changes.get("fault", 1.0), size)).astype(
                np.float32
            )
            found["wrong_calls"] = {"x": 3}
        elif kind == "counters":
            rows = [(op, phase) for op, phases in models.HOOK_OPS[chosen.model].items() for phase in phases]
            rows = [(op, changes.get("phases", {}).get(phase, phase)) for op, phase in rows]
            found["counts"] = [
                {"op": op, "layer": "layers.0", "impl": changes.get("impl", "triton"), "phase": phase, "tokens": 9}
                for op, phase in rows
            ]
            found |= {"activation": changes.get("activation", []), "fallbacks": []}
        else:
            found["phases"] = {phase: digest(which, chosen.model) for phase in trace.PHASES}
        results["tasks"][task] = found
    arm.save_results(spec, results, samples)


def digest(which: str, model: str) -> dict[str, Any]:
    operators = [name for op in models.HOOK_OPS[model] for name in trace.OPERATORS[op]]
    of_operator = {name: [f"{name}_kernel", "void at::fill"] for name in operators}
    kernels = {k: 1 for names in of_operator.values() for k in names}
    return {"operators": {}, "kernels": kernels, "of_operator": of_operator if which == "eager" else {}}


@pytest.fixture
def chosen(tmp_path: Path) -> equal.Options:
    made = options(tmp_path)
    for which in equal.ARMS:
        store(made, which)
    return made


def test_stored_results_are_judged_without_running_anything(chosen: equal.Options) -> None:
    code, result = run(chosen)
    assert code == equal.OK
    assert result["verdicts"] == {"equal": True, "corruptions_noticed": True, "executed": True}
    assert result["missing"] == []
    assert {row["op"] for row in result["executed"]} == set(OPS)
    page = (chosen.out / "equal.md").read_text()
    assert "**Passed**" in page
    assert "`dsa_topk_kernel`" in page
    assert "void at::fill" not in page
    assert "a made-up GPU" in page


def test_a_fault_that_goes_unnoticed_fails(chosen: equal.Options) -> None:
    store(chosen, "eager", fault=0.01)
    code, result = run(chosen)
    assert code == equal.FAILED
    assert result["verdicts"]["corruptions_noticed"] is False


def test_operators_that_stock_ran_fail(chosen: equal.Options) -> None:
    store(chosen, "eager", impl="stock")
    code, result = run(chosen)
    assert code == equal.FAILED
    assert not any(row["passed"] for row in result["executed"])


def test_a_measured_hand_over_is_accepted_and_named(chosen: equal.Options) -> None:
    reason = "measured on h200: stock is faster"
    rows = [{"op": op, "impl": "stock", "layers": 2, "reason": reason} for op in OPS]
    store(chosen, "eager", impl="stock", activation=rows)
    code, result = run(chosen)
    assert code == equal.OK
    assert {row["handed_over"] for row in result["executed"]} == {reason}


def test_a_kernel_missing_under_graphs_fails(chosen: equal.Options) -> None:
    spec = equal.spec(chosen, "plugin")
    results, samples = arm.load_results(spec)
    del results["tasks"]["trace"]["phases"]["decode"]["kernels"]["dsa_topk_kernel"]
    arm.save_results(spec, results, samples)
    _, result = run(chosen)
    failed = [(row["op"], row["phase"]) for row in result["executed"] if not row["passed"]]
    assert failed == [("dsa_topk", "decode")]


@pytest.mark.parametrize(("counted", "executed"), [("spec", True), ("stray", False)])
def test_batches_with_drafts_are_a_phase_of_their_own(tmp_path: Path, counted: str, executed: bool) -> None:
    made = options(tmp_path, model="qwen3-next", speculative=2, corrupt=("none",))
    for which in equal.ARMS:
        store(made, which, phases={"decode": counted, "mixed": counted})
    _, result = run(made)
    assert result["verdicts"]["executed"] is executed
    phases = {row["op"]: row["phase"] for row in result["executed"] if row["phase"] != "prefill"}
    assert phases == dict.fromkeys(models.HOOK_OPS["qwen3-next"], "spec")


def test_results_of_other_options_are_not_used(chosen: equal.Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal.sys, "executable", "/bin/false")
    code, result = run(options(chosen.out, seed=1))
    assert code == equal.ENVIRONMENT
    assert "arm stock ended with exit code 1: no error was written down" in result["problem"]
    assert "stock/compose:A" in result["missing"]


def test_only_what_is_missing_runs_and_results_survive_its_failure(
    chosen: equal.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = equal.spec(chosen, "plugin")
    results, samples = arm.load_results(spec)
    del results["tasks"]["compose:B"], samples["B"]
    arm.save_results(spec, results, samples)
    monkeypatch.setattr(equal.sys, "executable", "/bin/false")
    code, result = run(chosen)
    assert code == equal.ENVIRONMENT
    assert result["missing"] == ["plugin/compose:B"]
    assert result["verdicts"]["equal"] is True, "composition A is there"
    assert "arm plugin ended" in result["problem"]


def test_one_arm_alone_is_no_verdict(tmp_path: Path) -> None:
    made = options(tmp_path, arms=("stock",))
    store(made, "stock")
    code, result = run(made)
    assert code == equal.OK
    assert result["passed"] is None
    assert "**Not judged yet**" in (tmp_path / "equal.md").read_text()


def test_time_limit_stops_before_an_arm(tmp_path: Path) -> None:
    code, result = run(options(tmp_path, time_limit=0.0))
    assert code == equal.ENVIRONMENT
    assert result["problem"] == "time is up before arm stock; the same command goes on from here"


def test_arms_differ_in_the_plugin_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLACKWELL_KERNELS_DISABLE", "all")
    made = options(tmp_path, size="real", tp=2, ep=True)
    stock, plugin = equal.spec(made, "stock"), equal.spec(made, "plugin")
    assert stock.settings == plugin.settings
    assert stock.settings["distributed_executor_backend"] == "external_launcher"
    env = equal.environment(stock, made)
    assert env["BLACKWELL_KERNELS"] == "0"
    assert "BLACKWELL_KERNELS_DISABLE" not in env
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert equal.environment(plugin, made)["BLACKWELL_KERNELS_FORCE"] == "all"


def test_unknown_operators_and_arms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BlackwellKernelsError, match="has no operator gdn_decode to corrupt; it has moe, moe_routing"):
        options(tmp_path, corrupt=("gdn_decode",)).corrupted_ops()
    with pytest.raises(BlackwellKernelsError, match="unknown stok; there are stock, plugin, eager"):
        equal.parse_list("stok", equal.ARMS)


def test_every_hook_has_a_fault_and_operators_to_trace() -> None:
    hooks = {op for ops in models.HOOK_OPS.values() for op in ops}
    assert set(corrupt.CORRUPTIONS) == set(trace.OPERATORS) == hooks
    for hook, faults in corrupt.CORRUPTIONS.items():
        assert set(faults) <= set(trace.OPERATORS[hook])


def test_phases_are_what_they_say(tmp_path: Path) -> None:
    first, later = trace.phase_requests(1000)
    assert sum(len(r.prompt) for r in first) <= 4096, "one step prefills all of them"
    assert len(later) == 2
    assert max(len(r.prompt) for r in first) > 2048, "sparse attention has something to leave out"
