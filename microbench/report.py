"""Results for people: a terminal table, Markdown, and one self-contained HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from rich.table import Table

from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Impl, Results, Row


def _us(impl: Impl | None) -> str:
    if impl is None or impl.us is None:
        return "–"
    mark = "" if impl.method == "graph" else " (eager)"
    return f"{impl.us:.2f}{mark}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _share(row: Row) -> str:
    ours = row.impls[OURS].us
    return "–" if ours is None else f"{row.floor_us / ours:.0%}"


def cells(row: Row) -> list[str]:
    """Case, ours, stock, stock/ours, best peer, best/ours, share of the floor, dispatched."""
    peer = row.best_peer or "–"
    return [
        f"{row.definition} {row.case}",
        _us(row.impls[OURS]),
        f"{row.stock} {_us(row.impls.get(row.stock))}",
        _ratio(row.ratio_stock),
        f"{peer} {_us(row.impls.get(peer))}",
        _ratio(row.ratio_best_peer),
        f"{_share(row)} ({row.bound})",
        row.dispatched,
    ]


HEAD = ["case", "ours µs", "stock µs", "stock/ours", "best peer µs", "peer/ours", "of floor", "dispatched"]


def notes(rows: Iterable[Row]) -> list[str]:
    """Why implementations have no time, each reason once."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, impl in row.impls.items():
            if impl.error:
                found[name, impl.error] = found.get((name, impl.error), 0) + 1
    return [f"{name}: {why} ({count} case{'s' if count > 1 else ''})" for (name, why), count in found.items()]


def summary(rows: list[Row]) -> str:
    """Median, geometric mean, worst and win rate against stock."""
    ratios = sorted(row.ratio_stock for row in rows if row.ratio_stock is not None)
    if not ratios:
        return "no case has a time for both ours and stock"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    wins = sum(ratio > 1.0 for ratio in ratios) / len(ratios)
    clear = sum(ratio > 1.05 for ratio in ratios) / len(ratios)
    return (
        f"{len(ratios)} cases against stock: median {ratios[len(ratios) // 2]:.2f}x, geometric mean {mean:.2f}x, "
        f"worst {ratios[0]:.2f}x, faster in {wins:.0%}, by more than 5 % in {clear:.0%}"
    )


def terminal(rows: list[Row]) -> Table:
    """The rows as a rich table."""
    table = Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown(files: list[Results]) -> str:
    """One section an operator."""
    parts = []
    for found in files:
        rows = "\n".join("| " + " | ".join(cells(row)) + " |" for row in found.rows)
        parts.append(
            f"## {found.rows[0].op if found.rows else 'nothing'} on {found.gpu}\n\n{_provenance(found)}\n\n"
            f"{summary(found.rows)}.\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}\n{rows}\n\n"
            + "\n".join(f"- {note}" for note in notes(found.rows))
        )
    return "\n\n".join(parts) + "\n"


def _provenance(found: Results) -> str:
    c = found.ceilings
    return (
        f"{found.date}, commit {found.commit}, source {found.source}, driver {found.driver}, torch {found.torch}, "
        f"triton {found.triton}, vLLM {found.vllm}; `{found.command}`. Ceilings: copy {c.copy_tbps:.2f} TB/s, FP8 "
        f"{c.fp8_tflops:.0f} and bf16 {c.bf16_tflops:.0f} TFLOP/s, launch {c.launch_us:.2f} µs."
    )


def page(files: list[Results]) -> str:
    """Self-contained HTML: per operator the ratio to stock of every case, and the table."""
    from plotly import graph_objects, io
    from plotly.offline import get_plotlyjs

    body = []
    for found in files:
        rows = [row for row in found.rows if row.ratio_stock is not None]
        figure = graph_objects.Figure(
            graph_objects.Bar(
                x=[row.ratio_stock for row in rows],
                y=[f"{row.definition} {row.case}" for row in rows],
                orientation="h",
                customdata=[[row.impls[OURS].us, row.stock] for row in rows],
                hovertemplate="%{y}<br>%{x:.2f}x against %{customdata[1]}<br>ours %{customdata[0]:.2f} µs",
            )
        )
        figure.add_vline(x=1.0)
        figure.update_layout(height=120 + 22 * len(rows), margin={"l": 480}, xaxis_title="stock / ours")
        op = html.escape(found.rows[0].op) if found.rows else "nothing"
        table = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in found.rows
        )
        head = "".join(f"<th>{name}</th>" for name in HEAD)
        remarks = "".join(f"<li>{html.escape(note)}</li>" for note in notes(found.rows))
        body.append(
            f"<h2>{op} on {html.escape(found.gpu)}</h2><p>{html.escape(_provenance(found))}</p>"
            f"<p>{html.escape(summary(found.rows))}.</p>{io.to_html(figure, include_plotlyjs=False, full_html=False)}"
            f"<table><tr>{head}</tr>{table}</table><ul>{remarks}</ul>"
        )
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:2px 8px;border-bottom:1px solid #ccc;text-align:left}"
    return (
        f"<!doctype html><meta charset='utf-8'><title>Operators measured</title><style>{style}</style>"
        f"<script>{get_plotlyjs()}</script><h1>Operators measured</h1>{''.join(body)}\n"
    )
