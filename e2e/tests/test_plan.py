"""The comparison's requests, groups and bounds, on made-up log-probabilities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from blackwell_kernels.e2e import plan

MADE = plan.requests(5000)
MASKS = plan.groups(MADE, topk=2048)
SIZE = MASKS["prompt"].size


def stock(noise: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.normal(-9, 1, SIZE)
    return {c: (truth + rng.laplace(0, noise, SIZE)).astype(np.float32) for c in plan.COMPOSITIONS}


def like(base: dict[str, np.ndarray], factor: float, where: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """An arm that differs from stock's truth as stock does, times `factor` where `where` holds."""
    rng = np.random.default_rng(1)
    mean = (base["A"] + base["B"]) / 2
    scale = np.full(SIZE, 0.01) if where is None else np.where(where, 0.01 * factor, 0.01)
    scale = scale * (factor if where is None else 1)
    return {c: (mean + rng.laplace(0, 1, SIZE) * scale).astype(np.float32) for c in plan.COMPOSITIONS}


def test_requests_are_seeded_mixed_and_long_enough_for_sparsity() -> None:
    assert plan.requests(5000) == MADE
    assert plan.requests(5000, seed=1) != MADE
    kinds = Counter(r.name.split("-")[1] for r in MADE)
    assert len(MADE) >= 64
    assert kinds["long"] >= 12
    assert kinds["repeat"] >= 6
    assert all(2100 <= len(r.prompt) <= 5000 for r in MADE if r.name.endswith("long"))
    assert max(len(r.prompt) + len(r.forced) for r in MADE) < 8192
    assert max(max(r.prompt) for r in MADE) < 5000


def test_repeats_share_a_prefix_and_leave_it_to_the_cache() -> None:
    for i, request in enumerate(MADE):
        if not request.name.endswith("repeat"):
            assert request.scored
            continue
        n = len(request.prompt) - 16
        assert not request.scored
        assert any(r.prompt[:n] == request.prompt[:n] for r in MADE[:i])


def test_compositions_hold_the_same_requests_in_other_company() -> None:
    a, b = (plan.arrivals(MADE, c) for c in plan.COMPOSITIONS)
    assert {r.name for _, r in a} == {r.name for _, r in b} == {r.name for r in MADE}
    assert [r.name for _, r in a] != [r.name for _, r in b]
    steps_a, steps_b = Counter(s for s, _ in a), Counter(s for s, _ in b)
    assert steps_a[0] > steps_b[0] > 1
    assert sorted(s for s, _ in a) == [s for s, _ in a]
    assert sum(s > 0 for s in steps_a) > 20, "many requests arrive while others decode"
    assert steps_a[0] > plan.SMALL_STEP, "decodes take the tiles of large batches"


def test_flatten_keeps_order_and_refuses_missing_samples() -> None:
    scores = {
        r.name: {
            "prompt": [float(i)] * (len(r.prompt) - 1 if r.scored else 0),
            "decode": [i + 0.5] * len(r.forced),
        }
        for i, r in enumerate(MADE)
    }
    flat = plan.flatten(MADE, scores)
    assert flat.size == SIZE
    assert (np.diff(flat) >= 0).all()
    assert (flat[MASKS["decode"]] % 1 == 0.5).all()
    assert (flat[MASKS["prompt"]] % 1 == 0).all()
    scores[MADE[3].name]["decode"].pop()
    with pytest.raises(ValueError, match=MADE[3].name):
        plan.flatten(MADE, scores)


def test_sparse_groups_are_positions_that_leave_keys_out() -> None:
    assert MASKS["prompt, sparse"].sum() > 1000
    assert MASKS["decode, sparse"].sum() > 300
    assert not (MASKS["prompt, sparse"] & ~MASKS["prompt"]).any()
    assert "prompt, sparse" not in plan.groups(MADE, None)


def test_equal_up_to_noise_passes() -> None:
    base = stock(0.01)
    rows = plan.compare(base, like(base, 1.0), MASKS)
    assert [row["passed"] for row in rows] == [True] * 4
    assert all(0.5 < row["mean_ratio"] < plan.MEAN_FACTOR for row in rows)


@pytest.mark.parametrize("group", list(MASKS))
def test_a_fault_in_one_group_fails_that_group(group: str) -> None:
    base = stock(0.01)
    rows = plan.compare(base, like(base, 4.0, MASKS[group]), MASKS)
    assert not next(row for row in rows if row["group"] == group)["passed"]


def test_a_rare_large_fault_fails_by_its_tail() -> None:
    base = stock(0.01)
    other = like(base, 1.0)
    for samples in other.values():
        samples[:: SIZE // 1500] += 0.5  # a few per cent of all samples
    assert not all(row["passed"] for row in plan.compare(base, other, MASKS))


def test_nan_fails_and_identity_passes() -> None:
    base = stock(0.01)
    broken = like(base, 1.0)
    broken["A"][np.flatnonzero(MASKS["decode"])[0]] = np.nan
    assert not all(row["passed"] for row in plan.compare(base, broken, MASKS))
    same = {c: base[c].copy() for c in base}
    assert all(row["mean_ratio"] == 0 for row in plan.compare(base, same, MASKS))


def test_any_difference_fails_where_stock_shows_no_noise() -> None:
    base = stock(0.0)
    base["B"] = base["A"].copy()
    rows = plan.compare(base, like(base, 1.0), MASKS)
    assert all(row["mean_ratio"] == float("inf") and not row["passed"] for row in rows)


def test_tokens_that_stock_repeats_do_not_dilute_its_noise_but_are_compared() -> None:
    base = stock(0.01)
    half = np.arange(SIZE) % 2 == 0
    base["B"][half] = base["A"][half]
    rows = plan.compare(base, like(base, 1.0), MASKS)
    assert all(row["passed"] and 0.4 < row["repeated"] < 0.6 for row in rows)
    assert all(row["mean_ratio_all"] == pytest.approx(row["mean_ratio"] / (1 - row["repeated"])) for row in rows)
    assert not any(row["passed"] for row in plan.compare(base, like(base, 4.0, half), MASKS))


def test_the_other_composition_takes_small_steps_that_hold_a_block() -> None:
    assert plan.step_tokens("A", 4096, 16) == 4096
    assert plan.step_tokens("B", 4096, 16) == plan.SMALL_STEP
    assert plan.step_tokens("B", 4096, 544) == 544


def test_a_small_group_is_reported_and_not_judged() -> None:
    base, few = stock(0.01), np.zeros(SIZE, dtype=bool)
    few[: plan.MIN_SAMPLES - 1] = True
    (row,) = plan.compare(base, like(base, 100.0), {"few": few})
    assert row == {"group": "few", "judged": False, "passed": True, "n": plan.MIN_SAMPLES - 1}


def test_own_choices_are_compared_while_they_agree() -> None:
    made = [plan.Request("x", (1, 2, 3), (0, 0, 0, 0), True), plan.Request("y", (1,), (0, 0, 0, 0), False)]
    one = np.array([[5, 6, 7, 8], [1, 1, 1, 1]])
    two = np.array([[5, 9, 7, 8], [1, 1, 1, 2]])
    assert plan.agreement(made, [one, two]).tolist() == [True, True, True, False, False, False, True, True, True, False]
