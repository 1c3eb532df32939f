"""moe_fp8_block_scale, CPU and Triton, against the reference within a budget from the models' working precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blackwell_kernels.common.fp8 import quantize_groups
from blackwell_kernels.common.testing.compare import assert_fp8_similar, assert_within_budget, relative_error
from blackwell_kernels.moe import MoeConfig, op, reference
from blackwell_kernels.moe.inputs import MoeInputs, make_inputs

ON_GPU = torch.cuda.is_available()
HIDDEN, INTER, EXPERTS = (1024, 256, 16) if ON_GPU else (256, 128, 8)

pytestmark = pytest.mark.usefixtures("poisoned_workspaces")


def compare(impl, dense, out, inputs: MoeInputs, gate_first: bool = True, weighted: bool = True) -> None:
    """Hold `out` to the reference: each element within four times the worst error of vLLM's precision, which stores
    every tensor in bf16; and all of them together within twice the error of our own, or one rounding of the output.

    A result next to the border between two e4m3 values goes either way in any precision but the reference's: one such
    step is large for an element and small for the whole. So the first bound is wide and the second is narrow.
    """
    options = {"gate_first": gate_first, "weighted": weighted}
    want = reference.moe_fp8_block_scale(
        *inputs.args(), gate_first=gate_first, apply_router_weight_on_input=not weighted
    )
    bf16 = torch.bfloat16
    assert_within_budget(out, want, dense(inputs, product=bf16, activation=bf16, pick=bf16, **options))
    # Hopper's FP8 tensor cores keep 14 bits of a sum, no fewer than bf16 keeps of its result
    product = bf16 if impl.device.type == "cuda" else torch.float32
    working = dense(inputs, product=product, pick=bf16, **options)
    allowed = 2 * relative_error(working, want) + torch.finfo(bf16).eps / 2
    assert relative_error(out, want) <= allowed
    assert_fp8_similar(out, want)


def check(impl, dense, inputs: MoeInputs, gate_first: bool = True, weighted: bool = True, **options: Any):
    out = impl.experts(inputs, gate_first=gate_first, apply_router_weight_on_input=not weighted, **options)
    compare(impl, dense, out, inputs, gate_first, weighted)
    return out


# what the heuristic picks depends on the number of tokens; every property is to hold of both paths
PATHS = {
    "sorted": MoeConfig(16, 16, 4, 2, 4, 2),
    "walking": MoeConfig(32, 16, 4, 2, 4, 2, fit=16, down_blocks=4, down_wide=True, walk=True),
    "direct": MoeConfig(16, 16, 4, 3, 4, 3, gate_up_rows=64, down_rows=64),
}


@pytest.fixture(params=["cpu", *PATHS])
def impl(request, triton_impl, cpu_impl):
    path = request.param
    return replace(triton_impl, name=path, config=PATHS[path]) if path in PATHS else cpu_impl


@pytest.mark.parametrize("quantized", [True, False], ids=["e4m3", "bf16"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_tokens(impl, dense, tokens, quantized):
    check(impl, dense, make_inputs(tokens, HIDDEN, INTER, EXPERTS, 2, quantized=quantized))


@pytest.mark.parametrize("tokens", [15, 16, 17, 33])
def test_all_tokens_to_one_expert(impl, dense, tokens):
    """Every other expert is empty; the tile is full, one short or one over."""
    inputs = make_inputs(tokens, HIDDEN, INTER, EXPERTS, 1)
    inputs = replace(inputs, topk_ids=torch.full((tokens, 1), EXPERTS - 2, dtype=torch.int32))
    check(impl, dense, inputs)


@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (384, 256), (128, 384)])
def test_shapes(impl, dense, hidden, inter):
    check(impl, dense, make_inputs(5, hidden, inter, 3, 2))


@pytest.mark.parametrize("quantized", [True, False], ids=["e4m3", "bf16"])
def test_gate_in_the_second_half(impl, dense, quantized):
    inputs = make_inputs(7, HIDDEN, INTER, EXPERTS, 2, quantized=quantized)
    second = check(impl, dense, inputs, gate_first=False)
    assert not torch.equal(second, check(impl, dense, inputs))


@pytest.mark.parametrize("zipf", [1.0, 2.5])
def test_skewed_routing(impl, dense, zipf):
    inputs = make_inputs(24, HIDDEN, INTER, EXPERTS, 2, zipf=zipf)
    assert torch.bincount(inputs.topk_ids.flatten(), minlength=EXPERTS).max() >= 12
    check(impl, dense, inputs)


def test_no_tokens(impl):
    assert impl.experts(make_inputs(0, HIDDEN, INTER, EXPERTS, 2)).shape == (0, HIDDEN)


def test_ids_outside_contribute_nothing_whatever_their_weight(impl, dense):
    inputs = make_inputs(6, HIDDEN, INTER, EXPERTS, 2)
    big = 2**31 - 1
    ids = torch.tensor([[0, -1], [EXPERTS, 1], [big, -big - 1], [-1, -1], [2, 2], [3, EXPERTS]], dtype=torch.int32)
    weights = torch.where((ids < 0) | (ids >= EXPERTS), math.nan, inputs.topk_weights)
    inputs = replace(inputs, topk_ids=ids)
    out = check(impl, dense, inputs)
    assert torch.equal(out, impl.experts(replace(inputs, topk_weights=weights)))
    assert torch.equal(out[2:4], torch.zeros(2, HIDDEN, dtype=torch.bfloat16))


def test_duplicate_picks_count_twice(impl, dense):
    inputs = make_inputs(3, HIDDEN, INTER, EXPERTS, 3)
    check(impl, dense, replace(inputs, topk_ids=torch.tensor([[1, 1, 1], [2, 0, 2], [5, 5, 0]], dtype=torch.int32)))


def test_expert_map(impl, dense):
    """Half of the global experts are elsewhere; the local order is not the global one."""
    inputs = make_inputs(20, HIDDEN, INTER, EXPERTS, 3)
    rng = torch.Generator().manual_seed(1)
    expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    expert_map[torch.randperm(2 * EXPERTS, generator=rng)[:EXPERTS]] = torch.arange(EXPERTS, dtype=torch.int32)
    ids = torch.randint(-1, 2 * EXPERTS + 1, (20, 3), generator=rng, dtype=torch.int32)
    check(impl, dense, replace(inputs, topk_ids=ids, expert_map=expert_map))
    out = impl.experts(replace(inputs, topk_ids=ids, expert_map=torch.full((2 * EXPERTS,), -1, dtype=torch.int32)))
    assert torch.equal(out, torch.zeros(20, HIDDEN, dtype=torch.bfloat16))


def test_parts_of_an_expert_parallel_group_sum_to_the_whole(impl):
    inputs = make_inputs(9, HIDDEN, INTER, EXPERTS, 2)
    whole = reference.moe_fp8_block_scale(*inputs.args())
    parts = torch.zeros(9, HIDDEN, dtype=torch.float64)
    half = EXPERTS // 2
    for rank in range(2):
        mine = slice(rank * half, (rank + 1) * half)
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(half, dtype=torch.int32)
        names = ("w13", "w13_scale", "w2", "w2_scale")
        local = {name: getattr(inputs, name)[mine].contiguous() for name in names}
        parts += impl.experts(replace(inputs, expert_map=expert_map, **local)).double()
    assert_fp8_similar(parts, whole)


def test_weights_applied_on_the_input_are_not_applied_again(impl, dense):
    inputs = make_inputs(5, HIDDEN, INTER, EXPERTS, 1)
    ones = torch.ones(5, 1)
    out = check(impl, dense, replace(inputs, topk_weights=0.3 * ones), weighted=False)
    assert torch.equal(out, impl.experts(replace(inputs, topk_weights=ones)))


def test_strided_inputs(impl):
    """Rows of a wider tensor, and the contest's block-major activation scale."""
    plain = make_inputs(6, HIDDEN, INTER, EXPERTS, 2, quantized=True)
    wide = torch.zeros(6, HIDDEN + 128, dtype=torch.float8_e4m3fn)
    wide[:, :HIDDEN] = plain.hidden_states
    assert plain.a_scale is not None
    block_major = plain.a_scale.T.contiguous().T
    assert block_major.stride() == (1, 6)
    strided = replace(plain, hidden_states=wide[:, :HIDDEN], a_scale=block_major)
    assert torch.equal(impl.experts(strided), impl.experts(plain))
    bf16 = make_inputs(6, HIDDEN, INTER, EXPERTS, 2)
    wide = torch.full((6, HIDDEN + 64), math.nan, dtype=torch.bfloat16)
    wide[:, :HIDDEN] = bf16.hidden_states
    assert torch.equal(impl.experts(replace(bf16, hidden_states=wide[:, :HIDDEN])), impl.experts(bf16))


