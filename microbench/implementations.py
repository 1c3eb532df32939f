"""Who implements what: ours and every peer, what each needs, and which one stock vLLM picks.

A name is `ours` or `package.kernel`; results files are keyed by it. An implementation that cannot run here is never
left out: `unavailable` says why, and that text becomes its entry in the results.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.ours import SHARED, Call, Inputs
from blackwell_kernels.microbench.spec import Spec
from blackwell_kernels.microbench.specs import SPECS

OURS = "ours"
PACKAGES = {"vllm": "vllm", "flashinfer": "flashinfer-python", "fla": "fla-core", "cutlass": "nvidia-cutlass-dsl"}


@dataclass(frozen=True)
class Implementation:
    """`function` of a module of this package turns inputs into the call that is timed.

    sm: compute capabilities it exists for (empty: any). limit: why not at these axes, or None. overwrites: inputs it
    is allowed to destroy because stock vLLM lets it.
    """

    name: str
    definition: str
    module: str
    function: str
    packages: tuple[str, ...] = ()
    sm: tuple[int, ...] = ()
    limit: Callable[[dict[str, Any]], str | None] | None = None
    overwrites: tuple[str, ...] = ()

    def bind(self, inputs: Inputs, shared: dict[str, Any] | None = None) -> Call:
        """Do everything that happens once (imports, layouts, metadata) and return the call.

        shared: kept by the caller between the input sets of one case, for layouts of weights that the sets share.
        """
        module = importlib.import_module(f"blackwell_kernels.microbench.{self.module}")
        return getattr(module, self.function)({**inputs, SHARED: {} if shared is None else shared})

    def run(self, *arguments):
        """Value-returning form with the definition's positional arguments: what a FlashInfer-Bench solution calls.

        Not annotated: FlashInfer-Bench refuses a return annotation that is not a tuple of the outputs' number.
        """
        outputs = self.bind(dict(zip(SPECS_BY_ANY_NAME[self.definition].inputs, arguments, strict=True)))()
        return outputs if len(outputs) > 1 else outputs[0]

    def unavailable(self, case: Case, device: torch.device | str) -> str | None:
        """Why it cannot run this case on this device, or None."""
        device = torch.device(device)
        if self.name == OURS:
            return None
        if device.type != "cuda":
            return "needs a CUDA device"
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{PACKAGES[package]} is not installed"
        major, minor = torch.cuda.get_device_capability(device)
        if self.sm and 10 * major + minor not in self.sm:
            return f"needs {' or '.join(f'sm{sm}' for sm in self.sm)}, this is sm{10 * major + minor}"
        return self.limit(case.full_axes() | case.options) if self.limit else None


def _at_most_32_rows(axes: dict[str, Any]) -> str | None:
    rows = axes["num_rows"]
    return None if rows <= 32 else f"takes at most 32 rows, this case has {rows}"


def _one_request(axes: dict[str, Any]) -> str | None:
    requests = axes["requests"]
    return None if requests == 1 else f"takes rows that begin at column 0, this case has those of {requests} requests"


def _deep_gemm_experts(axes: dict[str, Any]) -> str | None:
    inter = axes["intermediate_size"]
    return None if inter % 128 == 0 else f"intermediate_size {inter} is not a multiple of 128"


def _no_scaled_cache(axes: dict[str, Any]) -> str | None:
    return "does not read the fp8_ds_mla cache, whose entries carry scales"


# Blackwell's own, in a module of their own
_SM100: dict[str, Any] = {"module": "peers_sm100", "sm": (100, 103)}
_VLLM, _FI = ("vllm",), ("flashinfer",)
_VLLM_FI, _FI_CUTE = ("vllm", "flashinfer"), ("flashinfer", "cutlass")
_MOE_CONTEST, _TOPK_CONTEST, _ATTENTION_CONTEST, _DECODE_CONTEST, _PREFILL_CONTEST = (
    name for name, spec in SPECS.items() if "contest" in spec.tags
)

# definition -> our function, then (name, function, packages, extra) of each peer
_TABLE: dict[str, tuple[str, list[tuple[str, str, tuple[str, ...], dict[str, Any]]]]] = {
    _MOE_CONTEST: (
        "moe_contest",
        [
            ("flashinfer.trtllm_fp8_block_scale_moe", "flashinfer_contest", _FI, {"sm": (100, 103)}),
            ("vllm.grouped_topk+TritonExperts", "triton_contest", _VLLM, {}),
        ],
    ),
    _TOPK_CONTEST: ("dsa_contest_topk", [("vllm.deep_gemm+topk", "contest_topk", _VLLM, {})]),
    _ATTENTION_CONTEST: ("dsa_contest_attention", [("flash_mla.sparse_fwd", "contest_attention", _VLLM, {})]),
    _DECODE_CONTEST: (
        "gdn_contest_decode",
        [
            ("vllm.packed_decode", "contest_packed_decode", _VLLM, {}),
            ("flashinfer.gdn_decode", "contest_flashinfer_decode", _FI_CUTE, {}),
        ],
    ),
    _PREFILL_CONTEST: (
        "gdn_contest_prefill",
        [
            ("vllm.fla_chunk", "contest_fla_prefill", _VLLM, {}),
            ("vllm.flashinfer_gdn_prefill", "contest_flashinfer_prefill", _VLLM_FI, {}),
        ],
    ),
    "moe_routing_grouped_topk8": ("moe_routing_grouped", [("vllm.grouped_topk", "grouped_topk", _VLLM, {})]),
    "moe_routing_softmax_topk10": ("moe_routing_softmax", [("vllm.topk_softmax", "topk_softmax", _VLLM, {})]),
    "dsa_indexer_logits_paged": ("dsa_logits_paged", [("deep_gemm.paged_mqa_logits", "logits_paged", _VLLM, {})]),
    "dsa_indexer_logits_ragged": ("dsa_logits_ragged", [("deep_gemm.mqa_logits", "logits_ragged", _VLLM, {})]),
    "dsa_topk2048": (
        "dsa_topk",
        [
            ("vllm.cooperative_topk", "cooperative_topk", _VLLM, {"limit": _at_most_32_rows}),
            ("vllm.persistent_topk", "persistent_topk", _VLLM, {"limit": _one_request}),
            ("vllm.top_k_per_row_decode", "topk_per_row_decode", _VLLM, {"limit": _one_request}),
            ("vllm.top_k_per_row_prefill", "topk_per_row_prefill", _VLLM, {}),
            ("flashinfer.top_k", "flashinfer_topk", _FI, {"limit": _one_request}),
        ],
    ),
    "dsa_sparse_mla_bf16": (
        "dsa_sparse_mla",
        [
            ("flash_mla.sparse_fwd", "flash_mla_bf16", _VLLM, {}),
            ("vllm.flashinfer_mla_sparse", "sparse_mla", _VLLM_FI, _SM100),
        ],
    ),
    "dsa_sparse_mla_fp8": (
        "dsa_sparse_mla",
        [
            ("flash_mla.with_kvcache", "flash_mla_fp8", _VLLM, {}),
            ("vllm.flashinfer_mla_sparse", "sparse_mla", _VLLM_FI, {**_SM100, "limit": _no_scaled_cache}),
        ],
    ),
    "dsa_pair_decode": ("dsa_pair_decode", [("vllm.deep_gemm+topk", "pair_decode", _VLLM, {})]),
    "dsa_pair_prefill": ("dsa_pair_prefill", [("vllm.deep_gemm+top_k_per_row_prefill", "pair_prefill", _VLLM, {})]),
    "dsa_step_decode": (
        "dsa_step",
        [
            ("vllm.deep_gemm+topk+flash_mla", "step", _VLLM, {"overwrites": ("k_cache",)}),
            ("vllm.deep_gemm+topk+flashinfer_mla_sparse", "step", _VLLM_FI, _SM100),
        ],
    ),
    "dsa_gather_indexer_k": (
        "dsa_gather_indexer_k",
        [("vllm.cp_gather_indexer_k_quant_cache", "gather", _VLLM, {})],
    ),
    "dsa_kv_insert_bf16": ("dsa_kv_insert", [("vllm.concat_and_cache_mla", "kv_insert", _VLLM, {})]),
    "gdn_prefill_raw_qk": ("gdn_prefill_raw_qk", [("vllm.fla_chunk", "fla_prefill_raw_qk", _VLLM, {})]),
    "drafts_gdn_core_bf16": (
        "gdn_decode",
        [
            (
                "vllm.causal_conv1d_update+fused_sigmoid_gating",
                "core_drafts",
                _VLLM,
                {"overwrites": ("mixed_qkv",)},
            ),
        ],
    ),
    "gdn_core_prefill": (
        "gdn_core_prefill",
        [
            ("vllm.causal_conv1d+fla_chunk", "core_fla_prefill", _VLLM, {}),
            ("vllm.causal_conv1d+flashinfer_gdn_prefill", "core_flashinfer_prefill", _VLLM_FI, {}),
        ],
    ),
}
for _name in ("moe_fp8_block", "moe_fp8_block_ep"):
    _TABLE[_name] = (
        "moe_fp8_block",
        [
            ("vllm.TritonExperts", "triton", _VLLM, {}),
            ("vllm.TritonExperts[heuristic]", "triton_heuristic", _VLLM, {}),
            ("vllm.TritonExperts[tuned]", "triton_tuned", _VLLM, {}),
            ("vllm.DeepGemmExperts", "deep_gemm", _VLLM, {"limit": _deep_gemm_experts}),
            ("vllm.FlashInferExperts", "flashinfer_cutlass", _VLLM_FI, {"sm": (90,)}),
            ("vllm.TrtLlmFp8Experts", "flashinfer_trtllm", _VLLM_FI, {"sm": (100, 103)}),
        ],
    )
for _name in ("gdn_decode_state_bf16", "gdn_decode_state_f32"):
    _TABLE[_name] = (
        "gdn_decode",
        [
            ("vllm.packed_decode", "packed_decode", _VLLM, {}),
            ("flashinfer.gdn_decode", "flashinfer_decode", _FI_CUTE, {}),
        ],
    )
for _name in ("gdn_core_decode", "gdn_core_decode_f32"):
    _TABLE[_name] = (
        "gdn_decode",
        [("vllm.causal_conv1d_update+packed_decode", "core_decode", _VLLM, {"overwrites": ("mixed_qkv",)})],
    )
for _name in ("gdn_prefill_state_bf16", "gdn_prefill_state_f32"):
    _TABLE[_name] = (
        "gdn_prefill",
        [
            ("vllm.fla_chunk", "fla_prefill", _VLLM, {}),
            ("vllm.flashinfer_gdn_prefill", "flashinfer_prefill", _VLLM_FI, {}),
            ("fla.chunk_gated_delta_rule", "fla_core_prefill", ("fla",), {}),
        ],
    )

SPECS_BY_ANY_NAME: dict[str, Spec] = {s.name: s for spec in SPECS.values() for s in (spec, spec.cpu())}


def implementations(definition: str) -> list[Implementation]:
    """Ours first, then the peers, of a definition or its reduced form."""
    spec = SPECS_BY_ANY_NAME[definition]
    ours, peers = _TABLE[definition if definition in _TABLE else definition.removesuffix("_reduced")]
    module = f"peers_{spec.op.split('_')[0]}"
    return [
        Implementation(OURS, definition, "ours", ours),
        *(
            Implementation(name, definition, function=function, packages=packages, **{"module": module, **extra})
            for name, function, packages, extra in peers
        ),
    ]


def find(definition: str, name: str) -> Implementation:
    """The implementation of that name; what the checked-in solutions call."""
    return next(item for item in implementations(definition) if item.name == name)


def stock(case: Case, sm: int) -> str:
    """The implementation that vLLM 0.24 itself picks for this deployment on a chip of this compute capability.

    Sources: fused_moe/oracle/fp8.py (Hopper: Triton under tensor parallelism, FlashInfer's CUTLASS under expert
    parallelism; Blackwell: TRT-LLM), sparse_attn_indexer.py, platforms/cuda.py (sparse MLA), qwen_gdn_linear_attn.py.
    """
    match case.spec.op:
        case "moe":
            if "contest" in case.spec.tags:
                return "flashinfer.trtllm_fp8_block_scale_moe"
            if sm >= 100:
                return "vllm.TrtLlmFp8Experts"
            return "vllm.FlashInferExperts" if case.ep > 1 else "vllm.TritonExperts"
        case "dsa_topk":
            if case.options["causal"]:
                return "vllm.top_k_per_row_prefill"
            return "vllm.cooperative_topk" if case.axes["num_rows"] <= 32 else "vllm.persistent_topk"
        # with few heads a bfloat16 cache goes to FlashInfer on Blackwell
        case "dsa_sparse_mla" if sm >= 100 and case.definition.endswith("bf16") and case.axes["num_heads"] <= 16:
            return "vllm.flashinfer_mla_sparse"
        case "dsa_step" if sm >= 100 and case.axes["num_heads"] <= 16:
            return "vllm.deep_gemm+topk+flashinfer_mla_sparse"
        case "gdn_prefill":
            return "vllm.flashinfer_gdn_prefill"
        case "gdn_core" if "prefill" in case.definition:
            return "vllm.causal_conv1d+flashinfer_gdn_prefill"
    return implementations(case.definition)[1].name
