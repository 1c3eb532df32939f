"""Stored results of end-to-end runs and the page about them: `results/<machine>/*.json` → `results/README.md`.

The page is made from the JSON files alone, charts included (Mermaid, which code hosts draw), so that whoever changes a
figure must change its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e import compare_report, soak, step_report
from blackwell_kernels.e2e.ratios import ARMS
from blackwell_kernels.e2e.report import ARM_COLOURS, read_json, write_atomic
from blackwell_kernels.errors import BlackwellKernelsError

# beside this file in a checkout; an installation has no place of its own for results
_HERE = Path(__file__).parent
ROOT = _HERE / "results" if (_HERE.parent / "pyproject.toml").exists() else Path("results")
# figures of a comparison that the page shows, the others are in the file
BRIEF = ("output_tokens_per_s", "turn_goodput", "ttft_p50", "ttft_p99", "itl_p99", "tpot_p50")
CHARTS = (
    ("output_tokens_per_s", "Output tokens/s", "tokens/s", 1.0),
    ("ttft_p99", "TTFT p99", "ms", 1e3),
    ("itl_p99", "ITL p99", "ms", 1e3),
)


# a folder of the machine that measured, up to the last name; `per/second` and addresses are none
_FOLDER = re.compile(r"(?<![\w.:/])/(?:[\w.+@~-]+/)+(?=[\w.+@~-])")
_SYSTEM = re.compile(r"^[A-Za-z]+-\d+(?:\.\d+)*")


def store(out: Path, commit: str, root: Path = ROOT, remarks: Sequence[str] = ()) -> Path:
    """Put the result of a comparison or a soak (its --out) under `root`; the page is written anew. Its path there.

    `remarks` go with it: what the figures do not say of themselves. Folders of the machine are left out.
    """
    path = out / "result.json"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BlackwellKernelsError(f"no result in {out}: {error}; give the --out of a comparison or a soak") from error
    what = kind(result)
    if what == "equal":
        raise BlackwellKernelsError(f"{path} is neither a comparison's result nor a soak's")
    about = result["settings"]["serving"] if what == "compare" else result["serving"]
    split = f"-tp{about['tp']}" if about["tp"] > 1 else ""
    depth = f"-{about['layers']}-layers" if about.get("layers") else ""  # less than the model's
    name = f"{what}-{about['model']}-{about['quant']}{split}{depth}-{commit}.json"
    kept = root / place(result["machine"], about["backend"]) / name
    result |= {"commit": commit, "remarks": [*result.get("remarks", ()), *remarks]}
    write_atomic(kept, json.dumps(without_places(result), indent=1))
    write(root)
    return kept


def judge_again(path: Path, remarks: Sequence[str] = ()) -> None:
    """Judge a kept comparison's prediction and memory anew, from what is in its file; nothing else changes.

    `remarks`, if any, take the place of those it has. Raises BlackwellKernelsError for a file of another kind.
    """
    result = read_json(path)
    if kind(result) != "compare":
        raise BlackwellKernelsError(f"{path} is no comparison")
    result["outcome"] = step_report.outcome(result)
    for anew in filter(None, (step_report.check(result), compare_report.memory_check(result))):
        names = [check["name"] for check in result["checks"]]
        place = names.index(anew["name"]) if anew["name"] in names else len(names)
        result["checks"][place : place + 1] = [anew]
    result["remarks"] = list(remarks) or result["remarks"]
    write_atomic(path, json.dumps(result, indent=1))


def without_places(result: dict[str, Any]) -> dict[str, Any]:
    """The result with `/a/b/name` as `name` everywhere, and of its system no more than name and version."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(of) for key, of in value.items()}
        if isinstance(value, list):
            return [cut(of) for of in value]
        return _FOLDER.sub("", value) if isinstance(value, str) else value

    found = cut(result)
    if system := _SYSTEM.match(found["machine"].get("system", "")):
        found["machine"]["system"] = system[0]
    return found


def place(machine: dict[str, Any], backend: str) -> str:
    """The folder of a machine: h200, cpu."""
    words = re.findall(r"[a-z]+\d+\w*", machine.get("gpu", "").lower())
    return words[0] if words else backend


def kind(result: dict[str, Any]) -> str:
    """compare, soak or equal, by what is in a result."""
    return "compare" if "figures" in result else "soak" if "windows" in result else "equal"


def write(root: Path = ROOT) -> Path:
    """Write root/README.md."""
    path = root / "README.md"
    write_atomic(path, text(root))
    return path


