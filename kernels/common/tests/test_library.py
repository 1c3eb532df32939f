"""An operator registered here behaves as PyTorch expects of one: dispatch, fake tensors, declared mutation."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.library import register_op


def scale_into(x: torch.Tensor, factor: float, out: torch.Tensor) -> None:
    torch.mul(x, factor, out=out)


@pytest.fixture(scope="module")
def scale():
    return register_op("test_scale(Tensor x, float factor, Tensor(a!) out) -> ()", cpu=scale_into, cuda=scale_into)


def test_it_writes_its_output_and_returns_nothing(scale, device):
    x, out = torch.arange(4.0, device=device), torch.empty(4, device=device)
    assert scale(x, 2.0, out) is None
    assert torch.equal(out, 2 * x)
    assert torch.ops.blackwell_kernels.test_scale.default is scale


def test_opcheck(scale, device):
    torch.library.opcheck(scale, (torch.ones(4, device=device), 2.0, torch.empty(4, device=device)))


def test_an_undeclared_mutation_is_caught(device):
    cheat = register_op("test_cheat(Tensor x, float factor, Tensor out) -> ()", cpu=scale_into, cuda=scale_into)
    with pytest.raises(Exception, match="mutat"):
        torch.library.opcheck(cheat, (torch.ones(4, device=device), 2.0, torch.empty(4, device=device)))


def test_it_survives_compilation(scale, device):
    def twice(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        scale(x, 2.0, out)
        scale(out.clone(), 2.0, out)
        return out

    x = torch.randn(8, device=device)
    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True)(x), 4 * x)


@pytest.mark.gpu
def test_it_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    current = []
    op = register_op(
        "test_device(Tensor x, Tensor(a!) out) -> ()",
        cpu=print,
        cuda=lambda x, out: current.append(torch.cuda.current_device()),
    )
    x = torch.empty(1, device="cuda:1")
    with torch.cuda.device(0):
        op(x, x.clone())
        assert torch.cuda.current_device() == 0
    assert current == [1]
