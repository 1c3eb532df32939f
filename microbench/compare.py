"""Compares one implementation's outputs with the reference's, by each definition's own rules.

FlashInfer-Bench's default compares raw indices (wrong for top-k, whose order is free), refuses infinities (log-sum-exp
of nothing is −inf) and lets 1 % wrong elements of any size pass; these rules do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from blackwell_kernels.dsa.reference import indexer_logits_paged, indexer_logits_ragged
from blackwell_kernels.dsa.testing import logits_bound, paged_logits_bound
from blackwell_kernels.microbench.ours import Inputs
from blackwell_kernels.microbench.spec import Rule, Spec


@dataclass(frozen=True)
class Comparison:
    """`problem` is None when the output is right. error: 1 − similarity, or the largest score missed by a selection.

    flag: how a peer's output is less accurate than ours may be.
    """

    problem: str | None
    error: float
    max_abs: float
    max_rel: float
    flag: str | None = None


def _failure(problem: str) -> Comparison:
    return Comparison(problem, float("inf"), float("inf"), float("inf"))


def similarity(x: torch.Tensor, y: torch.Tensor) -> float:
    """2⟨x, y⟩ / (⟨x, x⟩ + ⟨y, y⟩) in float64; 1 when both are zero."""
    x, y = x.double(), y.double()
    power = (x.square() + y.square()).sum().item()
    return 1.0 if power == 0.0 else 2.0 * (x * y).sum().item() / power


def compare(
    spec: Spec,
    inputs: Inputs,
    outputs: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor],
    *,
    peer: bool = False,
) -> dict[str, Comparison]:
    """Output name -> comparison, for outputs the implementation gives (None: it has no such output).

    `inputs` are as they were before the implementation ran. peer: what misses our rules but meets `Rule.for_peers`
    has a `flag` instead of a problem.
    """
    results = _compare(spec, inputs, outputs, expected, Spec.rule)
    if peer and any(c.problem for c in results.values()):
        loose = _compare(spec, inputs, outputs, expected, lambda of, name: of.rule(name).for_peers())
        for name, c in results.items():
            if c.problem and not loose[name].problem:
                results[name] = replace(c, problem=None, flag=c.problem)
    return results


def _compare(
    spec: Spec,
    inputs: Inputs,
    outputs: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor],
    rule_of: Callable[[Spec, str], Rule],
) -> dict[str, Comparison]:
    results = {}
    for name, reference in expected.items():
        out = outputs[name]
        if out is None:
            continue
        if out.dtype != reference.dtype or out.numel() != reference.numel():
            got = f"{out.dtype} {list(out.shape)}, expected {reference.dtype} {list(reference.shape)}"
            results[name] = _failure(f"{name} is {got}")
            continue
        # a paged logits kernel may return its rows without the split into pages
        out, rule = out.reshape(reference.shape), rule_of(spec, name)
        if rule.kind == "selection":
            results[name] = _selection(name, out, reference, scores(spec, inputs), rule)
        elif rule.kind == "routing":
            results[name] = _close(name, _descending(out), _descending(reference), rule)
        else:
            try:
                slots = _owned_slots(spec, inputs, name, out)
            except ValueError as error:
                results[name] = _failure(str(error))
                continue
            if slots is not None:
                out, reference = out[slots], reference[slots]
            bound = _logits_bound(inputs, reference) if rule.kind == "logits" else None
            results[name] = _close(name, out, reference, rule, bound)
    return results


def _logits_bound(inputs: Inputs, reference: torch.Tensor) -> torch.Tensor:
    """How far each logit of the reference's may be missed on tensor cores, paged or ragged."""
    x: dict[str, Any] = inputs
    if "k_cache" in x:
        where = x["context_lens"], x["block_table"], reference[0].numel()
        return paged_logits_bound(x["q"], x["k_cache"], x["weights"], *where, tensor_cores=True).view(reference.shape)
    rows = zip(x["q"].split(1), x["weights"].split(1), strict=True)
    return torch.cat([logits_bound(q, x["k"], x["k_scale"], w, True, reference.numel()) for q, w in rows])


def _descending(x: torch.Tensor) -> torch.Tensor:
    return x.sort(dim=-1, descending=True).values


def _owned_slots(spec: Spec, inputs: Inputs, name: str, out: torch.Tensor) -> torch.Tensor | None:
    """Slots of a pool that sequences own, when `name` is an updated pool; those of others must be as they were.

    Raises: ValueError when one of those was written.
    """
    source = spec.mutates.get(name)
    if source is None or "state_indices" not in inputs:
        return None
    used = inputs["state_indices"].long()
    used = used[used > 0]
    others = torch.ones(len(out), dtype=torch.bool, device=out.device)
    others[used] = False
    # equal_nan: which NaN an unused slot holds is nobody's business
    if not torch.allclose(out[others], inputs[source][others], rtol=0.0, atol=0.0, equal_nan=True):
        raise ValueError(f"{name}: a slot that no sequence owns was written")
    return used


