"""The reference against other formulations, and its text as a benchmark definition carries it."""

from __future__ import annotations

import inspect

import pytest
import torch

from blackwell_kernels.common.testing.compare import relative_error
from blackwell_kernels.gdn import reference
from blackwell_kernels.gdn.inputs import Heads, conv_prepare_inputs, decode_inputs, prefill_inputs
from blackwell_kernels.gdn.oracles import chunked

SMALL = Heads(H=2, HV=4, K=8, V=16)


def contest_inputs(rng: torch.Generator, tokens: int, heads: Heads) -> dict[str, torch.Tensor]:
    x = prefill_inputs(rng, heads, [tokens])
    gate = torch.randn(tokens, heads.HV, generator=rng).bfloat16()
    return {
        "q": x.q, "k": x.k, "v": x.v, "A_log": torch.randn(heads.HV, generator=rng), "a": gate,
        "dt_bias": torch.randn(heads.HV, generator=rng), "b": gate.flip(0),
    }  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_recurrence_equals_the_chunked_formula(rng: torch.Generator, chunk: int) -> None:
    x = prefill_inputs(rng, SMALL, [130])
    start = torch.randn(4, 16, 8, generator=rng, dtype=torch.float64)
    out, state = chunked(x.q, x.k, x.v, x.g, x.beta, start, x.scale, chunk=chunk)
    pool = torch.stack([torch.zeros_like(start), start])
    slot, known = torch.tensor([1]), torch.tensor([True])
    expected, expected_pool = reference.gdn_prefill(
        x.q, x.k, x.v, x.g, x.beta, pool, slot, known, x.cu_seqlens, x.scale
    )
    assert relative_error(out, expected) < 1e-12
    assert relative_error(state, expected_pool[1]) < 1e-12


def test_a_key_written_with_beta_one_reads_back_its_value() -> None:
    """The delta rule's definition: a value stored under one of orthonormal keys comes back, the latest of two."""
    k = torch.eye(8).view(8, 1, 8)
    v = torch.randn(9, 1, 16, dtype=torch.float64)
    keys = torch.cat([k, k[:1]])
    queries = torch.cat([k, k[:1]])
    ones, zeros = torch.ones(9, 1), torch.zeros(9, 1)
    pool = torch.zeros(2, 1, 16, 8)
    out, pool = reference.gdn_prefill(
        queries, keys, v, zeros, ones, pool, torch.tensor([1]), torch.tensor([False]), torch.tensor([0, 9]), 1.0
    )
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(pool[1, 0, :, 0], v[8, 0])
    torch.testing.assert_close(pool[1, 0, :, 1], v[1, 0])


def test_convolution_equals_conv1d(rng: torch.Generator) -> None:
    x = conv_prepare_inputs(rng, Heads(1, 1, 4, 4), [7, 2], bias=True)
    weight, bias, known = x.conv_weight, x.conv_bias, torch.tensor([True, False])
    x.conv_state[x.state_indices.long()] = torch.randn(2, 3, 12, generator=rng).bfloat16()
    out, state = reference.gdn_causal_conv(
        x.mixed_qkv, weight, bias, x.conv_state, x.state_indices, known, x.cu_seqlens
    )
    for i, (bos, eos) in enumerate([(0, 7), (7, 9)]):
        slot = int(x.state_indices[i])
        history = x.conv_state[slot].double() * known[i]
        tokens = torch.cat([history, x.mixed_qkv[bos:eos].double()])
        y = torch.nn.functional.conv1d(tokens.T[None], weight.double()[:, None], bias.double(), groups=12)[0].T
        torch.testing.assert_close(out[bos:eos], torch.nn.functional.silu(y))
        assert torch.equal(state[slot], tokens[-3:])


def test_softplus_threshold() -> None:
    g, _ = reference.gates(torch.tensor([[19.0, 21.0]]), torch.zeros(1, 2), torch.zeros(2), torch.zeros(2))
    torch.testing.assert_close(g, -torch.nn.functional.softplus(torch.tensor([[19.0, 21.0]]).double()))
    assert g[0, 1] == -21.0


def test_decode_step_by_step_equals_prefill(rng: torch.Generator) -> None:
    """Convolution, preparation and recurrence over a sequence, and the same one token at a time."""
    heads, tokens = SMALL, 9
    x = decode_inputs(rng, heads, [tokens], conv=True, bias=True, state_dtype=torch.float32)
    conv, state = x.conv_state.double(), x.state.double()
    y, conv_after = reference.gdn_causal_conv(
        x.mixed_qkv, x.conv_weight, x.conv_bias, conv, x.state_indices, torch.tensor([True]), x.cu_seqlens
    )
    q, k, v, g, beta = reference.gdn_prepare(y, x.a, x.b, x.A_log, x.dt_bias, heads.H, heads.K)
    expected, state_after = reference.gdn_prefill(
        q, k, v, g, beta, state, x.state_indices, torch.tensor([True]), x.cu_seqlens, x.scale
    )
    for t in range(tokens):
        row = slice(t, t + 1)
        step = {**x.arguments(), "mixed_qkv": x.mixed_qkv[row], "a": x.a[row], "b": x.b[row]}
        step |= {"state": state, "conv_state": conv, "cu_seqlens": None}
        out, state, conv = reference.gdn_decode(**step)
        torch.testing.assert_close(out[0], expected[t])
    torch.testing.assert_close(state, state_after, equal_nan=True)
    torch.testing.assert_close(conv, conv_after, equal_nan=True)


def test_text_stands_alone_and_serves_the_contest_definitions(rng: torch.Generator) -> None:
    """A benchmark definition gets the text: torch must be all it needs."""
    namespace: dict = {}
    exec(inspect.getsource(reference), namespace)
    heads = Heads(H=4, HV=8, K=16, V=16)
    x = contest_inputs(rng, 5, heads)
    start = torch.randn(5, 8, 16, 16, generator=rng)
    batch = {name: x[name][:, None] if name in "qkvab" else x[name] for name in x}
    out, new = namespace["contest_decode"](state=start, scale=0.0, **batch)
    assert (out.shape, out.dtype, new.dtype) == ((5, 1, 8, 16), torch.bfloat16, torch.float32)
    cu = torch.arange(6)
    out_prefill, new_prefill = namespace["contest_prefill"](state=start, cu_seqlens=cu, scale=0.25, **x)
    assert torch.equal(out[:, 0], out_prefill)
    assert torch.equal(new, new_prefill)
    # without a state: from zero, here one sequence of five tokens
    out_zero, _ = namespace["contest_prefill"](state=None, cu_seqlens=cu[::5], scale=None, **x)
    first = {name: value[:1] if name in "qkvab" else value for name, value in batch.items()}
    assert torch.equal(namespace["contest_decode"](state=None, scale=None, **first)[0][0, 0], out_zero[0])
