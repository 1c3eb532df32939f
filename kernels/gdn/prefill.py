"""Chunked prefill. G: running sum of g in a chunk of 64 tokens; D_ij = exp(G_i - G_j), j <= i:

 chunks  X = (I + tril(beta_i D_ij k_i.k_j, -1))^-1 beta;   P = tril(D q k^T)                     every chunk at once
 walk    v' = X v - X (exp(G) k S^T);   o = scale (exp(G) q S^T + P v')
         S <- exp(G_last) S + (exp(G_last - G) v')^T k                                            chunk after chunk

A sequence longer than a piece, which would leave most of the chip idle or outlast all others, is walked in pieces at
once. A piece maps the state it starts from to S T + N: a first walk without outputs finds N, its end when it starts
from zero, and T, its end when it starts from an identity and v is zero; the carry goes over the pieces; the second walk
starts each where it should. Shorter sequences are walked once, in the second one.

q, k [T, H, K] | v, out [T, HV, V] bf16 | g, beta [T, HV] f32 | state [slots, HV, V, K] bf16 or f32
workspaces, n = T // 64 + sequences: X and P [n, HV, 2, 64, 64] bf16, decays [n, HV, 64, 2] f32: exp(G) and
exp(G_last - G), carry [T // piece + sequences, HV, V + K, K] f32: N, then the state at the piece's end, over T

Between the launches go 16 KB a chunk and value head; w = X (exp(G) k), u = X v and the state of every chunk, which
other formulations write and read, are five times that. The walk holds everything transposed, channels of v down and
tokens across, so that S and all that is computed from it are first operands of the next product and stay in registers.

Dots take bf16 operands and accumulate in fp32; X is computed with operands of 16 bits, S lives in fp32. The grids
depend on T and the number of sequences only: no copy of cu_seqlens to the host. Bound: the walk's products for many
sequences, its steps one after the other for few.

With PDL a kernel starts while the last programs of the one before run. What it waits for has waited for all before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import MIN_LOG_DECAY, chunk_of_program

CHUNK = tl.constexpr(64)
# sequences that a walk puts in order; more of them fill the chip many times over
MOST_SORTED = 16


@triton.jit
def _split(b_x):
    """b_x fp32 -> (high, low) bf16, high + low = b_x to 16 bits: the high half of the bits, and what that leaves."""
    b_high = (b_x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b_high.to(tl.bfloat16), (b_x - b_high).to(tl.bfloat16)


@triton.jit
def _dot3(b_xh, b_xl, b_yh, b_yl, b_acc):
    """b_acc + x y of split operands: three bf16 products, 2^-16 of each term lost."""
    return tl.dot(b_xh, b_yh, tl.dot(b_xh, b_yl, tl.dot(b_xl, b_yh, b_acc)))


@triton.jit
def _product3(b_x, b_a, b_y, b_acc):
    """b_acc + x a y, all fp32, by _dot3."""
    b_xh, b_xl = _split(b_x)
    b_ah, b_al = _split(b_a)
    b_xh, b_xl = _split(_dot3(b_xh, b_xl, b_ah, b_al, tl.zeros_like(b_a)))
    b_yh, b_yl = _split(b_y)
    return _dot3(b_xh, b_xl, b_yh, b_yl, b_acc)


@triton.jit
def _beside(b_left, b_right):
    """[4, 16, N] twice -> [4, 16, 2 N]."""
    b_both = tl.permute(tl.join(b_left, b_right), (0, 1, 3, 2))
    return tl.reshape(b_both, (4, 16, 2 * b_left.shape[2]))


@triton.jit
def _halves(b_x):
    """[64, 64] -> [4, 16, 32]: the left and the right half of the columns, added."""
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_x, (4, 16, 2, 32)), (0, 1, 3, 2)))
    return b_left + b_right


@triton.jit
def invert_unit_lower(b_n):
    """(I - b_n)^-1, b_n [64, 64] fp32 strictly lower triangular.

    Diagonal blocks of 4 by the series I + n + n^2 + n^3, then [[P, 0], [A, Q]]^-1 = [[P^-1, 0], [Q^-1 A' P^-1, Q^-1]],
    A' = -A, doubles them. 16 rows to a warp throughout, so that what is left of a product never leaves its registers
    and what is right of it, once it is of other rows, is all that crosses warps. A longer series would cancel terms
    that grow as binomials against each other (repeated keys); blocks of 4 keep them under 3.
    """
    o_w, o_b, o = tl.arange(0, 4)[:, None, None], tl.arange(0, 4), tl.arange(0, 16)
    b_n = tl.reshape(b_n, (4, 16, 4, 16))
    b_d = tl.sum(tl.where((o_b[:, None] == o_b[None, :])[:, None, :, None], b_n, 0.0), 2)
    b_f = tl.where((o[:, None] // 4 == o[None, :] // 4)[None, :, :], b_d, 0.0)
    b_fh, b_fl = _split(b_f)
    b_2 = _dot3(b_fh, b_fl, b_fh, b_fl, tl.zeros_like(b_d))
    b_x = b_f + b_2 + tl.where(o[:, None] == o[None, :], 1.0, 0.0)[None, :, :]
    b_2h, b_2l = _split(b_2)
    b_x = _dot3(b_fh, b_fl, b_2h, b_2l, b_x)
    for LOG in tl.static_range(2, 4):
        # row and column in one block of twice the size, the row in its lower and the column in its upper half
        b_i, b_j = o[:, None] // 2**LOG, o[None, :] // 2**LOG
        m_below = (b_i // 2 == b_j // 2) & (b_i > b_j)
        b_x = _product3(b_x, tl.where(m_below[None, :, :], b_d, 0.0), b_x, b_x)
    # 16 to 32: the odd blocks of rows, which have the even ones' inverses to their right
    m_left = (o_b[:, None] % 2 == 1) & (o_b[None, :] == o_b[:, None] - 1)
    b_a = tl.sum(tl.where(m_left[:, None, :, None], b_n, 0.0), 2)
    b_even, _ = tl.split(tl.permute(tl.reshape(b_x, (2, 2, 16, 16)), (0, 2, 3, 1)))
    b_even = tl.reshape(tl.broadcast_to(b_even[:, None, :, :], (2, 2, 16, 16)), (4, 16, 16))
    b_z = _product3(b_x, b_a, b_even, tl.zeros_like(b_a))
    b_x = _beside(tl.where(o_w % 2 == 0, b_x, b_z), tl.where(o_w % 2 == 0, 0.0, b_x))
    # 32 to 64: what must not count of the left operands meets rows of zeros. The right ones have their high and low
    # halves side by side, 64 columns: of 32, ptxas 12.8 takes their descriptors from a register that nothing writes
    m_upper = o_w < 2
    b_xh, b_xl = _split(tl.where(m_upper, b_x, 0.0))
    b_y = tl.reshape(_beside(b_xh, b_xl), (64, 64))
    b_ah, b_al = _split(tl.reshape(b_n, (64, 64)))
    b_t = _halves(tl.dot(b_ah, b_y, tl.dot(b_al, b_y)))
    b_th, b_tl = _split(tl.where(m_upper, 0.0, b_t))
    b_y = tl.reshape(_beside(b_th, b_tl), (64, 64))
    b_xh, b_xl = _split(tl.reshape(_beside(b_x, b_x), (64, 64)))
    b_z = _halves(tl.dot(b_xh, b_y, tl.dot(b_xl, b_y)))
    b_x = _beside(tl.where(m_upper, b_x, b_z), tl.where(m_upper, 0.0, b_x))
    return tl.reshape(b_x, (64, 64))


@triton.jit
def piece_of(length, i_piece, piece):
    """The pieces of at most `piece` tokens, whole chunks, that a sequence is cut into, as even as that allows and none
    of them empty -> (their number, first and end token of one of them)."""
    pieces = tl.maximum(tl.cdiv(length, piece), 1)
    tokens = tl.cdiv(tl.cdiv(length, CHUNK), pieces) * CHUNK
    return pieces, i_piece * tokens, tl.minimum(i_piece * tokens + tokens, length)


@triton.jit
def longest_first(cu_seqlens_ptr, rank, num_seqs):
    """The sequence that `rank` others, of 32 at most, come before: longer ones, of equal ones those before it.

    The sum over a whole warp is what tells the compiler that all threads find the same.
    """
    o_n = tl.arange(0, 32)
    m_n = o_n < num_seqs
    b_length = tl.load(cu_seqlens_ptr + o_n + 1, mask=m_n, other=0) - tl.load(cu_seqlens_ptr + o_n, mask=m_n, other=1)
    b_rank = tl.zeros_like(o_n)
    for i in range(num_seqs):
        length = tl.load(cu_seqlens_ptr + i + 1) - tl.load(cu_seqlens_ptr + i)
        b_rank += ((length > b_length) | ((length == b_length) & (i < o_n))).to(tl.int32)
    return tl.sum(tl.where(b_rank == rank, o_n, 0), 0)


@triton.jit
def _wait():
    """For the kernel before to end; its own dependents may start."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["g_ptr", "beta_ptr", "cu_seqlens_ptr"])
def gdn_prefill_chunks_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, x_ptr, decay_ptr,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_g, stride_beta, num_seqs,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: ((T // 64 + sequences) x HV,): the value heads that share a key head side by side."""
    if PDL:
        _wait()
    i_chunk, i_hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    _, _, first, left = chunk_of_program(cu_seqlens_ptr, i_chunk, num_seqs, CHUNK)
    if left <= 0:
        return
    i_h = i_hv // (HV // H)
    o_t, o_k = tl.arange(0, CHUNK), tl.arange(0, K)
    m_t = o_t < left
    # 64 bits up to the tile, 32 inside it
    b_g = tl.load(g_ptr + first * stride_g + i_hv + o_t * stride_g, mask=m_t, other=0)
    p_beta = beta_ptr + first * stride_beta + i_hv + o_t * stride_beta
    b_beta = tl.load(p_beta, mask=m_t, other=0)
    b_beta2 = tl.load(p_beta[:, None] + tl.zeros([CHUNK, 2], tl.int32), mask=m_t[:, None], other=0)
    p_k = k_ptr + first * stride_k + i_h * stride_k_head
    b_k = tl.load(p_k + (o_t[:, None] * stride_k + o_k[None, :]), mask=m_t[:, None], other=0)
    p_q = q_ptr + first * stride_q + i_h * stride_q_head
    b_q = tl.load(p_q + (o_t[:, None] * stride_q + o_k[None, :]), mask=m_t[:, None], other=0)
    # for the columns, to be scaled at the end: read twice and a maximum, which one register holds until then. A load
    # would be made again there, scattered, in the layout of its use
    b_columns = tl.max(b_beta2, 1)
    b_G = tl.cumsum(tl.where(b_g < MIN_LOG_DECAY, MIN_LOG_DECAY, b_g), 0)

    i_chunk = tl.program_id(0).to(tl.int64)
    G_last = tl.sum(tl.where(o_t == CHUNK - 1, b_G, 0.0), 0)
    p_decay = decay_ptr + i_chunk * (2 * CHUNK) + (2 * o_t[:, None] + tl.arange(0, 2)[None, :])
    tl.store(p_decay, tl.exp(tl.join(b_G, G_last - b_G)))

    m_causal = o_t[:, None] >= o_t[None, :]
    b_decay = tl.exp(tl.where(m_causal, b_G[:, None] - b_G[None, :], -float("inf")))
    p_x = x_ptr + i_chunk * (2 * CHUNK * CHUNK) + (o_t[:, None] * CHUNK + o_t[None, :])
    b_p = tl.dot(b_q, tl.trans(b_k)) * b_decay
    tl.store(p_x + CHUNK * CHUNK, b_p.to(x_ptr.dtype.element_ty))
    b_kk = tl.dot(b_k, tl.trans(b_k)) * b_decay
    b_x = invert_unit_lower(tl.where(o_t[:, None] > o_t[None, :], b_kk * -b_beta[:, None], 0.0))
    tl.store(p_x, (b_x * b_columns[None, :]).to(x_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=["stride_indices", "num_seqs", "piece", "blocks"],
    do_not_specialize_on_alignment=["indices_ptr", "has_initial_ptr", "cu_seqlens_ptr"],
)
def gdn_prefill_walk_kernel(
    q_ptr, k_ptr, v_ptr, x_ptr, decay_ptr, state_ptr, indices_ptr, has_initial_ptr, cu_seqlens_ptr, out_ptr,
    carry_ptr, scale, stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_out,
    stride_out_head, stride_state, stride_indices, num_seqs, piece, blocks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    PASS: tl.constexpr, PDL: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences x HV x V / BV,) for "whole"; with pieces (T // piece + sequences) x HV x blocks.

    SORTED: "whole" takes the longest of at most 32 sequences first, else all as they come.

    PASS "whole": no sequence is cut. "summary", before gdn_prefill_carry_kernel: what each piece but a sequence's last
    adds, and in further blocks of BV rows what it makes of the rows of an identity, where some sequence may have more
    than two pieces. "pieces", after it: all pieces from their states.
    """
    # the last kernel lets no other begin
    if PDL and PASS == "summary":
        _wait()
    if PDL and PASS == "pieces":
        tl.extra.cuda.gdc_wait()
    i_p, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i_hv, i_p = i_p % HV, i_p // HV
    if PASS == "whole":
        # so that the last to end are short: programs start in the order of the grid
        i_n = longest_first(cu_seqlens_ptr, i_p, num_seqs).to(tl.int64) if SORTED else i_p.to(tl.int64)
        i_piece, pieces, i_begin = 0, 1, 0
        bos = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        i_end = length
    else:
        i_n, i_piece, bos, left = chunk_of_program(cu_seqlens_ptr, i_p, num_seqs, piece)
        if left <= 0:
            return
        i_n, bos, length = i_n.to(tl.int64), bos - i_piece * piece, left + i_piece * piece
        pieces, i_begin, i_end = piece_of(length, i_piece, piece)
        if i_begin >= i_end:
            # never so; where the compiler knows, the walk needs less registers and spills none
            return
        # of the sequence's first piece; the next ones', eight at most, are HV (V + K) K further each
        p_carry = carry_ptr + ((i_p - i_piece).to(tl.int64) * HV + i_hv) * ((V + K) * K)
    if PASS == "summary":
        # the last piece's end is the second walk's to find, and what the first one starts from is known
        if (i_piece == pieces - 1) | ((i_piece == 0) & (i_block >= V // BV)):
            return
    i_h = i_hv // (HV // H)
    o_t, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, K), i_block * BV + tl.arange(0, BV)
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    p_state = state_ptr + i_slot * stride_state + i_hv * (V * K)
    o_s = o_v[:, None] * K + o_k[None, :]
    # chunk c of sequence n is number (cu[n] - cu[0]) // 64 + n + c
    i_chunk = ((bos - tl.load(cu_seqlens_ptr).to(tl.int64)) // CHUNK + i_n + i_begin // CHUNK) * HV + i_hv
    # no kernel of this call but the second walk's last pieces writes a slot
    starts = (i_piece == 0) & (pieces == 1) if PASS == "pieces" else i_piece == 0
    known = starts & (i_begin < i_end) & (i_slot > 0) & (tl.load(has_initial_ptr + i_n) != 0)
    if PASS == "pieces":
        b_s = tl.zeros([BV, K], tl.float32)
        if known:
            b_s += tl.load(p_state + o_s).to(tl.float32)
        if pieces > 1:
            # a piece's start lies where the one before it was summarised, the first one's in the last place
            b_s += tl.load(p_carry + (i_piece + pieces - 1) % pieces * (HV * (V + K) * K) + o_s)
    else:
        # a mask, not a branch, whose result would be added to zeros; above it would spill
        b_s = tl.load(p_state + o_s, mask=known & (o_v < V)[:, None], other=0).to(tl.float32)
    if PASS == "whole":
        if PDL:
            tl.extra.cuda.gdc_wait()
        if i_begin >= i_end:
            return
    if PASS == "summary":
        if i_piece == 0:
            # the last piece will overwrite the slot while others start
            tl.store(p_carry + (pieces - 1) * (HV * (V + K) * K) + o_s, b_s)
        b_s += ((i_piece > 0) & (o_v[:, None] - V == o_k[None, :])).to(tl.float32)

    first = bos + i_begin
    p_x, p_decay = x_ptr + i_chunk * (2 * CHUNK * CHUNK), decay_ptr + i_chunk * (2 * CHUNK)
    p_q = q_ptr + first * stride_q + i_h * stride_q_head
    p_k = k_ptr + first * stride_k + i_h * stride_k_head
    p_v = v_ptr + first * stride_v + i_hv * stride_v_head
    p_out = out_ptr + first * stride_out + i_hv * stride_out_head
    o_x = o_t[None, :] * CHUNK + o_t[:, None]
    # a step's loads are issued at the end of one before: two stages would leave them no time
    for i_t in tl.range(i_begin, i_end, CHUNK, num_stages=STAGES):
        m_t = i_t + o_t < length
        b_k = tl.load(p_k + (o_t[:, None] * stride_k + o_k[None, :]), mask=m_t[:, None], other=0)
        if PASS != "summary":
            b_q = tl.load(p_q + (o_t[None, :] * stride_q + o_k[:, None]), mask=m_t[None, :], other=0)
        m_v = m_t[:, None] & (o_v < V)[None, :] if PASS == "summary" else m_t[:, None]
        b_v = tl.load(p_v + (o_t[:, None] * stride_v + o_v[None, :]), mask=m_v, other=0)
        b_x = tl.load(p_x + o_x)
        if PASS != "summary":
            b_p = tl.load(p_x + (o_x + CHUNK * CHUNK))
        # both in one load, which as one of fewer elements than threads would be made in the layout of their use
        b_in, b_out = tl.split(tl.load(p_decay + (2 * o_t[:, None] + tl.arange(0, 2)[None, :])))
        decay = tl.load(p_decay + (2 * CHUNK - 2))
        b_sk = b_s.to(b_k.dtype)
        b_r = tl.dot(b_sk, tl.trans(b_k)) * -b_in[None, :]
        b_u = tl.dot(b_r.to(b_k.dtype), b_x, tl.dot(tl.trans(b_v), b_x))
        if PASS != "summary":
            b_o = tl.dot(b_sk, b_q) * b_in[None, :]
        b_s = tl.dot((b_u * b_out[None, :]).to(b_k.dtype), b_k, b_s * decay)
        if PASS != "summary":
            b_o = tl.dot(b_u.to(b_k.dtype), b_p, b_o)
            o_out = o_t[None, :] * stride_out + o_v[:, None]
            tl.store(p_out + o_out, (b_o * scale).to(out_ptr.dtype.element_ty), mask=m_t[None, :])
        p_k += CHUNK * stride_k
        p_q += CHUNK * stride_q
        p_v += CHUNK * stride_v
        p_out += CHUNK * stride_out
        p_x += HV * 2 * CHUNK * CHUNK
        p_decay += HV * 2 * CHUNK
    if PASS == "summary":
        tl.store(p_carry + i_piece * (HV * (V + K) * K) + o_s, b_s, mask=(o_v < V + K)[:, None])
    else:
        # read again rather than its addresses held through the walk
        i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
        if (i_slot > 0) & (i_piece == pieces - 1):
            p_state = state_ptr + i_slot * stride_state + i_hv * (V * K)
            tl.store(p_state + o_s, b_s.to(state_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["piece"], do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def gdn_prefill_carry_kernel(
    carry_ptr, cu_seqlens_ptr, piece,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """S <- S T + N over the pieces between the first and the last; S replaces N. Grid: (sequences x HV x V / BV,)."""
    if PDL:
        _wait()
    i_p = tl.program_id(0) // (V // BV)
    i_n, i_hv = i_p // HV, i_p % HV
    bos = tl.load(cu_seqlens_ptr + i_n)
    length = (tl.load(cu_seqlens_ptr + i_n + 1) - bos).to(tl.int32)
    o_v, o_k, o_n = tl.program_id(0) % (V // BV) * BV + tl.arange(0, BV), tl.arange(0, K), tl.arange(0, BK)
    i_first = (bos - tl.load(cu_seqlens_ptr)).to(tl.int32) // piece + i_n
    p_s = carry_ptr + (i_first.to(tl.int64) * HV + i_hv) * ((V + K) * K)
    pieces, _, _ = piece_of(length, 0, piece)
    for _ in range(1, pieces - 1):
        b_sh, b_sl = _split(tl.load(p_s + (o_v[:, None] * K + o_k[None, :])))
        p_s += HV * (V + K) * K
        for i_k in range(0, K, BK):
            b_th, b_tl = _split(tl.load(p_s + (V * K + i_k + o_k[:, None] * K + o_n[None, :])))
            p_n = p_s + (i_k + o_v[:, None] * K + o_n[None, :])
            tl.store(p_n, _dot3(b_sh, b_sl, b_th, b_tl, tl.load(p_n)))
        # what all threads have written is read again
        tl.debug_barrier()
