"""The hooks that only a CPU needs: FP8 linear layers, rotary embedding, the platform's choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels.common.fp8 import dequantize_blocks, quantize_blocks
from blackwell_kernels.model_patches import fp8_linear_cpu, rope_cpu, sparse_mla

pytest.importorskip("vllm")
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these hooks work on vLLM's CPU build only", allow_module_level=True)


def linear_layer(n: int, k: int, *, packed: bool) -> tuple[Any, torch.Tensor]:
    """A layer as vLLM's FP8 method leaves it, and the weight that it stands for."""
    weight, scale = quantize_blocks(torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5)
    layer = torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    layer.register_parameter("weight_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
    if not packed:
        layer._cpu_skip_gemm_dispatch = True  # MLA's kv_b_proj keeps the checkpoint's layout
    return layer, dequantize_blocks(weight, scale)


@pytest.mark.parametrize("which", [0, 1], ids=["vLLM's operator", "torch"])
@pytest.mark.parametrize("packed", [True, False])
def test_fp8_block_linear(which: int, packed: bool) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    cls = fp8_linear_cpu.kernel_classes()[which]
    supported, reason = cls.is_supported()
    if not supported:
        pytest.skip(str(reason))
    layer, weight = linear_layer(192, 256, packed=packed)
    config = FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8Static128BlockSym,
        activation_quant_key=kFp8Dynamic128Sym,
        weight_shape=(192, 256),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    assert cls.can_implement(config)[0]
    with set_current_vllm_config(VllmConfig()):
        kernel = cls(config)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = kernel.apply_weights(layer, x)  # neither model has a bias in an FP8 layer
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x.float() @ weight.T, atol=3e-2, rtol=2e-2)


def test_our_linear_kernels_come_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = [
        k for k in linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] if not issubclass(k, fp8_linear_cpu.Served)
    ]
    monkeypatch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, list(kernels))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    fp8_linear_cpu.extend_kernels(linear)
    fp8_linear_cpu.extend_kernels(linear)
    extended = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    assert [issubclass(k, fp8_linear_cpu.Served) for k in extended] == [True, True, *[False] * len(kernels)]

    monkeypatch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, list(kernels))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    fp8_linear_cpu.extend_kernels(linear)
    assert linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] == kernels, "with AMX vLLM's own serves"


class Rotary:
    def forward_cpu(self, positions: Any, query: Any, key: Any = None) -> str:
        return "C++"

    def forward_native(self, positions: Any, query: Any, key: Any = None) -> str:
        return "torch"


def test_three_dimensional_views_take_the_torch_path() -> None:
    cls = type("RotaryEmbedding", (Rotary,), dict(Rotary.__dict__))
    module = SimpleNamespace(__name__="rotary", RotaryEmbedding=cls)
    rope_cpu.wrap_rotary(module)  # type: ignore[arg-type]
    rope_cpu.wrap_rotary(module)  # type: ignore[arg-type]
    rotary, flat, view = cls(), torch.zeros(4, 64), torch.zeros(4, 2, 32)
    assert rotary.forward_cpu(None, flat, flat) == "C++"
    assert rotary.forward_cpu(None, flat) == "C++"
    assert rotary.forward_cpu(None, view, flat) == "torch"
    assert rotary.forward_cpu(None, flat, view) == "torch"


def test_vllms_rotary_embedding_still_needs_the_fix() -> None:
    """Remove rope_cpu.py when this fails."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import base

    with set_current_vllm_config(VllmConfig()):
        rotary = base.RotaryEmbedding(64, 64, 128, 10000.0, True, torch.float32)
    stock = getattr(base.RotaryEmbedding.forward_cpu, "stock", base.RotaryEmbedding.forward_cpu)
    positions = torch.arange(6)
    query, key = torch.randn(6, 4, 64), torch.randn(6, 1, 64)
    right, _ = rotary.forward_native(positions, query.clone(), key.clone())
    wrong, _ = stock(rotary, positions, query.clone(), key.clone())
    assert not torch.allclose(wrong, right, atol=1e-3)


def platform() -> Any:
    class CpuPlatform:
        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            return "stock"

        @classmethod
        def check_and_update_config(cls, vllm_config):
            vllm_config.scheduler_config.enable_chunked_prefill = False
            vllm_config.cache_config.enable_prefix_caching = False
            vllm_config.scheduler_config.max_num_batched_tokens = 4096

    module = SimpleNamespace(__name__="cpu", CpuPlatform=CpuPlatform, AttentionBackendEnum=object)
    sparse_mla.serve_on_cpu(module)  # type: ignore[arg-type]
    sparse_mla.serve_on_cpu(module)  # type: ignore[arg-type]
    return CpuPlatform


def test_sparse_attention_gets_our_backend() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    cpu = platform()
    path = cpu.get_attn_backend_cls(None, SimpleNamespace(use_sparse=True))
    assert resolve_obj_by_qualname(path).is_sparse()
    assert cpu.get_attn_backend_cls(None, SimpleNamespace(use_sparse=False), num_heads=8) == "stock"


@pytest.mark.parametrize(("sparse", "kept"), [(True, True), (False, False)])
def test_chunked_prefill_and_prefix_caching_stay_as_asked(sparse: bool, kept: bool) -> None:
    hf = SimpleNamespace(index_topk=64) if sparse else SimpleNamespace()
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True, max_num_batched_tokens=256),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        model_config=SimpleNamespace(hf_config=hf),
    )
    platform().check_and_update_config(config)
    assert config.scheduler_config.enable_chunked_prefill is kept
    assert config.cache_config.enable_prefix_caching is kept
    assert config.scheduler_config.max_num_batched_tokens == (256 if kept else 4096)
