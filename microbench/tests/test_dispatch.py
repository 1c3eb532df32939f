"""From results to the plugin's tables: the keys its hooks ask with, ours only where it was never slower."""

from types import SimpleNamespace

import pytest
from microbench_examples import HEAD, impl, row

from blackwell_kernels import env
from blackwell_kernels.common import tables
from blackwell_kernels.microbench import dispatch, launched
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.implementations import implementations, stock
from blackwell_kernels.microbench.results import Results, load, path_of, write
from blackwell_kernels.model_patches import indexer


def measured(case, ours, theirs):
    """A results row of `case`; None: no time."""
    impls = {i.name: {"error": "left out"} for i in implementations(case.spec.name)}
    name = stock(case, 90)
    if ours:
        impls["ours"] = impl(ours, ours, ours)
    if theirs:
        impls[name] = impl(theirs, theirs, theirs)
    base = row()
    extra = {"op": case.spec.op, "definition": case.spec.name, "case": case.name, "axes": case.full_axes()}
    extra["kernels"] = launched.of(case, "h200")
    ratios = {"best_peer": name if theirs else None, "ratio_stock": None, "ratio_best_peer": None}
    return {**base, **extra, **ratios, "impls": impls, "stock": name, "dispatched": name, "floor_us": 0.1}


def results_of(*rows):
    return [Results.model_validate({**HEAD, "rows": list(rows)})]


def pick(definition, part):
    return next(c for c in select(sets=("model", "agent")) if c.definition == definition and part in c.name)


def axes_of(case) -> dict[str, tables.Scalar]:
    key = dispatch.key_of(case)
    assert key is not None
    return key[1]


def decided(case, tokens, root) -> tables.Row:
    """The row of gdn_decode's table that serves so many tokens."""
    table = tables.load("gdn", "gdn_decode", "h200", root)
    assert table is not None
    row = table.lookup(axes_of(case), tokens)
    assert row is not None
    return row


def test_every_model_case_but_chains_and_parts_decides_an_operator():
    for case in select(sets=("model", "agent")):
        key = dispatch.key_of(case)
        if case.spec.op in ("dsa_pair", "dsa_step") or case.spec.op.endswith("_parts"):
            assert key is None
            continue
        assert key is not None, case.name
        assert key[0] in env.HOOK_OPS
        tables.Row(case=key[1], tokens=case.tokens, config={}, use="stock")  # scalars only
    assert all(dispatch.key_of(case) is None for case in select(sets=("contest",)))


def test_rows_of_one_table_have_the_same_axes():
    axes: dict[str, set] = {}
    for case in select(sets=("model", "agent")):
        key = dispatch.key_of(case)
        if key is not None:
            axes.setdefault(key[0], set()).add(tuple(sorted(key[1])))
    assert {op: len(found) for op, found in axes.items()} == dict.fromkeys(env.HOOK_OPS, 1)


def test_decode_of_topk_was_measured_up_to_the_rows_that_its_hook_goes_by():
    cases = select(sets=("model", "agent"), definition="dsa_topk2048")
    rows = {causal: [c.tokens for c in cases if c.options["causal"] is causal] for causal in (False, True)}
    assert max(rows[False]) == indexer.DECODE_ROWS < min(rows[True]), "a smaller chunk would decide for decodes"


def test_keys_are_those_of_the_hooks():
    moe_routing = pytest.importorskip("blackwell_kernels.model_patches.moe_routing")
    grouped = SimpleNamespace(
        num_expert_group=8, topk_group=4, scoring_func="sigmoid", e_score_correction_bias=0, top_k=8
    )
    case = pick("moe_routing_grouped_topk8", "")
    assert dispatch.key_of(case) == ("moe_routing", moe_routing.case(grouped, 256))
    softmax = SimpleNamespace(scoring_func="softmax", top_k=10, use_grouped_topk=False)
    case = pick("moe_routing_softmax_topk10", "")
    assert dispatch.key_of(case) == ("moe_routing", moe_routing.case(softmax, 512))


