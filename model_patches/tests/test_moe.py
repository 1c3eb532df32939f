"""Experts and routing hooks, over the installed vLLM's own oracle, routers and modular interface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels import env, status
from blackwell_kernels.errors import FallbackError
from blackwell_kernels.model_patches import context, moe_experts, moe_routing
from blackwell_kernels.select import Policy

platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("these tests choose among the experts of vLLM's CPU build", allow_module_level=True)
mk = pytest.importorskip("vllm.model_executor.layers.fused_moe.modular_kernel")
oracle = pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.fp8")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)

from blackwell_kernels.moe import reference  # noqa: E402

KEYS = (kFp8Static128BlockSym, kFp8Dynamic128Sym)
LAYER = "model.layers.1.mlp.experts"


def moe_config(**changes: Any) -> Any:
    parallel = SimpleNamespace(use_all2all_kernels=False, ep_size=1, use_batched_activation_format=False)
    fields = {
        "hidden_dim": 256,
        "intermediate_size_per_partition": 128,
        "num_experts": 8,
        "num_local_experts": 8,
        "num_logical_experts": 8,
        "experts_per_token": 2,
        "activation": MoEActivation.SILU,
        "is_act_and_mul": True,
        "swiglu_limit": None,
        "has_bias": False,
        "is_lora_enabled": False,
        "in_dtype": torch.bfloat16,
        "router_logits_dtype": torch.float32,
        "routing_method": None,
        "moe_parallel_config": parallel,
        "moe_backend": "auto",
        "has_hash_routing": False,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    status.reset()
    monkeypatch.delenv(env.STRICT.name, raising=False)
    monkeypatch.delenv(env.DISABLE.name, raising=False)
    monkeypatch.setattr(context, "step_metadata", lambda: {"layer": SimpleNamespace(num_prefills=0, num_decodes=3)})
    moe_experts._decided.clear()


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed oracle, wrapped for one test."""
    for name in ("backend_to_kernel_cls", "_get_priority_backends"):
        stock = getattr(oracle, name)
        monkeypatch.setattr(oracle, name, getattr(stock, "stock", stock))
    moe_experts.wrap_oracle(oracle)
    return oracle


def test_vllm_chooses_our_experts_on_a_cpu(wrapped: Any) -> None:
    config = moe_config()
    backend, cls = wrapped.select_fp8_moe_backend(config, *KEYS)
    assert backend is wrapped.Fp8MoeBackend.TRITON, "the backend that leaves the weights as they are"
    assert issubclass(cls, moe_experts.Served)
    assert moe_experts._decided[id(config)].impl == "cpu"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_dim": 192}, "192"),
        ({"intermediate_size_per_partition": 64}, "64"),
        ({"activation": MoEActivation.GELU}, "SwiGLU"),
        ({"swiglu_limit": 7.0}, "limit"),
        ({"has_bias": True}, "bias"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"in_dtype": torch.float16}, "float16"),
        ({"moe_parallel_config": SimpleNamespace(use_all2all_kernels=True)}, "all-to-all"),
    ],
)
def test_unsupported_layers_leave_vllms_order_alone(wrapped: Any, changes: dict[str, Any], reason: str) -> None:
    config = moe_config(**changes)
    order = wrapped._get_priority_backends.stock(config, *KEYS)
    assert wrapped._get_priority_backends(config, *KEYS) == order
    chosen = moe_experts._decided[id(config)]
    assert chosen.impl == "stock"
    assert reason in chosen.reason
    assert [f["op"] for f in status.snapshot()["fallbacks"]] == ["moe"]


def test_strict_refuses_an_unsupported_layer(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.STRICT.name, "1")
    with pytest.raises(FallbackError, match="192"):
        wrapped._get_priority_backends(moe_config(hidden_dim=192), *KEYS)


