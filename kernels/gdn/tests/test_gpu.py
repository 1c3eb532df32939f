"""What only a GPU can show: the model's own shapes, graphs, repeatability, large offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from blackwell_kernels import gdn
from blackwell_kernels.common.testing.generators import cu_seqlens
from blackwell_kernels.gdn.inputs import (
    Heads,
    conv_prepare_inputs,
    decode_inputs,
    prefill_inputs,
    prepare_inputs,
)
from blackwell_kernels.gdn.oracles import Implementation, assert_same_bits

pytestmark = pytest.mark.gpu

MODEL = Heads()
TP4 = Heads(4, 8)
DTYPES = pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


@pytest.fixture
def triton(device: torch.device) -> Implementation:
    return Implementation("triton", device)


@DTYPES
@pytest.mark.parametrize("sequences", [1, 7, 64])
@pytest.mark.parametrize("heads", [MODEL, TP4, Heads(2, 4)])
def test_decode_shapes(triton: Implementation, rng: torch.Generator, heads: Heads, sequences: int, state_dtype) -> None:
    for conv in (False, True):
        x = decode_inputs(rng, heads, sequences, state_dtype=state_dtype, conv=conv, padding=[sequences - 1])
        triton.decode_checked(x)


@DTYPES
def test_speculative_shapes(triton: Implementation, rng: torch.Generator, state_dtype: torch.dtype) -> None:
    lengths = [4, 4, 1, 0, 3, 4, 2, 4]
    triton.decode_checked(decode_inputs(rng, MODEL, lengths, window=4, accepted=True, state_dtype=state_dtype))


@DTYPES
@pytest.mark.parametrize("lengths", [[1000], [300, 1, 0, 64, 129, 511], [65] * 9])
def test_prefill_shapes(triton: Implementation, rng: torch.Generator, lengths: list[int], state_dtype) -> None:
    triton.prefill_checked(prefill_inputs(rng, TP4, lengths, state_dtype=state_dtype))


def test_prefill_of_the_model(triton: Implementation, rng: torch.Generator) -> None:
    triton.prefill_checked(prefill_inputs(rng, MODEL, [200, 70], padding=[1]))


def test_prepare_shapes(triton: Implementation, rng: torch.Generator) -> None:
    triton.prepare_checked(prepare_inputs(rng, MODEL, 1025), MODEL)
    triton.prepare_checked(conv_prepare_inputs(rng, MODEL, [500, 1, 0, 2, 4097], padding=[3]), MODEL)


def test_long_sequence_equals_its_pieces(triton: Implementation, rng: torch.Generator) -> None:
    """8,192 tokens at once, and in pieces that end on chunk boundaries: the same dots in the same order."""
    x = prefill_inputs(rng, TP4, [8192], state_dtype=torch.float32)
    x = replace(x, has_initial_state=torch.tensor([False]))
    whole = triton.prefill(x)
    state, outs = x.state, []
    for start in range(0, 8192, 2048):
        part = {name: getattr(x, name)[start : start + 2048] for name in ("q", "k", "v", "g", "beta")}
        known = torch.tensor([start > 0])
        piece = replace(x, state=state, has_initial_state=known, cu_seqlens=cu_seqlens([2048]), **part)
        result = triton.prefill(piece)
        state = torch.empty_strided(state.shape, state.stride()).copy_(result["state"])
        outs.append(result["out"])
    assert_same_bits(torch.cat(outs), whole["out"])
    slot = int(x.state_indices[0])
    assert_same_bits(state[slot], whole["state"][slot])


def test_sixty_four_thousand_tokens_do_not_drift(triton: Implementation, rng: torch.Generator) -> None:
    """Decays so slow that a state remembers tens of thousands of tokens, and what was carried before them."""
    x = prefill_inputs(rng, Heads(1, 2), [65_536], state_dtype=torch.float32)
    triton.prefill_checked(replace(x, g=x.g * 1e-4, has_initial_state=torch.tensor([False])))


def _repeatedly(run: Callable[[], list[torch.Tensor]], times: int = 50) -> None:
    first = run()
    for _ in range(times - 1):
        for x, y in zip(run(), first, strict=True):
            assert_same_bits(x, y)


def test_fifty_repeats_give_the_same_bits(triton: Implementation, rng: torch.Generator) -> None:
    decode = decode_inputs(rng, MODEL, [4, 2, 4, 1], window=4, accepted=True)
    _repeatedly(lambda: list(triton.decode(decode).values()))
    single = decode_inputs(rng, MODEL, 32)
    _repeatedly(lambda: list(triton.decode(single).values()))
    prefill = prefill_inputs(rng, MODEL, [300, 65, 1])
    _repeatedly(lambda: list(triton.prefill(prefill).values()))
    in_pieces = prefill_inputs(rng, TP4, [8192])
    _repeatedly(lambda: list(triton.prefill(in_pieces).values()))
    prepare = conv_prepare_inputs(rng, MODEL, [300, 2, 17])
    _repeatedly(lambda: list(triton.prepare(prepare, MODEL).values()))


def test_slots_beyond_two_to_the_31_elements(device: torch.device, rng: torch.Generator) -> None:
    """A pool whose last slot starts past 2^32 bytes and 2^31 elements."""
    heads = Heads(1, 2)
    size = heads.HV * heads.V * heads.K
    slots = 2**31 // size + 3
    x = decode_inputs(rng, heads, 2, conv=False)
    pool = torch.empty(slots, heads.HV, heads.V, heads.K, dtype=torch.bfloat16, device=device)
    far = torch.tensor([slots - 1, slots - 2], dtype=torch.int32, device=device)
    pool[far.long()] = x.state[x.state_indices.long()].to(device)
    out = torch.empty(2, heads.HV, heads.V, dtype=torch.bfloat16, device=device)
    inputs = [y.to(device) for y in (x.mixed_qkv, x.a, x.b, x.A_log, x.dt_bias)]
    gdn.gdn_decode(*inputs, pool, far, out, scale=x.scale)
    near = Implementation("triton", device).decode(x)
    assert_same_bits(out.cpu(), near["out"])
    assert_same_bits(pool[far.long()].cpu(), near["state"][x.state_indices.long()])


def test_a_captured_graph_follows_its_inputs(device: torch.device, rng: torch.Generator) -> None:
    """Capture once, replay 100 times with other contents at the same addresses: equal to eager calls, bit for bit."""
    sequences, slots = 16, 40
    draws = [decode_inputs(rng, TP4, sequences, gap=0) for _ in range(4)]
    fixed = ("mixed_qkv", "a", "b", "state_indices")
    static = {name: getattr(draws[0], name).to(device).clone() for name in fixed}
    weights = {name: getattr(draws[0], name).to(device) for name in ("A_log", "dt_bias", "conv_weight")}
    state = torch.randn(slots, TP4.HV, TP4.V, TP4.K, generator=rng).bfloat16().to(device)
    history = torch.randn(slots, 3, TP4.channels, generator=rng).bfloat16().to(device)
    out = torch.empty(sequences, TP4.HV, TP4.V, dtype=torch.bfloat16, device=device)

    def call(pool: torch.Tensor, conv_state: torch.Tensor, result: torch.Tensor) -> None:
        gdn.gdn_decode(**static, **weights, state=pool, conv_state=conv_state, out=result, scale=TP4.K**-0.5)

    call(state.clone(), history.clone(), out)
    eager_state, eager_history, eager_out = state.clone(), history.clone(), out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(state, history, out)
    for replay in range(100):
        draw = draws[replay % 4]
        for name in fixed:
            static[name].copy_(getattr(draw, name))
        if replay % 3 == 0:
            static["state_indices"][replay % sequences :] = 0
        call(eager_state, eager_history, eager_out)
        graph.replay()
        assert_same_bits(out, eager_out)
    assert_same_bits(state, eager_state)
    assert_same_bits(history, eager_history)


def test_a_captured_prefill_follows_its_inputs(device: torch.device, rng: torch.Generator) -> None:
    """The same for prefill: other tokens, slots and lengths, of as many sequences and tokens."""
    draws = [prefill_inputs(rng, TP4, lengths, gap=0) for lengths in ([2000, 48, 0], [1, 63, 1984], [700, 600, 748])]
    fixed = ("q", "k", "v", "g", "beta", "state_indices", "has_initial_state", "cu_seqlens")
    static = {name: getattr(draws[0], name).to(device).clone() for name in fixed}
    state = torch.randn(8, TP4.HV, TP4.V, TP4.K, generator=rng).bfloat16().to(device)
    out = torch.empty(2048, TP4.HV, TP4.V, dtype=torch.bfloat16, device=device)

    def call(pool: torch.Tensor, result: torch.Tensor) -> None:
        gdn.gdn_prefill(**static, state=pool, out=result, scale=TP4.K**-0.5)

    call(state.clone(), out)
    eager_state, eager_out = state.clone(), out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(state, out)
    for replay in range(100):
        for name in fixed:
            static[name].copy_(getattr(draws[replay % 3], name))
        call(eager_state, eager_out)
        graph.replay()
        assert_same_bits(out, eager_out)
    assert_same_bits(state, eager_state)
