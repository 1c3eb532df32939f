"""Replayed launches are those that Triton would make: the same kernels, grids, flags and arguments."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial, wraps
from itertools import count
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from blackwell_kernels import env  # noqa: E402
from blackwell_kernels.common import arch, launch, tables  # noqa: E402
from blackwell_kernels.common.testing.launches import DEVICES, Address, Launched, copies, f32, normal  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="launches nothing where Triton interprets")
BF16, F32 = torch.bfloat16, torch.float32
call_launcher = CudaLauncher.__call__


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, stride, factor, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr) * factor)


@triton.jit
def late_kernel(x_ptr, y_ptr, n):
    tl.store(y_ptr, tl.load(x_ptr))


def test_a_pointer_is_known_by_its_type() -> None:
    """A Python that is no position-independent executable, a distribution's, has its heap below 4 GiB."""
    seen = [("kernel", {"x_ptr": Address(1 << 20), "n": 1 << 46, "y_ptr": Address(0)})]
    assert normal(seen, []) == [("kernel", {"x_ptr": ("workspace", 0, 0), "n": 1 << 46, "y_ptr": 0})]


@launch.replayed
def plain_op(x: torch.Tensor, y: torch.Tensor | None, n: int = 3, factor: float = 1.0) -> None:
    copy_kernel[(n, 2)](x, y, n, x.stride(0), factor, BLOCK=16, num_warps=2)


def test_a_known_layout_is_launched_without_triton(launched: Launched) -> None:
    (seen,) = copies(plain_op, lambda: ((f32(4, 8), f32(4)), {"n": 5}), launched)
    name, head, meta, inputs = seen
    assert (name, head[:4], meta) == ("copy_kernel", (5, 2, 1, 77), (2, 1, 0))
    assert inputs == {"x_ptr": ("argument", 0), "y_ptr": ("argument", 1), "n": 5, "stride": 8, "factor": 1.0}


def misaligned(*shape: int) -> torch.Tensor:
    return f32(shape[0] + 1, *shape[1:]).flatten()[1 : 1 + torch.Size(shape).numel()].view(shape)


def _cut(x: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:4], x.view(-1)[offset : offset + 4]


OTHERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "as it is": lambda: (f32(4, 8), f32(4)),
    "misaligned": lambda: (misaligned(4, 8), f32(4)),
    "other misaligned": lambda: (f32(4, 8), misaligned(4)),
    "dtype": lambda: (f32(4, 8).bfloat16(), f32(4)),
    "none": lambda: (f32(4, 8), None),
    "stride of 16": lambda: (f32(4, 16), f32(4)),
    "stride of 1": lambda: (f32(4, 1), f32(4)),
    "strides": lambda: (f32(4, 9)[:, :8], f32(4)),
    "one": lambda: (f32(4, 8), f32(4), 1),
    "sixteen": lambda: (f32(4, 8), f32(4), 16),
    "a bool": lambda: (f32(4, 8), f32(4), True),
    "a whole factor": lambda: (f32(4, 8), f32(4), 3, 1),
    "another factor": lambda: (f32(4, 8), f32(4), 3, 0.0),
    "minus zero": lambda: (f32(4, 8), f32(4), 3, -0.0),
    # their layouts are "as it is"'s too
    "one storage": lambda: _cut(f32(5, 8), 32),
    "one start": lambda: _cut(f32(5, 8), 0),
    "no elements": lambda: (f32(0, 8), f32(4)),
}


@pytest.mark.parametrize("last", OTHERS)
def test_every_specialisation_is_its_own(launched: Launched, last: str) -> None:
    """Whatever was launched before, the kernel is the one that Triton chooses."""
    alone = {}
    for name in OTHERS:
        launch.forget()
        alone[name] = copies(plain_op, lambda name=name: (OTHERS[name](), {}), launched)
    launch.forget()
    for name in OTHERS:
        for one in (name, last, name):
            assert copies(plain_op, lambda one=one: (OTHERS[one](), {}), launched) == alone[one]
    assert len({seen[0][1][4] for seen in alone.values()}) == 11  # kernels


