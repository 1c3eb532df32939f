"""Gated Delta Net layers of Qwen3-Next: convolution, gates and recurrence by our operators, for every kind of batch.

Why: vLLM has no registry for these kernels, and its narrower hooks miss mixed batches, of which agent traffic is full.
How: a subclass registered with `QwenGatedDeltaNetAttention.register_oot` overrides `_forward_core`, which vLLM's opaque
splitting op calls; on a CPU (0.32) vLLM's own core op is pointed at the same method. Which half of a batch is ours is
`select.policy`'s decision; a half that is not ours is handed to stock code with metadata cut to that half. Nothing here
synchronises with the device. Padding rows have slot 0: their output stays zero and nothing is written.
Upstream: `_forward_core(mixed_qkv, b, a, core_attn_out)` is unchanged from 0.22.1 to 0.33.
Remove when: vLLM offers a registry for GDN kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch

from blackwell_kernels import env, status
from blackwell_kernels.model_patches import contracts
from blackwell_kernels.model_patches.context import batch_phase, step_metadata
from blackwell_kernels.select import Policy, policy, summary

OPS = ("gdn_decode", "gdn_prefill")
METADATA = "vllm.v1.attention.backends.gdn_attn"
LAYER = "QwenGatedDeltaNetAttention"
CONV_HISTORY = 3


def register_layer(module: Any) -> None:
    """Have vLLM build our subclass of its layer."""
    from vllm.model_executor.custom_op import op_registry_oot

    contracts.demand(OPS, module, METADATA)
    if LAYER not in op_registry_oot:
        base = module.QwenGatedDeltaNetAttention
        base.register_oot(layer_class(base), name=LAYER)


def replace_cpu_core(module: Any) -> None:
    """On a CPU, have vLLM register our core as its operator."""
    if not _on_cpu() or hasattr(module.cpu_gdn_attention_core, "stock"):
        return
    contracts.demand(OPS, module)
    stock = module.cpu_gdn_attention_core

    def cpu_gdn_attention_core(mixed_qkv, b, a, core_attn_out, layer_name):  # type: ignore[no-untyped-def]
        from vllm.forward_context import get_forward_context

        layer = get_forward_context().no_compile_layers[module._resolve_layer_name(layer_name)]
        if isinstance(layer, Served):
            layer._forward_core(mixed_qkv, b, a, core_attn_out)
        else:
            stock(mixed_qkv, b, a, core_attn_out, layer_name)

    # vLLM derives the operator's schema from these; as text they would be looked up in this file
    cpu_gdn_attention_core.__annotations__ = {**get_type_hints(stock), "return": None}
    cpu_gdn_attention_core.stock = stock  # type: ignore[attr-defined]
    module.cpu_gdn_attention_core = cpu_gdn_attention_core


class Served:
    """Marks a layer that runs this module's `_forward_core`."""

    _forward_core: Callable[..., None]


def unsupported(layer: Any) -> str | None:
    """Why our operators cannot serve this layer, or None."""
    if (layer.head_k_dim, layer.head_v_dim) != (128, 128):
        return f"head sizes {layer.head_k_dim} and {layer.head_v_dim}, not 128 and 128"
    if layer.num_v_heads % layer.num_k_heads:
        return f"{layer.num_v_heads} value heads are no multiple of {layer.num_k_heads} key heads"
    if layer.conv_kernel_size != CONV_HISTORY + 1:
        return f"a convolution over {layer.conv_kernel_size} tokens, not 4"
    if layer.activation not in ("silu", "swish"):
        return f"activation {layer.activation}, not silu"
    return None


