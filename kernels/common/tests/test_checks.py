"""Input checks: every message names the argument, what it is, what it must be, and what to do."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.checks import check_tensor, describe, once_per_layout, require
from blackwell_kernels.errors import BlackwellKernelsError, UnsupportedInputError

X = torch.zeros(4, 128, dtype=torch.bfloat16)


def refusal(**demands) -> str:
    with pytest.raises(UnsupportedInputError) as error:
        check_tensor("gdn_decode", "q", demands.pop("x", X), **demands)
    assert isinstance(error.value, BlackwellKernelsError)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def test_what_fits_passes():
    check_tensor("op", "q", X, shape=(None, 128), dtype=torch.bfloat16, device=torch.device("cpu"), contiguous=True)
    check_tensor("op", "q", X, shape=[4, None], dtype=(torch.float32, torch.bfloat16))
    check_tensor("op", "q", X[:, :64])
    check_tensor("op", "q", torch.zeros(8, 1)[:, :1])
    check_tensor("op", "q", torch.zeros(()), shape=())
    check_tensor("op", "q", torch.zeros(0, 8).t())


def test_dtype():
    message = refusal(dtype=(torch.float32, torch.uint8))
    assert message == ("gdn_decode: got q = bfloat16[4, 128] on cpu; supported: q of dtype float32 or uint8; convert q")


@pytest.mark.parametrize("shape", [(4, 64), (None, 128, 1), (128,), (0, 128)])
def test_shape(shape):
    wanted = ", ".join("*" if n is None else str(n) for n in shape)
    assert f"got q = bfloat16[4, 128] on cpu; supported: q of shape [{wanted}]" in refusal(shape=shape)


def test_device():
    assert "got q on cpu; supported: all tensors on meta; move q" in refusal(device=torch.device("meta"))


def test_strides():
    assert "strides (1, 128)" in refusal(x=X.t())
    assert "q.contiguous()" in refusal(x=X[:, ::2])
    assert "supported: contiguous q" in refusal(x=X[:, :64], contiguous=True)
    check_tensor("op", "q", X.t(), last_dim_contiguous=False)


def test_require_and_describe():
    require(True, "op", "a", "b", "c")
    with pytest.raises(UnsupportedInputError, match="op: got 7 heads; supported: 8 heads; pad them") as error:
        require(False, "op", "7 heads", "8 heads", "pad them")
    assert (error.value.op, error.value.asked) == ("op", "7 heads")
    assert describe(None) == "None"
    assert describe(torch.zeros(2, dtype=torch.int32)) == "int32[2] on cpu"


def test_a_check_runs_once_per_layout_and_again_for_any_other():
    seen = []

    @once_per_layout
    def check(op: str, x: torch.Tensor, y: torch.Tensor | None) -> int:
        seen.append((op, x))
        check_tensor(op, "x", x, shape=(4, None))
        return x.shape[1]

    assert [check("op", X, None), check("op", X.clone(), None)] == [128, 128]
    assert len(seen) == 1
    others = [("other", X, None), ("op", X.float(), None), ("op", X[:, :64], None), ("op", X[:, 1:65], None)]
    others += [("op", X.repeat(1, 2)[:, :128], None), ("op", X, X), ("op", X.to("meta"), None)]
    for arguments in others:
        check(*arguments)
    assert len(seen) == 1 + len(others)
    for _ in range(2):
        with pytest.raises(UnsupportedInputError):
            check("op", X[:3], None)
    assert len(seen) == 3 + len(others)
