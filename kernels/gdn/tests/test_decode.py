"""gdn_decode: one token, several, speculative windows; the fused convolution; padding; extreme gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from blackwell_kernels.common import arch, tables
from blackwell_kernels.gdn import op, reference
from blackwell_kernels.gdn.config import DecodeConfig, case_of, decode_search_space
from blackwell_kernels.gdn.inputs import DecodeInputs, Heads, decode_inputs
from blackwell_kernels.gdn.oracles import WORKING, Implementation, assert_close, assert_same_bits, assert_states_close

DTYPES = pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
CONV = pytest.mark.parametrize("conv", [False, True], ids=["plain", "conv"])
SMALL = Heads(H=2, HV=4, K=16, V=32)


@DTYPES
@CONV
def test_one_token_a_sequence(implementation: Implementation, rng: torch.Generator, state_dtype, conv: bool) -> None:
    x = decode_inputs(rng, SMALL, 5, state_dtype=state_dtype, conv=conv, bias=True, padding=[1, 3])
    result = implementation.decode_checked(x)
    assert (result["out"][[1, 3]] == 0).all()


@pytest.mark.parametrize("heads", [Heads(1, 1, 16, 16), Heads(1, 4, 32, 16), Heads(3, 6, 16, 64), Heads(1, 3, 16, 16)])
def test_head_groups(implementation: Implementation, rng: torch.Generator, heads: Heads) -> None:
    implementation.decode_checked(decode_inputs(rng, heads, 2))


@pytest.mark.parametrize("use_qk_l2norm", [False, True])
def test_normalisation_is_optional(implementation: Implementation, rng: torch.Generator, use_qk_l2norm: bool) -> None:
    x = decode_inputs(rng, SMALL, 3, state_dtype=torch.float32)
    # small keys keep the recurrence bounded without the norm; zero keys must not divide by zero with it
    mixed = x.mixed_qkv * 0.1
    mixed[1] = 0
    implementation.decode_checked(replace(x, mixed_qkv=mixed, use_qk_l2norm=use_qk_l2norm, scale=0.3))


@DTYPES
@CONV
def test_several_tokens_in_one_slot(
    implementation: Implementation, rng: torch.Generator, state_dtype: torch.dtype, conv: bool
) -> None:
    x = decode_inputs(rng, SMALL, [3, 0, 1, 2, 5], state_dtype=state_dtype, conv=conv, padding=[3])
    implementation.decode_checked(x)


@CONV
@pytest.mark.parametrize("accepted", [False, True], ids=["first column", "accepted"])
def test_speculative_windows(implementation: Implementation, rng: torch.Generator, conv: bool, accepted: bool) -> None:
    lengths = [4, 4, 2, 0, 1, 3]
    x = decode_inputs(rng, SMALL, lengths, window=4, accepted=accepted, conv=conv, bias=True, padding=[5])
    # a step without a slot is computed and not stored; here not the one that sequence 0 starts from
    slots, start = x.state_indices.clone(), 1 if x.num_accepted_tokens is None else int(x.num_accepted_tokens[0])
    slots[0, start % 4] = 0
    more = {"conv_state_indices": x.state_indices[:, 0]} if conv else {}
    implementation.decode_checked(replace(x, state_indices=slots, **more))


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_every_count_of_accepted_tokens(implementation: Implementation, rng: torch.Generator, accepted: int) -> None:
    x = decode_inputs(rng, SMALL, [4, 1, 3], window=4, accepted=True)
    implementation.decode_checked(replace(x, num_accepted_tokens=torch.full((3,), accepted, dtype=torch.int32)))


def test_accepted_drafts_equal_decoding_one_by_one(implementation: Implementation, rng: torch.Generator) -> None:
    """Windows of three drafts of which 3, 1, 2, ... are right leave what plain decoding of the right ones leaves."""
    heads, window, counts = SMALL, 3, [3, 1, 2, 3, 1]
    truth = decode_inputs(rng, heads, sum(counts), state_dtype=torch.float32, conv=False)
    x = decode_inputs(rng, heads, [window], window=window, accepted=True, state_dtype=torch.float32)
    one_by_one = decode_inputs(rng, heads, 1, state_dtype=torch.float32)
    one_by_one = replace(one_by_one, A_log=x.A_log, dt_bias=x.dt_bias, conv_weight=x.conv_weight)
    slot, first = int(one_by_one.state_indices[0]), int(x.state_indices[0, 0])
    x.state[first] = one_by_one.state[slot]
    x.conv_state[first, :3] = one_by_one.conv_state[slot]
    place, before = 0, 1
    for count in counts:
        rows = slice(place, place + count)
        drafts = {}
        for name in ("mixed_qkv", "a", "b"):
            right = getattr(truth, name)[rows]
            wrong = torch.randn(window - count, right.shape[1], generator=rng).to(right.dtype)
            drafts[name] = torch.cat([right, wrong])
        x = replace(x, num_accepted_tokens=torch.tensor([before], dtype=torch.int32), **drafts)
        result = implementation.decode(x)
        x = replace(x, state=_pool_like(result["state"], x.state), conv_state=result["conv_state"])
        for t in range(count):
            row = slice(place + t, place + t + 1)
            step = {name: getattr(truth, name)[row] for name in ("mixed_qkv", "a", "b")}
            single = implementation.decode(replace(one_by_one, **step))
            one_by_one = replace(
                one_by_one, state=_pool_like(single["state"], one_by_one.state), conv_state=single["conv_state"]
            )
            torch.testing.assert_close(result["out"][t], single["out"][0])
        place, before = place + count, count
    torch.testing.assert_close(x.state[x.state_indices[0, before - 1]], one_by_one.state[slot])
    # the next step's history starts at row `accepted - 1`
    assert torch.equal(x.conv_state[first, before - 1 : before + 2], one_by_one.conv_state[slot])


def _pool_like(values: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(pool.shape, pool.stride(), dtype=pool.dtype).copy_(values)


@DTYPES
def test_fused_convolution_equals_the_separate_one(
    implementation: Implementation, rng: torch.Generator, state_dtype: torch.dtype
) -> None:
    x = decode_inputs(rng, SMALL, 4, state_dtype=state_dtype, bias=True, padding=[2])
    fused = implementation.decode(x)
    cu, known = torch.arange(5, dtype=torch.int32), torch.ones(4, dtype=torch.bool)
    convolved, history = WORKING.gdn_causal_conv(
        x.mixed_qkv, x.conv_weight, x.conv_bias, x.conv_state, x.state_indices, known, cu
    )
    assert_same_bits(fused["conv_state"], history.to(x.conv_state.dtype))
    separate = replace(x, mixed_qkv=convolved.bfloat16(), conv_state=None, conv_weight=None, conv_bias=None)
    expected, working = (m.gdn_decode(**separate.arguments()) for m in (reference, WORKING))
    assert_close(fused["out"], expected[0], working[0])
    assert_states_close(fused["state"], x.state, expected[1], working[1])


def test_history_wider_than_needed_and_transposed(implementation: Implementation, rng: torch.Generator) -> None:
    """vLLM's speculative cache has more rows, its dim-first layout is a transposed view."""
    x = decode_inputs(rng, SMALL, 3, conv_rows=6)
    implementation.decode_checked(x)
    transposed = x.conv_state.transpose(1, 2).contiguous().transpose(1, 2)
    implementation.decode_checked(replace(x, conv_state=transposed))


