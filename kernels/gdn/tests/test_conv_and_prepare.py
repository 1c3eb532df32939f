"""gdn_causal_conv and gdn_prepare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blackwell_kernels.gdn import reference
from blackwell_kernels.gdn.inputs import Heads, conv_inputs, conv_prepare_inputs, prepare_inputs
from blackwell_kernels.gdn.oracles import WORKING, Implementation, assert_close, assert_same_bits

SMALL = Heads(H=2, HV=4, K=16, V=32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [8, 300])
def test_ragged_sequences(implementation: Implementation, rng: torch.Generator, bias: bool, channels: int) -> None:
    lengths = [1, 2, 3, 0, 4, 15, 16, 17, 33, 2]
    implementation.causal_conv_checked(conv_inputs(rng, channels, lengths, bias=bias, padding=[2, 6]))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_sequences(implementation: Implementation, rng: torch.Generator, known: bool, length: int) -> None:
    x = conv_inputs(rng, 8, [length])
    x.conv_state[int(x.state_indices[0])] = torch.randn(3, 8, generator=rng).bfloat16()
    implementation.causal_conv_checked(replace(x, has_initial_state=torch.tensor([known])))


def test_wider_history_and_transposed(implementation: Implementation, rng: torch.Generator) -> None:
    x = conv_inputs(rng, 24, [5, 2], rows=6)
    implementation.causal_conv_checked(x)
    implementation.causal_conv_checked(replace(x, conv_state=x.conv_state.transpose(1, 2).contiguous().transpose(1, 2)))


def test_split_anywhere(implementation: Implementation, rng: torch.Generator) -> None:
    whole = conv_inputs(rng, 8, [23])
    expected, state_after = reference.gdn_causal_conv(**whole.arguments())
    working, _ = WORKING.gdn_causal_conv(**whole.arguments())
    for cut in (1, 2, 16, 22):
        state, outs, known = whole.conv_state, [], whole.has_initial_state
        for rows in (slice(0, cut), slice(cut, 23)):
            cu = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
            piece = replace(whole, x=whole.x[rows], conv_state=state, has_initial_state=known, cu_seqlens=cu)
            result = implementation.causal_conv(piece)
            state, known = result["conv_state"], torch.tensor([True])
            outs.append(result["out"])
        assert_close(torch.cat(outs), expected, working)
        slot = int(whole.state_indices[0])
        assert torch.equal(state[slot].double(), state_after[slot])


def test_middle_of_a_batch(implementation: Implementation, rng: torch.Generator) -> None:
    """Rows outside cu_seqlens are neither read nor written, the last tokens of the sequence before included."""
    x = conv_inputs(rng, 16, [40, 20, 3, 8])
    middle = replace(
        x, cu_seqlens=x.cu_seqlens[1:4], state_indices=x.state_indices[1:3], has_initial_state=x.has_initial_state[1:3]
    )
    dead = x.x.clone()
    dead[:40], dead[63:] = torch.nan, torch.nan
    out = implementation.causal_conv(replace(middle, x=dead))["out"]
    assert out[:40].isnan().all()
    assert out[63:].isnan().all()
    expected, working = (m.gdn_causal_conv(**middle.arguments())[0][40:63] for m in (reference, WORKING))
    assert_close(out[40:63], expected, working)


def test_rows_apart(implementation: Implementation, rng: torch.Generator) -> None:
    x = conv_inputs(rng, 16, [9])
    wider = torch.full((9, 21), torch.nan, dtype=torch.bfloat16)
    wider[:, 2:18] = x.x
    implementation.causal_conv_checked(replace(x, x=wider[:, 2:18]))


def test_no_tokens(implementation: Implementation, rng: torch.Generator) -> None:
    implementation.causal_conv_checked(conv_inputs(rng, 8, [0, 0]))
    implementation.causal_conv_checked(conv_inputs(rng, 8, []))


@pytest.mark.parametrize("use_qk_l2norm", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 16, 35])
def test_prepare(implementation: Implementation, rng: torch.Generator, tokens: int, use_qk_l2norm: bool) -> None:
    x = replace(prepare_inputs(rng, SMALL, tokens), use_qk_l2norm=use_qk_l2norm)
    if tokens:
        x.mixed_qkv[0] = 0
    implementation.prepare_checked(x, SMALL)


def test_prepare_extreme_gates(implementation: Implementation, rng: torch.Generator) -> None:
    x = prepare_inputs(rng, SMALL, 5)
    a = torch.tensor([-1e3, -30.0, 19.9, 20.1, 1e4])[:, None].expand(5, 4).contiguous()
    b = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])[:, None].expand(5, 4).contiguous()
    result = implementation.prepare_checked(replace(x, a=a, b=b, dt_bias=torch.zeros(4)), SMALL)
    assert (result["g"] <= 0).all()
    assert result["beta"][0].eq(0).all()
    assert result["beta"][4].eq(1).all()


def test_prepare_slices_of_wider_projections(implementation: Implementation, rng: torch.Generator) -> None:
    x = prepare_inputs(rng, SMALL, 20)
    both = torch.cat([x.b, x.a], dim=1)
    wider = torch.cat([x.mixed_qkv, x.mixed_qkv], dim=1)[:, : SMALL.channels]
    implementation.prepare_checked(replace(x, mixed_qkv=wider, b=both[:, :4], a=both[:, 4:]), SMALL)


@pytest.mark.parametrize(
    ("heads", "bias"), [(SMALL, False), (Heads(H=1, HV=3, K=32, V=16), True), (Heads(H=5, HV=5), False)]
)
def test_prepare_convolves(implementation: Implementation, rng: torch.Generator, heads: Heads, bias: bool) -> None:
    """Lengths around the rows that are on their way and a program's; heads that leave its tile of channels ragged."""
    lengths = [1, 2, 3, 0, 4, 5, 15, 16, 17, 2] if heads.K < 128 else [18, 3]
    padding = [2, 6] if heads.K < 128 else []
    x = conv_prepare_inputs(rng, heads, lengths, bias=bias, padding=padding)
    implementation.prepare_checked(replace(x, use_qk_l2norm=bias or heads is SMALL), heads)


