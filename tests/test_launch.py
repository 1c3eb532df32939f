"""Replayed launches are those that Triton would make: the same kernels, grids, flags and arguments.

Compiled Triton without a GPU and without a compiler: every specialisation is a function of its own, whose launches are
noted at the C launcher.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import count, product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from blackwell_kernels import env  # noqa: E402
from blackwell_kernels.common import arch, launch, tables  # noqa: E402
from blackwell_kernels.common.testing import compile as aot  # noqa: E402
from blackwell_kernels.gdn import op as gdn  # noqa: E402
from blackwell_kernels.moe import MoeConfig  # noqa: E402
from blackwell_kernels.moe import op as moe  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="launches nothing where Triton interprets")
BF16, F32, I32, FP8 = torch.bfloat16, torch.float32, torch.int32, torch.float8_e4m3fn


_DEVICES = count(7000)  # no GPU's numbers: Triton keeps compiled kernels by device


class Launched:
    """Launches as the driver would get them; `long`: how many went through Triton's launcher."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.long = 0
        self.device = next(_DEVICES)
        self.functions: dict[Any, int] = {}

    def take(self) -> list[tuple[Any, ...]]:
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    log, numbers = Launched(), count(1000)

    class Kernel(CompiledKernel):
        def __init__(self, function: Any, key: str, options: Any) -> None:
            self.function, self.packed_metadata, self.src = next(numbers), (options.num_warps, 1, 0), None
            names = [p.name for p in function.params if not p.is_constexpr]
            places = [i for i, p in enumerate(function.params) if not p.is_constexpr]
            head = 13

            def take(*arguments: Any) -> None:
                values = [arguments[head + i] for i in places]
                plain = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
                log.seen.append((function.__name__, arguments[:9], arguments[9], dict(zip(names, plain, strict=True))))

            launcher = CudaLauncher.__new__(CudaLauncher)
            for name in ("global_scratch_size", "profile_scratch_size"):
                setattr(launcher, name, 0)
            launcher.global_scratch_align = launcher.profile_scratch_align = launcher.num_ctas = 1
            launcher.launch_cooperative_grid, launcher.launch_pdl = False, options.launch_pdl
            launcher.launch, self.launcher = take, launcher

        @property
        def run(self) -> Any:
            return self.launcher

        def launch_metadata(self, *arguments: Any) -> None:
            return None

    def compile_nothing(self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *more: Any):
        return self.device_caches[device][0].setdefault(key, Kernel(self, key, options))

    run, driver = JITFunction.run, aot._driver(90)

    @wraps(run)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        log.long += 1
        return run(self, *args, **kwargs)

    driver.get_current_device = lambda: log.device  # type: ignore[method-assign]
    driver.get_current_stream = lambda device: 77  # type: ignore[method-assign]
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setenv(env.REPLAY.name, "1")
    launch._triton.cache_clear()
    launch.forget()
    yield log
    launch._triton.cache_clear()
    launch.forget()


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, stride, factor, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr) * factor)


@triton.jit
def late_kernel(x_ptr, y_ptr, n):
    tl.store(y_ptr, tl.load(x_ptr))


@launch.replayed
def plain_op(x: torch.Tensor, y: torch.Tensor | None, n: int = 3, factor: float = 1.0) -> None:
    copy_kernel[(n, 2)](x, y, n, x.stride(0), factor, BLOCK=16, num_warps=2)


def copies(op: Callable[..., None], make: Callable[[], Any], launched: Launched, kept: bool = True) -> list[Any]:
    """What four calls with new tensors launch: alike, the last two without Triton's launcher if `kept`."""
    seen = []
    for i in range(4):
        long, (args, kwargs) = launched.long, make()
        op(*args, **kwargs)
        found = launched.take()
        seen.append(normal(found, [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]))
        if i > 1 or not kept:
            assert launched.long - long == (0 if kept else len(found))
    assert seen[0]
    assert seen == seen[:1] * 4
    return seen[0]


def normal(found: list[Any], tensors: list[torch.Tensor]) -> list[Any]:
    """Launches with addresses as places: argument and offset, or workspace in order of appearance and offset."""
    spaces: list[int] = []

    def place(value: Any) -> Any:
        if type(value) is not int or value < 1 << 32:
            return value
        for i, x in enumerate(tensors):
            if x.data_ptr() == value:
                return "argument", i
        for i, x in enumerate(tensors):
            storage = x.untyped_storage()
            if storage.data_ptr() <= value < storage.data_ptr() + storage.nbytes():
                return "argument", i, value - x.data_ptr()
        if value not in spaces:
            spaces.append(value)
        return "workspace", spaces.index(value), value % 16

    return [(*head, {name: place(x) for name, x in inputs.items()}) for *head, inputs in found]


