"""Stored results: `results/<gpu>/<op>.json`, one file per operator, written row by row, and their audit.

Every number that is derived (medians, percentiles, ratios, best peer) can be recomputed from the samples beside it;
`audit` does, and reports each one that does not follow.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blackwell_kernels.common import tables
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import guards
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.timing import quantile

SCHEMA = 1
_HERE = Path(__file__).parent
# beside this file in a checkout; an installation has no place of its own for results
ROOT = _HERE / "results" if (_HERE.parent / "pyproject.toml").exists() else Path("results")
TOLERANCE = 1e-6  # relative: numbers are stored in full
L2 = 50 << 20  # bytes: the least of the chips here, an H200's
Timer = Literal["us", "fib_us"]  # whose median: graph replays', or FlashInfer-Bench's timing
PHYSICS = 0.7  # below this share of the floor a time is not believed; ceilings are measured, so not exact


class Strict(BaseModel):
    """Unknown names and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Ceilings(Strict):
    """What the chip did in this run: large copy (read + write), dense products, smallest kernel in a graph."""

    copy_tbps: float = Field(gt=0)
    fp8_tflops: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    launch_us: float = Field(gt=0)


# why a peer has no time where another day it may: a package, a compilation, a search, a choice
_NOT_SET_UP = ("is not installed", "is not compiled", "tune vLLM's kernel first", "left out of this run")


class Impl(Strict):
    """One implementation on one case: a time with its samples, or `error` saying why there is none.

    accuracy: 1 − similarity with the reference (for selections the largest score missed). fib_us: FlashInfer-Bench's
    own timing, host launch included. host_us: median time until an eager call returns, the device idle before it; early
    files have none. method: graph or eager. flag: how a peer is less accurate than ours may be; it is timed and counts
    all the same. peak_bytes: the most GPU memory it allocated in one call, its inputs aside.
    """

    us: float | None = Field(default=None, gt=0)
    p10: float | None = Field(default=None, gt=0)
    p90: float | None = Field(default=None, gt=0)
    n: int = 0
    error: str | None = None
    samples_us: list[float] = []
    method: Literal["graph", "eager"] | None = None
    accuracy: float | None = None
    fib_us: float | None = None
    host_us: float | None = Field(default=None, gt=0)
    flag: str | None = None
    peak_bytes: int | None = Field(default=None, ge=0)

    @property
    def set_up(self) -> bool:
        """False where there is no time for want of a package, a compilation or a search, or by choice."""
        return self.us is not None or not any(reason in (self.error or "") for reason in _NOT_SET_UP)


class Row(Strict):
    """One case. Ratios are theirs / ours from one alternating run; `dispatched`: what the plugin uses for it.

    bytes, flops: what the floor counts; kernels: `launched.of` the case as it was measured (early rows have other
    digits, or none).
    """

    op: str
    definition: str
    case: str
    axes: dict[str, int | str]
    floor_us: float = Field(gt=0)
    bound: Literal["memory", "compute", "launch"]
    impls: dict[str, Impl]
    stock: str
    best_peer: str | None
    ratio_stock: float | None
    ratio_best_peer: float | None
    dispatched: str
    sets: int = Field(ge=1)
    rotated_bytes: int = Field(ge=0)
    bytes: int | None = Field(default=None, ge=0)
    flops: int | None = Field(default=None, ge=0)
    commit: str
    source: str
    kernels: str = ""
    date: str

    @property
    def warm(self) -> bool:
        """Whether all that the rotated inputs touch fits the L2, so that calls may find theirs there."""
        return self.rotated_bytes < L2


class Head(Strict):
    """What a stored file says of the latest run that wrote to it; each of its rows names the run it came from."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    gpu: str
    sm: int
    driver: str
    torch: str
    triton: str
    vllm: str
    commit: str
    date: str
    command: str
    source: str


class Results(Head):
    """A results file."""

    ceilings: Ceilings
    rows: list[Row] = []


def not_set_up(rows: Iterable[Row]) -> dict[str, int]:
    """Peer -> rows in which it was not set up, most first."""
    found = Counter(name for row in rows for name, impl in row.impls.items() if not impl.set_up)
    return dict(found.most_common())


def best_peer(impls: dict[str, Impl], by: Timer = "us") -> str | None:
    """The fastest measured implementation that is not ours."""
    times = {name: getattr(impl, by) for name, impl in impls.items() if name != OURS}
    peers = {name: time for name, time in times.items() if time is not None}
    return min(peers, key=lambda name: peers[name]) if peers else None


def ratio(impls: dict[str, Impl], name: str | None, by: Timer = "us") -> float | None:
    """Their time over ours."""
    ours = getattr(impls[OURS], by) if OURS in impls else None
    theirs = getattr(impls[name], by) if name in impls else None
    return theirs / ours if ours is not None and theirs is not None else None


def reviewed(impls: dict[str, Impl], names: Iterable[str], floor_us: float) -> dict[str, Impl]:
    """The same, but of `names` (third parties') a time that cannot be true is an error, and one that beats all others
    by far is flagged."""
    made = dict(impls)
    for name in names:
        mine = impls[name]
        if mine.us is None:
            continue
        others = [impl.us for other, impl in impls.items() if other != name and impl.us is not None]
        if why := guards.implausible(mine.us, floor_us, PHYSICS):
            made[name] = Impl(error=why, accuracy=mine.accuracy)
        elif flag := guards.for_review(mine.us, min(others, default=None)):
            made[name] = mine.model_copy(update={"flag": flag})
    return made


def path_of(gpu: str, op: str, root: Path = ROOT) -> Path:
    """results/<gpu>/<op>.json."""
    return root / gpu / f"{op}.json"


def load(path: Path) -> Results:
    """Raises: TableError naming the file and the first problem."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TableError(f"{path}: {place}: {first['msg']}; run `blackwell-kernels bench` again") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}; run `blackwell-kernels bench` first") from None


