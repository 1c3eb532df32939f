"""Peers of the Gated Delta Net operators, called as vLLM 0.24 calls them: state pools are gathered from and scattered
to in the call, per-step metadata is made in `bind`. Nothing here is imported before a peer runs.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch

from blackwell_kernels.microbench.ours import Call, Inputs


def _packed_decode(x: Inputs, state: torch.Tensor, slots: torch.Tensor, l2norm: bool) -> Any:
    from vllm.model_executor.layers.fla.ops import fused_recurrent_gated_delta_rule_packed_decode

    def decode(mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(slots), 1, *state.shape[1:3], dtype=mixed_qkv.dtype, device=state.device)
        fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=mixed_qkv,
            a=a,
            b=b,
            A_log=x["A_log"],
            dt_bias=x["dt_bias"],
            scale=float(x["scale"]),
            initial_state=pool,
            out=out,
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=l2norm,
        )
        return out.squeeze(1)

    return decode


def packed_decode(x: Inputs) -> Call:
    """vLLM's packed decode kernel (FLA's recurrence)."""
    state = x["state"]
    decode = _packed_decode(x, state, x["state_indices"], True)
    return lambda: (decode(x["mixed_qkv"], x["a"], x["b"], state), state)


def _pretranspose(state: torch.Tensor) -> Any:
    """FlashInfer's decode for value-major states: a kernel of its own for bfloat16, another for float32.

    Raises: what FlashInfer swallows when one of its CuTe-DSL kernels cannot be imported; it would then take a bfloat16
    state for a float32 one, or call None.
    """
    kind = "bf16_state" if state.dtype is torch.bfloat16 else "pretranspose"
    importlib.import_module(f"flashinfer.gdn_kernels.gdn_decode_{kind}")
    return importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose


def flashinfer_decode(x: Inputs) -> Call:
    """FlashInfer's CuTe-DSL decode over the pool; q, k and v are unpacked in the call."""
    state, mixed_qkv = x["state"], x["mixed_qkv"]
    decode, batch, v_heads = _pretranspose(state), mixed_qkv.shape[0], state.shape[1]
    key = (mixed_qkv.shape[1] - v_heads * 128) // 2

    def call() -> tuple[torch.Tensor, ...]:
        q, k, v = (part.contiguous().view(batch, 1, -1, 128) for part in mixed_qkv.split([key, key, v_heads * 128], -1))
        out, _ = decode(
            q,
            k,
            v,
            None,
            x["A_log"],
            x["a"].unsqueeze(1),
            x["dt_bias"],
            x["b"].unsqueeze(1),
            scale=float(x["scale"]),
            use_qk_l2norm=True,
            initial_state=state,
            initial_state_indices=x["state_indices"],
        )
        return out.squeeze(1), state

    return call


def core_decode(x: Inputs) -> Call:
    """vLLM's convolution update and packed decode."""
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

    state, slots, conv = x["state"], x["state_indices"], x["conv_state"]
    decode = _packed_decode(x, state, slots, True)

    def call() -> tuple[torch.Tensor, ...]:
        # as in vLLM, its result overwrites its input
        mixed_qkv = causal_conv1d_update(
            x["mixed_qkv"],
            conv.transpose(-1, -2),
            x["conv_weight"],
            None,
            "silu",
            conv_state_indices=slots,
            validate_data=False,
        )
        return decode(mixed_qkv, x["a"], x["b"], state), state, conv

    return call


def core_drafts(x: Inputs) -> Call:
    """vLLM's speculative path: convolution update, its layer's own split into q, k and v, the recurrence."""
    from vllm.model_executor.layers.fla.ops import fused_sigmoid_gating_delta_rule_update
    from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention as Layer
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

    state, slots, conv = x["state"], x["state_indices"], x["conv_state"]
    value_dim = state.shape[1] * 128
    key_dim = (x["mixed_qkv"].shape[1] - value_dim) // 2
    layer: Any = SimpleNamespace(key_dim=key_dim, value_dim=value_dim, tp_size=1, head_k_dim=128, head_v_dim=128)

    def call() -> tuple[torch.Tensor, ...]:
        # as in vLLM, its result overwrites its input
        mixed_qkv = causal_conv1d_update(
            x["mixed_qkv"],
            conv.transpose(-1, -2),
            x["conv_weight"],
            None,
            "silu",
            conv_state_indices=slots[:, 0],
            num_accepted_tokens=x["num_accepted_tokens"],
            query_start_loc=x["cu_seqlens"],
            max_query_len=slots.size(-1),
            validate_data=False,
        )
        q, k, v = Layer.rearrange_mixed_qkv(layer, mixed_qkv)
        out, _ = fused_sigmoid_gating_delta_rule_update(
            A_log=x["A_log"],
            a=x["a"],
            b=x["b"],
            dt_bias=x["dt_bias"],
            q=q,
            k=k,
            v=v,
            scale=float(x["scale"]),
            initial_state=state,
            inplace_final_state=True,
            cu_seqlens=x["cu_seqlens"],
            ssm_state_indices=slots,
            num_accepted_tokens=x["num_accepted_tokens"],
            use_qk_l2norm_in_kernel=True,
        )
        return out.squeeze(0), state, conv

    return call


