"""DeepSeek sparse attention: indexer cache and logits, row top-k, sparse MLA (`torch.ops.blackwell_kernels.dsa_*`)."""

from blackwell_kernels.dsa.op import (
    dsa_gather_indexer_k,
    dsa_indexer_k_insert,
    dsa_indexer_logits_paged,
    dsa_indexer_logits_ragged,
    dsa_kv_insert,
    dsa_sparse_mla,
    dsa_topk,
)

__all__ = [
    "dsa_gather_indexer_k",
    "dsa_indexer_k_insert",
    "dsa_indexer_logits_paged",
    "dsa_indexer_logits_ragged",
    "dsa_kv_insert",
    "dsa_sparse_mla",
    "dsa_topk",
]
