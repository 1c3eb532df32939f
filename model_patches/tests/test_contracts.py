"""The recorded contracts against released vLLM sources, and against sources and modules that drifted."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import pytest

from blackwell_kernels.errors import ContractError
from blackwell_kernels.model_patches import contracts

VERSIONS = ("0.24.0", "0.32.0", "0.33.0")
INDEXER = "vllm/model_executor/layers/sparse_attn_indexer.py"
GDN_DATA = "vllm/v1/attention/backends/gdn_attn.py"
ORACLE = "vllm/model_executor/layers/fused_moe/oracle/fp8.py"
REGISTRY = "vllm/v1/attention/backends/registry.py"
GDN = "vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py"
# 0.33 changed how DeepGEMM's logits are asked for: that hook must refuse there, and only that one
DRIFTED = {"0.24.0": set(), "0.32.0": set(), "0.33.0": {"dsa_indexer"}}


@pytest.mark.parametrize("version", VERSIONS)
def test_released_sources(sources: Path, version: str) -> None:
    found = contracts.check_source(sources / f"vllm-{version}" / "vllm", version)
    assert contracts.mismatched_ops(found) == DRIFTED[version], "\n".join(map(str, found))


def test_every_hook_op_has_contracts_for_every_version() -> None:
    from blackwell_kernels.env import HOOK_OPS

    for version in VERSIONS:
        wanted = contracts.release(version)
        covered = {op for contract in contracts.CONTRACTS if contract.applies(wanted) for op in contract.ops}
        assert covered == set(HOOK_OPS)


# file, text, its replacement, an operator that must refuse, a name that the message must give
DRIFTS = [
    (GDN, "_core(\n        self,\n        mixed_qkv", "_core(\n        self,\n        x", "gdn_decode", "(self, x"),
    (GDN, "        self._forward_core(\n", "        self._other(\n", "gdn_prefill", "calls: self._forward_core"),
    (INDEXER, "logits = fp8_fp4_mqa_logits(", "logits = new_logits(", "dsa_indexer", "fp8_fp4_mqa_logits"),
    (INDEXER, "torch.ops._C.cooperative_topk(", "torch.ops._C.other_topk(", "dsa_topk", "cooperative_topk"),
    (GDN_DATA, "prefill_state_indices: torch", "prefill_states: torch", "gdn_prefill", "prefill_state_indices"),
    (ORACLE, "backend_to_kernel_cls(\n    backend", "backend_to_kernel_cls(\n    kind", "moe", "backend_to_kernel_cls"),
    (REGISTRY, "FLASHMLA_SPARSE = (", "SPARSE = (", "dsa_sparse_mla", "FLASHMLA_SPARSE"),
]


@pytest.mark.parametrize(("file", "old", "new", "op", "named"), DRIFTS)
def test_drift_is_caught(sources: Path, tmp_path: Path, file: str, old: str, new: str, op: str, named: str) -> None:
    root = tmp_path / "vllm"
    for contract in contracts.CONTRACTS:
        path = Path(*contract.module.split(".")).with_suffix(".py")
        if (sources / "vllm-0.24.0" / path).is_file():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sources / "vllm-0.24.0" / path, tmp_path / path)
    assert contracts.check_source(root, "0.24.0") == []
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    found = contracts.check_source(root, "0.24.0")
    assert any(op in mismatch.ops and named in str(mismatch) for mismatch in found), found


def test_a_missing_file_is_a_mismatch_of_its_ops(sources: Path, tmp_path: Path) -> None:
    found = contracts.check_source(tmp_path, "0.24.0")
    assert {"moe", "gdn_decode", "dsa_topk"} <= contracts.mismatched_ops(found)
    assert all("no such file" in str(mismatch) for mismatch in found)


def test_a_live_module_with_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm.model_executor.layers.fused_moe.runner.moe_runner")

    class MoERunner:
        def __init__(self, prefix: str, moe_config: object) -> None:
            self.prefix = prefix

    module.MoERunner = MoERunner  # type: ignore[attr-defined]
    monkeypatch.setattr(contracts, "_vllm_version", lambda: "0.24.0")
    with pytest.raises(ContractError) as refusal:
        contracts.demand("moe_routing", module)
    text = str(refusal.value)
    assert "layer_name" in text, "what was expected"
    assert "prefix" in text, "what was found"
    assert "BLACKWELL_KERNELS_DISABLE=moe,moe_routing" in text, "what to do"


def test_only_the_hooks_asked_for_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "_vllm_version", lambda: "0.24.0")
    contracts.demand("gdn_decode", types.ModuleType("vllm.model_executor.layers.fused_moe.runner.moe_runner"))


@pytest.mark.parametrize(
    ("text", "expected"), [("0.24.0", (0, 24)), ("0.32.0+cpu", (0, 32)), ("1.0.1", (1, 0)), ("0.1.dev7+g1", (98, 0))]
)
def test_release(text: str, expected: tuple[int, int]) -> None:
    assert contracts.release(text) == expected
