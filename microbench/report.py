"""Results for people: a terminal table, Markdown, and one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from blackwell_kernels.common import arch
from blackwell_kernels.microbench import scores
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Impl, Results, Row
from blackwell_kernels.microbench.scores import Ratios, Score

HEAD = ["case", "ours µs", "p10–p90", "FIB µs", "stock µs", "stock/ours", "best peer µs", "peer/ours", "of floor"]
HEAD += ["error", "memory", "host µs, stock's", "dispatched"]
FILES_ONLY = ("p10–p90", "FIB µs", "error", "memory", "host µs, stock's")
PUBLISHED = "published B200 µs"
SCORE_HEAD = ["operator", "cases", "against", "median", "geomean", "worst", "win", "win@1.05", "of floor (worst)"]
SCORE_HEAD += ["memory, peer's", "error"]
NONE = "–"


def _us(impl: Impl | None) -> str:
    if impl is None or impl.us is None:
        return NONE
    return f"{impl.us:.2f}{'' if impl.method == 'graph' else ' (eager)'}{' (less accurate)' if impl.flag else ''}"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}x"


def _bytes(value: int | None) -> str:
    return NONE if value is None else f"{value / 2**20:.1f} MiB"


def _error(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def _host(impl: Impl | None) -> str:
    return NONE if impl is None or impl.host_us is None else f"{impl.host_us:.0f}"


def _spread(impl: Impl) -> str:
    return NONE if impl.p10 is None or impl.p90 is None else f"{impl.p10:.2f}–{impl.p90:.2f} (n={impl.n})"


def _share(row: Row) -> str:
    ours = row.impls[OURS].us
    return NONE if ours is None else f"{row.floor_us / ours:.0%}"


def head(gpu: str) -> list[str]:
    """Column titles; published latencies are another chip's where the GPU is not a B200, so they are left out there."""
    return [*HEAD, PUBLISHED] if _is_b200(gpu) else HEAD


def _is_b200(gpu: str) -> bool:
    return arch.gpu_slug(gpu).split("-")[0] == "b200"


def cells(row: Row, gpu: str = "") -> list[str]:
    """One row's cells, in the order of `head(gpu)`."""
    ours, peer = row.impls[OURS], row.best_peer or NONE
    published = scores.published_us(row)
    return [
        f"{row.definition} {row.case}",
        _us(ours),
        _spread(ours),
        NONE if ours.fib_us is None else f"{ours.fib_us:.2f}",
        f"{row.stock} {_us(row.impls.get(row.stock))}",
        _ratio(row.ratio_stock),
        f"{peer} {_us(row.impls.get(peer))}",
        _ratio(row.ratio_best_peer),
        f"{_share(row)} ({row.bound})",
        _error(ours.accuracy),
        _bytes(ours.peak_bytes),
        f"{_host(ours)}, {_host(row.impls.get(row.stock))}",
        row.dispatched,
        *([NONE if published is None else f"{published:.2f}"] if _is_b200(gpu) else []),
    ]


def notes(rows: Iterable[Row]) -> list[str]:
    """Why implementations have no time, and which are less accurate: reasons that differ in numbers alone are one."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, impl in row.impls.items():
            why = impl.error or (f"less accurate than ours may be: {impl.flag}" if impl.flag else None)
            if why:
                found.setdefault((name, re.sub(r"\d[\d.e+-]*", "#", why)), []).append(why)
    return [
        f"{name}: {whys[0]} ({len(whys)} case{'s' if len(whys) > 1 else ''}"
        f"{', the numbers of the first' if len(set(whys)) > 1 else ''})"
        for (name, _), whys in found.items()
    ]


def summary(rows: list[Row]) -> str:
    """Median, geometric mean, worst and win rate against stock."""
    found = scores.ratios((row.case, row.ratio_stock) for row in rows)
    if found is None:
        return "no case has a time for both ours and stock"
    return (
        f"{found.n} cases against stock: median {found.median:.2f}x, geometric mean {found.geomean:.2f}x, "
        f"worst {found.worst:.2f}x, faster in {found.win:.0%}, by more than 5 % in {found.clear:.0%}"
    )


def score_cells(score: Score) -> list[list[str]]:
    """Two lines an operator: against stock and against the fastest peer of each case."""
    if not score.cases:
        return [[score.op, "not measured", *[NONE] * (len(SCORE_HEAD) - 2)]]
    cases = f"{score.timed} of {score.cases}"
    share = NONE if score.share is None else f"{score.share:.0%} ({score.share_worst:.0%})"
    memory = f"{_bytes(score.peak_bytes)}, {_bytes(score.peer_peak_bytes)}"
    return [
        [score.op, cases, "stock", *_ratio_cells(score.stock), share, memory, _error(score.accuracy)],
        ["", "", "best peer", *_ratio_cells(score.peer), "", "", ""],
    ]


def _ratio_cells(found: Ratios | None) -> list[str]:
    if found is None:
        return [NONE] * 5
    return [*map(_ratio, (found.median, found.geomean, found.worst)), f"{found.win:.0%}", f"{found.clear:.0%}"]


def contest_lines(rows: Iterable[Row]) -> list[str]:
    """The contest's own score, where its workloads were measured."""
    found = scores.contest(rows)
    if all(value is None for value in found.values()):
        return []
    lines = [f"{name}: {NONE if value is None else f'{value:.3f}'}" for name, value in found.items()]
    return ["contest score, mean of baseline/ours, 0 where one workload fails, – where one is not measured:", *lines]