def contest_packed_decode(x: Inputs) -> Call:
    """vLLM's packed decode; the contest's separate tensors are packed and its state copied into a pool in the call."""
    state, batch = x["state"], x["q"].shape[0]
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device=state.device)
    decode = _packed_decode(x, state, slots, False)

    def call() -> tuple[torch.Tensor, ...]:
        pool = torch.empty(batch + 1, *state.shape[1:], dtype=state.dtype, device=state.device)
        pool[1:].copy_(state)
        mixed_qkv = torch.cat([x[name].flatten(1) for name in ("q", "k", "v")], -1)
        return decode(mixed_qkv, x["a"].squeeze(1), x["b"].squeeze(1), pool).unsqueeze(1), pool[1:]

    return call


def contest_flashinfer_decode(x: Inputs) -> Call:
    """FlashInfer's decode; it updates the state in place, so a copy of it is made in the call."""
    decode = _pretranspose(x["state"])

    def call() -> tuple[torch.Tensor, ...]:
        state = x["state"].clone()
        out, _ = decode(
            x["q"],
            x["k"],
            x["v"],
            state,
            x["A_log"],
            x["a"],
            x["dt_bias"],
            x["b"],
            scale=float(x["scale"]),
            use_qk_l2norm=False,
        )
        return out, state

    return call


