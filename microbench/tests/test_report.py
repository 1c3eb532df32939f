"""Reports say what was measured, by what, and why something was not."""

import re

import pytest
from microbench_examples import HEAD, row

from blackwell_kernels.microbench import plots, scores
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.report import (
    cells,
    contest_lines,
    head,
    markdown,
    notes,
    page,
    summary,
    terminal,
    terminal_scores,
)
from blackwell_kernels.microbench.results import Results, Row
from blackwell_kernels.microbench.specs import OPS

FILES = [Results.model_validate({**HEAD, "rows": [row("a"), row("b", ours=(10.0, 9.0, 11.0))]})]


def test_cells_carry_times_ratios_and_the_floor():
    found = cells(FILES[0].rows[0])
    assert found[1:3] == ["5.00", "4.20–5.80 (n=3)"]
    assert found[4:6] == ["vllm.packed_decode 9.00", "1.80x"]
    assert found[8:] == ["40% (memory)", "1.0e-06", "–", "–, –", "ours"], "early files have no host time"
    one = row("a")
    one["impls"]["ours"]["host_us"], one["impls"]["vllm.packed_decode"]["host_us"] = 61.7, 102.2
    assert cells(Row.model_validate(one))[11] == "62, 102"
    assert len(found) == len(head("NVIDIA H200"))


def test_a_missing_peer_is_a_note_with_its_reason_once():
    assert notes(FILES[0].rows) == ["flashinfer.gdn_decode: flashinfer-python is not installed (2 cases)"]


def test_summary():
    text = summary(FILES[0].rows)
    assert "2 cases against stock" in text
    assert "worst 0.90x" in text
    assert "faster in 50%" in text
    assert "geometric mean 1.27x" in text
    assert summary([]) == "no case has a time for both ours and stock"


def test_markdown_and_terminal_have_every_case_and_the_provenance():
    text = markdown(FILES)
    assert text.count("| gdn_decode_state_bf16 ") == 2
    for part in ("0123456789ab", "580.1", "4.30 TB/s", "is not installed"):
        assert part in text
    assert terminal(FILES[0].rows).row_count == 2


def test_html_is_one_file():
    text = page(FILES)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert "gdn_decode on NVIDIA H200" in text
    assert "is not installed" in text
    assert "Roofline: gdn_decode" in text
    assert text.count('class="slower"') == 1


def test_every_operator_has_a_score_measured_or_not():
    told = {score.op: score for score in scores.by_op(FILES[0].rows)}
    assert tuple(told) == OPS
    mine = told["gdn_decode"]
    assert (mine.cases, mine.timed) == (2, 2)
    assert (mine.share, mine.share_worst) == pytest.approx((0.3, 0.2))
    assert (mine.stock.median, mine.stock.worst, mine.stock.win, mine.stock.clear) == pytest.approx(
        (1.35, 0.9, 0.5, 0.5)
    )
    assert mine.stock.worst_case == "gdn_decode_state_bf16 b"
    assert told["moe"].cases == 0
    assert terminal_scores(FILES[0].rows).row_count == len(OPS) + 1
    assert markdown(FILES).count("| not measured |") == len(OPS) - 1


def contest_rows(definition, ratio=2.0, **changed):
    for i, case in enumerate(c for c in select(sets=("contest",)) if c.definition == definition):
        one = row(case.name) | {"definition": definition, "op": case.spec.op, "ratio_stock": ratio}
        yield Row.model_validate(one | changed.get(str(i), {}))


def test_the_contests_score_is_a_mean_weighted_by_how_often_a_shape_occurs_and_zero_for_any_failure():
    definition = "gdn_decode_qk4_v8_d128_k_last"
    cases = [c for c in select(sets=("contest",)) if c.definition == definition]
    assert scores.contest(contest_rows(definition))[definition] == 2.0
    first = {"ratio_stock": 5.0}
    share = cases[0].count / sum(case.count for case in cases)
    weighted = scores.contest(contest_rows(definition, **{"0": first}))[definition]
    assert abs(weighted - (2.0 + 3.0 * share)) < 1e-9
    failed = {"impls": row()["impls"] | {"ours": {"error": "wrong"}}}
    assert scores.contest(contest_rows(definition, **{"3": failed}))[definition] == 0.0
    part = list(contest_rows(definition))[1:]
    assert scores.contest(part)[definition] is None, "a workload that is not measured is no success"
    assert scores.contest(contest_rows(definition))["overall"] is None
    everything = [one for name in scores.contest([]) if name != "overall" for one in contest_rows(name)]
    assert scores.contest(everything)["overall"] == 2.0
    assert contest_lines(everything)[-1] == "overall: 2.000"
    assert contest_lines(FILES[0].rows) == []


def test_published_latencies_cover_the_contest_and_show_on_a_b200_alone():
    for case in select(sets=("contest",)):
        found = Row.model_validate(row(case.name) | {"definition": case.definition})
        assert scores.published_us(found) > 0, case.name
    one = Row.model_validate(row("contest/batch_size=1") | {"definition": "gdn_decode_qk4_v8_d128_k_last"})
    assert len(cells(one, "NVIDIA B200")) == len(head("NVIDIA B200")) == len(head("NVIDIA H200")) + 1
    assert float(cells(one, "NVIDIA B200")[-1]) == round(scores.published_us(one), 2)
    assert scores.published_us(FILES[0].rows[0]) is None


def test_a_less_accurate_peer_is_marked_and_noted():
    one = row()
    one["impls"]["vllm.packed_decode"]["flag"] = "output: 1 - similarity is 1.8e-03, allowed 1e-03"
    found = Row.model_validate(one)
    assert cells(found)[4] == "vllm.packed_decode 9.00 (less accurate)"
    assert notes([found])[0].startswith("vllm.packed_decode: less accurate than ours may be: output: 1 - sim")


def test_curves_hold_what_differs_in_tokens_alone():
    rows = [
        row(f"model/qwen3-next/tp{tp}/batch_size={n}") | {"axes": {"batch_size": n}} for tp in (1, 2) for n in (1, 8)
    ]
    found = Results.model_validate({**HEAD, "rows": [one | {"bytes": 100, "flops": 50} for one in rows]})
    assert [plots.curve_of(one) for one in found.rows[:2]] == [
        ("gdn_decode_state_bf16 model/qwen3-next/tp1", 1.0),
        ("gdn_decode_state_bf16 model/qwen3-next/tp1", 8.0),
    ]
    figure = plots.latency(found)
    assert len(figure.layout.updatemenus[0].buttons) == 2
    assert sum(trace.visible for trace in figure.data) == 3, "ours, stock and the floor of the first curve"
    ours = next(trace for trace in plots.roofline(found).data if trace.name == "ours")
    assert list(ours.x) == [0.5] * 4
    assert ours.y[0] == 50 / 5.0 / 1e6
    bandwidth = Results.model_validate({**HEAD, "rows": [one | {"bytes": 100, "flops": 0} for one in rows]})
    ours = next(trace for trace in plots.roofline(bandwidth).data if trace.name == "ours")
    assert list(ours.x) == [100] * 4
