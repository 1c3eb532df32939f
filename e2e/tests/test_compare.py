"""A whole comparison of two stand-ins: complete, resumed, cut short by deaths, and not fooled."""

from __future__ import annotations

import io
import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blackwell_kernels.e2e import (
    alike,
    compare,
    compare_report,
    demo,
    kernel_time,
    load,
    pages,
    points,
    predict,
    report,
    serving,
)
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.errors import BlackwellKernelsError, ServerError

from .test_demo import Outside

PROBES = sum(n + alike.FORCED < 1000 for n in alike.PROMPTS) * len(alike.COMPANIES)  # requests before the load
QUIET = {"gap_cap_s": 0.1, "output_scale": 0.02}


def options(fake: list[str], out: Path, **changes: Any) -> compare.Options:
    served = serving.Serving.choose("qwen3-next", backend="cpu", command=fake, env=changes.pop("env", {}))
    made = compare.Options(
        serving=served,
        scenario=serving.traffic(served, None, QUIET, 0),
        setup=points.Setup(seconds=1.5, ramp_s=0.3, drain_s=0.7, users=8),
        out=out,
        rates=(1.0, 2.0),
        warmup_s=0.0,
        repeats=1,
        command="test",
    )
    return replace(made, **changes)


def run(chosen: compare.Options) -> tuple[int, dict[str, Any], str]:
    printed = io.StringIO()
    code = compare.run(chosen, Steps(Console(file=printed)), Console(file=printed, width=140))
    return code, json.loads((chosen.out / "result.json").read_text()), printed.getvalue()


def passed(result: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["passed"] for check in result["checks"]}


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """How busy this machine is with other things is not under test."""
    monkeypatch.setattr("blackwell_kernels.e2e.metrics.LATE_S", 60.0)
    monkeypatch.setattr("blackwell_kernels.e2e.metrics.CPU_SHARE", 60.0)
    monkeypatch.setattr("blackwell_kernels.e2e.points.SILENT_S", 60.0)
    monkeypatch.setattr("blackwell_kernels.e2e.compare_report.START_UP", 60.0)