def test_the_served_call_decides_gdn():
    fused, bare = pick("gdn_core_decode", "tp4"), pick("gdn_decode_state_bf16", "tp4")
    sizes = {"num_k_heads": 4, "num_v_heads": 8, "head_size": 128, "state_dtype": "bfloat16", "multi_token": False}
    assert dispatch.key_of(fused) == ("gdn_decode", {**sizes, "fused_conv": True})
    assert dispatch.key_of(bare) == ("gdn_decode", {**sizes, "fused_conv": False})
    drafts = pick("drafts_gdn_core_bf16", "tp4")
    assert dispatch.key_of(drafts) == ("gdn_decode", {**sizes, "fused_conv": True, "multi_token": True})
    chain, alone = pick("gdn_core_prefill", "lengths=1x2048"), pick("gdn_prefill_state_bf16", "lengths=1x2048")
    assert dispatch.key_of(chain) == dispatch.key_of(alone)
    rows = dispatch.table_rows(results_of(measured(alone, 10.0, 20.0), measured(chain, 30.0, 20.0)))
    assert [r.use for r in rows["gdn_prefill"]] == ["stock"], "the chain the plugin runs was slower"


@pytest.mark.parametrize(
    ("ours", "theirs", "use"),
    [(5.0, 6.0, "triton"), (5.0, 5.0, "triton"), (5.1, 5.0, "stock"), (None, 5.0, "stock"), (5.0, None, "stock")],
)
def test_ours_only_where_it_was_measured_not_slower(ours, theirs, use):
    case = pick("gdn_decode_state_bf16", "tp4")
    (made,) = dispatch.table_rows(results_of(measured(case, ours, theirs)))["gdn_decode"]
    assert made.use == use
    assert (made.ours_us, made.stock_us, made.tokens) == (ours, theirs, case.tokens)


def test_the_fastest_peer_stands_in_for_a_stock_that_has_no_time():
    case = pick("gdn_prefill_state_bf16", "lengths=1x2048")
    for other, use in ((9.0, "triton"), (7.0, "stock")):
        raw = measured(case, 8.0, None)
        raw["impls"]["vllm.fla_chunk"] = impl(other, other, other)
        (made,) = dispatch.table_rows(results_of(raw))["gdn_prefill"]
        assert (made.use, made.stock_us) == (use, other)


def test_the_worst_of_several_measurements_of_one_case_decides():
    rows = [pick("gdn_prefill_state_bf16", f"tp4/lengths={lens}") for lens in ("1x8192", "8x1024", "32x256")]
    fast = results_of(*(measured(c, 10.0, 20.0) for c in rows))
    assert [r.use for r in dispatch.table_rows(fast)["gdn_prefill"]] == ["triton", "triton"]
    mixed = results_of(measured(rows[0], 10.0, 20.0), measured(rows[1], 10.0, 9.0), measured(rows[2], 10.0, 30.0))
    one, many = dispatch.table_rows(mixed)["gdn_prefill"]
    assert (one.case["sequences"], one.use) == ("one", "triton"), "a sequence by itself is a case of its own"
    assert (many.use, many.ours_us, many.stock_us) == ("stock", 10.0, 9.0)


def test_a_fiftieth_is_given_where_it_wins_more_elsewhere():
    rows = [pick("gdn_prefill_state_bf16", f"tp4/lengths={lens}") for lens in ("8x1024", "32x256")]
    for theirs, use in (((9.85, 20.0), "triton"), ((9.75, 20.0), "stock"), ((9.85, 10.1), "stock")):
        found = results_of(*(measured(case, 10.0, us) for case, us in zip(rows, theirs, strict=True)))
        (made,) = dispatch.table_rows(found)["gdn_prefill"]
        assert (made.use, made.ours_us, made.stock_us) == (use, 10.0, theirs[0])


def test_a_decision_holds_while_all_that_it_rests_on_launches_what_was_measured():
    cases = [pick("gdn_prefill_state_bf16", f"tp4/lengths={lens}") for lens in ("8x1024", "32x256")]
    rows = [measured(case, 10.0, 20.0) for case in cases]
    for then, kernels in ((rows[0]["kernels"], tables.kernels_of("gdn")), ("other", "")):
        found = results_of({**rows[0], "kernels": then}, rows[1])
        assert [r.kernels for r in dispatch.table_rows(found)["gdn_prefill"]] == [kernels]


