"""Gated Delta Net in fp32 torch, batched: what the operators run on a CPU.

Decode loops over the steps of a speculative window (a handful), never over sequences. Prefill is chunked: with
G the running sum of g inside a chunk of 64 tokens and D_ij = exp(G_i - G_j) for j <= i,
    (I + tril(beta_i D_ij k_i.k_j, -1)) [w u] = [beta exp(G) k,  beta v]
    v' = u - w S^T;   out = scale (exp(G) q S^T + tril(D q k^T) v');   S <- exp(G_last) S + (exp(G_last - G) v')^T k
The first line is done for all chunks at once, the second chunk after chunk for all sequences at once.
Arguments are those of the operators (op.py), already validated.
"""

from __future__ import annotations

import torch

CHUNK = 64
_MIN_LOG_DECAY = -120.0  # exp(-120) is 0 in fp32; a bound keeps -inf - -inf out of the differences of running sums


def _l2_normalise(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    g = -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())  # threshold 20, as in vLLM
    return g, b.float().sigmoid()


def _split(mixed_qkv: torch.Tensor, num_v_heads: int, head_v_dim: int, head_k_dim: int) -> list[torch.Tensor]:
    value_dim = num_v_heads * head_v_dim
    key_dim = (mixed_qkv.shape[1] - value_dim) // 2
    q, k, v = mixed_qkv.float().split([key_dim, key_dim, value_dim], dim=-1)
    return [q.unflatten(-1, (-1, head_k_dim)), k.unflatten(-1, (-1, head_k_dim)), v.unflatten(-1, (-1, head_v_dim))]


