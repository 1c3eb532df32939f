"""Sparse MLA: our operator for the selected entries of the latent KV cache, in the place of FlashMLA's.

Why: FlashMLA pads a rank's heads to 64 or 128 and has no form for few tokens.
How: `register_backend` overrides FLASHMLA_SPARSE and its siblings with a subclass of vLLM's backend, which keeps name
(vLLM turns `fp8` into `fp8_ds_mla` by it), builder and metadata; only `forward_mqa` of the implementation changes, and
it hands over to stock by policy. Automatic selection stays vLLM's. On a CPU (0.32) stock has no sparse MLA: there the
platform is given our own backend.
Upstream: `forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)` is unchanged from 0.20.2 to 0.33.
Remove when: `register_backend` is all that is needed: it is, short of vLLM taking the kernel in.
"""

from __future__ import annotations

from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch

from blackwell_kernels import status
from blackwell_kernels.model_patches import context, contracts
from blackwell_kernels.select import Policy, policy

OP = "dsa_sparse_mla"
# those with a cache of [blocks, page, 576] bf16 or fp8_ds_mla; vLLM has some of them from 0.29 on only
BACKENDS = ("FLASHMLA_SPARSE", "FLASHINFER_MLA_SPARSE", "FLASH_ATTN_MLA_SPARSE")


def override_backends(module: ModuleType) -> None:
    """Register ours under vLLM's names."""
    contracts.demand(OP, module)
    for name in BACKENDS:
        if name in module.AttentionBackendEnum.__members__:
            module.register_backend(module.AttentionBackendEnum[name], f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    # vLLM resolves the registered path by attribute: FlashMLA and its like are imported then, and only then
    if name in BACKENDS:
        return backend_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def backend_class(name: str) -> Any:
    """vLLM's backend of this name with our implementation class."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path = AttentionBackendEnum[name].value
    stock: Any = resolve_obj_by_qualname(path)
    contracts.demand(OP, path.rpartition(".")[0])

    class Backend(stock):
        @staticmethod
        def get_impl_cls() -> Any:
            return impl_class(stock.get_impl_cls())

    Backend.__name__ = Backend.__qualname__ = name  # vLLM finds the class again by this path
    return Backend


@cache
def impl_class(stock: Any) -> Any:
    """A backend's implementation with `forward_mqa` by policy."""
    contracts.demand_parameters(OP, stock.forward_mqa, "self q kv_c_and_k_pe_cache attn_metadata layer")

    class BlackwellSparseMLAImpl(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.bk_policy = choose(self)
            status.record_layer(OP, layer_of(kwargs.get("indexer"), self), self.bk_policy.impl, self.bk_policy.reason)

        def forward_mqa(
            self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: Any, layer: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            tokens = (q[0] if isinstance(q, tuple) else q).shape[0]
            ours = tokens > 0 and self.bk_policy.use_ours(tokens)
            context.count(OP, layer.layer_name, "triton" if ours else "stock", tokens)
            if not ours:
                return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)
            return attend(self, q, kv_c_and_k_pe_cache, attn_metadata), None

    return BlackwellSparseMLAImpl


def choose(impl: Any) -> Policy:
    """The policy for an implementation, or stock with the reason why our operator cannot serve it."""
    from vllm.platforms import current_platform

    buffer, cache_dtype = impl.topk_indices_buffer, impl.kv_cache_dtype
    reason = None
    if impl.kv_lora_rank != 512 or impl.head_size != 576:
        reason = f"latent {impl.kv_lora_rank} of head size {impl.head_size}, not 512 of 576"
    elif not 8 <= impl.num_heads <= 128:
        reason = f"{impl.num_heads} heads per rank, not 8 to 128"
    elif cache_dtype not in ("auto", "bfloat16", "fp8_ds_mla"):
        reason = f"KV cache dtype {cache_dtype}, not bfloat16 or fp8_ds_mla"
    elif getattr(impl, "need_to_return_lse_for_decode", False):
        reason = "decode context parallelism is not supported"
    elif buffer is None:
        reason = "no buffer of selected entries"
    if reason is not None:
        status.fallback(OP, reason)
        return Policy("stock", reason)
    from blackwell_kernels import dsa  # noqa: F401  registers the operators
    from blackwell_kernels.dsa import config

    case = config.sparse_mla_case(impl.num_heads, buffer.shape[-1], cache_dtype == "fp8_ds_mla")
    return policy(OP, case, current_platform.device_type)


def layer_of(indexer: Any, impl: Any) -> str:
    """The attention layer's name, which vLLM does not tell its implementation: the indexer's cache has it."""
    prefix = getattr(getattr(indexer, "k_cache", None), "prefix", "")
    return prefix.removesuffix(".indexer.k_cache") + ".attn" if prefix else context.name_of(impl)


def attend(impl: Any, q: Any, kv_cache: torch.Tensor, metadata: Any) -> torch.Tensor:
    """q [T, H, 576] or ([T, H, 512], [T, H, 64]) bf16 over the entries in the impl's buffer -> [T, H, 512] bf16.

    kv_cache [blocks, page, 576] bf16 or [blocks, page, 656] fp8_ds_mla; the buffer's ids are request-local, -1 padded.
    """
    if isinstance(q, tuple):
        q = torch.cat(q, dim=-1)
    tokens = q.shape[0]
    out = q.new_empty(tokens, q.shape[1], impl.kv_lora_rank)
    if impl.kv_cache_dtype == "fp8_ds_mla":
        kv_cache = kv_cache.view(torch.uint8)
    torch.ops.blackwell_kernels.dsa_sparse_mla(
        q,
        kv_cache,
        impl.topk_indices_buffer[:tokens],
        metadata.req_id_per_token[:tokens],
        metadata.block_table,
        impl.scale,
        out,
        None,
    )
    return out


def serve_on_cpu(module: ModuleType) -> None:
    """Let the CPU platform choose our backend for sparse MLA, and keep what the user asked for."""
    cls = module.CpuPlatform
    stock_choice, stock_check = cls.get_attn_backend_cls.__func__, cls.check_and_update_config.__func__
    if hasattr(stock_choice, "stock") or not hasattr(module, "AttentionBackendEnum"):
        return
    contracts.demand(OP, module)

    @wraps(stock_choice)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        if attn_selector_config.use_sparse:
            return "blackwell_kernels.model_patches.dsa_cpu.SparseMLABackend"
        return stock_choice(cls, selected_backend, attn_selector_config, num_heads)

    @wraps(stock_check)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        # vLLM turns both off for its own CPU MLA, which reads no cached context; our backend reads it
        scheduler, caches = vllm_config.scheduler_config, vllm_config.cache_config
        asked = (scheduler.enable_chunked_prefill, caches.enable_prefix_caching, scheduler.max_num_batched_tokens)
        stock_check(cls, vllm_config)
        if vllm_config.model_config is not None and hasattr(vllm_config.model_config.hf_config, "index_topk"):
            scheduler.enable_chunked_prefill, caches.enable_prefix_caching, scheduler.max_num_batched_tokens = asked

    get_attn_backend_cls.stock = stock_choice  # type: ignore[attr-defined]
    check_and_update_config.stock = stock_check  # type: ignore[attr-defined]
    cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    cls.check_and_update_config = classmethod(check_and_update_config)
