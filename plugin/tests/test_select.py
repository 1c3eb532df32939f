from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blackwell_kernels import env, select
from blackwell_kernels.common import tables
from blackwell_kernels.errors import TableError, UnsupportedInputError

CASE = {"heads": 16, "state": "bf16"}


@pytest.fixture(autouse=True)
def h200(tmp_path, monkeypatch):
    """An H200 and no tables but those a test writes under tmp_path."""
    monkeypatch.setattr(select, "_device", lambda index: ("NVIDIA H200", 90))
    monkeypatch.setattr(tables, "load", functools.partial(tables.load, root=tmp_path))
    select._decide.cache_clear()
    yield
    select._decide.cache_clear()


def test_on_a_cpu_ours_serves():
    policy = select.policy("moe", CASE, "cpu")
    assert (policy.impl, policy.use_ours(1)) == ("cpu", True)


def test_thresholds_come_from_the_table(make_table, tmp_path):
    rows = [(CASE, 1, "triton"), (CASE, 8, "triton"), (CASE, 64, "stock"), (CASE, 512, "triton")]
    tables.write("gdn", make_table("gdn_decode", rows), tmp_path)
    policy = select.policy("gdn_decode", CASE, "cuda")
    assert policy.impl == "mixed"
    assert policy.reason == "measured on h200: ours up to 8 tokens, stock up to 64 tokens, then ours, to 2048 tokens"
    expected = {0: True, 1: True, 2: True, 8: True, 9: False, 64: False, 65: True, 2048: True, 2049: False}
    assert {tokens: policy.use_ours(tokens) for tokens in expected} == expected


@pytest.mark.parametrize(
    ("use", "impl", "who"),
    [("triton", "triton", "ours is faster, to 256 tokens"), ("stock", "stock", "stock is faster")],
)
def test_one_answer_everywhere(make_table, tmp_path, use, impl, who):
    tables.write("moe", make_table("moe", [(CASE, 1, use), (CASE, 64, use)]), tmp_path)
    policy = select.policy("moe", CASE, "cuda:1")
    assert (policy.impl, policy.reason) == (impl, f"measured on h200: {who}")
    assert {policy.use_ours(tokens) for tokens in (1, 64, 256)} == {use == "triton"}


def test_far_more_tokens_than_were_measured_stay_with_stock_until_asked(make_table, tmp_path, monkeypatch):
    tables.write("moe", make_table("moe", [(CASE, 1, "triton"), (CASE, 64, "triton")]), tmp_path)
    assert [select.policy("moe", CASE, "cuda").use_ours(tokens) for tokens in (256, 257, 8192)] == [True, False, False]
    monkeypatch.setenv("BLACKWELL_KERNELS_UNMEASURED", "1")
    select._decide.cache_clear()
    assert select.policy("moe", CASE, "cuda").use_ours(8192)


def test_rows_of_other_calls_decide_nothing(make_table, tmp_path):
    rows = [(CASE, 8, "triton"), (CASE, 64, "stock"), (CASE, 200, "triton")]
    tables.write("moe", make_table("moe", rows), tmp_path)
    asked = {tokens: select.policy("moe", CASE, "cuda").use_ours(tokens) for tokens in (8, 64, 65, 800)}
    assert asked == {8: True, 64: False, 65: True, 800: True}
    few = select.policy("moe", CASE, "cuda", most=64)
    assert few.reason == "measured on h200: ours up to 8 tokens, then stock"
    assert [few.use_ours(tokens) for tokens in (8, 64, 65, 800)] == [True, False, False, False]
    fewer = select.policy("moe", CASE, "cuda", most=8)
    assert [fewer.use_ours(tokens) for tokens in (8, 32, 33)] == [True, True, False], "up to four times the largest"
    assert select.policy("moe", CASE, "cuda", most=4).reason.startswith("not measured on h200 for")


def test_rows_of_a_tuner_are_no_measurement(make_table, tmp_path, monkeypatch):
    table = make_table("moe", [(CASE, 64, "stock")])
    row = table.rows[0].model_copy(update={"stock_us": None})
    tables.write("moe", table.model_copy(update={"rows": (row,)}), tmp_path)
    assert select.policy("moe", CASE, "cuda").reason.startswith("not measured on h200 for")
    monkeypatch.setenv("BLACKWELL_KERNELS_UNMEASURED", "1")
    select._decide.cache_clear()
    assert select.policy("moe", CASE, "cuda").impl == "triton"


