"""The verdict of a comparison from the arms' results, and the page that says it."""

from __future__ import annotations

from typing import Any

import numpy as np

from blackwell_kernels.e2e import models, plan, trace

_STATE = {True: "Passed", False: "Not passed", None: "Not judged yet"}


def judge(
    model: str,
    config: dict[str, Any],
    options: Any,
    spec: Any,
    found: dict[str, dict[str, Any]],
    samples: dict[str, dict[str, np.ndarray]],
) -> dict[str, Any]:
    """`comparisons`, `corruptions`, `executed` and `passed` (None while something to judge by is missing)."""
    made = plan.requests(spec.vocab, seed=spec.seed, n=spec.requests, forced=spec.forced, scale=spec.scale)
    masks = plan.groups(made, config.get("index_topk"))
    stock = samples["stock"]
    comparisons: dict[str, Any] = {}
    corruptions: dict[str, Any] = {}
    if {"A", "B"} <= stock.keys():
        for which in ("plugin", "eager"):
            if "A" in samples[which]:
                comparisons[which] = _compare(stock, samples[which], masks, made)
        for key in samples["eager"]:
            if key.startswith("corrupt-") and not key.endswith("-tokens"):
                op = key.removeprefix("corrupt-")
                wrong = {name.replace(key, "A"): x for name, x in samples["eager"].items() if name.startswith(key)}
                rows = _compare(stock, wrong, masks, made)
                calls = found["eager"]["tasks"].get(f"corrupt:{op}", {}).get("wrong_calls", {})
                noticed = any(row["judged"] and not row["passed"] for row in rows) and sum(calls.values()) > 0
                corruptions[op] = {"rows": rows, "wrong_calls": calls, "noticed": noticed}
    executed = _executed(model, found, bool(options.speculative))
    parts = {
        "equal": [row["passed"] for rows in comparisons.values() for row in rows],
        "corruptions_noticed": [c["noticed"] for c in corruptions.values()],
        "executed": [row["passed"] for row in executed],
    }
    expected = [
        ("plugin" in options.arms, "plugin" in comparisons),
        (bool(options.corrupted_ops()) and "eager" in options.arms, len(corruptions) == len(options.corrupted_ops())),
        ("eager" in options.arms, bool(executed)),
    ]
    complete = all(there for wanted, there in expected if wanted)
    verdicts = {name: all(values) if values else None for name, values in parts.items()}
    return {
        "comparisons": comparisons,
        "corruptions": corruptions,
        "executed": executed,
        "verdicts": verdicts,
        "passed": None if set(verdicts.values()) == {None} else complete and False not in verdicts.values(),
    }


def _compare(
    stock: dict[str, np.ndarray], other: dict[str, np.ndarray], masks: dict[str, np.ndarray], made: list[plan.Request]
) -> list[dict[str, Any]]:
    if "A-tokens" not in stock:
        return plan.compare(stock, other, masks)
    # the model chose its own tokens (speculative decoding takes no forced ones): compare while the choices agree
    agree = plan.agreement(
        made, [stock["A-tokens"], stock["B-tokens"], *(v for k, v in other.items() if "tokens" in k)]
    )
    return plan.compare(stock, other, {name: mask & agree for name, mask in masks.items()})


def _executed(model: str, found: dict[str, dict[str, Any]], speculative: bool) -> list[dict[str, Any]]:
    """One row per operator and phase: tokens by ours and by stock in eager steps, layers, kernels seen under graphs.

    Batches with drafts are one phase to the counters, "spec", whether prefills are among them or not.
    """
    eager, plugin = found["eager"]["tasks"], found["plugin"]["tasks"]
    if "counters" not in eager:
        return []
    counts = eager["counters"]["counts"]
    reasons = {row["op"]: row["reason"] for row in eager["counters"]["activation"] if row["impl"] == "stock"}
    kernels = trace.kernels_by_hook(eager["trace"]["phases"]) if "trace" in eager else {}
    graphs = plugin.get("trace", {}).get("phases", {})
    on_gpu = any(phase["kernels"] for phase in graphs.values())
    rows = []
    for op, phases in models.HOOK_OPS[model].items():
        for phase in dict.fromkeys("spec" if speculative and p != "prefill" else p for p in phases):
            here = [r for r in counts if r["op"] == op and r["phase"] == phase]
            ours = sum(r["tokens"] for r in here if r["impl"] != "stock")
            stock = sum(r["tokens"] for r in here if r["impl"] == "stock")
            traced = ("decode", "mixed") if phase == "spec" else (phase,)
            under_graphs = {kernel for name in traced for kernel in graphs.get(name, {}).get("kernels", {})}
            seen = sorted(kernels.get(op, set()) & under_graphs)
            handed_over = reasons.get(op, "").startswith("measured on")
            fine = ours > 0 and stock == 0 and (bool(seen) or not on_gpu)
            rows.append(
                {
                    "op": op,
                    "phase": phase,
                    "ours_tokens": ours,
                    "stock_tokens": stock,
                    "layers": len({r["layer"] for r in here if r["impl"] != "stock"}),
                    "graph_kernels": seen,
                    "handed_over": reasons.get(op) if handed_over else None,
                    "passed": fine or handed_over,
                }
            )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    o, arms = result["options"], result["arms"]
    device = next((a["device"] for a in arms.values() if a.get("device")), "unknown device")
    versions: dict[str, str] = next((a["versions"] for a in arms.values() if a.get("versions")), {})
    width = f"TP {o['tp']}" + (", EP" if o["ep"] else "")
    lines = [
        f"# {result['model']}: plugin against stock vLLM, {result['layers']} layers, {result['size']} dimensions",
        "",
        f"{result['date']} · {device} · {width} · KV cache {o['kv_cache_dtype']} · commit {result['commit']} · "
        + ", ".join(f"{k} {v}" for k, v in versions.items() if v != "absent"),
        "",
        f"`{result['command']}`",
        "",
        f"**{_STATE[result['passed']]}**: "
        + ", ".join(f"{k.replace('_', ' ')}: {_word(v)}" for k, v in result["verdicts"].items()),
    ]
    if result["problem"]:
        lines += ["", f"Problem: {result['problem'].splitlines()[0]}"]
    if result["missing"]:
        lines += ["", f"Not run: {', '.join(result['missing'])}"]
    lines += _equal_lines(result) + _corruption_lines(result) + _executed_lines(result) + _arm_lines(result)
    return "\n".join(lines) + "\n"


