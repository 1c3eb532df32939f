"""What tests hold the operators to: other formulations, working-precision oracles that tolerances are derived from, and
a way to run one implementation with every buffer guarded. Imports no pytest; nothing in service imports it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from blackwell_kernels.common.testing.compare import assert_close_to_reference
from blackwell_kernels.common.testing.poison import canaries
from blackwell_kernels.gdn import op, reference
from blackwell_kernels.gdn.inputs import DecodeInputs, PrefillInputs, PrepareInputs

Round = Callable[[torch.Tensor], torch.Tensor]


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """Rounded to bf16, in the dtype it came in."""
    return x.to(torch.bfloat16).to(x.dtype)


def _in_float32() -> Any:
    """The reference's own text with float32 in place of float64, and the convolution's output rounded to bf16."""
    module = types.ModuleType("reference32")
    text = inspect.getsource(reference).replace(".double()", ".float()").replace("float64", "float32")
    exec(compile(text, "reference32", "exec"), module.__dict__)
    step = module.causal_conv_step
    module.causal_conv_step = lambda *args: to_bf16(step(*args))  # type: ignore[attr-defined]
    return module


WORKING = _in_float32()

# a GPU's exponential errs by 2 + 1.17 |x| units in the last place (CUDA's programming guide) and g takes two of them:
# fp32 arithmetic that does better, as the CPU's on a handful of elements may, is luck and no standard
FAST_MATH = 2.0**-21


def _standard(working: torch.Tensor, expected: torch.Tensor, fast_math: float | torch.Tensor) -> torch.Tensor:
    """`working`, moved away from `expected` where it is closer than `fast_math`, relative, allows to expect."""
    error, floor = working.double() - expected, fast_math * expected.abs()
    return torch.where(error.abs() > floor, working.double(), expected + floor)


def assert_close(
    out: torch.Tensor, expected: torch.Tensor, working: torch.Tensor, fast_math: float | torch.Tensor = FAST_MATH
) -> None:
    """Close to the reference as fp32 arithmetic on any device can be; see common.testing.compare."""
    assert_close_to_reference(out, expected, _standard(working, expected, fast_math))


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    *,
    dtype: torch.dtype = torch.float64,
    rounded: Round = lambda x: x,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence by the chunked formula with explicit inverses: another formulation of the recurrence.

    rounded: applied to every operand of a matrix product, as tensor cores with bf16 operands demand.
    """
    group, out = v.shape[1] // k.shape[1], torch.empty(v.shape, dtype=dtype)
    final = state.to(dtype).clone()
    for h in range(v.shape[1]):
        s = final[h]
        for start in range(0, len(q), chunk):
            rows = slice(start, start + chunk)
            Q, K = q[rows, h // group].to(dtype), k[rows, h // group].to(dtype)
            V, B = v[rows, h].to(dtype), beta[rows, h].to(dtype)
            G = g[rows, h].to(dtype).clamp(min=-120.0).cumsum(0)
            D = (G[:, None] - G[None, :]).tril().exp().tril()
            system = torch.eye(len(Q), dtype=dtype) + (B[:, None] * D * (K @ K.T)).tril(-1)
            X = torch.linalg.solve_triangular(system, torch.eye(len(Q), dtype=dtype), upper=False) * B
            w, u = rounded(X * G.exp()) @ K, rounded(rounded(X) @ V)
            fresh = u - rounded(w) @ rounded(s).T
            o = G.exp()[:, None] * (Q @ rounded(s).T) + rounded((D * (Q @ K.T)).tril()) @ rounded(fresh)
            out[rows, h] = scale * o
            s = G[-1].exp() * s + rounded((G[-1] - G).exp()[:, None] * fresh).T @ K
        final[h] = s
    return out, final


def chunked_prefill(inputs: PrefillInputs, rounded: Round = lambda x: x) -> tuple[torch.Tensor, torch.Tensor]:
    """gdn_prefill in fp32 by `chunked`: the working precision of the implementations."""
    q, k = inputs.q, inputs.k
    if inputs.use_qk_l2norm:
        q, k = (to_bf16(WORKING.l2_normalise(x)) for x in (q, k))
    out, state = torch.zeros(inputs.v.shape, dtype=torch.float32), inputs.state.float().clone()
    bounds = inputs.cu_seqlens.tolist()
    for i, slot in enumerate(inputs.state_indices.tolist()):
        rows = slice(bounds[i], bounds[i + 1])
        if bounds[i] == bounds[i + 1]:
            continue
        known = slot > 0 and bool(inputs.has_initial_state[i])
        start = state[slot] if known else torch.zeros(state.shape[1:])
        v, g, beta = inputs.v[rows], inputs.g[rows], inputs.beta[rows]
        out[rows], final = chunked(
            q[rows], k[rows], v, g, beta, start, inputs.scale, dtype=torch.float32, rounded=rounded
        )
        if slot > 0:
            state[slot] = final
    return out, state


@dataclass(frozen=True)
class Implementation:
    """Runs one implementation between canaries on poisoned outputs; results come back on the CPU.

    `*_checked` compare with the reference within the budget that the working precision allows, and demand that no
    slot, row or gap that should not change did.
    """

    name: str
    device: torch.device

    @property
    def rounded(self) -> Round:
        """What the operands of this implementation's matrix products went through."""
        return to_bf16 if self.name == "triton" else lambda x: x

    def function(self, name: str) -> Callable[..., None]:
        if self.name == "triton" and self.device.type == "cpu":
            return getattr(op, f"{name}_triton")
        return getattr(torch.ops.blackwell_kernels, name)

    def _run(
        self, name: str, arguments: dict[str, Any], inout: tuple[str, ...], outputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """outputs: name -> (shape, dtype). Returns the tensors in `inout` and `outputs`."""
        device = torch.device("cpu") if self.name == "cpu" else self.device
        with canaries(device) as guard:
            call: dict[str, Any] = {}
            for key, x in arguments.items():
                if isinstance(x, torch.Tensor):
                    place = guard.inout if key in inout else guard.input
                    call[key] = place(x.to(device), strides=x.stride(), name=key)
                else:
                    call[key] = x
            for key, (shape, dtype) in outputs.items():
                call[key] = guard.output(shape, dtype, name=key)
            self.function(name)(**call)
        return {key: call[key].cpu() for key in (*inout, *outputs) if key in call}

    def decode(self, inputs: DecodeInputs) -> dict[str, torch.Tensor]:
        shape = (len(inputs.mixed_qkv), *inputs.state.shape[1:3])
        outputs = {"out": (shape, torch.bfloat16)}
        return self._run("gdn_decode", inputs.arguments(), ("state", "conv_state"), outputs)

    def prefill(self, inputs: PrefillInputs) -> dict[str, torch.Tensor]:
        outputs = {"out": (inputs.v.shape, torch.bfloat16)}
        return self._run("gdn_prefill", inputs.arguments(), ("state",), outputs)

    def prepare(self, inputs: PrepareInputs, heads: Any) -> dict[str, torch.Tensor]:
        tokens, key = len(inputs.mixed_qkv), (heads.H, heads.K)
        outputs = {
            "q": ((tokens, *key), torch.bfloat16),
            "k": ((tokens, *key), torch.bfloat16),
            "v": ((tokens, heads.HV, heads.V), torch.bfloat16),
            "g": ((tokens, heads.HV), torch.float32),
            "beta": ((tokens, heads.HV), torch.float32),
        }
        return self._run("gdn_prepare", inputs.arguments(), ("conv_state",), outputs)

    def decode_checked(self, inputs: DecodeInputs) -> dict[str, torch.Tensor]:
        result = self.decode(inputs)
        expected, working = (module.gdn_decode(**inputs.arguments()) for module in (reference, WORKING))
        assert_close(result["out"], expected[0], working[0])
        assert_states_close(result["state"], inputs.state, expected[1], working[1])
        if inputs.conv_state is not None:
            # tokens are copied, not computed with
            assert_same_bits(result["conv_state"], expected[2].to(inputs.conv_state.dtype))
        return result

    def prefill_checked(self, inputs: PrefillInputs) -> dict[str, torch.Tensor]:
        result = self.prefill(inputs)
        expected = reference.gdn_prefill(**inputs.arguments())
        working = chunked_prefill(inputs, self.rounded)
        assert_close(result["out"], expected[0], working[0])
        assert_states_close(result["state"], inputs.state, expected[1], working[1])
        return result

    def prepare_checked(self, inputs: PrepareInputs, heads: Any) -> dict[str, torch.Tensor]:
        result = self.prepare(inputs, heads)
        (expected, state), (working, _) = (_prepared(module, inputs, heads) for module in (reference, WORKING))
        if inputs.conv_state is not None:
            assert_same_bits(result["conv_state"], state.to(inputs.conv_state.dtype))
        for name, e, w in zip(("q", "k", "v", "g", "beta"), expected, working, strict=True):
            # softplus of a very negative number is its exponential, whose error grows with that number
            x = inputs.a.double() + inputs.dt_bias.double() if name == "g" else torch.zeros(())
            assert_close(result[name], e, w, FAST_MATH + 1.17 * 2.0**-23 * x.clamp(max=0).abs())
        return result


def _prepared(module: Any, x: PrepareInputs, heads: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
    """The module's gdn_prepare behind its gdn_causal_conv where there is one, and the history that leaves."""
    mixed_qkv, state = x.mixed_qkv, x.conv_state
    if state is not None:
        sequences = (x.state_indices, x.has_initial_state, x.cu_seqlens)
        mixed_qkv, state = module.gdn_causal_conv(mixed_qkv, x.conv_weight, x.conv_bias, state, *sequences)
    gates = (x.a, x.b, x.A_log, x.dt_bias)
    return module.gdn_prepare(mixed_qkv, *gates, heads.H, heads.K, x.use_qk_l2norm), state


def assert_same_bits(x: torch.Tensor, y: torch.Tensor) -> None:
    """Equal, NaN included."""
    assert x.dtype == y.dtype, f"{x.dtype}, expected {y.dtype}"
    differ = ~((x == y) | (x.isnan() & y.isnan()))
    assert not differ.any(), f"{int(differ.sum())} elements differ, first at {differ.nonzero()[0].tolist()}"


def assert_states_close(
    state: torch.Tensor, before: torch.Tensor, expected: torch.Tensor, working: torch.Tensor
) -> None:
    """Slots the reference changed are within budget, all others hold the bits they held."""
    start = before.double()
    written = ~((expected == start) | (expected.isnan() & start.isnan())).flatten(1).all(1)
    assert_same_bits(state[~written], before[~written])
    assert_close(state[written], expected[written], working[written])