def test_kernels_that_changed_since_they_were_measured_decide_nothing(make_table, tmp_path, monkeypatch):
    table = make_table("moe", [(CASE, 8, "triton"), (CASE, 64, "triton")])
    old, new = table.rows[0].model_copy(update={"kernels": "0" * 12}), table.rows[1]
    tables.write("moe", table.model_copy(update={"rows": (old, new)}), tmp_path)
    policy = select.policy("moe", CASE, "cuda")
    assert [policy.use_ours(tokens) for tokens in (8, 64)] == [False, True]
    tables.write("moe", table.model_copy(update={"rows": (old,)}), tmp_path)
    select._decide.cache_clear()
    policy = select.policy("moe", CASE, "cuda")
    assert (policy.impl, policy.use_ours(8)) == ("stock", False)
    assert policy.reason.startswith("not measured on h200 since its kernels changed (last at 1)")
    monkeypatch.setenv("BLACKWELL_KERNELS_UNMEASURED", "1")
    select._decide.cache_clear()
    assert select.policy("moe", CASE, "cuda").use_ours(8)


uses = st.sampled_from(["triton", "stock"])


@given(
    rows=st.dictionaries(st.tuples(st.sampled_from([8, 16]), st.integers(1, 5000)), uses, min_size=1, max_size=12),
    tokens=st.integers(0, 6000),
)
def test_a_policy_agrees_with_the_table_it_was_made_from(make_table, tmp_path_factory, rows, tokens):
    root = tmp_path_factory.mktemp("tables")
    wanted = make_table("gdn_prefill", [({"heads": heads}, count, use) for (heads, count), use in rows.items()])
    tables.write("gdn", wanted, root)
    tables.load.keywords["root"] = root  # the fixture's partial
    select._decide.cache_clear()
    for heads in (8, 16):
        row = wanted.lookup({"heads": heads}, tokens)
        ours = select.policy("gdn_prefill", {"heads": heads}, "cuda").use_ours(tokens)
        near = row is not None and tokens <= select.BEYOND * row.tokens
        assert ours == (near and row.use == "triton")


def test_an_unmeasured_gpu_stays_with_stock_until_asked(monkeypatch):
    monkeypatch.setattr(select, "_device", lambda index: ("NVIDIA B200", 100))
    policy = select.policy("moe", CASE, "cuda")
    assert (policy.impl, policy.use_ours(64)) == ("stock", False)
    assert policy.reason.startswith("not measured on b200")
    assert env.UNMEASURED.name in policy.reason
    monkeypatch.setenv(env.UNMEASURED.name, "1")
    policy = select.policy("moe", CASE, "cuda")
    assert (policy.impl, policy.use_ours(64)) == ("triton", True)
    assert policy.reason.startswith("not measured on b200")


def test_an_unmeasured_case_of_a_measured_gpu_names_the_case(make_table, tmp_path):
    tables.write("moe", make_table("moe", [(CASE, 1, "triton")]), tmp_path)
    policy = select.policy("moe", {**CASE, "heads": 32}, "cuda")
    assert policy.impl == "stock"
    assert policy.reason.startswith("not measured on h200 for heads=32, state=bf16")


def test_disable_wins_over_force_and_force_over_the_table(make_table, tmp_path, monkeypatch):
    tables.write("moe", make_table("moe", [(CASE, 1, "stock")]), tmp_path)
    monkeypatch.setenv(env.FORCE.name, "moe")
    policy = select.policy("moe", CASE, "cuda")
    assert (policy.impl, policy.use_ours(1)) == ("triton", True)
    monkeypatch.setenv(env.DISABLE.name, "all")
    policy = select.policy("moe", CASE, "cuda")
    assert (policy.impl, policy.use_ours(1), policy.reason) == ("stock", False, f"disabled by {env.DISABLE.name}")
    assert select.policy("moe", CASE, "cpu").impl == "stock"


def test_an_old_gpu_is_not_forced(monkeypatch):
    monkeypatch.setattr(select, "_device", lambda index: ("NVIDIA A100-SXM4-80GB", 80))
    monkeypatch.setenv(env.FORCE.name, "all")
    policy = select.policy("moe", CASE, "cuda")
    assert policy.impl == "stock"
    assert policy.reason.startswith("NVIDIA A100-SXM4-80GB is not")


def test_a_policy_is_decided_once(make_table, tmp_path):
    tables.write("moe", make_table("moe", [(CASE, 1, "triton")]), tmp_path)
    first = select.policy("moe", CASE, "cuda")
    assert select.policy("moe", dict(reversed(CASE.items())), "cuda") is first


def test_a_corrupt_table_is_an_error_that_names_the_file(make_table, tmp_path):
    path = tables.write("moe", make_table("moe", [(CASE, 1, "triton")]), tmp_path)
    path.write_text("{")
    with pytest.raises(TableError, match=str(path)):
        select.policy("moe", CASE, "cuda")


def test_an_unknown_operator_is_an_error():
    with pytest.raises(UnsupportedInputError, match="did you mean 'gdn_decode'"):
        select.policy("gdn_decod", CASE, "cpu")


def test_summary_of_parts() -> None:
    ours, stock = select.Policy("triton", "ours"), select.Policy("stock", "stock")
    assert select.summary({"decode": ours, "prefill": ours}) == ("triton", "ours")
    assert select.summary({"decode": ours, "prefill": stock}) == ("mixed", "decode: ours; prefill: stock")
