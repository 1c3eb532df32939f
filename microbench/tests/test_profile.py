"""The checklist: order, thresholds, exceptions, ranking, what fails, what changed, and the command around it."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from microbench_examples import HEAD, row
from typer.testing import CliRunner

from blackwell_kernels import env
from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing.inventory import kernels
from blackwell_kernels.common.testing.statistics import Statistics
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import precompile, profile_cli, profile_report, profile_run, profiling
from blackwell_kernels.microbench.counters import Launch
from blackwell_kernels.microbench.profiling import Facts, checklist, failures
from blackwell_kernels.microbench.results import Ceilings, Results, Row, write
from blackwell_kernels.microbench.specs import OPS
from blackwell_kernels.microbench.traces import Kernel, Trace

ORDER = [
    "duration", "occupancy", "registers", "shared", "spills", "tensor", "memory", "l2", "loads", "divergence", "mix",
    "launch", "bound", "spread",
]  # fmt: skip
KERNEL = Statistics(
    kernel="scan",
    arch=90,
    target="sm_90a",
    grid=(64,),
    warps=4,
    registers=64,
    stack=0,
    shared=1024,
    tmem=0,
    traps=0,
    mma=(),
    tma=0,
    tensormap_replace=0,
    instructions=600,
    mma_loop=0,
)
COUNTED = Launch(
    "scan",
    {
        "duration_ns": 5000.0,
        "occupancy_pct": 80.0,
        "tensor_pct": 0.0,
        "l2_hit_pct": 50.0,
        "load_efficiency_pct": 100.0,
        "store_efficiency_pct": 90.0,
        "threads_per_instruction": 31.5,
    },
)
TRACE = Trace(kernels=[Kernel(name="scan", us=5.0, blocks=64, threads=128)], host_us=9.0, launch_us=2.0, gap_us=None)
CEILINGS = Ceilings(copy_tbps=4.0, fp8_tflops=1000.0, bf16_tflops=500.0, launch_us=0.2)


def facts(**changed):
    one = Row.model_validate(row() | {"bytes": 16_000_000, "flops": 1000, "floor_us": 4.0})
    known = {
        "kernels": [KERNEL],
        "row": one,
        "launches": [COUNTED],
        "trace": TRACE,
        "ceilings": CEILINGS,
        "shares": {"a": 0.8, "b": 0.5},
    }
    return Facts(**{**known, **changed})


def verdicts(some):
    return {check.id: check.verdict for check in checklist(some)}


def test_the_checklist_has_its_order_and_says_how_each_value_came_about():
    checks = checklist(facts())
    assert [check.id for check in checks] == ORDER
    assert {check.verdict for check in checks} == {"ok", "excepted"}, "tensor and L2 are for cases bound by compute"
    assert all(check.how for check in checks)
    values = {check.id: check.value for check in checks}
    assert (values["duration"], values["bound"], values["launch"], values["spread"]) == (5.0, 80.0, 4.0, 50.0)
    assert values["memory"] == pytest.approx(80.0)
    assert failures(facts(), checks) == []


@pytest.mark.parametrize(
    ("changed", "check", "verdict"),
    [
        ({"kernels": [replace(KERNEL, stack=16)]}, "spills", "failed"),
        ({"kernels": [replace(KERNEL, stack=16)], "allowed": {"scan": 16}}, "spills", "ok"),
        ({"kernels": [replace(KERNEL, stack=24)], "allowed": {"scan": 16}}, "spills", "failed"),
        ({"kernels": [replace(KERNEL, registers=255)]}, "registers", "finding"),
        ({"kernels": [replace(KERNEL, shared=300_000)]}, "shared", "failed"),
        ({"launches": [Launch("scan", {**COUNTED.values, "occupancy_pct": 12.0})]}, "occupancy", "finding"),
        ({"launches": [Launch("scan", {**COUNTED.values, "store_efficiency_pct": 40.0})]}, "loads", "finding"),
        ({"launches": [Launch("scan", {**COUNTED.values, "threads_per_instruction": 9.0})]}, "divergence", "finding"),
        ({"shares": {"a": 0.8, "b": 0.1}}, "spread", "finding"),
        ({"shares": {}}, "spread", "not measured"),
    ],
)
def test_each_threshold(changed, check, verdict):
    assert verdicts(facts(**changed))[check] == verdict


def test_launch_overhead_is_measured_and_says_what_it_is_made_of():
    two = TRACE.model_copy(update={"kernels": 2 * TRACE.kernels, "host_us": 40.0, "graph_gap_us": 0.8, "gap_us": 6.0})
    check = next(c for c in checklist(facts(trace=two)) if c.id == "launch")
    assert (check.value, check.verdict) == (30.0, "finding")
    assert check.gain == pytest.approx(30.0 / 35.0)
    assert "CUPTI" in check.how
    assert check.detail == {
        "launches": 2, "host µs a launch": 20.0, "kernels µs": 10.0, "launch function µs": 2.0, "gap µs, eager": 6.0,
        "gap µs, in a graph": 0.8,
    }  # fmt: skip
    graphed = next(c for c in checklist(facts(trace=two, graphed=True)) if c.id == "launch")
    assert (graphed.value, graphed.verdict, graphed.gain) == (30.0, "excepted", None), "told, but nothing to gain there"
    refused = TRACE.model_copy(update={"no_graph": "RuntimeError: cannot capture"})
    check = next(c for c in checklist(facts(trace=refused)) if c.id == "launch")
    assert check.why == "no graph: RuntimeError: cannot capture"


def test_what_ncu_counted_stands_beside_what_the_compiler_and_the_bounds_say():
    counted = {"local_loads": 7.0, "local_stores": 0.0, "dram_read_bytes": 3e7, "dram_write_bytes": 1e7}
    made = {c.id: c for c in checklist(facts(launches=[Launch("scan", counted), Launch("other", counted)]))}
    assert made["spills"].detail == {"local_loads": 7.0, "local_stores": 0.0}
    assert made["memory"].detail["DRAM bytes by ncu"] == 8e7
    assert "DRAM bytes by ncu" not in {c.id: c for c in checklist(facts())}["memory"].detail


def test_exceptions_say_why():
    low = Launch("scan", {**COUNTED.values, "occupancy_pct": 12.0, "load_efficiency_pct": 10.0})
    made = {c.id: c for c in checklist(facts(kernels=[replace(KERNEL, mma=("fp8",), tma=2)], launches=[low]))}
    assert made["occupancy"].verdict == made["loads"].verdict == "excepted"
    assert "tensor-core kernels" in made["occupancy"].why
    assert "TMA" in made["loads"].why
    small = CEILINGS.model_copy(update={"launch_us": 3.0})
    assert {c.id: c for c in checklist(facts(ceilings=small, launches=[low]))}["occupancy"].verdict == "excepted"


def test_what_was_not_measured_says_why_and_is_never_zero():
    bare = Facts(
        no_kernels="CompilationError: no",
        no_row="no GPU is here",
        no_counters="ncu is not installed",
        no_trace="the trace has no kernels",
    )
    checks = checklist(bare)
    assert [check.id for check in checks] == ORDER
    assert {check.verdict for check in checks} == {"not measured"}
    assert {check.value for check in checks} == {None}
    whys = {check.id: check.why for check in checks}
    assert whys["occupancy"] == "not measured: ncu is not installed"
    assert whys["duration"] == "not measured: no GPU is here"
    assert whys["launch"] == "not measured: the trace has no kernels"
    assert failures(bare, checks) == ["no kernel of ours: CompilationError: no"]
    partial = {c.id: c for c in checklist(facts(launches=[Launch("scan", {"duration_ns": 1.0})]))}
    assert partial["occupancy"].why == "not measured: ncu has no occupancy_pct for it"


def test_a_call_without_kernels_of_ours_and_one_that_does_not_run_fail():
    assert failures(facts(kernels=[]), []) == ["fall-back: the call launches no Triton kernel"]
    broken = Row.model_validate(row() | {"impls": row()["impls"] | {"ours": {"error": "wrong: output"}}})
    assert failures(facts(row=broken), []) == ["ours does not run: wrong: output"]
    assert verdicts(facts(row=broken))["bound"] == "not measured"


def profile_of(some, share=0.8):
    checks = checklist(some)
    return profiling.Profile(
        op="gdn_decode", definition="d", case="c", gpu="h200", bound="memory", share=share, intensity=0.1, tflops=0.2,
        checks=checks, failures=failures(some, checks),
    )  # fmt: skip


def test_findings_are_ranked_failures_first_then_by_what_they_may_gain():
    slow = Row.model_validate(row(ours=(50.0, 40.0, 60.0)) | {"bytes": 16_000_000, "flops": 1000, "floor_us": 4.0})
    spilling = replace(KERNEL, stack=64, registers=255)
    eager = TRACE.model_copy(update={"host_us": 30.0})
    found = profile_of(facts(row=slow, kernels=[spilling], trace=eager)).findings()
    assert [check.id for check in found] == ["spills", "memory", "bound", "launch", "registers"]
    assert [round(check.gain, 2) if check.gain else None for check in found] == [0.92, 0.92, 0.92, 0.33, None]
    lines = profile_report.finding_lines(profile_of(facts(row=slow, kernels=[spilling])))
    assert lines[0].startswith("spills of scan: ")
    assert "(at most 92% of the time)" in lines[0]


def test_a_kernels_finding_gains_no_more_than_the_kernel_takes():
    slow = Row.model_validate(row(ours=(50.0, 40.0, 60.0)) | {"bytes": 16_000_000, "flops": 1000, "floor_us": 4.0})
    small = [COUNTED, Launch("other", COUNTED.values | {"occupancy_pct": 1.0})]
    two = [KERNEL, replace(KERNEL, kernel="other")]
    parts = [Kernel(name="scan", us=4.0, blocks=64, threads=128), Kernel(name="other", us=0.02, blocks=1, threads=32)]
    found = profile_of(
        facts(row=slow, kernels=two, launches=small, trace=TRACE.model_copy(update={"kernels": [*parts, parts[0]]}))
    )
    gains = {(check.id, check.kernel): check.gain for check in found.findings()}
    assert gains["occupancy", "other"] == pytest.approx(0.02 / 8.02)
    assert gains["memory", ""] == pytest.approx(0.92)
    assert any("other" in line and "(under 1% of the time)" in line for line in profile_report.finding_lines(found))


def test_stored_profiles_are_judged_by_todays_rules():
    case = next(case for case in profiling.cases() if case.graphed)
    about = {"definition": case.definition, "case": case.name}
    trace = TRACE.model_copy(update={"host_us": 90.0})
    before = profile_of(facts(trace=trace)).model_copy(update=about)
    assert "launch" in [check.id for check in before.findings()]
    after = profiling.judged_again(before)
    (launch,) = (check for check in after.checks if check.id == "launch")
    assert (launch.verdict, launch.gain) == ("excepted", None)
    assert "graphs" in launch.why
    assert [check for check in after.checks if check.id != "launch"] == [c for c in before.checks if c.id != "launch"]
    gone = before.model_copy(update={"case": "no such case"})
    assert profiling.judged_again(gone) == gone


def test_a_lost_share_of_the_bound_is_a_regression_from_five_percent_on():
    then = profile_of(facts())
    assert profiling.differences(then, then) == ([], [])
    changed, lost = profiling.differences(profile_of(facts(kernels=[replace(KERNEL, registers=80)]), 0.77), then)
    assert changed == ["registers a thread of scan: 64.00 -> 80.00"]
    assert lost == []
    assert profiling.differences(profile_of(facts(), 0.7), then)[1] == ["share of the bound fell from 80.0% to 70.0%"]


def test_reports():
    found = profile_of(facts(shares={"b": 0.1}))
    text = profile_report.markdown(found, ["spills: 0 -> 8"])
    assert "1. worst share of the bound over shapes" in text
    assert "profile the worst case: --case NAME; the worst of 1 cases is b" in text
    assert "- spills: 0 -> 8" in text
    assert text.count("\n| ") >= len(ORDER)
    page = profile_report.page(found, CEILINGS)
    assert "fp8 roof" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "fp8 roof" not in profile_report.page(found, None)
    assert profile_report.terminal(found).row_count == len(ORDER)
    traced = found.model_copy(update={"trace": TRACE})
    assert "| scan | 5.00 | 64 | 128 |" in profile_report.markdown(traced)
    assert "<td>scan</td><td>5.00</td>" in profile_report.page(traced, None)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(profile_run, "compile_all", lambda cases, sm: [([KERNEL], "")] * len(cases))
    root = tmp_path / "results"
    listed = [row(f"model/qwen3-next/batch_size={n}", ours=(us, us, us)) for n, us in ((1, 4.0), (8, 9.0))]
    write(root / "h200" / "gdn_decode.json", Results.model_validate({**HEAD, "rows": listed}))
    return lambda *arguments: CliRunner().invoke(profile_cli.app, [*arguments, "--results", str(root)])


def test_the_command_takes_the_case_that_is_furthest_from_its_floor(command, tmp_path):
    paths = {name: tmp_path / f"p.{name}" for name in ("json", "md", "html")}
    done = command(
        "gdn_decode", "--output", str(paths["json"]), "--markdown", str(paths["md"]), "--html", str(paths["html"])
    )
    assert done.exit_code == 0, done.output
    assert "model/qwen3-next/batch_size=8 on h200" in done.output
    assert "not measured: no GPU is here" in done.output
    assert all(path.stat().st_size for path in paths.values())
    assert profiling.read(paths["json"]).case == "model/qwen3-next/batch_size=8"
    told = json.loads(command("gdn_decode", "--json", "--case", "batch_size=1").stdout)
    assert told["case"] == "model/qwen3-next/batch_size=1"
    assert told["failures"] == []


def test_the_command_fails_on_what_fell_and_on_spills(command, tmp_path, monkeypatch):
    path = tmp_path / "then.json"
    assert command("gdn_decode", "--output", str(path)).exit_code == 0
    assert command("gdn_decode", "--against", str(path)).exit_code == 0
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "share": 2 * told["share"]}))
    done = command("gdn_decode", "--against", str(path))
    assert done.exit_code == 1
    assert "failed: share of the bound fell" in done.output
    monkeypatch.setattr(profile_run, "compile_all", lambda cases, sm: [([replace(KERNEL, stack=8)], "")])
    assert "failed: spills of scan" in command("gdn_decode").output


def test_all_operators_have_a_profile_of_their_own_and_a_line_of_the_index(command, tmp_path):
    folder = tmp_path / "profiles"
    done = command("--all", "--folder", str(folder))
    assert done.exit_code == 0, done.output
    found = [profiling.read(path) for path in folder.glob("*.json")]
    assert {one.op for one in found} == set(OPS)
    assert len(found) == len(profiling.cases()) == len(list(folder.glob("*.md"))) - 1
    index = (folder / "README.md").read_text()
    assert "| `gdn_decode_kernel` | gdn | no profiled call |" in index, "stored results have no trace"
    for one in profiling.cases():
        assert f"({profiling.name_of(one)}.md)" in index
    told = json.loads(command("--all", "--json").stdout)
    assert [one["case"] for one in told] == [one.name for one in profiling.cases()]


def test_every_kernel_that_ships_runs_in_a_profiled_case(monkeypatch):
    from triton.runtime.jit import JITFunction

    launched = set()
    # the driver of a chip that is not here is all that is needed of it: nothing is compiled
    with aot.compile_only(90), monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", lambda self, *arguments, **more: launched.add(self.__name__))
        for case in profiling.cases():
            precompile.call(case)
    families = {importlib.import_module(f"blackwell_kernels.{name}") for name in set(env.HOOK_OPS.values())}
    assert launched == {name for family in families for name in kernels(Path(family.__file__).parent)}


def test_some_operators_can_be_profiled_beside_others(command, tmp_path):
    folder = tmp_path / "profiles"
    assert command("--all", "gdn_core", "moe_routing", "--folder", str(folder)).exit_code == 0
    assert {profiling.read(path).op for path in folder.glob("*.json")} == {"gdn_core", "moe_routing"}
    assert command("--all", "gdn_decode", "--folder", str(folder)).exit_code == 0
    index = (folder / "README.md").read_text()
    mine = [one for one in profiling.cases() if one.spec.op in ("gdn_core", "moe_routing", "gdn_decode")]
    assert re.findall(r"\((\S+)\.md\)", index) == [profiling.name_of(one) for one in mine], "all, in their order"


def test_the_index_says_where_each_kernel_was_seen():
    seen = TRACE.model_copy(update={"kernels": [Kernel(name="gdn_decode_kernel", us=2.0, blocks=64, threads=128)]})
    found = profile_of(facts()).model_copy(update={"trace": seen})
    index = profile_report.index([found])
    assert "| `gdn_decode_kernel` | gdn | d c (2.00 µs, 64 blocks) |" in index
    assert "| [d c](d-c.md) † | 5.00 | 80 (memory) | 1 | 4.00 |" in index
    assert f"† 1 of 1: {profile_report.CHANGED}." in index


def test_a_profile_holds_while_its_case_launches_the_same(command, tmp_path):
    folder = tmp_path / "profiles"
    asked = ("--all", "gdn_decode", "--folder", str(folder))
    assert command(*asked).exit_code == 0
    first, *others = sorted(folder.glob("*.json"))
    assert others
    assert not profiling.read(first).kernels, "it was only compiled"
    one = profiling.read(first)
    (case,) = (c for c in profiling.cases() if profiling.name_of(c) == profiling.name_of(one))
    ran = profiling.profile(case, "h200", facts(fresh=True), "profile")
    assert ran.holds()
    first.write_text(ran.model_dump_json())
    before = first.read_text()
    assert command(*asked, "--owed").exit_code == 0
    assert first.read_text() == before
    assert (folder / "README.md").read_text().count("†") == 1 + len(others)
    for path in others:
        path.unlink()
    first.write_text(ran.model_copy(update={"kernels": "others"}).model_dump_json())
    assert command(*asked, "--owed").exit_code == 0
    assert not profiling.read(first).kernels, "it was owed"
    assert command("gdn_decode", "--owed").exit_code == 2


def test_kernels_that_cannot_be_told_apart_cost_no_page(monkeypatch):
    def twice(folder):
        raise ValueError("a jit function is there twice")

    monkeypatch.setattr(profile_report, "kernels", twice)
    text = profile_report.index([profile_of(facts())])
    assert "| – | gdn | two of its functions have one name |" in text


def test_all_operators_are_compared_with_a_folder(command, tmp_path):
    folder = tmp_path / "profiles"
    command("--all", "--folder", str(folder))
    path = folder / "gdn_decode_state_bf16-model-qwen3-next-batch_size=64.json"
    (folder / "moe_fp8_block-model-qwen3-next-num_tokens=64.json").unlink()
    then = json.loads(path.read_text())
    then["checks"][2]["value"] *= 2
    path.write_text(json.dumps(then))
    told = json.loads(command("--all", "--against", str(folder), "--json").stdout)
    changed = {one["definition"] + one["case"]: one["changes"] for one in told if one["changes"]}
    assert list(changed) == ["gdn_decode_state_bf16model/qwen3-next/batch_size=64"]


def test_on_a_gpu_each_tool_runs_once_for_all_cases(tmp_path, monkeypatch):
    cases = profiling.cases()[:2]
    ran = []
    first = Row.model_validate(row())
    monkeypatch.setattr(profile_run, "compile_all", lambda cases, sm: [([KERNEL], "")] * len(cases))

    def run(job, quiet_s):
        ran.append(job.cases)
        yield {"head": HEAD}
        yield {"row": first.model_dump()}
        yield {"failed": ["its name", "OutOfMemoryError"]}

    class Child:
        returncode, stderr = -9, b"one line\nKilled"

    def child(command, **more):
        ran.append(command[-4:])
        with open(command[3], "w") as lines:
            lines.write(json.dumps({"trace": TRACE.model_dump()}) + "\n")
        return Child

    monkeypatch.setattr(profile_run.supervise, "run", run)
    monkeypatch.setattr(profile_run.subprocess, "run", child)
    monkeypatch.setattr(profile_run.counters, "collect", lambda names, deep, limit_s: [[COUNTED], []])
    measured, traced, (one, other) = profile_run.gather(cases, "h200", 90, root=tmp_path, here=True)
    assert (measured[0].row, measured[0].no_trace) == (first, "CUPTI has not run yet")
    assert (traced[0].trace, traced[0].no_counters) == (TRACE, "ncu has not run yet")
    assert len(ran) == 2
    assert (one.row, one.trace, list(one.launches), one.fresh) == (first, TRACE, [COUNTED], True)
    assert one.graphed == cases[0].graphed
    assert one.machine["driver"] == HEAD["driver"]
    assert one.ceilings.copy_tbps == HEAD["ceilings"]["copy_tbps"]
    assert (other.row, other.no_row) == (None, "OutOfMemoryError")
    assert other.no_trace == "the traced process ended with status -9: Killed"
    assert other.no_counters == "the call failed under ncu"
    *_, (one, other) = profile_run.gather(cases, "h200", 90, root=tmp_path, here=True, until=0.0)
    assert (one.row, one.trace, one.no_trace, one.no_counters) == (first, None, profile_run.LATE, profile_run.LATE)


def test_a_family_whose_counters_fail_costs_no_other_its_own(monkeypatch):
    cases, asked, seconds = [profiling.cases()[i] for i in (0, -1, 1, 10)], [], [9.0, 9.0, 5.0, 5.0, 0.5]

    def collect(names, deep, limit_s):
        asked.append((names, limit_s))
        if names[0][0].startswith("gdn"):
            raise ValueError("no end of ncu after 5 s")
        return [[COUNTED]] * len(names)

    monkeypatch.setattr(profile_run.counters, "collect", collect)
    found = profile_run.count_all(cases, False, lambda: seconds.pop(0))
    assert [limit for _, limit in asked] == [9.0, 5.0]
    assert [len(names) for names, _ in asked] == [2, 1]
    counted = ([COUNTED], "")
    assert found == [counted, ([], "no end of ncu after 5 s"), counted, ([], profile_run.LATE)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("gdn_decoder",), "no operator is named 'gdn_decoder'; did you mean 'gdn_decode'?"),
        (("moe", "--case", "no such"), "no case of moe matches no such"),
        (("moe", "--chip", "h100"), "no chip is named 'h100'"),
        ((), "name one operator of moe, "),
        (("moe", "gdn_decode"), "or --all"),
        (("moes", "--all"), "no operator is named 'moes'"),
        (("--all", "--case", "tp8"), "--all goes through cases of its own"),
    ],
)
def test_usage_errors_exit_with_2(command, arguments, complaint):
    done = command(*arguments)
    assert done.exit_code == 2
    assert complaint in done.output


def test_a_file_that_is_no_profile_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(TableError, match=r"x\.json: not a profile"):
        profiling.read(tmp_path / "x.json")


@pytest.mark.aot
@pytest.mark.parametrize("op", ["moe_routing", "dsa_topk", "gdn_core"])
def test_the_compiler_tells_about_kernels_of_calls_and_chains(op):
    case = profile_cli.choose(op, None, [])
    kernels, why = profile_run.compiled(case, 90)
    assert why == ""
    assert {kernel.arch for kernel in kernels} == {90}
    assert len(kernels) >= (3 if op == "gdn_core" else 1)
