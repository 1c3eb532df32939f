"""Input checks of the Gated Delta Net operators: everything the host can know, before any launch.

Contents of index tensors are checked on the CPU (`values`); on a GPU that would cost a synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from blackwell_kernels.common.checks import check_tensor, describe, once_per_layout, require

_FLOATS = (torch.bfloat16, torch.float32)
_INDICES = (torch.int32, torch.int64)
_BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Dims:
    """Heads and sizes of a call. max_steps: tokens a sequence may have (decode with state_indices [B, S]: S)."""

    num_seqs: int
    H: int
    HV: int
    K: int
    V: int
    max_steps: int = 1


@once_per_layout
def check_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    out: torch.Tensor,
    conv_state: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> Dims:
    """Raises: UnsupportedInputError."""
    op = "gdn_decode"
    check_tensor(op, "state", state, shape=[None] * 4, dtype=_FLOATS)
    _, HV, V, K = state.shape
    check_tensor(op, "mixed_qkv", mixed_qkv, shape=[None, None], dtype=torch.bfloat16)
    tokens, channels = mixed_qkv.shape
    H = _key_heads(op, channels, HV, V, K, "state")
    _check_state(op, state)
    _check_gate_inputs(op, a, b, A_log, dt_bias, tokens, HV)
    check_tensor(op, "out", out, shape=[tokens, HV, V], dtype=torch.bfloat16)
    packed = tokens == 0 or out.stride()[1:] == (V, 1)
    require(packed, op, f"out with strides {out.stride()}", f"out with strides (any, {V}, 1)", "allocate out packed")

    check_tensor(op, "state_indices", state_indices, dtype=torch.int32, last_dim_contiguous=False)
    shape = list(state_indices.shape)
    require(
        len(shape) == 1 or (len(shape) == 2 and cu_seqlens is not None),
        op,
        f"state_indices of shape {shape}" + (" without cu_seqlens" if cu_seqlens is None else ""),
        "[sequences], or [sequences, steps] with cu_seqlens",
        "pass cu_seqlens for several tokens a sequence",
    )
    num_seqs = shape[0]
    max_steps = shape[1] if len(shape) == 2 else (1 if cu_seqlens is None else 2**31 - 1)
    require(max_steps > 0, op, f"state_indices of shape {shape}", "at least one column", "pass a slot for each step")
    if cu_seqlens is None:
        fix = "pass one slot for each row of mixed_qkv, or cu_seqlens"
        require(num_seqs == tokens, op, f"{num_seqs} slots for {tokens} tokens", "one token a sequence", fix)
    else:
        check_tensor(op, "cu_seqlens", cu_seqlens, shape=[num_seqs + 1], dtype=_INDICES)
    if num_accepted_tokens is not None:
        check_tensor(op, "num_accepted_tokens", num_accepted_tokens, shape=[num_seqs], dtype=torch.int32)
        require(
            len(shape) == 2,
            op,
            f"num_accepted_tokens with state_indices of shape {shape}",
            "state_indices [sequences, steps]",
            "pass the slot of each step of the step before",
        )

    require(
        (conv_state is None) == (conv_weight is None) and not (conv_weight is None and conv_bias is not None),
        op,
        f"conv_state {describe(conv_state)}, conv_weight {describe(conv_weight)}, conv_bias {describe(conv_bias)}",
        "conv_state and conv_weight together (conv_bias optional), or none of them",
        "pass both to fuse the convolution",
    )
    if conv_weight is not None and conv_state is not None:
        rows = 3 if num_accepted_tokens is None else max_steps + 2
        _check_conv(op, conv_state, conv_weight, conv_bias, channels, rows)
    if conv_state_indices is not None:
        fix = "pass conv_state and conv_weight too"
        require(conv_weight is not None, op, "conv_state_indices alone", "them with a fused convolution", fix)
        check_tensor(
            op,
            "conv_state_indices",
            conv_state_indices,
            shape=[num_seqs],
            dtype=torch.int32,
            last_dim_contiguous=False,
        )
    _check_device(
        op, mixed_qkv, a=a, b=b, A_log=A_log, dt_bias=dt_bias, state=state, state_indices=state_indices, out=out,
        conv_state=conv_state, conv_weight=conv_weight, conv_bias=conv_bias, cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens, conv_state_indices=conv_state_indices,
    )  # fmt: skip
    return Dims(num_seqs, H, HV, K, V, max_steps)


@once_per_layout
def check_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
) -> Dims:
    """Raises: UnsupportedInputError."""
    op = "gdn_prefill"
    check_tensor(op, "q", q, shape=[None] * 3, dtype=torch.bfloat16)
    tokens, H, K = q.shape
    check_tensor(op, "k", k, shape=[tokens, H, K], dtype=torch.bfloat16)
    check_tensor(op, "v", v, shape=[tokens, None, None], dtype=torch.bfloat16)
    HV, V = v.shape[1:]
    _check_groups(op, H, HV)
    check_tensor(op, "out", out, shape=[tokens, HV, V], dtype=torch.bfloat16)
    check_tensor(op, "g", g, shape=[tokens, HV], dtype=torch.float32)
    check_tensor(op, "beta", beta, shape=[tokens, HV], dtype=torch.float32)
    check_tensor(op, "state", state, shape=[None, HV, V, K], dtype=_FLOATS)
    _check_state(op, state)
    num_seqs = _check_sequences(op, state_indices, has_initial_state, cu_seqlens)
    _check_device(
        op, q, k=k, v=v, g=g, beta=beta, state=state, state_indices=state_indices,
        has_initial_state=has_initial_state, cu_seqlens=cu_seqlens, out=out,
    )  # fmt: skip
    return Dims(num_seqs, H, HV, K, V)


@once_per_layout
def check_prepare(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    conv_state: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Dims:
    """Raises: UnsupportedInputError."""
    op = "gdn_prepare"
    check_tensor(op, "mixed_qkv", mixed_qkv, shape=[None, None], dtype=torch.bfloat16)
    tokens, channels = mixed_qkv.shape
    check_tensor(op, "q", q, shape=[tokens, None, None], dtype=torch.bfloat16)
    check_tensor(op, "v", v, shape=[tokens, None, None], dtype=torch.bfloat16)
    (H, K), (HV, V) = q.shape[1:], v.shape[1:]
    _check_groups(op, H, HV)
    sizes = f"2 x {H} x {K} + {HV} x {V} = {2 * H * K + HV * V} channels"
    fix = "allocate q and v with the heads of mixed_qkv"
    require(channels == 2 * H * K + HV * V, op, f"mixed_qkv = {describe(mixed_qkv)}", sizes, fix)
    check_tensor(op, "k", k, shape=[tokens, H, K], dtype=torch.bfloat16)
    for name, x, packed in (("q", q, K), ("k", k, K), ("v", v, V)):
        ok = tokens == 0 or x.stride()[1:] == (packed, 1)
        supported = f"{name} with strides (any, {packed}, 1)"
        require(ok, op, f"{name} with strides {x.stride()}", supported, f"allocate {name} packed")
    check_tensor(op, "g", g, shape=[tokens, HV], dtype=torch.float32)
    check_tensor(op, "beta", beta, shape=[tokens, HV], dtype=torch.float32)
    _check_gate_inputs(op, a, b, A_log, dt_bias, tokens, HV)
    _check_device(op, mixed_qkv, a=a, b=b, A_log=A_log, dt_bias=dt_bias, q=q, k=k, v=v, g=g, beta=beta)
    conv = {
        "conv_state": conv_state, "conv_weight": conv_weight, "state_indices": state_indices,
        "has_initial_state": has_initial_state, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    given = [name for name, x in conv.items() if x is not None]
    if not given and conv_bias is None:
        return Dims(0, H, HV, K, V)
    asked, fix = f"{', '.join(given)} of {', '.join(conv)}", "pass all of them to fuse the convolution"
    require(len(given) == len(conv), op, asked, "all of them (conv_bias optional), or none", fix)
    assert conv_state is not None
    assert conv_weight is not None
    assert state_indices is not None
    assert has_initial_state is not None
    assert cu_seqlens is not None
    _check_conv(op, conv_state, conv_weight, conv_bias, channels, 3)
    num_seqs = _check_sequences(op, state_indices, has_initial_state, cu_seqlens)
    _check_device(op, mixed_qkv, conv_bias=conv_bias, **conv)
    return Dims(num_seqs, H, HV, K, V)


def check_triton_dims(op: str, dims: Dims) -> None:
    """Raises: UnsupportedInputError for head sizes that the Triton kernels are not written for."""
    fix = "use the CPU implementation or stock vLLM for this model"
    ok = dims.K in _BLOCKS and dims.V in _BLOCKS
    require(ok, op, f"head sizes K = {dims.K}, V = {dims.V}", f"each one of {_BLOCKS}", fix)


def check_values(
    op: str,
    cu_seqlens: torch.Tensor | None,
    tokens: int,
    slots: int,
    *indices: torch.Tensor | None,
    max_steps: int | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
) -> None:
    """Contents of index tensors, which only a CPU call can afford to read. Raises: UnsupportedInputError."""
    for index in indices:
        if index is not None and index.numel():
            top = int(index.max())
            require(top < slots, op, f"slot {top}", f"slots below {slots} (<= 0: padding)", "check the block table")
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        ordered = all(x <= y for x, y in pairwise(bounds)) and bounds[0] >= 0
        fix = "pass the running sum of the lengths"
        supported = f"ascending values in 0..{tokens}"
        require(ordered and bounds[-1] <= tokens, op, f"cu_seqlens = {bounds}", supported, fix)
        longest = max([y - x for x, y in pairwise(bounds)], default=0)
        if max_steps is not None:
            fix = "pass a column of state_indices for each step"
            require(longest <= max_steps, op, f"{longest} tokens in a sequence", f"at most {max_steps}", fix)
    if num_accepted_tokens is not None and max_steps is not None and num_accepted_tokens.numel():
        low, high = int(num_accepted_tokens.min()), int(num_accepted_tokens.max())
        fix = "pass how many tokens of the step before were accepted (at least 1)"
        require(low >= 1 and high <= max_steps, op, f"num_accepted_tokens {low}..{high}", f"1..{max_steps}", fix)


def _key_heads(op: str, channels: int, HV: int, V: int, K: int, source: str) -> int:
    H, rest = divmod(channels - HV * V, 2 * K) if K else (0, 1)
    require(
        rest == 0 and H > 0,
        op,
        f"mixed_qkv with {channels} channels and {source} of {HV} heads of V = {V}, K = {K}",
        "2 H K + HV V channels",
        "pass q, k and v packed in this order",
    )
    _check_groups(op, H, HV)
    return H


def _check_groups(op: str, H: int, HV: int) -> None:
    fix = "split heads so that every value head keeps its query/key head"
    ok = H > 0 and HV > 0 and HV % H == 0
    require(ok, op, f"{H} query/key heads and {HV} value heads", "HV a multiple of H", fix)


def _check_state(op: str, state: torch.Tensor) -> None:
    _, _, V, K = state.shape
    ok = state.shape[0] == 0 or state.stride()[1:] == (V * K, K, 1)
    supported = f"strides (any, {V * K}, {K}, 1): slots may be apart, a slot is packed"
    require(ok, op, f"state with strides {state.stride()}", supported, "keep [HV, V, K] of a slot contiguous")


def _check_gate_inputs(
    op: str, a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, tokens: int, HV: int
) -> None:
    check_tensor(op, "a", a, shape=[tokens, HV], dtype=_FLOATS)
    check_tensor(op, "b", b, shape=[tokens, HV], dtype=_FLOATS)
    check_tensor(op, "A_log", A_log, shape=[HV], dtype=_FLOATS)
    check_tensor(op, "dt_bias", dt_bias, shape=[HV], dtype=_FLOATS)


def _check_conv(
    op: str, conv_state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channels: int, rows: int
) -> None:
    # any strides: vLLM's dim-first layout is a transposed view
    check_tensor(op, "conv_state", conv_state, shape=[None, None, channels], dtype=_FLOATS, last_dim_contiguous=False)
    fix = "pass [slots, rows, channels] (transpose a dim-first cache)"
    have = conv_state.shape[1]
    require(have >= rows, op, f"conv_state with {have} rows", f"at least {rows} rows for these tokens", fix)
    check_tensor(op, "conv_weight", weight, shape=[channels, 4], dtype=_FLOATS)
    if bias is not None:
        check_tensor(op, "conv_bias", bias, shape=[channels], dtype=_FLOATS)


def _check_sequences(
    op: str, state_indices: torch.Tensor, has_initial_state: torch.Tensor, cu_seqlens: torch.Tensor
) -> int:
    check_tensor(op, "state_indices", state_indices, shape=[None], dtype=torch.int32, last_dim_contiguous=False)
    num_seqs = state_indices.shape[0]
    check_tensor(op, "has_initial_state", has_initial_state, shape=[num_seqs], dtype=torch.bool)
    check_tensor(op, "cu_seqlens", cu_seqlens, shape=[num_seqs + 1], dtype=_INDICES)
    return num_seqs


def _check_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, x in others.items():
        if x is not None:
            check_tensor(op, name, x, device=first.device, last_dim_contiguous=False)
