"""What a case launches has the same digits until its kernels, their configuration or its shape change."""

import linecache

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from blackwell_kernels import env
from blackwell_kernels.common import arch, tables
from blackwell_kernels.microbench import launched, results
from blackwell_kernels.microbench.cases import all_cases, select

CASES = {case.name: case for case in select(sets=("model",), definition="gdn_decode_state_bf16")}
ONE = CASES["model/qwen3-next/batch_size=8"]


def digits(case=ONE, gpu="h200"):
    return launched.of(case, gpu)


def test_every_case_of_every_operator_has_launches_to_note():
    seen = {}
    for case in all_cases():
        seen.setdefault(case.definition, case)
    for case in seen.values():
        with launched.noted("h200") as launches:
            launched.precompile.call(case)
        assert launches, case.definition


def test_digits_are_the_same_again_and_others_for_another_size_chip_or_configuration():
    assert digits() == digits()
    assert digits() != digits(CASES["model/qwen3-next/batch_size=16"])
    assert digits() != digits(gpu="b200")
    heuristic = digits()
    with tables.override("gdn_decode", {"num_warps": 8}):
        assert digits() != heuristic
    assert digits() == heuristic


def test_a_gpu_that_is_not_known_stands_for_its_familys_kernels():
    assert digits(gpu="h20") == tables.kernels_of("gdn")


def test_what_raises_is_no_case_that_holds(monkeypatch):
    monkeypatch.setattr(launched.precompile, "call", lambda case: {}[case])
    assert digits() != digits(gpu="h20")
    told = digits()
    monkeypatch.setattr(launched.precompile, "call", lambda case: [][0])
    assert digits() != told


def test_triton_and_the_chip_are_left_as_they_were():
    run, active = JITFunction.run, triton.runtime.driver._active

    def fail():
        with launched.noted("h200"):
            assert JITFunction.run is not run
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (JITFunction.run, triton.runtime.driver._active) == (run, active)
    assert arch.current_gpu("cpu") is None


SOURCE = """
import triton, triton.language as tl
SCALE = tl.constexpr(2)
HIDDEN = 3

@triton.constexpr_function
def factor(x):
    return x * HIDDEN

@triton.jit
def inner(x):
    return x * SCALE  # doubles

@triton.jit
def kernel(p, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p + o, inner(tl.load(p + o)) * factor(2))
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x * SCALE  # doubles", "x * SCALE + 1", False),
        ("constexpr(2)", "constexpr(4)", False),
        ("HIDDEN = 3", "HIDDEN = 4", False),
        ("return x * HIDDEN", "return x + HIDDEN", False),
        ("tl.arange(0, N)", "tl.arange(0, 2 * N)", False),
        ("@triton.jit\ndef kernel", "# a comment line\n\nOTHER = 7\n\n@triton.jit\ndef kernel", True),
        ("    o = tl", "    # why\n    o = tl", True),
    ],
)
def test_digits_follow_all_source_that_a_kernel_reaches(old, new, same, tmp_path):
    assert old in SOURCE

    def of(text):
        path = tmp_path / "blackwell_kernels_example.py"
        path.write_text(text)
        linecache.clearcache()
        space = {"__name__": "blackwell_kernels.example"}
        exec(compile(text, str(path), "exec"), space)
        with launched.noted("h200") as launches:
            space["kernel"][(1,)](torch.empty(8), N=8)
        return launches

    assert (of(SOURCE) == of(SOURCE.replace(old, new))) is same


def test_a_launch_is_more_than_its_kernel(monkeypatch):
    from blackwell_kernels.gdn import decode

    kernel = decode.gdn_decode_kernel
    with launched.noted("h200") as launches:
        launched.precompile.call(ONE)
    (told,) = launches
    assert told.startswith(f"{kernel.__name__} ")
    assert "num_warps=" in told
    assert "torch.bfloat16" in told


def test_what_no_digits_are_known_for_is_told():
    with pytest.raises(TypeError, match="no digits: list"):
        launched._value([1])


@pytest.mark.parametrize("gpu", sorted(path.name for path in results.ROOT.iterdir() if path.is_dir()))
def test_stored_decisions_for_ours_rest_on_what_is_launched_today(gpu):
    """Otherwise `blackwell-kernels bench dispatch` leaves them to stock."""
    from blackwell_kernels.microbench import dispatch

    stored = [results.load(path) for path in sorted((results.ROOT / gpu).glob("*.json"))]
    for op, rows in dispatch.table_rows(stored).items():
        table = tables.load(env.HOOK_OPS[op], op, gpu)
        assert table is not None
        kept = {(str(row.case), row.tokens): row for row in table.rows}
        told = [(row, kept[str(row.case), row.tokens]) for row in rows]
        assert [(row.use, row.kernels) for row, _ in told] == [(row.use, row.kernels) for _, row in told]
