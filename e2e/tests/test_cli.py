"""The command line: what cannot be is told in a line with exit code 2, before anything is started or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blackwell_kernels.e2e import cli, compare, demo, equal, golden, predict, soak

from .test_metrics import request


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> int:
        raise AssertionError("it was started")

    for module in (demo, compare, soak, equal):
        monkeypatch.setattr(module, "run", started)
    monkeypatch.setattr(golden, "write", started)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("demo", "--model", "llama"), "unknown model 'llama'"),
        (("demo", "--quant", "fp4"), "no 'tiny' 'fp4' checkpoint"),
        (("golden", "--model", "llama"), "unknown model 'llama'"),
        (("equal", "llama"), "unknown model 'llama'"),
        (("equal", "qwen3-next", "--size", "huge"), "no 'huge' 'fp8' checkpoint"),
        (("equal", "qwen3-next", "--layers", "3"), "3 layers"),
        (("equal", "qwen3-next", "--corrupt", "dsa_topk"), "has no operator dsa_topk to corrupt"),
        (("equal", "qwen3-next", "--arms", "stck"), "unknown stck; there are stock, plugin, eager"),
        (("equal", "qwen3-next", "--llm", "{"), "Expecting property name"),
        (("compare", "llama"), "unknown model 'llama'"),
        (("compare", "qwen3-next", "--rates", "1,0"), "--rates 1, 0: sessions per second are above 0"),
        (("compare", "qwen3-next", "--rates", "nan"), "--rates nan"),
        (("compare", "qwen3-next", "--rates", "fast"), "could not convert string to float"),
        (("compare", "qwen3-next", "--scenario", "agents"), "unknown scenario 'agents'"),
        (("soak", "qwen3-next", "--set", "speed=2"), "unknown scenario settings speed"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], complaint: str) -> None:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert (done.exit_code, complaint in done.output) == (2, True), done.output


def test_a_file_without_a_record_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("none\n")
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "no record in" in done.output
    assert not (tmp_path / "out").exists()


def test_a_report_of_records_has_intervals_an_slo_and_a_window(tmp_path: Path) -> None:
    """Thirty sessions of three turns, one a second; the first ten are slow and do not count."""
    path = tmp_path / "records.jsonl"
    rows: list[dict[str, Any]] = [{"kind": "start", "time": 0.0, "started": 0.0, "scenario": {}, "worker": 0}]
    for session in range(30):
        for turn in range(3):
            at, first = session + turn / 4, 0.9 if session < 10 else 0.1 + session / 1000
            rows.append(request(session, turn, at, [at + first, at + first + 0.02, at + first + 0.04]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["report", str(path), "--out", str(tmp_path / "out"), "--json"]
    whole = json.loads(CliRunner().invoke(cli.app, arguments).output)
    assert whole["command"] == f"blackwell-kernels e2e report {path}"
    done = CliRunner().invoke(cli.app, [*arguments, "--ramp", "10", "--gpu-count", "2", "--slo-ttft", "0.115"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    assert result["command"].endswith("--ramp 10 --gpu-count 2 --slo-ttft 0.115")
    ttft = result["load"]["figures"]["ttft_p50"]
    low, high = ttft["interval"]
    assert 0.11 < low < ttft["value"] < high < 0.13
    assert (ttft["n"], ttft["enough"]) == (59, True), "the last turn ends the window"
    assert not result["load"]["figures"]["ttft_p99"]["enough"]
    assert result["load"]["output_tokens_per_s_per_gpu"] == pytest.approx(result["load"]["output_tokens_per_s"] / 2)
    good = result["load"]["figures"]["turn_goodput"]
    assert good["value"] == pytest.approx(result["load"]["turn_goodput"])
    assert 0.1 < good["value"] < 0.5 < whole["load"]["turn_goodput"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| ttft p50 |" in page
    assert "n too small" in page
    done = CliRunner().invoke(cli.app, [*arguments, "--ramp", "60"])
    assert (done.exit_code, "requests were sent for 29.5 s" in done.output) == (2, True)


def test_stock_gets_the_tables_that_were_searched_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[compare.Options] = []
    monkeypatch.setattr(compare, "run", lambda options: asked.append(options) or 0)
    monkeypatch.setattr(demo, "machine", lambda backend: {"gpu": "NVIDIA H200"})
    folder = tmp_path / "h200" / "tune" / "vllm"
    folder.mkdir(parents=True)
    (folder / "E=512.json").write_text("{}")
    (tmp_path / "h200" / "moe.json").write_text('{"gpu": "NVIDIA H200", "rows": []}')

    def envs(backend: str, *more: str) -> tuple[str | None, str | None]:
        monkeypatch.setattr(demo, "detect_backend", lambda: backend)
        command = ["compare", "qwen3-next", "--measured", str(tmp_path), "--rates", "1", *more]
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, done.output
        stock, plugin = (asked[-1].serving.env[arm].get(predict.TABLES) for arm in ("stock", "plugin"))
        return stock, plugin

    assert envs("cuda") == (str(folder), str(folder))
    assert envs("cuda", "--no-searched") == (None, None)
    assert envs("cuda", "--env", f"{predict.TABLES}=mine") == ("mine", "mine")
    assert envs("cpu") == (None, None)


@pytest.mark.parametrize(("backend", "size"), [("cuda", "real"), ("cpu", "tiny")])
def test_the_size_that_is_compared_is_one_that_the_machine_holds(
    backend: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(demo, "detect_backend", lambda: backend)
    monkeypatch.setattr(equal, "run", lambda options: asked.append(options.size) or 0)
    assert CliRunner().invoke(cli.app, ["equal", "deepseek"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["equal", "deepseek", "--size", "small"]).exit_code == 0
    assert asked == [size, "small"]
