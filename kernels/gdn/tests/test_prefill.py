"""gdn_prefill: ragged sequences around the chunk size, states carried over, hard gates, dead memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blackwell_kernels.gdn import config as configs
from blackwell_kernels.gdn import reference
from blackwell_kernels.gdn.inputs import Heads, PrefillInputs, prefill_inputs
from blackwell_kernels.gdn.oracles import Implementation, assert_close, assert_same_bits, chunked_prefill

SMALL = Heads(H=1, HV=2, K=16, V=32)
DTYPES = pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


@DTYPES
def test_lengths_around_the_chunk(implementation: Implementation, rng: torch.Generator, state_dtype) -> None:
    lengths = [1, 63, 0, 64, 65, 2, 128, 129, 0]
    implementation.prefill_checked(prefill_inputs(rng, SMALL, lengths, state_dtype=state_dtype, padding=[4, 5]))


@pytest.mark.parametrize("heads", [Heads(1, 1, 32, 16), Heads(2, 4, 16, 16), Heads(1, 3, 64, 64), Heads(1, 1)])
def test_heads(implementation: Implementation, rng: torch.Generator, heads: Heads) -> None:
    implementation.prefill_checked(prefill_inputs(rng, heads, [70, 3]))


@pytest.mark.parametrize("cut", [1, 40, 64, 149])
def test_split_anywhere_and_carry_the_state(implementation: Implementation, rng: torch.Generator, cut: int) -> None:
    whole = prefill_inputs(rng, SMALL, [150], state_dtype=torch.float32)
    state, outs = whole.state, []
    for rows, known in ((slice(0, cut), whole.has_initial_state), (slice(cut, 150), torch.tensor([True]))):
        part = {name: getattr(whole, name)[rows] for name in ("q", "k", "v", "g", "beta")}
        cu = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        piece = replace(whole, state=state, has_initial_state=known, cu_seqlens=cu, **part)
        result = implementation.prefill(piece)
        state = torch.empty_strided(state.shape, state.stride()).copy_(result["state"])
        outs.append(result["out"])
    expected, expected_state = reference.gdn_prefill(**whole.arguments())
    working, working_state = chunked_prefill(whole, implementation.rounded)
    assert_close(torch.cat(outs), expected, working)
    slot = int(whole.state_indices[0])
    assert_close(state[slot], expected_state[slot], working_state[slot])


@pytest.mark.parametrize(("state_dtype", "piece", "block_v", "heads"), [
    (torch.bfloat16, 256, 16, SMALL), (torch.float32, 192, 16, Heads(H=1, HV=1, K=32, V=16)),
    (torch.float32, 128, 32, SMALL), (torch.bfloat16, 128, 128, Heads(H=1, HV=1, K=128, V=128)),
])  # fmt: skip
def test_segments(
    implementation: Implementation, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch,
    state_dtype, piece, block_v, heads,
) -> None:  # fmt: skip
    """Sequences longer than a piece start from a carried state, shorter ones from their slots; two, three and more
    pieces, and none at all."""
    lengths = [390, 0, 64, 129, 1, 65, 300]
    config = configs.PrefillConfig(4, 168, block_v, 4, 3, piece)
    monkeypatch.setattr(configs, "prefill_config", lambda *_: config)
    implementation.prefill_checked(prefill_inputs(rng, heads, lengths, state_dtype=state_dtype, padding=[3, 6]))


def test_pieces_inside_a_larger_batch(
    implementation: Implementation, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places in the workspace are counted from where the first sequence starts."""
    config = configs.PrefillConfig(4, 168, 32, 4, 3, 128)
    monkeypatch.setattr(configs, "prefill_config", lambda *_: config)
    x = prefill_inputs(rng, SMALL, [200, 300, 500], state_dtype=torch.float32)
    slots, known = x.state_indices[1:], x.has_initial_state[1:]
    inside = replace(x, cu_seqlens=x.cu_seqlens[1:], state_indices=slots, has_initial_state=known)
    rows = {name: getattr(x, name)[200:] for name in ("q", "k", "v", "g", "beta")}
    alone = replace(inside, cu_seqlens=inside.cu_seqlens - 200, **rows)
    whole, part = implementation.prefill(inside), implementation.prefill(alone)
    assert whole["out"][:200].isnan().all()
    assert_same_bits(whole["out"][200:], part["out"])
    assert_same_bits(whole["state"], part["state"])


