"""The lightning indexer on a GPU: logits, paged and ragged, and top-k for prefill and decode, each by policy.

Why: vLLM's indexer is one opaque operator over kernels that have no registry.
How: its body looks these names up when it runs, so they are replaced in its module and each decides per call:
`fp8_fp4_mqa_logits` (prefill logits), `fp8_fp4_paged_mqa_logits` (decode logits), `ops` (prefill top-k),
`get_indexer_topk` (decode top-k, 0.29 on) and `_resolve_layer_name` (tells which layer runs). Up to 0.28 the decode
top-k is `torch.ops._C.cooperative_topk` or `.persistent_topk`, which nothing else calls: these two attributes are
replaced. No operator, splitting op or fake is added, so torch.compile and CUDA graphs see stock vLLM. This works for
DeepSeek-V3.2 from 0.29 on too, which calls the body as a function. The layer class is replaced on a CPU only; here a
subclass reports each layer.
Upstream: the body grew from 16 to 27 parameters between 0.24 and 0.32, the names stayed; 0.33 changes the logits'.
Remove when: vLLM offers a registry for the indexer's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from blackwell_kernels import env, status
from blackwell_kernels.model_patches import context, contracts
from blackwell_kernels.select import Policy, policy, summary

LOGITS, TOPK = "dsa_indexer", "dsa_topk"
# the most rows of a decode that were measured. Of more rows tables have chunks of a prefill alone, whose contexts are
# long where a decode's may be short: 64 rows of 8K in 128K columns took 2.4 times stock's time, 200 of a chunk 0.66
DECODE_ROWS = 64
LAYER = "SparseAttnIndexer"
_ALIGNMENT = 256  # columns: vLLM's cooperative top-k wants rows aligned to 16 bytes

_layer = ""  # the layer whose indexer body is running
_decode_k = 0  # keys a decode top-k takes, where no other than the replaced ones can follow the logits
_policies: dict[tuple[Any, ...], Policy] = {}
_zeros: dict[torch.device, torch.Tensor] = {}


def patch_model_on_cpu(module: Any) -> None:
    """On a CPU, replace what the model file imported for GPUs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not _switched_off():
        from blackwell_kernels.model_patches import dsa_cpu

        dsa_cpu.patch_model(module)


def _switched_off() -> set[str]:
    """Operators of this file that are disabled; on a CPU stock cannot serve the other one."""
    return {LOGITS, TOPK} & env.DISABLE.get()


