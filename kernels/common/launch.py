"""Launch an operator's kernels again without asking anew what their first launch has answered.

Why: an operator checks its input, selects a configuration, allocates, and has Triton bind, specialise and look up each
kernel: more host time than its kernels run, in every layer of a step that no CUDA graph holds.
How: `@replayed` runs an operator as it is written for the first two inputs of a layout and keeps what the second one
launched: C launchers, constants, and which pointer goes where. Further inputs of that layout (the other layers of a
step) go to those launchers directly. A layout is all that an operator and Triton's specialisation look at: shape,
strides, dtype, device and address modulo 16 of every tensor, every other argument with its type, driver and device,
Triton's debug settings. Who changes what else operators look at (tables, the chip) calls `forget`; what another
process writes into a table is seen by new layouts only.

A call is kept only if all it did was to make views, to allocate by `torch.empty`, and to launch Triton kernels with
pointers into its arguments, what it allocated, or what it declared `lasting`. An operator must not keep what it
allocates so for later calls. Nothing is kept, and all launches go the long way, where BLACKWELL_KERNELS_REPLAY=0 says
so, with a Triton whose launcher is not known here, one that interprets, was patched or has hooks (profilers), on other
GPUs than NVIDIA's, and under a sanitizer. What is not understood is not kept; it never fails an operator.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import cache, partial, wraps
from operator import itemgetter
from typing import Any, Literal, NamedTuple, ParamSpec

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blackwell_kernels import env

# of Triton, as released: their launchers take what `_Recording.add` notes
VERSIONS = ("3.6.0", "3.7.0", "3.7.1")
logger = logging.getLogger("vllm.blackwell_kernels")
_MOST_LAYOUTS = 256  # an operator's
_SMALL = 1 << 20  # bytes up to which allocations become one: larger ones find what the first call left free
_ALIGNED = 512  # bytes, as PyTorch's allocator does
_STREAM = object()
_Inputs = ParamSpec("_Inputs")

_kept: list[dict[Any, _Layout]] = []
_one_at_a_time = threading.Lock()  # records: Triton is patched meanwhile


class _Thread(threading.local):
    recording: _Recording | None = None


_thread = _Thread()


class _Layout:
    """launches: what a call of it launches. None: it was met, and is not known to be worth the time that recording
    takes; False: it is not to be kept. Who is forgotten while it is recorded is found by nobody any more."""

    launches: _Launches | Literal[False] | None = None


def forget() -> None:
    """Have operators run as they are written again: what they look at besides their arguments has changed."""
    for known in _kept:
        known.clear()


def lasting(x: torch.Tensor) -> None:
    """State that `x`, no argument, stays where it is for as long as the process: it is launched with again."""
    if _thread.recording is not None:
        _thread.recording.lasting.append(x)


def once() -> None:
    """State that the next call of this layout may launch otherwise."""
    if _thread.recording is not None:
        _thread.recording.clear = False


def replayed(op: Callable[_Inputs, None]) -> Callable[_Inputs, None]:
    """An operator that launches for a known layout what it launched before. What raises is not kept."""
    known: dict[Any, _Layout] = {}
    takes: dict[tuple[type, ...], tuple[list[int], list[int]]] = {}  # by types: which are tensors, which are scalars
    _kept.append(known)

    @wraps(op)
    def run(*args: _Inputs.args, **kwargs: _Inputs.kwargs) -> None:
        triton = _triton()
        # an operator inside another one is part of it
        if triton is None or _thread.recording is not None or triton.changed():
            return op(*args, **kwargs)
        driver = triton.config.active
        device = driver.get_current_device()
        values: tuple[Any, ...] = (*args, *kwargs.values()) if kwargs else args
        kinds = tuple(map(type, values))
        take = takes.get(kinds)
        if take is None:
            take = takes[kinds] = (
                [i for i, x in enumerate(values) if isinstance(x, torch.Tensor)],
                [i for i, x in enumerate(values) if x is not None and not isinstance(x, torch.Tensor)],
            )
        tensors = [values[i] for i in take[0]]
        pointers = [x.data_ptr() for x in tensors]
        key = (
            driver, device, triton.knobs.runtime.debug, triton.knobs.compilation.instrumentation_mode, kinds, *kwargs,
            *[(x.shape, x.stride(), x.dtype, x.device) for x in tensors],
            *[pointer & 15 for pointer in pointers],
            *[values[i] or repr(values[i]) for i in take[1]],  # 0.0 is not -0.0
        )  # fmt: skip
        layout = known.get(key)
        if layout is None:
            if len(known) >= _MOST_LAYOUTS:
                known.clear()
                takes.clear()
            known[key] = _Layout()
        elif layout.launches:
            if layout.launches.run(pointers, driver.get_current_stream(device)):
                return None
        elif layout.launches is None and _one_at_a_time.acquire(blocking=False):
            try:
                layout.launches = triton.record(op, args, kwargs, device) or False
            finally:
                _one_at_a_time.release()
            return None
        return op(*args, **kwargs)

    return run


@cache
def _triton() -> _Triton | None:
    """Triton as it was imported; None where replays are turned off, it is not there, is not known, interprets, or a
    sanitizer watches, which is to see each allocation's bounds."""
    # PyTorch asks whether it is there, not what it says
    if not env.REPLAY.get() or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return None
    try:
        import triton

        what = f"Triton {triton.__version__}"
        if triton.__version__ in VERSIONS:
            return None if triton.knobs.runtime.interpret else _Triton()
    except Exception as error:  # a build that lacks something
        what = f"this Triton ({type(error).__name__}: {error})"
    logger.info("%s launches every kernel itself: replays know %s, as released", what, ", ".join(VERSIONS))
    return None


