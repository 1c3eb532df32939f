"""The page of stored results: made from them alone, and the one in the repository is what they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blackwell_kernels.e2e import cli, compare_report, demo, pages, step_report
from blackwell_kernels.errors import BlackwellKernelsError

from .test_compare import options, run, steady

__all__ = ["steady"]


def test_the_page_in_the_repository_is_what_its_results_make() -> None:
    assert (pages.ROOT / "README.md").read_text() == pages.text(), "run `blackwell-kernels e2e store`, or undo the edit"


@pytest.mark.parametrize("path", sorted(pages.ROOT.glob("*/compare-*.json")), ids=lambda path: path.name)
def test_kept_comparisons_are_judged_as_they_would_be_today(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["outcome"] == step_report.outcome(result), "look, then `blackwell-kernels e2e store --again`"
    checks = {check["name"]: check for check in result["checks"]}
    assert checks.get("gains as predicted") == step_report.check(result)
    assert checks.get("GPU memory") == compare_report.memory_check(result)


def test_a_kept_comparison_is_judged_again(tmp_path: Path) -> None:
    (kept,) = pages.ROOT.glob("h200/compare-qwen3-next-fp8-da06da84.json")
    right = json.loads(kept.read_text())
    stale = json.loads(kept.read_text())
    stale["outcome"][1] |= {"ratio": 3.058, "judged": True}
    next(check for check in stale["checks"] if check["name"] == "gains as predicted")["passed"] = False
    stale["checks"] = [check for check in stale["checks"] if check["name"] != "GPU memory"]
    path = tmp_path / "h200" / kept.name
    path.parent.mkdir()
    path.write_text(json.dumps(stale))
    done = CliRunner().invoke(cli.app, ["store", "--again", str(path), "--root", str(tmp_path), "--remark", "again"])
    assert done.exit_code == 0, done.output
    anew = json.loads(path.read_text())
    assert sorted(anew.pop("checks"), key=str) == sorted(right.pop("checks"), key=str)
    assert anew == {**right, "remarks": ["again"]}
    assert "- again" in (tmp_path / "README.md").read_text()
    (tmp_path / "soak.json").write_text('{"windows": []}')
    assert CliRunner().invoke(cli.app, ["store", "--again", str(tmp_path / "soak.json")]).exit_code == 2


def test_a_comparison_is_kept_with_its_commit_and_shown(fake: list[str], tmp_path: Path, steady: None) -> None:
    out, root = tmp_path / "out", tmp_path / "results"
    code, result, printed = run(options(fake, out, rates=(1.0, 2.0), profile=True))
    assert code == demo.OK, printed
    kept = pages.store(out, "abc1234", root, ["a short run"])
    assert kept == root / "cpu" / "compare-qwen3-next-bf16-abc1234.json"
    stored = json.loads(kept.read_text())
    assert (stored.pop("commit"), stored.pop("remarks")) == ("abc1234", ["a short run"])
    assert stored == pages.without_places(result)
    assert str(tmp_path) in json.dumps(result)
    assert str(tmp_path) not in kept.read_text()
    page = (root / "README.md").read_text()
    for text in (
        "commit abc1234",
        "xychart-beta",
        "Where a step's time goes",
        "What it does not say",
        "tokens/s",
        "- a short run",
    ):
        assert text in page
    assert page == pages.text(root)
    path = out / "result.json"
    shallow = json.loads(path.read_text())
    shallow["settings"]["serving"]["layers"] = 12
    path.write_text(json.dumps(shallow))
    assert pages.store(out, "abc1234", tmp_path / "other").name == "compare-qwen3-next-bf16-12-layers-abc1234.json"
    # a later run stands beside the first, before it
    later = dict(stored, date="2999-01-01T00:00:00+00:00")
    path.write_text(json.dumps(later))
    pages.store(out, "def5678", root)
    page = (root / "README.md").read_text()
    assert 0 < page.index("commit def5678") < page.index("commit abc1234")
    # each figure of the charts is in the file
    measured = result["figures"]["2"]["output_tokens_per_s"]["plugin"]
    assert f"{pages._plain(measured)}]" in page


def test_no_folder_of_the_machine_is_kept() -> None:
    result = {
        "machine": {"system": "Linux-6.18.44-host-name-x86_64-with-glibc2.39", "cores": 2},
        "command": 'serve --out /tmp/out/cmp \'{"dir": "/tmp/x.y/traces"}\' --host 127.0.0.1 http://h:80/v1/x',
        "checks": [{"detail": "itl at 4/s: 1.1×; tokens/s and/or sessions/s; /metrics"}],
        "starts": ["/some/where/.venv/bin/python3 -m vllm"],
        "n": 3,
    }
    found = pages.without_places(result)
    assert found["machine"] == {"system": "Linux-6.18.44", "cores": 2}
    assert found["command"].startswith("serve --out cmp ")
    assert found["command"].endswith("--host 127.0.0.1 http://h:80/v1/x")
    assert "/tmp" not in json.dumps(found)
    assert found["checks"] == result["checks"]
    assert (found["starts"], found["n"]) == (["python3 -m vllm"], 3)
    assert pages.without_places(found) == found


def test_results_find_their_machine() -> None:
    assert pages.place({"gpu": "NVIDIA H200"}, "cuda") == "h200"
    assert pages.place({"gpu": "NVIDIA B200 180GB"}, "cuda") == "b200"
    assert pages.place({"cores": 2}, "cpu") == "cpu"


@pytest.mark.parametrize("content", [None, "{", '{"comparisons": []}'])
def test_what_is_no_result_is_refused(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(BlackwellKernelsError, match=r"no result in|neither a comparison"):
        pages.store(tmp_path, "abc", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_soak_is_shown_by_window(tmp_path: Path) -> None:
    row = {
        "begin": 0.0,
        "requests": 3,
        "tokens_per_s": 5.0,
        "ttft_p99": 0.2,
        "ttft_n": 3,
        "itl_p99": 0.05,
        "itl_n": 9,
        "host_cpu": 1,
    }
    result = {
        **{"title": "Soak: a model, plugin", "date": "today", "command": "soak", "commit": "abc", "state": "complete"},
        **{"versions": {"vllm": "1"}, "machine": {"cores": 2}, "backend": "cpu", "complaints": [], "faults": {}},
        "series": {"host_cpu": {"mean": 0.9, "max": 1.0}},
        "windows": [{**row, "end": 60.0}, {**row, "end": 120.0, "ttft_p99": 14.9234}],
        "checks": [{"name": "answers", "passed": True, "detail": "3 complete | 0 errors"}],
        "load": {"errors": {}, "error_examples": {}},
    }
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "soak-x.json").write_text(json.dumps(result))
    page = pages.text(tmp_path)
    assert 'x-axis "minutes" [1, 2]' in page
    assert "line [200, 14920]" in page
    assert "busy 90% of the time" in page
    assert "| ok | answers | 3 complete \\| 0 errors |" in page


def test_more_memory_than_stock_is_told() -> None:
    def point(arm: str, gib: Any) -> dict[str, Any]:
        most = {"max": gib * 2**30} if isinstance(gib, float) else gib
        return {"arm": arm, "series": {"gpu_memory": most}}

    said = [
        {"arm": "stock", "memory_gib": {"weights": 75.0, "graphs": 1.0}},
        {"arm": "plugin", "memory_gib": {"graphs": 3.5}},
    ]
    for plugin, passed in ((101.9, True), (102.1, False)):
        result = {"points": [point("stock", 100.0), point("plugin", 90.0), point("plugin", plugin)], "starts": said}
        check = compare_report.memory_check(result)
        assert check is not None
        assert check["passed"] is passed
        assert check["detail"] == f"{plugin} GiB, stock 100.0 GiB (at most 1.02×); graphs 3.5, 1.0"
    # what was on its card before is not the plugin's
    beside = [said[0], {"arm": "plugin", "memory_gib": {"held before the start": 13.5}}]
    check = compare_report.memory_check({"points": [point("stock", 100.0), point("plugin", 113.5)], "starts": beside})
    assert check is not None
    assert (check["passed"], check["detail"]) == (True, "100.0 GiB, stock 100.0 GiB (at most 1.02×)")
    result = {"points": [point("stock", 100.0), point("plugin", "not measured: no GPU")], "starts": []}
    assert compare_report.memory_check(result) is None