def allocating(torch_op: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
    """An operator that makes views and workspaces, and does `torch_op` to its first argument."""

    @launch.replayed
    def op(x: torch.Tensor, y: torch.Tensor) -> None:
        torch_op(x)
        small, large = torch.empty(3, 5, dtype=BF16), torch.empty(1 << 19, dtype=F32)
        copy_kernel[(1,)](x[1:], small, 8, x.t().stride(0), 1.0, BLOCK=16)
        copy_kernel[(1,)](small[1:].view(-1), large, 8, 16, 1.0, BLOCK=16)
        copy_kernel[(1,)](large[16:], y[2:][1:], 8, 16, 1.0, BLOCK=16)

    return op


def test_views_and_workspaces(launched: Launched) -> None:
    seen = copies(allocating(lambda x: None), lambda: ((f32(4, 8), f32(8)), {}), launched)
    inputs = [one[-1] for one in seen]
    assert inputs[0]["x_ptr"] == ("argument", 0, 32)
    assert inputs[2]["y_ptr"] == ("argument", 1, 12)
    assert inputs[0]["y_ptr"] == ("workspace", 0, 0)
    assert inputs[1]["x_ptr"][0] == "workspace" != inputs[1]["y_ptr"]


@pytest.mark.parametrize("torch_op", [
    lambda x: x.zero_(), lambda x: x.fill_(1), lambda x: x + 1, lambda x: torch.zeros(3), lambda x: x.clone(),
    lambda x: x[0, 0].item(), lambda x: launch.once(), lambda x: torch.empty(1, device="meta"),
])  # fmt: skip
def test_what_torch_computes_is_not_lost(launched: Launched, torch_op: Callable[[torch.Tensor], Any]) -> None:
    copies(allocating(torch_op), lambda: ((f32(4, 8), f32(8)), {}), launched, kept=False)


@pytest.mark.parametrize(("change", "kept"), [
    (lambda x: x.t().contiguous(), False), (lambda x: x.t().reshape(-1), False), (lambda x: x.to(BF16), False),
    (lambda x: x.reshape(-1), True), (lambda x: x.flatten(), True), (lambda x: x.to(F32), True),
    (lambda x: x[1:].to(F32), True), (lambda x: x[1:].expand(2, 3, 8), True),
])  # fmt: skip
def test_views_that_may_be_copies(launched: Launched, change: Callable[[torch.Tensor], Any], kept: bool) -> None:
    """PyTorch calls them views, and in inference mode does not say what they come to."""

    @launch.replayed
    def op(x: torch.Tensor, y: torch.Tensor) -> None:
        copy_kernel[(1,)](change(x), y, 8, 16, 1.0, BLOCK=16)

    with torch.inference_mode():
        copies(op, lambda: ((f32(4, 8), f32(8)), {}), launched, kept=kept)


def test_a_view_of_no_elements_has_no_place(launched: Launched) -> None:
    @launch.replayed
    def op(x: torch.Tensor, y: torch.Tensor) -> None:
        copy_kernel[(1,)](x[:0].as_strided((2,), (1,)), y, 8, 16, 1.0, BLOCK=16)

    copies(op, lambda: ((f32(4, 8), f32(8)), {}), launched, kept=False)


def test_where_pytorch_skips_modes(launched: Launched) -> None:
    @launch.replayed
    def op(x: torch.Tensor, y: torch.Tensor) -> None:
        copy_kernel[(1,)](x.zero_(), y, 8, 16, 1.0, BLOCK=16)

    with torch._C._DisableTorchDispatch():
        copies(op, lambda: ((f32(4, 8), f32(8)), {}), launched, kept=False)


def test_what_is_only_compiled_is_not_launched(launched: Launched) -> None:
    @launch.replayed
    def op(x: torch.Tensor, y: torch.Tensor) -> None:
        copy_kernel.warmup(y, x, 8, 16, 1.0, BLOCK=16, grid=(1,))
        copy_kernel[(1,)](x, y, 8, 16, 1.0, BLOCK=16)

    (seen,) = copies(op, lambda: ((f32(4, 8), f32(8)), {}), launched)
    assert seen[-1]["x_ptr"] == ("argument", 0)


def test_a_recording_holds_nothing(launched: Launched) -> None:
    """Neither its input nor its workspaces, not even until the next garbage collection."""
    held: list[weakref.ref[torch.Tensor]] = []

    @launch.replayed
    def op(x: torch.Tensor) -> None:
        large = torch.empty(1 << 19, dtype=F32)
        held.extend((weakref.ref(x), weakref.ref(large)))
        copy_kernel[(1,)](x, large[16:], 8, 16, 1.0, BLOCK=16)

    gc.disable()
    try:
        for _ in range(3):
            op(f32(4))
    finally:
        gc.enable()
    assert [x() for x in held] == [None] * 4  # the third call was a replay


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_scratch_memory(launched: Launched, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """3.6's C launcher is given it, 3.7's allocates it."""
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", None, raising=False)
    sizes: list[int] = []
    triton.set_allocator(lambda size, align, stream: sizes.append(size))
    try:
        for launched.scratch, launched.device in ((0, next(DEVICES)), (48, next(DEVICES))):
            kept = launched.scratch == 0 or version == "3.7.1"
            copies(plain_op, lambda: ((f32(4, 8), f32(4)), {"n": 5}), launched, kept=kept)
    finally:
        triton.set_allocator(None)
    assert sizes == [5 * 2 * 48] * 4


def test_passes_that_somebody_inspects(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(lambda: ((f32(4, 8), f32(4)), {}))
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    for hook, kept in ((None, True), (lambda: ("key", "hash"), False), (None, True)):
        monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", hook, raising=False)
        copies(plain_op, make, launched, kept=kept)


def test_what_changes_during_a_recording_is_looked_at_again(launched: Launched) -> None:
    sizes, calls = [1], count(1)

    @launch.replayed
    def op(x: torch.Tensor) -> None:
        copy_kernel[(sizes[0],)](x, None, 1, 1, 1.0, BLOCK=16)
        if next(calls) == 2:  # as another thread might
            sizes[0] = 2
            launch.forget()

    seen = []
    for _ in range(5):
        op(f32(4))
        seen.append(launched.take()[0][1][0])
    assert seen == [1, 1, 2, 2, 2]


def test_what_is_forgotten_and_met_anew_is_not_of_before(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, record = [1], launch._Triton.record

    @launch.replayed
    def op(x: torch.Tensor) -> None:
        copy_kernel[(sizes[0],)](x, None, 1, 1, 1.0, BLOCK=16)

    def late(*args: Any) -> Any:
        found = record(*args)
        if sizes == [1]:  # as another thread might, before the first one can say what it has found
            sizes[0] = 2
            launch.forget()
            op(f32(4))
        return found

    monkeypatch.setattr(launch._Triton, "record", late)
    for _ in range(5):
        op(f32(4))
    assert [head[0] for _, head, *_ in launched.take()] == [1, 1, 2, 2, 2, 2]


def test_a_patch_during_a_recording_stays(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JITFunction, "run", JITFunction.run)  # restored in the end
    called, patches = [], []

    def patch(x: torch.Tensor) -> None:
        before = JITFunction.run
        if not patches and before.__qualname__.startswith("_Triton.record"):
            patches.append(lambda *args, **kwargs: (called.append(1), before(*args, **kwargs))[1])
            JITFunction.run = patches[0]

    op = allocating(patch)
    for _ in range(2):
        op(f32(4, 8), f32(8))
    assert JITFunction.run is patches[0]
    assert len(called) == 3
    launched.take()
    copies(op, lambda: ((f32(4, 8), f32(8)), {}), launched, kept=False)


def test_tensors_from_elsewhere(launched: Launched) -> None:
    other = f32(4)
    for states, kept in ((lambda x: None, False), (launch.lasting, True)):

        @launch.replayed
        def op(x: torch.Tensor, states: Callable[[torch.Tensor], None] = states) -> None:
            states(other)
            copy_kernel[(1,)](x, other, 8, 16, 1.0, BLOCK=16)

        for _ in range(4):
            before = launched.long
            op(f32(8))
            assert launched.take()[0][-1]["y_ptr"] == other.data_ptr()
        assert (launched.long > before) is not kept


def test_one_tensor_twice_is_two_arguments_the_next_time(launched: Launched) -> None:
    def twice() -> tuple[Any, Any]:
        x = f32(4, 8)
        return (x, x), {}

    copies(plain_op, twice, launched, kept=False)
    for _ in range(3):
        x, y = f32(4, 8), f32(4, 8)
        plain_op(x, y)
        assert launched.take()[0][-1]["y_ptr"] == y.data_ptr()


def test_an_operator_inside_another_is_part_of_it(launched: Launched) -> None:
    @launch.replayed
    def both(x: torch.Tensor, y: torch.Tensor) -> None:
        plain_op(x, y)
        plain_op(y, x)

    assert len(copies(both, lambda: ((f32(4, 8), f32(4, 8)), {}), launched)) == 2


def test_hooks_see_every_launch(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(lambda: ((f32(4, 8), f32(4)), {}))
    copies(plain_op, make, launched)
    runtime, called = triton.knobs.runtime, []
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(called.append)
        try:
            copies(plain_op, make, launched, kept=False)
        finally:
            chain.remove(called.append)
    with monkeypatch.context() as patch:
        patch.setattr(copy_kernel, "pre_run_hooks", [])
        launch.forget()
        copies(plain_op, make, launched)
        copy_kernel.add_pre_run_hook(lambda *args, **kwargs: called.append("before"))
        copies(plain_op, make, launched, kept=False)
    assert called == ["before"] * 4
    launch.forget()
    copies(plain_op, make, launched)
    run, other = JITFunction.run, type(runtime)()
    other.launch_enter_hook = type(runtime.launch_enter_hook)()
    other.launch_enter_hook.add(called.append)
    for owner, name, seeing in (
        (JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs)),
        (CudaLauncher, "__call__", lambda *args: call_launcher(*args)),
        (runtime, "launch_enter_hook", called.append),
        (triton.knobs, "runtime", other),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, seeing)
            copies(plain_op, make, launched, kept=False)
        copies(plain_op, make, launched)


def test_settings_and_devices_are_kept_apart(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(lambda: ((f32(4, 8), f32(4)), {}))
    ((_, first, *_),) = copies(plain_op, make, launched)
    functions = {first[4]}
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "debug", True)
        ((_, debug, *_),) = copies(plain_op, make, launched)
    launched.device = next(DEVICES)
    ((_, elsewhere, *_),) = copies(plain_op, make, launched)
    assert len(functions | {debug[4], elsewhere[4]}) == 3
    assert copies(plain_op, make, launched)[0][1] == elsewhere


@pytest.mark.parametrize("change", ["turned off", "interpreter", "sanitizer", "0"])
def test_nothing_is_kept_where_it_is_not_wanted(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "turned off":
        monkeypatch.setenv(env.REPLAY.name, "0")
    elif change == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        # PyTorch takes any value for a yes
        monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", change.replace("sanitizer", "1"))
    copies(plain_op, lambda: ((f32(4, 8), f32(4)), {}), launched, kept=False)


@pytest.mark.parametrize(("owner", "name", "value"), [
    (triton, "__version__", "3.60.0"), (triton, "__version__", "3.6.0+of.others"), (triton, "__version__", "3.9.0"),
    (triton, "__version__", None), (triton.backends.nvidia.driver, "CudaLauncher", None),
    (torch._C, "_dispatch_tls_is_dispatch_key_excluded", None),
    (CudaLauncher, "__call__", wraps(CudaLauncher.__call__)(lambda *args: call_launcher(*args))),
])  # fmt: skip
def test_what_is_not_known_launches_itself(
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    value: Any,
) -> None:
    """Versions, builds that lack something, patched ones: nothing fails, and the log says why, once."""
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    with caplog.at_level("INFO", launch.logger.name):
        copies(plain_op, lambda: ((f32(4, 8), f32(4)), {}), launched, kept=False)
    assert [message.count("launches every kernel itself") for message in caplog.messages] == [1]


def test_what_cannot_be_noted_is_not_kept(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise AttributeError("of another make")

    for owner, name in ((launch._Recording, "_slot"), (launch, "_start")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            copies(allocating(lambda x: None), lambda: ((f32(4, 8), f32(8)), {}), launched, kept=False)


def test_launchers_of_other_drivers(launched: Launched) -> None:
    launched.launcher = type("HIPLauncher", (CudaLauncher,), {})
    copies(plain_op, lambda: ((f32(4, 8), f32(4)), {}), launched, kept=False)


def test_the_chip_and_the_tables_may_change(launched: Launched) -> None:
    @launch.replayed
    def op(x: torch.Tensor) -> None:
        copy_kernel[(arch.current_arch().sms,)](x, None, 1, 1, 1.0, BLOCK=16)

    for gpu in ("h200", "b200"):
        with arch.pretend(gpu):
            ((_, head, *_),) = copies(op, lambda: ((f32(4),), {}), launched)
            assert head[0] == arch.ARCHS[gpu].sms
    for tile in (16, 64):
        with arch.pretend("h200"), tables.override("moe", {"block_t": tile}):
            long = launched.long
            op(f32(4))
            assert launched.long > long


def test_a_table_is_forgotten_once_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another thread keeps what the table said in its last moment."""
    seen: list[bool] = []
    monkeypatch.setattr(launch, "forget", lambda: seen.append("moe" in tables._overrides))
    with tables.override("moe", {"block_t": 16}):
        pass
    assert seen == [True, False]


def test_what_raises_raises_again_and_layouts_are_bounded(launched: Launched) -> None:
    @launch.replayed
    def op(x: torch.Tensor, fails: bool) -> None:
        copy_kernel[(1,)](x, None, 1, 1, 1.0, BLOCK=16)
        if fails:
            raise ValueError("as it does")

    for _ in range(4):
        with pytest.raises(ValueError, match="as it does"):
            op(f32(4), True)
    launched.take()
    copies(op, lambda: ((f32(4), False), {}), launched)
    for n in range(2 * launch._MOST_LAYOUTS):
        op(f32(n), False)
    assert all(len(known) <= launch._MOST_LAYOUTS for known in launch._kept)


def test_types_are_bounded(launched: Launched) -> None:
    op, kinds = launch.replayed(lambda x: None), []
    for _ in range(2 * launch._MOST_LAYOUTS):
        kinds.append(weakref.ref(kind := type("Tensor", (torch.Tensor,), {})))
        op(f32(4).as_subclass(kind))
    del kind
    gc.collect()
    assert sum(kind() is not None for kind in kinds) <= launch._MOST_LAYOUTS


def test_threads_do_not_record_each_other(launched: Launched) -> None:
    """What another thread launches while an operator is recorded does not belong to it."""
    seen: list[int] = []

    def other() -> None:
        plain_op(f32(4, 8), f32(4))
        late_kernel[(1,)](f32(4), f32(4), 3)
        seen.append(1)

    @launch.replayed
    def op(x: torch.Tensor) -> None:
        copy_kernel[(1,)](x, None, 1, 1, 1.0, BLOCK=16)
        if not seen or len(seen) < 2:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    for _ in range(3):
        op(f32(4))
    launched.take()
    op(f32(4))
    assert [name for name, *_ in launched.take()] == ["copy_kernel"]


@pytest.mark.parametrize("named", [lambda patch: patch, wraps(JITFunction.run)])
def test_a_patch_that_was_there_first_sees_every_launch(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, named: Callable[..., Any]
) -> None:
    run, make = JITFunction.run, partial(lambda: ((f32(4, 8), f32(4)), {}))
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", named(lambda *args, **kwargs: run(*args, **kwargs)))
        copies(plain_op, make, launched, kept=False)
    copies(plain_op, make, launched)
