"""Reports say what was measured, by what, and why something was not."""

import re

import pytest
from microbench_examples import HEAD, impl, row
from rich.console import Console

from blackwell_kernels.microbench import plots, scores
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.report import (
    PEER_HEAD,
    cells,
    contest_lines,
    head,
    markdown,
    notes,
    page,
    peer_cells,
    score_cells,
    summary,
    terminal,
    terminal_peers,
    terminal_scores,
    timings,
    warm,
)
from blackwell_kernels.microbench.results import L2, Results, Row
from blackwell_kernels.microbench.specs import OPS

FILES = [Results.model_validate({**HEAD, "rows": [row("a"), row("b", ours=(10.0, 9.0, 11.0))]})]


def test_cells_carry_times_ratios_and_the_floor():
    found = cells(FILES[0].rows[0])
    assert found[1:3] == ["5.00", "4.20–5.80 (n=3)"]
    assert found[4:7] == ["vllm.packed_decode 9.00", "1.80x", "–"]
    assert found[9:] == ["40% (memory)", "1.0e-06", "–", "–, –", "ours"], "early files have no host time"
    one = row("a")
    one["impls"]["ours"]["host_us"], one["impls"]["vllm.packed_decode"]["host_us"] = 61.7, 102.2
    assert cells(Row.model_validate(one))[12] == "62, 102"
    assert len(found) == len(head("NVIDIA H200"))


def test_flashinfer_benchs_verdict_stands_beside_that_of_the_replays():
    """Ours is ahead by replays in the first and third row, by FlashInfer-Bench's timing in the second and third."""
    made = [eager("a", 80.0, 40.0), eager("b", 40.0, 80.0, ours=(10.0, 9.0, 11.0)), eager("c", 40.0, 60.0)]
    assert [cells(one)[head("").index("stock/ours, FIB")] for one in made] == ["0.50x", "2.00x", "1.50x"]
    assert [column.header for column in terminal(made).columns].count("stock/ours, FIB") == 1
    told = "by FlashInfer-Bench's timing, 3 cases: median 1.50x, geometric mean 1.14x, worst 0.50x, faster in 67%"
    assert told in summary(made)
    assert scores.verdicts([*made, Row.model_validate(row("d"))]) == scores.Verdicts(n=3, graph=2, fib=2, apart=2)
    score = scores.score("gdn_decode", made)
    assert (score.stock_fib.n, score.stock_fib.worst_case) == (3, "gdn_decode_state_bf16 a")
    assert score_cells(score)[2][2:] == ["stock, FIB", "3", "1.50x", "1.14x", "0.50x", "67%", "67%", "", "", ""]
    told = "disagree in 2 of 3 rows (ours is ahead in 2 by graph replays, in 2 by FlashInfer-Bench's)"
    files = [Results.model_validate({**HEAD, "rows": [one.model_dump() for one in made]})]
    assert told in timings(made)
    assert told in markdown(files)
    assert told.replace("'", "&#39;") in page(files)


def eager(case, ours_fib, stock_fib, **samples):
    one = row(case, **samples)
    one["impls"]["ours"]["fib_us"], one["impls"]["vllm.packed_decode"]["fib_us"] = ours_fib, stock_fib
    return Row.model_validate(one)


def test_rows_whose_inputs_fit_the_l2_are_marked():
    made = [Row.model_validate(row("a") | {"rotated_bytes": n}) for n in (L2 - 1, L2)]
    assert [cells(one)[0] for one in made] == ["gdn_decode_state_bf16 a (warm)", "gdn_decode_state_bf16 a"]
    assert warm(made).startswith("(warm), 1 of 2 rows: ")
    assert warm(made[1:]) == ""