def dump(results: Results) -> str:
    """JSON text: the head indented, one row a line, so that a new run shows as the rows it changed."""
    head = results.model_dump(by_alias=True, exclude={"rows"})
    rows = ",\n".join("  " + json.dumps(row.model_dump(), ensure_ascii=False) for row in results.rows)
    body = f"[\n{rows}\n ]" if rows else "[]"
    return json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": {body}\n}}\n'


def write(path: Path, results: Results) -> None:
    """At once or not at all: a run that dies leaves the rows it had. Raises: TableError when that cannot be."""
    tables.replace_text(path, dump(results))


def check_place(gpu: str, ops: Iterable[str], root: Path = ROOT) -> None:
    """Before anything is measured. Raises: TableError when a row of these operators could not be stored."""
    for op in ops:
        if (path := path_of(gpu, op, root)).exists():
            load(path)
    try:
        (root / gpu).mkdir(parents=True, exist_ok=True)
        (root / gpu / f".{os.getpid()}.tmp").touch()
        (root / gpu / f".{os.getpid()}.tmp").unlink()
    except OSError as error:
        raise TableError(f"{root / gpu}: cannot be written: {error.strerror}; --results names another folder") from None


def merge(path: Path, head: dict[str, Any], rows: list[Row]) -> Results:
    """Add rows to the file at `path`, replacing those of the same definition and case; a new file if there is none."""
    old = load(path).rows if path.exists() else []
    fresh = {(row.definition, row.case): row for row in rows}
    kept = [fresh.pop((row.definition, row.case), row) for row in old]
    results = Results.model_validate({**head, "rows": [row.model_dump() for row in [*kept, *fresh.values()]]})
    write(path, results)
    return results


def audit(results: Results) -> list[str]:
    """One message for each number that does not follow from the samples; empty when all do."""
    problems = []
    for row in results.rows:
        where = f"{row.definition} {row.case}"
        for name, impl in row.impls.items():
            problems += [f"{where}, {name}: {problem}" for problem in _audit_impl(impl)]
        expected = {
            "best_peer": best_peer(row.impls),
            "ratio_stock": ratio(row.impls, row.stock),
            "ratio_best_peer": ratio(row.impls, best_peer(row.impls)),
        }
        for field, value in expected.items():
            if not _same(getattr(row, field), value):
                problems.append(f"{where}: {field} is {getattr(row, field)}, the samples give {value}")
        for name, impl in row.impls.items():
            if impl.us is not None and impl.us < PHYSICS * row.floor_us:
                problems.append(f"{where}, {name}: {impl.us:.2f} µs is under the floor of {row.floor_us:.2f} µs")
        for field in ("stock", "dispatched"):
            if getattr(row, field) not in row.impls:
                problems.append(f"{where}: {field} {getattr(row, field)} is not among the implementations")
    return problems


def _audit_impl(impl: Impl) -> list[str]:
    if not impl.samples_us:
        if impl.us is not None or impl.n:
            return ["has a time but no samples"]
        return [] if impl.error else ["has neither a time nor a reason why not"]
    problems = [] if impl.n == len(impl.samples_us) else [f"n is {impl.n}, there are {len(impl.samples_us)} samples"]
    for field, q in (("us", 0.5), ("p10", 0.1), ("p90", 0.9)):
        value = quantile(impl.samples_us, q)
        if not _same(getattr(impl, field), value):
            problems.append(f"{field} is {getattr(impl, field)}, the samples give {value}")
    if impl.error is not None:
        problems.append("has both a time and an error")
    return problems


def _same(stored: Any, value: Any) -> bool:
    if isinstance(stored, float | int) and isinstance(value, float | int):
        return abs(stored - value) <= TOLERANCE * abs(value)
    return stored == value
