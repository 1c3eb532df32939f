"""Kernels that compile and that each gate must refuse, and honest ones that must pass; `test_aot.py` runs them."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from blackwell_kernels.common.testing.compile import AotCase


@triton.jit
def gemm(a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + o_m[:, None] * K + start + o_k[None, :])
        b = tl.load(b_ptr + o_n[None, :] * K + start + o_k[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + o_m[:, None] * BN + o_n[None, :], acc)


@triton.jit
def many_accumulators(a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    first = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    third = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + o_m[:, None] * K + start + o_k[None, :])
        b = tl.load(b_ptr + o_n[None, :] * K + start + o_k[:, None])
        first = tl.dot(a, b, first)
        second = tl.dot(a * 2, b, second)
        third = tl.dot(a, b * 2, third)
    o_c = o_m[:, None] * BN + o_n[None, :]
    tl.store(c_ptr + o_c, first + second * third)


@triton.jit
def fill(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 1.0, mask=i < n)


@triton.jit
def traps(x_ptr):
    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(x_ptr, 1.0)


@triton.jit
def device_descriptor(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [n, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    o_m, o_n = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + o_m * BLOCK + o_n, x.load([0, 0]))


def run_gemm(bm: int, bn: int, bk: int, *, dtype: torch.dtype = torch.bfloat16, kernel=gemm, **options: int) -> None:
    a, b = torch.empty(bm, 1024, dtype=dtype), torch.empty(bn, 1024, dtype=dtype)
    kernel[(1,)](a, b, torch.empty(bm, bn), 1024, bm, bn, bk, **options)


def run_fill(programs: int = 1, axis: int = 0) -> None:
    grid = tuple(programs if i == axis else 1 for i in range(3))
    fill[grid](torch.empty(1024), 1024, BLOCK=1024)


def run_device_descriptor() -> None:
    x = torch.empty(64, 64)
    device_descriptor[(1,)](x, x, 64, BLOCK=64)


FP8 = torch.float8_e4m3fn
CASES = [
    AotCase("honest fp8", lambda: run_gemm(128, 128, 128, dtype=FP8, num_warps=8), mma={"gemm": "fp8"}),
    AotCase("honest bf16", lambda: run_gemm(128, 128, 64, num_warps=8), mma="required"),
    AotCase("honest fill", run_fill),
    AotCase("honest descriptor", run_device_descriptor, device_descriptors=frozenset({"device_descriptor"})),
    AotCase("traps", lambda: traps[(1,)](torch.empty(1))),
    AotCase(
        "tensor memory",
        lambda: run_gemm(128, 256, 64, kernel=many_accumulators, num_warps=8, num_stages=1),
        mma="required",
        archs=(100,),
    ),
    AotCase("shared memory", lambda: run_gemm(128, 256, 128, num_warps=8, num_stages=5), mma="required"),
    AotCase("spills", lambda: run_gemm(256, 256, 64, num_warps=4, num_stages=1), mma="required"),
    AotCase("mma.sync", lambda: run_gemm(16, 128, 64, num_warps=4), mma="required"),
    AotCase("other kind", lambda: run_gemm(128, 128, 64, num_warps=8), mma={"gemm": "fp8"}),
    AotCase("unexpected mma", lambda: run_gemm(128, 128, 64, num_warps=8)),
    AotCase("no mma", run_fill, mma="required"),
    AotCase("no tma", run_fill, tma=frozenset({"fill"})),
    AotCase("descriptor", run_device_descriptor),
    AotCase("grid", lambda: run_fill(65_536, axis=1)),
    AotCase("loop", lambda: run_gemm(128, 128, 64, num_warps=8), mma="required", loop_limit={"gemm": 5}),
    AotCase("misnamed", run_fill, mma={"fil": "fp8"}),
    AotCase("launches nothing", lambda: None),
    AotCase("raises", lambda: run_gemm(128, 100, 64)),
    AotCase("aborts", os.abort),
    AotCase("honest after the abort", run_fill),
]
