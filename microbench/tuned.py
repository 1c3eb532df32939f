"""What the tuner found: `results/<gpu>/tune/<op>.json`, every candidate of every case, and what of it the plugin's
tables get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from blackwell_kernels import env
from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench.results import Head, Strict

Config = dict[str, tables.Scalar]


class Candidate(Strict):
    """One configuration on one case: times in µs over n samples, or `error` saying why there are none.

    accuracy: 1 − similarity with the reference, of those that reached the last round.
    """

    config: Config
    us: float | None = Field(default=None, gt=0)
    p10: float | None = Field(default=None, gt=0)
    p90: float | None = Field(default=None, gt=0)
    n: int = 0
    accuracy: float | None = None
    error: str | None = None


class Row(Strict):
    """One case. key, tokens: the table row it is for. best: {} is the heuristic; None while the search is not over."""

    definition: str
    case: str
    key: Config
    tokens: int
    heuristic: Config
    candidates: list[Candidate] = Field(default_factory=list)
    best: Config | None = None
    commit: str
    source: str
    date: str

    def of(self, config: Config) -> Candidate | None:
        """The candidate with this configuration."""
        return next((found for found in self.candidates if found.config == config), None)

    def put(self, candidate: Candidate) -> None:
        """Add a candidate, in place of what was known of its configuration."""
        known = [i for i, found in enumerate(self.candidates) if found.config == candidate.config]
        if known:
            self.candidates[known[0]] = candidate
        else:
            self.candidates.append(candidate)

    def times(self) -> tuple[float | None, float | None]:
        """µs of the heuristic's configuration and of the best one."""
        base, best = self.of(self.heuristic), self.of(self.best or self.heuristic)
        return base.us if base else None, best.us if best else None


class Tuned(Head):
    """A file of a tuner."""

    op: str
    rows: list[Row] = Field(default_factory=list)


def path_of(gpu: str, op: str, root: Path) -> Path:
    """results/<gpu>/tune/<op>.json."""
    return root / gpu / "tune" / f"{op}.json"


def load(path: Path) -> Tuned | None:
    """None where nothing was tuned. Raises: TableError naming the file and the first problem."""
    try:
        return Tuned.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TableError(f"{path}: {place}: {first['msg']}; remove the file and tune again") from None


def save(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """Add rows to the file at `path`, in place of those of the same definition and case."""
    old = load(path)
    fresh = {(row.definition, row.case): row for row in rows}
    kept = [fresh.pop((row.definition, row.case), row) for row in (old.rows if old else [])]
    top = json.dumps(Tuned.model_validate(head).model_dump(by_alias=True, exclude={"rows"}), indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(row.model_dump()) for row in [*kept, *fresh.values()])
    tables.replace_text(path, f'{top},\n "rows": [\n{lines}\n ]\n}}\n')


def into_vllm_table(path: Path, lines: Mapping[str, Config]) -> None:
    """Put lines (tokens -> configuration) into a table in vLLM's format, in place of its own for these tokens."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tables.replace_text(path, json.dumps(old | dict(lines), indent=4) + "\n")


def write_table(
    op: str, head: dict[str, Any], key: Config, best: Mapping[int, tuple[Config, float | None]], all_tokens: set[int],
    n: int, root: Path,
) -> Path:  # fmt: skip
    """Put configurations (tokens -> configuration and µs) of one case into the plugin's table; decisions stay.

    A table's row serves every smaller number of tokens down to the next row. So each of `all_tokens` that nobody tuned
    gets a row as well, with the heuristic: what was found for many tokens must not serve few.
    n: samples behind a time.
    """
    family, gpu = env.HOOK_OPS[op], arch.gpu_slug(head["gpu"])
    old = tables.load(family, op, gpu, root)
    rows = {(str(row.case), row.tokens): row for row in (old.rows if old else ())}
    for tokens in sorted(all_tokens | set(best)):
        config, us = best.get(tokens, ({}, None))
        before = rows.get((str(key), tokens))
        if before is None:
            rows[str(key), tokens] = tables.Row(case=key, tokens=tokens, config=config, ours_us=us, use="stock")
        elif tokens in best:
            # where stock was measured too, both times and the decision are one run's
            measured = {} if before.stock_us is not None else {"ours_us": us}
            rows[str(key), tokens] = before.model_copy(update={"config": config, **measured})
    names = ("gpu", "sm", "driver", "torch", "triton", "vllm", "commit", "command")
    provenance = tables.Provenance(**{name: head[name] for name in names}, date=head["date"][:10], n=n)
    table = tables.Table(schema=1, op=op, provenance=provenance, rows=tables.sort_rows(rows.values()))
    return tables.write(family, table, root)