def test_prepare_convolves_any_layout(implementation: Implementation, rng: torch.Generator) -> None:
    """Slices of wider projections, weights apart in memory, a dim-first history, long blocks of tokens."""
    x = conv_prepare_inputs(rng, SMALL, [70, 34])
    assert x.conv_weight is not None
    assert x.conv_state is not None
    wider, both = torch.cat([x.mixed_qkv, x.mixed_qkv], dim=1), torch.cat([x.b, x.a], dim=1)
    weight = torch.zeros(SMALL.channels, 7, dtype=torch.bfloat16)[:, 1:5].copy_(x.conv_weight)
    state = x.conv_state.transpose(1, 2).contiguous().transpose(1, 2)
    views = {"mixed_qkv": wider[:, : SMALL.channels], "b": both[:, :4], "a": both[:, 4:]}
    implementation.prepare_checked(replace(x, conv_weight=weight, conv_state=state, **views), SMALL)


def test_prepare_convolves_the_middle_of_a_batch(implementation: Implementation, rng: torch.Generator) -> None:
    """Rows outside cu_seqlens are neither read nor written."""
    x = conv_prepare_inputs(rng, SMALL, [40, 20, 3, 8])
    assert x.cu_seqlens is not None
    assert x.state_indices is not None
    assert x.has_initial_state is not None
    dead = {name: getattr(x, name).clone() for name in ("mixed_qkv", "a", "b")}
    for y in dead.values():
        y[:40], y[63:] = torch.nan, torch.nan
    sequences = {"state_indices": x.state_indices[1:3], "has_initial_state": x.has_initial_state[1:3]}
    middle = replace(x, cu_seqlens=x.cu_seqlens[1:4], **sequences)
    whole, result = implementation.prepare(x, SMALL), implementation.prepare(replace(middle, **dead), SMALL)
    for name in ("q", "k", "v", "g", "beta"):
        assert result[name][:40].isnan().all()
        assert result[name][63:].isnan().all()
        torch.testing.assert_close(result[name][40:63], whole[name][40:63])
    slots = sequences["state_indices"].long()
    assert_same_bits(result["conv_state"][slots], whole["conv_state"][slots])


def test_prepare_convolves_no_tokens(implementation: Implementation, rng: torch.Generator) -> None:
    implementation.prepare_checked(conv_prepare_inputs(rng, SMALL, [0, 0]), SMALL)
    implementation.prepare_checked(conv_prepare_inputs(rng, SMALL, []), SMALL)