def f32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=F32)


def test_a_known_layout_is_launched_without_triton(launched: Launched) -> None:
    (seen,) = copies(plain_op, lambda: ((f32(4, 8), f32(4)), {"n": 5}), launched)
    name, head, meta, inputs = seen
    assert (name, head[:4], meta) == ("copy_kernel", (5, 2, 1, 77), (2, 1, 0))
    assert inputs == {"x_ptr": ("argument", 0), "y_ptr": ("argument", 1), "n": 5, "stride": 8, "factor": 1.0}


def misaligned(*shape: int) -> torch.Tensor:
    return f32(shape[0] + 1, *shape[1:]).flatten()[1 : 1 + torch.Size(shape).numel()].view(shape)


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
    run = JITFunction.run
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs))
        copies(plain_op, make, launched, kept=False)
    copies(plain_op, make, launched)


def test_settings_and_devices_are_kept_apart(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(lambda: ((f32(4, 8), f32(4)), {}))
    ((_, first, *_),) = copies(plain_op, make, launched)
    functions = {first[4]}
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "debug", True)
        ((_, debug, *_),) = copies(plain_op, make, launched)
    launched.device = next(_DEVICES)
    ((_, elsewhere, *_),) = copies(plain_op, make, launched)
    assert len(functions | {debug[4], elsewhere[4]}) == 3
    assert copies(plain_op, make, launched)[0][1] == elsewhere


@pytest.mark.parametrize("change", ["nobody asked", "version", "interpreter", "sanitizer"])
def test_nothing_is_kept_of_what_is_not_known(launched: Launched, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    if change == "nobody asked":
        monkeypatch.delenv(env.REPLAY.name)
    elif change == "version":
        monkeypatch.setattr(triton, "__version__", "3.60.0")
    elif change == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
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
        with tables.override("moe", {"block_t": tile}):
            long = launched.long
            op(f32(4))
            assert launched.long > long


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


# --- every operator -----------------------------------------------------------------------------------------------


def fp8(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=FP8)


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=I32)


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16)


def experts(tokens: int, *, quantised: bool, mapped: bool, config: MoeConfig | None = None) -> Any:
    hidden, inter, topk = 256, 128, 2
    x = (fp8(tokens, hidden), f32(tokens, 2)) if quantised else (bf16(tokens, hidden), None)
    weights = (fp8(4, 2 * inter, hidden), f32(4, 2, 2), fp8(4, hidden, inter), f32(4, 2, 1))
    args = (*x, *weights, f32(tokens, topk), ints(tokens, topk), ints(8) if mapped else None, bf16(tokens, hidden))
    return args, {"apply_router_weight_on_input": mapped, "config": config}


def decode(tokens: int, *, conv: bool, steps: int, state: torch.dtype) -> Any:
    H, HV, K = 2, 4, 128
    channels, gates = 2 * H * K + HV * K, bf16(tokens, 2 * HV)
    sequences = tokens // max(1, steps)
    kwargs: dict[str, Any] = {"scale": K**-0.5}
    if conv:
        kwargs |= {"conv_state": bf16(9, 7, channels)[:, : 3 + steps], "conv_weight": bf16(channels, 4)}
    if steps:
        kwargs |= {"cu_seqlens": ints(sequences + 1), "num_accepted_tokens": ints(sequences)}
    slots = ints(sequences, steps) if steps else ints(sequences)
    states = torch.empty(9, HV, K, K, dtype=state)
    args = (bf16(tokens, channels), gates[:, :HV], gates[:, HV:], f32(HV), bf16(HV), states, slots, bf16(tokens, HV, K))
    return args, kwargs


def prefill(tokens: int, sequences: int, *, norm: bool, state: torch.dtype) -> Any:
    H, HV, K = 2, 4, 128
    args = (
        bf16(tokens, H, K), bf16(tokens, H, K), bf16(tokens, HV, K), f32(tokens, HV), f32(tokens, HV),
        torch.empty(9, HV, K, K, dtype=state), ints(sequences), torch.empty(sequences, dtype=torch.bool),
        ints(sequences + 1), bf16(tokens, HV, K),
    )  # fmt: skip
    return args, {"scale": K**-0.5, "use_qk_l2norm": norm}


