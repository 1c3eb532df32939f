"""The ceiling of updates in place: it touches the slots named, all of them, and says why it cannot run."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import in_place


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(in_place.run)
    result = CliRunner().invoke(app, ["--results", str(tmp_path)])
    assert isinstance(result.exception, MissingRequirementError)
    assert "GPU" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_more_slots_than_the_sets_can_share_are_refused():
    app = typer.Typer()
    app.command()(in_place.run)
    result = CliRunner().invoke(app, ["--slots", "257"])
    assert result.exit_code == 2
    assert "256" in result.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_slot_named_is_updated_and_no_other():
    pool = torch.zeros(in_place.POOL, in_place.SLOT, dtype=torch.bfloat16, device="cuda")
    slots = [torch.tensor([7 * i + 3, 1000 - i], dtype=torch.int32, device="cuda") for i in range(in_place.SETS)]
    found = in_place.calls(pool, slots)
    del found["copy"]
    value = torch.zeros(())
    for calls in found.values():
        for call in calls:
            call()
        value = value * 0.5 + 1
        named = torch.cat(slots).long()
        assert (pool[named] == value.item()).all()
        others = torch.ones(in_place.POOL, dtype=torch.bool, device="cuda").index_fill(0, named, False)
        assert not pool[others].any()