@pytest.mark.parametrize(
    ("first", "policy", "moved", "served"),
    [
        ("TRITON", "mixed", True, "mixed"),  # stock's own choice: handing over to it is right
        ("FLASHINFER_CUTLASS", "triton", True, "triton"),
        ("FLASHINFER_CUTLASS", "mixed", False, "stock"),  # our hand-over would not be what stock would run
        ("FLASHINFER_CUTLASS", "stock", False, "stock"),
    ],
)
def test_triton_moves_to_the_front_only_where_ours_serves_all(
    wrapped: Any, monkeypatch: pytest.MonkeyPatch, first: str, policy: str, moved: bool, served: str
) -> None:
    backends = wrapped.Fp8MoeBackend
    rest = [b for b in (backends.TRITON, backends.MARLIN) if b.name != first]

    def order(moe_config: Any, weight_key: Any, activation_key: Any) -> list[Any]:
        return [backends[first], *rest]

    monkeypatch.setattr(wrapped, "_get_priority_backends", order)
    monkeypatch.setattr(wrapped, "backend_to_kernel_cls", wrapped.backend_to_kernel_cls.stock)
    monkeypatch.setattr(moe_experts, "decide", lambda *_: Policy(policy, "measured"))
    moe_experts.wrap_oracle(wrapped)
    config = moe_config()
    assert (wrapped._get_priority_backends(config, *KEYS)[0] is backends.TRITON) == moved
    assert moe_experts._decided[id(config)].impl == served


class Quantised(moe_experts.Served):
    """Some experts class of ours."""


@pytest.mark.parametrize(
    ("decided", "experts_cls", "impl", "reason", "fell_back"),
    [
        (Policy("triton", "measured"), Quantised, "triton", "measured", False),
        (Policy("stock", "measured: stock is faster"), object, "stock", "stock is faster", False),
        (Policy("triton", "measured"), object, "stock", "--moe-backend", True),
        (None, object, "stock", "not FP8", True),
    ],
)
def test_the_report_names_who_serves_and_why(
    decided: Policy | None, experts_cls: type, impl: str, reason: str, fell_back: bool
) -> None:
    config = moe_config()
    if decided is not None:
        moe_experts._decided[id(config)] = decided
    method = SimpleNamespace(experts_cls=experts_cls, fp8_backend=SimpleNamespace(value="DEEPGEMM"))
    moe_experts.report(LAYER, config, method)
    (row,) = status.snapshot()["layers"]
    assert (row["op"], row["layer"], row["impl"]) == ("moe", LAYER, impl)
    assert reason in row["reason"]
    assert bool(status.snapshot()["fallbacks"]) == fell_back


class StockExperts:
    """TritonExperts' part in the hand-over."""

    calls = 0

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        self.moe_config, self.w1_scale, self.w2_scale = moe_config, quant_config.w1_scale, quant_config.w2_scale

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        StockExperts.calls += 1
        output.fill_(-1)


