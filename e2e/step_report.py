"""Where a step's time goes in both arms, and whether the plugin did what was predicted of it."""

from __future__ import annotations

from typing import Any

from blackwell_kernels.e2e import predict, report, stats
from blackwell_kernels.e2e.kernel_time import GAPS, TOGETHER, mistimed
from blackwell_kernels.e2e.knee import GOODPUT
from blackwell_kernels.e2e.ratios import ARMS

REACHED = 0.9  # of a predicted gain
EXPLAINED = 1.5  # of a predicted gain: more is not the kernels' doing alone
# plugin over stock at the highest rate that stock keeps up with: what the project is after
AIMS: dict[str, dict[str, float]] = {
    "output_tokens_per_s": {"qwen3-next": 1.12, "deepseek-v3.2": 1.2},
    "ttft_p99": {"": 0.8},
    "itl_p99": {"": 0.85},
}
MATERIAL = 0.02  # smaller predicted gains are not looked for
FEWEST = 10.0  # µs: smaller groups are shown together


def outcome(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Prediction beside measurement, one row for each of predict.GAINS.

    {gain, what, predicted, ratio, interval, n, reached, judged, at}: `reached` is the share of the predicted gain;
    `judged` is False where the measurement is too weak (no interval, few values), or no gain worth a measurement was
    predicted.
    """
    prediction, profiles = result["prediction"], result["profiles"]
    if not prediction:
        return []
    found: dict[str, tuple[dict[str, Any] | None, str]] = {"tpot_1": (None, "one request alone")}
    if alone := predict.alone_ratio(*(profiles.get(arm) for arm in ARMS)):
        strong = alone["interval"] is not None and stats.enough(alone["n"], None)
        found["tpot_1"] = ({**alone, "judged": strong}, f"one request alone, by the {alone['clock']}'s clock")
    rates, kept_up = [f"{rate:g}" for rate in result["rates"]], _kept_up(result)
    for gain, key, rate in (
        ("capacity", "output_tokens_per_s", rates[-1] if rates else None),
        ("ttft", "ttft_p99", kept_up[-1] if kept_up else rates[0] if rates else None),
    ):
        row = _figure(result, rate, key) if rate else None
        if row is None:
            found[gain] = (None, "–")
            continue
        strong = row["verdict"] not in ("n too small", "unknown")
        found[gain] = ({**row, "n": min(row["stock_n"], row["plugin_n"]), "judged": strong}, f"{rate} sessions/s")
    return [_outcome(gain, prediction["gains"][gain], *found[gain]) for gain in predict.GAINS]


def _kept_up(result: dict[str, Any]) -> list[str]:
    """Rates at which stock's turns kept the SLO."""
    rates = [f"{rate:g}" for rate in result["rates"]]
    return [r for r in rates if ((_figure(result, r, "turn_goodput") or {}).get("stock") or 0.0) >= GOODPUT]


def _aims(result: dict[str, Any]) -> list[list[str]]:
    """figure, aim, where, found, verdict: at the highest rate that stock keeps up with."""
    serving, rates = result["settings"]["serving"], _kept_up(result)
    if serving["backend"] == "cpu" or not rates:
        return []
    made = []
    for key, by_model in AIMS.items():
        aim, row = by_model.get(serving["model"], by_model.get("")), _figure(result, rates[-1], key)
        if aim is None or row is None:
            continue
        met = row["ratio"] >= aim if row["higher_is_better"] else row["ratio"] <= aim
        verdict = row["verdict"] if row["verdict"] in ("n too small", "unknown") else "met" if met else "missed"
        name = key.replace("_per_s", "/s").replace("_", " ")
        made.append([name, _times(aim), f"{rates[-1]} sessions/s", _times(row["ratio"]), verdict])
    return made


def _figure(result: dict[str, Any], rate: str, key: str) -> dict[str, Any] | None:
    return (result["figures"].get(rate) or {}).get(key)


def _outcome(gain: str, predicted: float | None, row: dict[str, Any] | None, at: str) -> dict[str, Any]:
    higher = gain == "capacity"
    ratio = row["ratio"] if row else None
    worth = predicted is not None and (predicted - 1 if higher else 1 - predicted) > MATERIAL
    reached = None
    if worth and predicted is not None and ratio is not None:
        reached = predict.share_reached(predicted, ratio, higher_is_better=higher)
    return {
        "gain": gain,
        "what": predict.GAINS[gain],
        "at": at,
        "predicted": predicted,
        "ratio": ratio,
        "interval": row["interval"] if row else None,
        "n": row["n"] if row else 0,
        "reached": reached,
        "judged": bool(reached is not None and row and row["judged"]),
    }


def check(result: dict[str, Any]) -> dict[str, Any] | None:
    """Whether ≥ 90 % of each predicted gain was found; None without a prediction."""
    if not (rows := result["outcome"]):
        return None
    judged = [row for row in rows if row["judged"]]
    detail = "; ".join(
        ("" if row["judged"] else "not judged: ")
        + f"{row['what']}: {_times(row['ratio'])} of {_times(row['predicted'])} predicted"
        + (f", {row['reached']:.0%} of the gain" if row["reached"] is not None else "")
        + (", more than kernels explain" if (row["reached"] or 0.0) > EXPLAINED else "")
        for row in sorted(rows, key=lambda row: not row["judged"])
    )
    passed = all(row["reached"] >= REACHED for row in judged) if judged else None
    return {"name": "gains as predicted", "passed": passed, "detail": detail}


def tables(result: dict[str, Any]) -> report.Tables:
    """Prediction beside measurement; the groups of each step in both arms."""
    made: report.Tables = {}
    if rows := result["outcome"]:
        made["prediction"] = (
            "Prediction, made before the plugin was measured, and what was found (plugin over stock)",
            ["what", "at", "predicted", "measured", "n", "share of the gain", ""],
            [
                [
                    *(row["what"], row["at"], _times(row["predicted"])),
                    *(_times(row["ratio"]) + _between(row["interval"]), str(row["n"] or "–")),
                    *(report.percent(row["reached"]), "" if row["judged"] else "not judged"),
                ]
                for row in rows
                if row["predicted"] is not None or row["ratio"] is not None
            ],
        )
    if rows := _aims(result):
        made["aims"] = (
            "What the project is after, at the highest rate that stock keeps up with (plugin over stock)",
            ["figure", "aim", "at", "found", ""],
            rows,
        )
    if result["prediction"] and result["prediction"]["steps"]:
        made["operators"] = (
            "What the prediction is made of: stock's time of each operator in a step, and the kernels' ratio",
            ["step", "bound by", "operator", "stock, µs", "share", "ours / stock", "ours serves", "why"],
            [row for name, step in result["prediction"]["steps"].items() for row in operator_rows(name, step)],
        )
    rows_ = step_rows(result["profiles"])
    if rows_:
        made["steps"] = (
            "Where a step's time goes, µs (kernels by the profiler; the step itself without it)",
            ["step", "group", "stock", "share", "plugin", "share", "of it ours"],
            rows_,
        )
    if idle := host_rows(result["profiles"]):
        made["host"] = (
            "What the host did while no kernel ran, under the profiler, which slows it (a step, medians)",
            ["step", "what", "stock", "plugin"],
            idle,
        )
    return made


def operator_rows(name: str, step: dict[str, Any]) -> list[list[str]]:
    """Rows of a predicted step; one that says so where its time is less than that of its operators' kernels."""
    if sum(row["stock_us"] for row in step["operators"]) > step["stock_us"]:
        return [[name, "not timed right", *["–"] * 5, f"{step['stock_us']:.0f} µs, less than its operators' kernels"]]
    bound = "–"
    if "bound" in step:
        bound = f"{step['bound']}, idle {report.percent(step['idle'])}"
        bound += ": no gain predicted" if step["bound"] == "host" else ""
    return [
        [
            *(name, bound, row["operator"], f"{row['stock_us']:.0f}"),
            *(report.percent(row["stock_us"] / step["stock_us"]), f"{row['ratio']:.2f}"),
            *("yes" if row["ours"] else "no", row["why"]),
        ]
        for row in step["operators"]
    ]


HOST = {
    "kernels": "kernels",
    "launches": "launches by the host",
    "driver_launches": "of them Triton's",
    "graphs": "launches of whole graphs",
    "span_us": "first kernel to last, µs",
    "idle_us": "of it without a kernel, µs",
    "between_us": "last kernel to the next step's first, µs",
    "ops_us": "operators on the host, µs",
    "runtime_us": "CUDA calls on the host, µs",
    "sync_us": "of them synchronisation, µs",
}
CAUSES, STRETCHES = 6, 3  # rows of each


def host_rows(profiles: dict[str, Any]) -> list[list[str]]:
    """What `host_time` found in every step, both arms side by side; none where no profile has it."""
    found = []
    for name in _names(profiles):
        both = {arm: (profiles[arm].get(name) or {}).get("host") for arm in ARMS if profiles.get(arm)}
        hosts = [both.get(arm) for arm in ARMS]
        if not any(hosts):
            continue
        for key, what in (
            ("server_s", "without it: the server's clock, µs"),
            ("client_s", "without it: the client's, µs"),
        ):
            times = [((profiles.get(arm) or {}).get(name) or {}).get(key) for arm in ARMS]
            if any(times):
                found.append([name, what, *("–" if s is None else f"{s * 1e6:.0f}" for s in times)])
        for key, what in HOST.items():
            found.append([name, what, *("–" if host is None else f"{host[key]:.0f}" for host in hosts)])
        causes = [host["causes"] if host else {} for host in hosts]
        largest = sorted({*causes[0], *causes[1]}, key=lambda cause: -max(of.get(cause, 0.0) for of in causes))
        for cause in largest[:CAUSES]:
            cells = ("–" if cause not in of else f"{of[cause]:.0f}" for of in causes)
            found.append([name, f"idle meanwhile: {cause}, µs", *cells])
        for i in range(STRETCHES):
            rows = [host["longest"][i] if host and i < len(host["longest"]) else None for host in hosts]
            if any(rows):
                found.append([name, f"idle stretch {i + 1}", *map(_stretch, rows)])
        waits = [(host or {}).get("pairs", []) for host in hosts]  # profiles of before have none
        for i in range(min(STRETCHES, max(map(len, waits)))):
            found.append([name, f"idle between two, {i + 1}", *(_pair(row[i]) if row[i:] else "–" for row in waits)])
    return found


def _pair(row: list[Any]) -> str:
    us, times, before, behind = row
    return f"{us:.0f} µs in {times:.0f} waits of {behind[:48]} after {before[:48]}"


def _stretch(row: list[Any] | None) -> str:
    if row is None:
        return "–"
    us, after, *doing = row
    return f"{us:.0f} µs after {after[:48]}: " + ", ".join(text[:48] for text in doing if text)


def _names(profiles: dict[str, Any]) -> list[str]:
    return next((list(profile) for profile in profiles.values() if profile), [])


def step_rows(profiles: dict[str, Any]) -> list[list[str]]:
    """Groups of every step, the largest first; small ones together; then the sums that compare between the arms."""
    found = []
    for name in _names(profiles):
        both = {arm: profiles[arm][name] for arm in ARMS if profiles.get(arm) and name in profiles[arm]}
        why = {arm: step["why"] or mistimed(step) for arm, step in both.items()}
        right = {arm: step for arm, step in both.items() if not mistimed(step)}  # with or without a trace of it
        whole = {arm: step["seconds"] * 1e6 for arm, step in right.items()}
        found.append([name, _step_label(list(right.values())), *_cells(whole, whole, None)])
        found += [[name, f"{arm}: {text}", "–", "–", "–", "–", "–"] for arm, text in why.items() if text]
        # without a step's time there are no gaps
        kernels = {
            arm: {g: v for g, v in step["groups"].items() if g != GAPS or not why[arm]} for arm, step in both.items()
        }
        groups = {group for of in kernels.values() for group in of}
        times = {g: {arm: of[g]["us"] if g in of else 0.0 for arm, of in kernels.items()} for g in groups}
        if GAPS in times:
            times[GAPS] = {arm: us for arm, us in times[GAPS].items() if not why[arm]}
        large = sorted((g for g in groups if max(times[g].values()) >= FEWEST), key=lambda g: -max(times[g].values()))
        for group in large:
            ours = kernels["plugin"].get(group, {}).get("ours_us", 0.0) if "plugin" in kernels else None
            found.append([name, group, *_cells(times[group], whole, ours)])
        small = {arm: sum(times[g].get(arm, 0.0) for g in groups - set(large)) for arm in both}
        if any(small.values()):
            found.append([name, "all others", *_cells(small, whole, None)])
        for title, parts in TOGETHER.items():
            sums = {arm: sum(times[g][arm] for g in parts if g in times) for arm in both}
            if any(sums.values()):
                found.append([name, f"together: {title}", *_cells(sums, whole, None)])
    return found


def _step_label(steps: list[dict[str, Any]]) -> str:
    """Whose clock timed a step; the arms' where they differ."""
    clocks = ["engine's" if step["seconds"] == step.get("server_s") else "client's" for step in steps]
    return f"step, by the {' and the '.join(dict.fromkeys(clocks))} clock" if clocks else "step"


def _cells(times: dict[str, float], whole: dict[str, float], ours: float | None) -> list[str]:
    cells = []
    for arm in ARMS:
        us = times.get(arm)
        share = "–" if us is None or arm not in whole else report.percent(us / whole[arm])
        cells += ["–" if us is None else f"{us:.0f}", share]
    return [*cells, "–" if not ours else f"{ours:.0f}"]


def notes(result: dict[str, Any], repeats: int) -> list[str]:
    """What is weak about the figures."""
    found = []
    rows = [(rate, key, row) for rate, figures in result["figures"].items() for key, row in figures.items()]
    small = [row for row in rows if row[2]["verdict"] == "n too small"]
    if small:
        tails = sorted({key for _, key, _ in small})
        seconds = result["settings"]["setup"]["seconds"]
        found.append(
            f"{len(small)} of {len(rows)} figures have too few values for a verdict ({', '.join(tails)}): load points "
            f"of {seconds:g} s are short."
        )
    both = {rate: sum(p["arm"] == "plugin" and p["rate"] == rate for p in result["points"]) for rate in result["rates"]}
    if rows and min(both.values(), default=0) < 2:
        found.append("One run of an arm at some rate: how far two runs of one arm differ is not known there.")
    if result["starts"] and min(sum(row["arm"] == arm for row in result["starts"]) for arm in ARMS) < 2:
        found.append("One start of an arm: its time to ready may be that of cold caches.")
    if prediction := result["prediction"]:
        commits = sorted({commit for of_one in prediction["measured"]["commits"].values() for commit in of_one})
        for name, step in prediction["steps"].items():
            if step.get("bound") == "host":
                found.append(
                    f"{name}: no kernel ran in {step['idle']:.0%} of stock's step. The host binds it: faster kernels "
                    "are predicted to gain nothing there."
                )
        found.append(prediction["why"] or f"The prediction's ratios are those of the kernels of {', '.join(commits)}.")
    if result["settings"].get("at_once"):
        swapped = "swapped from run to run" if repeats > 1 else "not swapped: a difference of the GPUs is part of it"
        found.append(f"Both arms ran at once, each on its own GPUs, {swapped}; they shared the host.")
    elif repeats > 1 and result["points"]:
        found.append("The arms ran one after the other: what changed on the host meanwhile is part of the difference.")
    return found


def plot(profiles: dict[str, Any]) -> str | None:
    """Bars of every step, stacked by group, both arms' by what stock's sum up to; None when no kernel was traced."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    bars: list[tuple[str, dict[str, float]]] = []
    whole: dict[str, float] = {}
    for name in _names(profiles):
        for arm in ARMS:
            if profiles.get(arm) and (step := profiles[arm].get(name)) and step["groups"]:
                times = {group: value["us"] for group, value in step["groups"].items()}
                label = f"{name}<br>{arm}"
                whole[label] = whole.get(f"{name}<br>{ARMS[0]}") or sum(times.values())
                bars.append((label, times))
    if not bars:
        return None
    size = {g: sum(times.get(g, 0.0) for _, times in bars) for _, there in bars for g in there}
    groups = sorted(size, key=lambda group: (group == GAPS, -size[group]))
    figure = go.Figure()
    for i, group in enumerate(groups):
        shares = [times.get(group, 0.0) / whole[label] for label, times in bars]
        colour = "#c6c6c6" if group == GAPS else qualitative.Dark24[i % len(qualitative.Dark24)]
        figure.add_bar(x=[label for label, _ in bars], y=shares, name=group, marker={"color": colour})
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="share of stock's step", tickformat=".0%")
    return report.to_html(figure)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}×"


def _between(interval: Any) -> str:
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
