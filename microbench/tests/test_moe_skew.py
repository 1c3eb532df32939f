"""Uneven routing: what each kind sends where, and how a row is told from samples."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from microbench_examples import HEAD, CountingEngine
from typer.testing import CliRunner

from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import bounds, moe_skew
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.runner import Bench
from blackwell_kernels.microbench.workloads import EVEN, generate

RATES = {"copy_tbps": 4.0, "fp8_tflops": 1000.0, "bf16_tflops": 500.0, "launch_us": 0.001}
CASES = [c for c in select(sets=("cpu",)) if c.definition in moe_skew.DEFINITIONS and c.tokens == 33]


def here(x):
    """Local experts of all pairs, -1 elsewhere."""
    ids = x["topk_ids"].long()
    return x["expert_map"][ids] if "expert_map" in x else ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.definition)
@pytest.mark.parametrize("kind", moe_skew.KINDS)
def test_experts_of_a_token_are_distinct_and_follow_the_seed(case, kind):
    x = generate(case)
    made, again, other = (moe_skew.routed(x, kind, seed)["topk_ids"] for seed in (1, 1, 2))
    assert made.dtype == torch.int32
    assert made.shape == x["topk_ids"].shape
    every = case.axes.get("num_global_experts", case.axes["num_experts"])
    assert all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < every for row in made.tolist())
    assert torch.equal(made, again)
    assert torch.equal(made, other) == (kind == EVEN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.definition)
def test_one_sends_every_token_to_the_same_experts_and_one_of_them_is_here(case):
    x = moe_skew.routed(generate(case), "one", 3)
    assert (x["topk_ids"].sort(-1).values == x["topk_ids"][0].sort().values).all()
    local = here(x)[0]
    assert len(local[local >= 0]) == (1 if "expert_map" in x else x["topk_ids"].shape[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.definition)
def test_empty_leaves_three_experts_of_four_without_a_token(case):
    x = moe_skew.routed(generate(case), "empty", 3)
    every = case.axes.get("num_global_experts", case.axes["num_experts"])
    assert len(x["topk_ids"].unique()) == every // 4


def test_zipf_prefers_the_r_th_expert_r_times_less():
    x = {"w2": torch.empty(32, 1, 1), "topk_ids": torch.empty(20_000, 1, dtype=torch.int32)}
    counts = moe_skew.routed(x, "zipf", 0)["topk_ids"].flatten().bincount(minlength=32).sort(descending=True).values
    share = counts.double() / counts.sum()
    expected = 1 / torch.arange(1, 33).double()
    assert torch.allclose(share, expected / expected.sum(), rtol=0.2)


def bench(tmp_path):
    return Bench(
        device=torch.device("cpu"), engines=[CountingEngine([])], head=HEAD, rates=RATES, rounds=3, root=tmp_path,
        l2_bytes=1,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.definition)
def test_rows_are_times_over_floors_over_those_of_even_routing(case, tmp_path):
    rows = moe_skew.measured(bench(tmp_path), case)
    assert [row["kind"] for row in rows] == list(moe_skew.KINDS)
    even = rows[0]
    assert (even["time"], even["per_floor"]) == (1.0, 1.0)
    for row in rows:
        assert row["us"] == sorted(row["samples_us"])[1]
        assert row["per_floor"] == pytest.approx(row["us"] / row["floor_us"] * even["floor_us"] / even["us"])
    one = next(row for row in rows if row["kind"] == "one")
    hit = bounds.cost(case, moe_skew.routed(generate(case), "one", 0)).bytes
    assert one["floor_us"] == pytest.approx(hit / RATES["copy_tbps"] / 1e6)
    assert one["floor_us"] < even["floor_us"]
    json.dumps(rows)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    from blackwell_kernels.microbench import ours

    right = ours.moe_fp8_block
    monkeypatch.setattr(ours, "moe_fp8_block", lambda x: lambda: tuple(out + 1 for out in right(x)()))
    with pytest.raises(RuntimeError, match="even: wrong: output"):
        moe_skew.measured(bench(tmp_path), CASES[0])


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(moe_skew.run)
    result = CliRunner().invoke(app, ["--results", str(tmp_path)])
    assert isinstance(result.exception, MissingRequirementError)
    assert CliRunner().invoke(app, ["--case", "no such case"]).exit_code == 2
    assert not list(tmp_path.iterdir())
