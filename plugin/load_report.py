"""Follows each vLLM worker through load and warm-up: activation table, status file, kernels compiled too late.

Every worker class (CPU, GPU, XPU; 0.24 to 0.33) is built through `WorkerBase.__init__` after the plugins were loaded,
and is then told `load_model` and `compile_or_warm_up_model`. Both are wrapped on the instance, so subclasses that
override them are followed as well.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from blackwell_kernels import status
from blackwell_kernels.import_hooks import when_imported

_MARK = "_blackwell_kernels_followed"
logger = logging.getLogger("vllm.blackwell_kernels")


def install() -> None:
    """Follow the workers built in this process from now on."""
    when_imported("vllm.v1.worker.worker_base", _wrap)


def _wrap(worker_base: ModuleType) -> None:
    cls = worker_base.WorkerBase
    stock = cls.__init__
    if hasattr(stock, _MARK):
        return
    lacking = [name for name in ("load_model", "compile_or_warm_up_model") if not hasattr(cls, name)]
    if lacking:
        logger.warning("this vLLM's WorkerBase has no %s: no activation table is shown", " and no ".join(lacking))
        return

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        _follow(self)

    setattr(__init__, _MARK, True)
    cls.__init__ = __init__


def _follow(worker: Any) -> None:
    listener = CompileListener()

    def after_load(ahead: Any) -> None:
        status.set_arch(device_arch())
        status.report_after_load(expected_ops(worker), log=getattr(worker, "rank", 0) == 0)
        status.start_writer()
        listener.install()
        _warm_up(worker, ahead)

    stock = worker.load_model

    @functools.wraps(stock)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        with _compiling_ahead(worker) as ahead:
            result = stock(*args, **kwargs)
            after_load(ahead)
        return result

    worker.load_model = load_model
    worker.compile_or_warm_up_model = _then(worker.compile_or_warm_up_model, listener.end_warmup)


def _compiling_ahead(worker: Any) -> AbstractContextManager[Any]:
    """Our kernels for this worker's model being compiled, if it has some and runs on a GPU; None otherwise."""
    ops = expected_ops(worker)
    if not ops or device_arch() == "cpu":
        return nullcontext()
    try:
        from blackwell_kernels import warmup

        return warmup.ahead_of_load(worker, ops)
    except Exception as error:
        logger.warning("blackwell-kernels: nothing is compiled ahead, kernels will when they are called: %s", error)
        return nullcontext()


def _warm_up(worker: Any, ahead: Any) -> None:
    """Compile our kernels now, if any serves a layer of this worker."""
    in_use = {row["op"] for row in status.snapshot()["layers"] if row["impl"] in ("triton", "mixed")}
    if in_use:
        import torch

        from blackwell_kernels import warmup

        warmup.in_worker(worker, in_use, torch.device("cuda", torch.cuda.current_device()), ahead)


def _then(stock: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        action()
        return result

    return call


def expected_ops(worker: Any) -> frozenset[str]:
    """The hook ops that this worker's model should reach; empty for a model that the plugin does not know."""
    from blackwell_kernels import model_patches

    architectures = getattr(worker.model_config, "architectures", None) or ()
    return model_patches.expected_ops(architectures)


def device_arch() -> str:
    """`sm90` for the current CUDA device, `cpu` without one. Called in a worker, whose device is initialised."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


class CompileListener:
    """Counts our Triton kernels compiled before and after the end of the warm-up.

    It uses `triton.knobs.compilation.listener` (3.6, 3.7), which tells a compilation from a load out of Triton's disk
    cache and, unlike the launch hooks, serialises no argument of other people's kernels.
    """

    def __init__(self) -> None:
        self.warm = False
        self.started = time.monotonic()

    def install(self) -> None:
        """Listen, and pass everything on to whoever listened before."""
        triton = sys.modules.get("triton")
        compilation: Any = getattr(getattr(triton, "knobs", None), "compilation", None)
        if not hasattr(compilation, "listener"):
            return
        before = compilation.listener

        def listener(*args: Any, **kwargs: Any) -> None:
            self.heard(kwargs)
            if before is not None:
                before(*args, **kwargs)

        compilation.listener = listener

    def heard(self, event: dict[str, Any]) -> None:
        """One compilation or cache load, as Triton describes it."""
        function = getattr(event.get("src"), "fn", None)
        module = getattr(function, "__module__", None) or ""
        if module.startswith("blackwell_kernels.") and not event.get("cache_hit"):
            status.compiled(f"{module}.{getattr(function, '__name__', '?')}", after_warmup=self.warm)

    def end_warmup(self) -> None:
        """From here on a request waits for a compilation."""
        if self.warm:
            return
        self.warm = True
        kernels = status.snapshot()["jit_warmup"]
        if kernels:
            logger.info("blackwell-kernels: warm-up compiled %d kernels; Triton's cache keeps them", len(kernels))
        status.write()
