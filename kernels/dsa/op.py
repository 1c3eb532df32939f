"""`torch.ops.blackwell_kernels.dsa_*`: validate, select a configuration, launch. reference.py holds the maths.

Every `<op>_cpu` and `<op>_triton` pair takes the operator's arguments, writes its outputs in place and returns None.
`<op>_triton` takes tensors of any device, so that interpreter and ahead-of-time gate can call it, and an explicit
`config` for tests and the tuner. Wrong shapes, dtypes, strides and devices raise UnsupportedInputError before anything
is launched. Values that live on the device cannot be checked without a synchronisation: there an index, slot or page
outside its tensor is ignored (never read, never written), which the docstrings state per operator.
"""

from __future__ import annotations

import torch

from blackwell_kernels.common.checks import check_tensor, describe, once_per_layout, require
from blackwell_kernels.common.launch import replayed
from blackwell_kernels.common.library import register_op
from blackwell_kernels.dsa import cpu
from blackwell_kernels.dsa.config import (
    LogitsConfig,
    SparseMlaConfig,
    TopkConfig,
    logits_config,
    sparse_mla_config,
    topk_config,
)
from blackwell_kernels.dsa.layout import INDEX_BYTES, INDEX_DIM, KV_BYTES, KV_DIM, LATENT, ROPE

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
INTS = (torch.int32, torch.int64)
MAX_HEADS = 128


def _check_pages(op: str, name: str, cache: torch.Tensor, width: int, alignment: int) -> None:
    """A paged cache: entries and tokens packed, the distance of two pages free but aligned."""
    check_tensor(op, name, cache, shape=(None, None, width))
    blocks, page, _ = cache.shape
    asked = f"{name} = {describe(cache)} with strides {cache.stride()}"
    size = f"at least one page, of a multiple of 16 tokens (64 in vLLM on a GPU), {width} packed elements a token"
    packed = blocks > 0 and page > 0 and page % 16 == 0 and cache.stride()[1:] == (width, 1)
    require(packed, op, asked, size, f"allocate {name} as [blocks, 64, {width}]")
    aligned = cache.stride(0) % alignment == 0 and cache.storage_offset() % alignment == 0
    require(aligned, op, asked, f"page stride and offset multiples of {alignment}", f"align {name}'s pages")


def _check_index_cache(op: str, k_cache: torch.Tensor) -> None:
    check_tensor(op, "k_cache", k_cache, dtype=torch.uint8)
    _check_pages(op, "k_cache", k_cache, INDEX_BYTES, 4)


def _check_kv_cache(op: str, kv_cache: torch.Tensor) -> None:
    check_tensor(op, "kv_cache", kv_cache, dtype=(torch.bfloat16, torch.uint8))
    fp8 = kv_cache.dtype == torch.uint8
    _check_pages(op, "kv_cache", kv_cache, KV_BYTES if fp8 else KV_DIM, 16 if fp8 else 8)


def _check_logits(op: str, logits: torch.Tensor, rows: int | None, device: torch.device) -> None:
    check_tensor(op, "logits", logits, shape=(rows, None), dtype=torch.float32, device=device)


