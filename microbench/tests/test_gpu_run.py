"""The command's path on a GPU, on a machine that pretends to have one: all but the CUDA calls themselves."""

import json
from types import SimpleNamespace

import pytest
import torch
from microbench_examples import HEAD, CountingEngine
from typer.testing import CliRunner

from blackwell_kernels.microbench import device, ours, results, runner
from blackwell_kernels.microbench.cli import app
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
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(device, "measure_ceilings", lambda: ceilings)
    monkeypatch.setattr(device, "best_known", lambda c: {**c.model_dump(), "launch_us": 1e-3, "copy_tbps": 1e3})
    monkeypatch.setattr(device, "facts", lambda command, commit: {**head, "command": command, "commit": commit or "c"})
    monkeypatch.setattr(device, "fib_timer", lambda where: lambda call: 7.0)
    places = ("--results", str(tmp_path / "results"), "--tables", str(tmp_path / "tables"))
    return lambda *arguments: CliRunner().invoke(app, [*arguments, *places])


def test_rows_are_stored_and_shown(bench, tmp_path):
    done = bench(*SMALL, "--commit", "abc", "--markdown", str(tmp_path / "r.md"), "--html", str(tmp_path / "r.html"))
    assert done.exit_code == 0, done.output
    assert f"source {device.source_hash()}, commit abc" in done.output
    stored = results.load(tmp_path / "results" / "h200" / "gdn_decode.json")
    assert len(stored.rows) == 3
    assert stored.ceilings.copy_tbps == 4.3
    assert stored.commit == "abc"
    assert stored.rows[0].impls["ours"].fib_us == 7.0
    assert "[3/3] gdn_decode_state_f32 cpu/tiny/batch_size=5" in done.output
    assert "vllm.packed_decode: needs a CUDA device (3 cases)" in done.output
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
    done = bench(*SMALL, "--write-dispatch")
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "tables" / "gdn" / "configs" / "h200" / "gdn_decode.json").read_text())
    assert {row["use"] for row in table["rows"]} == {"stock"}, "nothing to compare with: stays with stock"


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
    assert "ours broke the CUDA context on cpu/tiny/batch_size=5" in done.output
    assert "next: run the remaining cases without it" in done.output
    assert len(results.load(tmp_path / "results" / "h200" / "gdn_decode.json").rows) == 3
