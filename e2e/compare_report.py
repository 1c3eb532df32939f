"""What a comparison says: from stored load points to verdicts, checks, tables and plots."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from blackwell_kernels.e2e import alike, conditions, metrics, points, predict, probe, ratios, report, step_report, watch
from blackwell_kernels.e2e.compare import BEFORE, Options, point_folder, rates
from blackwell_kernels.e2e.ratios import ARMS
from blackwell_kernels.e2e.report import ms, number, percent

START_UP = 1.1  # plugin over stock, at most
MEMORY = 1.02  # the same
BUSY = 0.9  # of the host's CPUs: what is measured beside so much else is the host's
LATENCIES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E", "completion": "session completion"}
BRIEF = ("output_tokens_per_s", "turn_goodput", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "tpot_p50", "e2e_p50")
NAMES = {"output_tokens_per_s": "output tokens/s", "total_tokens_per_s": "total tokens/s"}


def collect(options: Options, state: str) -> dict[str, Any]:
    """Everything that was measured, read back from the files; `state` is complete or why not."""
    s = options.serving
    depth = f", {s.layers} layers" if s.layers else ""
    result: dict[str, Any] = {
        "schema": 1,
        "title": f"{s.model} ({s.size}{depth}, {s.quant}) under agent sessions: plugin against stock vLLM",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": options.command,
        "state": state,
        **(_json(options.out / "machine.json") or {"versions": {}, "machine": {}}),
        "settings": options.to_dict(),
        "search": _json(options.out / "search.json"),
        "rates": list(rates(options)),
    }
    found = [
        point
        for run in range(options.repeats)
        for arm in ARMS
        for rate in result["rates"]
        if (point := points.stored(point_folder(options, run, arm, rate)))
    ]
    starts = _starts(options)
    result |= {
        "points": found,
        "figures": {f"{rate:g}": _figures(options, found, rate) for rate in result["rates"]},
        "starts": [{k: row.get(k) for k in _TOLD_OF_STARTS} for row in starts],
        "probe": _probe(starts),
        "activation": _activation(starts),
        "losses": _lines(options.out / "losses.jsonl"),
        "profiles": {arm: _json(options.out / f"profile-{arm}.json") for arm in ARMS},
        "prediction": _json(options.out / "prediction.json"),
    }
    result["outcome"] = step_report.outcome(result)
    result["checks"] = checks(result, options.repeats)
    return result


_TOLD_OF_STARTS = ("arm", "run", "ready_s", "gpus", "command", "memory_gib")


def _starts(options: Options) -> list[dict[str, Any]]:
    rows = []
    for run in range(options.repeats):
        for arm in ARMS:
            for home in sorted((options.out / f"run-{run}-{arm}").glob("start-*")):
                if begun := _json(home / "start.json"):
                    scores = (_json(home / "probe.json") or {}).get("scores")
                    rows.append({"arm": arm, "run": run, "home": home, "scores": scores, **begun})
    return rows


def _figures(options: Options, found: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Rows of ratios.compare, from the runs in which both arms have a valid point at this rate."""
    runs: dict[str, dict[int, metrics.Run]] = {arm: {} for arm in ARMS}
    for point in found:
        if point["rate"] == rate and not point["invalid"]:
            folder = point_folder(options, point["run"], point["arm"], rate)
            runs[point["arm"]][point["run"]] = points.runs(folder, point, options.setup.slo)
    return ratios.compare(runs["stock"], runs["plugin"])


