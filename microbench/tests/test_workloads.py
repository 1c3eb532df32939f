"""The generator: shapes and dtypes of the definitions, reproducible, and values a kernel may rely on."""

from dataclasses import replace

import pytest
import torch

from blackwell_kernels.microbench.cases import PAGE, select
from blackwell_kernels.microbench.spec import dtype_of, shape_of
from blackwell_kernels.microbench.workloads import generate, seed_of

CASES = select(sets=("cpu",))


def by(definition: str, part: str = ""):
    return next(c for c in CASES if c.definition.startswith(definition) and part in c.name)


def same(x, y) -> bool:
    if not isinstance(x, torch.Tensor):
        return x == y
    return torch.equal(x.contiguous().flatten().view(torch.int8), y.contiguous().flatten().view(torch.int8))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.uuid)
def test_shapes_dtypes_and_reproducibility(case):
    first, again, other = (generate(case, seed=seed) for seed in (3, 3, 4))
    axes = case.full_axes()
    assert list(first) == list(case.spec.inputs)
    for name, text in case.spec.inputs.items():
        shape = shape_of(text)
        if shape is None:
            assert isinstance(first[name], int | float | bool)
        else:
            assert list(first[name].shape) == [axes[axis] for axis in shape], name
            assert str(first[name].dtype) == f"torch.{dtype_of(text)}", name
        assert same(first[name], again[name]), f"{name} is not reproducible"
    assert not all(same(first[name], other[name]) for name in first), "another seed gives the same inputs"


def test_seeds_do_not_collide():
    assert len({seed_of(case, seed) for case in CASES for seed in range(8)}) == 8 * len(CASES)


def test_reuse_takes_the_weights_and_nothing_else():
    case = by("moe_fp8_block", "num_tokens=33")
    first = generate(case)
    second = generate(case, seed=1, reuse=first)
    assert second["w13"] is first["w13"]
    assert second["w2_scale"] is first["w2_scale"]
    assert not same(second["hidden_states"], first["hidden_states"])
    assert not same(second["topk_ids"], first["topk_ids"])


def test_cases_of_one_layer_have_the_same_weights():
    one, many = (generate(by("moe_fp8_block", f"tiny/num_tokens={n}")) for n in (1, 33))
    assert same(one["w13"], many["w13"])
    assert same(one["w2_scale"], many["w2_scale"])
    assert not same(one["w13"], generate(by("moe_fp8_block", "tiny/num_tokens=1"), seed=1)["w13"])


def test_experts():
    x = generate(by("moe_fp8_block", "num_tokens=33"))
    assert (x["w13_scale"] > 0).all()
    assert (x["w2_scale"] > 0).all()
    assert x["w13"].float().isfinite().all()
    assert all(len(set(row)) == len(row) for row in x["topk_ids"].tolist())
    torch.testing.assert_close(x["topk_weights"].sum(-1), torch.ones(33))


def test_expert_map_names_each_local_expert_once():
    x = generate(by("moe_fp8_block_ep"))
    local = x["expert_map"][x["expert_map"] >= 0]
    assert local.tolist() == list(range(x["w13"].shape[0]))


def test_contest_activations_are_what_they_were_before_quantisation():
    x = generate(by("moe_fp8_block_scale", "num_tokens=9"))
    values = x["hidden_states"].float().unflatten(-1, (-1, 128)) * x["hidden_states_scale"].t()[..., None]
    assert 0.9 < values.std() < 1.1
    assert (x["hidden_states_scale"] > 0).all()


@pytest.mark.parametrize("definition", ["dsa_indexer_logits_paged", "dsa_topk_indexer", "dsa_pair", "dsa_step"])
def test_indexer_cache_is_nan_where_nobody_may_read(definition):
    x = generate(by(definition))
    cache = x["k_cache"] if "k_cache" in x else x["k_index_cache_fp8"].squeeze(2)
    table = x["block_table"]
    assert table.unique().numel() == table.numel(), "pages are shared"
    assert table.min() >= 1
    assert table.max() < len(cache)
    used = torch.zeros(len(cache), dtype=torch.bool)
    used[table.flatten().long()] = True
    flat = cache.view(torch.uint8).view(len(cache), -1)
    values = flat[:, : PAGE * 128].contiguous().view(torch.float8_e4m3fn).float()
    scales = flat[:, PAGE * 128 :].contiguous().view(torch.float32)
    assert values[~used].isnan().all()
    assert scales[~used].isnan().all()
    assert (scales[used] > 0).all()
    keys = values[used].view(-1, PAGE, 128) * scales[used][..., None]
    assert (keys.norm(dim=-1) - 1).abs().max() < 0.05


