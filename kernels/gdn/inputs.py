"""Seeded inputs of the Gated Delta Net operators for tests, tuning and benchmarks: valid, and as unfriendly as allowed.

Slots are permuted, apart in memory unless told otherwise, and NaN where nobody may look. Fields are named as the
operators' arguments; `arguments()` leaves out what is None. Outputs are the caller's to allocate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from blackwell_kernels.common.testing.generators import cu_seqlens, normal, unit_rows


@dataclass(frozen=True)
class Heads:
    """H query/key heads of K channels, HV value heads of V channels."""

    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128

    @property
    def channels(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V


class _Arguments:
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operator and of its reference (which has no out)."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class DecodeInputs(_Arguments):
    """See gdn_decode_triton in op.py."""

    mixed_qkv: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    state: torch.Tensor
    state_indices: torch.Tensor
    scale: float
    use_qk_l2norm: bool = True
    conv_state: torch.Tensor | None = None
    conv_weight: torch.Tensor | None = None
    conv_bias: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    num_accepted_tokens: torch.Tensor | None = None
    conv_state_indices: torch.Tensor | None = None


@dataclass(frozen=True)
class PrefillInputs(_Arguments):
    """See gdn_prefill_triton in op.py."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    state: torch.Tensor
    state_indices: torch.Tensor
    has_initial_state: torch.Tensor
    cu_seqlens: torch.Tensor
    scale: float
    use_qk_l2norm: bool = False


@dataclass(frozen=True)
class PrepareInputs(_Arguments):
    """See gdn_prepare_triton in op.py."""

    mixed_qkv: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    use_qk_l2norm: bool = True
    conv_state: torch.Tensor | None = None
    conv_weight: torch.Tensor | None = None
    conv_bias: torch.Tensor | None = None
    state_indices: torch.Tensor | None = None
    has_initial_state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None


def state_pool(
    rng: torch.Generator, used: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, gap: int = 48
) -> torch.Tensor:
    """[slots, *shape], `gap` elements between slots, random where `used` names a slot, NaN elsewhere."""
    slots, size = shape[0], torch.Size(shape[1:]).numel()
    strides = (size + gap, *torch.empty(tuple(shape[1:]), device="meta").stride())
    pool = torch.full((slots * (size + gap),), torch.nan, dtype=dtype).as_strided(tuple(shape), strides)
    for slot in {int(s) for s in used.flatten()}:
        if slot > 0:
            pool[slot] = torch.randn(tuple(shape[1:]), generator=rng).to(dtype)
    return pool


def slots_for(
    rng: torch.Generator, shape: Sequence[int], padding: Sequence[int] = (), spare: int = 2
) -> tuple[torch.Tensor, int]:
    """Distinct shuffled slots, int32 of `shape`, those of the sequences in `padding` <= 0; and the size of the pool."""
    count = torch.Size(shape).numel()
    indices = (1 + torch.randperm(count + spare, generator=rng)[:count]).view(tuple(shape)).to(torch.int32)
    for place, i in enumerate(padding):
        indices[i] = -(place % 2)
    return indices, count + spare + 1