def _probe(starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    scores = {arm: [row["scores"] for row in starts if row["arm"] == arm and row["scores"]] for arm in ARMS}
    return alike.compare(scores["stock"], scores["plugin"])


def _activation(starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from blackwell_kernels import status

    homes = [row["home"] for row in starts if row["arm"] == "plugin"]
    return status.activation_rows(status.read_all(homes[-1] / "status")) if homes else []


def checks(result: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """What must hold for the figures to mean what they say, and that nothing got slower."""
    found, made = result["points"], []

    def check(name: str, passed: bool, detail: str) -> None:
        made.append({"name": name, "passed": bool(passed), "detail": detail})

    wanted = len(result["rates"]) * len(ARMS) * repeats
    lost = f", {len(result['losses'])} losses" if result["losses"] else ""
    check("complete", bool(wanted) and len(found) == wanted, f"{len(found)} of {wanted} load points{lost}")
    if not found:
        return made
    wrong = [f"{_name(p)}: {'; '.join(p['invalid'])}" for p in found if p["invalid"]]
    check("load generator kept up", not wrong, "; ".join(wrong) or "in every load point")
    errors = {kind: 0 for p in found for kind in p["summary"]["errors"]}
    for p in found:
        for kind, n in p["summary"]["errors"].items():
            errors[kind] += n
    check("answers", not errors, ", ".join(f"{n} {kind}" for kind, n in errors.items()) or "no errors")
    ours = sum(p["jit_ours"] for p in found if p["arm"] == "plugin")
    named = sorted({f"{p['arm']}: {k}" for p in found if isinstance(p["jit_vllm"], list) for k in p["jit_vllm"]})
    monitor = f"vLLM's monitor: {', '.join(named) or 'nothing'}"
    if all(isinstance(p["jit_vllm"], str) for p in found):
        monitor = f"vLLM's monitor: {found[0]['jit_vllm']}"
    check("no compilation after warm-up", not ours and not named, f"{ours:.0f} kernels of ours; {monitor}")
    made.append(_same_answers(result["probe"]))
    times = {arm: [row["ready_s"] for row in result["starts"] if row["arm"] == arm] for arm in ARMS}
    if all(times.values()):
        stock, plugin = (times[arm][-1] for arm in ARMS)  # the latest: caches are as warm as they get
        detail = f"{plugin:.1f} s, stock {stock:.1f} s (at most {START_UP}×)"
        if min(map(len, times.values())) > 1:
            cold = [f"{times[arm][0]:.1f}" for arm in reversed(ARMS)]
            check("start-up", plugin <= START_UP * stock, f"{detail}; the first {cold[0]} and {cold[1]} s")
        else:
            made.append({"name": "start-up", "passed": None, "detail": f"{detail}; one start, of unknown caches"})
    if memory := memory_check(result):
        made.append(memory)
    losses = [
        f"{key} at {rate}/s: {row['ratio']:.2f}×"
        for rate, rows in result["figures"].items()
        for key, row in rows.items()
        if row["verdict"] == "loss"
    ]
    if result["settings"]["serving"]["backend"] == "cpu":  # what serves there are references, not kernels
        made.append({"name": "nothing slower", "passed": None, "detail": "CPU implementations are references"})
    else:
        check("nothing slower", not losses, "; ".join(losses) or "no load point's interval shows a loss")
        if predicted := step_report.check(result):
            made.append(predicted)
    return made


def _held(p: dict[str, Any]) -> Any:
    return (p["series"] or {}).get("gpu_memory")


def memory_check(result: dict[str, Any]) -> dict[str, Any] | None:
    """Whether the plugin's GPUs hold more than stock's, and what vLLM says of it; None where no GPU was watched."""
    held = {
        arm: [seen["max"] for p in result["points"] if p["arm"] == arm and isinstance(seen := _held(p), dict)]
        for arm in ARMS
    }
    if not all(held.values()):
        return None
    told = {row["arm"]: row.get("memory_gib") or {} for row in result["starts"]}
    stock, plugin = (max(held[arm]) / 2**30 - told.get(arm, {}).get(BEFORE, 0.0) for arm in ARMS)
    parts = [
        f"{what} {told['plugin'][what]:.1f}, {told['stock'][what]:.1f}"
        for what in told.get("plugin", {})
        if what in told.get("stock", {})
    ]
    detail = f"{plugin:.1f} GiB, stock {stock:.1f} GiB (at most {MEMORY}×)"
    return {"name": "GPU memory", "passed": plugin <= MEMORY * stock, "detail": "; ".join([detail, *parts])}


def _same_answers(found: dict[str, Any] | None) -> dict[str, Any]:
    """The check that speed hides no wrongness."""
    if found is None:
        return {"name": "same answers", "passed": None, "detail": "only one arm was asked"}
    said = [
        f"{name} {p['ratio']:.2f} ({p['mean']:.4f} over {p['n']} tokens; stock from itself {p['noise']:.4f} over "
        f"{p['noise_n']}; stock repeats {p['repeated']:.0%} bit for bit, {p['ratio_with_parts']:.2f} if texts count of "
        "which it repeats a part"
        + (f"; unrelated answers {p['unrelated']:.4f}: no fault could show)" if p["passed"] is None else ")")
        for name, p in found["phases"].items()
    ]
    floor = f"over {probe.MIN_NOISE:g} where that is less"
    detail = f"mean |Δ log p| over stock's own, {floor}: {', '.join(said)}; at most {found['factor']:g}"
    return {"name": "same answers", "passed": found["passed"], "detail": detail}


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know."""
    found = []
    if result["state"] != "complete":
        found.append(f"This comparison ended early: {result['state'].splitlines()[0]}")
    settings = result["settings"]["serving"]
    if settings["backend"] == "cpu":
        found.append("A tiny model on a CPU: it shows that the chain works. Its times say nothing about a GPU.")
    if settings["weights"] == "dummy":
        found.append("Weights are vLLM's dummy ones: experts are chosen almost evenly, and answers mean nothing.")
    if settings["weights"] == "generated":
        found.append("Weights are made: a random router picks the experts, and no answer is text.")
    if result["activation"] and all(row["impl"] == "stock" for row in result["activation"]):
        found.append("Every operator was left to stock: both arms ran the same kernels.")
    if settings["quant"] == "bf16":
        found.append("bf16 weights: the FP8 experts were not part of this.")
    found += [*conditions.back_ends(settings), *conditions.unsteady(result)]
    if predict.TABLES in settings["env"].get("stock", {}):
        found.append("Stock's Triton experts had searched tables where there are some for their shape.")
    for arm, other in zip(ARMS, reversed(ARMS), strict=True):
        given, theirs = (settings["env"].get(which, {}).items() for which in (arm, other))
        alone = [f"{name}={value}" for name, value in given if (name, value) not in theirs]
        alone += [args] if (args := settings["only"].get(arm)) else []
        found += [f"Only the {arm}'s server was given {', '.join(alone)}."] if alone else []
    for row in result["losses"]:
        first = row["error"].splitlines()[0]
        found.append(f"Lost at {row['time']}, run {row['run']}, {row['arm']} ({', '.join(row['unfinished'])}): {first}")
    for p in result["points"]:
        odd = [r["figure"] for r in p["cross_check"] if not r["agrees"]]
        if odd:
            found.append(f"{_name(p)}: server and client disagree on {', '.join(odd)}.")
        host = p["series"].get("host_cpu")
        if isinstance(host, dict) and host["mean"] > BUSY:
            found.append(
                f"{_name(p)}: the host's CPUs were {host['mean']:.0%} busy: what is slow there may be their doing."
            )
        found += [f"{_name(p)}: {text}" for text in p["complaints"]]
    return found + step_report.notes(result, len({p["run"] for p in result["points"]}))


def key_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What one reads first: the highest load point."""
    if not result["rates"] or not (rows := result["figures"][f"{result['rates'][-1]:g}"]):
        return []
    at = f"at {result['rates'][-1]:g} sessions/s"
    wanted = ("output_tokens_per_s", "ttft_p99", "itl_p99", "tpot_p50")
    weak = {key: ", n too small" if rows[key]["verdict"] == "n too small" else "" for key in wanted}
    return [(f"{label(key)} {at}, plugin over stock", _ratio(rows[key]) + weak[key]) for key in wanted]


def label(key: str) -> str:
    """A figure's name for people."""
    what, p = metrics.FIGURES[key]
    return NAMES.get(key, key.replace("_", " ")) if p is None else f"{LATENCIES[what]} p{p:g}"


def tables(result: dict[str, Any]) -> report.Tables:
    """Title, head and rows of every table that has something in it."""
    slo = result["settings"]["setup"]["slo"]
    within = f"goodput (TTFT ≤ {slo['ttft_s']:g} s, TPOT ≤ {slo['itl_s'] * 1e3:g} ms)"
    check_rows = [[report.MARKS[c["passed"]], c["name"], c["detail"]] for c in result["checks"]]
    readings = (result["search"] or {}).get("readings", [])
    made: report.Tables = {
        "checks": ("Checks", ["", "what", "found"], check_rows),
        "activation": (
            "What the plugin runs",
            ["operator", "implementation", "layers", "why"],
            [[r["op"], r["impl"], str(r["layers"]), r["reason"]] for r in result["activation"]],
        ),
        "figures": (
            "Plugin over stock (95 % intervals; runs and sessions resampled; latencies in ms)",
            ["sessions/s", "figure", "stock", "plugin", "plugin / stock", "run to run", "n", "verdict"],
            [_figure_row(rate, key, row) for rate, rows in result["figures"].items() for key, row in rows.items()],
        ),
        "points": (
            "Load points",
            [
                *("sessions/s", "run", "arm", "requests", "sessions", "tokens/s", "per GPU", within),
                *("sessions whole good", "prefix hits", "possible", "waiting, max", "KV use, max"),
                *("errors", "client CPU"),
            ],
            [_point_row(p) for p in result["points"]],
        ),
        "traffic": conditions.traffic(result),
        "latency": (
            "Latency from the scheduled start, ms",
            ["sessions/s", "run", "arm", *report.LATENCY_HEAD],
            [
                [f"{p['rate']:g}", str(p["run"]), p["arm"], name, *report.latency_cells(p["summary"][key])]
                for p in result["points"]
                for key, name in (*report.LATENCIES, ("session_completion_s", "session completion"))
            ],
        ),
        "machine": (
            "Memory, power and the host",
            ["sessions/s", "run", "arm", "server RSS, max", "GPU memory, max", "GPU power, mean", "host CPU, mean"],
            [_machine_row(p) for p in result["points"]],
        ),
        "cross": (
            "The server's own figures beside ours",
            ["sessions/s", "run", "arm", "figure", "server", "client", ""],
            [
                [
                    *(f"{p['rate']:g}", str(p["run"]), p["arm"], r["figure"], number(r["server"])),
                    *(number(r["client"]), "agrees" if r["agrees"] else "disagrees"),
                ]
                for p in result["points"]
                for r in p["cross_check"]
            ],
        ),
        "search": (
            "The search for the knee (stock)",
            ["sessions/s", "goodput", "output tokens/s"],
            [[f"{r['rate']:g}", percent(r["goodput"]), number(r["tokens_per_s"])] for r in readings],
        ),
        "starts": (
            "Start-up to ready",
            ["run", "arm", "s"],
            [[str(r["run"]), r["arm"], f"{r['ready_s']:.1f}"] for r in result["starts"]],
        ),
    }
    made |= step_report.tables(result)
    return {name: table for name, table in made.items() if table[2]}


def _name(p: dict[str, Any]) -> str:
    return f"{p['rate']:g} sessions/s, run {p['run']}, {p['arm']}"


def _show(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if metrics.FIGURES[key][1] is not None:
        return ms(value)
    return percent(value) if "goodput" in key else number(value)


def _between(key: str, interval: Any) -> str:
    return f" [{_show(key, interval[0])}, {_show(key, interval[1])}]" if interval else ""


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "–"
    between = f" [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" if row["interval"] else ""
    return f"{row['ratio']:.3f}×{between}"


def _figure_row(rate: str, key: str, row: dict[str, Any]) -> list[str]:
    values = [_show(key, row[arm]) + _between(key, row[f"{arm}_interval"]) for arm in ARMS]
    noise = max((abs(1 - ratio) for ratio in row["noise"]), default=None)
    n = str(min(row["stock_n"], row["plugin_n"]))
    return [rate, label(key), *values, _ratio(row), percent(noise), n, row["verdict"]]


def brief_row(rate: str, key: str, row: dict[str, Any]) -> list[str]:
    """Rate, figure, both arms, the ratio and its verdict."""
    return [rate, label(key), *(_show(key, row[arm]) for arm in ARMS), _ratio(row), row["verdict"]]


def _point_row(p: dict[str, Any]) -> list[str]:
    s, server, seen = p["summary"], p["server"], p["series"]
    found = [f"{p['rate']:g}", str(p["run"]), p["arm"] + (" (invalid)" if p["invalid"] else "")]
    found += [str(s["requests"]), str(s["sessions"]), number(s["output_tokens_per_s"])]
    found += [number(s["output_tokens_per_s_per_gpu"]), percent(s["turn_goodput"]), percent(s["session_goodput"])]
    found += [percent(server["prefix_hit_share"]), percent(s["reusable_prompt_share"])]
    found += [_most(seen["waiting"]), percent(seen["kv_cache"]["max"]) if isinstance(seen["kv_cache"], dict) else "–"]
    cpu = s["client_cpu"]
    return [*found, str(sum(s["errors"].values())), cpu if isinstance(cpu, str) else percent(cpu)]


def _machine_row(p: dict[str, Any]) -> list[str]:
    seen = p["series"]
    memory, power = seen["gpu_memory"], seen["gpu_power"]
    host = percent(seen["host_cpu"]["mean"]) if isinstance(seen["host_cpu"], dict) else seen["host_cpu"]
    rss = f"{seen['rss']['max'] / 2**30:.2f} GiB" if isinstance(seen["rss"], dict) else seen["rss"]
    used = f"{memory['max'] / 2**30:.1f} GiB" if isinstance(memory, dict) else memory
    return [
        *(f"{p['rate']:g}", str(p["run"]), p["arm"]),
        *(rss, used, f"{power['mean']:.0f} W" if isinstance(power, dict) else power, host),
    ]


def _most(values: Any) -> str:
    return f"{values['max']:.0f}" if isinstance(values, dict) else "–"


def write_all(result: dict[str, Any], options: Options) -> dict[str, Path]:
    """Write result.json, report.md and report.html; returns their paths."""
    folder = options.out
    paths = {"json": folder / "result.json", "markdown": folder / "report.md", "html": folder / "report.html"}
    about = (tables(result), key_figures(result), notes(result))
    report.write_atomic(paths["json"], json.dumps(result, indent=1))
    report.write_atomic(paths["markdown"], report.markdown_page(result, *about))
    details = {key: result[key] for key in ("versions", "machine", "settings")}
    details["servers"] = {row["arm"]: row["command"] for row in result["starts"]}
    report.write_atomic(paths["html"], report.html_page(result, *about, plots(result, options), details))
    return paths


def terminal(result: dict[str, Any], console: Console) -> None:
    """The tables that one reads at once; the page has them all."""
    brief = {k: t for k, t in tables(result).items() if k in ("activation", "checks", "prediction")}
    rows = [brief_row(rate, key, rows[key]) for rate, rows in result["figures"].items() for key in BRIEF if rows]
    if rows:
        head = ["rate", "", "stock", "plugin", "plugin / stock", "verdict"]
        brief["figures"] = ("Plugin over stock at sessions/s, 95 % intervals, latencies in ms", head, rows)
    report.show(brief, key_figures(result), notes(result), console)
    if result["state"] != "complete":
        console.print(f"error: {result['state']}", style="red", highlight=False, markup=False, soft_wrap=True)


def plots(result: dict[str, Any], options: Options) -> list[tuple[str, str, str]]:
    """Throughput over rate, then CDFs and a timeline of the highest rate."""
    if not result["points"]:
        return []
    top = max(p["rate"] for p in result["points"])
    there = [p for p in result["points"] if p["rate"] == top]
    loaded = {
        (p["arm"], p["run"]): points.runs(point_folder(options, p["run"], p["arm"], top), p, options.setup.slo)
        for p in there
    }
    found = [
        ("Throughput and goodput", "Each point is a run; the line joins the means.", _over_rates(result)),
    ]
    for column, name in LATENCIES.items():
        series = {
            arm: np.concatenate(
                [run.sample(column).values for (a, _), run in loaded.items() if a == arm] or [np.empty(0)]
            )
            for arm in ARMS
        }
        if any(len(values) for values in series.values()):
            counts = ", ".join(f"{arm} {len(values)}" for arm, values in series.items())
            caption = (
                f"At {top:g} sessions/s: the share that was at most this slow. The axis is logarithmic. n: {counts}."
            )
            found.append((name, caption, report.cdfs(series)))
    caption = f"At {top:g} sessions/s, first run: tokens of each second, requests waiting in the server."
    found.append(("Timeline", caption, _timeline(options, there)))
    if shares := step_report.plot(result["profiles"]):
        caption = "By what a step's kernels are for, over stock's; gaps: no kernel ran. Single requests, not load."
        found.append(("Where a step's time goes", caption, shares))
    return found


def _over_rates(result: dict[str, Any]) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for which, axis in (("output_tokens_per_s", "y"), ("turn_goodput", "y2")):
        for arm in ARMS:
            mine = [(p["rate"], p["summary"][which]) for p in result["points"] if p["arm"] == arm]
            xs = sorted({rate for rate, _ in mine})
            means = [float(np.mean([v or 0.0 for r, v in mine if r == x])) for x in xs]
            name = f"{arm}, {'tokens/s' if axis == 'y' else 'goodput'}"
            line = {"dash": None if axis == "y" else "dot", "color": report.ARM_COLOURS[arm]}
            figure.add_scatter(x=xs, y=means, name=name, yaxis=axis, mode="lines", line=line)
            dots = {"x": [r for r, _ in mine], "y": [v for _, v in mine], "yaxis": axis}
            figure.add_scatter(**dots, mode="markers", showlegend=False, marker={"size": 5, "color": "#525252"})
    figure.update_layout(yaxis2={"overlaying": "y", "side": "right", "title": "turn goodput", "range": [0, 1.02]})
    figure.update_xaxes(title="sessions/s", rangemode="tozero")
    figure.update_yaxes(title="output tokens/s", rangemode="tozero", selector=0)
    return report.to_html(figure)


def _timeline(options: Options, there: list[dict[str, Any]]) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for arm in ARMS:
        mine = [p for p in there if p["arm"] == arm]
        if not mine:
            continue
        folder = point_folder(options, mine[0]["run"], arm, mine[0]["rate"])
        rows, _ = metrics.read_records([folder / "series.jsonl"])
        begin, colour = mine[0]["window"][0], report.ARM_COLOURS[arm]
        made, waiting = watch.series(rows, "generated"), watch.series(rows, "waiting")
        if len(made) > 1:
            rate = np.diff(made[:, 1]) / np.maximum(np.diff(made[:, 0]), 1e-9)
            x = (made[1:, 0] - begin).round(1).tolist()
            line = {"color": colour}
            figure.add_scatter(x=x, y=rate.round(1).tolist(), name=f"{arm}, tokens/s", mode="lines", line=line)
        if len(waiting):
            x, y = (waiting[:, 0] - begin).round(1).tolist(), waiting[:, 1].tolist()
            line = {"dash": "dot", "color": colour}
            figure.add_scatter(x=x, y=y, name=f"{arm}, waiting", yaxis="y2", mode="lines", line=line)
    side = {"overlaying": "y", "side": "right", "title": "requests waiting", "rangemode": "tozero"}
    figure.update_layout(yaxis2=side)
    figure.update_xaxes(title="s from the start of the measured window")
    figure.update_yaxes(title="tokens/s", selector=0)
    return report.to_html(figure)


def _json(path: Path) -> Any:
    return report.read_json(path) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that a full disk may have cut short."""
    made = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            made.append(json.loads(line))
    return made