class _Triton:
    """What a launch goes through."""

    def __init__(self) -> None:
        import triton
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        self.adds_scratch = not triton.__version__.startswith("3.6.")
        self.knobs, self.config = triton.knobs, driver
        self.JITFunction, self.CompiledKernel, self.CudaLauncher = JITFunction, CompiledKernel, CudaLauncher
        self.skips = partial(torch._C._dispatch_tls_is_dispatch_key_excluded, torch._C.DispatchKey.Python)
        self.as_imported: Any = None
        self.call = CudaLauncher.__call__
        if not _is_imported(self.call, "triton.backends.nvidia.driver", "CudaLauncher.__call__"):
            raise TypeError("its launcher is patched")

    def changed(self) -> bool:
        """Whether somebody wants to see launches."""
        runtime = self.knobs.runtime
        try:
            hooks = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
            if self.adds_scratch:  # 3.7: asked in every launch which passes are to compile it
                hooks = hooks or runtime.add_stages_inspection_hook is not None
        except AttributeError:  # no chains: somebody put something else there
            return True
        run = self.JITFunction.run
        if self.as_imported is None and _is_imported(run, "triton.runtime.jit", "JITFunction.run"):
            self.as_imported = run
        return run is not self.as_imported or self.CudaLauncher.__call__ is not self.call or bool(hooks)

    def record(
        self, op: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any], device: int
    ) -> _Launches | None:
        """Run an operator; what it launched, if that may be launched again."""
        recording = _Recording(self, [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)], device)
        as_imported = self.as_imported

        def run(kernel: Any, *inputs: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = as_imported(kernel, *inputs, grid=grid, warmup=warmup, **options)
            if _thread.recording is not None and not warmup:
                _thread.recording.add(kernel, compiled, grid, inputs, options)
            return compiled

        self.JITFunction.run, _thread.recording = run, recording
        try:
            with recording:
                op(*args, **kwargs)
        finally:
            _thread.recording = None
            if self.JITFunction.run is run:  # else somebody patched it meanwhile, and calls this one
                self.JITFunction.run = as_imported
        return _Launches(recording) if recording.clear else None


def _is_imported(function: Any, module: str, name: str) -> bool:
    """Whether nobody has put something else in a function's place; a wrapper bears the same names."""
    return not hasattr(function, "__wrapped__") and (function.__module__, function.__qualname__) == (module, name)


def _or_not_kept(note: Callable[..., None]) -> Callable[..., None]:
    """What cannot be noted is not kept, and is no error of the operator that did it."""

    @wraps(note)
    def noted(recording: _Recording, *args: Any) -> None:
        try:
            note(recording, *args)
        except Exception:
            recording.clear = False

    return noted


class _Made(NamedTuple):
    """A pointer that no argument starts at: `offset` bytes behind that of a slot, or behind the start of what all small
    allocations share (None); where size is given, the start of an allocation of so many bytes."""

    slot: int | None
    offset: int
    size: int


class _Recording(TorchDispatchMode):
    """What an operator does while it runs as it is written. clear: whether a replay would do the same.

    A launch's arguments are slots of one list: the stream, starts of the operator's tensors, constants, and backwards
    from the end other pointers (`made`): starts of what it allocated, and places behind those of other slots.
    """

    def __init__(self, triton: _Triton, tensors: list[torch.Tensor], device: int) -> None:
        super().__init__()
        self.triton, self.tensors = triton, tensors
        # by identity: of one tensor that is two arguments nobody can say which of them a kernel was given
        self.slots = {id(x): slot for slot, x in enumerate(tensors, 1)}
        self.clear = len(self.slots) == len(tensors) and all(x.device.index in (None, device) for x in tensors)
        # where PyTorch skips modes nobody could say what the operator has it do
        self.clear = self.clear and not triton.skips()
        self.constants: list[Any] = []
        self.made: list[torch.Tensor | _Made] = []
        self.views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lasting: list[torch.Tensor] = []
        self.launches: list[tuple[Callable[..., None], itemgetter]] = []
        self.hooks: list[list[Any]] = []
        self.kernels: list[Any] = []  # loaded as long as they are kept

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's question whether to guard this mode against torch.compile, which traces no operator's inside: that
        would import it, and cost more than all else here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(func, args, result)
        return result

    @_or_not_kept
    def see(self, func: Any, args: Any, result: Any) -> None:
        """Note what PyTorch has made."""
        if func is torch.ops.aten.empty.memory_format:
            self.made.append(result)
            self.slots[id(result)] = -len(self.made)
            self.clear = self.clear and result.device == self.tensors[0].device and result.data_ptr() % 16 == 0
        elif getattr(func, "is_view", False) and isinstance(result, torch.Tensor):
            # in inference mode `contiguous`, `reshape` and `to` come here whole: views, their argument, or copies
            if result is not args[0]:
                self.views[id(result)] = result, args[0]
                self.clear = self.clear and _start(result) == _start(args[0])
        else:
            self.clear = False

    @_or_not_kept
    def add(self, kernel: Any, compiled: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a launch that Triton has made."""
        triton = self.triton
        run: Any = compiled.run if isinstance(compiled, triton.CompiledKernel) else None
        if type(kernel) is not triton.JITFunction or type(run) is not triton.CudaLauncher or callable(grid):
            self.clear = False
            return
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        # what is constant in the kernel has no place in its launch; what is left to a default is not looked up
        none = self._constant(None)
        inputs = [none if p.is_constexpr else self._slot(given.get(p.name, kernel)) for p in kernel.params]
        sizes = (*grid, *(1,) * (3 - len(grid)))
        # no hooks, and nothing to tell them
        what = [compiled.function, compiled.packed_metadata, None, None, None]
        if not triton.adds_scratch:
            self.clear = self.clear and not (run.global_scratch_size or run.profile_scratch_size)
            what[1:1] = [run.launch_cooperative_grid, run.launch_pdl, None, None]
            run = run.launch
        slots = [*map(self._constant, sizes), 0, *map(self._constant, what), *inputs]
        self.launches.append((run, itemgetter(*slots)))
        self.hooks.append(kernel.pre_run_hooks)
        self.kernels.append(compiled)

    def _constant(self, value: Any) -> int:
        self.constants.append(value)
        return len(self.tensors) + len(self.constants)

    def _slot(self, value: Any) -> int:
        """The slot of a kernel's argument."""
        slot = self.slots.get(id(value))
        if slot is not None:
            return slot
        if not isinstance(value, torch.Tensor):
            self.clear = self.clear and (value is None or type(value) in (bool, int, float))
            return self._constant(value)
        if value.data_ptr() == 0 or any(value is x for x in self.lasting):
            return self._constant(value.data_ptr())
        base = self.views[id(value)][1] if id(value) in self.views else None
        if base is None or base.data_ptr() == 0:  # of no elements: it does not say where it starts
            self.clear = False
            return 0
        self.made.append(_Made(self._slot(base), value.data_ptr() - base.data_ptr(), 0))
        self.slots[id(value)] = -len(self.made)
        return -len(self.made)


def _start(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Launches:
    """What a call of one layout launches."""

    def __init__(self, recording: _Recording) -> None:
        self.launches, self.constants = recording.launches, recording.constants
        self.hooks, self.lasting, self.kernels = recording.hooks, recording.lasting, recording.kernels
        self.device = recording.tensors[0].device
        # the one allocation of all small ones, in bytes, and how each pointer is made
        self.together = 0
        self.made: list[_Made] = []
        for x in recording.made:
            if isinstance(x, _Made):
                self.made.append(x)
                continue
            size = x.untyped_storage().nbytes()
            self.made.append(_Made(None, self.together, 0) if size <= _SMALL else _Made(None, 0, size))
            if size <= _SMALL:
                self.together += (size // _ALIGNED + 1) * _ALIGNED

    def run(self, pointers: list[int], stream: int) -> bool:
        """Launch; False: nothing was, and the operator is to run as it is written."""
        if any(self.hooks):
            return False
        values: list[Any] = [stream, *pointers, *self.constants]
        held = [self._empty(self.together)] if self.together else []
        start = held[0].data_ptr() if held else 0
        made: list[int] = []
        for slot, offset, size in self.made:
            if size:
                held.append(self._empty(size))
                made.append(held[-1].data_ptr())
            elif slot is None:
                made.append(start + offset)
            else:
                made.append((values[slot] if slot >= 0 else made[-1 - slot]) + offset)
        values += reversed(made)
        for run, take in self.launches:
            run(*take(values))
        return True

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)
