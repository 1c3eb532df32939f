"""Generated inputs are what they promise for any shape and seed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from blackwell_kernels.common.testing import generators as g

SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_block_tables_share_no_page(seed, lengths):
    table, pages = g.block_table(lengths, 64, g.seeded(seed), spare_pages=2, spare_columns=1)
    used = table[table >= 0]
    assert used.unique().numel() == used.numel() == sum(-(-n // 64) for n in lengths)
    assert ((used > 0) & (used < pages)).all()
    for row, n in enumerate(lengths):
        held = -(-n // 64)
        assert (table[row, :held] >= 0).all()
        assert (table[row, held:] == -1).all()
        where = g.slots(table, row, torch.arange(n), 64)
        assert where.unique().numel() == n


@given(SEEDS, st.integers(0, 20), st.integers(1, 64), st.floats(0, 50))
def test_routing_is_distinct_and_normalised(seed, tokens, experts, skew):
    top_k = min(experts, 4)
    weights, ids = g.routing(tokens, experts, top_k, g.seeded(seed), skew=skew)
    assert ids.shape == weights.shape == (tokens, top_k)
    assert all(row.unique().numel() == top_k for row in ids)
    assert ((ids >= 0) & (ids < experts)).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens))


def test_skew_leaves_experts_empty():
    _, ids = g.routing(64, 128, 4, g.seeded(0), skew=50)
    assert ids.unique().numel() < 64


@given(SEEDS, st.integers(1, 300), st.integers(1, 300))
def test_block_scales_are_positive_and_dequantise(seed, rows, columns):
    w, scale = g.fp8_blocks(rows, columns, g.seeded(seed))
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    assert (scale > 0).all()
    # every block uses the range of e4m3 up to its end
    assert w.float().abs().max() == g.E4M3_MAX


@given(SEEDS)
def test_row_scales_are_powers_of_two(seed):
    x, scale = g.fp8_rows((3, 256), g.seeded(seed))
    assert x.shape == (3, 256)
    assert scale.shape == (3, 2)
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    assert not x.float().isnan().any()


def test_unit_rows_and_offsets():
    rows = g.unit_rows((5, 128), g.seeded(0), torch.float32)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5))
    assert g.cu_seqlens([3, 0, 2]).tolist() == [0, 3, 3, 5]
    assert torch.equal(g.normal((4,), g.seeded(7)), g.normal((4,), g.seeded(7)))