def test_float32_history_and_weights(implementation: Implementation, rng: torch.Generator) -> None:
    x = decode_inputs(rng, SMALL, 3, bias=True)
    wide = {name: getattr(x, name).float() for name in ("conv_state", "conv_weight", "conv_bias", "a", "b", "dt_bias")}
    implementation.decode_checked(replace(x, **wide))


@CONV
def test_a_state_that_starts_anywhere(implementation: Implementation, rng: torch.Generator, conv: bool) -> None:
    """Two bf16 are one load only where all slots lie on such a boundary."""
    x = decode_inputs(rng, SMALL, 3, conv=conv, gap=1)
    assert x.state.stride(0) % 2 == 1
    implementation.decode_checked(x)


def test_weights_that_start_anywhere(implementation: Implementation, rng: torch.Generator) -> None:
    """Four weights are one load of eight bytes only where all of them lie on such a boundary."""
    x = decode_inputs(rng, SMALL, 3)
    apart = torch.full((x.conv_weight.numel() + 1,), torch.nan, dtype=torch.bfloat16)
    apart[1:] = x.conv_weight.flatten()
    wide = torch.full((len(x.conv_weight), 6), torch.nan, dtype=torch.bfloat16)
    wide[:, :4] = x.conv_weight
    for weight in (apart[1:].view(-1, 4), wide[:, :4]):
        implementation.decode_checked(replace(x, conv_weight=weight))