def _equal_lines(result: dict[str, Any]) -> list[str]:
    if not result["comparisons"]:
        return []
    lines = [
        "",
        "## |Δ log p| of the same tokens",
        f"Noise: stock against itself in another batch composition. Bounds: mean ≤ {plan.MEAN_FACTOR}×, "
        f"p99 ≤ {plan.P99_FACTOR}× the noise, in each group. Tokens that stock repeats bit for bit in both "
        "compositions went through the same arithmetic twice: they are no sample of rounding and no noise. "
        "The ratio that counts them as noise stands beside it.",
        "",
        "| arm | tokens | n | stock repeats | noise mean | mean | ratio | with repeats | noise p99 | p99 | ratio | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for which, rows in result["comparisons"].items():
        lines += [_row(which, row) for row in rows]
    return lines


def _row(which: str, row: dict[str, Any]) -> str:
    if not row["judged"]:
        return f"| {which} | {row['group']} | {row['n']} | | | | | | | | | too few |"
    noise, apart = row["noise"], row["distance"]
    means = f"{noise['mean']:.5f} | {apart['mean']:.5f} | {row['mean_ratio']:.2f} | {row['mean_ratio_all']:.2f}"
    tails = f"{noise['p99']:.4f} | {apart['p99']:.4f} | {row['p99_ratio']:.2f}"
    verdict = "ok" if row["passed"] else "FAILED"
    return f"| {which} | {row['group']} | {row['n']} | {row['repeated']:.0%} | {means} | {tails} | {verdict} |"


def _corruption_lines(result: dict[str, Any]) -> list[str]:
    if not result["corruptions"]:
        return []
    lines = [
        "",
        "## Each operator corrupted in turn",
        "The same check must notice. Largest ratio over the groups:",
        "",
        "| operator | wrong calls | mean ratio | p99 ratio | |",
        "|---|---|---|---|---|",
    ]
    for op, found in result["corruptions"].items():
        judged = [row for row in found["rows"] if row["judged"]]
        mean, p99 = (max((row[k] for row in judged), default=0.0) for k in ("mean_ratio", "p99_ratio"))
        calls = sum(found["wrong_calls"].values())
        lines.append(
            f"| {op} | {calls} | {mean:.1f} | {p99:.1f} | {'noticed' if found['noticed'] else 'NOT NOTICED'} |"
        )
    return lines


def _executed_lines(result: dict[str, Any]) -> list[str]:
    if not result["executed"]:
        return []
    lines = [
        "",
        "## Active means executed",
        "Tokens counted in eager steps (one prefill, four decodes, one mixed), summed over layers; kernels seen by the "
        "profiler in the same phases under CUDA graphs.",
        "",
        "| operator | phase | layers | tokens ours | tokens stock | kernels under graphs | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["executed"]:
        verdict = "handed over: " + row["handed_over"] if row["handed_over"] else "ok" if row["passed"] else "FAILED"
        kernels = ", ".join(f"`{k}`" for k in row["graph_kernels"]) or "none"
        lines.append(
            f"| {row['op']} | {row['phase']} | {row['layers']} | {row['ours_tokens']} | {row['stock_tokens']} "
            f"| {kernels} | {verdict} |"
        )
    return lines


def _arm_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Arms",
        "| arm | ready, s | task | s | steps | tokens per decode step |",
        "|---|---|---|---|---|---|",
    ]
    for which, one in result["arms"].items():
        for task, found in one["tasks"].items():
            steps = ", ".join(f"{n} {kind}" for kind, n in sorted(found.get("steps", {}).items()))
            gained = found.get("tokens_per_step", {})
            total = sum(gained.values())
            mean = f"{sum(int(k) * n for k, n in gained.items()) / total:.2f}" if total else ""
            lines.append(f"| {which} | {one['load_s']} | {task} | {found['seconds']} | {steps} | {mean} |")
    return lines


def _word(verdict: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not judged"}[verdict]
