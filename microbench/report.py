"""Results for people: a terminal table, Markdown, and one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from blackwell_kernels.common import arch
from blackwell_kernels.microbench import results, scores
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Impl, Results, Row, Timer
from blackwell_kernels.microbench.scores import Ratios, Score

HEAD = ["case", "ours µs", "p10–p90", "FIB µs", "stock µs", "stock/ours", "stock/ours, FIB"]
HEAD += ["best peer µs", "peer/ours", "of floor", "error", "memory", "host µs, stock's", "dispatched"]
FILES_ONLY = ("p10–p90", "FIB µs", "error", "memory", "host µs, stock's")
PUBLISHED = "published B200 µs"
SCORE_HEAD = ["operator", "cases", "against", "n", "median", "geomean", "worst", "win", "win@1.05", "of floor (worst)"]
SCORE_HEAD += ["memory, peer's", "error"]
PEER_HEAD = ["operator", "peer", "cases with a time", "peer/ours, median", "worst", "fastest peer in"]
PEER_HEAD += ["faster than ours", "less accurate", "not set up", "else without a time"]
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
        f"{row.definition} {row.case}{' (warm)' if row.warm else ''}",
        _us(ours),
        _spread(ours),
        NONE if ours.fib_us is None else f"{ours.fib_us:.2f}",
        f"{row.stock} {_us(row.impls.get(row.stock))}",
        _ratio(row.ratio_stock),
        _ratio(results.ratio(row.impls, row.stock, "fib_us")),
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
    """Median, geometric mean, worst and win rate against stock, by either timing."""
    found = scores.ratios((row.case, row.ratio_stock) for row in rows)
    if found is None:
        return "no case has a time for both ours and stock"
    eager = scores.ratios((row.case, results.ratio(row.impls, row.stock, "fib_us")) for row in rows)
    told = f"; by FlashInfer-Bench's timing, {eager.n} cases: {_told(eager)}" if eager else ""
    return f"{found.n} cases against stock: {_told(found)}{told}"


def _told(found: Ratios) -> str:
    return (
        f"median {found.median:.2f}x, geometric mean {found.geomean:.2f}x, worst {found.worst:.2f}x, "
        f"faster in {found.win:.0%}, by more than 5 % in {found.clear:.0%}"
    )


def timings(rows: Iterable[Row]) -> str:
    """What the two timings count, which one is primary, and in how many rows they disagree."""
    found = scores.verdicts(rows)
    return (
        "Graph replays over rotated buffers, cold unless marked (warm), are the primary timing, because vLLM serves "
        "decode from CUDA graphs; FlashInfer-Bench's (FIB), taken one implementation after another, counts the host's "
        "launches of an eager call, too. On which of ours and stock is faster the two disagree in "
        f"{found.apart} of {found.n} rows (ours is ahead in {found.graph} by graph replays, in {found.fib} by "
        "FlashInfer-Bench's): there, who launches eagerly should believe FlashInfer-Bench's."
    )


def warm(rows: Sequence[Row]) -> str:
    """What the mark says, where a row has it."""
    count = sum(row.warm for row in rows)
    return (
        f"(warm), {count} of {len(rows)} rows: all that the rotated inputs touch fits an L2 of {results.L2 >> 20} MiB, "
        "where replays may find it; FIB µs has it overwritten before each call."
        if count
        else ""
    )


def score_cells(score: Score) -> list[list[str]]:
    """Three lines an operator: against stock, against the fastest peer of each case, against stock by FIB's timing."""
    if not score.cases:
        return [[score.op, "not measured", *[NONE] * (len(SCORE_HEAD) - 2)]]
    cases = f"{score.timed} of {score.cases}"
    share = NONE if score.share is None else f"{score.share:.0%} ({score.share_worst:.0%})"
    memory = f"{_bytes(score.peak_bytes)}, {_bytes(score.peer_peak_bytes)}"
    return [
        [score.op, cases, "stock", *_ratio_cells(score.stock), share, memory, _error(score.accuracy)],
        ["", "", "best peer", *_ratio_cells(score.peer), "", "", ""],
        ["", "", "stock, FIB", *_ratio_cells(score.stock_fib), "", "", ""],
    ]