def test_a_convolution_slot_of_its_own(implementation: Implementation, rng: torch.Generator) -> None:
    x = decode_inputs(rng, SMALL, 3)
    conv_state = torch.randn(9, 3, SMALL.channels, generator=rng).bfloat16()
    own = torch.tensor([7, 0, 2], dtype=torch.int32)
    result = implementation.decode_checked(replace(x, conv_state=conv_state, conv_state_indices=own))
    assert (result["out"][1] == 0).all()


def test_rows_apart(implementation: Implementation, rng: torch.Generator) -> None:
    """Slices of wider projections, indices out of a block table."""
    x = decode_inputs(rng, SMALL, 4)

    def column_slice(y: torch.Tensor) -> torch.Tensor:
        wider = torch.full((len(y), y.shape[1] + 5), torch.nan, dtype=y.dtype)
        wider[:, 3 : 3 + y.shape[1]] = y
        return wider[:, 3 : 3 + y.shape[1]]

    table = torch.full((4, 7), 10_000, dtype=torch.int32)
    table[:, 0] = x.state_indices
    apart = {name: column_slice(getattr(x, name)) for name in ("mixed_qkv", "a", "b")}
    implementation.decode_checked(replace(x, state_indices=table[:, 0], **apart))


@pytest.mark.parametrize("gate", [-40.0, 30.0, 3e38], ids=["g to 0", "g very negative", "g to -inf"])
@pytest.mark.parametrize("update", [-1e4, 1e4], ids=["beta 0", "beta 1"])
def test_extreme_gates(implementation: Implementation, rng: torch.Generator, gate: float, update: float) -> None:
    x = decode_inputs(rng, SMALL, [1, 2], window=2, conv=False, state_dtype=torch.float32)
    x = replace(x, a=torch.full_like(x.a, gate), b=torch.full_like(x.b, update), A_log=x.A_log + 3)
    result = implementation.decode_checked(x)
    if gate == -40.0 and update == -1e4:
        slots = x.state_indices[:, 0].long()
        torch.testing.assert_close(result["state"][slots], x.state[slots])


def test_no_sequences_and_only_padding(implementation: Implementation, rng: torch.Generator) -> None:
    assert implementation.decode(decode_inputs(rng, SMALL, 0))["out"].shape == (0, 4, 32)
    x = decode_inputs(rng, SMALL, [2, 1], window=2, padding=[0, 1])
    assert (implementation.decode_checked(x)["out"] == 0).all()
    empty = decode_inputs(rng, SMALL, [0, 0])
    implementation.decode_checked(empty)


def test_rows_behind_the_last_sequence_are_left(implementation: Implementation, rng: torch.Generator) -> None:
    """A captured graph pads tokens without sequences."""
    x: DecodeInputs = decode_inputs(rng, SMALL, [2, 1, 2])
    out = implementation.decode(replace(x, cu_seqlens=x.cu_seqlens[:3], state_indices=x.state_indices[:2]))["out"]
    assert out[3:].isnan().all()
    assert out[:3].isfinite().all()


@contextmanager
def _configured(config: DecodeConfig) -> Iterator[None]:
    with arch.pretend("h200"), tables.override("gdn_decode", asdict(config)):
        yield


@pytest.fixture
def triton(device: torch.device) -> Implementation:
    return Implementation("triton", device)


# of the 64 rows of a query/key head; a block of 64 spans two value heads
SHAPES = [
    DecodeConfig(32, 2, 1),
    DecodeConfig(32, 1, 2, stages=2),
    DecodeConfig(32, 1, 2, stages=1, stream=True),
    DecodeConfig(32, 1, 2, stages=1, ahead=2, early=True),
    DecodeConfig(16, 1, 1, stages=1, ahead=2),
    DecodeConfig(16, 2, 1, stages=1, ahead=3),
    DecodeConfig(64, 1, 2),
    DecodeConfig(16, 1, 1),
]


@CONV
@DTYPES
@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_every_shape_of_blocks(triton: Implementation, rng: torch.Generator, config, state_dtype, conv: bool) -> None:
    x = decode_inputs(rng, SMALL, 3, state_dtype=state_dtype, conv=conv, bias=True, padding=[1])
    window = decode_inputs(rng, SMALL, [2, 3, 0, 1], window=3, accepted=True, state_dtype=state_dtype, conv=conv)
    with _configured(config):
        triton.decode_checked(x)
        triton.decode_checked(window)


