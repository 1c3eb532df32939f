"""Where a step's time goes in both arms, and whether the plugin did what was predicted of it."""

from __future__ import annotations

from typing import Any

from blackwell_kernels.e2e import predict, report
from blackwell_kernels.e2e.kernel_time import GAPS
from blackwell_kernels.e2e.knee import GOODPUT
from blackwell_kernels.e2e.ratios import ARMS

REACHED = 0.9  # of a predicted gain
MATERIAL = 0.02  # smaller predicted gains are not looked for
FEWEST = 10.0  # µs: smaller groups are shown together


def outcome(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Prediction beside measurement, one row for each of predict.GAINS.

    {gain, what, predicted, ratio, interval, n, reached, judged, at}: `reached` is the share of the predicted gain;
    `judged` is False where the measurement is too weak, or no gain worth a measurement was predicted.
    """
    prediction, profiles = result["prediction"], result["profiles"]
    if not prediction:
        return []
    alone = [predict.alone(profiles[arm]) if profiles.get(arm) else None for arm in ARMS]
    found: dict[str, tuple[dict[str, Any] | None, str]] = {"tpot_1": (None, "one request alone")}
    if alone[0] and alone[1]:
        measured = predict.median_ratio(alone[0]["samples_s"], alone[1]["samples_s"])
        found["tpot_1"] = ({**measured, "judged": True}, "one request alone")
    rates = [f"{rate:g}" for rate in result["rates"]]
    goodput = {rate: (_figure(result, rate, "turn_goodput") or {}).get("stock") or 0.0 for rate in rates}
    kept_up = [rate for rate in rates if goodput[rate] >= GOODPUT]
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
        f"{row['what']}: {_times(row['ratio'])} of {_times(row['predicted'])} predicted"
        + (f", {row['reached']:.0%} of the gain" if row["reached"] is not None else "")
        for row in judged or rows
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
                    *(_times(row["ratio"]) + _between(row["interval"]), str(row["n"])),
                    *(report.percent(row["reached"]), "" if row["judged"] else "not judged"),
                ]
                for row in rows
            ],
        )
    if result["prediction"] and result["prediction"]["steps"]:
        made["operators"] = (
            "What the prediction is made of: stock's time of each operator in a step, and the kernels' ratio",
            ["step", "operator", "stock, µs", "share", "ours / stock", "ours serves", "why"],
            [
                [
                    *(name, row["operator"], f"{row['stock_us']:.0f}"),
                    *(report.percent(row["stock_us"] / step["stock_us"]), f"{row['ratio']:.2f}"),
                    *("yes" if row["ours"] else "no", row["why"]),
                ]
                for name, step in result["prediction"]["steps"].items()
                for row in step["operators"]
            ],
        )
    rows_ = step_rows(result["profiles"])
    if rows_:
        made["steps"] = (
            "Where a step's time goes, µs (kernels by the profiler; the step itself without it)",
            ["step", "group", "stock", "share", "plugin", "share", "of it ours"],
            rows_,
        )
    return made


def step_rows(profiles: dict[str, Any]) -> list[list[str]]:
    """Groups of every step, the largest first; small ones together."""
    found = []
    for name in next((list(profile) for profile in profiles.values() if profile), []):
        both = {arm: profiles[arm][name] for arm in ARMS if profiles.get(arm) and name in profiles[arm]}
        whole = {arm: step["seconds"] * 1e6 for arm, step in both.items()}
        found.append([name, "step", *(_cells(whole, whole, None))])
        for arm, step in both.items():
            if step["why"]:
                found.append([name, f"{arm}: {step['why']}", "–", "–", "–", "–", "–"])
        groups = {group for step in both.values() for group in step["groups"]}
        times = {g: {arm: step["groups"].get(g, {"us": 0.0})["us"] for arm, step in both.items()} for g in groups}
        large = sorted((g for g in groups if max(times[g].values()) >= FEWEST), key=lambda g: -max(times[g].values()))
        for group in large:
            ours = both["plugin"]["groups"].get(group, {}).get("ours_us", 0.0) if "plugin" in both else None
            found.append([name, group, *_cells(times[group], whole, ours)])
        small = {arm: sum(times[g][arm] for g in groups - set(large)) for arm in both}
        if any(small.values()):
            found.append([name, "all others", *_cells(small, whole, None)])
    return found


def _cells(times: dict[str, float], whole: dict[str, float], ours: float | None) -> list[str]:
    cells = []
    for arm in ARMS:
        us = times.get(arm)
        cells += ["–", "–"] if us is None else [f"{us:.0f}", report.percent(us / whole[arm])]
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
        found.append(prediction["why"] or f"The prediction's ratios are those of the kernels of {', '.join(commits)}.")
    if result["settings"].get("at_once"):
        swapped = "swapped from run to run" if repeats > 1 else "not swapped: a difference of the GPUs is part of it"
        found.append(f"Both arms ran at once, each on its own GPUs, {swapped}; they shared the host.")
    elif repeats > 1 and result["points"]:
        found.append("The arms ran one after the other: what changed on the host meanwhile is part of the difference.")
    return found


def plot(profiles: dict[str, Any]) -> str | None:
    """Bars of every step, stacked by group, stock beside plugin; None when no kernel was traced."""
    import plotly.graph_objects as go

    bars = [
        (f"{name}<br>{arm}", {group: value["us"] for group, value in step["groups"].items()})
        for name in next((list(profile) for profile in profiles.values() if profile), [])
        for arm in ARMS
        if profiles.get(arm) and (step := profiles[arm].get(name)) and step["groups"]
    ]
    if not bars:
        return None
    size = {g: sum(times.get(g, 0.0) for _, times in bars) for _, there in bars for g in there}
    groups = sorted(size, key=lambda group: (group == GAPS, -size[group]))
    figure = go.Figure()
    for group in groups:
        shares = [times.get(group, 0.0) / sum(times.values()) for _, times in bars]
        grey = {"marker": {"color": "#c6c6c6"}} if group == GAPS else {}
        figure.add_bar(x=[label for label, _ in bars], y=shares, name=group, **grey)
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="share of the step", range=[0, 1], tickformat=".0%")
    return report.to_html(figure)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}×"


def _between(interval: Any) -> str:
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