def decode_inputs(
    rng: torch.Generator,
    heads: Heads,
    lengths: int | Sequence[int],
    *,
    state_dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    accepted: bool = False,
    conv: bool = True,
    bias: bool = False,
    conv_rows: int | None = None,
    padding: Sequence[int] = (),
    gap: int = 48,
) -> DecodeInputs:
    """lengths: a number of sequences of one token each, or the number of tokens of each sequence.

    window: columns of state_indices (None: one slot a sequence); accepted: with num_accepted_tokens; conv_rows: of
    conv_state, by default as many as needed.
    """
    seqs = lengths if isinstance(lengths, int) else len(lengths)
    tokens = lengths if isinstance(lengths, int) else sum(lengths)
    indices, slots = slots_for(rng, (seqs,) if window is None else (seqs, window), padding)
    more: dict[str, Any] = {}
    if not isinstance(lengths, int):
        more["cu_seqlens"] = cu_seqlens(lengths)
    if accepted:
        assert window is not None
        more["num_accepted_tokens"] = torch.randint(1, window + 1, (seqs,), generator=rng).to(torch.int32)
    if conv:
        rows = conv_rows or (3 if window is None else window + 2)
        first = indices if window is None else indices[:, 0]
        more["conv_state"] = state_pool(rng, first, (slots, rows, heads.channels), torch.bfloat16, gap)
        more["conv_weight"] = normal((heads.channels, 4), rng) * 0.5
        more["conv_bias"] = normal((heads.channels,), rng) * 0.1 if bias else None
    return DecodeInputs(
        mixed_qkv=normal((tokens, heads.channels), rng),
        a=normal((tokens, heads.HV), rng),
        b=normal((tokens, heads.HV), rng),
        A_log=torch.rand(heads.HV, generator=rng) * 3 - 1,
        dt_bias=normal((heads.HV,), rng),
        state=state_pool(rng, indices, (slots, heads.HV, heads.V, heads.K), state_dtype, gap),
        state_indices=indices,
        scale=heads.K**-0.5,
        **more,
    )


def prefill_inputs(
    rng: torch.Generator,
    heads: Heads,
    lengths: Sequence[int],
    *,
    state_dtype: torch.dtype = torch.bfloat16,
    padding: Sequence[int] = (),
    gap: int = 48,
) -> PrefillInputs:
    """q and k of length 1; decays between 0.3 and 1 a token, as trained models have."""
    tokens, seqs = sum(lengths), len(lengths)
    indices, slots = slots_for(rng, (seqs,), padding)
    known = torch.rand(seqs, generator=rng) < 0.6
    return PrefillInputs(
        q=unit_rows((tokens, heads.H, heads.K), rng),
        k=unit_rows((tokens, heads.H, heads.K), rng),
        v=normal((tokens, heads.HV, heads.V), rng),
        g=-1.2 * torch.rand(tokens, heads.HV, generator=rng).square(),
        beta=torch.rand(tokens, heads.HV, generator=rng),
        state=state_pool(rng, indices[known], (slots, heads.HV, heads.V, heads.K), state_dtype, gap),
        state_indices=indices,
        has_initial_state=known,
        cu_seqlens=cu_seqlens(lengths),
        scale=heads.K**-0.5,
    )


def prepare_inputs(rng: torch.Generator, heads: Heads, tokens: int) -> PrepareInputs:
    """What the convolution leaves for gdn_prepare."""
    return PrepareInputs(
        mixed_qkv=normal((tokens, heads.channels), rng),
        a=normal((tokens, heads.HV), rng),
        b=normal((tokens, heads.HV), rng),
        A_log=torch.rand(heads.HV, generator=rng) * 3 - 1,
        dt_bias=normal((heads.HV,), rng),
    )


def conv_prepare_inputs(
    rng: torch.Generator,
    heads: Heads,
    lengths: Sequence[int],
    *,
    bias: bool = False,
    rows: int = 3,
    padding: Sequence[int] = (),
    gap: int = 48,
) -> PrepareInputs:
    """gdn_prepare with the convolution in it. rows: of conv_state, of which three are used."""
    indices, slots = slots_for(rng, (len(lengths),), padding)
    known = torch.rand(len(lengths), generator=rng) < 0.6
    return replace(
        prepare_inputs(rng, heads, sum(lengths)),
        conv_weight=normal((heads.channels, 4), rng) * 0.5,
        conv_bias=normal((heads.channels,), rng) * 0.1 if bias else None,
        conv_state=state_pool(rng, indices[known], (slots, rows, heads.channels), torch.bfloat16, gap),
        state_indices=indices,
        has_initial_state=known,
        cu_seqlens=cu_seqlens(lengths),
    )
