"""Our numbers on vLLM's own /metrics.

The numbers arise in workers and /metrics is served by the API server, another process: a collector there reads the
status files at each scrape. vLLM builds the registry of /metrics in one place (0.24, 0.32, 0.33), prometheus_client's
global one or, with several API servers, a fresh one over PROMETHEUS_MULTIPROC_DIR; the collector joins either, and
every API server answers for the whole deployment. vLLM's Rust front end serves its own /metrics, without ours.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from blackwell_kernels import env, status
from blackwell_kernels.import_hooks import when_imported

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

METRICS_MODULE = "vllm.entrypoints.serve.instrumentator.metrics"
_MARK = "_blackwell_kernels_collector"
logger = logging.getLogger("vllm.blackwell_kernels")


class StatusCollector:
    """blackwell_kernels_{op_info, fallback_total, jit_after_warmup_total} of this run's processes."""

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls at each scrape."""
        directory = env.STATUS_DIR.get()
        yield from self._families(status.read_all(directory, env.RUN.get()) if directory else status.merge([]))

    def describe(self) -> Iterator[Metric]:
        """Names only, so that registering reads no file."""
        yield from self._families(status.merge([]))

    @staticmethod
    def _families(found: status.Snapshot) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily(
            "blackwell_kernels_op_info",
            "1 for each operator and the implementation that serves it",
            labels=["op", "impl", "arch"],
        )
        for op, impl in sorted({(row["op"], row["impl"]) for row in found["layers"]}):
            info.add_metric([op, impl, found["arch"]], 1)
        yield info
        fallback = CounterMetricFamily(
            "blackwell_kernels_fallback", "Calls or layers left to stock vLLM", labels=["op", "reason"]
        )
        for row in found["fallbacks"]:
            fallback.add_metric([row["op"], row["reason"]], row["count"])
        yield fallback
        yield CounterMetricFamily(
            "blackwell_kernels_jit_after_warmup",
            "Kernels of ours that Triton compiled while requests were waiting",
            value=len(found["jit_after_warmup"]),
        )


def install() -> None:
    """Join vLLM's registry, now or when the module that serves /metrics is imported."""
    when_imported(METRICS_MODULE, _wrap)


def _wrap(module: ModuleType) -> None:
    stock = getattr(module, "get_prometheus_registry", None)
    if stock is None:
        logger.warning("%s has changed: /metrics will not show blackwell_kernels_*", METRICS_MODULE)
        return
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def get_prometheus_registry() -> CollectorRegistry:
        registry = stock()
        join(registry)
        return registry

    setattr(get_prometheus_registry, _MARK, True)
    module.get_prometheus_registry = get_prometheus_registry  # type: ignore[attr-defined]


def join(registry: CollectorRegistry) -> None:
    """Register the collector with `registry`, once."""
    if not hasattr(registry, _MARK):
        registry.register(StatusCollector())  # type: ignore[arg-type]
        setattr(registry, _MARK, True)
