"""Kind of batch, names and counting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels import status
from blackwell_kernels.model_patches import context


def layer(prefills: int, decodes: int, drafts: int = 0) -> SimpleNamespace:
    return SimpleNamespace(num_prefills=prefills, num_decodes=decodes, num_spec_decodes=drafts)


PLAIN = SimpleNamespace(max_query_len=1)  # FlashAttention's and FlashMLA's metadata know no more


@pytest.mark.parametrize(
    ("metadata", "phase"),
    [
        ({"a": layer(2, 0)}, "prefill"),
        ({"a": layer(0, 3)}, "decode"),
        ({"a": PLAIN, "b": layer(1, 3)}, "mixed"),
        ({"a": layer(1, 0, 2)}, "spec"),
        ({"a": PLAIN}, "decode"),
        ({"a": SimpleNamespace(max_query_len=7)}, "prefill"),
        ({}, "decode"),
    ],
)
def test_batch_phase(metadata: dict[str, Any], phase: str) -> None:
    assert context.batch_phase(metadata) == phase


@pytest.mark.parametrize(
    ("found", "expected"), [({"a": 1}, {"a": 1}), ([{"a": 1}, {"b": 2}], {"a": 1}), (None, None), ([], None)]
)
def test_step_metadata(monkeypatch: pytest.MonkeyPatch, found: Any, expected: Any) -> None:
    forward = pytest.importorskip("vllm.forward_context")
    monkeypatch.setattr(forward, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(forward, "get_forward_context", lambda: SimpleNamespace(attn_metadata=found))
    assert context.step_metadata() == expected


def test_profile_runs_and_traces_count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    status.reset()
    monkeypatch.setattr(context, "step_metadata", lambda: None)
    context.count("moe", "layer", "cpu", 5)
    monkeypatch.setattr(context, "step_metadata", lambda: {"a": layer(1, 0)})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    context.count("moe", "layer", "cpu", 5)
    assert status.snapshot()["counts"] == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    context.count("moe", "layer", "cpu", 5)
    (row,) = status.snapshot()["counts"]
    assert (row["op"], row["layer"], row["impl"], row["tokens"], row["phase"]) == ("moe", "layer", "cpu", 5, "prefill")


def test_names() -> None:
    thing, other = SimpleNamespace(), SimpleNamespace()
    context.name(thing, "model.layers.3.mlp")
    assert context.name_of(thing) == "model.layers.3.mlp"
    assert context.name_of(other).startswith("SimpleNamespace@")
