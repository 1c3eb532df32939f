"""Figures of the HTML report: a roofline per operator, latency against the shape."""

from __future__ import annotations

from typing import Any

from blackwell_kernels.microbench.implementations import OURS, SPECS_BY_ANY_NAME
from blackwell_kernels.microbench.results import Impl, Results, Row

_COLOURS = ("#0f62fe", "#8a3ffc", "#007d79", "#b28600", "#d02670", "#6f6f6f")
# what names a point of a curve; the rest of a case's name says which curve
_ALONG = ("num_tokens", "batch_size", "num_rows", "lengths", "seq_len", "total_seq_len", "num_seqs")


def roofline(found: Results) -> Any:
    """Achieved rate against arithmetic intensity, under the ceilings this machine was measured to have.

    Operators without matrix products have no intensity: they are shown as bandwidth against the bytes they must move.
    """
    from plotly import graph_objects

    rows = [row for row in found.rows if row.bytes]
    flops = [row for row in rows if row.flops]
    figure = graph_objects.Figure()
    ceilings = found.ceilings
    if flops:
        intensity = [row.flops / row.bytes for row in flops if row.flops and row.bytes]
        ends = (min(intensity) / 2, max(intensity) * 2)
        for name, peak in (("fp8", ceilings.fp8_tflops), ("bf16", ceilings.bf16_tflops)):
            knee = peak / ceilings.copy_tbps
            xs = sorted({ends[0], min(max(knee, ends[0]), ends[1]), ends[1]})
            ys = [min(peak, x * ceilings.copy_tbps) for x in xs]
            figure.add_scatter(x=xs, y=ys, mode="lines", name=f"{name} roof", line={"color": "#a8a8a8"})
        x_title, y_title = "FLOP / byte", "TFLOP/s"
    else:
        sizes = [row.bytes for row in rows if row.bytes] or [1]
        xs = [min(sizes), max(sizes)]
        figure.add_scatter(x=xs, y=[ceilings.copy_tbps] * 2, mode="lines", name="copy", line={"color": "#a8a8a8"})
        x_title, y_title = "bytes", "TB/s"
    shown = flops or rows
    for name, pick in ((OURS, lambda row: OURS), ("stock", lambda row: row.stock)):
        points = [(row, row.impls[pick(row)].us) for row in shown if pick(row) in row.impls]
        timed = [(row, us) for row, us in points if us is not None]
        figure.add_scatter(
            x=[_work(row)[0] / _work(row)[1] if flops else _work(row)[1] for row, _ in timed],
            y=[_work(row)[0 if flops else 1] / us / 1e6 for row, us in timed],
            text=[f"{row.definition} {row.case}<br>{us:.2f} µs" for row, us in timed],
            mode="markers",
            name=name,
            marker={"color": _COLOURS[0 if name == OURS else 4], "symbol": "circle" if name == OURS else "x"},
            hovertemplate="%{text}<br>%{y:.3g} " + y_title,
        )
    figure.update_xaxes(type="log", title=x_title)
    figure.update_yaxes(type="log", title=y_title)
    figure.update_layout(title=f"Roofline: {found.rows[0].op}", height=460)
    return figure


def _work(row: Row) -> tuple[int, int]:
    return row.flops or 0, row.bytes or 0


def curve_of(row: Row) -> tuple[str, float]:
    """(which curve, place along it) of a row."""
    parts = [part for part in row.case.split("/") if part.partition("=")[0] not in _ALONG]
    tokens = SPECS_BY_ANY_NAME[row.definition].tokens
    return f"{row.definition} {'/'.join(parts)}", float(row.axes[tokens])


def latency(found: Results) -> Any:
    """µs (median, p10 to p90 as bars) against tokens of every implementation; one curve family at a time."""
    from plotly import graph_objects

    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in found.rows:
        name, at = curve_of(row)
        groups.setdefault(name, []).append((at, row))
    figure = graph_objects.Figure()
    owners: list[str] = []
    for group, points in groups.items():
        points.sort(key=lambda point: point[0])
        names = dict.fromkeys(name for _, row in points for name, impl in row.impls.items() if impl.us is not None)
        for i, name in enumerate(names):
            timed = [
                (at, row.impls[name]) for at, row in points if name in row.impls and row.impls[name].us is not None
            ]
            figure.add_scatter(
                **_line(timed, name, _COLOURS[i % len(_COLOURS)]), visible=not owners or owners[0] == group
            )
            owners.append(group)
        figure.add_scatter(
            x=[at for at, _ in points],
            y=[row.floor_us for _, row in points],
            name="floor",
            line={"color": "#a8a8a8", "dash": "dot"},
            visible=not owners or owners[0] == group,
        )
        owners.append(group)
    buttons = [
        {"label": group, "method": "update", "args": [{"visible": [owner == group for owner in owners]}]}
        for group in groups
    ]
    figure.update_xaxes(type="log", title="tokens")
    figure.update_yaxes(type="log", title="µs")
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.18}
    figure.update_layout(updatemenus=[menu], height=500, margin={"t": 110})
    return figure


def _line(timed: list[tuple[float, Impl]], name: str, colour: str) -> dict[str, Any]:
    return {
        "x": [at for at, _ in timed],
        "y": [impl.us for _, impl in timed],
        "error_y": {
            "symmetric": False,
            "array": [(impl.p90 or 0) - (impl.us or 0) for _, impl in timed],
            "arrayminus": [(impl.us or 0) - (impl.p10 or 0) for _, impl in timed],
            "thickness": 1,
        },
        "name": name,
        "mode": "lines+markers",
        "line": {"color": colour, "width": 3 if name == OURS else 1.5},
        "hovertemplate": name + ": %{y:.2f} µs at %{x}",
    }
