"""Inputs and error bounds for tests of this family: caches whose unused bytes are NaN, and bounds that are derived.

A bound says how far a correct implementation may be from the float64 reference: it counts the roundings of the
arithmetic an implementation is allowed to use, so it needs no tuning and no measured constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from blackwell_kernels.common.testing import generators
from blackwell_kernels.dsa import reference
from blackwell_kernels.dsa.layout import INDEX_BYTES, INDEX_DIM, KV_BYTES, KV_DIM, LATENT

FLOAT32_STEP = 2.0**-23  # relative error of one float32 operation that may truncate
BF16_STEP = 2.0**-8  # of one rounding to the 8 bits of bf16
# An FP8 MMA on Hopper adds 32 products and the accumulator: all are aligned to the largest and cut off (towards zero)
# 13 bits behind its first, and so is what comes out
MMA_DEPTH, MMA_STEP = 32, 2.0**-13
UNLUCKY = 1e-6  # how likely a correct kernel may leave its bound anywhere in a tensor


def paged_bytes(blocks: int, page: int, width: int, gap: int = 0) -> torch.Tensor:
    """uint8 [blocks, page, width] full of 0xFF (NaN in every format), pages `gap` bytes apart."""
    memory = torch.full((blocks, page * width + gap), 0xFF, dtype=torch.uint8)
    return memory[:, : page * width].unflatten(1, (page, width))


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Like Tensor.to, but strides, offset and what lies between stay: gaps and alignment are part of tests."""
    if x.device == device:
        return x
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def index_cache(
    lengths: Sequence[int], page: int, rng: torch.Generator, gap: int = 0, spare_columns: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k_cache, block_table) of sequences with random keys; everything that belongs to no token is NaN."""
    table, blocks = generators.block_table(lengths, page, rng, spare_columns=spare_columns)
    cache = paged_bytes(blocks, page, INDEX_BYTES, gap)
    slots = live_slots(lengths, table, page)
    keys = generators.normal((len(slots), INDEX_DIM), rng)
    cache.copy_(reference.indexer_k_insert(keys, cache, slots))
    return cache, table


def kv_cache(
    lengths: Sequence[int], page: int, fp8: bool, rng: torch.Generator, gap: int = 0, power_of_two_scale: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kv_cache, block_table) of sequences with random entries; everything that belongs to no token is NaN."""
    table, blocks = generators.block_table(lengths, page, rng)
    cache = paged_bytes(blocks, page, KV_BYTES if fp8 else 2 * KV_DIM, gap)
    cache = cache if fp8 else cache.view(torch.bfloat16)
    slots = live_slots(lengths, table, page)
    entries = generators.normal((len(slots), KV_DIM), rng)
    latent, rope = entries.split([LATENT, KV_DIM - LATENT], -1)
    cache.copy_(reference.kv_insert(latent, rope, cache, slots, power_of_two_scale))
    return cache, table


def live_slots(lengths: Sequence[int], table: torch.Tensor, page: int) -> torch.Tensor:
    """int64 slots of all tokens of all sequences, in order."""
    return torch.cat([generators.slots(table, row, torch.arange(n), page) for row, n in enumerate(lengths)])


def fp8_queries(shape: Sequence[int], rng: torch.Generator) -> torch.Tensor:
    """e4m3 queries that use the format's range."""
    return (64.0 * torch.randn(tuple(shape), generator=rng)).clamp(-448, 448).to(torch.float8_e4m3fn)


def logits_bound(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    tensor_cores: bool,
    among: int | None = None,
) -> torch.Tensor:
    """Largest error of a logit; q [M, H, D], k [N, D], k_scale [N], weights [M, H] -> float64 [M, N].

    e4m3 products are exact in float32, where a dot product errs by at most its length times the step, of the sum of
    magnitudes. Tensor cores: what the accumulator loses (aligned, and cut off after each step) always has its sign, so
    that half a step each, its mean, adds up over steps and heads; the rest of it, and what the products lose, has
    either sign, and the chance that sums of bounded terms of either sign get large is Hoeffding's: as many standard
    deviations are allowed as leave `UNLUCKY` for the largest `among` so many logits (default: those given). A head
    that the ReLU makes zero loses nothing. Each weighted head and the scale add a float32 step. Only the keys with
    finite values get a finite bound.
    """
    q, k, weights = q.double(), k.double(), weights.double().abs()
    dim, heads = q.shape[-1], q.shape[1]
    if not tensor_cores:
        magnitude = torch.einsum("mhd,nd->mhn", q.abs(), k.abs())
        per_head = magnitude * ((dim + heads + 2) * FLOAT32_STEP)
        return torch.einsum("mh,mhn->mn", weights, per_head) * k_scale.double()
    total = always = squares = q.new_zeros(())
    for some, others in zip(q.split(MMA_DEPTH, -1), k.split(MMA_DEPTH, -1), strict=True):
        before, total = total, total + torch.einsum("mhd,nd->mhn", some, others)
        product = some.abs().amax(-1)[:, :, None] * others.abs().amax(-1)
        step = torch.maximum(torch.maximum(before.abs(), total.abs()), product) * MMA_STEP
        always = always + step
        squares = squares + (MMA_DEPTH + 2 * 0.25) * step.square()
    counts = total > -(MMA_DEPTH + 2) * always
    always = torch.where(counts, always + total.abs() * ((heads + 2) * FLOAT32_STEP), 0.0)
    deviation = torch.einsum("mh,mhn->mn", weights.square(), torch.where(counts, squares, 0.0)).sqrt()
    deviations = math.sqrt(2.0 * math.log(2.0 * (among or max(deviation.numel(), 1)) / UNLUCKY))
    return (torch.einsum("mh,mhn->mn", weights, always) + deviations * deviation) * k_scale.double()


