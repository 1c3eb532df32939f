"""Shapes, strides, lengths and configurations that nobody thought of: 200 an operator for the CPU implementation, fewer
for the kernels, which are interpreted or compiled anew for nearly each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch

from blackwell_kernels.common.testing.generators import cu_seqlens, normal, seeded
from blackwell_kernels.common.testing.poison import Canaries
from blackwell_kernels.dsa import reference, testing
from blackwell_kernels.dsa.config import LogitsConfig, SparseMlaConfig, TopkConfig

EXAMPLES, COMPILED_EXAMPLES, INTERPRETED_EXAMPLES = 200, 40, 20
Draw = Callable[..., Any]

pages = st.sampled_from([16, 32, 48, 64])
seeds = st.integers(0, 2**32 - 1)
lengths = st.lists(st.integers(0, 140), min_size=1, max_size=4)


def fuzz(impl: Any, body: Callable[[Draw], None]) -> None:
    """Run `body(draw)` on as many examples as this implementation has time for."""
    kernels = COMPILED_EXAMPLES if impl.device.type == "cuda" else INTERPRETED_EXAMPLES

    @hypothesis.settings(max_examples=kernels if impl.name == "triton" else EXAMPLES)
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        body(data.draw)

    run()


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def test_indexer_k_insert(impl: Any):
    def body(draw: Draw) -> None:
        rng, page, blocks = seeded(draw(seeds)), draw(pages), draw(st.integers(1, 4))
        tokens = draw(st.integers(0, blocks * page))
        cache = testing.paged_bytes(blocks, page, 132, draw(st.sampled_from([0, 4, 132])))
        slots = torch.randperm(blocks * page, generator=rng)[:tokens]
        slots[torch.rand(tokens, generator=rng) < 0.2] = -1
        k = normal((tokens, 128), rng) * 10.0 ** draw(st.integers(-30, 30))
        expected = reference.indexer_k_insert(k, cache, slots)
        guard = Canaries(impl.device)
        moved = guard.inout(cache, strides=cache.stride())
        impl.run("dsa_indexer_k_insert", guard.input(k), moved, guard.input(slots))
        assert torch.equal(as_bytes(moved), as_bytes(expected))
        guard.check()

    fuzz(impl, body)


def test_kv_insert(impl: Any):
    def body(draw: Draw) -> None:
        rng, page, blocks, fp8 = seeded(draw(seeds)), draw(pages), draw(st.integers(1, 3)), draw(st.booleans())
        tokens, gap = draw(st.integers(0, 40)), draw(st.sampled_from([0, 16, 1152]))
        cache = testing.paged_bytes(blocks, page, 656 if fp8 else 1152, gap)
        cache = cache if fp8 else cache.view(torch.bfloat16)
        slots = torch.randperm(blocks * page, generator=rng)[:tokens].to(
            draw(st.sampled_from([torch.int32, torch.int64]))
        )
        tokens = len(slots)
        slots[torch.rand(tokens, generator=rng) < 0.2] = -1
        kv_c = normal((tokens, 512), rng) * 10.0 ** draw(st.integers(-38, 30))
        k_pe = normal((tokens, 64), rng)
        power_of_two_scale = draw(st.booleans())
        expected = reference.kv_insert(kv_c, k_pe, cache, slots, power_of_two_scale)
        guard = Canaries(impl.device)
        moved = guard.inout(cache, strides=cache.stride())
        inputs = guard.input(kv_c), guard.input(k_pe), moved, guard.input(slots)
        impl.run("dsa_kv_insert", *inputs, power_of_two_scale=power_of_two_scale)
        assert torch.equal(as_bytes(moved), as_bytes(expected))
        guard.check()

    fuzz(impl, body)


def test_gather_indexer_k(impl: Any):
    def body(draw: Draw) -> None:
        rng, page, sequences = seeded(draw(seeds)), draw(pages), draw(lengths)
        cache, table = testing.index_cache(sequences, page, rng, draw(st.sampled_from([0, 8])), draw(st.integers(0, 2)))
        cu, total = cu_seqlens(sequences), sum(sequences)
        guard = Canaries(impl.device)
        k = guard.output((total + draw(st.integers(0, 5)), 128), torch.float8_e4m3fn)
        scale = guard.output((len(k),), torch.float32)
        impl.run("dsa_gather_indexer_k", *(guard.input(x, strides=x.stride()) for x in (cache, table, cu)), k, scale)
        expected_k, expected_scale = reference.gather_indexer_k(cache, table, cu)
        assert torch.equal(as_bytes(k[:total]), as_bytes(expected_k))
        assert torch.equal(scale[:total].cpu(), expected_scale)
        assert scale[total:].isnan().all()
        guard.check()

    fuzz(impl, body)


def logits_configs(draw: Draw) -> LogitsConfig:
    block_n, group = draw(st.sampled_from([64, 128])), draw(st.sampled_from([1, 4, 16]))
    return LogitsConfig(block_n, group, programs=draw(st.sampled_from([1, 4])), pages=draw(st.sampled_from([1, 2])))


def test_indexer_logits_paged(impl: Any):
    def body(draw: Draw) -> None:
        rng, page, contexts = seeded(draw(seeds)), draw(pages), draw(lengths)
        next_n, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 7, 16, 64]))
        batch, columns = len(contexts), max(contexts) + draw(st.integers(1, 70))
        cache, table = testing.index_cache(contexts, page, rng, draw(st.sampled_from([0, 12])), draw(st.integers(0, 2)))
        lens = torch.tensor(contexts, dtype=torch.int32)
        if draw(st.booleans()):
            shorter = torch.randint(0, 150, (batch, next_n), generator=rng)
            lens = torch.minimum(shorter, lens[:, None]).to(torch.int32)
        q = testing.fp8_queries((batch, next_n, heads, 128), rng)
        weights = torch.randn(batch * next_n, heads, generator=rng)
        expected = reference.indexer_logits_paged(q, cache, weights, lens, table, columns)
        bound = testing.paged_logits_bound(q, cache, weights, lens, table, columns, impl.tensor_cores)
        guard = Canaries(impl.device)
        logits = guard.output((batch * next_n, columns), torch.float32, strides=(columns + 1, 1))
        inputs = [guard.input(x, strides=x.stride()) for x in (q, cache, weights, lens, table)]
        impl.run("dsa_indexer_logits_paged", *inputs, logits, config=logits_configs(draw))
        testing.assert_bounded(logits, expected, bound)
        guard.check()

    fuzz(impl, body)


def test_indexer_logits_ragged(impl: Any):
    def body(draw: Draw) -> None:
        rng, rows, keys = seeded(draw(seeds)), draw(st.integers(1, 40)), draw(st.integers(1, 200))
        heads = draw(st.sampled_from([1, 4, 7, 16, 64]))
        starts = torch.randint(-5, keys + 5, (rows,), generator=rng).to(torch.int32)
        ends = torch.randint(-5, keys + 5, (rows,), generator=rng).to(torch.int32)
        q, k = testing.fp8_queries((rows, heads, 128), rng), testing.fp8_queries((keys, 128), rng)
        scale, weights = torch.rand(keys, generator=rng), torch.randn(rows, heads, generator=rng)
        expected = reference.indexer_logits_ragged(q, k, scale, weights, starts, ends)
        guard = Canaries(impl.device)
        logits = guard.output((rows, keys), torch.float32)
        inputs = [guard.input(x) for x in (q, k, scale, weights, starts, ends)]
        impl.run("dsa_indexer_logits_ragged", *inputs, logits, config=logits_configs(draw))
        bound = testing.logits_bound(q, k, scale, weights, impl.tensor_cores)
        testing.assert_bounded(logits, expected, bound)
        guard.check()

    fuzz(impl, body)


def test_topk(impl: Any):
    def body(draw: Draw) -> None:
        rng, rows, columns = seeded(draw(seeds)), draw(st.integers(1, 5)), draw(st.integers(0, 400))
        k = draw(st.one_of(st.integers(1, 8), st.integers(1, 450)))
        kind = draw(st.sampled_from(["normal", "bits", "few", "near"]))
        if kind == "normal":
            logits = torch.randn(rows, columns, generator=rng)
        elif kind == "few":
            logits = torch.randint(-2, 3, (rows, columns), generator=rng).float()
        else:
            low, high = (-(2**31), 2**31) if kind == "bits" else (0x3F7FFFF0, 0x3F800010)
            logits = torch.randint(low, high, (rows, columns), generator=rng).to(torch.int32).view(torch.float32)
        starts = torch.randint(-3, columns + 4, (rows,), generator=rng).to(torch.int32)
        ends = torch.randint(-3, columns + 4, (rows,), generator=rng).to(torch.int32)
        if draw(st.booleans()):
            starts, ends = starts.minimum(ends), starts.maximum(ends)
        block, splits, held = (draw(st.sampled_from(some)) for some in ([64, 128, 512], [1, 2, 8], [1, 16]))
        config = TopkConfig(block, splits, num_warps=2, held=held, cluster=draw(st.sampled_from([0, 0, 1, 2])))
        expected = reference.topk(logits, starts, ends, k)
        guard = Canaries(impl.device)
        indices = guard.output((rows, k), torch.int32, strides=(k + 2, 1))
        impl.run("dsa_topk", *(guard.input(x) for x in (logits, starts, ends)), indices, config=config)
        assert testing.same_selection(indices, expected)
        guard.check()

    fuzz(impl, body)


def test_sparse_mla(impl: Any):
    def body(draw: Draw) -> None:
        rng, page, sequences, fp8 = seeded(draw(seeds)), draw(pages), draw(lengths), draw(st.booleans())
        tokens, k = draw(st.integers(1, 3)), draw(st.integers(1, 80))
        heads = draw(st.sampled_from([1, 5, 8, 16]))
        cache, table = testing.kv_cache(sequences, page, fp8, rng, power_of_two_scale=draw(st.booleans()))
        requests = torch.randint(0, len(sequences), (tokens,), generator=rng)
        req_id: torch.Tensor | None = requests.to(torch.int32)
        context = torch.tensor(sequences)[requests][:, None]
        # live positions, negative ones, and ones beyond the table; what lies between is NaN by construction
        indices = (torch.rand(tokens, k, generator=rng) * context).long().clamp(max=(context - 1).clamp(min=0))
        indices = torch.where(context > 0, indices, -1)
        if draw(st.booleans()):
            slots = reference.physical_slots(indices, req_id, table, cache.shape[0], page)
            indices, req_id, beyond = slots, None, cache.shape[0] * page
        else:
            beyond = table.shape[1] * page
        hostile = torch.tensor([-1, -(2**31), beyond, 2**31 - 1])
        where = torch.rand(tokens, k, generator=rng) < 0.3
        indices = torch.where(where, hostile[torch.randint(0, 4, (tokens, k), generator=rng)], indices).to(torch.int32)
        mapping = None if req_id is None else table
        q = normal((tokens, heads, 576), rng)
        divided = draw(st.booleans())
        config = SparseMlaConfig(
            block_h=64 if divided else 16,
            block_n=draw(st.sampled_from([16, 32])),
            splits=draw(st.integers(1, 5)),
            num_warps=8 if divided else 4,
            num_stages=2 if divided else 1,
            by_columns=not divided and draw(st.booleans()),
            bf16_parts=draw(st.booleans()),
            divided=divided,
        )
        sm_scale = draw(st.sampled_from([576**-0.5, 1.0]))
        expected, expected_lse = reference.sparse_mla(q, cache, indices, req_id, mapping, sm_scale)
        out_bound, lse_bound = testing.attention_bounds(q, cache, indices, req_id, mapping, sm_scale)
        guard = Canaries(impl.device)
        out, lse = guard.output((tokens, heads, 512), torch.bfloat16), guard.output((tokens, heads), torch.float32)
        inputs = [
            None if x is None else guard.input(x, strides=x.stride()) for x in (q, cache, indices, req_id, mapping)
        ]
        impl.run("dsa_sparse_mla", *inputs, sm_scale, out, lse, config=config)
        testing.assert_bounded(out, expected, out_bound)
        testing.assert_bounded(lse, expected_lse, lse_bound)
        guard.check()

    fuzz(impl, body)
