"""Shapes and layouts drawn by hypothesis, held to the same reference and budgets as everything else.

The CPU implementation sees a few hundred configurations an operator, the interpreted kernels a few small ones, and on a
GPU, where nearly each is a compilation of its own, the kernels see some dozens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blackwell_kernels.gdn.inputs import (
    Heads,
    conv_prepare_inputs,
    decode_inputs,
    prefill_inputs,
    prepare_inputs,
)
from blackwell_kernels.gdn.oracles import Implementation

EXAMPLES, COMPILED_EXAMPLES, INTERPRETED_EXAMPLES = 200, 40, 12
_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.fixture(scope="session", params=["cpu", "triton"])
def fuzzed(request: pytest.FixtureRequest, device: torch.device) -> tuple[Implementation, int]:
    examples = COMPILED_EXAMPLES if device.type == "cuda" else INTERPRETED_EXAMPLES
    return Implementation(request.param, device), EXAMPLES if request.param == "cpu" else examples


@st.composite
def heads(draw: st.DrawFn, sizes: tuple[int, ...] = (16, 32)) -> Heads:
    H = draw(st.integers(1, 2))
    return Heads(H, H * draw(st.integers(1, 3)), draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes)))


def padding(lengths: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, lengths - 1), unique=True, max_size=2) if lengths else st.just([])


seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.bfloat16, torch.float32])


@st.composite
def decode_cases(draw: st.DrawFn) -> Any:
    multi, conv = draw(st.booleans()), draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 2, 4])) if multi else None
    longest = window or 4
    lengths = draw(st.lists(st.integers(0, longest), max_size=4)) if multi else draw(st.integers(0, 4))
    count = len(lengths) if isinstance(lengths, list) else lengths
    x = decode_inputs(
        torch.Generator().manual_seed(draw(seeds)),
        draw(heads()),
        lengths,
        state_dtype=draw(dtypes),
        window=window,
        accepted=window is not None and draw(st.booleans()),
        conv=conv,
        bias=conv and draw(st.booleans()),
        padding=draw(padding(count)),
        gap=draw(st.sampled_from([0, 7, 64])),
    )
    return replace(x, use_qk_l2norm=True, scale=draw(st.sampled_from([1.0, 0.25])))


def test_decode(fuzzed: tuple[Implementation, int]) -> None:
    implementation, examples = fuzzed

    @settings(max_examples=examples, **_SETTINGS)
    @given(decode_cases())
    def check(x: Any) -> None:
        implementation.decode_checked(x)

    check()


@st.composite
def prefill_cases(draw: st.DrawFn) -> Any:
    near_a_chunk = st.sampled_from([0, 1, 2, 63, 64, 65])
    lengths = draw(st.lists(near_a_chunk | st.integers(0, 40), max_size=3))
    x = prefill_inputs(
        torch.Generator().manual_seed(draw(seeds)),
        draw(heads()),
        lengths,
        state_dtype=draw(dtypes),
        padding=draw(padding(len(lengths))),
        gap=draw(st.sampled_from([0, 7, 64])),
    )
    # from no memory at all to never forgetting; budgets are relative, so the amplitude of the gates is free
    return replace(x, g=x.g * draw(st.sampled_from([0.0, 0.1, 1.0, 50.0])), use_qk_l2norm=draw(st.booleans()))


def test_prefill(fuzzed: tuple[Implementation, int]) -> None:
    implementation, examples = fuzzed

    @settings(max_examples=examples, **_SETTINGS)
    @given(prefill_cases())
    def check(x: Any) -> None:
        implementation.prefill_checked(x)

    check()


@st.composite
def prepare_cases(draw: st.DrawFn) -> Any:
    shape, rng = draw(heads()), torch.Generator().manual_seed(draw(seeds))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 20), max_size=5))
        bias, pads = draw(st.booleans()), draw(padding(len(lengths)))
        rows, gap = draw(st.integers(3, 6)), draw(st.sampled_from([0, 7, 64]))
        x = conv_prepare_inputs(rng, shape, lengths, bias=bias, rows=rows, padding=pads, gap=gap)
    else:
        x = prepare_inputs(rng, shape, draw(st.integers(0, 40)))
    # below -80 g is no normal fp32 number and a GPU's is 0
    a = (x.a * draw(st.sampled_from([1.0, 30.0]))).clamp(min=-80)
    x = replace(x, a=a, use_qk_l2norm=draw(st.booleans()))
    return x, shape


def test_prepare(fuzzed: tuple[Implementation, int]) -> None:
    implementation, examples = fuzzed

    @settings(max_examples=examples, **_SETTINGS)
    @given(prepare_cases())
    def check(case: Any) -> None:
        implementation.prepare_checked(*case)

    check()