def test_rows_of_three_value_heads_in_blocks(triton: Implementation, rng: torch.Generator) -> None:
    """96 rows: no power of two, though the convolution takes them at once."""
    x = decode_inputs(rng, Heads(2, 6, 16, 32), 3, bias=True)
    for config in (DecodeConfig(32, 1, 1), DecodeConfig(32, 3, 1), DecodeConfig(16, 2, 1)):
        with _configured(config):
            triton.decode_checked(x)


@DTYPES
def test_programs_that_share_a_head(triton: Implementation, rng: torch.Generator, state_dtype: torch.dtype) -> None:
    """All of them read the query's and key's history, one moves it on; and the counters end as they began."""
    single = decode_inputs(rng, SMALL, 4, state_dtype=state_dtype, bias=True, padding=[2])
    several = decode_inputs(rng, SMALL, [3, 1, 2], window=3, accepted=True, state_dtype=state_dtype)
    for x in (single, several):
        results = []
        for splits in (1, 4, 2):
            with _configured(DecodeConfig(16, splits, 1)):
                results.append(triton.decode_checked(x))
            counters = [c for known in op._arrivals.values() for c in known]
            assert counters
            assert not any(c.any() for c in counters)
        alone, *shared = results
        for result in shared:
            assert_same_bits(result["conv_state"], alone["conv_state"])
            if triton.device.type == "cpu":  # compiled, a walk may contract multiplications differently
                assert_same_bits(result["out"], alone["out"])
                assert_same_bits(result["state"], alone["state"])


def test_without_counters_one_program_owns_a_head(
    triton: Implementation, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_arrival_counters", lambda count, device: None)
    with _configured(DecodeConfig(16, 4, 1)):
        triton.decode_checked(decode_inputs(rng, SMALL, 3))


def test_counters_are_kept_and_never_allocated_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_arrivals", {})
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 7)
    first = op._arrival_counters(10, cpu)
    assert first is not None
    assert first.shape == (10,)
    assert first.dtype == torch.int32
    assert not first.any()
    assert op._arrival_counters(4, cpu) is first
    larger = op._arrival_counters(11, cpu)
    assert larger is not None
    assert larger.shape == (11,)
    assert op._arrivals[cpu][0] is first  # a captured graph may hold its address
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert op._arrival_counters(1, cuda) is None


@pytest.mark.gpu
@CONV
@DTYPES
@pytest.mark.parametrize("sequences", [2, 96])  # small and large to the search
def test_every_candidate(triton: Implementation, rng: torch.Generator, sequences: int, state_dtype, conv) -> None:
    """What a tuner may choose, at the model's head sizes."""
    heads = Heads(4, 8)
    x = decode_inputs(rng, heads, sequences, state_dtype=state_dtype, conv=conv, padding=[1])
    case = case_of(heads.H, heads.HV, heads.K, state_dtype, fused_conv=conv, multi_token=False)
    for config in decode_search_space(case, sequences, heads.V):
        with _configured(config):
            triton.decode_checked(x)


@pytest.mark.gpu
@CONV
def test_steps_that_are_launched_early(device: torch.device, rng: torch.Generator, conv: bool) -> None:
    """Captured steps on one state, each launched while the one before ends, leave what steps one by one leave."""
    heads, sequences = Heads(4, 8), 32
    arguments = decode_inputs(rng, heads, sequences, conv=conv, gap=0).arguments()
    left = []
    for pdl in (False, True):
        own = {name: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        out = torch.empty(sequences, heads.HV, heads.V, dtype=torch.bfloat16, device=device)
        pools = [own[name] for name in ("state", "conv_state") if name in own]
        before = [pool.clone() for pool in pools]
        run = partial(op.gdn_decode_triton, **own, out=out, config=DecodeConfig(16, 16, 2, stages=1, pdl=pdl))
        run()  # compiles, which a capture forbids
        for pool, values in zip(pools, before, strict=True):
            pool.copy_(values)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                run()
        graph.replay()
        left.append([out, *pools])
    for early, alone in zip(left[1], left[0], strict=True):
        assert_same_bits(early, alone)
