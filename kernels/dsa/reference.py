"""DeepSeek Sparse Attention in plain torch: what every implementation in this family must compute. Frozen.

Scores, softmax and sums are float64; only what is *stored* in a cache is rounded, exactly as vLLM stores it. Nothing
here is fast. Every function depends on torch and on functions of this file only, so the text of this file is itself a
complete reference program (FlashInfer-Bench definitions are generated from it).

Layouts (64 tokens a page in the model, any page size here):
- indexer K cache, uint8 [blocks, page, 132], planar: `page * 128` e4m3 bytes, then `page` float32 scales.
- KV cache, bf16 [blocks, page, 576]: 512 latent | 64 rope; or `fp8_ds_mla`, uint8 [blocks, page, 656]:
  512 e4m3 | 4 float32 scales (one per 128) | 64 bf16 rope.
A slot is `block * page + offset`. Sources: DeepSeek-V3.2-Exp report (indexer and sparse MLA); vLLM
csrc/libtorch_stable/cache_kernels.cu and vllm/v1/attention/backends/mla (layouts, paddings).
"""

import math

import torch

E4M3_MAX = 448.0
INDEX_DIM = 128  # indexer head size, one scale per token
LATENT, ROPE, LATENT_GROUP = 512, 64, 128


def power_of_two_at_least(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two >= x, elementwise, for positive finite x (UE8M0 rounding)."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2**exponent, 0.5 <= mantissa < 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to e4m3, nearest even, saturating at +-448."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def indexer_k_quantize(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k [T, 128] -> e4m3 [T, 128] and one power-of-two float32 scale per token [T]."""
    amax = k.float().abs().amax(-1).clamp(min=1e-4)
    scale = power_of_two_at_least(amax / E4M3_MAX)
    return to_e4m3(k.float() / scale[:, None]), scale


def indexer_k_insert(k: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of k_cache [blocks, page, 132], k[t] of [T, 128] written to slot_mapping[t]; slots < 0 skip."""
    blocks, page, width = k_cache.shape
    result = k_cache.contiguous().clone()
    values, scales = indexer_k_quantize(k)
    flat = result.view(blocks, page * width)
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, page)
            flat[block, offset * INDEX_DIM : (offset + 1) * INDEX_DIM] = values[t].view(torch.uint8)
            first = page * INDEX_DIM + 4 * offset
            flat[block, first : first + 4] = scales[t : t + 1].view(torch.uint8)
    return result


def indexer_k_unpack(k_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k_cache [blocks, page, 132] (any 8-bit dtype) -> e4m3 [blocks, page, 128], float32 scales [blocks, page]."""
    blocks, page, width = k_cache.shape
    flat = k_cache.contiguous().view(torch.uint8).view(blocks, page * width)
    values = flat[:, : page * INDEX_DIM].contiguous().view(torch.float8_e4m3fn).view(blocks, page, INDEX_DIM)
    scales = flat[:, page * INDEX_DIM :].contiguous().view(torch.float32).view(blocks, page)
    return values, scales


def gather_indexer_k(
    k_cache: torch.Tensor, block_table: torch.Tensor, cu_seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cached keys of all sequences, one after another: e4m3 [N, 128] and float32 [N], N = cu_seq_lens[-1]."""
    values, scales = indexer_k_unpack(k_cache)
    page = k_cache.shape[1]
    ks, ss = [], []
    for b in range(block_table.shape[0]):
        position = torch.arange(int(cu_seq_lens[b + 1] - cu_seq_lens[b]), device=k_cache.device)
        block = block_table[b, position // page].long()
        ks.append(values.view(torch.uint8)[block, position % page])
        ss.append(scales[block, position % page])
    return torch.cat(ks).view(torch.float8_e4m3fn), torch.cat(ss)


def indexer_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
) -> torch.Tensor:
    """logits[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n]), -inf outside [row_starts, row_ends).

    q [M, H, 128] and k [N, 128] e4m3, k_scale [N] and weights [M, H] float32, starts and ends [M]; float64 [M, N].
    """
    n_keys = k.shape[0]
    logits = torch.full((q.shape[0], n_keys), -torch.inf, dtype=torch.float64, device=q.device)
    for m in range(q.shape[0]):
        start, end = max(int(row_starts[m]), 0), min(int(row_ends[m]), n_keys)
        if start < end:
            scores = torch.relu(q[m].double() @ k[start:end].double().T)
            logits[m, start:end] = (weights[m].double() @ scores) * k_scale[start:end].double()
    return logits


def paged_row_lengths(context_lens: torch.Tensor, next_n: int) -> torch.Tensor:
    """Keys seen by each query row [B * next_n]: context_lens [B, next_n] as is, or [B] ending at the last query."""
    if context_lens.dim() == 1:
        offsets = torch.arange(next_n, device=context_lens.device) - next_n + 1
        context_lens = context_lens[:, None] + offsets
    return context_lens.reshape(-1).clamp(min=0)


def indexer_logits_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    """Logits of next_n queries a sequence against its cached keys; float64 [B * next_n, columns], -inf beyond a row.

    q [B, next_n, H, 128] e4m3, k_cache [blocks, page, 132], weights [B * next_n, H], context_lens [B] or [B, next_n],
    block_table [B, pages].
    """
    batch, next_n = q.shape[:2]
    values, scales = indexer_k_unpack(k_cache)
    page = k_cache.shape[1]
    lengths = paged_row_lengths(context_lens, next_n)
    logits = torch.full((batch * next_n, columns), -torch.inf, dtype=torch.float64, device=q.device)
    for row, length in enumerate(lengths.tolist()):
        position = torch.arange(length, device=q.device)
        block = block_table[row // next_n, position // page].long()
        k = values.view(torch.uint8)[block, position % page].view(torch.float8_e4m3fn).double()
        scores = torch.relu(q[row // next_n, row % next_n].double() @ k.T)
        logits[row, :length] = (weights[row].double() @ scores) * scales[block, position % page].double()
    return logits


def topk(logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, k: int) -> torch.Tensor:
    """Positions, relative to row_starts, of the k largest of logits[r, start:end]; int32 [R, k], ascending, -1 padded.

    Equal scores (+0 equals -0; NaN counts as -inf): the lowest position wins. Other columns are not candidates.
    """
    rows, columns = logits.shape
    indices = torch.full((rows, k), -1, dtype=torch.int32, device=logits.device)
    for r in range(rows):
        start, end = max(int(row_starts[r]), 0), min(int(row_ends[r]), columns)
        if start < end:
            scores = logits[r, start:end].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            chosen = torch.sort(scores, descending=True, stable=True).indices[:k].sort().values
            indices[r, : chosen.numel()] = chosen.to(torch.int32)
    return indices


def kv_quantize(kv_c: torch.Tensor, power_of_two_scale: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_c [T, 512] -> e4m3 [T, 512] and float32 scales [T, 4].

    power_of_two_scale: amax / 448, at least 1e-4, rounded up to a power of two (vLLM >= 0.32); otherwise amax / 448,
    at least the smallest normal float32 (vLLM 0.24).
    """
    groups = kv_c.float().unflatten(-1, (LATENT // LATENT_GROUP, LATENT_GROUP))
    scale = groups.abs().amax(-1) / E4M3_MAX
    if power_of_two_scale:
        scale = power_of_two_at_least(scale.clamp(min=1e-4))
    else:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return to_e4m3(groups / scale[..., None]).flatten(1), scale


def kv_insert(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    power_of_two_scale: bool = True,
) -> torch.Tensor:
    """A contiguous copy of kv_cache (either format) with kv_c [T, 512] | k_pe [T, 64] at the slots; slots < 0 skip."""
    result = kv_cache.contiguous().clone()
    if kv_cache.dtype == torch.uint8:
        values, scales = kv_quantize(kv_c, power_of_two_scale)
        parts = [values.view(torch.uint8), scales.contiguous().view(torch.uint8)]
        entries = torch.cat([*parts, k_pe.bfloat16().contiguous().view(torch.uint8)], -1)
    else:
        entries = torch.cat([kv_c, k_pe], -1).to(kv_cache.dtype)
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            result[slot // kv_cache.shape[1], slot % kv_cache.shape[1]] = entries[t]
    return result


def kv_unpack(entries: torch.Tensor) -> torch.Tensor:
    """Cache entries [..., 576] bf16 or [..., 656] uint8 -> their values, float64 [..., 576]."""
    if entries.dtype != torch.uint8:
        return entries.double()
    entries = entries.contiguous()
    latent = entries[..., :LATENT].contiguous().view(torch.float8_e4m3fn).double()
    scales = entries[..., LATENT : LATENT + 16].contiguous().view(torch.float32).double()
    latent = latent.unflatten(-1, (LATENT // LATENT_GROUP, LATENT_GROUP)) * scales[..., None]
    rope = entries[..., LATENT + 16 :].contiguous().view(torch.bfloat16).double()
    return torch.cat([latent.flatten(-2), rope], -1)


def physical_slots(
    indices: torch.Tensor, req_id: torch.Tensor | None, block_table: torch.Tensor | None, blocks: int, page: int
) -> torch.Tensor:
    """indices [T, K] (request-local with req_id [T] and block_table [R, P], else slots) -> slots, -1 where invalid.

    Invalid: negative, beyond the table, of an unknown request, or of a page outside the cache.
    """
    index = indices.long()
    if req_id is not None and block_table is not None:
        requests, pages = block_table.shape
        known = ((req_id >= 0) & (req_id < requests))[:, None]
        inside = (index >= 0) & (index < pages * page) & known
        req = req_id.long().clamp(0, max(requests - 1, 0))[:, None]
        block = block_table.long()[req, (index // page).clamp(0, max(pages - 1, 0))]
    else:
        inside, block = index >= 0, index // page
    inside = inside & (block >= 0) & (block < blocks)
    return torch.where(inside, block * page + index % page, -1)


def sparse_mla(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, H, 576] over the selected cache entries; values are their first 512 components.

    Returns float64 out [T, H, 512] and lse [T, H] (base 2, of the scaled scores). Invalid indices (see physical_slots)
    are ignored; an index listed twice counts twice; a token with no valid index gives out 0 and lse -inf.
    """
    blocks, page = kv_cache.shape[:2]
    slots = physical_slots(indices, req_id, block_table, blocks, page)
    out = torch.zeros(*q.shape[:2], LATENT, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    for t in range(q.shape[0]):
        slot = slots[t][slots[t] >= 0]
        if slot.numel():
            kv = kv_unpack(kv_cache[slot // page, slot % page])
            scores = q[t].double() @ kv.T * sm_scale
            out[t] = torch.softmax(scores, -1) @ kv[:, :LATENT]
            lse[t] = torch.logsumexp(scores, -1) / math.log(2.0)
    return out, lse


def contest_topk_indexer(
    q_index_fp8: torch.Tensor,
    k_index_cache_fp8: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    topk_tokens: int = 2048,
) -> torch.Tensor:
    """Logits, then top-k, as *slots*: int32 [B, topk], -1 padded. q [B, H, 128]; cache [pages, page, 1, 132] int8."""
    k_cache = k_index_cache_fp8.squeeze(2).view(torch.uint8)
    columns = block_table.shape[1] * k_cache.shape[1]
    logits = indexer_logits_paged(q_index_fp8[:, None], k_cache, weights, seq_lens, block_table, columns)
    indices = topk(logits, torch.zeros_like(seq_lens), seq_lens, topk_tokens)
    requests = torch.arange(len(seq_lens), device=seq_lens.device)
    return physical_slots(indices, requests, block_table, *k_cache.shape[:2]).to(torch.int32)


def contest_sparse_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    sparse_indices: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse MLA over slots with split latent and rope tensors: bf16 [T, H, 512] and float32 base-2 lse [T, H]."""
    q, kv_cache = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
    out, lse = sparse_mla(q, kv_cache, sparse_indices, None, None, float(sm_scale))
    return out.to(torch.bfloat16), lse.to(torch.float32)
