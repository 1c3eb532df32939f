"""Our metrics in the registry that vLLM itself builds for /metrics, read back as Prometheus would read them."""

from __future__ import annotations

import json
import os

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from blackwell_kernels import env, metrics, status


def scrape(registry: CollectorRegistry) -> dict[str, list[tuple[dict[str, str], float]]]:
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name -> (labels, value) of our families, from the exposition text."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("blackwell_kernels_"):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The status files of one run: two workers of which one fell back."""
    monkeypatch.setenv(env.STATUS_DIR.name, str(tmp_path))
    monkeypatch.setenv(env.RUN.name, "1-1")
    status.set_arch("sm90")
    status.record_layer("moe", "l.0", "triton", "tuned")
    status.record_layer("moe", "l.1", "stock", "block shape")
    status.fallback("moe", 'block "shape"\nodd')
    status.compiled("k", after_warmup=True)
    first = status.snapshot()
    for pid in (1, 2):
        (tmp_path / f"{pid}.json").write_text(json.dumps(first))
    (tmp_path / "3.json").write_text(json.dumps({**first, "run": "0-1"}))  # an earlier server's
    return tmp_path


EXPECTED = {
    "blackwell_kernels_op_info": [
        ({"op": "moe", "impl": "stock", "arch": "sm90"}, 1.0),
        ({"op": "moe", "impl": "triton", "arch": "sm90"}, 1.0),
    ],
    "blackwell_kernels_fallback_total": [({"op": "moe", "reason": 'block "shape"\nodd'}, 2.0)],
    "blackwell_kernels_jit_after_warmup_total": [({}, 2.0)],
}


def test_a_scrape_merges_the_processes_of_this_run(server):
    registry = CollectorRegistry(auto_describe=True)
    metrics.join(registry)
    metrics.join(registry)
    assert scrape(registry) == EXPECTED


def test_a_scrape_follows_the_files(server):
    registry = CollectorRegistry()
    metrics.join(registry)
    scrape(registry)
    for path in server.glob("*.json"):
        path.unlink()
    assert scrape(registry) == {"blackwell_kernels_jit_after_warmup_total": [({}, 0.0)]}


def test_without_a_status_directory_a_scrape_is_empty_not_broken():
    registry = CollectorRegistry()
    metrics.join(registry)
    assert scrape(registry) == {"blackwell_kernels_jit_after_warmup_total": [({}, 0.0)]}


@pytest.mark.parametrize("multiprocess", [True, False])
def test_vllms_own_metrics_carry_them(server, forked, tmp_path, multiprocess):
    """Over HTTP, from the application that vLLM attaches its /metrics to."""
    pytest.importorskip("vllm")

    def serve():
        if multiprocess:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
        metrics.install()
        metrics.install()
        from fastapi import FastAPI
        from fastapi.testclient import TestClient
        from vllm.entrypoints.serve.instrumentator.metrics import attach_router

        app = FastAPI()
        attach_router(app)
        client = TestClient(app)
        first, second = (client.get("/metrics").text for _ in range(2))
        assert first.count("blackwell_kernels_op_info{") == second.count("blackwell_kernels_op_info{")
        return second

    assert parsed(forked(serve)) == EXPECTED