def _close(
    name: str, out: torch.Tensor, reference: torch.Tensor, rule: Rule, bound: torch.Tensor | None = None
) -> Comparison:
    """bound: of every element, what `rule.atol` counts in; without one it is absolute."""
    x, y = out.double(), reference.double()
    finite = y.isfinite()
    if rule.kind != "logits" and not torch.equal(x[~finite].nan_to_num(nan=0.5), y[~finite].nan_to_num(nan=0.5)):
        return _failure(f"{name}: infinities differ from the reference's")
    x, y = x[finite], y[finite]
    if not x.isfinite().all():
        return _failure(f"{name}: {int((~x.isfinite()).sum())} elements are not finite")
    if not x.numel():
        return Comparison(None, 0.0, 0.0, 0.0)
    difference = (x - y).abs()
    error = max(0.0, 1.0 - similarity(x, y))
    allowed = rule.rtol * y.abs() + rule.atol * (1.0 if bound is None else bound[finite])
    missed = ~(difference <= allowed)
    count = int(missed.sum())
    problem = None
    if error > rule.dissimilarity:
        problem = f"{name}: 1 - similarity is {error:.2e}, allowed {rule.dissimilarity:.0e}"
    elif count > (1.0 - rule.matched) * y.numel():
        worst = int((difference / allowed).nan_to_num(nan=0.0).argmax())
        place = [int(at) for at in finite.nonzero()[worst]]
        fine = f" (in {1.0 - rule.matched:.1%} it is no fault)" if rule.matched < 1.0 else ""
        problem = (
            f"{name}: {count} of {y.numel()} elements missed by more than allowed{fine}; "
            f"the worst at {place}: {x[worst]:.6g}, not {y[worst]:.6g} within {allowed[worst]:.3g}"
        )
    return Comparison(problem, error, difference.max().item(), (difference / (y.abs() + 1e-8)).max().item())


def _selection(name: str, chosen: torch.Tensor, reference: torch.Tensor, score: torch.Tensor, rule: Rule) -> Comparison:
    """Rows of distinct indices whose sorted scores equal the reference's; unused places are -1."""

    def fail(problem: str) -> Comparison:
        return _failure(f"{name}: {problem}")

    counts = (chosen >= 0).sum(-1)
    if not torch.equal(counts, (reference >= 0).sum(-1)):
        return fail("rows select another number of indices than the reference")
    if chosen.min() < -1 or chosen.max() >= score.shape[1]:
        return fail("an index is out of range")
    ordered = chosen.sort(dim=-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        return fail("an index is selected twice in one row")

    def sorted_scores(indices: torch.Tensor) -> torch.Tensor:
        picked = score.gather(1, indices.clamp(min=0).long())
        return torch.where(indices >= 0, picked, -torch.inf).sort(dim=-1, descending=True).values.double()

    mine, best = sorted_scores(chosen), sorted_scores(reference)
    valid = best.isfinite()
    if not torch.equal(mine.isfinite(), valid):
        return fail("an index outside its row's range is selected")
    missed = (best - mine).abs()[valid]
    worst = missed.max().item() if missed.numel() else 0.0
    best = best[valid]
    size = best.square().mean().sqrt() if best.numel() else best.new_zeros(())
    allowed = rule.atol * size + rule.rtol * best.abs()
    problem = None if (missed <= allowed).all() else f"{name}: selected scores differ by up to {worst:.3g}"
    relative = (missed / (best.abs() + 1e-8)).max().item() if missed.numel() else 0.0
    return Comparison(problem, worst, worst, relative)


def scores(spec: Spec, inputs: Inputs) -> torch.Tensor:
    """[rows, candidates]: what a selection maximises, −inf where a candidate is not allowed.

    Candidates are what the indices of the definition mean: columns, experts, or physical slots.
    """
    x: dict[str, Any] = inputs
    if "router_logits" in x:
        logits = x["router_logits"].float()
        return (
            logits if "bias" not in x else _grouped_scores(logits, x["bias"], int(x["n_group"]), int(x["topk_group"]))
        )
    if "logits" in x:
        columns = torch.arange(x["logits"].shape[1], device=x["logits"].device)
        starts, ends = x["row_starts"][:, None], x["row_ends"][:, None]
        inside = (columns >= starts) & (columns < ends)
        return _from_starts(torch.where(inside, x["logits"], -torch.inf), x["row_starts"])
    if "k_scale" in x:
        keys = x["k"], x["k_scale"]
        return _from_starts(
            indexer_logits_ragged(x["q"], *keys, x["weights"], x["row_starts"], x["row_ends"]), x["row_starts"]
        )
    if "context_lens" in x:
        table, cache = x["block_table"], x["k_cache"].view(torch.uint8)
        columns = table.shape[1] * cache.shape[1]
        return indexer_logits_paged(x["q"], cache, x["weights"], x["context_lens"], table, columns)
    table, cache = x["block_table"], x["k_index_cache_fp8"].squeeze(2).view(torch.uint8)
    pages, page = cache.shape[:2]
    local = indexer_logits_paged(
        x["q_index_fp8"].unsqueeze(1), cache, x["weights"], x["seq_lens"], table, table.shape[1] * page
    )
    slots = (table[:, :, None].long() * page + torch.arange(page, device=table.device)).flatten(1)
    return torch.full((len(table), pages * page), -torch.inf, dtype=local.dtype, device=table.device).scatter_(
        1, slots, local
    )


def _from_starts(masked: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Scores by what indices mean that count from the row's start."""
    columns = torch.arange(masked.shape[1], device=masked.device)
    return masked.gather(1, ((columns + starts[:, None]) % masked.shape[1]).long())


def _grouped_scores(logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    biased = logits.sigmoid() + bias
    groups = biased.view(len(logits), n_group, -1)
    kept = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    mask = torch.zeros(len(logits), n_group, dtype=torch.bool, device=logits.device).scatter_(1, kept, True)
    return torch.where(mask.repeat_interleave(groups.shape[-1], dim=1), biased, -torch.inf)
