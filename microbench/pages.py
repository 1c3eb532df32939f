"""The pages of a GPU's results, made of what is stored: a summary with plots (README.md) and a technical report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blackwell_kernels import env
from blackwell_kernels.common import arch
from blackwell_kernels.common.library import NAMESPACE
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import (
    dispatch,
    floors,
    plots,
    profile_report,
    profiling,
    report,
    results,
    scores,
    svg,
)
from blackwell_kernels.microbench.cases import SETS, select
from blackwell_kernels.microbench.implementations import OURS, find
from blackwell_kernels.microbench.parts import PARTS
from blackwell_kernels.microbench.profiling import Profile
from blackwell_kernels.microbench.results import Results, Row
from blackwell_kernels.microbench.runner import MAX_SETS
from blackwell_kernels.microbench.specs import OPS
from blackwell_kernels.microbench.timing import quantile
from blackwell_kernels.microbench.workloads import generate

MAX_PANELS = 12
COLD = 2 * results.L2
_FAMILIES = set(env.HOOK_OPS.values())


def write(folder: Path) -> list[str]:
    """Make the pages of results/<gpu>; the names of those that changed. Plots that are no longer drawn are removed."""
    made = build(folder)
    changed = _stale(folder, made)
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in _drawn(folder) - made.keys():
        (folder / name).unlink()
    return changed


def stale(folder: Path) -> list[str]:
    """Names of pages that are not what the stored results give."""
    return _stale(folder, build(folder))


def _stale(folder: Path, made: dict[str, str]) -> list[str]:
    different = {
        name
        for name, text in made.items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text
    }
    return sorted(different | (_drawn(folder) - made.keys()))


def _drawn(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("plots/*.svg")}


def build(folder: Path) -> dict[str, str]:
    """Name within the folder -> text.

    Raises: TableError when a stored file is damaged, or none has a time.
    """
    import jinja2

    files = [results.load(path) for path in sorted(folder.glob("*.json"))]
    files = [found for found in files if found.rows]
    if not any(impl.us for found in files for row in found.rows for impl in row.impls.values()):
        raise TableError(f"no time is stored under {folder}: there is nothing to make a page of")
    profiles = [profiling.judged_again(found) for found in profiling.stored(folder / "profile")]
    rows = [row for found in files for row in found.rows]
    made: dict[str, str] = {}
    common = {
        "gpu": files[0].gpu,
        "slug": folder.name,
        "scores": report.markdown_table(
            report.SCORE_HEAD, (line for score in scores.by_op(rows) for line in report.score_cells(score))
        ),
        "contest": report.contest_lines(rows),
        "timings": report.timings(rows),
        "slower": _slower(rows),
    }
    parts = []
    for found in sorted(files, key=lambda found: OPS.index(found.rows[0].op)):
        figures = _figures(found)
        made |= {f"plots/{name}": text for name, text, _ in figures}
        parts.append(_part(found, [(name, title) for name, _, title in figures]))
    measured = {found.rows[0].op for found in files}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), trim_blocks=True, lstrip_blocks=True
    )
    unmeasured = ", ".join(op for op in OPS if op not in measured)
    made["README.md"] = environment.get_template("summary.md.j2").render(
        **common, parts=parts, profiled=bool(profiles), unmeasured=unmeasured
    )
    made["report.md"] = environment.get_template("technical.md.j2").render(
        **common, files=files, **_technical(files, rows, profiles)
    )
    if profiles:
        made["profile/README.md"] = profile_report.index(profiles)
        made |= {f"profile/{profiling.name_of(found)}.md": profile_report.markdown(found) for found in profiles}
    return {name: _tidy(text) if name.endswith(".md") else text for name, text in made.items()}


def _tidy(text: str) -> str:
    """Never more than one empty line, one end of line at the end."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"


def _figures(found: Results) -> list[tuple[str, str, str]]:
    """(file name, SVG, what it shows)."""
    op, made = found.rows[0].op, []
    panels = _curves(found)
    if panels:
        made.append((f"{op}-latency.svg", svg.document(panels), f"{op}: time against tokens"))
    if any(row.bytes for row in found.rows):
        made.append((f"{op}-roofline.svg", svg.document([plots.roofline_panel(found)]), f"{op}: roofline"))
    return made


def _curves(found: Results) -> list[plots.Panel]:
    """Panels with a curve, those with the most points first where there are too many."""
    panels = [panel for panel in plots.latency_panels(found) if len(panel.series[-1].x) > 1]
    kept = sorted(panels, key=lambda panel: -len(panel.series[-1].x))[:MAX_PANELS]
    return [panel for panel in panels if panel in kept]