@once_per_layout
def _check_indexer_k_insert(k: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    op = "dsa_indexer_k_insert"
    _check_index_cache(op, k_cache)
    check_tensor(op, "k", k, shape=(None, INDEX_DIM), dtype=FLOATS, device=k_cache.device)
    check_tensor(op, "slot_mapping", slot_mapping, shape=(k.shape[0],), dtype=INTS, device=k_cache.device)


def dsa_indexer_k_insert_cpu(k: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Quantise k [T, 128] to e4m3 with a power-of-two scale per token into k_cache [blocks, page, 132] (planar uint8).

    slot_mapping [T] int32 or int64; negative slots are padding. Slots behind the cache raise here, are ignored by the
    kernel. Scale: max(amax, 1e-4) / 448 rounded up, as vLLM's indexer_k_quant_and_cache with ue8m0.
    """
    _check_indexer_k_insert(k, k_cache, slot_mapping)
    cpu.indexer_k_insert(k, k_cache, slot_mapping)


@replayed
def dsa_indexer_k_insert_triton(k: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See dsa_indexer_k_insert_cpu."""
    _check_indexer_k_insert(k, k_cache, slot_mapping)
    if k.shape[0]:
        from blackwell_kernels.dsa import cache_insert

        cache_insert.launch_indexer_k_insert(k, k_cache, slot_mapping)


@once_per_layout
def _check_gather_indexer_k(
    k_cache: torch.Tensor, block_table: torch.Tensor, cu_seq_lens: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor
) -> None:
    op, device = "dsa_gather_indexer_k", k_cache.device
    _check_index_cache(op, k_cache)
    check_tensor(op, "block_table", block_table, shape=(None, None), dtype=torch.int32, device=device)
    wanted = (block_table.shape[0] + 1,)
    check_tensor(op, "cu_seq_lens", cu_seq_lens, shape=wanted, dtype=torch.int32, device=device, contiguous=True)
    check_tensor(op, "k", k, shape=(None, INDEX_DIM), dtype=FP8, device=device)
    check_tensor(op, "k_scale", k_scale, shape=(k.shape[0],), dtype=torch.float32, device=device, contiguous=True)


def dsa_gather_indexer_k_cpu(
    k_cache: torch.Tensor, block_table: torch.Tensor, cu_seq_lens: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor
) -> None:
    """Copy the cached keys of B sequences, one after another, to k [N, 128] e4m3 and k_scale [N] float32.

    k_cache [blocks, page, 132] uint8, block_table [B, P] int32, cu_seq_lens [B + 1] int32. Rows from cu_seq_lens[B] on
    stay untouched. Pages outside the cache raise here; the kernel writes zeros for them.
    """
    _check_gather_indexer_k(k_cache, block_table, cu_seq_lens, k, k_scale)
    cpu.gather_indexer_k(k_cache, block_table, cu_seq_lens, k, k_scale)


@replayed
def dsa_gather_indexer_k_triton(
    k_cache: torch.Tensor, block_table: torch.Tensor, cu_seq_lens: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor
) -> None:
    """See dsa_gather_indexer_k_cpu."""
    _check_gather_indexer_k(k_cache, block_table, cu_seq_lens, k, k_scale)
    if k.shape[0] and block_table.numel():
        from blackwell_kernels.dsa import cache_insert

        cache_insert.launch_gather_indexer_k(k_cache, block_table, cu_seq_lens, k, k_scale)


@once_per_layout
def _check_logits_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    op, device = "dsa_indexer_logits_paged", q.device
    check_tensor(op, "q", q, shape=(None, None, None, INDEX_DIM), dtype=FP8)
    batch, next_n, heads, _ = q.shape
    _check_heads(op, heads)
    _check_index_cache(op, k_cache)
    check_tensor(op, "k_cache", k_cache, device=device)
    check_tensor(op, "weights", weights, shape=(batch * next_n, heads), dtype=torch.float32, device=device)
    per_row = context_lens.dim() != 1
    shape = (batch, next_n) if per_row else (batch,)
    check_tensor(
        op, "context_lens", context_lens, shape=shape, dtype=torch.int32, device=device, last_dim_contiguous=per_row
    )
    check_tensor(op, "block_table", block_table, shape=(batch, None), dtype=torch.int32, device=device)
    _check_logits(op, logits, batch * next_n, device)


def dsa_indexer_logits_paged_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    *,
    clean: bool = True,
    topk: int = 0,
) -> None:
    """logits [B * next_n, C] float32 of next_n queries per sequence against its cached keys; -inf from the length on,
    which clean=False leaves as it is. Rows that see at most `topk` keys, all of which a top-k of that size takes, need
    no scores: theirs may be left as they are, or -inf.

    q [B, next_n, H, 128] e4m3 (H <= 128), k_cache [blocks, page, 132] uint8, weights [B * next_n, H] float32,
    context_lens int32 [B, next_n], or [B]: query n of sequence b sees context_lens[b] - next_n + 1 + n keys,
    block_table [B, P] int32. Lengths beyond C or P pages and pages outside the cache raise here; the kernel stops at
    the smaller bound and gives such pages -inf. Source: DeepGEMM fp8_paged_mqa_logits as vLLM calls it, cleaned.
    """
    _check_logits_paged(q, k_cache, weights, context_lens, block_table, logits)
    if logits.numel():  # `clean` and `topk` permit, they do not demand
        cpu.indexer_logits_paged(q, k_cache, weights, context_lens, block_table, logits)


@replayed
def dsa_indexer_logits_paged_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    *,
    clean: bool = True,
    topk: int = 0,
    config: LogitsConfig | None = None,
) -> None:
    """See dsa_indexer_logits_paged_cpu."""
    _check_logits_paged(q, k_cache, weights, context_lens, block_table, logits)
    if not logits.numel():
        return
    if block_table.shape[1] == 0:
        if clean:
            logits.fill_(-torch.inf)
        return
    from blackwell_kernels.dsa import indexer_logits

    batch, next_n, heads, _ = q.shape
    chosen = config or logits_config("paged", heads, next_n, batch * next_n, q.device)
    indexer_logits.launch_paged(q, k_cache, weights, context_lens, block_table, logits, clean, topk, chosen)


