"""Peers of the MoE operators, called as vLLM 0.24 calls them. Weight layouts that vLLM changes once at load are changed
in `bind`, outside of what is timed. Nothing here is imported before a peer runs.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench.ours import SHARED, Call, Inputs

BLOCK = [128, 128]


def _workspace(device: torch.device) -> None:
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(device)


def _config(x: Inputs, ep: int = 1) -> Any:
    """vLLM's description of the layer; with `ep` ranks this is the second, as in the workloads."""
    from dataclasses import replace

    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    local, hidden, inter = x["w2"].shape
    experts = x["expert_map"].numel() if "expert_map" in x else local
    parallel = FusedMoEParallelConfig.make_no_parallel()
    if ep > 1:
        parallel = replace(parallel, ep_size=ep, ep_rank=1, use_ep=True)
    return FusedMoEConfig(
        num_experts=experts,
        experts_per_token=x["topk_ids"].shape[1],
        hidden_dim=hidden,
        intermediate_size=inter,
        num_local_experts=local,
        num_logical_experts=experts,
        moe_parallel_config=parallel,
        activation=MoEActivation.SILU,
        in_dtype=torch.bfloat16,
        device=x["w2"].device,
        routing_method=RoutingMethodType.TopK,
        max_num_tokens=max(512, x["hidden_states"].shape[0]),
    )


