"""One run as a terminal table, JSON, Markdown and one self-contained HTML page with its plots inside."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import plotly  # noqa: F401 - figures import what they need of it; that it lacks is said before hours of load
from rich.console import Console
from rich.table import Table

from blackwell_kernels.e2e import metrics, stats
from blackwell_kernels.errors import BlackwellKernelsError

LATENCIES = (("ttft_s", "TTFT"), ("itl_s", "ITL"), ("tpot_s", "TPOT"), ("e2e_s", "E2E"))
MARKS = {True: "ok", False: "FAILED", None: "not judged"}  # of a check
Tables = dict[str, tuple[str, list[str], list[list[str]]]]
LATENCY_HEAD = ["", "n", *map(stats.name, stats.PERCENTILES), "max"]
COLOURS = ("#0f62fe", "#8a3ffc", "#007d79", "#b28600")
ARM_COLOURS = {"stock": "#8d8d8d", "plugin": "#0f62fe"}


def blank(title: str, command: str) -> dict[str, Any]:
    """A result with nothing measured yet: every key that a report reads."""
    return {
        "schema": 1,
        "title": title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "backend": "unknown",
        "state": "nothing was measured yet.",
        "versions": {},
        "machine": {},
        "scenario": {},
        "server_command": "",
        "ready_s": None,
        "warm_up": None,
        "load": metrics.summarise([]),
        "exactness": None,
        "server": None,
        "checks": [],
        "status": {},
        "activation": [],
        "complaints": [],
    }


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            os.unlink(file.name)  # a full disk must not fill with what did not fit
            raise
    os.chmod(file.name, 0o644)  # NamedTemporaryFile's are private
    os.replace(file.name, path)


def read_json(path: Path) -> Any:
    """The JSON of a file. Raises BlackwellKernelsError, naming the file, when it holds none."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BlackwellKernelsError(f"{path} is corrupt ({error}): remove it, and it is made again") from None


def kept(write: Callable[[], dict[str, Path]], folder: Path) -> dict[str, Path]:
    """What `write` wrote; when the disk refuses a report, an error that says where the raw records are."""
    try:
        return write()
    except OSError as error:
        raise BlackwellKernelsError(
            f"cannot write the report: {error}; every record is in {folder}: free some space and give the command again"
        ) from error