def layer(r: torch.Generator, tokens: int) -> dict[str, torch.Tensor]:
    w13, w2 = (torch.randn(8, *shape, generator=r).to(torch.float8_e4m3fn) for shape in ((256, 256), (256, 128)))
    return {
        "hidden_states": torch.randn(tokens, 256, generator=r).to(torch.bfloat16),
        "w1": w13,
        "w2": w2,
        "w1_scale": torch.rand(8, 2, 2, generator=r) / 64,
        "w2_scale": torch.rand(8, 2, 1, generator=r) / 64,
        "topk_weights": torch.rand(tokens, 2, generator=r),
        "topk_ids": torch.stack([torch.randperm(8, generator=r)[:2] for _ in range(tokens)]).to(torch.int32),
    }


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_gpu_experts_dispatch_per_number_of_tokens(monkeypatch: pytest.MonkeyPatch, expert_parallel: bool) -> None:
    """The GPU class, with quantised inputs as vLLM's prepare step hands them over."""
    from blackwell_kernels.common.fp8 import quantize_groups

    triton = SimpleNamespace(TritonExperts=StockExperts)
    monkeypatch.setitem(__import__("sys").modules, "vllm.model_executor.layers.fused_moe.experts.triton_moe", triton)
    up_to_4 = Policy("mixed", "measured", (4, 8), (True, False))
    monkeypatch.setattr(moe_experts, "_policy", lambda c: up_to_4)
    StockExperts.calls = 0
    config = moe_config()
    context.name(config, LAYER)
    r = torch.Generator().manual_seed(0)
    for tokens, ours in ((3, True), (4, True), (9, False)):
        x = layer(r, tokens)
        scales = SimpleNamespace(w1_scale=x.pop("w1_scale"), w2_scale=x.pop("w2_scale"))
        expert_map = None
        if expert_parallel:  # this rank holds experts 4..7 of 8
            expert_map = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3], dtype=torch.int32)
            x["w1"], x["w2"] = x["w1"][4:], x["w2"][4:]
            scales = SimpleNamespace(w1_scale=scales.w1_scale[4:], w2_scale=scales.w2_scale[4:])
        experts = moe_experts._gpu_class()(config, scales)
        q, scale = quantize_groups(x["hidden_states"])
        out = torch.empty(tokens, 256, dtype=torch.bfloat16)
        experts.apply(
            output=out, **{**x, "hidden_states": q}, activation=MoEActivation.SILU, global_num_experts=8,
            expert_map=expert_map, a1q_scale=scale, a2_scale=None, workspace13=None, workspace2=None,
            expert_tokens_meta=None, apply_router_weight_on_input=False,
        )  # fmt: skip
        if not ours:
            assert (out == -1).all()
            continue
        local = x["topk_ids"] if expert_map is None else expert_map[x["topk_ids"].long()]
        expected = torch.zeros(tokens, 256, dtype=torch.float64)
        for t in range(tokens):
            for j, e in enumerate(local[t].tolist()):
                if e >= 0:
                    y = expert(q[t], scale[t], x["w1"][e], scales.w1_scale[e], x["w2"][e], scales.w2_scale[e])
                    expected[t] += x["topk_weights"][t, j].double() * y
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 0.05, "FP8 rounding of the intermediate is all that may differ"
    assert StockExperts.calls == 1
    counts = {(c["impl"], c["layer"]): c["tokens"] for c in status.snapshot()["counts"]}
    assert counts == {("triton", LAYER): 7, ("stock", LAYER): 9}


def expert(q: Any, scale: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any) -> torch.Tensor:
    """One expert on one token in float64, the intermediate not requantised."""
    x = q.double() * scale.double().repeat_interleave(128)
    wide = [s.double().repeat_interleave(128, 0).repeat_interleave(128, 1) for s in (w13_scale, w2_scale)]
    gate, up = ((w13.double() * wide[0]) @ x).chunk(2)
    return (w2.double() * wide[1]) @ (gate * gate.sigmoid() * up)


