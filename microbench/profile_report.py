"""A profile for people: table, Markdown, one self-contained HTML page with the roofline point."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from blackwell_kernels import env
from blackwell_kernels.common.testing.inventory import kernels
from blackwell_kernels.microbench.profiling import Check, Profile, name_of
from blackwell_kernels.microbench.results import Ceilings

HEAD = ["check", "kernel", "value", "threshold", "verdict", "why", "how"]


def cells(check: Check) -> list[str]:
    """One row's cells."""
    value = "–" if check.value is None else f"{check.value:,.2f}".rstrip("0").rstrip(".") + f" {check.unit}"
    detail = ", ".join(f"{name} {number:,.4g}" for name, number in check.detail.items())
    why = "; ".join(part for part in (check.why, detail) if part)
    return [check.title, check.kernel, value.strip(), check.threshold, check.verdict, why, check.how]


def finding_lines(profile: Profile) -> list[str]:
    """Findings in the order in which they are worth a try."""
    lines = []
    for check in profile.findings():
        most = "" if check.gain is None else f"at most {check.gain:.0%}" if check.gain >= 0.01 else "under 1%"
        gain = f" ({most} of the time)" if most else ""
        lines.append(f"{check.title}{f' of {check.kernel}' if check.kernel else ''}: {check.why}{gain}")
    return lines


def terminal(profile: Profile) -> Table:
    """The checklist as a rich table."""
    table = Table(*HEAD, box=None, pad_edge=False)
    for check in profile.checks:
        table.add_row(*cells(check))
    return table


def _overview_cells(profile: Profile) -> list[str]:
    values = {check.id: check.value for check in profile.checks if not check.kernel}
    findings = finding_lines(profile)

    def shown(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    return [
        f"{profile.definition} {profile.case}",
        shown(values.get("duration")),
        f"{shown(values.get('bound'), 0)} ({profile.bound or '–'})",
        "–" if profile.trace is None else str(len(profile.trace.kernels)),
        shown(values.get("launch")),
        f"{sum(check.verdict == 'not measured' for check in profile.checks)} of {len(profile.checks)}",
        findings[0] if findings else "nothing is beyond its threshold",
    ]


CHANGED = "the case launches other kernels, or another configuration, than were profiled"
OVERVIEW = ["case", "µs", "% of the bound", "launches", "launch overhead µs", "not measured", "first finding"]


def overview(profiles: Sequence[Profile]) -> Table:
    """One line a profile as a rich table."""
    table = Table(*OVERVIEW, box=None, pad_edge=False)
    for profile in profiles:
        table.add_row(*_overview_cells(profile))
    return table


def index(profiles: Sequence[Profile]) -> str:
    """The page of a folder of profiles: one line each, linked; those of other launches than today's are marked."""
    changed = [profile for profile in profiles if not profile.holds()]
    body = "".join(
        f"| [{first}]({name_of(profile)}.md){' †' if profile in changed else ''} | {' | '.join(rest)} |\n"
        for profile in profiles
        for first, *rest in [_overview_cells(profile)]
    )
    gpu = profiles[0].facts.get("gpu", profiles[0].gpu)
    told = f"† {len(changed)} of {len(profiles)}: {CHANGED}.\n\n" if changed else ""
    return (
        f"# Profiles on {gpu}\n\n{told}| {' | '.join(OVERVIEW)} |\n|{'---|' * len(OVERVIEW)}\n{body}\n"
        "## Kernels\n\nEvery Triton kernel of the source that ran, and where CUPTI saw it.\n\n"
        f"| kernel | family | seen in |\n|---|---|---|\n{''.join(_seen(profiles))}"
    )


def _seen(profiles: Sequence[Profile]) -> Iterator[str]:
    for family in sorted(set(env.HOOK_OPS.values())):
        source = importlib.import_module(f"blackwell_kernels.{family}").__file__
        assert source is not None
        try:
            names = sorted(kernels(Path(source).parent))
        except ValueError:  # what was measured is worth its page all the same
            yield f"| – | {family} | two of its functions have one name |\n"
            continue
        for name in names:
            places = [
                f"{profile.definition} {profile.case} ({kernel.us:.2f} µs, {kernel.blocks} blocks)"
                for profile in profiles
                for kernel in (profile.trace.kernels if profile.trace else ())
                if kernel.name == name
            ]
            yield f"| `{name}` | {family} | {'; '.join(places) or 'no profiled call'} |\n"


def _kernels(profile: Profile) -> str:
    if profile.trace is None:
        return ""
    body = "".join(f"| {k.name} | {k.us:.2f} | {k.blocks} | {k.threads} |\n" for k in profile.trace.kernels)
    return f"\n## Kernels of one call, by CUPTI\n\n| kernel | µs | blocks | threads |\n|---|---|---|---|\n{body}"


def markdown(profile: Profile, changes: Sequence[str] = ()) -> str:
    """The findings, what changed, the checklist."""
    body = "".join("| " + " | ".join(cells(check)) + " |\n" for check in profile.checks)
    found = "".join(f"1. {line}\n" for line in finding_lines(profile)) or "Nothing is beyond its threshold.\n"
    changed = "".join(f"- {line}\n" for line in changes)
    facts = ", ".join(f"{name} {value}" for name, value in profile.facts.items())
    return (
        f"# {profile.definition} {profile.case} on {profile.gpu}\n\n{facts}\n\n"
        f"## What to try next\n\n{found}{changed}\n"
        f"## Checklist\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}\n{body}{_kernels(profile)}"
    )


def _roofline(profile: Profile, ceilings: Ceilings) -> Any:
    from plotly import graph_objects

    assert profile.intensity is not None
    figure = graph_objects.Figure()
    ends = (profile.intensity / 8, profile.intensity * 8)
    for name, peak in (("fp8", ceilings.fp8_tflops), ("bf16", ceilings.bf16_tflops)):
        knee = peak / ceilings.copy_tbps
        xs = sorted({ends[0], min(max(knee, ends[0]), ends[1]), ends[1]})
        figure.add_scatter(x=xs, y=[min(peak, x * ceilings.copy_tbps) for x in xs], mode="lines", name=f"{name} roof")
    figure.add_scatter(x=[profile.intensity], y=[profile.tflops], mode="markers", name="ours", marker={"size": 12})
    figure.update_xaxes(type="log", title="FLOP / byte")
    figure.update_yaxes(type="log", title="TFLOP/s")
    figure.update_layout(height=420)
    return figure


def page(profile: Profile, ceilings: Ceilings | None, changes: Sequence[str] = ()) -> str:
    """Self-contained HTML."""
    import jinja2
    from markupsafe import Markup
    from plotly import io
    from plotly.offline import get_plotlyjs

    figure = None
    if ceilings is not None and profile.intensity and profile.tflops:
        figure = Markup(io.to_html(_roofline(profile, ceilings), include_plotlyjs=False, full_html=False))
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("profile.html.j2").render(
        plotly=Markup(get_plotlyjs()) if figure is not None else "",
        profile=profile,
        findings=finding_lines(profile),
        changes=list(changes),
        figure=figure,
        head=HEAD,
        kernels=profile.trace.kernels if profile.trace else [],
        rows=[(check.verdict, cells(check)) for check in profile.checks],
    )