def _conv_taps(taps: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """taps: four [T, C], oldest first -> silu(conv) [T, C] fp32."""
    y = taps[0].float() * weight[:, 0].float()
    for j in (1, 2, 3):
        y.addcmul_(taps[j].float(), weight[:, j].float())
    if bias is not None:
        y += bias.float()
    return torch.nn.functional.silu(y, inplace=True)


def _sequence_of_token(cu_seqlens: torch.Tensor) -> torch.Tensor:
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """gdn_prepare's: the convolved tokens of the sequences, in x's dtype; the histories in conv_state are replaced."""
    lengths, slots, seqs = cu_seqlens.diff().long(), state_indices.long(), len(state_indices)
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    use = has_initial_state.bool() & (slots > 0)
    # each sequence behind its three rows of history, one after the other: taps are then slices of the whole
    begin = cu_seqlens[:-1].long() - first + 3 * torch.arange(seqs)
    token = torch.arange(last - first) + 3 * (1 + _sequence_of_token(cu_seqlens))
    rows = torch.empty(last - first + 3 * seqs, x.shape[1], dtype=torch.float32)
    rows[begin[:, None] + torch.arange(3)] = torch.where(
        use[:, None, None], conv_state[slots.clamp(min=0), :3].float(), 0.0
    )
    rows[token] = x[first:last].float()
    y = _conv_taps([rows[j : len(rows) - 3 + j] for j in range(4)], weight, bias)
    live = (slots > 0) & (lengths > 0)
    conv_state[slots[live], :3] = rows[(begin + lengths)[live, None] + torch.arange(3)].to(conv_state.dtype)
    return y[token - 3].to(x.dtype)


def gdn_prepare(
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
    use_qk_l2norm: bool,
) -> None:
    new_q, new_k, new_v = _split(mixed_qkv, v.shape[1], v.shape[2], q.shape[2])
    if use_qk_l2norm:
        new_q, new_k = _l2_normalise(new_q), _l2_normalise(new_k)
    new_g, new_beta = _gates(a, b, A_log, dt_bias)
    for target, value in ((q, new_q), (k, new_k), (v, new_v), (g, new_g), (beta, new_beta)):
        target.copy_(value)


def gdn_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    use_qk_l2norm: bool,
    conv_state: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> None:
    count = len(state_indices)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(count + 1)
    bos, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    steps = int(lengths.max()) if count else 0
    if steps == 0:
        return
    columns = state_indices.long().reshape(count, -1)
    slots = columns if state_indices.dim() == 2 else columns.expand(count, steps)
    first = torch.zeros_like(bos) if num_accepted_tokens is None else num_accepted_tokens.long() - 1
    initial = slots.gather(1, first[:, None])[:, 0]
    active = (lengths > 0) & (initial > 0)
    if conv_weight is not None:
        conv_slots = (slots[:, 0] if conv_state_indices is None else conv_state_indices).long()
        active &= conv_slots > 0

    out[int(bos[0]) : int(cu_seqlens[-1])] = 0
    rows = active.nonzero()[:, 0]
    if len(rows) == 0:
        return
    x = mixed_qkv
    if conv_weight is not None:
        assert conv_state is not None
        x = _decode_conv(
            mixed_qkv, conv_state, conv_slots[rows], conv_weight, conv_bias, bos[rows], lengths[rows],
            None if num_accepted_tokens is None else first[rows],
        )  # fmt: skip
    q, k, v = _split(x, *state.shape[1:])
    if use_qk_l2norm:
        q, k = _l2_normalise(q), _l2_normalise(k)
    g, beta = _gates(a, b, A_log, dt_bias)
    decay, group = g.exp(), v.shape[1] // k.shape[1]
    s = state[initial[rows]].float()
    for t in range(steps):
        alive = lengths[rows] > t
        rows, s = rows[alive], s[alive]
        token, target = bos[rows] + t, slots[rows, min(t, slots.shape[1] - 1)]
        key, query = (h[token].repeat_interleave(group, 1)[..., None] for h in (k, q))
        s.mul_(decay[token][..., None, None])
        u = beta[token][..., None] * (v[token] - (s @ key)[..., 0])
        s.add_(u[..., None] * key[..., None, :, 0])
        out[token] = (scale * (s @ query)[..., 0]).to(out.dtype)
        keep = target > 0
        state[target[keep]] = s[keep].to(state.dtype)


def _decode_conv(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bos: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.Tensor | None,
) -> torch.Tensor:
    """Convolve the tokens of the active sequences and roll their histories; other rows of the result are 0."""
    y = torch.zeros_like(x)
    steps = int(lengths.max())
    row = torch.arange(3) + (torch.zeros_like(bos) if first is None else first)[:, None]
    history = conv_state[slots[:, None], row].float()
    step = torch.arange(steps)
    token = (bos[:, None] + step).clamp(max=len(x) - 1)
    valid = step < lengths[:, None]
    window = torch.cat([history, x[token].float()], dim=1)
    channels = x.shape[1]
    taps = [window[:, j : j + steps].reshape(-1, channels) for j in range(4)]
    y[token[valid]] = _conv_taps(taps, weight, bias).to(x.dtype)[valid.flatten()]
    if first is None:
        source = lengths[:, None] + torch.arange(3)
        rolled = window.gather(1, source[..., None].expand(-1, -1, channels))
        conv_state[slots, :3] = rolled.to(conv_state.dtype)
    else:
        keep = torch.arange(steps + 2) < lengths[:, None] + 2
        sequence, position = keep.nonzero(as_tuple=True)
        conv_state[slots[sequence], position] = window[sequence, position + 1].to(conv_state.dtype)
    return y


def gdn_prefill(
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
    scale: float,
    use_qk_l2norm: bool,
) -> None:
    lengths, slots = cu_seqlens.diff().long(), state_indices.long()
    total = int(lengths.sum())
    if total == 0:
        return
    tokens = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
    # chunk c of sequence i sits at offset[i] + c; token t of the batch at row place[t] of the padded chunks
    chunks = (lengths + CHUNK - 1) // CHUNK
    offset = chunks.cumsum(0) - chunks
    sequence = _sequence_of_token(cu_seqlens)
    place = torch.arange(total) - (cu_seqlens[:-1].long() - cu_seqlens[0])[sequence] + offset[sequence] * CHUNK
    count = int(chunks.sum())

    def pad(x: torch.Tensor) -> torch.Tensor:
        """[T, heads, ...] -> [chunks, heads, CHUNK, ...], zero where no token is."""
        full = x.new_zeros(count * CHUNK, *x.shape[1:], dtype=torch.float32)
        full[place] = x[tokens].float()
        return full.unflatten(0, (count, CHUNK)).transpose(1, 2).contiguous()

    group = v.shape[1] // k.shape[1]
    b_q, b_k, b_v, b_beta = pad(q), pad(k), pad(v), pad(beta)[..., None]
    if use_qk_l2norm:
        b_q, b_k = _l2_normalise(b_q), _l2_normalise(b_k)
    G = pad(g.clamp(min=_MIN_LOG_DECAY)).cumsum(-1)
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    decay = (G[..., :, None] - G[..., None, :]).masked_fill_(upper, -torch.inf).exp_()
    kk = (b_k @ b_k.mT).repeat_interleave(group, 1)
    qk = (b_q @ b_k.mT).repeat_interleave(group, 1).mul_(decay)
    b_q, b_k = b_q.repeat_interleave(group, 1), b_k.repeat_interleave(group, 1)
    # solve_triangular with unitriangular=True takes the diagonal as 1
    system = kk.mul_(decay).mul_(b_beta)
    right = torch.cat([b_beta * G.exp()[..., None] * b_k, b_beta * b_v], dim=-1)
    w, u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [k.shape[-1], v.shape[-1]], dim=-1
    )
    b_q = b_q.mul_(scale * G.exp()[..., None])
    qk.mul_(scale)
    total_decay = G[..., -1:]
    b_k = b_k.mul_((total_decay - G).exp()[..., None])

    b_out = torch.empty_like(b_v)
    rows = (lengths > 0).nonzero()[:, 0]
    use = has_initial_state.bool() & (slots > 0)
    s = torch.where(use[rows][:, None, None, None], state[slots[rows].clamp(min=0)].float(), 0.0)
    for c in range(int(chunks.max())):
        alive = chunks[rows] > c
        rows, s = rows[alive], s[alive]
        i = offset[rows] + c
        fresh = u[i] - w[i] @ s.mT
        b_out[i] = b_q[i] @ s.mT + qk[i] @ fresh
        s = s * total_decay[i][..., None].exp() + fresh.mT @ b_k[i]
        done = (chunks[rows] == c + 1) & (slots[rows] > 0)
        state[slots[rows[done]]] = s[done].to(state.dtype)
    out[tokens] = b_out.transpose(1, 2).flatten(0, 1)[place].to(out.dtype)
