"""Gated Delta Net in float64: one token after another, nothing fused, nothing chunked. Frozen: tests compare with it.

Per value head, with a state S of shape [V, K]:
    S <- exp(g) S;   u = beta (v - S k);   S <- S + u k^T;   o = scale S q
    g = -exp(A_log) softplus(a + dt_bias),   beta = sigmoid(b)
Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), the recurrent form; slots, padding and the
rolling of the convolution's state are vLLM's (0.24.0 and 0.32.0: causal_conv1d_update, causal_conv1d_fn,
fused_sigmoid_gating_delta_rule_update, fused_recurrent_gated_delta_rule_packed_decode).

Every function is plain torch and refers to nothing but torch and the functions above it, so that a benchmark
definition can carry this file's text. Inputs of any float dtype; results float64, new tensors (nothing in place).
Value head j reads query/key head j // (HV // H).
"""

import torch


def gates(a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor):
    """a, b [T, HV]; A_log, dt_bias [HV] -> log decay g [T, HV] (<= 0), update strength beta [T, HV] (0..1).

    softplus(x) is x above 20, as in vLLM (the difference is e^-20).
    """
    x = a.double() + dt_bias.double()
    g = -A_log.double().exp() * torch.where(x > 20.0, x, x.clamp(max=20.0).exp().log1p())
    return g, b.double().sigmoid()


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension."""
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_step(q, k, v, g, beta, state, scale: float):
    """One token: q, k [..., H, K]; v [..., HV, V]; g, beta [..., HV]; state [..., HV, V, K] -> (out, new state)."""
    group = v.shape[-2] // k.shape[-2]
    q = q.double().repeat_interleave(group, dim=-2)
    k = k.double().repeat_interleave(group, dim=-2)
    state = state.double() * g.double().exp()[..., None, None]
    u = beta.double()[..., None] * (v.double() - torch.einsum("...vk,...k->...v", state, k))
    state = state + u[..., :, None] * k[..., None, :]
    return scale * torch.einsum("...vk,...k->...v", state, q), state


def gdn_prepare(mixed_qkv, a, b, A_log, dt_bias, num_k_heads: int, head_k_dim: int, use_qk_l2norm: bool = True):
    """mixed_qkv [T, 2 H K + HV V] (after the convolution) -> q, k [T, H, K], v [T, HV, V], g, beta [T, HV]."""
    tokens, key_dim = mixed_qkv.shape[0], num_k_heads * head_k_dim
    q, k, v = mixed_qkv.double().split([key_dim, key_dim, mixed_qkv.shape[1] - 2 * key_dim], dim=-1)
    q, k = q.reshape(tokens, num_k_heads, head_k_dim), k.reshape(tokens, num_k_heads, head_k_dim)
    if use_qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    g, beta = gates(a, b, A_log, dt_bias)
    return q, k, v.unflatten(1, (A_log.shape[0], -1)), g, beta


def causal_conv_step(window: torch.Tensor, weight: torch.Tensor, bias):
    """window [4, C]: the three tokens before and the token itself -> silu(sum_j weight[:, j] window[j] + bias)."""
    y = (window.double() * weight.double().t()).sum(0)
    if bias is not None:
        y = y + bias.double()
    return y * y.sigmoid()


def gdn_causal_conv(x, weight, bias, conv_state, state_indices, has_initial_state, cu_seqlens):
    """Four-tap causal convolution and silu over ragged sequences: x [T, C] -> (out [T, C], new conv_state).

    Row j of a slot (j = 0..2) is the token 3 - j before the sequence's next one. Without an initial state the history
    is zero. A slot <= 0 is padding: no history, nothing stored. A sequence of no tokens leaves its slot as it is.
    """
    out, conv_state = torch.zeros(x.shape, dtype=torch.float64, device=x.device), conv_state.double().clone()
    bounds = cu_seqlens.tolist()
    for i, slot in enumerate(state_indices.tolist()):
        bos, eos = bounds[i], bounds[i + 1]
        if bos == eos:
            continue
        history = torch.zeros(3, x.shape[1], dtype=torch.float64, device=x.device)
        if slot > 0 and bool(has_initial_state[i]):
            history = conv_state[slot, :3]
        tokens = torch.cat([history, x[bos:eos].double()])
        for t in range(bos, eos):
            out[t] = causal_conv_step(tokens[t - bos : t - bos + 4], weight, bias)
        if slot > 0:
            conv_state[slot, :3] = tokens[-3:]
    return out, conv_state


def gdn_prefill(q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, scale, use_qk_l2norm=False):
    """Ragged sequences: q, k [T, H, K]; v [T, HV, V]; g, beta [T, HV]; state [slots, HV, V, K] -> (out, new state).

    The initial state is the slot's where has_initial_state, else zero; the final one goes to the slot. A slot <= 0 is
    padding: zero initial state, nothing stored. A sequence of no tokens leaves its slot as it is.
    """
    if use_qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    out, state = torch.zeros(v.shape, dtype=torch.float64, device=v.device), state.double().clone()
    bounds = cu_seqlens.tolist()
    for i, slot in enumerate(state_indices.tolist()):
        bos, eos = bounds[i], bounds[i + 1]
        if bos == eos:
            continue
        s = state[slot] if slot > 0 and bool(has_initial_state[i]) else torch.zeros_like(state[0])
        for t in range(bos, eos):
            out[t], s = delta_step(q[t], k[t], v[t], g[t], beta[t], s, scale)
        if slot > 0:
            state[slot] = s
    return out, state


def gdn_decode(
    mixed_qkv,
    a,
    b,
    A_log,
    dt_bias,
    state,
    state_indices,
    scale,
    use_qk_l2norm=True,
    conv_state=None,
    conv_weight=None,
    conv_bias=None,
    cu_seqlens=None,
    num_accepted_tokens=None,
    conv_state_indices=None,
):
    """A few tokens for each sequence, states in slots -> (out [N, HV, V], new state, new conv_state or None).

    Without cu_seqlens each row of mixed_qkv [N, 2 H K + HV V] is a sequence. state_indices [B] names the slot read and
    written; state_indices [B, S] names where the state after step t goes, and the initial state is read from column
    num_accepted_tokens[i] - 1 (column 0 without it). With conv_weight the tokens first pass the convolution, whose
    history is in slot conv_state_indices[i] (default: column 0 of state_indices):
      - without num_accepted_tokens, in rows 0..2, which afterwards hold the last three tokens;
      - with it, in rows m .. m + 2 where m = num_accepted_tokens[i] - 1: the rows written by the step before, of which
        m + 1 tokens were accepted. Afterwards the slot holds rows m + 1 and m + 2 and then the new tokens.
    A sequence whose initial slot (or convolution slot) is <= 0 is padding: out is 0 and nothing is stored. A step whose
    slot is <= 0 is computed and not stored.
    """
    num_v_heads, head_v_dim, head_k_dim = state.shape[1:]
    num_k_heads = (mixed_qkv.shape[1] - num_v_heads * head_v_dim) // (2 * head_k_dim)
    out = torch.zeros(len(mixed_qkv), num_v_heads, head_v_dim, dtype=torch.float64, device=state.device)
    state = state.double().clone()
    conv_state = None if conv_state is None else conv_state.double().clone()
    bounds = range(len(mixed_qkv) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    for i, slots in enumerate(state_indices.tolist()):
        x = mixed_qkv[bounds[i] : bounds[i + 1]].double()
        steps = len(x)
        slots = slots if isinstance(slots, list) else [slots] * max(steps, 1)
        accepted = 1 if num_accepted_tokens is None else int(num_accepted_tokens[i])
        conv_slot = slots[0] if conv_state_indices is None else int(conv_state_indices[i])
        if steps == 0 or slots[accepted - 1] <= 0 or (conv_weight is not None and conv_slot <= 0):
            continue
        if conv_weight is not None:
            tokens = torch.cat([conv_state[conv_slot, accepted - 1 : accepted + 2], x])
            x = torch.stack([causal_conv_step(tokens[t : t + 4], conv_weight, conv_bias) for t in range(steps)])
            rolled = tokens[-3:] if num_accepted_tokens is None else tokens[1:]
            conv_state[conv_slot, : len(rolled)] = rolled
        rows = slice(bounds[i], bounds[i + 1])
        q, k, v, g, beta = gdn_prepare(x, a[rows], b[rows], A_log, dt_bias, num_k_heads, head_k_dim, use_qk_l2norm)
        s = state[slots[accepted - 1]]
        for t in range(steps):
            out[bounds[i] + t], s = delta_step(q[t], k[t], v[t], g[t], beta[t], s, scale)
            if slots[t] > 0:
                state[slots[t]] = s
    return out, state, conv_state


def contest_decode(q, k, v, state, A_log, a, dt_bias, b, scale):
    """FlashInfer-Bench gdn_decode_*_k_last: q, k [B, 1, H, K]; v [B, 1, HV, V]; state [B, HV, V, K] f32 or None.

    q and k are used as they come (not normalised). Returns output [B, 1, HV, V] bf16, new_state [B, HV, V, K] f32.
    """
    if state is None:
        state = torch.zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3], device=v.device)
    g, beta = gates(a[:, 0], b[:, 0], A_log, dt_bias)
    out, new_state = delta_step(q[:, 0], k[:, 0], v[:, 0], g, beta, state, scale or k.shape[-1] ** -0.5)
    return out[:, None].to(torch.bfloat16), new_state.float()


def contest_prefill(q, k, v, state, A_log, a, dt_bias, b, cu_seqlens, scale):
    """FlashInfer-Bench gdn_prefill_*_k_last: q, k [T, H, K]; v [T, HV, V]; state [B, HV, V, K] f32 or None.

    q and k are used as they come (not normalised). Returns output [T, HV, V] bf16, new_state [B, HV, V, K] f32.
    """
    count = len(cu_seqlens) - 1
    if state is None:
        state = torch.zeros(count, v.shape[1], v.shape[2], k.shape[2], device=v.device)
    # the pool's slot 0 is padding, so sequence i lives in slot i + 1
    pool = torch.cat([torch.zeros_like(state[:1]), state])
    slots = torch.arange(1, count + 1, device=v.device)
    g, beta = gates(a, b, A_log, dt_bias)
    out, pool = gdn_prefill(
        q, k, v, g, beta, pool, slots, torch.ones_like(slots), cu_seqlens, scale or k.shape[-1] ** -0.5
    )
    return out.to(torch.bfloat16), pool[1:].float()
