"""Figures: a roofline per operator, latency against the shape. The same series for the HTML page and for SVG files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blackwell_kernels.microbench.implementations import OURS, SPECS_BY_ANY_NAME
from blackwell_kernels.microbench.results import Results, Row

COLOURS = ("#0f62fe", "#8a3ffc", "#007d79", "#b28600", "#d02670", "#6f6f6f")
GREY = "#a8a8a8"
# what names a point of a curve; the rest of a case's name says which curve
_ALONG = ("num_tokens", "batch_size", "num_rows", "lengths", "seq_len", "total_seq_len", "num_seqs")


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour. lines: joined, else markers alone. spread: (below, above) each y."""

    name: str
    x: list[float]
    y: list[float]
    colour: str
    lines: bool = True
    dashed: bool = False
    text: list[str] | None = None
    spread: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """Axes, both logarithmic, and what is on them."""

    title: str
    x_title: str
    y_title: str
    series: list[Series]


def roofline_panel(found: Results) -> Panel:
    """Achieved rate against arithmetic intensity, under the ceilings this machine was measured to have.

    Operators without matrix products have no intensity: they are shown as bandwidth against the bytes they must move.
    """
    rows = [row for row in found.rows if row.bytes]
    flops = [row for row in rows if row.flops]
    ceilings, series = found.ceilings, []
    if flops:
        intensity = [row.flops / row.bytes for row in flops if row.flops and row.bytes]
        ends = (min(intensity) / 2, max(intensity) * 2)
        for name, peak in (("fp8", ceilings.fp8_tflops), ("bf16", ceilings.bf16_tflops)):
            knee = peak / ceilings.copy_tbps
            xs = sorted({ends[0], min(max(knee, ends[0]), ends[1]), ends[1]})
            series.append(Series(f"{name} roof", xs, [min(peak, x * ceilings.copy_tbps) for x in xs], GREY))
        x_title, y_title = "FLOP / byte", "TFLOP/s"
    else:
        sizes = [float(row.bytes) for row in rows if row.bytes] or [1.0]
        series.append(Series("copy", [min(sizes), max(sizes)], [ceilings.copy_tbps] * 2, GREY))
        x_title, y_title = "bytes", "TB/s"
    shown = flops or rows
    for name, pick, colour in ((OURS, lambda row: OURS, COLOURS[0]), ("stock", lambda row: row.stock, COLOURS[4])):
        points = [(row, row.impls[pick(row)].us) for row in shown if pick(row) in row.impls]
        timed = [(row, us) for row, us in points if us is not None]
        at = [_work(row)[0] / _work(row)[1] if flops else _work(row)[1] for row, _ in timed]
        rates = [_work(row)[0 if flops else 1] / us / 1e6 for row, us in timed]
        texts = [f"{row.definition} {row.case}<br>{us:.2f} µs" for row, us in timed]
        series.append(Series(name, at, rates, colour, lines=False, text=texts))
    return Panel(f"Roofline: {found.rows[0].op}", x_title, y_title, series)


def _work(row: Row) -> tuple[float, float]:
    return float(row.flops or 0), float(row.bytes or 0)


def curve_of(row: Row) -> tuple[str, float]:
    """(which curve, place along it) of a row."""
    parts = [part for part in row.case.split("/") if part.partition("=")[0] not in _ALONG]
    tokens = SPECS_BY_ANY_NAME[row.definition].tokens
    return f"{row.definition} {'/'.join(parts)}", float(row.axes[tokens])


def latency_panels(found: Results) -> list[Panel]:
    """µs (median, p10 to p90) against tokens of every implementation and of the floor; a panel a curve family."""
    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in found.rows:
        name, at = curve_of(row)
        groups.setdefault(name, []).append((at, row))
    panels = []
    for group, points in groups.items():
        points.sort(key=lambda point: point[0])
        names = dict.fromkeys(name for _, row in points for name, impl in row.impls.items() if impl.us is not None)
        series = [_curve(points, name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]
        places = [x for x, _ in points]
        series.append(Series("floor", places, [row.floor_us for _, row in points], GREY, dashed=True))
        panels.append(Panel(group, "tokens", "µs", series))
    return panels


def _curve(points: list[tuple[float, Row]], name: str, colour: str) -> Series:
    timed = [
        (at, impl, impl.us) for at, row in points if (impl := row.impls.get(name)) is not None and impl.us is not None
    ]
    spread = [(us - (impl.p10 or us), (impl.p90 or us) - us) for _, impl, us in timed]
    return Series(name, [at for at, _, _ in timed], [us for _, _, us in timed], colour, spread=spread)


def roofline(found: Results) -> Any:
    """`roofline_panel` for the HTML page."""
    from plotly import graph_objects

    panel, figure = roofline_panel(found), graph_objects.Figure()
    for series in panel.series:
        figure.add_scatter(**_trace(series, panel.y_title))
    figure.update_layout(title=panel.title, height=460)
    return _logarithmic(figure, panel)


def latency(found: Results) -> Any:
    """`latency_panels` for the HTML page, one at a time."""
    from plotly import graph_objects

    panels, figure = latency_panels(found), graph_objects.Figure()
    for panel in panels:
        for series in panel.series:
            figure.add_scatter(**_trace(series, panel.y_title), visible=panel is panels[0])
    owners = [panel.title for panel in panels for _ in panel.series]
    buttons = [
        {"label": panel.title, "method": "update", "args": [{"visible": [owner == panel.title for owner in owners]}]}
        for panel in panels
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.18}
    figure.update_layout(updatemenus=[menu], height=500, margin={"t": 110})
    return _logarithmic(figure, panels[0])


def _logarithmic(figure: Any, panel: Panel) -> Any:
    figure.update_xaxes(type="log", title=panel.x_title)
    figure.update_yaxes(type="log", title=panel.y_title)
    return figure


def _trace(series: Series, unit: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "x": series.x,
        "y": series.y,
        "name": series.name,
        "mode": "markers" if not series.lines else "lines+markers" if series.spread else "lines",
        "line": {"color": series.colour, "width": 3 if series.name == OURS else 1.5},
        "marker": {"color": series.colour, "symbol": "circle" if series.name == OURS or series.lines else "x"},
        "hovertemplate": f"{series.name}: %{{y:.3g}} {unit} at %{{x}}",
    }
    if series.dashed:
        made["line"]["dash"] = "dot"
    if series.text is not None:
        made |= {"text": series.text, "hovertemplate": "%{text}<br>%{y:.3g} " + unit}
    if series.spread is not None:
        below, above = [low for low, _ in series.spread], [high for _, high in series.spread]
        made["error_y"] = {"symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
    return made