def test_quantising_inside_equals_quantising_before(impl):
    inputs = make_inputs(6, HIDDEN, INTER, EXPERTS, 2)
    q, scale = quantize_groups(inputs.hidden_states)
    assert torch.equal(impl.experts(replace(inputs, hidden_states=q, a_scale=scale)), impl.experts(inputs))


def test_input_scales_at_powers_of_two(impl, dense):
    """Groups whose largest value is 448 * 2^n, the next bf16 above it, zero, and tiny."""
    inputs = make_inputs(4, HIDDEN, INTER, EXPERTS, 2)
    x = torch.zeros(4, HIDDEN)
    x[0] = torch.linspace(-448, 448, HIDDEN)
    x[1] = torch.linspace(-450, 450, HIDDEN) / 1024
    x[3] = 2.0**-40
    inputs = replace(inputs, hidden_states=x.bfloat16())
    out = impl.experts(inputs)
    for t in range(4):
        row = {name: getattr(inputs, name)[t : t + 1] for name in ("hidden_states", "topk_weights", "topk_ids")}
        compare(impl, dense, out[t : t + 1], replace(inputs, **row))


def test_plain_float32_activation_scales(impl, dense):
    """Scales that are no powers of two, as a caller that quantised by itself may give them."""
    inputs = make_inputs(6, HIDDEN, INTER, EXPERTS, 2)
    q, scale = quantize_groups(inputs.hidden_states, ue8m0=False)
    assert (torch.frexp(scale).mantissa != 0.5).any()
    check(impl, dense, replace(inputs, hidden_states=q, a_scale=scale))


