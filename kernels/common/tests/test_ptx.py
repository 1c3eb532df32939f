"""The PTX simulator on kernels of a few lines: what they compute, and that each thing it refuses is refused."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.testing.ptx import Kernel, PtxError, Source, launch

# t: the thread; o: where its element of y is
BEGIN = """.visible .entry k(.param .u64 .ptr x_ptr, .param .u64 .ptr y_ptr, .param .u32 n) {
.reg .pred p, q; .reg .b32 %r<9>, t, a, b, c, r; .reg .f32 %unused<2>; .reg .b64 %rd<9>, x, y, o, w;
.shared .align 16 .b32 list[64];
ld.param.b64 x, [x_ptr]; ld.param.b64 y, [y_ptr]; mov.u32 t, %tid.x; mov.u32 r, %cluster_ctarank;
mad.wide.u32 o, t, 4, y; mov.u32 a, list; mad.lo.u32 b, t, 4, a;
"""
MEET = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
NEXT = f"st.shared.b32 [b], r; {MEET} xor.b32 c, r, 1; mapa.shared::cluster.u32 c, b, c; ld.shared::cluster.b32 c, [c];"


def kernel(body: str, warps: int = 1, programs: int = 1, early: bool = False) -> Kernel:
    text = BEGIN + body + " ret;\n$L__func_end0:\n}"
    return Kernel(Source(text, ("x_ptr", "y_ptr", "n"), warps, programs, early=early))


def run(body: str, x: list[int] | None = None, warps: int = 1, programs: int = 1, seed: int = 0) -> list[int]:
    """y, of an element a thread of a program."""
    y = torch.full((32 * warps,), -7, dtype=torch.int32)
    arguments = {"x_ptr": torch.tensor(x or [0], dtype=torch.int32), "y_ptr": y, "n": len(x or [0])}
    launch(kernel(body, warps, programs), (1,), arguments, {"y_ptr"}, seed)
    return y.tolist()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("mov.b32 c, -9; shr.s32 c, c, 1;", -5),
        ("mov.b32 c, -9; shr.u32 c, c, 28;", 15),
        ("mov.b32 c, 3; shl.b32 c, c, 32;", 0),
        ("mov.b32 c, -9; max.s32 c, c, 4;", 4),
        ("mov.b32 c, -9; min.u32 c, c, 4;", 4),
        ("mov.b32 c, 6; not.b32 c, c;", -7),
        ("mov.b32 c, 6; brev.b32 c, c; clz.b32 c, c;", 1),
        ("mov.b32 c, -3; mad.wide.s32 w, c, 5, 4; cvt.u32.u64 c, w;", -11),
        ("mov.b32 c, -3; cvt.s64.s32 w, c; shr.u64 w, w, 60; cvt.u32.u64 c, w;", 15),
        ("mov.b32 c, 5; mov.b64 w, {c, c}; shr.u64 w, w, 31; cvt.u32.u64 c, w;", 10),
        ("mov.b64 w, 0x500000006; mov.b64 {c, a}, w; shl.b32 a, a, 4; or.b32 c, c, a;", 0x56),
        ("mov.b64 w, 0x500000006; mov.b64 {_, c}, w;", 5),
        ("mov.b64 w, 0xF0; bfe.s64 w, w, 4, 4; cvt.u32.u64 c, w;", -1),
        ("mov.b32 c, 0fFFC00000; max.f32 c, c, 0fFF800000;", -0x800000),  # NaN, -inf
        ("mov.b32 c, 0f80000000; add.f32 c, c, 0f00000000;", 0),
        ("mov.b32 c, 0f3F800000; add.f32 c, c, 0f33800000;", 0x3F800000),  # half a step, to even
        ("mov.b64 w, {0f3F800000, 0f40000000}; add.f32x2 w, w, w; shr.u64 w, w, 32; cvt.u32.u64 c, w;", 0x40800000),
        ("mov.b32 c, -1; setp.lt.s32 p, c, 0; setp.lt.and.u32 q, c, 9, p; selp.b32 c, 3, 4, q;", 4),
        ("setp.eq.u32 p, t, 99; not.pred q, p; mov.u32 c, 1; @p mov.u32 c, 2; @!q mov.u32 c, 3;", 1),
        ("redux.sync.add.s32 c, t, -1;", 496),
        ("sub.s32 c, t, 40; redux.sync.max.s32 c, c, -1;", -9),
        ("setp.gt.u32 p, t, 29; vote.sync.ballot.b32 c, p, -1;", -(1 << 30)),
    ],
)
def test_instructions(code: str, expected: int):
    assert run(f"{code} st.global.b32 [o], c;") == [expected] * 32


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.up.b32 c|p, t, 4, 0, -1; @!p mov.u32 c, 99;", [99] * 4 + list(range(28))),
        ("shfl.sync.bfly.b32 c, t, 3, 31, -1;", [i ^ 3 for i in range(32)]),
        ("shfl.sync.idx.b32 c, t, 37, 31, -1;", [5] * 32),
        ("mov.u32 c, 0; NEXT: add.u32 c, c, 2; setp.le.u32 p, c, t; @p bra NEXT;", [i // 2 * 2 + 2 for i in range(32)]),
        # labels and registers of a block are its own
        ("mov.u32 c, 0; { .reg .b32 c; mov.u32 c, 7; bra D; D: mov.u32 r, c; } { bra D; D: add.u32 c, c, r; }",
         [7] * 32),
    ],
)  # fmt: skip
def test_lanes_and_control(code: str, expected: list[int]):
    assert run(f"{code} st.global.b32 [o], c;") == expected


@pytest.mark.parametrize("seed", range(5))
def test_threads_meet(seed: int):
    reverse = "st.shared.b32 [b], t; bar.sync 0; sub.u32 c, 63, t; mad.lo.u32 c, c, 4, a; ld.shared.b32 c, [c];"
    assert run(reverse + "st.global.b32 [o], c;", warps=2, seed=seed) == list(range(63, -1, -1))


def test_programs_read_each_others_memory_and_atomics_add_up():
    only = "setp.eq.u32 p, r, 0; @p st.global.b32 [o], c;"
    assert run(NEXT + MEET + only, programs=2) == [1] * 32
    total = "setp.eq.u32 p, t, 0; mov.u32 c, 0; @p st.shared.b32 [a], c; bar.sync 0; red.shared.add.u32 [a], t;"
    assert run(total + "bar.sync 0; ld.shared.b32 c, [a]; st.global.b32 [o], c;") == [496] * 32


def test_what_is_not_written_stays():
    assert run("setp.eq.u32 p, t, 3; @p st.global.b32 [o], t;") == [-7] * 3 + [3] + [-7] * 28


@pytest.mark.parametrize(
    ("body", "message", "warps", "programs"),
    [
        ("add.u32 c, c, 1;", "register that nobody wrote", 1, 1),
        ("redux.sync.add.s32 c, t, 255;", "not a full warp", 1, 1),
        ("ld.shared.b32 c, [b];", "memory that nobody wrote", 1, 1),
        ("ld.global.b32 c, [o];", "memory that nobody wrote", 1, 1),  # an output
        ("ld.global.b32 c, [x+4];", "out of bounds", 1, 1),
        ("ld.global.b32 c, [x+-4];", "out of bounds", 1, 1),
        ("st.global.b32 [o+4], t;", "out of bounds", 1, 1),
        ("st.shared.b32 [b+132], t;", "out of bounds", 1, 1),
        ("st.shared.b32 [b+2], t;", "not a multiple of 4", 1, 1),
        ("mov.b64 w, 1; st.shared.b64 [b], w;", "not a multiple of 8", 1, 1),
        ("st.global.b32 [x], t;", "writes an input", 1, 1),
        ("st.global.b32 [y], t;", "no barrier orders", 1, 1),  # all write one word
        ("st.shared.b32 [b], t; xor.b32 c, b, 4; ld.shared.b32 c, [c];", "no barrier orders|nobody wrote", 1, 1),
        # a shuffle orders no memory
        ("st.shared.b32 [b], t; shfl.sync.idx.b32 c, t, 0, 31, -1; xor.b32 c, b, 4; ld.shared.b32 c, [c];",
         "no barrier orders", 1, 1),
        ("setp.lt.u32 p, t, 5; @p bra D; bar.sync 0; D: mov.u32 c, 0;", "nobody can go on: bar.sync 0, ret", 1, 1),
        ("setp.lt.u32 p, t, 32; @p bra D; bar.sync 0; bra E; D: bar.sync 0; E: mov.u32 c, 0;",
         "nobody can go on: bar.sync 0$", 2, 1),
        ("setp.lt.u32 p, t, 5; @p bra D; redux.sync.add.s32 c, t, -1; bra E; D: vote.sync.ballot.b32 c, p, -1; E:",
         "nobody can go on: redux.*, vote", 1, 1),
        (NEXT, "may exit before|has exited", 1, 2),
        (NEXT.replace(MEET, "bar.sync 0;"), "may not have begun", 1, 2),
        (NEXT.replace("barrier.cluster.arrive.release;", ""), "without having arrived", 1, 2),
        (NEXT.replace("barrier.cluster.wait.acquire;", "") + MEET, "may not have begun", 1, 2),
        ("barrier.cluster.arrive.release;" + MEET, "arrives twice", 1, 2),
        (NEXT.replace("xor.b32 c, r, 1", "add.u32 c, r, 1") + MEET, "no program 2", 1, 2),
        (f"{MEET} mapa.shared::cluster.u32 c, b, 0; st.shared::cluster.b32 [c], t; {MEET}", "no barrier orders", 1, 2),
        # what is written between arrival and wait is not seen
        (NEXT.replace(f"st.shared.b32 [b], r; {MEET}", f"{MEET} barrier.cluster.arrive; st.shared.b32 [b], r; "
         "barrier.cluster.wait;") + MEET, "no barrier orders", 1, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_must_not_be_is_refused(body: str, message: str, warps: int, programs: int, seed: int):
    with pytest.raises(PtxError, match=message):
        run(body, warps=warps, programs=programs, seed=seed)


@pytest.mark.parametrize(
    "code",
    ["sqrt.approx.f32 c, c;", "shfl.sync.idx.b32 c, t, 0, 15, -1;", "bar.sync 1;",
     "ld.global.b16 c, [x];", "setp.lo.u32 p, t, 1;", "atom.shared.cas.b32 c, [a], 0, 1;", "add.u32 c, t, unknown;",
     "bra NOWHERE;", "add.u32 c, x, 1;", "barrier.cluster.arrive.relaxed;", "griddepcontrol.other;"],
)  # fmt: skip
def test_what_is_not_modelled_is_named(code: str):
    with pytest.raises(PtxError, match=f"not modelled: {code.split()[0].rstrip(';')}"):
        kernel(code)


def test_an_early_launch_waits_before_it_touches_global_memory():
    arguments = {"x_ptr": torch.zeros(1), "y_ptr": torch.zeros(32, dtype=torch.int32), "n": 1}
    good = "griddepcontrol.launch_dependents; griddepcontrol.wait; ld.global.b32 c, [x];"
    launch(kernel(good, early=True), (1,), arguments, {"y_ptr"})
    for bad in (good.replace("griddepcontrol.wait;", ""), "ld.global.b32 c, [x]; griddepcontrol.wait;"):
        with pytest.raises(PtxError, match=r"before griddepcontrol\.wait"):
            launch(kernel(bad, early=True), (1,), arguments, {"y_ptr"})


def test_words_between_rows_are_out_of_bounds():
    rows = torch.zeros(4, 6, dtype=torch.int32)[:, :5]
    arguments = {"x_ptr": rows, "y_ptr": torch.zeros(32, dtype=torch.int32), "n": 5}
    launch(kernel("ld.global.b32 c, [x+16];"), (1,), arguments, {"y_ptr"})
    with pytest.raises(PtxError, match="out of bounds"):
        launch(kernel("ld.global.b32 c, [x+20];"), (1,), arguments, {"y_ptr"})


def test_programs_of_a_grid_do_not_share_words():
    arguments = {"x_ptr": torch.zeros(1), "y_ptr": torch.zeros(32, dtype=torch.int32), "n": 1}
    with pytest.raises(PtxError, match="no barrier orders"):
        launch(kernel("st.global.b32 [o], t;"), (2,), arguments, {"y_ptr"})


def test_other_types_are_refused():
    arguments = {"x_ptr": torch.zeros(1, dtype=torch.int64), "y_ptr": torch.zeros(32, dtype=torch.int32), "n": 1}
    with pytest.raises(ValueError, match="32-bit"):
        launch(kernel(""), (1,), arguments, {"y_ptr"})