def selected(x: Inputs) -> str:
    """Name of the expert class that vLLM itself picks for this layer; `implementations.stock` has to agree."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import select_fp8_moe_backend
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    experts = x["expert_map"].numel() if "expert_map" in x else x["w2"].shape[0]
    with set_current_vllm_config(VllmConfig()):
        config = _config(x, experts // x["w2"].shape[0])
        _, chosen = select_fp8_moe_backend(config, kFp8Static128BlockSym, kFp8Dynamic128Sym)
    return chosen.__name__ if chosen is not None else "none"


def _modular(x: Inputs, experts_class: Any, weights: tuple[torch.Tensor, ...]) -> Call:
    """One of vLLM's expert classes inside its modular kernel, as a served layer has it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.prepare_finalize import make_moe_prepare_and_finalize_no_dp_ep

    w13, w13_scale, w2, w2_scale = weights
    expert_map = x.get("expert_map")
    experts = x["w2"].shape[0] if expert_map is None else expert_map.numel()
    _workspace(w2.device)
    quant = fp8_w8a8_moe_quant_config(w1_scale=w13_scale, w2_scale=w2_scale, block_shape=BLOCK)
    with set_current_vllm_config(VllmConfig()):
        kernel = modular_kernel.FusedMoEKernel(
            make_moe_prepare_and_finalize_no_dp_ep(False),
            experts_class(_config(x, experts // x["w2"].shape[0]), quant),
        )

    def call() -> tuple[torch.Tensor, ...]:
        out = kernel.apply(
            hidden_states=x["hidden_states"],
            w1=w13,
            w2=w2,
            topk_weights=x["topk_weights"],
            topk_ids=x["topk_ids"],
            activation=MoEActivation.SILU,
            global_num_experts=experts,
            expert_map=expert_map,
            apply_router_weight_on_input=False,
        )
        return (out,)  # type: ignore[return-value]  # 0.32 may defer the last step; this class does not

    return call


# of each peer: what it was made of, and what was made
_kept: dict[str, tuple[weakref.ref[torch.Tensor], tuple[torch.Tensor, ...]]] = {}


def _once(x: Inputs, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Weights in another layout, made once for a layer and kept for all its input sets and cases, until its own go."""
    name = make.__qualname__

    def forget(gone: weakref.ref[torch.Tensor]) -> None:
        if name in _kept and _kept[name][0] is gone:
            del _kept[name]

    if name not in _kept or _kept[name][0]() is not x["w13"]:
        _kept.pop(name, None)  # released before the next ones are made
        _kept[name] = weakref.ref(x["w13"], forget), make()
    return _kept[name][1]


def _as_loaded(x: Inputs) -> tuple[torch.Tensor, ...]:
    return x["w13"], x["w13_scale"], x["w2"], x["w2_scale"]


def own_config(x: Inputs) -> dict[str, int]:
    """What vLLM's Triton kernel takes by itself: its shipped table for this shape, or else its heuristic.

    A table of the user's (VLLM_TUNED_CONFIG_FOLDER) is left aside: that is `triton_tuned`.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs, try_get_optimal_moe_config

    tokens, topk = x["topk_ids"].shape
    folder = os.environ.pop("VLLM_TUNED_CONFIG_FOLDER", None)
    get_moe_configs.cache_clear()
    try:
        return try_get_optimal_moe_config(x["w13"].shape, x["w2"].shape, topk, "fp8_w8a8", tokens, BLOCK)
    finally:
        if folder is not None:
            os.environ["VLLM_TUNED_CONFIG_FOLDER"] = folder
        get_moe_configs.cache_clear()


def heuristic_config(x: Inputs) -> dict[str, int]:
    """What vLLM's Triton kernel takes for a shape and a GPU that nobody tuned it for."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    tokens, topk = x["topk_ids"].shape
    experts, hidden, inter = x["w2"].shape
    return get_default_config(tokens, experts, inter, hidden, topk, "fp8_w8a8", BLOCK)


def shipped_table(local_experts: int, inter: int) -> Path | None:
    """The table for this shape and GPU that comes with vLLM, if one does."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    name = fused_moe.get_config_file_name(local_experts, inter, "fp8_w8a8", BLOCK)
    path = Path(fused_moe.__file__).parent / "configs" / name
    return path if path.is_file() else None


def configured(x: Inputs, config: dict[str, int]) -> Call:
    """vLLM's TritonExperts with one configuration."""
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    inner = _modular(x, TritonExperts, _as_loaded(x))

    def call() -> tuple[torch.Tensor, ...]:
        with override_config(config):
            return inner()

    return call


def triton(x: Inputs) -> Call:
    """vLLM's TritonExperts as it comes."""
    return configured(x, own_config(x))


def triton_heuristic(x: Inputs) -> Call:
    """vLLM's TritonExperts with the configuration it would take if it shipped no table for this shape.

    Raises: MissingRequirementError where it ships none: then `triton` is that.
    """
    local, _, inter = x["w2"].shape
    if shipped_table(local, inter) is None:
        raise MissingRequirementError("vLLM ships no table for this shape: vllm.TritonExperts takes its heuristic")
    return configured(x, heuristic_config(x))


def tuned_table(local_experts: int, inter: int) -> dict[int, dict[str, int]]:
    """The table for this shape in VLLM_TUNED_CONFIG_FOLDER, tokens -> configuration.

    Raises: MissingRequirementError saying which file is missing where, or that vLLM ships a table for this shape.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    folder = os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
    name = get_config_file_name(local_experts, inter, "fp8_w8a8", BLOCK)
    if not folder or not (Path(folder) / name).is_file():
        if shipped_table(local_experts, inter) is not None:
            raise MissingRequirementError(f"vLLM ships {name}: vllm.TritonExperts runs with it")
        raise MissingRequirementError(
            f"no {name} in VLLM_TUNED_CONFIG_FOLDER{'' if folder else ' (unset)'}: tune vLLM's kernel first, with "
            "python -m blackwell_kernels.microbench.moe_search"
        )
    table = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    return {int(tokens): config for tokens, config in table.items() if tokens != "triton_version"}


def triton_tuned(x: Inputs) -> Call:
    """vLLM's TritonExperts with the best configuration of a search at this number of tokens, or the nearest."""
    table = tuned_table(x["w2"].shape[0], x["w2"].shape[2])
    tokens = x["hidden_states"].shape[0]
    return configured(x, table[min(table, key=lambda size: abs(size - tokens))])


def deep_gemm(x: Inputs) -> Call:
    """vLLM's DeepGemmExperts (contiguous grouped GEMM), with weights and scales as vLLM prepares them at load.

    Its default on Hopper too (VLLM_USE_DEEP_GEMM_E8M0=1) requantises the weights to power-of-two scales: a second
    rounding to e4m3 that the reference does not make, 1 - similarity of 1.7e-3 by itself, hence "less accurate".
    Under expert parallelism it is slow by its own design, not by this binding: without counts on the host its matrices
    have a row for each of all ranks' pairs (T * K and padding), and on SM90 DeepGEMM loads and stores tiles of other
    ranks as well and leaves out their products alone: eight times the traffic that EP8 has work for.
    """
    from vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe import DeepGemmExperts
    from vllm.model_executor.layers.quantization.utils.fp8_utils import prepare_fp8_moe_layer_for_deepgemm

    def make() -> tuple[torch.Tensor, ...]:
        # requantises in place where scales must be powers of two
        w13, w2, w13_scale, w2_scale = prepare_fp8_moe_layer_for_deepgemm(
            x["w13"].clone(),
            x["w2"].clone(),
            x["w13_scale"].clone(),
            x["w2_scale"].clone(),
            (128, 128),  # type: ignore[arg-type]
        )
        return w13, w13_scale, w2, w2_scale

    return _modular(x, DeepGemmExperts, _once(x, make))


def flashinfer_cutlass(x: Inputs) -> Call:
    """vLLM's FlashInferExperts (`cutlass_fused_moe`, block FP8), up rows first as it wants them.

    vLLM 0.24 chooses it on Hopper wherever experts are parallel (oracle/fp8.py, no variable needed) and FlashInfer is
    usable: nvcc to compile it, or its cubins. Elsewhere the next in its list is DeepGEMM, which under expert
    parallelism is slower than Triton: the fastest peer, which stands in for a stock without a time, is no weaker rival.
    Its workspace never shrinks: the sizes of a process have to grow, or small ones carry what a large one needed.

    Raises: MissingRequirementError where FlashInfer would compile its kernels first: a hundred files, nvcc for most of
    an hour, in which a benchmark looks hung.
    """
    from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

    if not gen_cutlass_fused_moe_sm90_module().is_compiled:
        raise MissingRequirementError(
            "FlashInfer's cutlass_fused_moe is not compiled; flashinfer-jit-cache has it compiled, or compile it with "
            "flashinfer.jit.fused_moe.gen_cutlass_fused_moe_sm90_module().build_and_load()"
        )
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutlass_moe import FlashInferExperts
    from vllm.model_executor.layers.quantization.utils.flashinfer_utils import swap_w13_to_w31

    def make() -> tuple[torch.Tensor, ...]:
        return swap_w13_to_w31(x["w13"]), swap_w13_to_w31(x["w13_scale"]), x["w2"], x["w2_scale"]

    return _modular(x, FlashInferExperts, _once(x, make))


def flashinfer_trtllm(x: Inputs) -> Call:
    """vLLM's TrtLlmFp8ExpertsModular, which needs SM100, with its shuffled weights."""
    from vllm.model_executor.layers.fused_moe.experts.trtllm_fp8_moe import TrtLlmFp8ExpertsModular
    from vllm.model_executor.layers.quantization.utils import flashinfer_utils as fi

    def make() -> tuple[torch.Tensor, ...]:
        w13, w2 = fi._shuffle_deepseek_fp8_moe_weights(fi.swap_w13_to_w31(x["w13"]), x["w2"])
        return w13, fi.swap_w13_to_w31(x["w13_scale"]), w2, x["w2_scale"]

    return _modular(x, TrtLlmFp8ExpertsModular, _once(x, make))


def flashinfer_contest(x: Inputs) -> Call:
    """FlashInfer's trtllm_fp8_block_scale_moe: the contest's own baseline, routing included."""
    from flashinfer.fused_moe import trtllm_fp8_block_scale_moe

    local, _, inter = x["gemm2_weights"].shape

    def call() -> tuple[torch.Tensor, ...]:
        out = trtllm_fp8_block_scale_moe(
            x["routing_logits"],
            x["routing_bias"],
            x["hidden_states"],
            x["hidden_states_scale"],
            x["gemm1_weights"],
            x["gemm1_weights_scale"],
            x["gemm2_weights"],
            x["gemm2_weights_scale"],
            x["routing_logits"].shape[1],
            8,
            8,
            4,
            inter,
            int(x["local_expert_offset"]),
            local,
            float(x["routed_scaling_factor"]),
            routing_method_type=2,  # DeepSeek-V3
        )
        return (out[0] if isinstance(out, list) else out,)

    return call


def triton_contest(x: Inputs) -> Call:
    """vLLM's grouped routing, then its TritonExperts on the quantised activations, as it comes.

    Once at load: gate rows first, as vLLM wants them. In the call: activation scales token-major.
    """
    from vllm import _custom_ops as ops
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    (tokens, every), device = x["routing_logits"].shape, x["routing_logits"].device
    (local, hidden, inter), first = x["gemm2_weights"].shape, int(x["local_expert_offset"])
    expert_map = torch.full((every,), -1, dtype=torch.int32, device=device)
    expert_map[first : first + local] = torch.arange(local, dtype=torch.int32, device=device)
    layer = {
        "w13": x["gemm1_weights"],
        "w2": x["gemm2_weights"],
        "hidden_states": x["hidden_states"],
        "topk_ids": torch.empty(tokens, 8, device="meta"),
        "expert_map": expert_map,
    }

    def make() -> tuple[torch.Tensor, ...]:
        def gate_first(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat(rows.chunk(2, dim=1)[::-1], dim=1)

        return gate_first(x["gemm1_weights"]), gate_first(x["gemm1_weights_scale"])

    w13, w13_scale = _once(layer, make)
    quant = fp8_w8a8_moe_quant_config(w1_scale=w13_scale, w2_scale=x["gemm2_weights_scale"], block_shape=BLOCK)
    with set_current_vllm_config(VllmConfig()):
        experts = TritonExperts(_config(layer, every // local), quant)
    # as large as the class asks for; input sets share them, as layers share vLLM's
    shapes = experts.workspace_shapes(tokens, 2 * inter, hidden, 8, every, local, None, MoEActivation.SILU)[:2]
    made = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    workspace13, workspace2 = x[SHARED].setdefault("workspaces", made)
    bias, factor = x["routing_bias"].float(), float(x["routed_scaling_factor"])

    def call() -> tuple[torch.Tensor, ...]:
        weights, ids = ops.grouped_topk(x["routing_logits"], 8, 4, 8, True, factor, bias, 1)
        out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
        experts.apply(
            output=out,
            hidden_states=x["hidden_states"],
            w1=w13,
            w2=x["gemm2_weights"],
            topk_weights=weights,
            topk_ids=ids,
            activation=MoEActivation.SILU,
            global_num_experts=every,
            expert_map=expert_map,
            a1q_scale=x["hidden_states_scale"].t().contiguous(),
            a2_scale=None,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return (out,)

    return call


def grouped_topk(x: Inputs) -> Call:
    """vLLM's fused CUDA kernel for DeepSeek's grouped routing."""
    from vllm import _custom_ops as ops

    def call() -> tuple[torch.Tensor, ...]:
        weights, ids = ops.grouped_topk(
            x["router_logits"],
            int(x["n_group"]),
            int(x["topk_group"]),
            8,
            bool(x["renormalize"]),
            float(x["routed_scaling_factor"]),
            x["bias"],
            1,  # sigmoid scores
        )
        return weights, ids

    return call


def topk_softmax(x: Inputs) -> Call:
    """vLLM's fused CUDA kernel for softmax routing."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    logits = x["router_logits"]

    def call() -> tuple[torch.Tensor, ...]:
        weights, ids, _ = fused_topk(logits, logits, 10, bool(x["renormalize"]))
        return weights, ids

    return call