def test_high_dynamic_range(impl, dense):
    """Activations over six decades from group to group, block scales over three, outliers a thousand times the rest."""
    inputs = make_inputs(9, HIDDEN, INTER, EXPERTS, 2)
    rng = torch.Generator().manual_seed(3)

    def decades(shape, low, high):
        return 10.0 ** (low + (high - low) * torch.rand(shape, generator=rng))

    x = inputs.hidden_states.float().unflatten(1, (-1, 128)) * decades((9, HIDDEN // 128, 1), -4, 2)
    x = x.flatten(1)
    x[:, ::97] *= 1000
    scales = {
        name: getattr(inputs, name) * decades(getattr(inputs, name).shape, -2, 1) for name in ("w13_scale", "w2_scale")
    }
    check(impl, dense, replace(inputs, hidden_states=x.bfloat16(), **scales))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_in_what_is_not_used_is_harmless(impl):
    """Unused experts' weights and scales, and the hidden states of tokens without an expert, are NaN."""
    inputs = make_inputs(8, HIDDEN, INTER, EXPERTS, 2)
    ids = inputs.topk_ids % (EXPERTS // 2)
    ids[3] = -1
    inputs = replace(inputs, topk_ids=ids)
    clean = impl.experts(inputs)
    hidden_states = inputs.hidden_states.clone()
    hidden_states[3] = math.nan
    dirty = {"hidden_states": hidden_states}
    for name in ("w13", "w13_scale", "w2", "w2_scale"):
        dirty[name] = getattr(inputs, name).clone()
        dirty[name][EXPERTS // 2 :] = math.nan
    assert torch.equal(impl.experts(replace(inputs, **dirty)), clean)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_that_is_not_finite_stays_alone(impl, bad):
    inputs = make_inputs(5, HIDDEN, INTER, EXPERTS, 2)
    inputs = replace(inputs, topk_ids=torch.tensor([[0, 1]] * 5, dtype=torch.int32))
    clean = impl.experts(inputs)
    hidden_states = inputs.hidden_states.clone()
    hidden_states[2, 7] = bad
    out = impl.experts(replace(inputs, hidden_states=hidden_states))
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(out[others], clean[others])
    assert not out[2].isfinite().any()


@pytest.mark.parametrize(
    "config",
    [
        MoeConfig(16, 16, 4, 4, 4, 5),
        MoeConfig(32, 16, 4, 2, 8, 2),
        MoeConfig(32, 32, 8, 4, 8, 5),
        MoeConfig(64, 64, 8, 4, 8, 5),
        MoeConfig(128, 64, 8, 4, 8, 4),
        MoeConfig(128, 128, 8, 3, 8, 4),
        MoeConfig(64, 64, 8, 3, 8, 3, x_in_registers=True),
        MoeConfig(128, 128, 8, 3, 8, 3, x_in_registers=True),
        MoeConfig(16, 16, 4, 4, 4, 5, down_blocks=4, walk=True),
        MoeConfig(64, 64, 8, 3, 8, 3, x_in_registers=True, fit=16, walk=True),
        MoeConfig(128, 64, 8, 3, 8, 3, fit=32),
        MoeConfig(128, 128, 8, 3, 8, 3, x_in_registers=True, fit=32, down_blocks=2, down_wide=True, walk=True),
        MoeConfig(16, 16, 2, 1, 1, 4, gate_up_rows=16, down_rows=32),
        MoeConfig(16, 16, 8, 4, 8, 1, gate_up_rows=64, down_rows=64),
    ],
    ids=lambda c: (
        f"{c.block_t}-{c.gate_up_t}-{c.gate_up_rows}-{c.fit}"
        + ("-registers" if c.x_in_registers else "")
        + ("-walk" if c.walk else "")
    ),
)
def test_every_tile(triton_impl, dense, config):
    """Runs of 1, 64 and 130 rows: a tile that is partly, exactly or more than filled, at every height."""
    tokens = 195
    inputs = make_inputs(tokens, 512 if config.down_blocks > 1 else 128, 128, 3, 1, seed=2)
    ids = torch.zeros(tokens, 1, dtype=torch.int32)
    ids[4], ids[65:] = 1, 2
    check(triton_impl, dense, replace(inputs, topk_ids=ids), config=config)


def test_repeats_are_bitwise_equal(impl):
    inputs = make_inputs(17, HIDDEN, INTER, EXPERTS, 3, zipf=1.0)
    first = impl.experts(inputs)
    for _ in range(50 if ON_GPU else 2):
        assert torch.equal(impl.experts(inputs), first)


def test_a_token_does_not_depend_on_its_batch(impl):
    """Same tile size, other neighbours and places: the same bits."""
    inputs = make_inputs(12, HIDDEN, INTER, EXPERTS, 2)
    whole = impl.experts(inputs)
    some = torch.tensor([7, 2, 11])
    names = ("hidden_states", "topk_weights", "topk_ids")
    part = impl.experts(replace(inputs, **{n: getattr(inputs, n)[some] for n in names}))
    if impl.name != "cpu":
        assert torch.equal(part, whole[some])
    else:
        # a matrix product's order of summation depends on the number of rows on a CPU
        assert_fp8_similar(part, whole[some])


def test_experts_beyond_two_to_the_31_elements(impl):
    """Only the last expert's pages are touched, at offsets over 2^31 in w13 and in w2."""
    experts, hidden, inter = 130, 4096, 4224
    assert (experts - 1) * hidden * inter > 2**31
    small = make_inputs(2, hidden, inter, 1, 1)
    last = experts - 1
    big = {}
    for name in ("w13", "w13_scale", "w2", "w2_scale"):
        part = getattr(small, name)
        # not torch.empty, which is poisoned here: that would touch every page
        strides = (part[0].numel(), part.shape[2], 1)
        big[name] = torch.empty_strided((experts, *part.shape[1:]), strides, dtype=part.dtype)
        big[name][last] = part[0]
    whole = replace(small, topk_ids=torch.full((2, 1), last, dtype=torch.int32), **big)
    fn = impl._op("moe_fp8_block_scale")
    out = torch.full((2, hidden), math.nan, dtype=torch.bfloat16, device=impl.device)
    options = {} if impl.config is None else {"config": impl.config}
    fn(*whole.to(impl.device).args(), out, **options)
    assert_fp8_similar(out.cpu(), reference.moe_fp8_block_scale(*small.args()))


SIZES = st.sampled_from([128, 256, 512] if ON_GPU else [128, 256])
CASES = {
    "topk": st.integers(1, 4),
    "experts": st.integers(1, 9),
    "hidden": SIZES,
    "inter": SIZES,
    "quantized": st.booleans(),
    "gate_first": st.booleans(),
    "ids": st.sampled_from(["distinct", "skewed", "any", "mapped"]),
    "seed": st.integers(0, 2**31),
}


def check_drawn(impl, dense, tokens, topk, experts, hidden, inter, quantized, gate_first, ids, seed):
    topk = min(topk, experts)
    inputs = make_inputs(
        tokens, hidden, inter, experts, topk, seed=seed, zipf=2.0 if ids == "skewed" else 0.0, quantized=quantized
    )
    if ids in ("any", "mapped"):
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randint(-1, 2 * experts, (tokens, topk), generator=rng, dtype=torch.int32)
        expert_map = torch.randint(-1, experts, (2 * experts - 1,), generator=rng, dtype=torch.int32)
        inputs = replace(inputs, topk_ids=drawn, expert_map=expert_map if ids == "mapped" else None)
    check(impl, dense, inputs, gate_first)


@settings(max_examples=250)
@given(tokens=st.integers(0, 12), **CASES)
def test_fuzz_cpu(cpu_impl, dense, tokens, **drawn):
    check_drawn(cpu_impl, dense, tokens, **drawn)


@settings(max_examples=40 if ON_GPU else 12)
@given(tokens=st.integers(0, 100 if ON_GPU else 8), **CASES)
def test_fuzz_triton(triton_impl, dense, tokens, **drawn):
    check_drawn(triton_impl, dense, tokens, **drawn)


@pytest.mark.gpu
def test_graph_replays_follow_changed_contents(triton_impl):
    """Captured once; then tokens, routing and weights change in place before each replay."""
    device = triton_impl.device
    batches = [make_inputs(20, HIDDEN, INTER, EXPERTS, 2, seed=s, zipf=s / 4).to(device) for s in range(8)]
    static = make_inputs(20, HIDDEN, INTER, EXPERTS, 2).to(device)
    out = torch.empty(20, HIDDEN, dtype=torch.bfloat16, device=device)
    op = torch.ops.blackwell_kernels.moe_fp8_block_scale
    op(*static.args(), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*static.args(), out)
    expected = []
    for batch in batches:
        eager = torch.empty_like(out)
        op(*batch.args(), eager)
        expected.append(eager)
    for i in range(100):
        batch = batches[i % len(batches)]
        for mine, theirs in zip(static.args(), batch.args(), strict=True):
            if mine is not None:
                mine.copy_(theirs)
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected[i % len(batches)])


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_kernels_launched_early_wait_for_what_they_read(triton_impl, path):
    """Programmatic dependent launch in a graph, again and again over the same buffers: the same bits as without."""
    device = triton_impl.device
    config = PATHS[path]
    batches = [make_inputs(16, HIDDEN, INTER, EXPERTS, 2, seed=s).to(device) for s in range(4)]
    batches[3] = replace(batches[3], topk_ids=torch.full_like(batches[3].topk_ids, -1))  # nothing to do but zeros
    expected, outs = [], []
    for batch in batches:
        expected.append(torch.empty(16, HIDDEN, dtype=torch.bfloat16, device=device))
        op.moe_fp8_block_scale_triton(*batch.args(), expected[-1], config=config)
        outs.append(torch.empty_like(expected[-1]))
    early = replace(config, pdl=True)
    op.moe_fp8_block_scale_triton(*batches[0].args(), outs[0], config=early)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for batch, out in zip(batches, outs, strict=True):
            op.moe_fp8_block_scale_triton(*batch.args(), out, config=early)
    for _ in range(200):
        for out in outs:
            out.fill_(math.nan)
        graph.replay()
        for out, want in zip(outs, expected, strict=True):
            assert torch.equal(out, want)