def test_complete_then_resumed(fake: list[str], tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count(10)
    monkeypatch.setattr("blackwell_kernels.e2e.watch.gpu_memory_gib", lambda visible: float(next(looks)))
    chosen = options(fake, tmp_path, repeats=2, rates=(2.0,), warmup_s=1.0)
    code, result, printed = run(chosen)
    assert code == demo.OK, printed
    assert set(passed(result).values()) <= {True, None}
    assert [(p["run"], p["arm"], p["rate"]) for p in result["points"]] == [
        *((0, "stock", 2.0), (0, "plugin", 2.0), (1, "stock", 2.0), (1, "plugin", 2.0)),
    ]
    whens = (compare.BEFORE, "held when ready", "after the probes", "after the warm-up")
    held = [row["memory_gib"].get(when) for row in result["starts"] for when in whens]
    assert held == list(range(10, 26))
    commands = {row["arm"]: row["command"] for row in result["starts"]}
    assert "--plugin blackwell_kernels" in commands["plugin"]
    assert "--plugin" not in commands["stock"]
    # both arms, in every run, were sent the same requests
    sent = [
        {
            (row["session"], row["turn"]): (row["prompt_tokens"], row["expected_tokens"])
            for row in load.read(compare.point_folder(chosen, p["run"], p["arm"], 2.0))[0]
            if row["kind"] == "request"
        }
        for p in result["points"]
    ]
    for other in sent[1:]:
        both = sent[0].keys() & other.keys()
        assert len(both) >= 3
        assert all(sent[0][key] == other[key] for key in both)
    for p in result["points"]:
        assert {row["figure"]: row["agrees"] for row in p["cross_check"]}["output_tokens"]
        assert p["series"]["kv_cache"]["max"] == 0.25
        assert isinstance(p["series"]["gpu_memory"], dict) or "not measured" in p["series"]["gpu_memory"]
        assert p["summary"]["itl_s"]["p50"] >= 0.005, "the stand-in makes a token every 5 ms"

    again, repeated, printed = run(chosen)
    assert again == code
    assert printed.count("already measured") == 4
    assert repeated["points"] == result["points"]
    assert repeated["figures"] == result["figures"]

    html = (tmp_path / "report.html").read_text()
    page = Outside()
    page.feed(html)
    assert page.fetched == []
    for text in ("Plugin over stock", "Timeline", "Throughput and goodput", "gdn_decode", "no compilation after"):
        assert text in html
    assert "## Load points" in (tmp_path / "report.md").read_text()

    code, untouched, printed = run(replace(chosen, setup=replace(chosen.setup, seconds=3.0)))
    assert code == demo.FAILED
    assert untouched == repeated
    assert "holds a comparison with other settings (setup): give another --out" in printed


def test_both_at_once_then_swapped_with_profiles(fake: list[str], tmp_path: Path, steady: None) -> None:
    env = {"plugin": {"FAKE_SLOW": "0.5", "BLACKWELL_KERNELS_FORCE": "moe"}}
    chosen = options(fake, tmp_path, repeats=2, rates=(2.0,), gpus=(0, 3), profile=True, env=env)
    # two load generators of several processes, side by side
    chosen = replace(chosen, setup=replace(chosen.setup, processes=2))
    code, result, printed = run(chosen)
    assert code == demo.OK, printed
    gpus = {(row["run"], row["arm"]): row["gpus"] for row in result["starts"]}
    assert gpus == {(0, "stock"): [0], (0, "plugin"): [3], (1, "stock"): [3], (1, "plugin"): [0]}
    assert any("at once" in note for note in compare_report.notes(result))
    for arm, us in (("stock", 400), ("plugin", 200)):
        assert result["profiles"][arm]["decode 4"]["groups"]["moe"]["us"] == us
    assert not list(tmp_path.glob("run-*/start-*/traces")), "what was read of a trace is kept, not the trace"
    # no kernel was measured on this machine: no gain is predicted, and none is judged
    assert result["prediction"]["gains"]["tpot_1"] == 1.0
    assert [row["judged"] for row in result["outcome"]] == [False] * 3
    written = (tmp_path / "prediction.json").stat().st_mtime
    assert all(written <= p["window"][0] for p in result["points"]), "before any load point of either arm"
    html = (tmp_path / "report.html").read_text()
    for text in ("Where a step", "Prediction, made before", "decode 4", "no results of"):
        assert text in html
    assert printed.count("profiling") == 2, "once an arm"


def test_a_prediction_is_written_before_the_plugin_starts(
    fake: list[str], tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "machine", lambda backend: {"gpu": "NVIDIA H200"})
    row = {
        "op": "moe",
        "case": "num_tokens=1",
        "commit": "abc",
        "stock": "vllm",
        "best_peer": "vllm",
        "dispatched": "ours",
    }
    row |= {"axes": {"num_tokens": 1, "model": "qwen3-next", "tp": 1, "ep": 1, "dtype": "fp8"}}
    row |= {"impls": {"ours": {"us": 1.0}, "vllm": {"us": 2.0}}}
    (tmp_path / "measured" / "h200").mkdir(parents=True)
    (tmp_path / "measured/h200/moe.json").write_text(json.dumps({"gpu": "NVIDIA H200", "rows": [row]}))
    chosen = options(fake, tmp_path / "out", rates=(2.0,), profile=True, measured=tmp_path / "measured")
    _, result, _ = run(chosen)
    found = result["prediction"]["steps"]["decode 1"]
    assert found["device_us"] == pytest.approx(found["stock_us"] - 200)
    assert (found["bound"], found["predicted_us"]) == ("host", found["stock_us"]), "its kernels run for 500 of 5,000 µs"
    assert result["outcome"][1]["predicted"] == 1.0
    written = (tmp_path / "out/prediction.json").stat().st_mtime
    assert written <= (tmp_path / "out/run-0-stock/rate-2/point.json").stat().st_mtime
    assert written <= (tmp_path / "out/run-0-plugin/start-0/start.json").stat().st_mtime
    assert "gains as predicted" not in passed(result), "nothing is judged on a CPU"


def test_the_prediction_looks_up_what_stock_was_told_to_run(fake: list[str], tmp_path: Path) -> None:
    def chosen(*args: str, **only: tuple[str, ...]) -> Any:
        (tmp_path / "machine.json").write_text('{"machine": {"gpu": "G"}}')
        served = serving.Serving.choose("qwen3-next", backend="cuda", weights="dummy", args=args, only=only)
        return compare.served(replace(options(fake, tmp_path), serving=served)).chosen

    assert chosen() == {"gdn_prefill": "vllm.fla_chunk"}, "what is given when nothing is asked for"
    assert chosen("--gdn-prefill-backend", "flashinfer") == {}
    assert chosen(stock=("--gdn-prefill-backend=flashinfer",)) == {}
    deep = {"gdn_prefill": "vllm.fla_chunk", "moe": "vllm.DeepGemmExperts"}
    assert chosen("--moe-backend=deep_gemm", stock=("--gdn-prefill-backend", "triton")) == deep


class Arm:
    """Stands for a block: meets the other one, then ends as it was told, or when it is cancelled."""

    def __init__(self, meeting: threading.Barrier, error: Exception | None = None, waits: bool = False) -> None:
        self.meeting, self.error, self.waits = meeting, error, waits
        self.cancelled = threading.Event()
        self.finished = False

    def run(self) -> None:
        self.meeting.wait(60)
        if self.waits:
            assert self.cancelled.wait(60)
            return
        if self.error:
            raise self.error
        self.finished = True

    def cancel(self) -> None:
        self.cancelled.set()


def test_both_arms_are_there_at_the_same_time() -> None:
    meeting = threading.Barrier(2)  # broken when one waits for the other in vain
    both: Any = [Arm(meeting), Arm(meeting)]
    compare._together(both)
    assert [arm.finished for arm in both] == [True, True]


def test_an_error_of_one_arm_ends_the_other_but_running_out_of_time_does_not() -> None:
    meeting = threading.Barrier(2)
    broken: Any = [Arm(meeting, ServerError("gone")), Arm(meeting, waits=True)]
    with pytest.raises(ServerError, match="gone"):
        compare._together(broken)
    late: Any = [Arm(meeting, compare.TimeIsUp("late")), Arm(meeting)]
    with pytest.raises(compare.TimeIsUp):
        compare._together(late)
    assert late[1].finished
    assert not late[1].cancelled.is_set()


def test_a_signal_whose_exception_was_dropped_ends_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt("Ctrl-C")

    meeting = threading.Barrier(2)
    both: Any = [Arm(meeting, waits=True), Arm(meeting, waits=True)]
    monkeypatch.setattr(compare, "raise_if_stopped", stopped)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        compare._together(both)
    assert all(arm.cancelled.is_set() for arm in both)


def test_a_time_limit_leaves_the_rest_to_the_next_call(
    fake: list[str], tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(self: compare.Clock) -> float:
        limited = self.limit_s is not None and list(tmp_path.glob("run-*/rate-*/point.json"))
        return 1.0 if limited else 1000.0

    monkeypatch.setattr(compare.Clock, "left", left)
    chosen = options(fake, tmp_path, rates=(2.0, 3.0), time_limit_s=1000.0)
    code, result, printed = run(chosen)
    assert code == demo.INTERRUPTED, printed
    assert [(p["arm"], p["rate"]) for p in result["points"]] == [("stock", 2.0)]
    assert "would take 8 s of the 1 s left; the same command goes on from here" in result["state"]
    assert result["losses"] == []
    code, result, printed = run(replace(chosen, time_limit_s=None))
    assert code == demo.OK, printed
    assert len(result["points"]) == 4
    assert [p["rate"] for p in result["points"] if p["arm"] == "stock"] == [2.0, 3.0]


def test_a_time_limit_too_short_for_anything_starts_no_server(fake: list[str], tmp_path: Path, cache: Path) -> None:
    code, result, _ = run(options(fake, tmp_path, time_limit_s=2.0))
    assert code == demo.INTERRUPTED
    assert result["starts"] == []
    assert "a server that is not started yet" in result["state"]


def test_a_start_that_took_long_is_not_begun_again_with_too_little_time(
    fake: list[str], tmp_path: Path, cache: Path
) -> None:
    before = tmp_path / "run-0-stock/start-0/start.json"
    before.parent.mkdir(parents=True)
    before.write_text('{"ready_s": 500.0, "command": "x", "gpus": []}')
    code, result, _ = run(options(fake, tmp_path, time_limit_s=400.0))
    assert code == demo.INTERRUPTED
    assert len(result["starts"]) == 1
    assert "a server that is not started yet would take 508 s" in result["state"]


def test_an_arm_that_cannot_start_stops_the_other(fake: list[str], tmp_path: Path, steady: None) -> None:
    # without rates nothing can be measured when stock, which searches for them, does not start
    chosen = options(fake, tmp_path, rates=(), gpus=(0, 1), env={"stock": {"FAKE_START": "fail"}})
    code, result, printed = run(chosen)
    assert code == demo.ENVIRONMENT, printed
    assert "the reason why it cannot start" in result["state"]
    assert [loss["arm"] for loss in result["losses"]] == ["stock", "stock"]


def test_gpus_are_for_one_server_or_for_two(fake: list[str], tmp_path: Path) -> None:
    with pytest.raises(BlackwellKernelsError, match=r"3 GPUs for servers of 1: give 1, .* or 2, for both at once"):
        options(fake, tmp_path, gpus=(0, 1, 2))
    pinned = options(fake, tmp_path, gpus=(1,))
    assert not pinned.at_once
    assert pinned.gpus_of(0, "stock") == pinned.gpus_of(1, "plugin") == (1,)


def test_a_server_that_dies_once_is_started_again_and_the_loss_is_told(
    fake: list[str], tmp_path: Path, steady: None
) -> None:
    dead = tmp_path / "dead"
    env = {"plugin": {"FAKE_DIE_AFTER": str(PROBES + 4), "FAKE_DIE_ONCE": str(dead)}}
    code, result, printed = run(options(fake, tmp_path / "out", env=env))
    assert dead.exists()
    assert code == demo.OK, printed
    assert passed(result)["complete"]
    (loss,) = result["losses"]
    assert (loss["arm"], loss["run"], loss["attempt"]) == ("plugin", 0, 0)
    assert "killed by SIGKILL" in loss["error"]
    assert "note: Lost at" in printed
    assert [row["arm"] for row in result["starts"]] == ["stock", "plugin", "plugin"]
    # what was recorded until the death stays beside the point that replaced it
    kept = list((tmp_path / "out" / "run-0-plugin").glob("unfinished-*/records.jsonl"))
    assert len(kept) == 1
    assert kept[0].read_text().count("\n") > 1


def test_an_arm_that_keeps_dying_leaves_the_others_figures(fake: list[str], tmp_path: Path, steady: None) -> None:
    env = {"plugin": {"FAKE_DIE_AFTER": str(PROBES + 2)}}
    code, result, printed = run(options(fake, tmp_path, env=env, rates=(2.0,)))
    assert code == demo.FAILED, printed
    assert not passed(result)["complete"]
    assert [p["arm"] for p in result["points"]] == ["stock"]
    assert [loss["attempt"] for loss in result["losses"]] == [0, 1]
    assert (tmp_path / "report.html").exists()


def test_speed_never_hides_wrongness(fake: list[str], tmp_path: Path, steady: None) -> None:
    env = {"plugin": {"FAKE_WRONG": "0.3", "FAKE_JIT_AFTER": str(PROBES + 3)}}
    code, result, printed = run(options(fake, tmp_path, env=env, rates=(2.0,)))
    assert code == demo.FAILED, printed
    found = {check["name"]: check for check in result["checks"]}
    assert not found["same answers"]["passed"]
    assert "prefill 7.50 (0.3000 over " in found["same answers"]["detail"]
    assert "decode 7.50 (0.3000 over " in found["same answers"]["detail"]
    assert not found["no compilation after warm-up"]["passed"]
    assert "1 kernels of ours" in found["no compilation after warm-up"]["detail"]
    assert "plugin: _late_kernel" in found["no compilation after warm-up"]["detail"]


def test_what_rounding_does_to_stock_is_allowed_to_the_plugin_and_no_more(
    fake: list[str], tmp_path: Path, steady: None
) -> None:
    noisy = {"FAKE_NOISE": "0.4"}
    code, result, printed = run(options(fake, tmp_path / "a", env={"stock": noisy, "plugin": noisy}, rates=(2.0,)))
    assert code == demo.OK, printed
    assert all(0.3 < phase["noise"] < phase["unrelated"] / 3 for phase in result["probe"]["phases"].values())
    wrong = {**noisy, "FAKE_WRONG": "1.2"}
    code, result, printed = run(options(fake, tmp_path / "b", env={"stock": noisy, "plugin": wrong}, rates=(2.0,)))
    assert code == demo.FAILED, printed
    assert not passed(result)["same answers"]


def test_kernels_that_the_start_missed_are_met_before_the_load_points(
    fake: list[str], tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WARMED", ("cpu",))
    env = {"plugin": {"FAKE_JIT_AFTER": str(PROBES + 3)}}
    code, result, printed = run(options(fake, tmp_path, env=env, rates=(2.0,), warmup_s=1.0))
    assert code == demo.OK, printed
    assert passed(result)["no compilation after warm-up"]
    met = json.loads((tmp_path / "run-0-plugin/start-0/warm-up.json").read_text())
    assert met["compiled"] == ["_late_kernel"]
    assert "requests of all sizes met 1 kernels to compile" in printed
    assert passed(result)["start-up"] is None, "one start, of unknown caches"


def test_requests_that_fail_fail_the_comparison(fake: list[str], tmp_path: Path, steady: None) -> None:
    code, result, _ = run(options(fake, tmp_path, env={"stock": {"FAKE_SHORT": "1"}}, rates=(2.0,)))
    assert code == demo.FAILED
    assert not passed(result)["answers"]
    assert result["points"][0]["summary"]["turn_goodput"] == 0


def test_a_saturated_load_generator_invalidates_a_load_point(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr("blackwell_kernels.e2e.metrics.LATE_S", -1.0)
    code, result, printed = run(options(fake, tmp_path, rates=(2.0,)))
    assert code == demo.FAILED
    assert not passed(result)["load generator kept up"]
    assert all("was sent" in p["invalid"][0] for p in result["points"])
    assert result["figures"] == {"2": {}}, "no ratio is made of it"
    assert "plugin (invalid)" in (tmp_path / "report.md").read_text()
    assert "give more --users or --processes" in printed


def test_the_search_for_the_knee_decides_where_both_arms_are_measured(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that keeps up with 1.2 sessions/s, of 50 tokens each."""
    chosen = options(fake, tmp_path, rates=())
    looked = []

    def look(server: Any, scenario: Any, folder: Path, setup: Any, *_: Any) -> dict[str, Any]:
        rate = scenario.sessions_per_s
        looked.append((rate, scenario.seed, setup.seconds))
        summary = {"turn_goodput": 1.0 if rate <= 1.2 else 0.4, "output_tokens_per_s": 50 * min(rate, 1.2)}
        return {"invalid": ["was late"] if rate > 100 else [], "summary": summary}

    monkeypatch.setattr(points, "measure", look)
    nothing: Any = None
    block = compare.Block(chosen, 0, "stock", tmp_path, Steps(Console(file=io.StringIO())), compare.Clock(None))
    block._search(nothing, tmp_path)
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["knee"] == pytest.approx(1.19)
    assert compare.rates(chosen) == tuple(found["rates"]) == (0.595, 0.892, 1.19, 2.38)
    assert [rate for rate, _, _ in looked] == [0.25, 0.5, 1.0, 2.0, 1.41, 1.19]
    assert len({seed for _, seed, _ in looked}) == len(looked), "no rate finds another's prompts in the cache"
    assert {seconds for _, _, seconds in looked} == {10.0}
    late = compare.Block(replace(chosen, first_rate=200.0), 0, "stock", tmp_path, block.steps, compare.Clock(None))
    with pytest.raises(BlackwellKernelsError, match="search at 200 sessions/s: was late"):
        late._search(nothing, tmp_path)


def test_a_profile_that_is_there_has_its_prediction(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that ends while it predicts profiles again."""
    chosen = options(fake, tmp_path, profile=True)
    (tmp_path / "machine.json").write_text('{"machine": {}}')
    monkeypatch.setattr(kernel_time, "capture", lambda *_: {"decode 1": {}})

    def ends(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "make", ends)
    server: Any = None
    monkeypatch.setattr(demo, "while_serving", lambda server, work: work())
    block = compare.Block(chosen, 0, "stock", tmp_path, Steps(Console(file=io.StringIO())), compare.Clock(None))
    with pytest.raises(KeyboardInterrupt):
        block._profile(server, tmp_path / "traces")
    again = compare.Block(chosen, 0, "stock", tmp_path, block.steps, compare.Clock(None))
    assert again._wants_profile()


def test_what_is_weak_about_a_load_point_is_said(fake: list[str], tmp_path: Path) -> None:
    """The one that is kept, as if it had run on a busy host."""
    kept = json.loads((pages.ROOT / "h200/compare-qwen3-next-fp8-da06da84.json").read_text())
    for given in kept["settings"]["serving"]["env"].values():
        given["VLLM_X"] = "1"
    said = "\n".join(compare_report.notes(kept))
    assert "Only the plugin's server was given BLACKWELL_KERNELS_REPLAY=1." in said
    assert "Only the stock's" not in said
    assert "busy" not in said
    kept["points"][0]["series"]["host_cpu"] = {"mean": 0.97, "max": 1.0}
    kept["settings"]["serving"]["only"]["stock"] = "--x 1"
    said = "\n".join(compare_report.notes(kept))
    assert "1 sessions/s, run 0, stock: the host's CPUs were 97% busy" in said
    assert "Only the stock's server was given --x 1." in said
    assert "searched tables" not in said
    kept["settings"]["serving"]["env"] = {arm: {"VLLM_TUNED_CONFIG_FOLDER": "vllm"} for arm in ("stock", "plugin")}
    assert "Stock's Triton experts had searched tables" in "\n".join(compare_report.notes(kept))
    assert compare_report.tables(kept)["machine"][2][0][-1] == "97%"
    first = dict(compare_report.key_figures(kept))
    assert first["TTFT p99 at 5 sessions/s, plugin over stock"].endswith("], n too small")
    assert first["ITL p99 at 5 sessions/s, plugin over stock"].endswith("]")


def test_an_arm_has_one_colour_in_every_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blackwell_kernels.e2e.report.to_html", lambda figure: figure)
    kept = json.loads((pages.ROOT / "h200/compare-qwen3-next-fp8-da06da84.json").read_text())
    cdfs: Any = report.cdfs({"stock": [1.0, 2.0], "plugin": [1.0]})
    rates: Any = compare_report._over_rates(kept)
    for figure in (cdfs, rates):
        lines = [line for line in figure.data if line.name]
        assert {line.name.split(",")[0]: line.line.color for line in lines} == report.ARM_COLOURS
        assert len({(line.line.color, line.line.dash) for line in lines}) == len(lines)


def test_rates_come_from_the_search(fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(fake, tmp_path, rates=())
    assert compare.rates(chosen) == ()
    (tmp_path / "search.json").write_text(json.dumps({"rates": [1.0, 1.5, 2.0]}))
    assert compare.rates(chosen) == (1.0, 1.5, 2.0)
    assert compare.rates(replace(chosen, rates=(3.0, 0.5))) == (0.5, 3.0)
    assert compare.seed(chosen, 1.0) != compare.seed(chosen, 1.5) != compare.seed(chosen, 1.5, "search")


@pytest.mark.parametrize(
    ("what", "change"),
    [("versions", {"versions": {}}), ("sources", {"sources": "0" * 12}), ("GPU", {"machine": {"gpu": "another"}})],
)
def test_load_points_of_other_code_or_chips_are_not_mixed(
    fake: list[str], tmp_path: Path, cache: Path, what: str, change: dict[str, Any]
) -> None:
    chosen, steps = options(fake, tmp_path / "out"), Steps(Console(file=io.StringIO()))
    compare.prepare(chosen, steps)
    path = chosen.out / "machine.json"
    before = json.loads(path.read_text())
    assert len(before["sources"]) == 12
    compare.prepare(chosen, steps)
    path.write_text(json.dumps({**before, **change}))
    compare.prepare(chosen, steps)  # nothing was measured yet
    path.write_text(json.dumps({**before, **change}))
    point = compare.point_folder(chosen, 0, "stock", 1.0) / points.DONE
    point.parent.mkdir(parents=True)
    point.write_text("{}")
    with pytest.raises(BlackwellKernelsError, match=f"load points of other {what}"):
        compare.prepare(chosen, steps)
    assert json.loads(path.read_text()) == {**before, **change}, "kept as it was"


@pytest.mark.parametrize("name", ["compare.json", "search.json"])
def test_a_damaged_file_of_an_earlier_call_is_named(fake: list[str], tmp_path: Path, cache: Path, name: str) -> None:
    chosen = options(fake, tmp_path / "out", rates=())
    compare.prepare(chosen, Steps(Console(file=io.StringIO())))
    (tmp_path / "out" / name).write_text("{")
    printed = io.StringIO()
    assert compare.run(chosen, Steps(Console(file=printed)), Console(file=printed, width=400)) == demo.FAILED
    assert f"{name} is corrupt" in printed.getvalue()
    assert "remove it, and it is made again" in printed.getvalue()
    assert not list((tmp_path / "out").glob("run-*"))


def test_a_loss_that_a_full_disk_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"arm": "stock"}\n{"arm": "plu')
    assert compare_report._lines(tmp_path / "losses.jsonl") == [{"arm": "stock"}]


def test_a_corrupt_source_ends_it_before_a_server_starts(fake: list[str], tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "s.jsonl"
    source.write_text("{")
    chosen = options(fake, tmp_path / "out")
    printed = io.StringIO()
    chosen = replace(chosen, setup=replace(chosen.setup, source=source))
    assert compare.run(chosen, Steps(Console(file=printed)), Console(file=printed, width=140)) == demo.FAILED
    assert "s.jsonl:1: this is no JSON" in printed.getvalue()
    assert not list((tmp_path / "out").glob("run-*"))
