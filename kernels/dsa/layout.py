"""The two caches as typed views of their bytes, shared by the torch and the Triton implementations.

- indexer K cache, uint8 [blocks, page, 132], planar: page x 128 e4m3, then page float32 scales.
- KV cache: bf16 [blocks, page, 576], or `fp8_ds_mla` uint8 [blocks, page, 656] = 512 e4m3 | 4 float32 | 64 bf16.
"""

from __future__ import annotations

import torch

INDEX_DIM, INDEX_BYTES = 128, 132
LATENT, ROPE, LATENT_GROUP = 512, 64, 128
KV_DIM, KV_BYTES = LATENT + ROPE, LATENT + 16 + 2 * ROPE


def indexer_cache_views(k_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [blocks, page, 128], float32 scales [blocks, page]) of a planar indexer cache: the same memory."""
    page = k_cache.shape[1]
    planes = k_cache.flatten(1)
    values = planes[:, : page * INDEX_DIM].unflatten(1, (page, INDEX_DIM))
    return values.view(torch.float8_e4m3fn), planes[:, page * INDEX_DIM :].view(torch.float32)


def kv_cache_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(latent [..., 512], scales [..., 4] or None, rope [..., 64]) of KV entries in either format: the same memory."""
    if kv_cache.dtype != torch.uint8:
        return kv_cache[..., :LATENT], None, kv_cache[..., LATENT:]
    latent = kv_cache[..., :LATENT].view(torch.float8_e4m3fn)
    scales = kv_cache[..., LATENT : LATENT + 16].view(torch.float32)
    return latent, scales, kv_cache[..., LATENT + 16 :].view(torch.bfloat16)
