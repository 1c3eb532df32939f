"""Both tiny FP8 models, served for real with the plugin on the CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blackwell_kernels import status
from blackwell_kernels.e2e import golden, metrics, models, probe
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import Server

from .test_server import eventually

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module", params=models.MODELS)
def served(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(model, its server, ready)."""
    folder = tmp_path_factory.mktemp(request.param)
    with golden.serve(request.param, folder, Steps()) as server:
        server.wait_ready(Steps())
        yield request.param, server


def test_greedy_tokens_are_the_golden_ones(served: tuple[str, Server]) -> None:
    model, server = served
    kept = json.loads(golden.path(model).read_text())["answers"]
    assert sum(golden.binding(row) for row in kept) >= 30, "enough tokens that bind"
    assert golden.disagreements(kept, [golden.answer(server.base_url, row["prompt"]) for row in kept]) == []


def test_log_probabilities_are_close_to_transformers(served: tuple[str, Server]) -> None:
    model, server = served
    checkpoint = golden.checkpoints.build(model)
    with probe.References(checkpoint) as references:
        found = probe.check(server.base_url, references, models.hf_config(model)["vocab_size"])
    assert found["passed"], found


def test_every_operator_of_the_model_is_ours(served: tuple[str, Server]) -> None:
    model, server = served
    probe.complete(server.base_url, list(range(3, 90)), max_tokens=4)
    page = metrics.parse_prometheus(server.metrics())
    ours = {labels["op"]: labels["impl"] for name, labels, _ in page if name == "blackwell_kernels_op_info"}
    assert ours == dict.fromkeys(models.HOOK_OPS[model], "cpu")
    wanted = {(op, phase) for op, phases in models.HOOK_OPS[model].items() for phase in phases if phase != "mixed"}

    def counted() -> set[tuple[str, str]]:
        rows = status.read_all(server.status_dir)["counts"]
        return {(row["op"], row["phase"]) for row in rows if row["tokens"] > 0}

    # a server writes its status once a second
    assert eventually(lambda: counted() >= wanted), wanted - counted()
    assert status.read_all(server.status_dir)["fallbacks"] == []