class Router:
    """A router class as vLLM shapes them; its own routing says so."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update({"top_k": 2, "renormalize": True, "scoring_func": "softmax", **attributes})

    def _compute_routing(
        self, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        return "stock", "stock"


class GroupedTopKRouter(Router):
    pass


class FusedTopKRouter(Router):
    pass


GROUPED = {
    "scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "e_score_correction_bias": torch.linspace(-0.2, 0.3, 16), "num_fused_shared_experts": 0,
}  # fmt: skip


def routers() -> Any:
    """A module holding one router class each, wrapped."""
    modules = []
    for cls in (GroupedTopKRouter, FusedTopKRouter):
        fresh_cls = type(cls.__name__, (cls,), {"_compute_routing": Router._compute_routing})
        module = SimpleNamespace(__name__="vllm_router", **{cls.__name__: fresh_cls})
        moe_routing.wrap_router(module)  # type: ignore[arg-type]
        modules.append(fresh_cls)
    return modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_route_by_our_operators(dtype: torch.dtype) -> None:
    grouped_cls, fused_cls = routers()
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    grouped, fused = grouped_cls(**GROUPED), fused_cls()
    context.name(grouped, LAYER)
    context.name(fused, LAYER)
    expected = {
        grouped: reference.moe_grouped_topk(logits, GROUPED["e_score_correction_bias"], 2, 4, 2, True, 2.5),
        fused: reference.moe_softmax_topk(logits, 2, True),
    }
    for router, (weights, ids) in expected.items():
        got_weights, got_ids = router._compute_routing(None, logits, None, input_ids=None)
        assert got_weights.dtype == torch.float32
        assert got_ids.dtype == torch.int32
        torch.testing.assert_close(got_ids.long(), ids.long())
        torch.testing.assert_close(got_weights, weights.float(), atol=1e-5, rtol=1e-5)
    (row,) = status.snapshot()["counts"]
    assert (row["op"], row["layer"], row["impl"], row["tokens"]) == ("moe_routing", LAYER, "cpu", 10)


@pytest.mark.parametrize(
    "change",
    [
        {"scoring_func": "softmax"},
        {"e_score_correction_bias": None},
        {"num_expert_group": 3},
        {"num_fused_shared_experts": 1},
    ],
)
def test_other_routings_stay_with_stock(change: dict[str, Any]) -> None:
    grouped_cls, _ = routers()
    router = grouped_cls(**{**GROUPED, **change})
    assert router._compute_routing(None, torch.randn(2, 16), None) == ("stock", "stock")
    assert [f["op"] for f in status.snapshot()["fallbacks"]] == ["moe_routing"]


def test_policy_decides_the_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused_cls = routers()
    monkeypatch.setattr(moe_routing, "_policy", lambda *_: Policy("mixed", "measured", (2, 4), (True, False)))
    router = fused_cls()
    assert router._compute_routing(None, torch.randn(3, 8), None) == ("stock", "stock")
    assert router._compute_routing(None, torch.randn(2, 8), None)[1].shape == (2, 2)


def test_padding_rows_are_kept_from_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused_cls = routers()
    monkeypatch.setattr(moe_routing, "_padding", lambda router, tokens: torch.tensor([[False], [True]])[:tokens])
    weights, ids = fused_cls()._compute_routing(None, torch.randn(2, 8), None)
    assert weights[1].tolist() == [0, 0]
    assert ids[1].tolist() == [-1, -1]
    assert (ids[0] >= 0).all()


@pytest.mark.parametrize("skip", [True, False])
def test_padding_mask_is_vllms(monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    import vllm.forward_context as forward

    mask = torch.tensor([False, False, True, True])
    monkeypatch.setattr(forward, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(forward, "get_forward_context", lambda: SimpleNamespace(is_padding=mask))
    found = moe_routing._padding(SimpleNamespace(skip_padding=skip), 3)
    assert (found is not None) == skip
    if found is not None:
        assert found.tolist() == [[False], [False], [True]]


def test_the_runner_names_layers_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    class MoERunner:
        def __init__(self, layer_name, moe_config, router, routed_experts, enable_dbo=False):
            self.layer_name = layer_name

    module = SimpleNamespace(__name__="vllm_runner", MoERunner=MoERunner)
    moe_routing.wrap_runner(module)  # type: ignore[arg-type]
    moe_routing.wrap_runner(module)  # type: ignore[arg-type]
    config, router = moe_config(), FusedTopKRouter()
    moe_experts._decided[id(config)] = Policy("cpu", "on a CPU ours serves")
    method = SimpleNamespace(quant_method=SimpleNamespace(experts_cls=Quantised))
    runner = MoERunner(layer_name=LAYER, moe_config=config, router=router, routed_experts=method)
    assert runner.layer_name == LAYER
    assert context.name_of(config) == context.name_of(router) == LAYER
    assert {(row["op"], row["layer"], row["impl"]) for row in status.snapshot()["layers"]} == {
        ("moe", LAYER, "cpu"),
        ("moe_routing", LAYER, "cpu"),
    }
