"""The comparison rules: right answers in any allowed form pass, each kind of wrong answer fails."""

from dataclasses import replace

import pytest
import torch

from blackwell_kernels.microbench import references
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.compare import _logits_bound, _selection, compare, scores
from blackwell_kernels.microbench.spec import SELECTION
from blackwell_kernels.microbench.workloads import generate


def make(definition: str, part: str = ""):
    case = next(c for c in select(sets=("cpu",)) if c.definition.startswith(definition) and part in c.name)
    inputs = generate(case)
    made = getattr(references, f"run_{case.spec.reference}")(*inputs.values())
    outputs = made if isinstance(made, tuple) else (made,)
    return case.spec, inputs, dict(zip(case.spec.outputs, outputs, strict=True))


def problems(spec, inputs, outputs, expected):
    return [c.problem for c in compare(spec, inputs, outputs, expected).values() if c.problem]


SELECTIONS = [
    ("dsa_topk2048", "context=5000"),
    ("dsa_topk2048", "context=1500"),
    ("dsa_topk_indexer", ""),
    ("dsa_pair_decode", "context=2000"),
    ("dsa_pair_decode", "context=3000"),
    ("dsa_pair_prefill", "context=2500"),
]


@pytest.mark.parametrize(("definition", "part"), SELECTIONS)
def test_a_selection_may_come_in_any_order(definition, part):
    spec, inputs, expected = make(definition, part)
    ((name, indices),) = expected.items()
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in indices])
    assert not torch.equal(shuffled, indices)
    assert problems(spec, inputs, {name: shuffled}, expected) == []


@pytest.mark.parametrize(("definition", "part"), SELECTIONS)
def test_wrong_selections_fail(definition, part):
    spec, inputs, expected = make(definition, part)
    ((name, indices),) = expected.items()
    row = indices[-1]
    valid = row[row >= 0]
    score = scores(spec, inputs)[-1]

    def wrong(change):
        bad = indices.clone()
        change(bad[-1])
        return problems(spec, inputs, {name: bad}, expected)

    assert "twice" in wrong(lambda r: r.__setitem__(0, r[1]))[0]
    assert "out of range" in wrong(lambda r: r.__setitem__(0, 1 << 20))[0]
    assert wrong(lambda r: r.__setitem__(0, -7)), "an index below -1 passes"
    assert wrong(lambda r: r.__setitem__(0, -1)), "one index fewer passes"
    left_out = [i for i in range(len(score)) if i not in set(valid.tolist())]
    assert wrong(lambda r: r.__setitem__(0, left_out[0])), "an index that should not be there passes"


def test_the_best_column_left_out_for_the_next_best_fails():
    spec, inputs, expected = make("dsa_topk2048", "context=5000")
    bad = expected["indices"].clone()
    order = scores(spec, inputs)[0].sort(descending=True).indices
    bad[0][bad[0] == order[0]] = order[2048].int()
    assert "scores differ" in problems(spec, inputs, {"indices": bad}, expected)[0]


def test_equal_scores_may_be_swapped():
    spec, inputs, expected = make("dsa_topk2048", "context=5000")
    inputs["logits"][0, : int(inputs["row_ends"][0])] = 1.0
    other = expected["indices"].clone()
    other[0] = torch.arange(2048, dtype=torch.int32) + 100
    assert problems(spec, inputs, {"indices": other}, expected) == []


def test_row_starts_shift_the_scores():
    spec, inputs, _ = make("dsa_topk2048", "causal")
    inputs["row_starts"] = torch.full_like(inputs["row_starts"], 10)
    expected = {"indices": references.run_dsa_topk(*inputs.values())}
    assert problems(spec, inputs, expected, expected) == []
    absolute = torch.where(expected["indices"] >= 0, expected["indices"] + 10, -1).int()
    assert problems(spec, inputs, {"indices": absolute}, expected)


def test_routing_may_order_experts_differently_but_not_weigh_them_so():
    for definition in ("moe_routing_grouped_topk8", "moe_routing_softmax_topk10"):
        spec, inputs, expected = make(definition, "num_tokens=65")
        flipped = {name: x.flip(-1) for name, x in expected.items()}
        assert problems(spec, inputs, flipped, expected) == []
        heavier = expected["topk_weights"].clone()
        heavier[3, 0] *= 1.01
        assert problems(spec, inputs, {**expected, "topk_weights": heavier}, expected)


def test_an_expert_of_a_dropped_group_fails():
    spec, inputs, expected = make("moe_routing_grouped_topk8", "num_tokens=65")
    dropped = scores(spec, inputs)[0].isinf().nonzero()[0, 0]
    ids = expected["topk_ids"].clone()
    ids[0, 0] = dropped.int()
    assert problems(spec, inputs, {**expected, "topk_ids": ids}, expected)


