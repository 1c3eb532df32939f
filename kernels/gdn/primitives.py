"""Triton functions that several kernels of this family share."""

from __future__ import annotations

import triton
import triton.language as tl

# exp(-120) is 0 in fp32; a bound keeps -inf - -inf out of the differences of running sums of g
MIN_LOG_DECAY = tl.constexpr(-120.0)


@triton.jit
def softplus(x):
    """log(1 + e^x); x itself above 20, as in vLLM. log(1 + y) keeps its digits for small y as log(u) y / (u - 1)."""
    y = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + y
    return tl.where(x > 20.0, x, tl.where(u == 1.0, y, tl.log(u) * (y / (u - 1.0))))


@triton.jit
def l2_normalise_rows(b_x):
    """b_x [rows, channels], each row over its length, epsilon 1e-6 under the root, fp32."""
    b_x = b_x.to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)[:, None]


@triton.jit
def chunk_of_program(cu_seqlens_ptr, i_p, num_seqs, BT):
    """Which BT-token chunk program i_p works on -> (sequence, chunk in it, chunk's first token, tokens left there).

    Sequence n owns programs (cu[n] - cu[0]) // BT + n and up: never fewer than its chunks, so T // BT + num_seqs
    programs cover any split of T tokens and the host need not know it. Tokens left <= 0: nothing to do.
    """
    BLOCK: tl.constexpr = 128
    first = tl.load(cu_seqlens_ptr).to(tl.int64)
    i_n = -1
    for i in range(0, num_seqs, BLOCK):
        o_n = i + tl.arange(0, BLOCK)
        b_cu = tl.load(cu_seqlens_ptr + o_n, mask=o_n < num_seqs, other=0).to(tl.int64)
        i_n += tl.sum(((o_n < num_seqs) & ((b_cu - first).to(tl.int32) // BT + o_n <= i_p)).to(tl.int32), 0)
    bos = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    eos = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64)
    i_c = i_p - (bos - first).to(tl.int32) // BT - i_n
    return i_n, i_c, bos + i_c * BT, (eos - bos).to(tl.int32) - i_c * BT