def test_a_row_for_one_long_sequence_serves_others() -> None:
    """A table's row says how long a piece is: shorter sequences stay whole, far longer ones get eight pieces."""
    config = configs.PrefillConfig(4, 168, 64, 4, 3, piece=1024)
    assert config.piece_of(4096) == 1024
    assert config.piece_of(65_536) == 8192
    assert config.piece_of(65_537) == 8256
    uncut = replace(config, piece=0)
    assert [uncut.piece_of(tokens) for tokens in (1, 64, 65, 65_536)] == [64, 64, 128, 65_536]


def test_pieces_with_hard_gates_and_repeated_keys(
    implementation: Implementation, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.PrefillConfig(4, 168, 32, 4, 3, 192)
    monkeypatch.setattr(configs, "prefill_config", lambda *_: config)
    x = prefill_inputs(rng, SMALL, [400], state_dtype=torch.float32)
    g = x.g.clone()
    g[[3, 130, 300]] = -torch.inf
    g[150:290] = 0.0
    implementation.prefill_checked(_with(x, g))
    key = torch.nn.functional.normalize(x.k[:1].float() + 0.15 * x.k.float(), dim=-1).bfloat16()
    implementation.prefill_checked(_with(replace(x, k=key), -1e-3, 0.95))


@pytest.mark.parametrize("heads", [(16, 32), (8, 16), (2, 4)])
@pytest.mark.parametrize(("tokens", "num_seqs"), [(64, 4), (256, 1), (2048, 1), (8192, 1), (6400, 4), (8192, 32)])
def test_the_search_space_is_small_and_fits(tokens: int, num_seqs: int, heads: tuple[int, int]) -> None:
    case = configs.prefill_case_of(*heads, 128, torch.bfloat16, num_seqs)
    space = configs.prefill_search_space(case, tokens, num_seqs, 128)
    assert 1 <= len(set(space)) == len(space) <= 12
    assert all(128 % config.block_v == 0 for config in space)
    assert any(config.piece_of(tokens) < tokens for config in space) == (tokens >= 1024 and num_seqs <= 4)
    assert all(config.piece % 64 == 0 for config in space)


def test_decode_continues_a_prefill(implementation: Implementation, rng: torch.Generator) -> None:
    """The last token through gdn_decode instead: both read and write the same pool."""
    x = prefill_inputs(rng, SMALL, [80], state_dtype=torch.float32)
    a, b = torch.randn(1, 2, generator=rng), torch.randn(1, 2, generator=rng)
    A_log, dt_bias = torch.zeros(2), torch.zeros(2)
    last_g, last_beta = reference.gates(a, b, A_log, dt_bias)
    x = replace(x, g=torch.cat([x.g[:79], last_g.float()]), beta=torch.cat([x.beta[:79], last_beta.float()]))
    head = {name: getattr(x, name)[:79] for name in ("q", "k", "v", "g", "beta")}
    before = implementation.prefill(replace(x, cu_seqlens=torch.tensor([0, 79], dtype=torch.int32), **head))
    device = torch.device("cpu") if implementation.name == "cpu" else implementation.device
    out, pool = torch.empty(1, 2, 32, dtype=torch.bfloat16, device=device), before["state"].to(device)
    mixed = torch.cat([y[79:].flatten(1) for y in (x.q, x.k, x.v)], dim=1)
    arguments = (y.to(device) for y in (mixed, a, b, A_log, dt_bias))
    slots = x.state_indices.to(device)
    implementation.function("gdn_decode")(*arguments, pool, slots, out, scale=x.scale, use_qk_l2norm=False)
    expected, expected_state = reference.gdn_prefill(**x.arguments())
    working, working_state = chunked_prefill(x, implementation.rounded)
    assert_close(torch.cat([before["out"], out.cpu()]), expected, working)
    slot = int(x.state_indices[0])
    assert_close(pool[slot].cpu(), expected_state[slot], working_state[slot])


def _with(x: PrefillInputs, g: torch.Tensor | float | None = None, beta: float | None = None) -> PrefillInputs:
    if g is not None:
        x = replace(x, g=torch.full_like(x.g, g) if isinstance(g, float) else g)
    return x if beta is None else replace(x, beta=torch.full_like(x.beta, beta))


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("g", [0.0, -1e-7, -30.0, -1e4, -torch.inf])
def test_extreme_gates(implementation: Implementation, rng: torch.Generator, g: float, beta: float) -> None:
    x = _with(prefill_inputs(rng, SMALL, [70, 5], state_dtype=torch.float32), g, beta)
    result = implementation.prefill_checked(x)
    if beta == 0.0:
        # nothing is written: only what was there decays
        fresh = x.state_indices[~x.has_initial_state].long()
        assert (result["state"][fresh] == 0).all()


def test_forgetting_in_the_middle(implementation: Implementation, rng: torch.Generator) -> None:
    """-inf, very negative and zero gates side by side: differences of running sums must not become NaN."""
    x = prefill_inputs(rng, SMALL, [100], state_dtype=torch.float32)
    g = x.g.clone()
    g[[3, 63, 64, 80]] = -torch.inf
    g[[10, 11, 90]] = -500.0
    g[20:30] = 0.0
    implementation.prefill_checked(_with(x, g))


def test_repeated_keys(implementation: Implementation, rng: torch.Generator) -> None:
    """One key, beta 1, no decay: the inverse is bidiagonal, where a series of powers cancels 10^17 against itself."""
    x = prefill_inputs(rng, SMALL, [128], state_dtype=torch.float32)
    key = torch.zeros_like(x.k)
    key[..., 3] = 1.0
    implementation.prefill_checked(_with(replace(x, k=key), 0.0, 1.0))


def test_nearly_repeated_keys(implementation: Implementation, rng: torch.Generator) -> None:
    x = prefill_inputs(rng, SMALL, [96], state_dtype=torch.float32)
    key = torch.nn.functional.normalize(x.k[:1].float() + 0.15 * x.k.float(), dim=-1).bfloat16()
    implementation.prefill_checked(_with(replace(x, k=key), -0.01, 0.95))


def test_normalisation_inside(implementation: Implementation, rng: torch.Generator) -> None:
    x = prefill_inputs(rng, SMALL, [70, 9])
    q, k = x.q * 3, x.k * 0.2
    q[5] = 0
    implementation.prefill_checked(replace(x, q=q, k=k, use_qk_l2norm=True))


def test_packed_views_and_wide_indices(implementation: Implementation, rng: torch.Generator) -> None:
    """q, k and v as views of one packed tensor; int64 cu_seqlens; slots out of a block table."""
    x = prefill_inputs(rng, Heads(2, 4, 16, 16), [66, 4])
    packed = torch.cat([y.flatten(1) for y in (x.q, x.k, x.v)], dim=1)
    q, k, v = (y.unflatten(1, (-1, 16)) for y in packed.split([32, 32, 64], dim=1))
    table = torch.full((2, 5), 10_000, dtype=torch.int32)
    table[:, 0] = x.state_indices
    implementation.prefill_checked(replace(x, q=q, k=k, v=v, cu_seqlens=x.cu_seqlens.long(), state_indices=table[:, 0]))


def test_sequences_inside_a_larger_batch(implementation: Implementation, rng: torch.Generator) -> None:
    """cu_seqlens of the middle of a batch: rows outside are neither read nor written."""
    x = prefill_inputs(rng, SMALL, [130, 70, 5, 40])
    dead = {name: getattr(x, name).clone() for name in ("q", "k", "v", "g", "beta")}
    for y in dead.values():
        y[:130], y[205:] = torch.nan, torch.nan
    middle = replace(
        x, cu_seqlens=x.cu_seqlens[1:4], state_indices=x.state_indices[1:3], has_initial_state=x.has_initial_state[1:3]
    )
    result = implementation.prefill(replace(middle, **dead))
    assert result["out"][:130].isnan().all()
    assert result["out"][205:].isnan().all()
    expected, working = (
        reference.gdn_prefill(**middle.arguments())[0],
        chunked_prefill(middle, implementation.rounded)[0],
    )
    assert_close(result["out"][130:205], expected[130:205], working[130:205])


def test_many_short_sequences(implementation: Implementation, rng: torch.Generator) -> None:
    """More sequences than the search for a chunk's sequence looks at in one go."""
    lengths = [(0, 1, 0, 2)[i % 4] for i in range(140)]
    implementation.prefill_checked(prefill_inputs(rng, Heads(1, 1, 16, 16), lengths))


def test_slots_of_other_sequences_keep_their_bits(implementation: Implementation, rng: torch.Generator) -> None:
    x = prefill_inputs(rng, SMALL, [5, 0, 3])
    result = implementation.prefill(x)
    untouched = torch.ones(len(x.state), dtype=torch.bool)
    untouched[x.state_indices[[0, 2]].long()] = False
    assert_same_bits(result["state"][untouched], x.state[untouched])
    assert result["state"][~untouched].isfinite().all()


def test_no_tokens(implementation: Implementation, rng: torch.Generator) -> None:
    for lengths in ([], [0, 0]):
        x = prefill_inputs(rng, SMALL, lengths)
        assert_same_bits(implementation.prefill(x)["state"], x.state)
