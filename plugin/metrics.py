"""Our numbers on vLLM's own /metrics.

The numbers arise in workers and /metrics is served by the API server, another process: a collector there reads the
status files at each scrape. One API server serves prometheus_client's global registry, which the collector joins. With
several, /metrics is made anew at each scrape over PROMETHEUS_MULTIPROC_DIR, by vLLM and by
prometheus-fastapi-instrumentator alike; the collector joins each registry that a MultiProcessCollector is made for, so
that any API server answers for the whole deployment. vLLM's Rust front end serves its own /metrics, without ours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from blackwell_kernels import env, status
from blackwell_kernels.import_hooks import when_imported

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

_MARK = "_blackwell_kernels_collector"


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
    """Join the registries of this process, now or when prometheus_client is imported."""
    when_imported("prometheus_client", lambda prometheus_client: join(prometheus_client.REGISTRY))
    when_imported("prometheus_client.multiprocess", _wrap)


def _wrap(multiprocess: ModuleType) -> None:
    cls = multiprocess.MultiProcessCollector
    stock = cls.__init__
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def __init__(self: Any, registry: CollectorRegistry | None, *args: Any, **kwargs: Any) -> None:
        stock(self, registry, *args, **kwargs)
        if registry is not None:
            join(registry)

    setattr(__init__, _MARK, True)
    cls.__init__ = __init__


def join(registry: CollectorRegistry) -> None:
    """Register the collector with `registry`, once."""
    if not hasattr(registry, _MARK):
        registry.register(StatusCollector())  # type: ignore[arg-type]
        setattr(registry, _MARK, True)