def write_all(result: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Write result.json, report.md and report.html; returns their paths."""
    paths = {"json": folder / "result.json", "markdown": folder / "report.md", "html": folder / "report.html"}
    write_atomic(paths["json"], json.dumps(result, indent=1))
    write_atomic(paths["markdown"], markdown(result))
    write_atomic(paths["html"], html(result, rows))
    return paths


def ms(seconds: float | None) -> str:
    """Seconds as milliseconds with three digits, or a dash."""
    return "–" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def number(value: float | None, unit: str = "") -> str:
    """A figure with three digits, or whole from a thousand on; or a dash."""
    return "–" if value is None else f"{value:.3g}{unit}" if abs(value) < 999.5 else f"{value:.0f}{unit}"


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "–" if value is None else f"{value:.0%}"


def latency_rows(load: dict[str, Any]) -> list[list[str]]:
    """Name, n, percentiles and max of each latency, milliseconds."""
    rows = []
    for key, name in LATENCIES:
        rows.append([name, *latency_cells(load[key])])
    return rows


def latency_cells(d: dict[str, Any]) -> list[str]:
    """n, the percentiles and max, milliseconds; says where n is too small for a percentile."""
    few = "n too small" if d["n"] else "–"
    found = [(few if d[key] is None else ms(d[key])) for key in map(stats.name, stats.PERCENTILES)]
    return [str(d["n"]), *found, ms(d["max"])]


def key_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What one reads first."""
    load, server = result["load"], result["server"]
    figures = [
        ("output tokens/s", number(load["output_tokens_per_s"])),
        ("TTFT p50 / p99, ms", f"{ms(load['ttft_s']['p50'])} / {ms(load['ttft_s']['p99'])}"),
        ("ITL p50 / p99, ms", f"{ms(load['itl_s']['p50'])} / {ms(load['itl_s']['p99'])}"),
        ("requests done", f"{load['completed']} in {load['sessions']} sessions"),
        ("errors", str(sum(load["errors"].values()))),
        (
            f"turns within the SLO (TTFT ≤ {load['slo']['ttft_s']:g} s, TPOT ≤ {load['slo']['itl_s'] * 1e3:g} ms)",
            percent(load["turn_goodput"]),
        ),
    ]
    if server:
        hit = f"{percent(server['prefix_hit_share'])} of at most {percent(load['reusable_prompt_share'])}"
        figures.append(("prompt tokens from the prefix cache", hit))
    if exact := result["exactness"]:
        overall = exact["overall"]
        value = f"{overall['mean']:.4f} (rounding alone: {overall['noise']:.4f})"
        figures.append(("mean |Δ log p| against transformers", value))
    return figures


def activation(result: dict[str, Any]) -> list[list[str]]:
    """Operator, implementation, layers, tokens handled, reason."""
    tokens: dict[tuple[str, str], int] = {}
    for row in result["status"].get("counts", []):
        key = (row["op"], row["impl"])
        tokens[key] = tokens.get(key, 0) + row["tokens"]
    return [
        [r["op"], r["impl"], str(r["layers"]), f"{tokens.get((r['op'], r['impl']), 0):,}", r["reason"]]
        for r in result["activation"]
    ]


def interval_rows(figures: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Figure, value, its interval, how many values it is of, and whether they are too few."""
    made = []
    for key, told in figures.items():
        shown = ms if "_p" in key and not key.endswith("per_s") else percent if "goodput" in key else number
        values = (told["value"], *(told["interval"] or (None, None)))
        name = key.replace("_per_s", "/s").replace("_", " ")
        made.append([name, *map(shown, values), str(told["n"]), "" if told["enough"] else "n too small"])
    return made


def error_rows(result: dict[str, Any]) -> list[list[str]]:
    """Kind, count and one example of each error."""
    load = result["load"]
    return [[kind, str(n), load["error_examples"].get(kind, "")] for kind, n in load["errors"].items()]


TABLES = {
    "activation": ("What runs", ["operator", "implementation", "layers", "tokens handled", "why"]),
    "latency": ("Latency from the scheduled start, ms", LATENCY_HEAD),
    "exactness": (
        "log p of the same tokens, served and by transformers",
        ["prompt tokens", "generated", "n", "mean |Δ|", "p99 |Δ|", "max |Δ|", "mean |Δ| of rounding alone"],
    ),
    "figures": ("95 % intervals, sessions resampled; latencies in ms", ["figure", "value", "from", "to", "n", ""]),
    "errors": ("Errors", ["kind", "count", "example"]),
}


def tables(result: dict[str, Any]) -> Tables:
    """Title, head and rows of every table that has something in it."""
    exact = result["exactness"]
    rows = {
        "activation": activation(result),
        "latency": latency_rows(result["load"]) if result["load"]["requests"] else [],
        "exactness": [_exact_row(r, str(r["prompt"]), str(r["generated"])) for r in exact["rows"]] if exact else [],
        "figures": interval_rows(result["load"].get("figures", {})),
        "errors": error_rows(result),
    }
    if exact:
        rows["exactness"] += [_exact_row(row, name, "") for name, row in exact["phases"].items()]
        rows["exactness"].append(_exact_row(exact["overall"], "all", ""))
    return {name: (*TABLES[name], body) for name, body in rows.items() if body}


def _exact_row(row: dict[str, Any], prompt: str, generated: str) -> list[str]:
    figures = [f"{row['mean']:.4f}", f"{row['p99']:.3f}", f"{row['max']:.3f}", f"{row['noise']:.4f}"]
    return [prompt, generated, str(row["n"]), *figures]


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    found = []
    if result["state"] != "complete":
        reason = result["state"].splitlines()[0]
        found.append(f"The figures cover what was measured until this run ended early: {reason}")
    if result["load"]["client_saturated"]:
        why = "; ".join(result["load"]["client_why"])
        found.append(f"The load generator was saturated, so these figures are not the server's: {why}.")
    if result["backend"] == "cpu":
        found.append(
            "CPU run of a tiny model with random weights: it shows that the whole chain works and how exact it is. "
            "Its times say nothing about a GPU."
        )
    if result["backend"] == "cuda" and result["activation"]:
        found.append("Our operators were forced on, so that all of them are seen: `bench` tells which are faster here.")
    if warm := result.get("warm_up"):
        names = sorted({name.rsplit(".", 1)[-1] for name in warm["compiled"]})
        what = f"compiled {len(warm['compiled'])} kernels ({', '.join(names)})" if names else "compiled nothing"
        end = "" if warm["settled"] else ", and more would have followed"
        found.append(f"Before what is measured, {warm['requests']} requests of {warm['seconds']:.0f} s {what}{end}.")
    if result["server"] and result["server"]["jit_now"]:
        found.append(f"{result['server']['jit_now']:.0f} kernels were compiled while measured requests waited.")
    return found + result["complaints"]


def terminal(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    show(tables(result), key_figures(result), notes(result), console)


def show(tables: Tables, figures: list[tuple[str, str]], notes: list[str], console: Console) -> None:
    """Tables, what one reads first, notes."""
    for title, head, body in tables.values():
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(head):
            numeric = i > 0 and all(row[i][:1].isdigit() or row[i] in ("–", "") for row in body)
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in body:
            table.add_row(*row)
        console.print(table)
    for name, value in figures:
        console.print(f"{name:38s} [bold]{value}[/bold]", highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def markdown(result: dict[str, Any]) -> str:
    """The same as a Markdown page."""
    return markdown_page(result, tables(result), key_figures(result), notes(result))


def markdown_page(result: dict[str, Any], tables: Tables, figures: list[tuple[str, str]], notes: list[str]) -> str:
    """Title, date and command from `result`, then what is given."""
    lines = [f"# {result['title']}", "", f"{result['date']} · `{result['command']}`", ""]
    lines += [f"- {name}: **{value}**" for name, value in figures]
    lines += [f"- note: {note}" for note in notes]
    for title, head, body in tables.values():
        lines += ["", f"## {title}", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in body]
    return "\n".join(lines) + "\n"


def html(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One page that needs nothing else: plotly's script and every figure are inside."""
    details = {k: result[k] for k in ("versions", "machine", "scenario", "server_command")}
    return html_page(result, tables(result), key_figures(result), notes(result), figures(rows), details)


def html_page(
    result: dict[str, Any],
    tables: Tables,
    figures: list[tuple[str, str]],
    notes: list[str],
    plots: list[tuple[str, str, str]],
    details: dict[str, Any],
) -> str:
    """Title, date, command and state from `result`, then what is given, in one self-contained page."""
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("report.html.j2").render(
        result=result,
        figures=figures,
        tables=tables,
        notes=notes,
        plots=plots,
        plotly=get_plotlyjs() if plots else "",
        details=json.dumps(details, indent=1),
    )


def figures(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(title, caption, HTML) of each plot; none when no token ever arrived."""
    table = metrics.frame(rows)
    if not len(table) or not table.tokens_out.sum():
        return []
    return [
        (
            "Latency",
            "Share of requests (ITL: of gaps) that were at most this slow. The axis is logarithmic.",
            cdfs({"TTFT": table.ttft, "ITL": metrics.inter_token(rows), "TPOT": table.tpot, "E2E": table.e2e}),
        ),
        ("Timeline", "Output tokens and requests in flight, each second of the run.", _timeline(table, rows)),
        (
            "Time to first token and prompt length",
            "Each point is a request. A prompt whose start is in the prefix cache is answered faster than its length.",
            _ttft(table),
        ),
    ]


def to_html(figure: Any) -> str:
    """A plotly figure in the house style, without plotly's script."""
    figure.update_layout(
        template="simple_white",
        height=360,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        colorway=COLOURS,
        legend={"orientation": "h", "y": 1.08},
    )
    return figure.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})


def cdfs(series: dict[str, Any]) -> str:
    """Cumulative distributions of seconds, drawn in milliseconds."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values in series.items():
        x = np.sort(np.asarray(values, dtype=float))
        x = x[~np.isnan(x)] * 1e3
        if x.size > 2000:  # enough points for a curve; the tail is kept whole
            x = np.concatenate([x[np.linspace(0, x.size - 501, 1500).astype(int)], x[-500:]])
        share = np.arange(1, x.size + 1) / max(1, x.size)
        line = {"shape": "hv", "color": ARM_COLOURS.get(name)}
        figure.add_scatter(x=x.round(3).tolist(), y=share.round(5).tolist(), name=name, mode="lines", line=line)
    figure.update_xaxes(type="log", title="ms")
    figure.update_yaxes(title="share", range=[0, 1.02])
    return to_html(figure)


def _timeline(table: Any, rows: list[dict[str, Any]]) -> str:
    import plotly.graph_objects as go

    begin = table.scheduled.min()
    tokens = np.array([t for row in rows if row["kind"] == "request" for t in row["tokens"]]) - begin
    seconds = np.arange(int(np.ceil(max(table.end.max() - begin, tokens.max()))) + 1)
    per_second = np.histogram(tokens, bins=np.append(seconds, seconds[-1] + 1))[0]
    middle = begin + seconds + 0.5
    flying = [int(((table.sent <= t) & (table.end > t)).sum()) for t in middle]
    figure = go.Figure()
    figure.add_bar(x=seconds.tolist(), y=per_second.tolist(), name="tokens/s")
    figure.add_scatter(x=seconds.tolist(), y=flying, name="requests in flight", yaxis="y2", mode="lines")
    figure.update_layout(yaxis2={"overlaying": "y", "side": "right", "title": "requests", "rangemode": "tozero"})
    figure.update_xaxes(title="s")
    figure.update_yaxes(title="tokens/s", selector=0)
    return to_html(figure)


def _ttft(table: Any) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, part in (("first turn", table[table.turn == 0]), ("later turns", table[table.turn > 0])):
        x, y = part.prompt_tokens.tolist(), (part.ttft * 1e3).round(3).tolist()
        figure.add_scatter(x=x, y=y, name=name, mode="markers")
    figure.update_xaxes(title="prompt tokens")
    figure.update_yaxes(title="TTFT, ms", rangemode="tozero")
    return to_html(figure)