def _fla_chunk(offsets: torch.Tensor, scale: float, l2norm: bool = False) -> Any:
    """vLLM's copy of FLA's chunked prefill; chunk indices are made once a step."""
    from vllm.model_executor.layers.fla.ops import chunk_gated_delta_rule
    from vllm.model_executor.layers.fla.ops.index import prepare_chunk_indices, prepare_chunk_offsets
    from vllm.model_executor.layers.fla.ops.utils import FLA_CHUNK_SIZE

    host = offsets.cpu()
    chunk_indices = prepare_chunk_indices(host, FLA_CHUNK_SIZE).to(offsets.device)
    chunk_offsets = prepare_chunk_offsets(host, FLA_CHUNK_SIZE).to(offsets.device)

    def run(q: Any, k: Any, v: Any, g: Any, beta: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, final = chunk_gated_delta_rule(
            q=q.unsqueeze(0),
            k=k.unsqueeze(0),
            v=v.unsqueeze(0),
            g=g.unsqueeze(0),
            beta=beta.unsqueeze(0),
            scale=scale,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=offsets,
            chunk_indices=chunk_indices,
            chunk_offsets=chunk_offsets,
            use_qk_l2norm_in_kernel=l2norm,
        )
        return out.squeeze(0), final

    return run


def _flashinfer_chunk(offsets: torch.Tensor, scale: float) -> Any:
    """FlashInfer's prefill: wants e^g and a float32 state."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    def run(q: Any, k: Any, v: Any, g: Any, beta: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=torch.exp(g),
            beta=beta,
            scale=scale,
            initial_state=state.to(torch.float32),
            output_final_state=True,
            cu_seqlens=offsets.to(torch.int64),
        )

    return run


def _fla_core_chunk(offsets: torch.Tensor, scale: float) -> Any:
    """fla-core's own chunked prefill, value-major state."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    device_offsets, host_offsets = offsets.to(torch.int64), offsets.cpu().to(torch.int64)

    def run(q: Any, k: Any, v: Any, g: Any, beta: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, final = chunk_gated_delta_rule(
            q=q.unsqueeze(0),
            k=k.unsqueeze(0),
            v=v.unsqueeze(0),
            g=g.unsqueeze(0),
            beta=beta.unsqueeze(0),
            scale=scale,
            initial_state=state.to(torch.float32),
            output_final_state=True,
            state_v_first=True,
            cu_seqlens=device_offsets,
            cu_seqlens_cpu=host_offsets,
        )
        return out.squeeze(0), final

    return run


def _over_pool(x: Inputs, chunk: Any) -> Any:
    """Gather initial states, run, scatter final ones: what vLLM's layer does around its prefill kernel."""
    state, slots, fresh = x["state"], x["state_indices"].long(), ~x["has_initial_state"]

    def run(q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
        initial = state[slots]
        initial.masked_fill_(fresh[:, None, None, None], 0)
        out, final = chunk(q, k, v, g, beta, initial)
        state[slots] = final.to(state.dtype)
        return out

    return run


def _prefill(x: Inputs, chunk: Any) -> Call:
    run = _over_pool(x, chunk)
    return lambda: (run(x["q"], x["k"], x["v"], x["g"], x["beta"]), x["state"])


def fla_prefill(x: Inputs) -> Call:
    """vLLM with --gdn-prefill-backend triton."""
    return _prefill(x, _fla_chunk(x["cu_seqlens"], float(x["scale"])))


def fla_prefill_raw_qk(x: Inputs) -> Call:
    """The same with its normalisation of q and k."""
    return _prefill(x, _fla_chunk(x["cu_seqlens"], float(x["scale"]), l2norm=True))


def flashinfer_prefill(x: Inputs) -> Call:
    """vLLM's default on Hopper: FlashInfer's kernel, compiled at first use (minutes)."""
    return _prefill(x, _flashinfer_chunk(x["cu_seqlens"], float(x["scale"])))


def fla_core_prefill(x: Inputs) -> Call:
    """fla-core, with vLLM's state pool around it."""
    return _prefill(x, _fla_core_chunk(x["cu_seqlens"], float(x["scale"])))


def _contest_prefill(x: Inputs, make_chunk: Any) -> Call:
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layer

    chunk = make_chunk(x["cu_seqlens"].to(torch.int32), float(x["scale"]))

    def call() -> tuple[torch.Tensor, ...]:
        g, beta = layer.fused_gdn_gating(  # type: ignore[attr-defined]  # not in 0.32
            x["A_log"], x["a"], x["b"], x["dt_bias"]
        )
        return chunk(x["q"], x["k"], x["v"], g.squeeze(0), beta.squeeze(0).float(), x["state"])

    return call


def contest_fla_prefill(x: Inputs) -> Call:
    """vLLM's gates and its FLA kernels."""
    return _contest_prefill(x, _fla_chunk)


def contest_flashinfer_prefill(x: Inputs) -> Call:
    """vLLM's gates and FlashInfer's kernel: the contest's baseline."""
    return _contest_prefill(x, _flashinfer_chunk)


def _convolution(x: Inputs) -> Any:
    """vLLM's convolution; its metadata is made once a step."""
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn
    from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

    offsets = x["cu_seqlens"]
    nums, batch_ptr, chunk_offsets = compute_causal_conv1d_metadata(offsets.cpu(), device=offsets.device)
    metadata = SimpleNamespace(nums_dict=nums, batch_ptr=batch_ptr, token_chunk_offset_ptr=chunk_offsets)

    def convolved() -> torch.Tensor:
        return causal_conv1d_fn(
            x["mixed_qkv"].transpose(0, 1),
            x["conv_weight"],
            None,
            activation="silu",
            conv_states=x["conv_state"].transpose(-1, -2),
            has_initial_state=x["has_initial_state"],
            cache_indices=x["state_indices"],
            query_start_loc=offsets,
            metadata=metadata,
        ).transpose(0, 1)

    return convolved


def _core_prefill(x: Inputs, make_chunk: Any) -> Call:
    from vllm.model_executor.layers.fla.ops.fused_gdn_prefill_post_conv import fused_post_conv_prep

    offsets, conv, state, mixed_qkv = x["cu_seqlens"], x["conv_state"], x["state"], x["mixed_qkv"]
    convolved = _convolution(x)
    run = _over_pool(x, make_chunk(offsets, float(x["scale"])))
    heads = (mixed_qkv.shape[1] - state.shape[1] * 128) // 256

    def call() -> tuple[torch.Tensor, ...]:
        q, k, v, g, beta = fused_post_conv_prep(
            conv_output=convolved(),
            a=x["a"],
            b=x["b"],
            A_log=x["A_log"],
            dt_bias=x["dt_bias"],
            num_k_heads=heads,
            head_k_dim=128,
            head_v_dim=128,
            apply_l2norm=True,
            output_g_exp=False,
        )
        return run(q, k, v, g, beta), state, conv

    return call


def core_fla_prefill(x: Inputs) -> Call:
    """vLLM's convolution, its preparation kernel, its FLA kernels."""
    return _core_prefill(x, _fla_chunk)


def core_flashinfer_prefill(x: Inputs) -> Call:
    """vLLM's convolution, its preparation kernel, FlashInfer's prefill."""
    return _core_prefill(x, _flashinfer_chunk)
