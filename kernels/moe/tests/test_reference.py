"""The frozen reference against independent formulations, and as the self-contained text that benchmarks embed."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch

from blackwell_kernels.common.fp8 import quantize_blocks, quantize_groups
from blackwell_kernels.moe import reference
from blackwell_kernels.moe.inputs import make_inputs


def naive_softmax_topk(logits, topk, renormalize):
    rows = []
    for row in logits.double().tolist():
        p = [math.exp(x - max(row)) for x in row]
        p = [x / sum(p) for x in p]
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:topk]
        total = sum(p[e] for e in best) if renormalize else 1.0
        rows.append([(e, p[e] / total) for e in best])
    return rows


def naive_grouped_topk(logits, bias, topk, n_group, topk_group, renormalize, factor):
    """By sorting lists of float32 scores; the sigmoid is torch's, so that scores tie where the reference's do."""
    scores = logits.float().sigmoid()
    biased = (scores + bias.float()).tolist()
    rows = []
    for s, b in zip(scores.tolist(), biased, strict=True):
        members = len(s) // n_group
        group_score = [
            torch.tensor(sorted(b[g * members : (g + 1) * members])[-2:], dtype=torch.float32).sum().item()
            for g in range(n_group)
        ]
        kept = sorted(range(n_group), key=lambda g: (-group_score[g], g))[:topk_group]
        best = sorted((e for e in range(len(s)) if e // members in kept), key=lambda e: (-b[e], e))[:topk]
        total = sum(s[e] for e in best) + 1e-20 if renormalize else 1.0
        rows.append([(e, s[e] / total * factor) for e in best])
    return rows


def assert_rows_equal(result, naive):
    weights, ids = result
    assert ids.tolist() == [[e for e, _ in row] for row in naive]
    want = torch.tensor([[w for _, w in row] for row in naive], dtype=torch.float64)
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("coarse", [True, False], ids=["ties", "continuous"])
def test_softmax_routing_sorts_by_logit_then_index(renormalize, coarse):
    logits = torch.randn(50, 24, generator=torch.Generator().manual_seed(1)) * 3
    logits = logits.round() if coarse else logits
    result = reference.moe_softmax_topk(logits, 5, renormalize)
    assert_rows_equal(result, naive_softmax_topk(logits, 5, renormalize))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("coarse", [True, False], ids=["ties", "continuous"])
@pytest.mark.parametrize(("experts", "n_group", "topk_group", "topk"), [(32, 8, 4, 6), (30, 5, 2, 7), (16, 1, 1, 16)])
def test_grouped_routing_sorts_groups_then_experts(experts, n_group, topk_group, topk, coarse, renormalize):
    rng = torch.Generator().manual_seed(2)
    logits, bias = torch.randn(50, experts, generator=rng), torch.randn(experts, generator=rng) / 4
    if coarse:
        logits, bias = logits.round(), torch.zeros(experts)
    result = reference.moe_grouped_topk(logits, bias, topk, n_group, topk_group, renormalize, 2.5)
    assert_rows_equal(result, naive_grouped_topk(logits, bias, topk, n_group, topk_group, renormalize, 2.5))


@pytest.mark.parametrize("quantized", [True, False], ids=["e4m3", "bf16"])
@pytest.mark.parametrize("gate_first", [True, False])
def test_experts_equal_the_dense_formulation(dense, quantized, gate_first):
    inputs = make_inputs(9, 256, 128, 6, 3, seed=3, quantized=quantized)
    out = reference.moe_fp8_block_scale(*inputs.args(), gate_first=gate_first)
    torch.testing.assert_close(out, dense(inputs, gate_first=gate_first), rtol=1e-10, atol=1e-10)


def test_experts_with_a_map_and_invalid_ids_equal_the_dense_formulation(dense):
    inputs = make_inputs(9, 128, 128, 4, 3, seed=4)
    ids = torch.randint(-2, 12, (9, 3), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    expert_map = torch.tensor([-1, 2, 0, -1, 3, -1, -1, 1, -1, -1], dtype=torch.int32)
    inputs = replace(inputs, topk_ids=ids, expert_map=expert_map)
    out = reference.moe_fp8_block_scale(*inputs.args())
    torch.testing.assert_close(out, dense(inputs), rtol=1e-10, atol=1e-10)
    unweighted = reference.moe_fp8_block_scale(*inputs.args(), apply_router_weight_on_input=True)
    torch.testing.assert_close(unweighted, dense(inputs, weighted=False), rtol=1e-10, atol=1e-10)


CONTEST_WRAPPER = """
def run(routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
        gemm2_weights, gemm2_weights_scale, local_expert_offset, routed_scaling_factor):
    weights, ids = moe_grouped_topk(routing_logits, routing_bias, 8, 8, 4, True, routed_scaling_factor)
    return moe_fp8_block_scale(hidden_states, hidden_states_scale.T, gemm1_weights, gemm1_weights_scale,
        gemm2_weights, gemm2_weights_scale, weights, ids - local_expert_offset,
        gate_first=False, requantize_intermediate=False, dtype=torch.float32).to(torch.bfloat16)
"""


def test_its_text_alone_serves_as_the_contest_reference():
    """Block-major activation scale, SiLU on W13's second half, intermediate kept, experts at an offset."""
    namespace: dict = {}
    exec(inspect.getsource(reference) + CONTEST_WRAPPER, namespace)
    rng = torch.Generator().manual_seed(6)
    tokens, hidden, inter, local, offset = 5, 256, 128, 8, 16
    x, x_scale = quantize_groups(torch.randn(tokens, hidden, generator=rng))
    w1, s1 = quantize_blocks(torch.randn(local, 2 * inter, hidden, generator=rng) / hidden**0.5)
    w2, s2 = quantize_blocks(torch.randn(local, hidden, inter, generator=rng) / inter**0.5)
    logits, bias = torch.randn(tokens, 64, generator=rng), torch.randn(64, generator=rng).bfloat16()
    out = namespace["run"](logits, bias, x, x_scale.T.contiguous(), w1, s1, w2, s2, offset, 2.5)

    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    picks = naive_grouped_topk(logits, bias, 8, 8, 4, True, 2.5)
    for t in range(tokens):
        a = x[t].double() * x_scale[t].double().repeat_interleave(128)
        for e, weight in picks[t]:
            if offset <= e < offset + local:
                block = torch.ones(128, 128, dtype=torch.float64)
                up, gate = (w1[e - offset].double() * torch.kron(s1[e - offset].double(), block) @ a).split(inter)
                h = gate * torch.sigmoid(gate) * up
                expected[t] += weight * (w2[e - offset].double() * torch.kron(s2[e - offset].double(), block) @ h)
    assert out.dtype == torch.bfloat16
    assert expected.abs().max() > 0.1
    # bf16 output: half a unit in the last place of the largest element
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)


def test_requantisation_moves_the_result_by_less_than_fp8_allows():
    inputs = make_inputs(9, 256, 128, 6, 3, seed=7)
    kept = reference.moe_fp8_block_scale(*inputs.args(), requantize_intermediate=False)
    requantized = reference.moe_fp8_block_scale(*inputs.args())
    difference = (kept - requantized).norm() / kept.norm()
    # an e4m3 rounding is off by at most 2^-4 of a normal value; something, but less than that, must change
    assert 1e-3 < difference < 2**-4


def test_the_reference_quantises_as_fp8_does():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(8)) * torch.logspace(-12, 4, 64)[:, None]
    q, scale = reference.quantize_1x128(x)
    expected_q, expected_scale = quantize_groups(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
