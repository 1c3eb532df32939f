"""FlashInfer-Bench's evaluator for these definitions: its inputs, builders and result classes, our comparison rules.

Registered in front of its own evaluators, and it runs without a GPU, where theirs call torch.cuda.synchronize.
"""

from __future__ import annotations

import traceback
import uuid
from pathlib import Path
from typing import Any

import torch
from flashinfer_bench.bench.config import BenchmarkConfig
from flashinfer_bench.bench.evaluators import registry
from flashinfer_bench.bench.evaluators.default import DefaultEvaluator
from flashinfer_bench.bench.evaluators.lowbit import LowBitEvaluator
from flashinfer_bench.bench.evaluators.utils import allocate_outputs, normalize_result
from flashinfer_bench.bench.runner.runner import BaselineHandle, DeviceBaseline
from flashinfer_bench.bench.timing import time_runnable
from flashinfer_bench.bench.utils import gen_inputs, load_safetensors, make_eval
from flashinfer_bench.compile import BuilderRegistry, Runnable
from flashinfer_bench.data import Correctness, Definition, Evaluation, EvaluationStatus, Workload

from blackwell_kernels.microbench.compare import compare
from blackwell_kernels.microbench.implementations import SPECS_BY_ANY_NAME


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _clone(arguments: list[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def _poison(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    for out in outputs:
        out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)
    return outputs


class RuleEvaluator(DefaultEvaluator):
    """Correctness by `Spec.rules`; performance as FlashInfer-Bench measures it."""

    @classmethod
    def can_evaluate(cls, definition: Definition) -> bool:
        """Whether it is one of our definitions."""
        return definition.name in SPECS_BY_ANY_NAME

    @classmethod
    def build_baseline(
        cls,
        definition: Definition,
        workload: Workload,
        cfg: BenchmarkConfig,
        device: str,
        trace_set_root: Path | None = None,
    ) -> DeviceBaseline:
        """Inputs from safetensors and what the definition's reference makes of them."""
        reference = BuilderRegistry.get_instance().build_reference(definition)
        tensors = load_safetensors(definition, workload, trace_set_root)
        arguments = gen_inputs(definition, workload, device=device, safe_tensors=tensors)
        with torch.no_grad():
            result = reference(*_clone(arguments))
        _synchronize(device)
        latency = 0.0
        if cfg.profile_baseline:
            latency = time_runnable(reference, arguments, cfg.warmup_runs, cfg.iterations, device)
        return DeviceBaseline(
            handle=BaselineHandle(uuid.uuid4().hex),
            definition=definition,
            device=device,
            inputs=[arguments],
            outputs=[normalize_result(definition, result, device)],
            mean_latency_ms=latency,
        )

    @classmethod
    def check_correctness(
        cls,
        definition: Definition,
        sol_runnable: Runnable,
        inputs: list[list[Any]],
        ref_outputs: list[list[torch.Tensor]],
        cfg: BenchmarkConfig,
        log_path: str,
        device: str,
    ) -> tuple[Correctness | None, Evaluation | None]:
        """Run on clones, with poisoned outputs; inputs that may not change must not have changed."""
        spec = SPECS_BY_ANY_NAME[definition.name]
        errors: dict[str, float] = {}
        problems: list[str] = []
        max_abs = max_rel = 0.0
        for arguments, expected in zip(inputs, ref_outputs, strict=True):
            given = _clone(arguments)
            try:
                with torch.no_grad():
                    if sol_runnable.metadata.destination_passing_style:
                        buffers = _poison(allocate_outputs(definition, given, device))
                        sol_runnable(*given, *buffers)
                        out: list[torch.Tensor | None] = list(buffers)
                    else:
                        out = _outputs(definition, sol_runnable(*given))
                _synchronize(device)
            except Exception:
                why = traceback.format_exc()
                return None, make_eval(EvaluationStatus.RUNTIME_ERROR, device, log_path, extra_msg=why)
            before = dict(zip(definition.inputs, arguments, strict=True))
            compared = compare(
                spec,
                before,
                dict(zip(definition.outputs, out, strict=True)),
                dict(zip(definition.outputs, expected, strict=True)),
            )
            problems += [c.problem for c in compared.values() if c.problem]
            problems += [] if compared else ["it gives no output that could be compared"]
            problems += changed(before, dict(zip(definition.inputs, given, strict=True)), spec.mutates.values())
            errors |= {name: c.error for name, c in compared.items()}
            max_abs = max([max_abs, *(c.max_abs for c in compared.values())])
            max_rel = max([max_rel, *(c.max_rel for c in compared.values())])
        correctness = Correctness(max_absolute_error=max_abs, max_relative_error=max_rel, extra={"error": errors})
        if problems:
            failed = EvaluationStatus.INCORRECT_NUMERICAL
            return correctness, make_eval(failed, device, log_path, correctness, extra_msg="; ".join(problems))
        return correctness, None


def changed(before: dict[str, Any], after: dict[str, Any], allowed: Any) -> list[str]:
    """One message for each input tensor that was changed although the definition does not allow it."""
    return [
        f"input {name} was changed"
        for name, x in before.items()
        if isinstance(x, torch.Tensor) and name not in allowed and not _same_bits(x, after[name])
    ]


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().flatten().view(torch.int8), y.contiguous().flatten().view(torch.int8))


def _outputs(definition: Definition, result: Any) -> list[torch.Tensor | None]:
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    if len(outputs) != len(definition.outputs):
        raise ValueError(f"{len(outputs)} outputs returned, {definition.name} has {len(definition.outputs)}")
    return outputs


class _OtherLowBit(LowBitEvaluator):
    """FlashInfer-Bench's, for definitions that are not ours: two evaluators for one definition are refused."""

    @classmethod
    def can_evaluate(cls, definition: Definition) -> bool:
        return super().can_evaluate(definition) and not RuleEvaluator.can_evaluate(definition)


def register() -> None:
    """Make FlashInfer-Bench use `RuleEvaluator` for our definitions in this process; idempotent."""
    evaluators = registry._EVALUATORS
    if RuleEvaluator not in evaluators:
        evaluators[:] = [RuleEvaluator, *(_OtherLowBit if e is LowBitEvaluator else e for e in evaluators)]
