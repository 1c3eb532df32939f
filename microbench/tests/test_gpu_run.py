"""The command's path on a GPU, on a machine that pretends to have one: all but the CUDA calls themselves."""

import errno
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from microbench_examples import HEAD, CountingEngine
from typer.testing import CliRunner

from blackwell_kernels.common import tables
from blackwell_kernels.errors import MissingRequirementError, TableError
from blackwell_kernels.microbench import device, generate, ours, peers_moe, results, runner, running, worker
from blackwell_kernels.microbench.cli import app
from blackwell_kernels.microbench.implementations import find
from blackwell_kernels.microbench.results import Ceilings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have a GPU")
BENCH = runner.Bench
SMALL = ("--set", "cpu", "--op", "gdn_decode", "--case", "tiny")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    def on_cpu(**settings):
        engines = [CountingEngine([])]
        return BENCH(**{**settings, "device": torch.device("cpu"), "engines": engines, "l2_bytes": 1})

    ceilings = Ceilings(**HEAD["ceilings"])
    head = {k: v for k, v in HEAD.items() if k != "ceilings"}
    monkeypatch.setattr(runner, "Bench", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: head["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(device, "measure_ceilings", lambda: ceilings)
    monkeypatch.setattr(device, "best_known", lambda c: {**c.model_dump(), "launch_us": 1e-3, "copy_tbps": 1e3})
    told = {**head, "source": device.source_hash()}
    monkeypatch.setattr(device, "facts", lambda command, commit: {**told, "command": command, "commit": commit or "c"})
    monkeypatch.setattr(device, "fib_timer", lambda where: lambda call: 7.0)
    places = ("--results", str(tmp_path / "results"), "--tables", str(tmp_path / "tables"))
    return lambda *arguments: CliRunner().invoke(
        app, [*arguments, *(["--no-isolate"] if "--audit" not in arguments else []), *places]
    )


def test_rows_are_stored_and_shown(bench, tmp_path):
    done = bench(*SMALL, "--commit", "abc", "--markdown", str(tmp_path / "r.md"), "--html", str(tmp_path / "r.html"))
    assert done.exit_code == 0, done.output
    assert f"source {device.source_hash()}, commit abc" in done.output
    stored = results.load(tmp_path / "results" / "h200" / "gdn_decode.json")
    assert len(stored.rows) == 3
    assert stored.ceilings.copy_tbps == 4.3
    assert stored.commit == "abc"
    assert stored.rows[0].impls["ours"].fib_us == 7.0
    assert re.search(r"\[3/3, \d+ s, about 0 s left\] gdn_decode_state_f32 cpu/tiny/batch_size=5", done.output)
    assert "vllm.packed_decode: needs a CUDA device (3 cases)" in done.output
    assert re.search(r"seconds of \d+: .*\bcheck ours \d+\.\d", done.output.replace("\n", " "))
    assert "next: blackwell-kernels bench --audit" in done.output
    assert "gdn_decode_state_bf16 cpu/tiny/batch_size=1" in (tmp_path / "r.md").read_text()
    assert "Plotly" in (tmp_path / "r.html").read_text()
    assert bench("--audit").exit_code == 0


def test_json_is_the_stored_files(bench, tmp_path):
    done = bench(*SMALL, "--json")
    (told,) = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "results" / "h200" / "gdn_decode.json").read_text())


def test_dispatch_is_written_on_request(bench, tmp_path):
    assert bench(*SMALL).exit_code == 0
    assert not (tmp_path / "tables").exists()
    done = bench(*SMALL, "--resume", "--write-dispatch")
    assert done.exit_code == 0, done.output
    assert "3 of 3 cases are stored already" in done.output
    table = json.loads((tmp_path / "tables" / "gdn" / "configs" / "h200" / "gdn_decode.json").read_text())
    assert {row["use"] for row in table["rows"]} == {"stock"}, "nothing to compare with: stays with stock"
    assert {row["kernels"] for row in table["rows"]} == {tables.kernels_of("gdn")}