def _ratio_cells(found: Ratios | None) -> list[str]:
    if found is None:
        return [NONE] * 6
    told = [str(found.n), *map(_ratio, (found.median, found.geomean, found.worst))]
    return [*told, f"{found.win:.0%}", f"{found.clear:.0%}"]


def peer_cells(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each peer of each operator, in the order of `PEER_HEAD`."""
    return [
        [
            found.op,
            found.name,
            f"{found.cases - found.not_set_up - found.no_time} of {found.cases}",
            *([_ratio(found.ratios.median), _ratio(found.ratios.worst)] if found.ratios else [NONE, NONE]),
            *map(str, (found.fastest, found.faster, found.flagged, found.not_set_up, found.no_time)),
        ]
        for found in scores.peers(rows)
    ]


def contest_lines(rows: Iterable[Row]) -> list[str]:
    """The contest's own score against stock and against the fastest peer, where its workloads were measured."""
    rows = list(rows)
    found = scores.contests(rows)
    if all(value is None for value in found["stock"]["us"].values()):
        return []
    return [
        "contest score, mean of baseline / ours over a definition's workloads, by graph replays (in brackets by "
        f"FlashInfer-Bench's timing); 0 where ours fails on one, {NONE} where one is not measured:",
        *(
            f"{name}: against stock{_stand_ins(rows, name)} {_contest(found['stock'], name)}, against the fastest peer "
            f"{_contest(found['best_peer'], name)}"
            for name in found["stock"]["us"]
        ),
    ]


def _contest(found: dict[Timer, dict[str, float | None]], name: str) -> str:
    graph, eager = (NONE if by[name] is None else f"{by[name]:.3f}" for by in (found["us"], found["fib_us"]))
    return f"{graph} ({eager})"


def _stand_ins(rows: Iterable[Row], definition: str) -> str:
    mine = [row for row in rows if row.definition == definition]
    count = sum(row.ratio_stock is None and row.ratio_best_peer is not None for row in mine)
    return f", in {count} of {len(mine)} shapes the fastest peer for want of its time," if count else ""


def terminal(rows: list[Row], gpu: str = "") -> Table:
    """The rows as a rich table: what a terminal has room for, the rest is in the files."""
    titles = head(gpu)
    shown = [i for i, title in enumerate(titles) if title not in FILES_ONLY]
    table = Table(*(titles[i] for i in shown), box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        line = cells(row, gpu)
        table.add_row(*(escape(line[i]) for i in shown))
    return table


def terminal_scores(rows: list[Row]) -> Table:
    """The operators as a rich table."""
    return _terminal(SCORE_HEAD, (line for score in scores.by_op(rows) for line in score_cells(score)))


def terminal_peers(rows: list[Row]) -> Table:
    """The peers as a rich table."""
    return _terminal(PEER_HEAD, peer_cells(rows))


def _terminal(titles: list[str], lines: Iterable[list[str]]) -> Table:
    table = Table(*titles, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for line in lines:
        table.add_row(*map(escape, line))
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
        "# Operators measured\n\nRatios are theirs / ours, medians of one alternating run: above 1 ours is faster. "
        f"{timings(rows)}\n\n"
        + markdown_table(SCORE_HEAD, (line for score in scores.by_op(rows) for line in score_cells(score)))
        + "".join(f"\n- {line}" for line in contest_lines(rows))
    ]
    for found in files:
        table = markdown_table(head(found.gpu), (cells(row, found.gpu) for row in found.rows))
        parts.append(
            f"## {_title(found)}\n\n{_provenance(found)}\n\n{summary(found.rows)}.\n\n{table}\n"
            + f"{warm(found.rows)}\n\n{markdown_table(PEER_HEAD, peer_cells(found.rows))}\n"
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
            "warm": warm(found.rows),
            "peers": peer_cells(found.rows),
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
        timings=timings(rows),
        peer_head=PEER_HEAD,
        parts=parts,
    )