def _part(found: Results, figures: list[tuple[str, str]]) -> dict[str, Any]:
    rows = found.rows
    lines, changed = [], 0
    for row in rows:
        cells = report.cells(row, found.gpu)
        slow = row.ratio_best_peer is not None and row.ratio_best_peer < 1.0
        name = f"**{cells[0]}**" if slow else cells[0]
        if not dispatch.holds(row, arch.gpu_slug(found.gpu)):
            name, changed = f"{name} †", changed + 1
        lines.append([name, *cells[1:]])
    left_out = len(plots.latency_panels(found)) - len(_curves(found))
    return {
        "op": rows[0].op,
        "summary": report.summary(rows),
        "figures": figures,
        "left_out": f"{left_out} curves of one point, or beyond the {MAX_PANELS} longest, are in the table alone."
        if left_out
        else "",
        "older": _older(found),
        "changed": f"† {changed} of {len(rows)} rows: ours launches other kernels, or another configuration, since."
        if changed
        else "",
        "table": report.markdown_table(report.head(found.gpu), lines),
        "warm": report.warm(rows),
        "peers": report.markdown_table(report.PEER_HEAD[1:], (line[1:] for line in report.peer_cells(rows))),
        "notes": report.notes(rows),
    }


def _older(found: Results) -> str:
    """Rows that come from another commit than the file's latest run."""
    older = sorted({row.commit for row in found.rows if row.commit != found.commit})
    count = sum(row.commit != found.commit for row in found.rows)
    return f"{count} of {len(found.rows)} rows are of an earlier run, at commit {', '.join(older)}." if older else ""


def _slower(rows: Sequence[Row]) -> str:
    slow = [row for row in rows if row.ratio_best_peer is not None and row.ratio_best_peer < 1.0]
    compared = sum(row.ratio_best_peer is not None for row in rows)
    if not slow:
        return f"Ours is slower than the fastest peer in none of {compared} compared cases."
    worst = min(slow, key=lambda row: row.ratio_best_peer or 1.0)
    return (
        f"Ours is slower than the fastest peer in {len(slow)} of {compared} compared cases; furthest behind: "
        f"{worst.definition} {worst.case} at {worst.ratio_best_peer:.2f}x of {worst.best_peer}."
    )


def _technical(files: list[Results], rows: list[Row], profiles: list[Profile]) -> dict[str, Any]:
    timed = [impl for row in rows for impl in row.impls.values() if impl.us is not None]
    wide = [(impl.p90 - impl.p10) / impl.us for impl in timed if impl.us and impl.p10 and impl.p90]
    problems = [*floors.below(rows), *floors.below_their_launches(profiles)]
    eager = sum(impl.method == "eager" for impl in timed)
    sizes = [row.rotated_bytes / 2**20 for row in rows]
    own = [profile for profile in profiles if profile.own_bound_us is not None]
    return {
        "sets": report.span(row.sets for row in rows),
        "rotated": f"{min(sizes):,.1f} to {max(sizes):,.0f} MiB",
        "samples": report.span(impl.n for impl in timed),
        "eager": f"Calls that could not be captured are timed eagerly and marked so: {eager} of {len(timed)} times."
        if eager
        else "All of them could be captured.",
        "spread": f"median {quantile(wide, 0.5):.1%}, p90 {quantile(wide, 0.9):.1%}, largest {max(wide):.1%}",
        "below": "No time lies below its floor, ours or a peer's."
        if not problems
        else f"{len(problems)} times lie below their floor: {'; '.join(problems)}.",
        "floors": report.markdown_table(floors.HEAD, (one.cells() for one in floors.shares(rows))),
        "own": f"Of {len(own)} profiled calls none is below the bound of its own launches (their number, and the "
        "multiprocessors that their grids can fill)."
        if own and not floors.below_their_launches(profiles)
        else "",
        "hosts": _hosts(rows),
        "shipped": _shipped(rows, profiles),
        "profiled": bool(profiles),
        "peers": report.markdown_table(report.PEER_HEAD, report.peer_cells(rows)),
        "machines": _machines(rows),
        "routing": _routing(rows),
        "limits": _limits(rows),
        "runs": _runs(files),
    }


def _hosts(rows: Sequence[Row]) -> str:
    """What calls cost their host, by operator: of cases in which ours and stock's were both measured."""
    lines = []
    for op in OPS:
        found = [(row.impls[OURS].host_us, row.impls[row.stock].host_us) for row in rows if row.op == op]
        both = [(ours, theirs) for ours, theirs in found if ours is not None and theirs is not None]
        if both:
            ratios = [theirs / ours for ours, theirs in both]
            medians = [quantile(values, 0.5) for values in (*zip(*both, strict=True), ratios)]
            lines.append([op, f"{len(both)} of {len(found)}", *(f"{x:.0f}" for x in medians[:2])])
            lines[-1] += [f"{medians[2]:.2f}x", f"{min(ratios):.2f}x"]
    head = ["operator", "cases", "ours µs, median", "stock's", "stock's / ours, median", "worst"]
    return report.markdown_table(head, lines) if lines else ""