def prepare(tokens: int, sequences: int, *, conv: bool) -> Any:
    H, HV, K = 2, 4, 128
    channels, gates = 2 * H * K + HV * K, bf16(tokens, 2 * HV)
    args = (
        bf16(tokens, channels), gates[:, :HV], gates[:, HV:], f32(HV), bf16(HV), bf16(tokens, H, K),
        bf16(tokens, H, K), bf16(tokens, HV, K), f32(tokens, HV), f32(tokens, HV),
    )  # fmt: skip
    history = {
        "conv_state": bf16(9, 4, channels)[:, :3], "conv_weight": bf16(channels, 4), "state_indices": ints(sequences),
        "has_initial_state": torch.empty(sequences, dtype=torch.bool), "cu_seqlens": ints(sequences + 1),
    }  # fmt: skip
    return args, history if conv else {}


def convolution(tokens: int) -> Any:
    _, kwargs = prepare(tokens, 2, conv=True)
    order = ("conv_weight", "conv_bias", "conv_state", "state_indices", "has_initial_state", "cu_seqlens")
    return (bf16(tokens, 1024), *map(kwargs.get, order), bf16(tokens, 1024)), {}


OPERATORS: dict[str, tuple[Callable[..., None], Callable[[], Any], int]] = {
    "softmax top-k": (moe.moe_softmax_topk_triton, lambda: ((bf16(5, 64), True, f32(5, 8), ints(5, 8)), {}), 1),
    "grouped top-k": (
        moe.moe_grouped_topk_triton,
        lambda: ((f32(5, 64), f32(64), 8, 4, True, 2.5, f32(5, 8), ints(5, 8)), {}),
        1,
    ),
    "decode, steps": (gdn.gdn_decode_triton, partial(decode, 8, conv=True, steps=4, state=BF16), 1),
    "prepare": (gdn.gdn_prepare_triton, partial(prepare, 100, 3, conv=False), 1),
    "prepare, convolution": (gdn.gdn_prepare_triton, partial(prepare, 100, 3, conv=True), 1),
    "prefill, normalised": (gdn.gdn_prefill_triton, partial(prefill, 200, 2, norm=True, state=BF16), 4),
    "prefill, few": (gdn.gdn_prefill_triton, partial(prefill, 300, 3, norm=False, state=F32), 2),
    "prefill, pieces": (gdn.gdn_prefill_triton, partial(prefill, 8192, 1, norm=False, state=BF16), 4),
}
for dtype, conv in product((BF16, F32), (False, True)):
    make = partial(decode, 6, conv=conv, steps=0, state=dtype)
    OPERATORS[f"decode {dtype} {conv}"] = (gdn.gdn_decode_triton, make, 1)
for tokens, launches in ((1, 2), (64, 4), (4096, 6)):
    for quantised, mapped in product((False, True), repeat=2):
        make = partial(experts, tokens, quantised=quantised, mapped=mapped)
        number = launches + (tokens == 4096 and not quantised)
        OPERATORS[f"experts {tokens} {quantised} {mapped}"] = (moe.moe_fp8_block_scale_triton, make, number)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("gpu", ["h200", "b200"])
def test_operators_launch_again_what_they_launched(launched: Launched, gpu: str, name: str) -> None:
    op, make, launches = OPERATORS[name]
    with arch.pretend(gpu):
        assert len(copies(op, make, launched)) == launches


def test_the_separate_convolution_looks_at_addresses_in_every_call(launched: Launched) -> None:
    with arch.pretend("h200"):
        copies(gdn.gdn_causal_conv_triton, partial(convolution, 100), launched, kept=False)


def test_the_wrapped_operator_is_what_torch_calls(launched: Launched) -> None:
    """`__wrapped__` is the operator as it is written."""
    assert gdn.gdn_decode_triton.__wrapped__.__name__ == "gdn_decode_triton"  # type: ignore[attr-defined]


def test_a_patch_that_was_there_first_sees_every_launch(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    run, make = JITFunction.run, partial(lambda: ((f32(4, 8), f32(4)), {}))
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs))
        copies(plain_op, make, launched, kept=False)
    copies(plain_op, make, launched)