def test_a_run_that_ends_early_keeps_its_rows_and_exits_with_1(bench, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA error")

    def crash(x):
        if x["state"].dtype == torch.float32:
            monkeypatch.setattr(BENCH, "_synchronize", fail)
            raise RuntimeError("illegal memory access")
        return original(x)

    original = ours.gdn_decode
    monkeypatch.setattr(ours, "gdn_decode", crash)
    done = bench(*SMALL)
    assert done.exit_code == 1
    assert "ours: it broke the CUDA context: RuntimeError: illegal memory access" in done.output
    assert "next: run these cases again: --resume" in done.output
    stored = results.load(tmp_path / "results" / "h200" / "gdn_decode.json")
    assert len(stored.rows) == 2


def test_resume_measures_what_this_source_has_not_stored(bench, tmp_path, monkeypatch):
    assert bench(*SMALL, "--case", "tiny/batch_size=1").exit_code == 0
    done = bench(*SMALL, "--resume")
    assert done.exit_code == 0, done.output
    assert "1 of 3 cases are stored already" in done.output
    assert "[2/2, " in done.output
    path = tmp_path / "results" / "h200" / "gdn_decode.json"
    assert len(results.load(path).rows) == 3
    with tables.override("gdn_decode", {"num_warps": 8}):
        assert "0 of 3 cases are stored already" in bench(*SMALL, "--resume").output, "they launch something else now"
    assert "0 of 3 cases are stored already" in bench(*SMALL, "--resume").output, "and something else again"
    assert "3 of 3 cases are stored already" in bench(*SMALL, "--resume").output
    path.write_text(path.read_text().replace(f'"source": "{device.source_hash()}"', '"source": "another"'))
    assert "0 of 3 cases are stored already" in bench(*SMALL, "--resume").output


def test_what_is_owed_is_what_has_no_row_of_these_kernels_with_all_that_is_asked_for(bench, tmp_path):
    def listed():
        places = ("--owed", "h200", "--results", str(tmp_path / "results"))
        return CliRunner().invoke(app, ["cases", *SMALL, *places]).stdout.splitlines()

    assert len(listed()) == 5, "three cases, their number and what to do next"
    assert bench(*SMALL, "--no-fib").exit_code == 0
    path = tmp_path / "results" / "h200" / "gdn_decode.json"
    path.write_text(path.read_text().replace(f'"source": "{device.source_hash()}"', '"source": "another"'))
    assert "0 of 3 cases are stored already" in bench(*SMALL, "--owed").output, "FlashInfer-Bench's timing was owed"
    path.write_text(path.read_text().replace(f'"source": "{device.source_hash()}"', '"source": "another"'))
    assert "0 of 3 cases are stored already" in bench(*SMALL, "--resume").output
    path.write_text(path.read_text().replace(f'"source": "{device.source_hash()}"', '"source": "another"'))
    assert "3 of 3 cases are stored already" in bench(*SMALL, "--owed").output
    assert listed() == ["0 cases"]
    stored = json.loads(path.read_text())
    stored["rows"][0]["kernels"] = "others"
    path.write_text(json.dumps(stored))
    assert "2 of 3 cases are stored already" in bench(*SMALL, "--owed").output


def test_a_row_is_owed_again_where_a_peer_was_not_set_up(bench, tmp_path):
    assert bench(*SMALL).exit_code == 0
    path = tmp_path / "results" / "h200" / "gdn_decode.json"
    stored = json.loads(path.read_text())
    stored["rows"][0]["impls"]["flashinfer.gdn_decode"]["error"] = "nvidia-cutlass-dsl is not installed"
    path.write_text(json.dumps(stored))
    asked = ("--owed", "h200", "--results", str(tmp_path / "results"))
    listed = CliRunner().invoke(app, ["cases", *SMALL, *asked])
    assert listed.stdout.splitlines() == ["0 cases"]
    assert "flashinfer.gdn_decode was not set up for 1 rows: --peer 'flashinfer.gdn_decode'" in listed.output
    listed = CliRunner().invoke(app, ["cases", *SMALL, *asked, "--peer", "flashinfer.gdn_decode"])
    assert listed.stdout.splitlines()[1:] == [
        "1 cases",
        "next: blackwell-kernels bench --op gdn_decode --owed --peer 'flashinfer.gdn_decode'",
    ]
    told = bench(*SMALL, "--owed", "--peer", "vllm.packed_decode").output
    assert "3 of 3 cases are stored already" in told, "without a GPU it cannot run: no set-up would help"
    assert "2 of 3 cases are stored already" in bench(*SMALL, "--owed", "--peer", "flashinfer.gdn_decode").output
    assert bench(*SMALL, "--peer", "flashinfer.gdn_decode").exit_code == 2
    assert bench(*SMALL, "--owed", "--peer", "flashinfer.gdn").exit_code == 2


@pytest.mark.parametrize(
    ("error", "set_up"),
    [
        ("nvidia-cutlass-dsl is not installed", False),
        ("MissingRequirementError: FlashInfer's top_k is not compiled; flashinfer-jit-cache has it compiled", False),
        ("left out of this run", False),
        ("needs sm100 or sm103, this is sm90", True),
        ("takes at most 32 rows, this case has 64", True),
        ("MissingRequirementError: vLLM ships no table for this shape: vllm.TritonExperts takes its heuristic", True),
        ("RuntimeError: out of memory", True),
    ],
)
def test_what_a_package_a_compilation_or_a_search_would_change(error, set_up):
    assert results.Impl(error=error).set_up is set_up


def test_a_peer_without_its_table_is_not_set_up(monkeypatch):
    pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    with pytest.raises(MissingRequirementError) as raised:
        peers_moe.tuned_table(3, 128)
    assert not results.Impl(error=str(raised.value)).set_up


def test_what_there_is_no_time_for_is_told_in_one_line(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(worker.Job, "late", lambda self, seconds=0.0: asked.append(self.until) or len(asked) > 1)
    done = bench(*SMALL, "--time-limit", "600")
    assert done.exit_code == 1
    assert "[1/3, " in done.output
    assert f"2 of 3 cases {worker.NOT_BEGUN}" in done.output.replace("\n", " ")
    assert "next: run these cases again: --resume" in done.output
    assert 0.0 < asked[0] - time.time() <= 600.0


def test_inputs_of_a_solution_of_others_are_secret(bench, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(running, "examine", lambda *_: [])
    monkeypatch.setattr(worker, "messages", lambda job: seeds.append(job.seed) or iter([{"head": HEAD}]))
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(generate.solution(find("gdn_decode_state_bf16", "ours"))))
    for more in ((), ("--solution", str(path)), ("--solution", str(path)), ("--solution", str(path), "--seed", "7")):
        assert bench(*SMALL, *more).exit_code == 0
    assert (seeds[0], seeds[3]) == (0, 7)
    assert len(set(seeds)) == 4, "new in every run"


def test_several_operators_are_one_run(bench):
    done = bench("--set", "cpu", "--op", "gdn_decode", "--op", "moe_routing", "--case", "cpu/tiny/*=1")
    assert done.exit_code == 0, done.output
    assert "[3/3, " in done.output


def test_a_regression_against_an_earlier_run_exits_with_1(bench, tmp_path, monkeypatch):
    assert bench(*SMALL).exit_code == 0
    path = tmp_path / "results" / "h200" / "gdn_decode.json"
    old = tmp_path / "old.json"
    old.write_text(path.read_text())
    done = bench(*SMALL, "--compare", str(old))
    assert done.exit_code == 0, done.output
    assert "compared: 3 same" in done.output
    faster = results.load(path)
    for row in faster.rows:
        mine = row.impls["ours"]
        mine.samples_us = [0.5 * sample for sample in mine.samples_us]
        mine.us = 0.5 * mine.us
    results.write(old, faster)
    done = bench(*SMALL, "--compare", str(old))
    assert done.exit_code == 1
    assert done.output.count("regression: gdn_decode_state_") == 3
    assert "2.000x the time" in done.output
    # and without measuring anything, where there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--compare", str(old)).exit_code == 1
    assert bench("--compare", str(path)).exit_code == 0


def test_results_that_could_not_be_stored_are_not_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "measure_ceilings", lambda: pytest.fail("it began to measure"))
    path = tmp_path / "results" / "h200" / "gdn_decode.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    done = bench(*SMALL)
    assert isinstance(done.exception, TableError)
    assert str(path) in str(done.exception)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    done = bench(*SMALL)
    assert isinstance(done.exception, TableError)
    assert "h200: cannot be written: File exists; --results names another folder" in str(done.exception)


def test_a_full_disk_costs_its_rows_and_nobody_is_blamed(bench, tmp_path, monkeypatch):
    steps, written = [], []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def noted(self, *arguments, **more):
        self.on_step = lambda item, phase: steps.append((item, phase))
        return row(self, *arguments, **more)

    row = BENCH.row
    monkeypatch.setattr(BENCH, "row", noted)
    monkeypatch.setattr(tables.os, "fsync", full)
    done = bench(*SMALL)
    assert done.exit_code == 1
    assert done.output.count("TableError: ") == done.output.count("cannot be written: No space left on device") >= 2
    assert len(results.load(tmp_path / "results" / "h200" / "gdn_decode.json").rows) == 1
    assert steps[-1] == ("", "storing")


def test_a_case_that_cannot_be_made_is_told_and_the_run_goes_on(bench, monkeypatch):
    original = runner.generate

    def short_of_memory(case, **more):
        if case.definition.endswith("f32"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(case, **more)

    monkeypatch.setattr(runner, "generate", short_of_memory)
    done = bench(*SMALL)
    assert done.exit_code == 1
    assert done.output.count("no row: cpu/tiny/batch_size=5: OutOfMemoryError: CUDA out of memory") == 1
    assert "gdn_decode_state_bf16 cpu/tiny/batch_size=5" in done.output