def layer_class(base: type) -> type:
    """The subclass of vLLM's layer `base` whose core runs our operators."""

    class BlackwellGatedDeltaNet(base, Served):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.bk_decode, self.bk_prefill, self.bk_draft = policies(self)
            status.record_layer("gdn_decode", self.prefix, self.bk_decode.impl, self.bk_decode.reason)
            status.record_layer("gdn_prefill", self.prefix, self.bk_prefill.impl, self.bk_prefill.reason)

        def _forward_core(
            self, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor
        ) -> None:
            """mixed_qkv [T, 2*H*128 + HV*128], b and a [T, HV], core_attn_out [T, HV, 128], zero on entry."""
            batch = step_metadata()
            metadata = None if batch is None else batch.get(self.prefix)
            if batch is None or metadata is None:
                return self._bk_profile_run(mixed_qkv, b, a, core_attn_out)
            if metadata.num_actual_tokens == 0:
                return None
            step = _Step(self, self.kv_cache, metadata, batch_phase(batch), mixed_qkv, b, a, core_attn_out)
            if metadata.spec_sequence_masks is not None:
                return step.speculative()
            return step.run()

        def _bk_profile_run(self, *tensors: torch.Tensor) -> None:
            """No metadata yet: compile what will run, ours and stock's, before vLLM gives the memory away."""
            if _on_cpu():
                return
            if self.bk_prefill.impl != "triton":
                super()._forward_core(*tensors)
            if "stock" not in (self.bk_decode.impl, self.bk_prefill.impl):
                warm_up(self, *tensors)

        def _bk_stock(self, *tensors: torch.Tensor) -> None:
            """The whole step by stock code."""
            if not _on_cpu():
                return super()._forward_core(*tensors)
            import vllm.model_executor.layers.mamba.ops.cpu.gdn_attention as cpu
            from vllm.utils.torch_utils import _encode_layer_name

            stock = getattr(cpu.cpu_gdn_attention_core, "stock", cpu.cpu_gdn_attention_core)
            return stock(*tensors, _encode_layer_name(self.prefix))

        def _bk_stock_decode_half(self, metadata: Any, *tensors: torch.Tensor) -> None:
            """The first num_decode_tokens tokens by stock code."""
            names = ("mixed_qkv", "b", "a", "core_attn_out")
            half = _cut(metadata, "decode", _decode_half)
            super()._forward_core_decode_non_spec(**dict(zip(names, tensors, strict=True)), attn_metadata=half)

        def _bk_stock_prefill_half(self, metadata: Any, *tensors: torch.Tensor) -> None:
            """The tokens after the decodes by stock code, which finds its metadata in the forward context."""
            batch = step_metadata()
            assert batch is not None
            whole, batch[self.prefix] = batch[self.prefix], _cut(metadata, "prefill", _prefill_half)
            try:
                super()._forward_core(*(tensor[metadata.num_decode_tokens :] for tensor in tensors))
            finally:
                batch[self.prefix] = whole

    return BlackwellGatedDeltaNet


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


class Prefill:
    """A layer's policy for prefill, by how many sequences share a step's tokens."""

    def __init__(self, parts: dict[str, Policy]) -> None:
        self.parts = parts
        self.impl, self.reason = summary(parts)

    def use_ours(self, tokens: int, num_seqs: int) -> bool:
        """Whether `tokens` tokens of `num_seqs` sequences are ours."""
        from blackwell_kernels.gdn import config

        return self.parts[config.sequences_of(num_seqs)].use_ours(tokens)


def policies(layer: Any) -> tuple[Policy, Prefill, Policy]:
    """A layer's policy for decode, prefill and the drafts of speculative decoding."""
    from vllm.platforms import current_platform

    reason = unsupported(layer)
    if reason is not None:
        for op in OPS:
            status.fallback(op, reason)
        return _all_stock(reason)
    from blackwell_kernels.gdn import config

    sizes = (layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size, layer.head_k_dim)
    case, device = partial(config.case_of, *sizes, layer.get_state_dtype()[1]), current_platform.device_type
    decode = policy("gdn_decode", case(fused_conv=True, multi_token=False), device)
    draft = policy("gdn_decode", case(fused_conv=True, multi_token=True), device)
    prefill = Prefill({kind: policy("gdn_prefill", case(sequences=kind), device) for kind in config.SEQUENCES})
    if _on_cpu() and "stock" in (decode.impl, prefill.impl):
        reason = (
            f"{env.DISABLE.name} names one of gdn_decode and gdn_prefill; on a CPU their states differ from stock's"
        )
        return _all_stock(reason)
    return decode, prefill, draft