def test_close_outputs():
    spec, inputs, expected = make("moe_fp8_block", "num_tokens=33")
    out = expected["output"]
    assert problems(spec, inputs, {"output": out * 1.001}, expected) == []
    for bad in (out * 1.2, torch.zeros_like(out), out.flip(0), out.index_fill(0, torch.tensor([5]), torch.nan)):
        assert problems(spec, inputs, {"output": bad}, expected), bad
    assert "expected" in problems(spec, inputs, {"output": out.float()}, expected)[0]
    assert "expected" in problems(spec, inputs, {"output": out[:1]}, expected)[0]


def test_one_wrong_element_of_many_fails_where_all_must_match():
    spec, inputs, expected = make("dsa_sparse_attention")
    lse = expected["lse"].clone()
    lse[0, 0] += 0.1
    assert problems(spec, inputs, {**expected, "lse": lse}, expected)


def test_infinities_must_be_reproduced():
    spec, inputs, expected = make("dsa_sparse_mla_bf16", "tiny")
    inputs["indices"][2] = -1
    made = references.run_dsa_sparse_mla(*inputs.values())
    expected = dict(zip(spec.outputs, made, strict=True))
    assert expected["lse"][2].isinf().all()
    assert problems(spec, inputs, expected, expected) == []
    finite = {**expected, "lse": expected["lse"].nan_to_num(neginf=-1e30)}
    assert problems(spec, inputs, finite, expected)


def test_a_selection_by_fp8_scores_may_take_a_neighbour_and_no_more():
    rule = replace(SELECTION, atol=1e-3)
    score = torch.tensor([[1000.0, 900.0, 1.0, 0.5, -1.0, -300.0]])
    best = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    for third, fine in ((3, True), (5, False)):
        chosen = torch.tensor([[1, third, 0]], dtype=torch.int32)
        assert (_selection("indices", chosen, best, score, rule).problem is None) is fine
    strict = replace(SELECTION, atol=0.0, rtol=0.0)
    chosen = torch.tensor([[0, 1, 3]], dtype=torch.int32)
    assert _selection("indices", chosen, best, score, strict).problem is not None


@pytest.mark.parametrize("definition", ["dsa_indexer_logits_paged", "dsa_indexer_logits_ragged"])
def test_logits_may_miss_by_what_tensor_cores_lose(definition):
    spec, inputs, expected = make(definition)
    finite = expected["logits"].isfinite()
    bound = _logits_bound(inputs, expected["logits"])
    assert bound[finite].mean() < 0.02 * expected["logits"][finite].square().mean().sqrt()
    place = [int(at) for at in finite.nonzero()[7]]
    for share, fine in ((0.9, True), (1.1, False)):
        logits = expected["logits"].clone()
        logits[tuple(place)] += share * bound[tuple(place)]
        found = problems(spec, inputs, {"logits": logits}, expected)
        assert (found == []) is fine
    assert f"logits: 1 of {int(finite.sum())} elements missed" in found[0]
    assert f"the worst at {place}" in found[0]


def test_logits_of_rounded_weights_fail():
    spec, inputs, _ = make("dsa_indexer_logits_paged")
    run = references.run_dsa_logits_paged
    rounded = {**inputs, "weights": inputs["weights"].bfloat16().float()}
    found = problems(spec, inputs, {"logits": run(*rounded.values())}, {"logits": run(*inputs.values())})
    assert "similarity" in found[0]


def test_logits_beyond_a_row_are_free_and_within_it_not():
    spec, inputs, expected = make("dsa_indexer_logits_paged", "tiny")
    logits = expected["logits"].clone()
    assert logits.isinf().any()
    logits[logits.isinf()] = torch.nan
    assert problems(spec, inputs, {"logits": logits}, expected) == []
    logits[0, 0, 0] = torch.nan
    assert problems(spec, inputs, {"logits": logits}, expected)


def test_a_pool_is_compared_where_sequences_are_and_unchanged_elsewhere():
    spec, inputs, expected = make("gdn_decode_state_bf16", "batch_size=5")
    after = expected["new_state"].clone()
    assert problems(spec, inputs, {**expected, "new_state": after}, expected) == []
    after[0] = 0.0
    assert problems(spec, inputs, {**expected, "new_state": after}, expected), "a write to the padding slot passes"
    lazy = {**expected, "new_state": inputs["state"]}
    assert problems(spec, inputs, lazy, expected), "a state that was not updated passes"


def test_an_output_that_an_implementation_does_not_have_is_not_judged():
    spec, inputs, expected = make("dsa_sparse_mla_bf16", "tiny")
    assert set(compare(spec, inputs, {**expected, "lse": None}, expected)) == {"output"}