def test_tables_are_written_and_found_by_lookup(tmp_path):
    cases = [c for c in select(sets=("model",)) if c.definition == "gdn_core_decode" and c.tp == 4]
    rows = [measured(c, 10.0, 20.0 if c.tokens <= 32 else 5.0) for c in cases]
    (path,) = dispatch.write_tables(results_of(*rows), root=tmp_path)
    assert path == tmp_path / "gdn" / "configs" / "h200" / "gdn_decode.json"
    assert [decided(cases[0], n, tmp_path).use for n in (1, 2, 32, 33, 10**6)] == ["triton"] * 3 + ["stock"] * 2
    table = tables.load("gdn", "gdn_decode", "h200", tmp_path)
    assert table is not None
    assert table.provenance.command == HEAD["command"]
    assert table.provenance.n == 3


def test_a_table_names_the_runs_that_its_rows_came_from(tmp_path):
    decode, fused = pick("gdn_decode_state_bf16", "tp4"), pick("gdn_core_decode", "tp4")
    experts = pick("moe_fp8_block", "qwen3-next/num_tokens=1")
    runs = [results_of(measured(case, 5.0, 6.0))[0] for case in (decode, fused, experts)]
    for run, command in zip(runs, ("one", "two", "three"), strict=True):
        run.command = command
    paths = dispatch.write_tables(runs, root=tmp_path)
    found = {p.stem: tables.load(p.parts[-4], p.stem, "h200", tmp_path).provenance.command for p in paths}
    assert found == {"gdn_decode": "one; two", "moe": "three"}


def test_tuned_configurations_survive(tmp_path):
    case = pick("gdn_core_decode", "tp4/batch_size=8")
    key, provenance = axes_of(case), {k: HEAD[k] for k in ("gpu", "sm", "driver", "torch", "triton", "vllm")}
    tuned: dict[str, tables.Scalar] = {"block_v": 32, "splits": 1, "num_warps": 4}
    old = tables.Table(
        schema=1,
        op="gdn_decode",
        provenance=tables.Provenance(**provenance, commit="c", date="2026-01-01", command="tune", n=5),
        rows=(
            tables.Row(case=key, tokens=2, config={}, use="stock"),
            tables.Row(case=key, tokens=8, config=tuned, use="stock"),
            tables.Row(case=key, tokens=512, config=tuned, use="stock", kernels=tables.kernels_of("gdn")),
            tables.Row(case=key, tokens=1024, config={}, use="stock"),
        ),
    )
    tables.write("gdn", old, tmp_path)
    dispatch.write_tables(results_of(measured(case, 4.0, 8.0)), root=tmp_path)
    assert (decided(case, 8, tmp_path).config, decided(case, 8, tmp_path).use) == (tuned, "triton")
    assert decided(case, 512, tmp_path).config == tuned
    assert (decided(case, 8, tmp_path).kernels, decided(case, 512, tmp_path).kernels) == (tables.kernels_of("gdn"), "")
    # a row that says nothing is gone: the next size that was measured serves what it served
    assert (decided(case, 2, tmp_path).tokens, decided(case, 2, tmp_path).use) == (8, "triton")
    # but behind all that was measured it stays
    assert (decided(case, 1000, tmp_path).tokens, decided(case, 1000, tmp_path).use) == (1024, "stock")


def test_a_measured_row_of_experts_gets_the_configuration_that_ran(tmp_path):
    """That of a row for more tokens down to half of these, as the plugin does; below the heuristic's, which is {}."""
    cases = [pick("moe_fp8_block_ep", f"deepseek-v3.2/ep8/num_tokens={tokens}") for tokens in (2000, 4096)]
    key, provenance = axes_of(cases[0]), {k: HEAD[k] for k in ("gpu", "sm", "driver", "torch", "triton", "vllm")}
    searched: dict[str, tables.Scalar] = {"block_t": 128, "gate_up_t": 128}
    old = tables.Table(
        schema=1,
        op="moe",
        provenance=tables.Provenance(**provenance, commit="c", date="2026-01-01", command="tune", n=5),
        rows=(tables.Row(case=key, tokens=8192, config=searched, use="triton"),),
    )
    tables.write("moe", old, tmp_path)
    for _ in range(2):  # and it stays so
        dispatch.write_tables(results_of(*(measured(case, 4.0, 8.0) for case in cases)), root=tmp_path)
        table = tables.load("moe", "moe", "h200", tmp_path)
        assert {row.tokens: row.config for row in table.rows} == {2000: {}, 4096: searched, 8192: searched}