def _all_stock(reason: str) -> tuple[Policy, Prefill, Policy]:
    from blackwell_kernels.gdn import config

    stock = Policy("stock", reason)
    return stock, Prefill(dict.fromkeys(config.SEQUENCES, stock)), stock


class _Step:
    """One layer's share of one step."""

    def __init__(self, layer: Any, caches: Any, metadata: Any, phase: str, *tensors: torch.Tensor) -> None:
        self.layer, self.metadata, self.phase, self.tensors = layer, metadata, phase, tensors
        self.mixed_qkv, self.b, self.a, self.out = tensors
        self.conv_state, self.state = caches[0], caches[1]
        if self.conv_state.shape[-1] != self.mixed_qkv.shape[-1]:
            # VLLM_SSM_CONV_STATE_LAYOUT=DS keeps [slots, channels, rows]
            self.conv_state = self.conv_state.transpose(-1, -2)
        weight = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", layer.conv1d.weight)
        self.conv_weight = weight.view(weight.size(0), weight.size(-1))
        self.ops = torch.ops.blackwell_kernels

    def run(self) -> None:
        """A batch without speculative decoding: decodes first, one token each, then prefills."""
        layer, m = self.layer, self.metadata
        if not m.num_prefills:
            tokens = m.num_actual_tokens if m.num_decodes else 0
            ours = tokens > 0 and layer.bk_decode.use_ours(tokens)
            if ours:
                self.decode(tokens)
            else:
                layer._bk_stock(*self.tensors)
            self.count("gdn_decode", ours, tokens)
            return
        decodes, prefills = m.num_decode_tokens, m.num_prefill_tokens
        ours_decode = decodes > 0 and layer.bk_decode.use_ours(decodes)
        ours_prefill = layer.bk_prefill.use_ours(prefills, m.num_prefills)
        self.count("gdn_decode", ours_decode, decodes)
        self.count("gdn_prefill", ours_prefill, prefills)
        if not ours_decode and not ours_prefill:
            layer._bk_stock(*self.tensors)
            return
        if ours_decode:
            self.decode(decodes)
        elif decodes:
            layer._bk_stock_decode_half(m, *self.tensors)
        if ours_prefill:
            self.prefill(*_rows(self.tensors, decodes, prefills))
        else:
            layer._bk_stock_prefill_half(m, *self.tensors)

    def speculative(self) -> None:
        """A batch in which some sequences have several draft tokens; the others, if any, count as prefills.

        Stock 0.24 gives the draft tokens of such a mixed batch the gates of other tokens: where both operators serve
        this layer at all, the mixed batch is theirs, whatever is faster.
        """
        layer, m = self.layer, self.metadata
        drafts, prefills = m.num_spec_decode_tokens, m.num_prefill_tokens
        if prefills:
            ours = "stock" not in (layer.bk_draft.impl, layer.bk_prefill.impl)
        else:
            ours = layer.bk_draft.use_ours(drafts)
        self.count("gdn_decode", ours, drafts)
        self.count("gdn_prefill", ours, prefills)
        if not ours:
            layer._bk_stock(*self.tensors)
            return
        if not prefills:
            self.draft(*_rows(self.tensors, 0, m.num_actual_tokens))
            return
        for run, chosen in ((self.draft, m.spec_token_indx), (self.prefill, m.non_spec_token_indx)):
            mixed_qkv, b, a = (tensor.index_select(0, chosen) for tensor in self.tensors[:3])
            out = self.out.new_zeros(mixed_qkv.shape[0], *self.out.shape[1:])
            run(mixed_qkv, b, a, out)
            self.out.index_copy_(0, chosen, out)

    def decode(self, tokens: int) -> None:
        """One token of each of the first `tokens` sequences."""
        indices = self.metadata.non_spec_state_indices_tensor[:tokens]
        mixed_qkv, b, a, out = _rows(self.tensors, 0, tokens)
        self._decode(mixed_qkv, b, a, out, indices, self.conv_state)

    def draft(self, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        """Several tokens a sequence: the state after token t goes to column t of the slot table."""
        m = self.metadata
        sequences = m.num_spec_decodes
        slots = m.spec_state_indices_tensor[:sequences]
        self._decode(
            mixed_qkv,
            b,
            a,
            out,
            slots,
            self.conv_state,
            cu_seqlens=m.spec_query_start_loc[: sequences + 1],
            num_accepted_tokens=m.num_accepted_tokens[:sequences],
            conv_state_indices=slots[:, 0],
        )

    def _decode(
        self,
        mixed_qkv: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        out: torch.Tensor,
        slots: torch.Tensor,
        conv_state: torch.Tensor,
        **several: torch.Tensor,
    ) -> None:
        layer = self.layer
        self.ops.gdn_decode(
            mixed_qkv,
            a,
            b,
            layer.A_log,
            layer.dt_bias,
            self.state,
            slots,
            out,
            scale=layer.head_k_dim**-0.5,
            conv_state=conv_state,
            conv_weight=self.conv_weight,
            conv_bias=layer.conv1d.bias,
            **several,
        )

    def prefill(self, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        """Whole sequences or chunks of them, packed."""
        layer, m, ops = self.layer, self.metadata, self.ops
        slots, started, cu = m.prefill_state_indices, m.prefill_has_initial_state, m.prefill_query_start_loc
        tokens, heads = mixed_qkv.shape[0], layer.num_k_heads // layer.tp_size
        q, k = (mixed_qkv.new_empty(tokens, heads, layer.head_k_dim) for _ in range(2))
        v = mixed_qkv.new_empty(out.shape)
        g, beta = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(2))
        ops.gdn_prepare(
            mixed_qkv,
            a,
            b,
            layer.A_log,
            layer.dt_bias,
            q,
            k,
            v,
            g,
            beta,
            conv_state=self.conv_state,
            conv_weight=self.conv_weight,
            conv_bias=layer.conv1d.bias,
            state_indices=slots,
            has_initial_state=started,
            cu_seqlens=cu,
        )
        scale = layer.head_k_dim**-0.5
        ops.gdn_prefill(q, k, v, g, beta, self.state, slots, started, cu, out, scale=scale, use_qk_l2norm=False)

    def count(self, op: str, ours: bool, tokens: int) -> None:
        if tokens:
            chosen = self.layer.bk_decode if op == "gdn_decode" else self.layer.bk_prefill
            impl = "stock" if not ours else "cpu" if chosen.impl == "cpu" else "triton"
            status.count(op, self.layer.prefix, impl, tokens, self.phase)


def _rows(tensors: tuple[torch.Tensor, ...], start: int, count: int) -> tuple[torch.Tensor, ...]:
    """`count` rows of each; a slice costs the host more than asking whether it is all."""
    if start == 0 and count == tensors[0].shape[0]:
        return tensors
    return tuple(tensor[start : start + count] for tensor in tensors)


_warmed: set[tuple[Any, ...]] = set()
# kernels differ by configuration, and those go by the number of tokens and sequences
_WARM_DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WARM_PREFILLS = ((1, 1), (64, 4), (256, 16), (1024, 1), (4096, 1), (4096, 16))


def warm_up(layer: Any, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
    """Launch every operator on padding slots, once for each kind of layer in this process."""
    state_dtype, rows = layer.get_state_dtype()[1], CONV_HISTORY + layer.num_spec
    heads, kept = out.shape[1], (mixed_qkv.shape[1], layer.head_k_dim, out.shape[1], state_dtype, mixed_qkv.device)
    if kept in _warmed:
        return
    _warmed.add(kept)
    caches = (
        mixed_qkv.new_zeros(1, rows, mixed_qkv.shape[1]),
        mixed_qkv.new_zeros(1, heads, layer.head_v_dim, layer.head_k_dim, dtype=state_dtype),
    )

    def run(tokens: int, sequences: int) -> _Step:
        slots = torch.zeros(sequences, max(1, layer.num_spec + 1), dtype=torch.int32, device=a.device)
        ends = torch.linspace(0, tokens, sequences + 1, device=a.device).to(torch.int32)
        metadata = SimpleNamespace(
            non_spec_state_indices_tensor=slots[:, 0],
            prefill_state_indices=slots[:, 0],
            prefill_has_initial_state=torch.ones(sequences, dtype=torch.bool, device=a.device),
            prefill_query_start_loc=ends,
            num_spec_decodes=sequences,
            spec_state_indices_tensor=slots,
            spec_query_start_loc=ends,
            num_accepted_tokens=torch.ones(sequences, dtype=torch.int32, device=a.device),
        )
        sizes = (mixed_qkv.shape[1:], b.shape[1:], a.shape[1:], out.shape[1:])
        tensors = (x.new_zeros(tokens, *size) for x, size in zip((mixed_qkv, b, a, out), sizes, strict=True))
        return _Step(layer, caches, metadata, "warm-up", *tensors)

    for tokens in _WARM_DECODES:
        step = run(tokens, tokens)
        step.decode(tokens)
        if layer.num_spec:
            step = run(tokens * (layer.num_spec + 1), tokens)
            step.draft(*step.tensors)
    for tokens, sequences in _WARM_PREFILLS:
        step = run(tokens, sequences)
        step.prefill(*step.tensors)


def _cut(metadata: Any, half: str, make: Any) -> Any:
    """Half of a mixed batch's metadata, made once for all layers of the step."""
    name = f"_bk_{half}_half"
    if not hasattr(metadata, name):
        setattr(metadata, name, make(metadata))
    return getattr(metadata, name)


def _decode_half(m: Any) -> Any:
    return dataclasses.replace(m, num_actual_tokens=m.num_decode_tokens, num_prefills=0, num_prefill_tokens=0)


def _prefill_half(m: Any) -> Any:
    """The builder has prepared the chunk kernels' inputs for this half already; the convolution's program list, eight
    tokens a program, still starts with one program for each decode."""
    n = m.num_decodes
    programs = {size: _programs_after(lists, n) for size, lists in (m.nums_dict or {}).items()}
    first = next(iter(programs.values()), {})
    return dataclasses.replace(
        m,
        num_decodes=0,
        num_decode_tokens=0,
        num_actual_tokens=m.num_prefill_tokens,
        has_initial_state=m.prefill_has_initial_state,
        non_spec_query_start_loc=m.prefill_query_start_loc,
        non_spec_state_indices_tensor=m.prefill_state_indices,
        nums_dict=programs,
        batch_ptr=first.get("batch_ptr"),
        token_chunk_offset_ptr=first.get("token_chunk_offset_ptr"),
    )


def _programs_after(lists: dict[str, Any], n: int) -> dict[str, Any]:
    sequence = lists["batch_ptr"][n:]
    return {
        "nums": lists["nums"][n:],
        "tot": lists["tot"] - n,
        "mlist": lists["mlist"][n:] - n,
        "mlist_len": lists["mlist_len"] - n,
        "offsetlist": lists["offsetlist"][n:],
        "batch_ptr": torch.where(sequence >= 0, sequence - n, sequence),
        "token_chunk_offset_ptr": lists["token_chunk_offset_ptr"][n:],
    }