def replace_kernels(module: Any) -> None:
    """Replace the kernels that the indexer's body looks up; on a CPU, its layer class."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.platforms import current_platform

    if LAYER in op_registry_oot:
        return
    ops = [op for op in (LOGITS, TOPK) if op not in _switched_off()]
    contracts.demand(ops, module)
    if current_platform.is_cpu():
        if len(ops) == 2:
            from blackwell_kernels.model_patches import dsa_cpu

            module.SparseAttnIndexer.register_oot(dsa_cpu.indexer_class(module.SparseAttnIndexer), name=LAYER)
        return
    contracts.demand(ops, "vllm.utils.deep_gemm", "vllm._custom_ops")
    if TOPK in ops and hasattr(module, "get_indexer_topk"):
        contracts.demand(TOPK, "vllm.model_executor.layers.indexer_topk")
    module.SparseAttnIndexer.register_oot(_layer_class(module.SparseAttnIndexer, ops), name=LAYER)
    replace_gpu_kernels(module, ops)


def replace_gpu_kernels(module: Any, ops: list[str]) -> None:
    """Replace what the body in `module` looks up for the operators `ops`."""
    module._resolve_layer_name = _noting(module._resolve_layer_name)
    if LOGITS in ops:
        module.fp8_fp4_mqa_logits = ragged(module.fp8_fp4_mqa_logits)
        module.fp8_fp4_paged_mqa_logits = paged(module.fp8_fp4_paged_mqa_logits)
    if TOPK not in ops:
        return
    module.ops = Overlay(
        module.ops,
        top_k_per_row_prefill=prefill_topk(module.ops.top_k_per_row_prefill),
        top_k_per_row_decode=decode_topk_per_row(module.ops.top_k_per_row_decode),
    )
    if hasattr(module, "get_indexer_topk"):
        module.get_indexer_topk = decode_topk(module.get_indexer_topk)
        return
    for name in ("cooperative_topk", "persistent_topk"):
        if hasattr(torch.ops._C, name):
            setattr(torch.ops._C, name, decode_topk_kernel(getattr(torch.ops._C, name)))


class Overlay:
    """A module with some of its functions replaced, for one importer only."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _layer_class(base: type, ops: list[str]) -> type:
    """Reports each layer; runs as vLLM's own class does."""

    class BlackwellSparseAttnIndexer(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            heads = getattr(_hf_config(), "index_n_heads", None)
            if heads is None:  # another model's indexer: its calls decide for themselves
                return
            k, columns, device = self.topk_tokens, self.max_model_len, self.topk_indices_buffer.device
            _reserve_zeros(device, self.topk_indices_buffer.shape[0])
            if TOPK in ops and not hasattr(sys.modules[base.__module__], "get_indexer_topk"):
                global _decode_k
                _decode_k = k
            for op in ops:
                parts = (
                    {"decode": _logits("paged", heads, 1, device), "prefill": _logits("ragged", heads, 0, device)}
                    if op == LOGITS
                    else {"decode": _topk(columns, k, device, DECODE_ROWS)}
                )
                status.record_layer(op, self.k_cache.prefix, *summary(parts))

    return BlackwellSparseAttnIndexer


def _hf_config() -> Any:
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().model_config.hf_config


def _decided(
    op: str, key: tuple[Any, ...], case: Callable[..., dict[str, Any]], device: torch.device, most: int | None = None
) -> Policy:
    """The policy, kept: it is asked for at each call."""
    full = (op, device, most, *key)
    if full not in _policies:
        _policies[full] = policy(op, case(*key), device, most)
    return _policies[full]


def _logits(mode: str, heads: int, next_n: int, device: torch.device) -> Policy:
    from blackwell_kernels.dsa import config

    return _decided(LOGITS, (mode, heads, next_n), config.logits_case, device)


def _topk(columns: int, k: int, device: torch.device, most: int | None = None) -> Policy:
    """most: DECODE_ROWS where rows are a decode's, whose columns are the model's longest context."""
    from blackwell_kernels.dsa import config

    # vLLM's prefill has any number of columns: cases are powers of two
    return _decided(TOPK, (1 << max(columns - 1, 0).bit_length(), k), config.topk_case, device, most)


def _noting(stock: Callable[..., str]) -> Callable[..., str]:
    @wraps(stock)
    def _resolve_layer_name(layer_name: Any) -> str:
        global _layer
        name = stock(layer_name)
        if name.endswith(".k_cache"):  # the body resolves other layers' names, too
            _layer = name
        return name

    return _resolve_layer_name


def _chosen(op: str, chosen: Policy, tokens: int) -> bool:
    ours = tokens > 0 and chosen.use_ours(tokens)
    context.count(op, _layer, "triton" if ours else "stock", tokens)
    return ours


def _plain_fp8(q: Any, k: torch.Tensor) -> bool:
    """FP8 queries whose scale is folded into the weights, and 128 wide heads: not MXFP4."""
    return q[1] is None and q[0].dtype == torch.float8_e4m3fn and q[0].shape[-1] == 128 and k.dim() in (2, 4)


def _clean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What DeepGEMM takes as `clean_logits`: whether columns that a row does not see must be -inf. The indexer's body
    asks for it nowhere, and the paged ones reach to the model's longest context."""
    return bool(args[0] if args else kwargs.get("clean_logits", True))


def new_logits(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Uninitialised [rows, columns] f32 with rows aligned as stock's top-k likes them."""
    width = -(-columns // _ALIGNMENT) * _ALIGNMENT
    return torch.empty(rows, width, dtype=torch.float32, device=device)[:, :columns]


def stock_logits(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The same as DeepGEMM lays out a prefill's (vLLM 0.24: a block of 256 keys more, then a multiple of 8)."""
    width = -(-(columns + 256) // 8) * 8
    return torch.empty(rows, width, dtype=torch.float32, device=device)[:, :columns]


def ragged(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Prefill logits: q ([M, H, 128] e4m3, None), kv ([N, 128] e4m3, [N] f32), weights [M, H] -> [M, N] f32."""

    @wraps(stock)
    def fp8_fp4_mqa_logits(
        q: Any, kv: Any, weights: torch.Tensor, cu_seqlen_ks: torch.Tensor, cu_seqlen_ke: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        values, (k, k_scale) = q[0], kv
        rows, heads = values.shape[:2]
        fits = _plain_fp8(q, k)
        ours = _chosen(LOGITS, _logits("ragged", heads, 0, values.device) if fits else _NOT_FP8, rows)
        if not ours:
            return stock(q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, *args, **kwargs)
        logits = new_logits(rows, k.shape[0], values.device)
        torch.ops.blackwell_kernels.dsa_indexer_logits_ragged(
            values, k, k_scale, weights, cu_seqlen_ks, cu_seqlen_ke, logits, clean=_clean(args, kwargs)
        )
        return logits

    return fp8_fp4_mqa_logits


def paged(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decode logits: q ([B, n, H, 128] e4m3, None), kv_cache [blocks, 64, 1, 132] -> [B * n, max_model_len] f32."""

    @wraps(stock)
    def fp8_fp4_paged_mqa_logits(
        q: Any,
        kv_cache: torch.Tensor,
        weights: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
        schedule_metadata: torch.Tensor,
        max_model_len: int,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        values = q[0]
        batch, next_n, heads = values.shape[:3]
        fits = _plain_fp8(q, kv_cache) and kwargs.get("indices") is None and len(args) < 2
        ours = _chosen(LOGITS, _logits("paged", heads, next_n, values.device) if fits else _NOT_FP8, batch * next_n)
        if not ours:
            positional = (q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len)
            return stock(*positional, *args, **kwargs)
        unscored = _unscored(batch * next_n, max_model_len, context_lens)
        if context_lens.dim() == 2 and context_lens.shape[1] != next_n:
            context_lens = context_lens[:, -1]  # one length a sequence, that of its last query
        logits = new_logits(batch * next_n, max_model_len, values.device)
        torch.ops.blackwell_kernels.dsa_indexer_logits_paged(
            values,
            kv_cache.squeeze(2),
            weights,
            context_lens,
            block_tables,
            logits,
            clean=_clean(args, kwargs),
            topk=unscored,
        )
        return logits

    return fp8_fp4_paged_mqa_logits


def _unscored(rows: int, columns: int, context_lens: torch.Tensor) -> int:
    """Rows of at most so many keys need no logits: the top-k that follows is ours, and takes their keys unseen."""
    if not _decode_k or context_lens.numel() != rows:  # such rows go to stock's, see _select
        return 0
    return _decode_k if _topk(columns, _decode_k, context_lens.device, DECODE_ROWS).use_ours(rows) else 0


_NOT_FP8 = Policy("stock", "not the FP8 indexer of DeepSeek-V3.2")


def _reserve_zeros(device: torch.device, rows: int) -> None:
    """Row starts of decode rows, made once: a buffer made while a CUDA graph is captured would be filled by its replay
    only."""
    if device not in _zeros or _zeros[device].numel() < rows:
        _zeros[device] = torch.zeros(rows, dtype=torch.int32, device=device)


def _row_starts(device: torch.device, rows: int) -> torch.Tensor:
    kept = _zeros.get(device)
    return (
        kept[:rows]
        if kept is not None and kept.numel() >= rows
        else torch.zeros(rows, dtype=torch.int32, device=device)
    )


def _select(logits: torch.Tensor, starts: torch.Tensor | None, ends: torch.Tensor, indices: torch.Tensor) -> bool:
    """Top-k by our operator if it is ours to do; False leaves it to stock. Without starts rows are a decode's."""
    rows, columns = logits.shape
    fits = logits.dtype == torch.float32 and ends.numel() == rows and indices.dtype == torch.int32
    most = DECODE_ROWS if starts is None else None
    chosen = _topk(columns, indices.shape[1], logits.device, most) if fits else _NOT_FP8
    if not _chosen(TOPK, chosen, rows):
        return False
    if starts is None:
        starts = _row_starts(logits.device, rows)
    torch.ops.blackwell_kernels.dsa_topk(logits, starts, ends.reshape(-1), indices)
    return True


def prefill_topk(stock: Callable[..., None]) -> Callable[..., None]:
    """Prefill rows: columns [ks, ke) of logits [R, N] -> indices [R, k] relative to ks."""

    @wraps(stock)
    def top_k_per_row_prefill(
        logits: torch.Tensor,
        cu_seqlen_ks: torch.Tensor,
        cu_seqlen_ke: torch.Tensor,
        raw_topk_indices: torch.Tensor,
        *args: Any,
    ) -> None:
        if not _select(logits, cu_seqlen_ks, cu_seqlen_ke, raw_topk_indices):
            stock(logits, cu_seqlen_ks, cu_seqlen_ke, raw_topk_indices, *args)

    return top_k_per_row_prefill


def decode_topk_per_row(stock: Callable[..., None]) -> Callable[..., None]:
    """Decode rows where k is not 512, 1024 or 2048 (up to 0.28)."""

    @wraps(stock)
    def top_k_per_row_decode(
        logits: torch.Tensor, next_n: int, seq_lens: torch.Tensor, raw_topk_indices: torch.Tensor, *args: Any
    ) -> None:
        if not _select(logits, None, seq_lens, raw_topk_indices):
            stock(logits, next_n, seq_lens, raw_topk_indices, *args)

    return top_k_per_row_decode


def decode_topk_kernel(stock: Callable[..., None]) -> Callable[..., None]:
    """Decode rows (up to 0.28): logits [R, max_model_len], seq_lens [B, next_n], R = B * next_n."""

    def topk(logits: torch.Tensor, seq_lens: torch.Tensor, topk_indices: torch.Tensor, *args: Any) -> None:
        if not _select(logits, None, seq_lens, topk_indices):
            stock(logits, seq_lens, topk_indices, *args)

    topk.stock = stock  # type: ignore[attr-defined]
    return topk


def decode_topk(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Decode rows (0.29 on): vLLM asks for a function by the backend's name."""

    @wraps(stock)
    def get_indexer_topk(backend: str) -> Callable[..., None]:
        kernel = stock(backend)

        def topk(
            logits: torch.Tensor, seq_lens: torch.Tensor, next_n: int, topk_indices: torch.Tensor, *args: Any
        ) -> None:
            # an explicit choice of a backend is the user's
            if backend != "auto" or not _select(logits, None, seq_lens, topk_indices):
                kernel(logits, seq_lens, next_n, topk_indices, *args)

        return topk

    return get_indexer_topk