def _check_heads(op: str, heads: int) -> None:
    require(1 <= heads <= MAX_HEADS, op, f"{heads} heads", f"1 to {MAX_HEADS} heads", "split the heads over calls")


@once_per_layout
def _check_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    op, device = "dsa_indexer_logits_ragged", q.device
    check_tensor(op, "q", q, shape=(None, None, INDEX_DIM), dtype=FP8)
    rows, heads, _ = q.shape
    _check_heads(op, heads)
    check_tensor(op, "k", k, shape=(None, INDEX_DIM), dtype=FP8, device=device)
    check_tensor(op, "k_scale", k_scale, shape=(k.shape[0],), dtype=torch.float32, device=device, contiguous=True)
    check_tensor(op, "weights", weights, shape=(rows, heads), dtype=torch.float32, device=device)
    for name, x in (("row_starts", row_starts), ("row_ends", row_ends)):
        check_tensor(op, name, x, shape=(rows,), dtype=torch.int32, device=device, contiguous=True)
    _check_logits(op, logits, rows, device)
    columns = f"logits = {describe(logits)} for {k.shape[0]} keys"
    require(logits.shape[1] == k.shape[0], op, columns, "one column a key", "allocate logits as [M, N]")


def dsa_indexer_logits_ragged_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    logits: torch.Tensor,
    *,
    clean: bool = True,
) -> None:
    """logits [M, N] float32 of query rows against contiguous keys; -inf outside [row_starts, row_ends) of a row, where
    clean=False may leave what there is.

    q [M, H, 128] e4m3 (H <= 128), k [N, 128] e4m3, k_scale [N] float32, weights [M, H] float32 (query scale, softmax
    scale and head scale folded in), row_starts and row_ends [M] int32 (clamped to [0, N]).
    Source: DeepGEMM fp8_mqa_logits as vLLM calls it, cleaned.
    """
    _check_logits_ragged(q, k, k_scale, weights, row_starts, row_ends, logits)
    if logits.numel():
        cpu.indexer_logits_ragged(q, k, k_scale, weights, row_starts, row_ends, logits)


@replayed
def dsa_indexer_logits_ragged_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    logits: torch.Tensor,
    *,
    clean: bool = True,
    config: LogitsConfig | None = None,
) -> None:
    """See dsa_indexer_logits_ragged_cpu."""
    _check_logits_ragged(q, k, k_scale, weights, row_starts, row_ends, logits)
    if not logits.numel():
        return
    from blackwell_kernels.dsa import indexer_logits

    rows, heads, _ = q.shape
    chosen = config or logits_config("ragged", heads, 0, rows, q.device)
    indexer_logits.launch_ragged(q, k, k_scale, weights, row_starts, row_ends, logits, clean, chosen)


@once_per_layout
def _check_topk(logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, indices: torch.Tensor) -> None:
    op, device = "dsa_topk", logits.device
    _check_logits(op, logits, None, device)
    rows = logits.shape[0]
    for name, x in (("row_starts", row_starts), ("row_ends", row_ends)):
        check_tensor(op, name, x, shape=(rows,), dtype=torch.int32, device=device, contiguous=True)
    check_tensor(op, "indices", indices, shape=(rows, None), dtype=torch.int32, device=device)
    require(indices.shape[1] > 0, op, f"indices = {describe(indices)}", "K >= 1 columns", "allocate indices as [R, K]")


