"""gdn_prepare, with its convolution and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blackwell_kernels.gdn.inputs import Heads, conv_prepare_inputs, prepare_inputs
from blackwell_kernels.gdn.oracles import Implementation, assert_same_bits

SMALL = Heads(H=2, HV=4, K=16, V=32)


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


@pytest.mark.parametrize("known", [False, True])
def test_prepare_convolves_less_than_a_history(
    implementation: Implementation, rng: torch.Generator, known: bool
) -> None:
    """A sequence of one or two tokens keeps some of its history: what there was, or zeros."""
    x = conv_prepare_inputs(rng, SMALL, [1, 2, 3, 4])
    assert x.conv_state is not None
    assert x.state_indices is not None
    x.conv_state[x.state_indices.long()] = torch.randn(4, 3, SMALL.channels, generator=rng).bfloat16()
    implementation.prepare_checked(replace(x, has_initial_state=torch.full((4,), known)), SMALL)


def test_prepare_convolves_pieces_as_the_whole(implementation: Implementation, rng: torch.Generator) -> None:
    """A sequence may be cut anywhere: the history carries it on."""
    x = conv_prepare_inputs(rng, SMALL, [23])
    whole = implementation.prepare(x, SMALL)
    for cut in (1, 2, 16, 22):
        state, known, pieces = x.conv_state, x.has_initial_state, []
        for rows in (slice(0, cut), slice(cut, 23)):
            tokens = {name: getattr(x, name)[rows] for name in ("mixed_qkv", "a", "b")}
            cu = torch.tensor([0, len(tokens["a"])], dtype=torch.int32)
            piece = replace(x, conv_state=state, has_initial_state=known, cu_seqlens=cu, **tokens)
            pieces.append(implementation.prepare(piece, SMALL))
            state, known = pieces[-1]["conv_state"], torch.tensor([True])
        for name in ("q", "k", "v", "g", "beta"):
            torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), whole[name])
        assert_same_bits(state, whole["conv_state"])


def test_prepare_convolves_any_layout(implementation: Implementation, rng: torch.Generator) -> None:
    """Slices of wider projections, weights apart in memory, a wide and dim-first history, long blocks of tokens."""
    x = conv_prepare_inputs(rng, SMALL, [70, 34], rows=6)
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