def terminal(rows: list[Row], gpu: str = "") -> Table:
    """The rows as a rich table: what a terminal has room for, the rest is in the files."""
    titles = head(gpu)
    shown = [i for i, title in enumerate(titles) if title not in FILES_ONLY]
    table = Table(*(titles[i] for i in shown), box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        line = cells(row, gpu)
        table.add_row(*(line[i] for i in shown))
    return table


def terminal_scores(rows: list[Row]) -> Table:
    """The operators as a rich table."""
    table = Table(*SCORE_HEAD, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for score in scores.by_op(rows):
        for line in score_cells(score):
            table.add_row(*line)
    return table


def markdown_table(titles: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    body = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n{body}"


def span(values: Iterable[int]) -> str:
    """`15`, or `3 to 15`."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _all_rows(files: list[Results]) -> list[Row]:
    return [row for found in files for row in found.rows]


def markdown(files: list[Results]) -> str:
    """A summary of every operator, then one section a results file."""
    rows = _all_rows(files)
    parts = [
        "# Operators measured\n\nRatios are theirs / ours, medians of one alternating run: above 1 ours is faster.\n\n"
        + markdown_table(SCORE_HEAD, (line for score in scores.by_op(rows) for line in score_cells(score)))
        + "".join(f"\n- {line}" for line in contest_lines(rows))
    ]
    for found in files:
        table = markdown_table(head(found.gpu), (cells(row, found.gpu) for row in found.rows))
        parts.append(
            f"## {_title(found)}\n\n{_provenance(found)}\n\n{summary(found.rows)}.\n\n{table}\n"
            + "\n".join(f"- {note}" for note in notes(found.rows))
        )
    return "\n\n".join(parts) + "\n"


def _title(found: Results) -> str:
    return f"{found.rows[0].op if found.rows else 'nothing'} on {found.gpu}"


def _provenance(found: Results) -> str:
    c = found.ceilings
    return (
        f"{found.date}, commit {found.commit}, source {found.source}, driver {found.driver}, torch {found.torch}, "
        f"triton {found.triton}, vLLM {found.vllm}; `{found.command}`. Ceilings: copy {c.copy_tbps:.2f} TB/s, FP8 "
        f"{c.fp8_tflops:.0f} and bf16 {c.bf16_tflops:.0f} TFLOP/s, launch {c.launch_us:.2f} µs."
    )


def page(files: list[Results]) -> str:
    """Self-contained HTML: the operators' scores, then per file a roofline, latency curves and the table."""
    import jinja2
    from markupsafe import Markup
    from plotly import io
    from plotly.offline import get_plotlyjs

    from blackwell_kernels.microbench import plots

    rows = _all_rows(files)
    parts = [
        {
            "title": _title(found),
            "provenance": _provenance(found),
            "summary": summary(found.rows),
            "figures": [
                Markup(io.to_html(figure, include_plotlyjs=False, full_html=False))
                for figure in ([plots.roofline(found), plots.latency(found)] if found.rows else [])
            ],
            "head": head(found.gpu),
            "rows": [((row.ratio_best_peer or 1.0) < 1.0, cells(row, found.gpu)) for row in found.rows],
            "notes": notes(found.rows),
        }
        for found in files
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("report.html.j2").render(
        plotly=Markup(get_plotlyjs()),
        score_head=SCORE_HEAD,
        scores=[line for score in scores.by_op(rows) for line in score_cells(score)],
        contest=contest_lines(rows),
        parts=parts,
    )
