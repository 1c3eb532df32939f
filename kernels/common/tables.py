"""Tuned tables: one JSON file per GPU and operator holds the kernel's configurations, what was measured, and which
implementation to use. `kernels/<family>/configs/<gpu slug>/<op>.json`; written by tools only, checked on load.
A configuration that is in no table yet, a tuner's candidate, is passed to an operator by `override`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from blackwell_kernels.common import launch
from blackwell_kernels.common.arch import gpu_slug
from blackwell_kernels.errors import TableError

Scalar = bool | int | float | str
CaseKey = tuple[tuple[str, str, Scalar], ...]

# the families' folders lie beside common's, in the checkout as in the installed package
ROOT = Path(__file__).resolve().parent.parent
TOLERATED = 1.02  # times stock's, at most, on the worst of what a row serves
_FIX = "write it with `blackwell-kernels bench --write-dispatch`, or restore the shipped file"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Provenance(_Strict):
    """Where a table's numbers come from. sm: 90, 100, ...; commit: of this project; date: ISO; n: samples a number."""

    gpu: str = Field(min_length=1)
    sm: int = Field(ge=0)
    driver: str
    torch: str
    triton: str
    vllm: str
    commit: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}")
    command: str = Field(min_length=1)
    n: int = Field(ge=1)


class Row(_Strict):
    """One case (all axes but tokens) at one number of tokens: configuration, medians in µs, decision.

    kernels: `kernels_of` the family when this case was last seen to launch what was measured, empty where it does not.
    """

    case: dict[str, Scalar]
    tokens: int = Field(ge=1)
    config: dict[str, Scalar]
    ours_us: float | None = Field(default=None, gt=0)
    stock_us: float | None = Field(default=None, gt=0)
    use: Literal["triton", "stock"]
    kernels: str = ""

    @model_validator(mode="after")
    def _never_slower_than_stock(self) -> Row:
        most = (self.stock_us or float("inf")) * TOLERATED
        if self.use == "triton" and self.stock_us is not None and (self.ours_us or float("inf")) > most:
            raise ValueError(f"use is triton, but ours ({self.ours_us} µs) is slower than stock ({self.stock_us})")
        return self


class Table(_Strict):
    """A checked table: rows sorted by case, then tokens, none twice, all with the same axes."""

    schema_version: Literal[1] = Field(alias="schema")
    op: str = Field(pattern=r"^[a-z0-9_]+$")
    provenance: Provenance
    rows: tuple[Row, ...] = Field(strict=False)
    _index: dict[CaseKey, tuple[Row, ...]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _sorted_and_unambiguous(self) -> Table:
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            what = f"case {row.case} at {row.tokens} tokens"
            if before.case.keys() != row.case.keys():
                raise ValueError(f"{what}: axes differ from {sorted(before.case)}")
            if _sort_key(before) == _sort_key(row):
                raise ValueError(f"{what} is there twice")
            if _sort_key(before) > _sort_key(row):
                raise ValueError(f"rows are not sorted by case, then tokens: {what}")
        for row in self.rows:
            self._index[_key(row.case)] = (*self._index.get(_key(row.case), ()), row)
        return self

    def lookup(self, case: dict[str, Scalar], tokens: int) -> Row | None:
        """The row of exactly this case with the fewest tokens that are still >= `tokens`, else its largest row."""
        rows = self._index.get(_key(case), ())
        if not rows:
            return None
        return rows[min(bisect_left(rows, tokens, key=lambda row: row.tokens), len(rows) - 1)]


class _Override(Table):
    """Answers one configuration for every case and number of tokens."""

    _config: dict[str, Scalar] = PrivateAttr(default_factory=dict)

    def lookup(self, case: dict[str, Scalar], tokens: int) -> Row | None:
        return Row(case=case, tokens=max(1, tokens), config=self._config, use="triton")


_overrides: dict[str, _Override] = {}


@contextmanager
def override(op: str, config: dict[str, Scalar]) -> Iterator[None]:
    """Inside, every table of `op` says `config`; {} stands for the operator's heuristic. For tuners: it holds for the
    whole process, whatever its threads do, and on GPUs and pretended ones only, since a CPU has no tables."""
    before = _overrides.get(op)
    table = _Override.model_construct()
    table._config = dict(config)
    _overrides[op] = table
    launch.forget()
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before
        launch.forget()


def _key(case: dict[str, Scalar]) -> CaseKey:
    # the type keeps True, 1 and 1.0 apart, as JSON does, and makes every two values of an axis comparable
    return tuple(sorted((name, type(value).__name__, value) for name, value in case.items()))


def _sort_key(row: Row) -> tuple[CaseKey, int]:
    return _key(row.case), row.tokens


def sort_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows in the order that a table demands."""
    return tuple(sorted(rows, key=_sort_key))


@cache
def kernels_of(family: str, root: Path = ROOT) -> str:
    """12 hex digits over a family's Triton kernels and what chooses their launches, comment lines apart. When they
    change no row decides until `blackwell-kernels bench dispatch` has seen what each case launches now."""
    digest = hashlib.sha256()
    for path in sorted((root / family).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "config.py" or "@triton.jit" in text:
            lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            digest.update("\n".join([path.name, *lines, ""]).encode())
    return digest.hexdigest()[:12]


# asked for in every call of an operator, while the GPU waits
@cache
def path_of(family: str, op: str, gpu: str, root: Path = ROOT) -> Path:
    """Where the table of `op` on the GPU with this slug lies."""
    for part in (family, op, gpu):
        # the names come from environment variables and device names: keep them inside the folder
        if not re.fullmatch(r"[a-z0-9_-]+", part):
            raise TableError(f"no table can be named {part!r}: lower-case letters, digits, - and _ only")
    return root / family / "configs" / gpu / f"{op}.json"


def load(family: str, op: str, gpu: str, root: Path = ROOT) -> Table | None:
    """The table of `op` on the GPU with slug `gpu`, or None when nobody measured it.

    Raises: TableError when the file is unreadable, of another schema, unsorted, ambiguous, or of another op or GPU.
    """
    if op in _overrides:
        return _overrides[op]
    path = path_of(family, op, gpu, root)
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _load(path, stamp, op, gpu)


@lru_cache(maxsize=256)
def _load(path: Path, stamp: int, op: str, gpu: str) -> Table:
    try:
        table = Table.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise TableError(f"{path}: {_first_problem(error)}; {_FIX}") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}; {_FIX}") from None
    measured_on = gpu_slug(table.provenance.gpu)
    if (table.op, measured_on) != (op, gpu):
        raise TableError(f"{path}: holds {table.op} measured on {measured_on}, not {op} on {gpu}; {_FIX}")
    return table


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {problem['msg']}{more}" if place else f"{problem['msg']}{more}"


def write(family: str, table: Table, root: Path = ROOT) -> Path:
    """Write the table of `table.op` and `table.provenance.gpu`, at once or not at all; return its path.

    Raises: TableError when the folder cannot be written.
    """
    path = path_of(family, table.op, gpu_slug(table.provenance.gpu), root)
    head = {"schema": table.schema_version, "op": table.op, "provenance": table.provenance.model_dump()}
    # one row a line: a re-tuning shows as the rows that changed
    rows = ",\n".join("  " + json.dumps(row.model_dump(), ensure_ascii=False) for row in table.rows)
    replace_text(path, json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')
    launch.forget()
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a file at once or not at all, its folders too. Raises: TableError when that cannot be."""
    new = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise TableError(f"{path}: cannot be written: {error.strerror}; choose a writable root") from None