def test_an_operator_without_a_time_is_left_to_stock_and_keeps_no_other_from_its_table(tmp_path):
    (decode, *_), (prefill, *_) = (
        [c for c in select(sets=("model",)) if c.definition == name] for name in ("gdn_core_decode", "gdn_core_prefill")
    )
    found = [*results_of(measured(decode, None, None)), *results_of(measured(prefill, 4.0, 8.0))]
    written = dispatch.write_tables(found, root=tmp_path)
    assert [path.stem for path in written] == ["gdn_decode", "gdn_prefill"]
    dispatched = [dispatch.by_tables(one.rows[0], "h200", tmp_path) for one in found]
    assert dispatched == [found[0].rows[0].stock, "ours"]


def test_nothing_measured_writes_nothing(tmp_path):
    assert dispatch.write_tables([], root=tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_stored_results_say_what_the_tables_decide(tmp_path):
    fast, slow = pick("gdn_core_decode", "tp4/batch_size=8"), pick("gdn_core_decode", "tp4/batch_size=64")
    contest = next(c for c in select(sets=("contest",)) if c.spec.op == "gdn_decode")
    kept, configs = tmp_path / "results", tmp_path / "tables"
    (core,) = results_of(measured(fast, 4.0, 8.0), measured(slow, 9.0, 8.0))
    (other,) = results_of(measured(contest, 1.0, 8.0))
    for name, found in (("gdn_core", core), ("gdn_decode", other)):
        write(path_of("h200", name, kept), found)
    assert dispatch.audit(core, configs) == [], "no table, so stock"
    dispatch.apply("h200", results_root=kept, root=configs)
    after = load(path_of("h200", "gdn_core", kept))
    assert [r.dispatched for r in after.rows] == ["ours", core.rows[1].stock]
    assert dispatch.audit(after, configs) == []
    assert "the tables say ours" in dispatch.audit(core, configs)[0]
    assert load(path_of("h200", "gdn_decode", kept)).rows[0].dispatched == other.rows[0].stock


@pytest.mark.parametrize(
    ("kind", "logits", "shape"),
    [("decode", "paged", "batch_size=8/context=4096"), ("prefill", "ragged", "num_rows=1000/context=8192")],
)
def test_a_pair_is_ours_when_logits_and_selection_are(kind, logits, shape, tmp_path):
    (found,) = results_of(measured(pick(f"dsa_pair_{kind}", shape), 5.0, 10.0))
    parts = [
        pick(f"dsa_indexer_logits_{logits}", shape),
        pick("dsa_topk2048", "/" + shape.replace("batch_size", "num_rows")),
    ]
    for count in (1, 2):
        dispatch.write_tables(results_of(*(measured(c, 5.0, 10.0) for c in parts[:count])), root=tmp_path)
        assert dispatch.by_tables(found.rows[0], "h200", tmp_path) == ("ours" if count == 2 else found.rows[0].stock)


def test_a_decode_step_is_ours_when_all_its_operators_are(tmp_path):
    step = pick("dsa_step_decode", "tp8/batch_size=8/context=4096")
    (found,) = results_of(measured(step, 5.0, 10.0))
    parts = [
        pick("dsa_indexer_logits_paged", "batch_size=8/context=4096"),
        pick("dsa_topk2048", "num_rows=8/context=4096"),
        pick("dsa_sparse_mla_bf16", "tp8/num_tokens=8"),
    ]
    for count in (2, 3):
        dispatch.write_tables(results_of(*(measured(c, 5.0, 10.0) for c in parts[:count])), root=tmp_path)
        assert dispatch.by_tables(found.rows[0], "h200", tmp_path) == ("ours" if count == 3 else found.rows[0].stock)
