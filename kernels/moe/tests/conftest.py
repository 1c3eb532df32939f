"""Implementations under test, and an independent formulation of the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from blackwell_kernels.common.testing.poison import canaries, poison_
from blackwell_kernels.moe import MoeConfig, op
from blackwell_kernels.moe.inputs import MoeInputs


@dataclass(frozen=True)
class Implementation:
    """Calls one implementation with guarded, poisoned memory and returns the results on the CPU.

    config: of the experts, where a call names none.
    """

    name: str
    device: torch.device
    config: MoeConfig | None = None

    def _op(self, name: str) -> Callable[..., None]:
        return getattr(torch.ops.blackwell_kernels, name) if self.name == "cpu" else getattr(op, f"{name}_triton")

    def experts(self, inputs: MoeInputs, **options: Any) -> torch.Tensor:
        if self.config is not None:
            options = {"config": self.config, **options}
        with canaries(self.device) as guard:
            args = [
                None if x is None else guard.input(x.to(self.device), strides=x.stride(), name=f"argument {i}")
                for i, x in enumerate(inputs.args())
            ]
            out = guard.output(inputs.hidden_states.shape, torch.bfloat16)
            self._op("moe_fp8_block_scale")(*args, out, **options)
        return out.cpu()

    def _route(self, name: str, topk: int, logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with canaries(self.device) as guard:
            guarded = guard.input(logits.to(self.device), strides=logits.stride())
            weights = guard.output((logits.shape[0], topk), torch.float32)
            ids = guard.output((logits.shape[0], topk), torch.int32)
            moved = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in args]
            self._op(name)(guarded, *moved, weights, ids)
        return weights.cpu(), ids.cpu()

    def grouped_topk(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        topk: int,
        n_group: int,
        topk_group: int,
        renormalize: bool = True,
        factor: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._route("moe_grouped_topk", topk, logits, bias, n_group, topk_group, renormalize, factor)

    def softmax_topk(
        self, logits: torch.Tensor, topk: int, renormalize: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._route("moe_softmax_topk", topk, logits, renormalize)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These shapes are too small to share: on a busy machine threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def triton_impl(device: torch.device) -> Implementation:
    pytest.importorskip("triton")
    return Implementation("triton", device)


@pytest.fixture(scope="session")
def sorted_impl(device: torch.device) -> Implementation:
    pytest.importorskip("triton")
    return Implementation("sorted", device, MoeConfig(16, 16, 4, 2, 4, 2))


@pytest.fixture(scope="session")
def direct_impl(device: torch.device) -> Implementation:
    pytest.importorskip("triton")
    return Implementation("direct", device, MoeConfig(16, 16, 4, 3, 4, 3, gate_up_rows=16, down_rows=32))


@pytest.fixture(scope="session")
def cpu_impl() -> Implementation:
    return Implementation("cpu", torch.device("cpu"))


@pytest.fixture(scope="session", params=["cpu", "triton"])
def impl(request: pytest.FixtureRequest) -> Implementation:
    return request.getfixturevalue(f"{request.param}_impl")


@pytest.fixture
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an operator allocates holds NaN (floats) or wild indices (integers) until it is written."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = empty(*args, **kwargs)
        return x if x.is_meta else poison_(x)

    monkeypatch.setattr(torch, "empty", poisoned)


def _fake_quantize(x: torch.Tensor) -> torch.Tensor:
    """What 1x128 quantisation leaves of one row, by logarithms in float64 rather than by exponent bits."""
    groups = x.float().double().view(-1, 128)
    exponent = torch.log2((groups.abs().amax(1, keepdim=True) / 448).clamp_min(1e-10)).ceil()
    return ((groups / 2**exponent).to(torch.float8_e4m3fn).double() * 2**exponent).flatten()


def dense_moe(
    inputs: MoeInputs,
    *,
    gate_first: bool = True,
    weighted: bool = True,
    product: torch.dtype = torch.float64,
    activation: torch.dtype = torch.float64,
    pick: torch.dtype = torch.float64,
) -> torch.Tensor:
    """One token and pick at a time in float64, from weights dequantised element by element.

    product, activation, pick: what W13's result, silu(gate) * up and each weighted result are rounded to on the way: a
    working precision, whose error against the exact result is what tolerances are made of.
    """
    experts, hidden, inter = inputs.w2.shape

    def dequantize(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return w.double() * torch.kron(scale.double(), torch.ones(128, 128, dtype=torch.float64))

    w13 = {}
    w2 = {}
    out = torch.zeros(inputs.hidden_states.shape[0], hidden, dtype=torch.float64)
    for t, ids in enumerate(inputs.topk_ids.tolist()):
        row = inputs.hidden_states[t]
        if inputs.a_scale is None:
            x = _fake_quantize(row)
        else:
            x = (row.double().view(-1, 128) * inputs.a_scale[t].double()[:, None]).flatten()
        for k, e in enumerate(ids):
            if inputs.expert_map is not None:
                e = int(inputs.expert_map[e]) if 0 <= e < len(inputs.expert_map) else -1
            if not 0 <= e < experts:
                continue
            if e not in w13:
                w13[e] = dequantize(inputs.w13[e], inputs.w13_scale[e])
                w2[e] = dequantize(inputs.w2[e], inputs.w2_scale[e])
            first, second = (w13[e] @ x).to(product).double().split(inter)
            gate, up = (first, second) if gate_first else (second, first)
            h = _fake_quantize((gate / (1 + torch.exp(-gate)) * up).to(activation))
            weight = inputs.topk_weights[t, k].double() if weighted else 1.0
            out[t] += (weight * (w2[e] @ h)).to(pick)
    return out


@pytest.fixture(scope="session")
def dense() -> Callable[..., torch.Tensor]:
    return dense_moe