def test_every_peer_has_a_line_of_its_own():
    """Packed decode is the fastest peer in two of three rows and faster than ours in one of them."""
    made = [row("a"), row("b", ours=(10.0, 9.0, 11.0)), row("c")]
    made[1]["impls"]["vllm.packed_decode"]["flag"] = "output: off"
    made[2]["impls"]["flashinfer.gdn_decode"] = {"error": "takes at most 32 rows, this case has 64"}
    made[2]["impls"]["other[tuned]"] = impl(6.0, 6.0, 6.0)
    made[2] |= {"best_peer": "other[tuned]", "ratio_best_peer": 1.2}
    rows = [Row.model_validate(one) for one in made]
    lines = [
        ["gdn_decode", "vllm.packed_decode", "3 of 3", "1.80x", "0.90x", "2", "1", "1", "0", "0"],
        ["gdn_decode", "flashinfer.gdn_decode", "0 of 3", "–", "–", "0", "0", "0", "2", "1"],
        ["gdn_decode", "other[tuned]", "1 of 1", "1.20x", "1.20x", "1", "0", "0", "0", "0"],
    ]
    assert peer_cells(rows) == lines
    assert all(len(line) == len(PEER_HEAD) for line in lines)
    console = Console(width=300)
    with console.capture() as shown:
        console.print(terminal_peers(rows))
        console.print(terminal(rows))
    assert shown.get().count("other[tuned]") == 2, "a name in brackets is no markup"
    text = markdown([Results.model_validate({**HEAD, "rows": made})])
    assert "| " + " | ".join(lines[2]) + " |" in text


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
    assert terminal_scores(FILES[0].rows).row_count == len(OPS) + 2
    assert markdown(FILES).count("| not measured |") == len(OPS) - 1


def contest_rows(definition, ratio=2.0, **changed):
    for i, case in enumerate(c for c in select(sets=("contest",)) if c.definition == definition):
        one = row(case.name, stock=3 * [5.0 * ratio]) | {"definition": definition, "op": case.spec.op}
        yield Row.model_validate(one | changed.get(str(i), {}))


def test_the_contests_score_is_a_mean_weighted_by_how_often_a_shape_occurs_and_zero_for_any_failure():
    definition = "gdn_decode_qk4_v8_d128_k_last"
    cases = [c for c in select(sets=("contest",)) if c.definition == definition]
    assert scores.contest(contest_rows(definition))[definition] == 2.0
    first = {"impls": row(stock=3 * [25.0])["impls"]}
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
    assert contest_lines(everything)[-1] == "overall: against stock 2.000 (–), against the fastest peer 2.000 (–)"
    assert contest_lines(FILES[0].rows) == []


def test_the_contests_score_is_told_of_each_baseline_by_each_timing():
    """Stock takes 2 and 3 times as long as ours by the two timings, the other peer 1.5 and 4 times."""
    definition = "gdn_decode_qk4_v8_d128_k_last"
    impls = row(stock=3 * [10.0])["impls"] | {"flashinfer.gdn_decode": impl(7.5, 7.5, 7.5)}
    for name, us in (("ours", 20.0), ("vllm.packed_decode", 60.0), ("flashinfer.gdn_decode", 80.0)):
        impls[name]["fib_us"] = us
    made = [Row.model_validate(one.model_dump() | {"impls": impls}) for one in contest_rows(definition)]
    found = scores.contests(made)
    by_hand = {"stock": {"us": 2.0, "fib_us": 3.0}, "best_peer": {"us": 1.5, "fib_us": 3.0}}
    assert {base: {by: one[definition] for by, one in timed.items()} for base, timed in found.items()} == by_hand
    assert f"{definition}: against stock 2.000 (3.000), against the fastest peer 1.500 (3.000)" in contest_lines(made)
    made[0] = Row.model_validate(
        made[0].model_dump()
        | {"impls": impls | {"vllm.packed_decode": {"error": "not here"}}, "ratio_stock": None, "ratio_best_peer": 1.5}
    )
    told = f", in 1 of {len(made)} shapes the fastest peer for want of its time, 1."
    assert any(line.startswith(f"{definition}: against stock{told}") for line in contest_lines(made))


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
