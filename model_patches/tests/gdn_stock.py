"""vLLM's own GDN layer core, from its released source, over plain torch stand-ins for its GPU kernels.

The stand-ins follow the kernels' documented meaning token by token, in float32 with bf16 where the kernels round, and
share no code with our operators.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

H, HV, D, SLOTS = 1, 2, 128, 12
CHANNELS = 2 * H * D + HV * D


def l2norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def step(state, q, k, v, g, beta):
    """One token of the delta rule: state [HV, V, K] in place, q and k [HV, K], v [HV, V] -> [HV, V]."""
    state *= g.exp()[:, None, None]
    u = beta[:, None] * (v - torch.einsum("hvk,hk->hv", state, k))
    state += u[:, :, None] * k[:, None, :]
    return torch.einsum("hvk,hk->hv", state, q)


def conv_token(history, x, weight):
    """history [3, C] before x [C] -> silu of the 4-tap convolution, rounded as the kernel stores it."""
    taps = torch.cat([history.float(), x.float()[None]])
    return F.silu((taps * weight.float().T).sum(0)).to(x.dtype)


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, conv_state_indices=None, num_accepted_tokens=None,
    query_start_loc=None, max_query_len=-1, validate_data=False,
):  # fmt: skip
    """conv_state [slots, C, rows] as vLLM passes it; rolled by one token, or by a speculative window."""
    bounds = range(len(x) + 1) if query_start_loc is None else query_start_loc.tolist()
    for i, slot in enumerate(conv_state_indices.tolist()):
        tokens = range(bounds[i], bounds[i + 1])
        if slot == 0 or not len(tokens):
            continue
        rows = conv_state[slot].T  # [rows, C]
        m = 0 if num_accepted_tokens is None else int(num_accepted_tokens[i]) - 1
        old = rows[m : m + 3].clone()
        window = torch.cat([old, x[tokens.start : tokens.stop].clone()])
        for t in tokens:
            x[t] = conv_token(window[t - tokens.start : t - tokens.start + 3], x[t].clone(), weight)
        if num_accepted_tokens is None:
            rows[:3] = window[-3:]
        else:
            rows[: len(window) - 1] = window[1:]
    return x


def causal_conv1d_fn(
    x, weight, bias, activation, conv_states, has_initial_state, cache_indices, query_start_loc, metadata
):  # fmt: skip
    x = x.T
    lens = query_start_loc.diff().tolist()
    programs = metadata.nums_dict[8]
    expected = [i for i, n in enumerate(lens) for _ in range(-(-n // 8))]
    offsets = [j for n in lens for j in range(-(-n // 8))]
    assert programs["tot"] == len(expected) == programs["mlist_len"]
    for lists in (
        programs,
        {"batch_ptr": metadata.batch_ptr, "token_chunk_offset_ptr": metadata.token_chunk_offset_ptr},
    ):
        assert lists["batch_ptr"][: len(expected)].tolist() == expected
        assert lists["token_chunk_offset_ptr"][: len(expected)].tolist() == offsets
    out = torch.empty_like(x)
    for i, slot in enumerate(cache_indices.tolist()):
        a, b = query_start_loc[i : i + 2].tolist()
        if a == b or slot == 0:
            continue
        rows = conv_states[slot].T
        old = rows[:3].clone() if has_initial_state[i] else torch.zeros(3, x.shape[1], dtype=x.dtype)
        window = torch.cat([old, x[a:b]])
        for t in range(a, b):
            out[t] = conv_token(window[t - a : t - a + 3], x[t], weight)
        rows[:3] = window[-3:]
    return out.T


def gates(A_log, dt_bias, a, b):
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g, b.float().sigmoid()


def fused_post_conv_prep(conv_output, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, **_):
    q, k, v = (part.float() for part in conv_output.split([H * D, H * D, HV * D], -1))
    q, k = (l2norm(x.unflatten(-1, (H, D))).to(conv_output.dtype) for x in (q, k))
    return (q, k, v.unflatten(-1, (HV, D)).to(conv_output.dtype), *gates(A_log, dt_bias, a, b))


def recurrent(A_log, a, b, dt_bias, q, k, v, initial_state, cu_seqlens, slots, accepted=None):
    out = torch.zeros(v.shape[1:], dtype=q.dtype)
    g, beta = gates(A_log, dt_bias, a, b)
    q, k = (l2norm(x[0].float()).repeat_interleave(HV // H, 1) for x in (q, k))
    for i in range(len(cu_seqlens) - 1):
        start, end = cu_seqlens[i : i + 2].tolist()
        row = slots[i : i + 1] if slots.dim() == 1 else slots[i]
        first = int(row[0 if accepted is None else int(accepted[i]) - 1])
        if start == end or first <= 0:
            continue
        state = initial_state[first].float()
        for t in range(start, end):
            out[t] = step(state, q[t] * D**-0.5, k[t], v[0, t].float(), g[t], beta[t]).to(out.dtype)
            target = int(row[0 if slots.dim() == 1 else t - start])
            if target > 0:
                initial_state[target] = state.to(initial_state.dtype)
    return out[None], initial_state


def fused_sigmoid_gating_delta_rule_update(
    A_log, a, b, dt_bias, q, k, v, initial_state, inplace_final_state, cu_seqlens, ssm_state_indices,
    num_accepted_tokens=None, use_qk_l2norm_in_kernel=False,
):  # fmt: skip
    slots = ssm_state_indices[: len(cu_seqlens) - 1]
    return recurrent(A_log, a, b, dt_bias, q, k, v, initial_state, cu_seqlens, slots, num_accepted_tokens)


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel
):
    q, k, v = mixed_qkv.split([H * D, H * D, HV * D], -1)
    heads = (q.unflatten(-1, (H, D))[None], k.unflatten(-1, (H, D))[None], v.unflatten(-1, (HV, D))[None])
    cu = torch.arange(len(mixed_qkv) + 1)
    done, _ = recurrent(A_log, a, b, dt_bias, *heads, initial_state, cu, ssm_state_indices)
    out[:, 0] = done[0]


def chunk_gated_delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, **_):
    """q, k [1, T, H, D] normalised, g the log decay; initial_state [B, HV, V, K], the final one is returned."""
    q, k = (x[0].float().repeat_interleave(HV // H, 1) for x in (q, k))
    out, final = torch.empty(v.shape, dtype=q.dtype), initial_state.float().clone()
    for i in range(len(cu_seqlens) - 1):
        for t in range(*cu_seqlens[i : i + 2].tolist()):
            out[0, t] = step(final[i], q[t] * D**-0.5, k[t], v[0, t].float(), g[0, t], beta[0, t])
    return out.to(v.dtype), final


NAMESPACE: dict[str, Any] = {
    "torch": torch,
    "is_conv_state_dim_first": lambda: False,
    "causal_conv1d_update": causal_conv1d_update,
    "causal_conv1d_fn": causal_conv1d_fn,
    "fused_post_conv_prep": fused_post_conv_prep,
    "fused_sigmoid_gating_delta_rule_update": fused_sigmoid_gating_delta_rule_update,
    "fused_recurrent_gated_delta_rule_packed_decode": fused_recurrent_gated_delta_rule_packed_decode,
}


def prepare_layer(layer: Any, seed: int = 0, spec_rows: int = 0) -> None:
    """Give an object of the extracted class what `_forward_core` reads of a layer."""
    r = torch.Generator().manual_seed(seed)
    layer.prefix, layer.tp_size, layer.activation = "model.layers.0.linear_attn", 1, "silu"
    layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim = H, HV, D, D
    layer.key_dim, layer.value_dim, layer.conv_kernel_size = H * D, HV * D, 4
    layer.enable_packed_recurrent_decode = True
    weight = torch.randn(CHANNELS, 1, 4, generator=r).to(torch.bfloat16) / 2
    layer.conv1d = SimpleNamespace(weight=weight, bias=None)
    layer.A_log, layer.dt_bias = torch.rand(HV, generator=r), torch.rand(HV, generator=r).to(torch.bfloat16)
    layer.kv_cache = (
        torch.randn(SLOTS, 3 + spec_rows, CHANNELS, generator=r).to(torch.bfloat16),
        (torch.randn(SLOTS, HV, D, D, generator=r) / 8).to(torch.bfloat16),
    )
    layer.chunk_gated_delta_rule, layer.num_spec = chunk_gated_delta_rule, spec_rows
    layer.get_state_dtype = lambda: (torch.bfloat16, torch.bfloat16)


def programs(lens: list[int]) -> dict[str, Any]:
    """The convolution's program list as vLLM's metadata builder makes it, -1 padded."""
    sequence = [i for i, n in enumerate(lens) for _ in range(-(-n // 8))]
    offset = [j for n in lens for j in range(-(-n // 8))]
    pad = [-1] * 5
    return {
        "nums": torch.tensor([-(-n // 8) for n in lens]),
        "tot": len(sequence),
        "mlist": torch.tensor(sequence),
        "mlist_len": len(sequence),
        "offsetlist": torch.tensor(offset),
        "batch_ptr": torch.tensor(sequence + pad, dtype=torch.int32),
        "token_chunk_offset_ptr": torch.tensor(offset + pad, dtype=torch.int32),
    }