def _limits(rows: Sequence[Row]) -> list[str]:
    made = []
    alone = sum(row.best_peer is None for row in rows)
    no_stock = sum(row.ratio_stock is None for row in rows)
    if alone:
        made.append(f"{alone} of {len(rows)} cases have no peer with a time, and no ratio.")
    if no_stock:
        made.append(f"{no_stock} of {len(rows)} cases have no ratio against what stock vLLM picks there.")
    warm = [row.rotated_bytes / 2**20 for row in rows if row.sets >= MAX_SETS and row.rotated_bytes < COLD]
    if warm:
        made.append(
            f"{len(warm)} of {len(rows)} cases are so small that their {MAX_SETS} input sets, {min(warm):,.1f} to "
            f"{max(warm):,.1f} MiB, may stay in the L2, in {sum(row.warm for row in rows)} of them wholly (which the "
            "summary marks); FIB µs has it overwritten before each call."
        )
    missing = [op for op in OPS if op not in {row.op for row in rows}]
    if missing:
        made.append(f"Not measured at all on this GPU: {', '.join(missing)}.")
    stored = {(row.definition, row.case) for row in rows}
    counts = []
    for name in SETS[:-1]:  # the last is for machines without a GPU
        cases = select(sets=(name,))
        done = sum((case.spec.name, case.name) in stored for case in cases)
        if done < len(cases):
            counts.append(f"{done} of {len(cases)} {name} cases")
    if counts:
        made.append(f"Not every case is measured: {', '.join(counts)} are (`blackwell-kernels bench --owed`).")
    absent = ", ".join(f"{name} ({count})" for name, count in results.not_set_up(rows).items())
    if absent:
        made.append(
            f"Peers that were not set up when rows were measured, by cases: {absent}; "
            "`bench --owed --peer NAME` measures such rows again."
        )
    left_out: dict[str, int] = {}
    for row in rows:
        for name, impl in row.impls.items():
            if impl.us is None and name != OURS:
                left_out[name] = left_out.get(name, 0) + 1
    told = ", ".join(f"{name} ({count})" for name, count in sorted(left_out.items()))
    return [*made, *([f"Peers without a time, by cases: {told}; the summary says why."] if told else [])]


def _machines(rows: Sequence[Row]) -> str:
    runs, commits = {(row.commit, row.date) for row in rows}, {row.commit for row in rows}
    if len(runs) == 1:
        return "One run on one GPU of this kind"
    at = "one commit" if len(commits) == 1 else f"{len(commits)} commits"
    return f"{len(runs)} runs at {at}, on whichever GPU of this kind was there: which one is not stored"


def _routing(rows: Sequence[Row]) -> str:
    """How the experts of the rows were chosen."""
    experts = [row for row in rows if row.op == "moe"]
    zipf = sum("routing=zipf" in row.case.split("/") for row in experts)
    return f" (by Zipf's law in {zipf} of {len(experts)} rows of moe)" if zipf else ""


def _runs(files: Sequence[Results]) -> list[str]:
    """The rows of each commit and day; the command of those whose run the file's head describes, no other is kept."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for one in files:
        for row in one.rows:
            kept = (row.commit, row.date) == (one.commit, one.date)
            told = f"`{one.command}`" if kept else "the command was not kept with the results"
            found[row.op, row.commit, row.date[:10], told] += 1
    return [
        f"{op}: {count} row{'s' if count > 1 else ''} of {date}, commit {commit}: {told}"
        for (op, commit, date, told), count in sorted(found.items(), key=lambda item: OPS.index(item[0][0]))
    ]


def _shipped(rows: Sequence[Row], profiles: Sequence[Profile]) -> str:
    lines = []
    for name, definitions in sorted(launched().items()):
        mine = [row for row in rows if row.definition in definitions]
        times = sum(row.impls[OURS].us is not None for row in mine)
        profiled = sum(profile.definition in definitions for profile in profiles)
        told = f"{times} of {len(mine)}" if mine else "not measured"
        lines.append([f"`{name}`", ", ".join(definitions), told, str(profiled)])
    table = report.markdown_table(["operator", "measured by", "cases timed", "profiles"], lines)
    apart = ", ".join(f"`{spec.name}`" for spec in PARTS)
    return table + (
        f"\nNo hook for GPUs calls what {apart} measure: there stock vLLM writes and gathers the caches (on CPUs "
        "`model_patches/dsa_cpu.py` does), and `gdn_prepare` normalises."
    )


class _Recorder(TorchDispatchMode):
    """Notes which of our operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.names[func.overloadpacket.__name__] = None
        return func(*args, **(kwargs or {}))


@cache
def launched() -> dict[str, list[str]]:
    """Registered operator -> the definitions whose call runs it, found by running the smallest case of each here."""
    found: dict[str, list[str]] = {}
    for definition in dict.fromkeys(case.definition for case in select(sets=("cpu",))):
        case = min(select(sets=("cpu",), definition=definition), key=lambda case: sum(case.axes.values()))
        with _Recorder() as recorder:
            find(case.spec.name, OURS).bind(generate(case))()
        for name in recorder.names:
            found.setdefault(name, []).append(definition)
    every = (str(name).split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if _ours(name))
    return {name: found.get(name, []) for name in sorted(set(every))}


def _ours(name: str) -> bool:
    namespace, _, op = name.partition("::")
    return namespace == NAMESPACE and op.split("_")[0] in _FAMILIES
