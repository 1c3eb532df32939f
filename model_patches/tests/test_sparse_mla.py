"""The sparse MLA hook: forward_mqa by policy over a stock implementation's stand-in, and the CPU platform's choice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels import dsa as _operators  # noqa: F401  registers them
from blackwell_kernels import env, status
from blackwell_kernels.dsa import reference
from blackwell_kernels.errors import ContractError
from blackwell_kernels.model_patches import context, sparse_mla
from blackwell_kernels.select import Policy

PREFIX = "model.layers.4.self_attn"
HEADS, K = 8, 32
UP_TO_4 = Policy("mixed", "measured", (4, 8), (True, False))


class StockImpl:
    """What vLLM's sparse implementations have in common."""

    need_to_return_lse_for_decode = False

    def __init__(
        self, num_heads, head_size, scale, kv_cache_dtype="auto", indexer=None, topk_indices_buffer=None, **mla
    ):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.kv_cache_dtype, self.kv_lora_rank = kv_cache_dtype, mla.get("kv_lora_rank", 512)
        self.topk_indices_buffer = topk_indices_buffer
        self.calls = 0

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        self.calls += 1
        return "stock", None


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    status.reset()
    monkeypatch.delenv(env.STRICT.name, raising=False)
    monkeypatch.setattr(context, "step_metadata", lambda: {"layer": SimpleNamespace(num_prefills=1, num_decodes=2)})


def implementation(monkeypatch: pytest.MonkeyPatch, chosen: Policy = UP_TO_4, **options: Any) -> Any:
    monkeypatch.setattr(sparse_mla, "policy", lambda op, case, device: chosen)
    cache = SimpleNamespace(prefix=f"{PREFIX}.indexer.k_cache")
    buffer = torch.full((16, K), -1, dtype=torch.int32)
    settings = {"num_heads": HEADS, "head_size": 576, "scale": 0.07, "topk_indices_buffer": buffer, **options}
    return sparse_mla.impl_class(StockImpl)(**settings, indexer=SimpleNamespace(k_cache=cache))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8_ds_mla"])
@pytest.mark.parametrize("split", [False, True], ids=["one q", "two parts of q"])
def test_forward_mqa_by_policy(monkeypatch: pytest.MonkeyPatch, fp8: bool, split: bool) -> None:
    impl = implementation(monkeypatch, kv_cache_dtype="fp8_ds_mla" if fp8 else "auto")
    r = torch.Generator().manual_seed(0)
    cache = torch.zeros(9, 64, 656, dtype=torch.uint8) if fp8 else torch.zeros(9, 64, 576, dtype=torch.bfloat16)
    kv = torch.randn(9 * 64, 576, generator=r).to(torch.bfloat16)
    torch.ops.blackwell_kernels.dsa_kv_insert(kv[:, :512], kv[:, 512:], cache, torch.arange(9 * 64))
    table = torch.tensor([[1, 5, 3], [2, 8, 4]], dtype=torch.int32)
    impl.topk_indices_buffer[:3, :20] = torch.randint(0, 190, (3, 20), generator=r, dtype=torch.int32)
    requests = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.int32)
    metadata = SimpleNamespace(req_id_per_token=requests, block_table=table)
    layer = SimpleNamespace(layer_name=f"{PREFIX}.attn")
    q = torch.randn(3, HEADS, 576, generator=r).to(torch.bfloat16)
    asked = (q[..., :512].transpose(0, 1).contiguous().transpose(0, 1), q[..., 512:]) if split else q
    passed = cache.view(torch.float8_e4m3fn) if fp8 else cache

    out, lse = impl.forward_mqa(asked, passed, metadata, layer)
    expected, _ = reference.sparse_mla(q, cache, impl.topk_indices_buffer[:3], requests[:3], table, 0.07)
    assert lse is None
    assert out.shape == (3, HEADS, 512)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    assert impl.calls == 0

    assert impl.forward_mqa(torch.cat([q, q]), passed, metadata, layer) == ("stock", None)
    assert impl.calls == 1
    counts = {(c["impl"], c["layer"], c["phase"]): c["tokens"] for c in status.snapshot()["counts"]}
    assert counts == {("triton", f"{PREFIX}.attn", "mixed"): 3, ("stock", f"{PREFIX}.attn", "mixed"): 6}
    (row,) = status.snapshot()["layers"]
    assert (row["layer"], row["impl"]) == (f"{PREFIX}.attn", "mixed")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_size": 512}, "512"),
        ({"num_heads": 4}, "4 heads"),
        ({"num_heads": 256}, "256 heads"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8"),
        ({"topk_indices_buffer": None}, "no buffer"),
    ],
)
def test_unsupported_layers_stay_with_stock(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    impl = implementation(monkeypatch, Policy("triton", "ours"), **options)
    layer = SimpleNamespace(layer_name="x")
    assert impl.forward_mqa(torch.zeros(2, 8, 576), None, None, layer) == ("stock", None)
    (row,) = status.snapshot()["layers"]
    assert row["impl"] == "stock"
    assert reason in row["reason"]
    assert status.snapshot()["fallbacks"]


def test_a_backend_with_another_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")

    class Other(StockImpl):
        def forward_mqa(self, query, cache, metadata):  # type: ignore[override]
            return None

    with pytest.raises(ContractError, match="forward_mqa"):
        sparse_mla.impl_class(Other)


def test_the_registered_path_leads_back_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps backends as `module.qualname` text, and resolves it more than once."""
    registry = pytest.importorskip("vllm.v1.attention.backends.registry")
    imports = pytest.importorskip("vllm.utils.import_utils")

    class FlashMLASparseBackend:
        @staticmethod
        def get_name() -> str:
            return "FLASHMLA_SPARSE"

        @staticmethod
        def get_impl_cls() -> type:
            return StockImpl

    path = registry.AttentionBackendEnum.FLASHMLA_SPARSE.value
    real = imports.resolve_obj_by_qualname
    monkeypatch.setattr(
        imports, "resolve_obj_by_qualname", lambda name: FlashMLASparseBackend if name == path else real(name)
    )
    monkeypatch.setattr(sparse_mla.contracts, "demand", lambda *_: None)
    sparse_mla.backend_class.cache_clear()
    cls = sparse_mla.FLASHMLA_SPARSE
    assert cls.get_name() == "FLASHMLA_SPARSE", "vLLM turns fp8 into fp8_ds_mla by this name"
    assert issubclass(cls.get_impl_cls(), StockImpl)
    assert real(f"{cls.__module__}.{cls.__qualname__}") is cls
    sparse_mla.backend_class.cache_clear()


def test_override_registers_every_sparse_backend() -> None:
    registry = pytest.importorskip("vllm.v1.attention.backends.registry")
    members = [registry.AttentionBackendEnum[name] for name in sparse_mla.BACKENDS]
    before = {member: registry._ATTN_OVERRIDES.get(member) for member in members}
    try:
        sparse_mla.override_backends(registry)
        for member in members:
            assert member.get_path() == f"blackwell_kernels.model_patches.sparse_mla.{member.name}"
    finally:
        for member, path in before.items():
            registry._ATTN_OVERRIDES.pop(member, None)
            if path:
                registry._ATTN_OVERRIDES[member] = path