def test_selected_entries_are_distinct_and_visible():
    for case in (by("dsa_sparse_mla_bf16", "tiny"), by("dsa_sparse_mla_fp8", "tiny")):
        x = generate(case)
        context = x["block_table"].shape[1] * PAGE
        for row in x["indices"].tolist():
            valid = [i for i in row if i >= 0]
            assert len(set(valid)) == len(valid) > 0
            assert max(valid) < context
        assert -1 in x["indices"][0], "no row with fewer entries than top_k"
        assert (x["req_id"] < len(x["block_table"])).all()


def test_topk_has_nan_beyond_the_rows():
    x = generate(by("dsa_topk2048", "context=5000"))
    columns = torch.arange(x["logits"].shape[1])
    beyond = columns >= x["row_ends"][:, None]
    assert x["logits"][beyond].isnan().all()
    assert x["logits"][~beyond].isfinite().all()
    assert beyond.any()


def test_a_case_of_uneven_routing_has_popular_experts():
    even = next(c for c in select(sets=("cpu",)) if c.definition == "moe_fp8_block" and c.tokens == 33)
    uneven = replace(even, options={"routing": "zipf"})
    ids = [generate(case)["topk_ids"] for case in (even, uneven)]
    assert all(len(set(row)) == len(row) for row in ids[1].tolist()), "an expert twice"
    most = [int(chosen.flatten().bincount().max()) for chosen in ids]
    assert most[1] > 1.5 * most[0]
    assert {c.options["routing"] for c in select(sets=("agent",)) if "routing=zipf" in c.name} == {"zipf"}


def test_a_chunk_of_several_requests_gives_each_row_the_keys_of_its_own():
    named = "agent/deepseek-v3.2/causal=True/requests=8/num_rows=200/context=4096"
    x = generate(next(case for case in select(sets=("agent",)) if case.name == named))
    starts, ends = x["row_starts"], x["row_ends"]
    assert x["logits"].shape == (200, 8 * 4096)
    assert starts.unique().tolist() == [4096 * i for i in range(8)]
    # 25 tokens of a request, the last of which sees all its keys
    assert (ends - starts).tolist() == [*range(4096 - 24, 4097)] * 8
    columns = torch.arange(x["logits"].shape[1])
    inside = (columns >= starts[:, None]) & (columns < ends[:, None])
    assert torch.equal(x["logits"].isfinite(), inside)


@pytest.mark.parametrize("definition", ["gdn_prefill_state_bf16", "gdn_decode_qk4", "gdn_prefill_qk4"])
def test_keys_and_queries_are_unit_vectors(definition):
    x = generate(by(definition))
    for name in ("q", "k"):
        assert (x[name].float().norm(dim=-1) - 1).abs().max() < 0.01


@pytest.mark.parametrize("definition", ["gdn_decode_state_bf16", "gdn_prefill_state_f32", "gdn_core_prefill"])
def test_states_live_in_distinct_slots_and_the_rest_is_nan(definition):
    x = generate(by(definition))
    slots = x["state_indices"].long()
    assert slots.min() >= 1
    assert slots.unique().numel() == slots.numel()
    others = torch.ones(len(x["state"]), dtype=torch.bool)
    others[slots] = False
    assert x["state"][others].isnan().all()
    assert x["state"][slots].isfinite().all()


def test_drafts_start_from_the_accepted_slot_and_share_none():
    for case in (by("drafts_gdn_core", "num_steps=2"), by("drafts_gdn_core", "num_steps=4")):
        x = generate(case)
        table, accepted = x["state_indices"].long(), x["num_accepted_tokens"].long()
        assert table.min() >= 1
        assert table.unique().numel() == table.numel()
        assert ((accepted >= 1) & (accepted <= table.shape[1])).all()
        assert accepted.unique().numel() > 1
        initial = table[torch.arange(len(table)), accepted - 1]
        finite = x["state"].isfinite().flatten(1).all(1)
        assert sorted(initial.tolist()) == finite.nonzero().flatten().tolist()
        assert x["cu_seqlens"].tolist() == list(range(0, table.numel() + 1, table.shape[1]))


def test_decays_are_decays():
    x = generate(by("gdn_prefill_state_bf16", "1+63+65"))
    assert (x["g"] < 0).all()
    assert x["g"].isfinite().all()
    assert ((x["beta"] > 0) & (x["beta"] < 1)).all()
    assert x["cu_seqlens"].tolist() == [0, 1, 64, 129]
    assert x["has_initial_state"].any()
    assert not x["has_initial_state"].all()
