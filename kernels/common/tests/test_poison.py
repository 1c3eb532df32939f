"""Poison and guard bands: what is not written shows, what is written astray is named."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.testing.poison import Canaries, canaries, poison, poison_

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_nan(dtype):
    assert poison((3, 5), dtype).float().isnan().all()


def test_integers_are_conspicuous_and_not_the_padding_value():
    assert (poison((4,), torch.int32) == -0x5A5A5A5B).all()
    assert (poison((4,), torch.int64) != -1).all()
    # bytes of a cache read as any float are NaN
    raw = poison((16,), torch.uint8)
    assert raw.view(torch.float8_e4m3fn).float().isnan().all()
    assert raw.view(torch.float32).isnan().all()


def test_strided_tensors_are_poisoned_in_place():
    x = torch.zeros(4, 6)
    poison_(x[:, 1:3])
    assert x[:, 1:3].isnan().all()
    assert (x[:, [0, 3, 4, 5]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32, torch.bfloat16, torch.float8_e4m3fn])
def test_honest_use_passes(dtype):
    with canaries() as guard:
        x = guard.input(torch.ones(8, 4).to(dtype))
        out = guard.output((8, 4), dtype, strides=(7, 1))
        state = guard.inout(torch.ones(3).to(dtype))
        out.copy_(x)
        state.zero_()
    assert torch.equal(out.float(), torch.ones(8, 4))


@pytest.mark.parametrize("offset", [-1, 4, 7 * 7 + 4])
def test_a_write_outside_is_named(offset):
    guard = Canaries()
    out = guard.output((8, 4), torch.float32, strides=(7, 1), name="logits")
    out.zero_()
    guard.check()
    out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(0.0)
    with pytest.raises(AssertionError, match=rf"logits: 1 elements outside.*offset {offset} of float32\[8, 4\]"):
        guard.check()


def test_a_written_input_is_named():
    guard = Canaries()
    x = guard.input(torch.tensor([1.0, torch.nan]), name="weights")
    guard.check()
    x[0] = 2.0
    with pytest.raises(AssertionError, match="weights: an input was written"):
        guard.check()


def test_an_error_inside_is_not_hidden():
    def fail_after_a_stray_write() -> None:
        with canaries() as guard:
            guard.output((2,), torch.float32).as_strided((1,), (1,), 0).fill_(0.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_a_stray_write()


def test_empty_tensors():
    with canaries() as guard:
        assert guard.input(torch.empty(0, 4)).shape == (0, 4)
