"""Pages of stored results: up to date here, complete, honest about what is slower or missing, and without scripts."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from microbench_examples import HEAD, row
from typer.testing import CliRunner

from blackwell_kernels import ops
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import (
    bounds,
    cases,
    floors,
    launched,
    pages,
    plots,
    precompile,
    profiling,
    results,
    scores,
    svg,
)
from blackwell_kernels.microbench.cli import app
from blackwell_kernels.microbench.parts import PARTS
from blackwell_kernels.microbench.results import Results, Row
from blackwell_kernels.microbench.specs import OPS

STORED = sorted(path for path in results.ROOT.glob("*") if list(path.glob("*.json")))
B200 = HEAD | {"gpu": "NVIDIA B200", "sm": 100}
SLOW = row("model/qwen3-next/batch_size=8", ours=(10.0, 9.0, 11.0)) | {"axes": {"batch_size": 8}}


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_the_pages_here_are_what_the_stored_results_give(folder):
    assert pages.stale(folder) == [], f"run: blackwell-kernels bench report {folder.name} --write"


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_what_the_pages_here_link_exists(folder):
    found = 0
    for page in [*folder.glob("*.md"), *folder.glob("profile/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
            found += 1
    assert found


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_nothing_stored_names_a_place_of_the_machine_that_measured(folder):
    """Reasons are stored as their errors say them."""
    place = re.compile(r"(?<![\w.])/(tmp|root|home|work|opt|mnt|usr|var)/")
    kept = [path for path in folder.rglob("*") if path.suffix in (".json", ".md")]
    assert kept
    assert [path.name for path in kept if place.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_no_stored_time_lies_below_its_bound(folder):
    rows = [one for path in folder.glob("*.json") for one in results.load(path).rows]
    assert rows
    assert floors.below(rows) == []
    assert floors.below_their_launches([profiling.read(path) for path in folder.glob("profile/*.json")]) == []


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_stored_floors_follow_from_what_a_case_must_move(folder):
    """Where shapes alone say how much that is, and moving it is the bound."""
    known = {(case.definition, case.name): case for case in cases.all_cases()}
    checked = 0
    for path in folder.glob("gdn_*.json"):
        found = results.load(path)
        for one in found.rows:
            if one.bound != "memory":
                continue
            work = bounds.cost(known[one.definition, one.case], precompile.meta_inputs(known[one.definition, one.case]))
            assert one.bytes in (None, work.bytes), one.case
            # of the run's own ceiling, or of the chip's best known one
            assert work.bytes / one.floor_us / 1e6 == pytest.approx(found.ceilings.copy_tbps, rel=0.04), one.case
            checked += 1
    assert checked


@pytest.fixture
def folder(tmp_path):
    now = {
        case.name: launched.of(case, "h200") for case in cases.select(sets=("model",), definition=row()["definition"])
    }
    one = row() | {"bytes": 1000, "flops": 500}
    listed = [one | {"kernels": now[one["case"]]}, SLOW | {"commit": "older", "kernels": "earlier"}]
    results.write(tmp_path / "h200" / "gdn_decode.json", Results.model_validate({**HEAD, "rows": listed}))
    return tmp_path / "h200"


def test_the_summary_has_every_case_the_slower_ones_marked_and_every_operator(folder):
    text = pages.build(folder)["README.md"]
    assert "| gdn_decode_state_bf16 model/qwen3-next/batch_size=1 |" in text
    assert "| **gdn_decode_state_bf16 model/qwen3-next/batch_size=8** † |" in text
    assert "† 1 of 2 rows: ours launches other kernels" in text
    assert "slower than the fastest peer in 1 of 2 compared cases" in text
    assert "at 0.90x of vllm.packed_decode" in text
    assert "1 of 2 rows are of an earlier run, at commit older" in text
    assert "flashinfer.gdn_decode: flashinfer-python is not installed (2 cases)" in text
    missing = text.split("## Not measured on this GPU")[1]
    assert all(op in missing for op in OPS if op != "gdn_decode")
    assert "profile/README.md" not in text


def test_the_technical_report_says_how_what_and_what_not(folder):
    text = pages.build(folder)["report.md"]
    for part in ("## Methods", "## Results", "## Limits", "## How to reproduce", "No time lies below its floor"):
        assert part in text
    assert "| gdn_decode | 4.30 | 1310 | 790 | 1.30 | 580.1 |" in text
    assert "| gdn_decode | vllm.packed_decode | 2 of 2 | 1.35x | 0.90x | 2 | 1 | 0 | 0 | 0 |" in text
    registered = [name for name in dir(ops) if name.split("_")[0] in ("moe", "dsa", "gdn")]
    assert all(f"| `{name}` |" in text for name in registered)
    assert "| `gdn_decode` | gdn_decode_qk4_v8_d128_k_last, gdn_decode_state_bf16," in text
    assert all(f"`{spec.name}`" in text for spec in PARTS)
    owed = {name: len(cases.select(sets=(name,))) for name in ("contest", "model", "agent")}
    told = f"0 of {owed['contest']} contest cases, 2 of {owed['model']} model cases, 0 of {owed['agent']} agent cases"
    assert told in text


def test_a_command_stands_with_the_rows_of_its_own_run_alone(folder):
    path = folder / "gdn_decode.json"
    found = results.load(path)
    found.rows.append(
        found.rows[0].model_copy(update={"case": "of an hour before", "date": "2026-01-02T02:04:05+00:00"})
    )
    results.write(path, found)
    told = pages.build(folder)["report.md"].split("## How to reproduce")[1]
    assert f"1 row of 2026-01-02, commit 0123456789ab: `{HEAD['command']}`" in told
    assert "1 row of 2026-01-02, commit 0123456789ab: the command was not kept with the results" in told
    assert "1 row of 2026-01-02, commit older: the command was not kept with the results" in told
    assert told.count(HEAD["command"]) == 1
    assert "`blackwell-kernels bench --op OP --case CASE` measures\nany row again" in told


def test_limits_say_how_many_runs_and_which_routing_there_were(folder):
    path = folder / "gdn_decode.json"
    assert "- 2 runs at 2 commits, on whichever GPU" in pages.build(folder)["report.md"]
    found = results.load(path)
    found.rows[1].commit = found.rows[0].commit
    results.write(path, found)
    text = pages.build(folder)["report.md"]
    assert "- One run on one GPU of this kind;" in text
    assert "distinct experts evenly likely, shuffled" in text
    experts = [
        row(f"model/qwen3-next/{name}") | {"op": "moe"} for name in ("routing=zipf/num_tokens=64", "num_tokens=64")
    ]
    found.rows = [
        Row.model_validate(one | {"definition": "moe_fp8_block", "axes": {"num_tokens": 64}}) for one in experts
    ]
    assert pages._routing(found.rows) == " (by Zipf's law in 1 of 2 rows of moe)"


def test_both_timings_and_every_peer_are_on_both_pages(folder):
    path = folder / "gdn_decode.json"
    found = results.load(path)
    for name, us in (("ours", 80.0), ("vllm.packed_decode", 40.0)):
        found.rows[0].impls[name].fib_us = us
    found.rows[0].rotated_bytes = 1
    results.write(path, found)
    made = pages.build(folder)
    for name in ("README.md", "report.md"):
        assert "disagree in 1 of 1 rows (ours is ahead in 1 by graph replays, in 0 by" in made[name]
        assert "| vllm.packed_decode | 2 of 2 | 1.35x | 0.90x | 2 | 1 | 0 | 0 | 0 |" in made[name]
        assert "|  |  | stock, FIB | 1 | 0.50x |" in made[name]
    (line,) = [line for line in made["README.md"].splitlines() if "batch_size=1 (warm)" in line]
    assert "| 80.00 | vllm.packed_decode 9.00 | 1.80x | 0.50x |" in line
    assert "(warm), 1 of 2 rows" in made["README.md"]


def test_host_times_have_a_table_where_they_were_measured(folder):
    assert "costs its host\n" not in pages.build(folder)["report.md"]
    listed = [row(f"model/qwen3-next/batch_size={n}") for n in (1, 2, 4)]
    for one, (ours, theirs) in zip(listed, ((50.0, 100.0), (40.0, 60.0), (None, 9.0)), strict=True):
        one["impls"]["ours"]["host_us"], one["impls"]["vllm.packed_decode"]["host_us"] = ours, theirs
    results.write(folder / "gdn_decode.json", Results.model_validate({**HEAD, "rows": listed}))
    text = pages.build(folder)["report.md"].split("costs its host\n")[1]
    assert "| gdn_decode | 2 of 3 | 45 | 80 | 1.75x | 1.50x |" in text


def test_operators_measured_apart_are_called_by_the_hooks_for_cpus_alone():
    hooks = Path(pages.__file__).parent.parent / "model_patches"
    parts = {spec.name for spec in PARTS}
    assert all(pages.launched().values()), "every operator has a benchmark"
    alone = [name for name, definitions in pages.launched().items() if set(definitions) <= parts]
    assert alone == ["dsa_gather_indexer_k", "dsa_kv_insert"]
    for path in hooks.glob("*.py"):
        called = [name for name in alone if f".{name}(" in path.read_text()]
        assert called == [] or path.name == "dsa_cpu.py", path
        assert "use_qk_l2norm=True" not in path.read_text(), "gdn_prefill_raw_qk is not served"
    assert all(f".{name}(" in (hooks / "dsa_cpu.py").read_text() for name in alone)


def test_inputs_that_may_stay_in_the_l2_are_a_limit(folder):
    path = folder / "gdn_decode.json"
    found = results.load(path)
    for sets, told in ((2, False), (64, True)):
        found.rows[0].sets, found.rows[1].sets, found.rows[0].rotated_bytes = sets, 2, 3 << 20
        results.write(path, found)
        text = pages.build(folder)["report.md"]
        assert ("1 of 2 cases are so small that their 64 input sets, 3.0 to 3.0 MiB" in text) == told
        assert ("may stay in the L2, in 1 of them wholly" in text) == told


def test_a_time_below_its_floor_is_told(folder):
    path = folder / "gdn_decode.json"
    found = results.load(path)
    found.rows[0].floor_us = 5.5
    results.write(path, found)
    assert (
        "1 times lie below their floor: gdn_decode_state_bf16 model/qwen3-next/batch_size=1, ours: 5.00 µs"
        in (pages.build(folder)["report.md"])
    )
    done = CliRunner().invoke(app, ["bounds", "h200", "--results", str(folder.parent)])
    assert done.exit_code == 1
    assert "below the floor of 5.50 µs (memory)" in done.output


def test_bounds_are_printed_with_the_shares_of_every_operator(folder):
    done = CliRunner().invoke(app, ["bounds", "h200", "--results", str(folder.parent)])
    assert done.exit_code == 0, done.output
    assert "4 times of 2 cases and 0 profiles, 0 below their bound" in done.output
    told = {one.op: one for one in floors.shares(results.load(folder / "gdn_decode.json").rows)}
    assert tuple(told) == OPS
    assert told["gdn_decode"].ours == pytest.approx((0.4, 0.2))
    assert told["gdn_decode"].fastest == pytest.approx((0.4, 2.0 / 9.0))
    assert told["gdn_decode"].cells() == ["gdn_decode", "2", "memory 2", "20%", "30%", "40%", "31%", "40%"]
    assert told["moe"].cells()[1] == "not measured"


def test_the_bound_of_a_calls_own_launches_counts_them_and_the_idle_multiprocessors():
    chip = {"sms": 100, "fp8_tflops": 1000.0, "launch_us": 1.5}
    assert bounds.own(4.0, 1000, 1000, [200], **chip) == (4.0, "the floor")
    assert bounds.own(4.0, 1000, 1000, [200] + 9 * [7], **chip) == (pytest.approx(6.0), "10 launches")
    moved = 10 * bounds.SM_BYTES_PER_US
    assert bounds.own(4.0, moved, 0, [2], **chip) == (5.0, "memory, 2 multiprocessors")
    assert bounds.own(4.0, 0, 10**9, [1, 10], **chip) == (10.0, "compute, 10 multiprocessors")


def test_the_command_renews_the_pages_and_says_what_is_stale(folder):
    asked = ["report", "h200", "--results", str(folder.parent)]
    stale = CliRunner().invoke(app, [*asked, "--check"])
    assert stale.exit_code == 1
    assert "stale" in stale.output
    (folder / "plots").mkdir()
    (folder / "plots" / "long-gone.svg").write_text("<svg/>")
    assert CliRunner().invoke(app, [*asked, "--write"]).exit_code == 0
    assert CliRunner().invoke(app, [*asked, "--check"]).exit_code == 0
    assert {path.name for path in folder.glob("plots/*")} == {"gdn_decode-latency.svg", "gdn_decode-roofline.svg"}
    for page in ("README.md", "report.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (folder / page).read_text()):
            assert (folder / target).exists(), target
    page = folder / "README.md"
    page.write_text(page.read_text() + "by hand\n")
    assert pages.stale(folder) == ["README.md"]


def test_on_a_b200_the_best_published_latency_stands_beside_ours(tmp_path):
    one = row("contest/batch_size=1") | {"definition": "gdn_decode_qk4_v8_d128_k_last"}
    results.write(tmp_path / "b200" / "gdn_decode.json", Results.model_validate(B200 | {"rows": [one]}))
    text = pages.build(tmp_path / "b200")["README.md"]
    assert "| published B200 µs |" in text
    (line,) = [line for line in text.splitlines() if "batch_size=1 † |" in line]
    assert line.endswith(f"| {scores.published_us(Row.model_validate(one)):.2f} |")


def test_results_of_another_machine_are_taken_in(folder, tmp_path):
    other = tmp_path / "there" / "h200"
    listed = [SLOW, row("model/qwen3-next/batch_size=64")]
    head = HEAD | {"commit": "newer"}
    results.write(other / "gdn_decode.json", Results.model_validate({**head, "rows": listed}))
    for part in ("profile", "limits"):
        (other / part).mkdir()
        (other / part / "x.md").write_text(part)
    done = CliRunner().invoke(app, ["merge", str(other.parent), "--results", str(folder.parent)])
    assert done.exit_code == 0, done.output
    assert "3 rows in gdn_decode" in done.output
    assert done.output.splitlines()[-1] == "next: blackwell-kernels bench report h200 --write"
    stored = results.load(folder / "gdn_decode.json")
    assert stored.commit == "newer"
    assert [one.case.rpartition("=")[2] for one in stored.rows] == ["1", "8", "64"]
    assert stored.rows[1].commit != "older", "its row is the newer one"
    assert [(folder / part / "x.md").read_text() for part in ("profile", "limits")] == ["profile", "limits"]
    assert CliRunner().invoke(app, ["merge", str(tmp_path / "nothing")]).exit_code == 2


def test_profiles_are_linked_and_counted(folder):
    profile = profiling.Profile(
        op="gdn_decode", definition="gdn_decode_state_bf16", case="c", gpu="h200", bound="memory", share=0.5,
        intensity=None, tflops=None, own_bound_us=3.0, own_bound="2 launches", failures=[],
        checks=[
            profiling.Check(
                id="duration", title="duration", kernel="", value=2.0, unit="µs", threshold="–", verdict="ok", why="",
                how="graph",
            )
        ],
    )  # fmt: skip
    (folder / "profile").mkdir()
    (folder / "profile" / "x.json").write_text(profile.model_dump_json())
    made = pages.build(folder)
    assert "[profiles](profile/README.md)" in made["README.md"]
    assert "[profiles](profile/README.md#kernels)" in made["report.md"]
    assert "c: 2.00 µs, below the 3.00 µs that its own launches need (2 launches)" in made["report.md"]


def test_plots_are_drawings_without_scripts_the_same_every_time(folder):
    made = pages.build(folder)
    assert made == pages.build(folder)
    for name in ("plots/gdn_decode-latency.svg", "plots/gdn_decode-roofline.svg"):
        root = ElementTree.fromstring(made[name])
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "script" not in made[name]
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "ours" in texts
    (panel,) = plots.latency_panels(results.load(folder / "gdn_decode.json"))
    assert [series.name for series in panel.series] == ["ours", "vllm.packed_decode", "floor"]
    assert panel.series[0].spread[0] == pytest.approx((0.8, 0.8))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 256.0, [1, 2, 5, 10, 20, 50, 100, 200, 500]),
        (3.0, 3.0, [2, 5]),
        (1.0, 1.0, [1]),
        (0.5, 40_000.0, [0.1, 1, 10, 100, 1000, 10_000, 100_000]),
    ],
)
def test_ticks_are_round_numbers_that_hold_all_values(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_too_many_curves_are_left_to_the_table(tmp_path):
    listed = [
        row(f"contest/max_num_pages={m}/batch_size={n}") | {"axes": {"batch_size": n}}
        for m in range(pages.MAX_PANELS + 3)
        for n in (1, 2)
    ]
    results.write(tmp_path / "h200" / "gdn_decode.json", Results.model_validate({**HEAD, "rows": listed}))
    made = pages.build(tmp_path / "h200")
    assert made["plots/gdn_decode-latency.svg"].count("<g ") == pages.MAX_PANELS
    assert "3 curves of one point, or beyond the 12 longest" in made["README.md"]


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(TableError, match="no time is stored under"):
        pages.build(Path(tmp_path))
    none = row() | {"ratio_stock": None, "ratio_best_peer": None, "best_peer": None}
    none["impls"] = {name: {"error": "it does not compile"} for name in none["impls"]}
    results.write(tmp_path / "b200" / "gdn_decode.json", Results.model_validate({**B200, "rows": [none]}))
    with pytest.raises(TableError, match="no time is stored under"):
        pages.build(tmp_path / "b200")
    assert CliRunner().invoke(app, ["report", "h200", "--results", str(tmp_path)]).exit_code == 2
