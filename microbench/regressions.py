"""Compares a run with an earlier one: what became slower beyond its samples' noise and the machine's drift."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blackwell_kernels.common import arch
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import results
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Row
from blackwell_kernels.microbench.timing import quantile

THRESHOLD = 1.03  # slower by less is nobody's business, however sure
LEVEL = 0.99
_DRAWS = 2000
_PEERS = 3  # so many timings of peers it takes to tell a drifted machine from a slower kernel
_OWN_PEERS = 2  # and so many of one case to tell that the case drifted


@dataclass(frozen=True)
class Change:
    """Ours on one case, now against then. ratio: now / then of the medians, the machine's drift taken out; low, high:
    its interval at `LEVEL`, wider by the drift of the case's own peers. verdict: regression, improvement, same, broken
    (it had a time and has none), fixed.
    """

    definition: str
    case: str
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def text(self) -> str:
        """One line."""
        what = self.why if self.ratio is None else f"{self.ratio:.3f}x the time ({self.low:.3f} to {self.high:.3f})"
        return f"{self.verdict}: {self.definition} {self.case}: {what}"


def read(path: Path) -> dict[str, list[Row]]:
    """GPU slug -> rows, of a results file, of a folder of them (one GPU's, or all), or of what `bench --json` printed.

    Raises: TableError naming the file.
    """
    if path.is_dir():
        # beside a GPU's results lie folders of other things: tune/, profile/
        found = [results.load(file) for file in sorted(path.glob("*.json")) or sorted(path.glob("*/*.json"))]
    else:
        found = _read_file(path)
    made: dict[str, list[Row]] = {}
    for one in found:
        made.setdefault(arch.gpu_slug(one.gpu), []).extend(one.rows)
    return made


def _read_file(path: Path) -> list[results.Results]:
    try:
        printed = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(printed, list):
            return [results.Results.model_validate(one) for one in printed]
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise TableError(f"{path}: cannot be compared with: {why}; give a file that `bench` wrote") from None
    return [results.load(path)]


def drift(now: Iterable[Row], then: Iterable[Row]) -> float:
    """Median of now / then over the peers of all cases: kernels that did not change. 1 where fewer than three tell."""
    before = {(row.definition, row.case): row for row in then}
    ratios = [ratio for row in now for ratio in _of_peers(row, before.get((row.definition, row.case)))]
    return quantile(ratios, 0.5) if len(ratios) >= _PEERS else 1.0


def _of_peers(row: Row, old: Row | None) -> list[float]:
    """Now / then of each peer of one case."""
    if old is None:
        return []
    pairs = [(impl.us, old.impls[name].us) for name, impl in row.impls.items() if name != OURS and name in old.impls]
    return [now / then for now, then in pairs if now is not None and then is not None]


def compare(now: list[Row], then: list[Row]) -> list[Change]:
    """One change for each case of ours that both runs have."""
    before = {(row.definition, row.case): row for row in then}
    machine = drift(now, then)
    changes = []
    for row in now:
        old = before.get((row.definition, row.case))
        if old is None:
            continue
        mine, was, where = row.impls[OURS], old.impls[OURS], (row.definition, row.case)
        if mine.us is None or was.us is None:
            if (mine.us is None) != (was.us is None):
                verdict, why = ("broken", mine.error) if mine.us is None else ("fixed", was.error)
                changes.append(Change(*where, verdict, why=why or ""))
            continue
        # some cases drift by themselves: two runs of the same kernels gave ours 1.08x the time, and vLLM's 1.11x
        peers = _of_peers(row, old)
        drifts = (machine, quantile(peers, 0.5)) if len(peers) >= _OWN_PEERS else (machine,)
        low, high = interval(mine.samples_us, was.samples_us)
        ratio, low, high = mine.us / was.us / machine, low / max(drifts), high / min(drifts)
        verdict = "regression" if low > THRESHOLD else "improvement" if high < 1 / THRESHOLD else "same"
        changes.append(Change(*where, verdict, ratio, low, high))
    return changes


def interval(now: list[float], then: list[float]) -> tuple[float, float]:
    """Bootstrap interval of median(now) / median(then); the same samples give the same interval."""
    draw = np.random.default_rng(0)
    medians = [np.median(draw.choice(np.asarray(samples), (_DRAWS, len(samples))), axis=1) for samples in (now, then)]
    low, high = np.quantile(medians[0] / medians[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def failed(changes: Iterable[Change]) -> bool:
    """Whether anything became slower or stopped working."""
    return any(change.verdict in ("regression", "broken") for change in changes)