def dsa_topk_cpu(logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, indices: torch.Tensor) -> None:
    """Positions, relative to row_starts, of the K largest of logits[r, row_starts[r]:row_ends[r]].

    logits [R, C] float32, row_starts and row_ends [R] int32 (clamped to [0, C]), indices [R, K] int32, K >= 1:
    ascending, padded with -1; the kernel may write a row of more than K in another order, always the same. Exact; of
    equal scores (+0 equals -0, NaN counts as -inf) the lowest position wins.
    Columns outside a row's range are no candidates, whatever they hold.
    """
    _check_topk(logits, row_starts, row_ends, indices)
    if logits.shape[0]:
        cpu.topk(logits, row_starts, row_ends, indices)


@replayed
def dsa_topk_triton(
    logits: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    indices: torch.Tensor,
    *,
    config: TopkConfig | None = None,
) -> None:
    """See dsa_topk_cpu."""
    _check_topk(logits, row_starts, row_ends, indices)
    if logits.shape[0]:
        from blackwell_kernels.dsa import topk

        chosen = config or topk_config(logits.shape[1], indices.shape[1], logits.shape[0], logits.device)
        topk.launch(logits, row_starts, row_ends, indices, chosen)


@once_per_layout
def _check_sparse_mla(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    op, device = "dsa_sparse_mla", q.device
    check_tensor(op, "q", q, shape=(None, None, KV_DIM), dtype=torch.bfloat16)
    tokens, heads, _ = q.shape
    _check_heads(op, heads)
    _check_kv_cache(op, kv_cache)
    check_tensor(op, "kv_cache", kv_cache, device=device)
    check_tensor(op, "indices", indices, shape=(tokens, None), dtype=torch.int32, device=device)
    require(indices.shape[1] > 0, op, f"indices = {describe(indices)}", "K >= 1 columns", "pass indices [T, K]")
    together = (req_id is None) == (block_table is None)
    asked = f"req_id = {describe(req_id)}, block_table = {describe(block_table)}"
    require(together, op, asked, "both (request-local indices) or neither (slots)", "pass or drop both")
    if req_id is not None and block_table is not None:
        check_tensor(op, "req_id", req_id, shape=(tokens,), dtype=torch.int32, device=device, contiguous=True)
        check_tensor(op, "block_table", block_table, shape=(None, None), dtype=torch.int32, device=device)
    check_tensor(op, "out", out, shape=(tokens, heads, LATENT), dtype=torch.bfloat16, device=device)
    if lse is not None:
        check_tensor(
            op, "lse", lse, shape=(tokens, heads), dtype=torch.float32, device=device, last_dim_contiguous=False
        )


def dsa_sparse_mla_cpu(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """out [T, H, 512] bf16: softmax attention of each query over its own list of cache entries, in latent space.

    q [T, H, 576] bf16 (1 to 128 heads), kv_cache bf16 [blocks, page, 576] or fp8_ds_mla uint8 [blocks, page, 656],
    indices [T, K] int32: positions in request req_id[t] [T] mapped through block_table [R, P], or, with both None,
    slots (block * page + offset). Negative and out-of-range indices, unknown requests and pages are ignored; contents
    of unselected slots are never used. lse [T, H] float32 or None: base-2 log-sum-exp of the scaled scores.
    A token without any valid index gives out 0 and lse -inf.
    """
    _check_sparse_mla(q, kv_cache, indices, req_id, block_table, out, lse)
    if q.shape[0]:
        cpu.sparse_mla(q, kv_cache, indices, req_id, block_table, sm_scale, out, lse)


@replayed
def dsa_sparse_mla_triton(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    config: SparseMlaConfig | None = None,
) -> None:
    """See dsa_sparse_mla_cpu."""
    _check_sparse_mla(q, kv_cache, indices, req_id, block_table, out, lse)
    if q.shape[0]:
        from blackwell_kernels.dsa import sparse_mla

        tokens, heads, _ = q.shape
        fp8 = kv_cache.dtype == torch.uint8
        chosen = config or sparse_mla_config(heads, indices.shape[1], fp8, tokens, q.device)
        sparse_mla.launch(q, kv_cache, indices, req_id, block_table, sm_scale, out, lse, chosen)


@once_per_layout
def _check_kv_insert(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    op, device = "dsa_kv_insert", kv_cache.device
    _check_kv_cache(op, kv_cache)
    check_tensor(op, "kv_c", kv_c, shape=(None, LATENT), dtype=FLOATS, device=device)
    check_tensor(op, "k_pe", k_pe, shape=(kv_c.shape[0], ROPE), dtype=FLOATS, device=device)
    check_tensor(op, "slot_mapping", slot_mapping, shape=(kv_c.shape[0],), dtype=INTS, device=device)


def dsa_kv_insert_cpu(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    power_of_two_scale: bool = True,
) -> None:
    """Write kv_c [T, 512] and k_pe [T, 64] to the slots of kv_cache, bf16 or fp8_ds_mla (by its dtype).

    slot_mapping [T] int32 or int64; negative slots are padding, slots behind the cache raise here and are ignored by
    the kernel. power_of_two_scale: fp8 scales as vLLM >= 0.32 writes them; False: exact amax / 448, as vLLM 0.24.
    Sparse MLA reads either. Source: vLLM concat_and_cache_mla.
    """
    _check_kv_insert(kv_c, k_pe, kv_cache, slot_mapping)
    cpu.kv_insert(kv_c, k_pe, kv_cache, slot_mapping, power_of_two_scale)


@replayed
def dsa_kv_insert_triton(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    power_of_two_scale: bool = True,
) -> None:
    """See dsa_kv_insert_cpu."""
    _check_kv_insert(kv_c, k_pe, kv_cache, slot_mapping)
    if kv_c.shape[0]:
        from blackwell_kernels.dsa import cache_insert

        cache_insert.launch_kv_insert(kv_c, k_pe, kv_cache, slot_mapping, power_of_two_scale)


dsa_indexer_k_insert = register_op(
    "dsa_indexer_k_insert(Tensor k, Tensor(a!) k_cache, Tensor slot_mapping) -> ()",
    cpu=dsa_indexer_k_insert_cpu,
    cuda=dsa_indexer_k_insert_triton,
)
dsa_gather_indexer_k = register_op(
    "dsa_gather_indexer_k(Tensor k_cache, Tensor block_table, Tensor cu_seq_lens, Tensor(a!) k, Tensor(b!) k_scale)"
    " -> ()",
    cpu=dsa_gather_indexer_k_cpu,
    cuda=dsa_gather_indexer_k_triton,
)
dsa_indexer_logits_paged = register_op(
    "dsa_indexer_logits_paged(Tensor q, Tensor k_cache, Tensor weights, Tensor context_lens, Tensor block_table,"
    " Tensor(a!) logits, *, bool clean=True, int topk=0) -> ()",
    cpu=dsa_indexer_logits_paged_cpu,
    cuda=dsa_indexer_logits_paged_triton,
)
dsa_indexer_logits_ragged = register_op(
    "dsa_indexer_logits_ragged(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor row_starts, Tensor row_ends,"
    " Tensor(a!) logits, *, bool clean=True) -> ()",
    cpu=dsa_indexer_logits_ragged_cpu,
    cuda=dsa_indexer_logits_ragged_triton,
)
dsa_topk = register_op(
    "dsa_topk(Tensor logits, Tensor row_starts, Tensor row_ends, Tensor(a!) indices) -> ()",
    cpu=dsa_topk_cpu,
    cuda=dsa_topk_triton,
)
dsa_sparse_mla = register_op(
    "dsa_sparse_mla(Tensor q, Tensor kv_cache, Tensor indices, Tensor? req_id, Tensor? block_table, float sm_scale,"
    " Tensor(a!) out, Tensor(b!)? lse) -> ()",
    cpu=dsa_sparse_mla_cpu,
    cuda=dsa_sparse_mla_triton,
)
dsa_kv_insert = register_op(
    "dsa_kv_insert(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, *,"
    " bool power_of_two_scale=True) -> ()",
    cpu=dsa_kv_insert_cpu,
    cuda=dsa_kv_insert_triton,
)