def text(root: Path = ROOT) -> str:
    """The page of everything that is stored."""
    parts = [
        "# End to end: what was measured",
        "Made by `blackwell-kernels e2e store` from the JSON files of these folders; do not edit. Definitions, and how "
        "to repeat it: [e2e](../README.md). In charts stock is grey and the plugin blue.",
    ]
    sections: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
        "compare": _comparison,
        "soak": _soak,
        "equal": _equality,
    }
    found = [(path, read_json(path)) for path in sorted(root.glob("*/*.json"))]
    for what, title in (("compare", "Plugin against stock"), ("soak", "Soak"), ("equal", "The same model")):
        stored = [(path, result) for path, result in found if kind(result) == what]
        parts.append(f"## {title}")
        if not stored:
            parts.append("Nothing is stored yet.")
        for path, result in _newest_first(stored):
            parts += sections[what](result, path.relative_to(root).as_posix())
    return "\n\n".join(parts) + "\n"


def _newest_first(stored: list[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """By what was compared, the latest run first."""
    by_date = sorted(stored, key=lambda item: item[1]["date"], reverse=True)
    return sorted(by_date, key=lambda item: item[1].get("title", ""))


def _head(result: dict[str, Any], path: str) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"].get("gpu") or f"{result['machine'].get('cores')} CPU cores"
    return [
        f"### {result['title']}, {result['date'][:10]}",
        f"{result['date']} · {machine} · commit {result['commit']} · {versions} · [{path}]({path})",
        f"`{result['command']}`",
        *(f"- {remark}" for remark in result.get("remarks", ())),
    ]


def _comparison(result: dict[str, Any], path: str) -> list[str]:
    found = [*_head(result, path)]
    found += [f"- **{title}**: {value}" for title, value in compare_report.key_figures(result)]
    tables = compare_report.tables(result)
    found += [_table(tables[name]) for name in ("checks", "traffic", "aims", "prediction") if name in tables]
    for key, title, unit, scale in CHARTS:
        rates = [f"{rate:g}" for rate in result["rates"]]
        rows_ = [result["figures"].get(rate, {}).get(key) or {} for rate in rates]
        if len(rates) > 1 and all(row.get(arm) is not None for row in rows_ for arm in ARMS):
            series = {arm: [float(row[arm]) * scale for row in rows_] for arm in ARMS}
            found.append(_lines(title, "sessions/s", rates, unit, series))
    head = ["sessions/s", "", "stock", "plugin", "plugin / stock", "verdict"]
    rows = [
        compare_report.brief_row(rate, key, figures[key])
        for rate, figures in result["figures"].items()
        for key in BRIEF
        if key in figures
    ]
    found.append(_table(("Figures, 95 % intervals, latencies in ms", head, rows)))
    found += [_table(tables[name]) for name in ("steps", "host", "operators", "activation") if name in tables]
    return [*found, _notes(compare_report.notes(result))]


def _soak(result: dict[str, Any], path: str) -> list[str]:
    found = [*_head(result, path), _table(soak.tables(result)["checks"])]
    windows = result["windows"]
    if windows:
        minutes = [f"{row['end'] / 60:.0f}" for row in windows]
        for key, title in (("ttft_p99", "TTFT p99 of each window"), ("itl_p99", "ITL p99 of each window")):
            values = [row[key] for row in windows]
            if all(value is not None for value in values):
                found.append(_lines(title, "minutes", minutes, "ms", {"plugin": [value * 1e3 for value in values]}))
    found += [_table(table) for name, table in soak.tables(result).items() if name != "checks"]
    return [*found, _notes(soak.notes(result))]


def _equality(result: dict[str, Any], path: str) -> list[str]:
    page = Path(path).with_suffix(".md").as_posix()
    passed = "passed" if result["passed"] else "not passed"
    about = f"{result['model']}, {result['layers']} layers, commit {result['commit']}, {result['date']}"
    return [f"- [{about}]({page}): **{passed}**"]


def _table(table: tuple[str, list[str], list[list[str]]]) -> str:
    title, head, rows = table
    lines = [f"**{title}**", "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _notes(notes: list[str]) -> str:
    return "\n".join(["What it does not say:", "", *(f"- {note}" for note in notes)]) if notes else "No reservations."


def _lines(title: str, x: str, places: list[str], unit: str, series: dict[str, list[float]]) -> str:
    colours = ", ".join(ARM_COLOURS[name] for name in series)
    top = max(value for values in series.values() for value in values)
    return "\n".join(
        [
            "```mermaid",
            f"%%{{init: {{'themeVariables': {{'xyChart': {{'plotColorPalette': '{colours}'}}}}}}}}%%",
            "xychart-beta",
            f'    title "{title}"',
            f'    x-axis "{x}" [{", ".join(places)}]',
            f'    y-axis "{unit}" 0 --> {_plain(top * 1.1)}',
            *(f"    line [{', '.join(map(_plain, values))}]" for values in series.values()),
            "```",
        ]
    )


def _plain(value: float) -> str:
    """Four digits and no exponent, which Mermaid does not read."""
    return f"{float(f'{value:.4g}'):.12g}"