def paged_logits_bound(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    columns: int,
    tensor_cores: bool,
) -> torch.Tensor:
    """`logits_bound` of keys in a cache, arguments as of reference.indexer_logits_paged: float64 [B * next_n, columns],
    0 behind the keys of a sequence."""
    batch, next_n = q.shape[:2]
    lengths = reference.paged_row_lengths(context_lens, next_n).view(batch, next_n).amax(1).tolist()
    bound = torch.zeros(batch * next_n, columns, dtype=torch.float64, device=q.device)
    for b, length in enumerate(lengths):
        ends = torch.tensor([0, length], device=q.device)
        k, scale = reference.gather_indexer_k(k_cache, block_table[b : b + 1], ends)
        for row in range(b * next_n, (b + 1) * next_n):
            query, weight = q[b, row % next_n][None], weights[row : row + 1]
            bound[row : row + 1, :length] = logits_bound(query, k, scale, weight, tensor_cores, bound.numel())
    return bound


def attention_bounds(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest errors of out [T, H, 512] (rounded to bf16) and lse [T, H] of sparse MLA; float64.

    Scores err by 576 + 8 float32 steps of their sum of magnitudes (bf16 products are exact), hence probabilities by
    that much relatively, twice (numerator and normaliser). Probabilities are rounded to bf16 before they meet the
    values, sums over the list err by its length in steps, and the result is rounded to bf16. A split adds no more than
    a few steps. fp8 entries whose scale is no power of two may be rounded to bf16, as vLLM's kernels do.
    """
    blocks, page = kv_cache.shape[:2]
    slots = reference.physical_slots(indices, req_id, block_table, blocks, page)
    out_bound = torch.zeros(*q.shape[:2], LATENT, dtype=torch.float64)
    lse_bound = torch.zeros(q.shape[:2], dtype=torch.float64)
    for t in range(q.shape[0]):
        slot = slots[t][slots[t] >= 0]
        if not slot.numel():
            continue
        kv = reference.kv_unpack(kv_cache[slot // page, slot % page])
        rounding = torch.where(kv == kv.bfloat16().double(), 0.0, BF16_STEP * kv.abs())
        scores = q[t].double() @ kv.T * sm_scale
        products = kv.abs() * (KV_DIM + 8) * FLOAT32_STEP + rounding
        error = (q[t].double().abs() @ products.T).amax(-1) * abs(sm_scale)
        p = torch.softmax(scores, -1)
        relative = BF16_STEP + torch.expm1(2 * error) + (len(slot) + 16) * FLOAT32_STEP
        spread = p @ kv[:, :LATENT].abs()
        out_bound[t] = relative[:, None] * spread + BF16_STEP * (p @ kv[:, :LATENT]).abs() + p @ rounding[:, :LATENT]
        peak = scores.abs().amax(-1) / math.log(2.0) + math.log2(len(slot))
        lse_bound[t] = error / math.log(2.0) + (peak + len(slot) + 16) * FLOAT32_STEP
    return out_bound, lse_bound


def same_selection(indices: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether int32 [R, K] are the rows of `reference.topk`: padded ones as they stand, full ones in any order."""
    ours = indices.cpu()
    return torch.equal(torch.where((expected < 0).any(1, keepdim=True), ours, ours.sort(1).values), expected)


def assert_bounded(out: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element within its bound; infinities equal; no NaN anywhere."""
    out, expected, bound = out.detach().cpu().double(), expected.detach().cpu().double(), bound.detach().cpu().double()
    assert out.shape == expected.shape, f"shape {list(out.shape)}, expected {list(expected.shape)}"
    assert not expected.isnan().any(), "the reference has NaN: fix the test's inputs"
    infinite = expected.isinf()
    assert torch.equal(out[infinite], expected[infinite]), "an infinity is missing"
    error = (out - expected).abs()[~infinite]
    allowed = bound[~infinite]
    bad = ~(error <= allowed)
    worst = (error / allowed.clamp(min=1e-300)).nan_to_num(nan=math.inf).max().item() if error.numel() else 0.0
    assert not bad.any(), f"{int(bad.sum())} of {error.numel()} elements out of bounds, worst {worst:.3g} times"
