"""The index of cases: complete axes, unique names, the contest's workloads, model shapes that exist."""

import pytest

from blackwell_kernels.microbench.cases import MODELS, SETS, all_cases, lengths, select
from blackwell_kernels.microbench.specs import OPS, SPECS

CONTEST_COUNTS = {"moe": 19, "dsa_indexer": 128, "dsa_sparse_mla": 23, "gdn_decode": 54, "gdn_prefill": 100}


def test_every_case_gives_exactly_the_variable_axes():
    for case in all_cases():
        assert set(case.axes) == {name for name, value in case.spec.axes.items() if value is None}, case.name
        assert all(isinstance(v, int) and v > 0 for v in case.axes.values()), case.name
        assert {"model", "tp", "ep", "dtype"} < set(case.full_axes())


def test_constraints_hold():
    for case in all_cases():
        axes = case.full_axes()
        for constraint in case.spec.constraints:
            assert eval(constraint, {}, axes), f"{case.uuid}: {constraint}"


def test_identifiers_are_unique():
    assert len({case.uuid for case in all_cases()}) == len(all_cases())


def test_contest_workloads_are_all_there():
    found = dict.fromkeys(CONTEST_COUNTS, 0)
    for case in select(sets=("contest",)):
        found[case.spec.op] += case.count
    assert found == CONTEST_COUNTS
    assert sum(found.values()) == 324


@pytest.mark.parametrize("name", SPECS)
def test_every_definition_has_cases_for_a_cpu_and_for_a_gpu(name):
    assert select(sets=("cpu",), definition=name)
    assert select(sets=("model", "contest"), definition=name)


def test_every_operator_file_has_cases():
    assert {case.spec.op for case in select(sets=("model",))} == set(OPS)


def test_shapes_are_the_models():
    for case in select(sets=("model", "agent")):
        model = MODELS[case.model]
        if case.definition.startswith("moe_fp8"):
            assert case.axes["intermediate_size"] * case.tp == model.intermediate
            assert case.axes["num_experts"] * case.ep == model.experts
        if "gdn" in case.definition and "qkv_size" in case.axes:
            assert case.axes["qkv_size"] * case.tp == (2 * model.gdn_heads + model.gdn_v_heads) * 128
        if case.definition.startswith("dsa_sparse_mla"):
            assert case.axes["num_heads"] * case.tp == model.mla_heads


def test_heads_of_every_tensor_parallel_size_are_measured():
    heads = {case.axes["num_heads"] for case in select(sets=("model",)) if case.definition == "dsa_sparse_mla_bf16"}
    assert heads == {16, 32, 64, 128}


def test_decode_is_served_from_graphs_prefill_and_what_is_too_large_are_not():
    found = {(case.definition, case.name): case.graphed for case in select(sets=("model", "contest"))}
    qwen, deepseek = "model/qwen3-next", "model/deepseek-v3.2"
    for definition, name in (
        ("gdn_decode_state_bf16", f"{qwen}/batch_size=64"),
        ("dsa_step_decode", f"{deepseek}/batch_size=8/context=32768"),
        ("dsa_topk2048", f"{deepseek}/num_rows=32/context=32768"),
        ("moe_fp8_block", f"{qwen}/num_tokens=256"),
    ):
        assert found[definition, name], name
    for definition, name in (
        ("gdn_prefill_state_bf16", f"{qwen}/lengths=1x256"),
        ("gdn_prefill_qk4_v8_d128_k_last", "contest/total_seq_len=6/num_seqs=1"),
        ("dsa_indexer_logits_ragged", f"{deepseek}/num_rows=256/context=8192"),
        ("dsa_topk2048", f"{deepseek}/causal=True/num_rows=256/context=32768"),
        ("moe_fp8_block", f"{qwen}/num_tokens=1024"),
    ):
        assert not found[definition, name], name


def test_select_narrows():
    assert {c.spec.op for c in select(sets=SETS, op="moe_routing")} == {"moe_routing"}
    assert all("tp8" in c.name for c in select(sets=SETS, case="*/tp8/*"))
    assert select(sets=SETS, case="tp8/num_tokens=1")
    assert not select(sets=SETS, case="no such case")


@pytest.mark.parametrize(("text", "expected"), [("1x70", [70]), ("3x5", [5, 5, 5]), ("1+2x3", [1, 3, 3])])
def test_lengths(text, expected):
    assert lengths(text) == expected
