"""The search: candidates of a case screened with few samples, the promising ones checked and timed with many.

Cases that one row of a plugin's table serves (the same axes and tokens, other sequence lengths) are tuned together: one
configuration has to do for all of them. What loses to stock on one of them serves none, so first the worst of them
counts, against stock's stored times if there are any; then the smallest product of times relative to the heuristic's,
and only by more than a percent. Everything is stored as it comes and taken from there by the next run of the same
sources.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels.common import arch, tables
from blackwell_kernels.dsa import config as dsa
from blackwell_kernels.gdn import config as gdn
from blackwell_kernels.microbench import bounds, results, runner, tuned
from blackwell_kernels.microbench.cases import Case, all_cases, select
from blackwell_kernels.microbench.dispatch import against, key_of
from blackwell_kernels.microbench.implementations import OURS, Implementation, find
from blackwell_kernels.microbench.ours import Call, Inputs
from blackwell_kernels.microbench.precompile import Failure, Job
from blackwell_kernels.microbench.runner import Checked
from blackwell_kernels.microbench.tuned import Candidate, Config, Row
from blackwell_kernels.moe import config as moe

SCREENING = 3  # samples
DROPPED = 1.3  # times the best after screening
FINALISTS = 12
TOGETHER = 8  # candidates whose graphs are held at the same time
NOISE = 0.01  # a gain up to this is none
CLEAR = 1.2  # of stock's time: beyond it no row fears to lose; a benchmark's times were up to 19 % above a search's
Compile = Callable[[list[Job]], list[Failure | None]]


@dataclass(frozen=True)
class Space:
    """How an operator is configured: the heuristic's choice for a case, and what else to try.

    around: the best configuration so far, None at first. A space too large to walk whole varies it.
    """

    heuristic: Callable[[Case, Config, torch.device], Any]
    search: Callable[[Case, Config, Config | None], Iterable[Any]]


def _logits(case: Case, key: Config, device: torch.device) -> dsa.LogitsConfig:
    return dsa.logits_config(str(key["mode"]), int(key["heads"]), int(key["next_n"]), case.tokens, device)


def _sparse_mla(case: Case, key: Config, device: torch.device) -> dsa.SparseMlaConfig:
    fp8 = key["kv"] == "fp8_ds_mla"
    return dsa.sparse_mla_config(int(key["heads"]), int(key["topk"]), fp8, case.tokens, device)


def _moe(case: Case, key: Config, around: Config | None) -> list[moe.MoeConfig]:
    best = None if around is None else moe.MoeConfig(**around)  # type: ignore[arg-type]
    return moe.search_space(key, case.tokens, best)


SPACES = {
    "gdn_decode": Space(
        lambda case, key, device: gdn.decode_config(key, case.tokens, 128, device),
        lambda case, key, around: gdn.decode_search_space(key, case.tokens, 128),
    ),
    "gdn_prefill": Space(
        lambda case, key, device: gdn.prefill_config(key, case.tokens, case.axes["num_seqs"], 128, device),
        lambda case, key, around: gdn.prefill_search_space(key, case.tokens, case.axes["num_seqs"], 128),
    ),
    "moe": Space(
        lambda case, key, device: moe.heuristic(key, case.tokens),
        _moe,
    ),
    "dsa_indexer": Space(_logits, lambda case, key, around: dsa.logits_search_space(key, case.tokens)),
    "dsa_topk": Space(
        lambda case, key, device: dsa.topk_config(int(key["columns"]), int(key["k"]), case.tokens, device),
        lambda case, key, around: dsa.topk_search_space(key, case.tokens),
    ),
    "dsa_sparse_mla": Space(_sparse_mla, lambda case, key, around: dsa.sparse_mla_search_space(key, case.tokens)),
}


@dataclass(frozen=True)
class Trial(Implementation):
    """Our implementation with one configuration."""

    op: str = ""
    config: Config = field(default_factory=dict, hash=False)

    def bind(self, inputs: Inputs, shared: dict[str, Any] | None = None) -> Call:
        """Ours, bound; each call runs with the configuration."""
        inner = super().bind(inputs, shared)

        def call() -> tuple[torch.Tensor, ...]:
            with tables.override(self.op, self.config):
                return inner()

        return call


def label_of(config: Config) -> str:
    """A configuration on one line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def trial(op: str, case: Case, config: Config) -> Trial:
    """The implementation that `config` makes of ours on `case`."""
    ours = find(case.spec.name, OURS)
    return Trial(label_of(config), ours.definition, ours.module, ours.function, op=op, config=config)


@dataclass(frozen=True)
class Group:
    """The cases that one row of a table decides."""

    op: str
    key: Config
    tokens: int
    cases: tuple[Case, ...]


def groups(op: str, sets: tuple[str, ...], case: str | None = None, tokens: tuple[int, ...] = ()) -> list[Group]:
    """What there is to tune, in the order of the index: of a case that is asked for, all that share its table row, as
    one configuration serves them. Chains of operators are left to their inner ones."""
    found: dict[tuple[str, int], Group] = {}
    asked = select(sets=sets, case=case)
    for item in select(sets=sets):
        decided = _decided(item)
        if decided is None or decided[0] != op or (tokens and item.tokens not in tokens):
            continue
        place = str(decided[1]), item.tokens
        before = found[place].cases if place in found else ()
        found[place] = Group(op, decided[1], item.tokens, (*before, item))
    return [group for group in found.values() if any(item in asked for item in group.cases)]


def _decided(case: Case) -> tuple[str, Config] | None:
    return None if case.definition == "gdn_core_prefill" else key_of(case)


def indexed_tokens(op: str, key: Config) -> set[int]:
    """Every number of tokens at which a GPU measures this case."""
    cases = (case for case in all_cases() if case.set != "cpu")
    return {case.tokens for case in cases if _decided(case) == (op, key)}


def into_table(op: str, head: dict[str, Any], rows: list[Row], n: int, root: Path) -> None:
    """Give the table what a finished search found for the cases of one of its rows. n: samples behind a time."""
    times = [us for row in rows if (us := row.times()[1]) is not None]
    if len(times) == len(rows):
        found = {rows[0].tokens: (rows[0].best or {}, max(times))}
        tuned.write_table(op, head, rows[0].key, found, indexed_tokens(op, rows[0].key), n, root)


def merge(source: Path, target: Path, table_root: Path) -> list[Row]:
    """Take in the searches of another machine, and into the tables what is new among those that are over; these rows.

    A peer's search (moe_search) has no table of the plugin's.
    Raises: TableError naming a file that is none of a tuner's.
    """
    theirs, ours = tuned.load(source), tuned.load(target)
    if theirs is None:
        return []
    head = theirs.model_dump(by_alias=True, exclude={"rows"})
    tuned.save(target, head, theirs.rows)
    known = ours.rows if ours is not None else []
    fresh = [row for row in theirs.rows if row.best is not None and row not in known]
    ours_to_serve = fresh if theirs.op in SPACES else []
    for found in {(str(row.key), row.tokens): row for row in ours_to_serve}.values():
        searched = (found.key, found.tokens, found.best)
        rows = [row for row in theirs.rows if (row.key, row.tokens, row.best) == searched]
        into_table(theirs.op, head, rows, _samples(rows), table_root)
    return fresh


def _samples(rows: list[Row]) -> int:
    """The fewest samples behind the times of the best."""
    found = [row.of(row.best or row.heuristic) for row in rows]
    return min((candidate.n for candidate in found if candidate is not None and candidate.us), default=1)


@dataclass
class Tuner(runner.Bench):
    """A benchmark run whose implementations are configurations of ours. `samples`: of a finalist.

    compile: readies configurations ahead of their first call and says which cannot be.
    """

    samples: int = 15
    table_root: Path = tables.ROOT
    compile: Compile = lambda jobs: [None] * len(jobs)
    _prepared: tuple[Case, list[Inputs]] | None = None
    _reference: tuple[Case, Any] | None = None

    def tune(self, planned: list[Group]) -> Iterator[list[Row]]:
        """Tune group by group; each one's rows, one a case, as soon as its table is written.

        Raises: ContextLost, after what broke the CUDA context is stored as a failure: the next run passes it by.
        """
        rows = self.ready(planned)
        for group, found in zip(planned, rows, strict=True):
            if any(row.best is None for row in found):
                self._tune(group, found)
            yield found

    def ready(self, planned: list[Group]) -> list[list[Row]]:
        """Compile every candidate that has no time yet; the rows that `tune` will fill."""
        rows = [self._rows(group) for group in planned]
        self._compile(zip(planned, rows, strict=True))
        return rows

    def _tune(self, group: Group, rows: list[Row]) -> None:
        self._screen(group, rows)
        around = decide(rows, [c.config for c in rows[0].candidates]) or rows[0].heuristic
        if self._add(rows, self._searched(group, around)):
            self._compile([(group, rows)])
            self._screen(group, rows)
        finalists = self._checked(group, rows)
        for case, row, ready in zip(group.cases, rows, finalists, strict=True):
            self._measure(group, case, row, ready, self.samples)
        best = decide(rows, [item.config for item in finalists[0]], self._stock(group))
        for row in rows:
            row.best = best
        tuned.save(self._path(group), {**self.head, "op": group.op}, rows)
        into_table(group.op, self.head, rows, self.samples, self.table_root)

    def _rows(self, group: Group) -> list[Row]:
        """What earlier runs of these sources know of the group's cases, and every candidate that is to be tried."""
        stored = tuned.load(self._path(group))
        known = {(row.definition, row.case): row for row in (stored.rows if stored else [])}
        rows = []
        for case in group.cases:
            with tables.override(group.op, {}):
                heuristic = asdict(SPACES[group.op].heuristic(case, group.key, self.device))
            row = known.get((case.definition, case.name))
            if row is None or row.source != self.head["source"] or row.heuristic != heuristic:
                row = Row(
                    definition=case.definition,
                    case=case.name,
                    key=group.key,
                    tokens=case.tokens,
                    heuristic=heuristic,
                    commit=self.head["commit"],
                    source=self.head["source"],
                    date=self.head["date"],
                )
            rows.append(row)
        self._add(rows, [row.heuristic for row in rows] + self._searched(group, None))
        return rows

    def _searched(self, group: Group, around: Config | None) -> list[Config]:
        return [asdict(c) for case in group.cases for c in SPACES[group.op].search(case, group.key, around)]

    @staticmethod
    def _add(rows: list[Row], wanted: list[Config]) -> bool:
        """Give every row every configuration; whether one was new."""
        missing = [(row, config) for row in rows for config in wanted if row.of(config) is None]
        for row, config in missing:
            row.put(Candidate(config=config))
        if missing:
            for row in rows:
                row.best = None
        return bool(missing)

    def _compile(self, planned: Iterable[tuple[Group, list[Row]]]) -> None:
        """Ready every untimed candidate; one job does a configuration for all sizes of a layer."""
        jobs: dict[str, Job] = {}
        waiting: dict[str, list[Candidate]] = {}
        for group, rows in planned:
            for case, row in zip(group.cases, rows, strict=True):
                for candidate in untimed(row):
                    name = f"{case.definition} {group.key} {candidate.config}"
                    before = jobs[name].cases if name in jobs else ()
                    jobs[name] = Job(group.op, candidate.config, (*before, case))
                    waiting.setdefault(name, []).append(candidate)
        # neighbours share kernels: apart, they are not compiled twice at the same time
        names = random.Random(0).sample(sorted(jobs), len(jobs))
        for name, failure in zip(names, self.compile([jobs[name] for name in names]), strict=True):
            if failure is not None and failure.final:
                for candidate in waiting[name]:
                    candidate.error = failure.why

    def _screen(self, group: Group, rows: list[Row]) -> None:
        """A few samples of every candidate that has none."""
        for case, row in zip(group.cases, rows, strict=True):
            left = untimed(row)
            for i in range(0, len(left), TOGETHER):
                ready = {trial(group.op, case, c.config): Checked(None) for c in left[i : i + TOGETHER]}
                self._measure(group, case, row, ready, SCREENING)

    def _checked(self, group: Group, rows: list[Row]) -> list[dict[Trial, Checked]]:
        """The promising candidates that are right, by row. A wrong one may have been fast: others take its place."""
        right: list[dict[Trial, Checked]] = [{} for _ in rows]
        seen: list[Config] = []
        while fresh := [config for config in promising(rows) if config not in seen]:
            seen += fresh
            for case, row, ready in zip(group.cases, rows, right, strict=True):
                self.extra = items = tuple(trial(group.op, case, config) for config in fresh)  # checked as ours are
                first, expected = self._inputs(case)[0], self._expected(case)
                with self._storing(group, row):
                    for item in items:
                        checked = self._check(item, case, first, expected)
                        if checked.problem is None:
                            ready[item] = checked
                        else:
                            row.put(Candidate(config=item.config, error=checked.problem, accuracy=checked.error))
        wanted = promising(rows)
        return [{item: checked for item, checked in ready.items() if item.config in wanted} for ready in right]

    def _expected(self, case: Case) -> Any:
        """What the reference gives for the first input set; that of the last case asked for is kept."""
        if self._reference is None or self._reference[0] is not case:
            self._reference = case, runner.reference_outputs(case.spec, self._inputs(case)[0], self.seed)
        return self._reference[1]

    def _measure(self, group: Group, case: Case, row: Row, ready: dict[Trial, Checked], rounds: int) -> None:
        self.rounds = rounds
        with self._storing(group, row):
            items: dict[Implementation, Checked] = {item: checked for item, checked in ready.items()}
            made = self._time(case, items, self._inputs(case))
            for item in ready:
                found = made[item.name].model_dump(include={"us", "p10", "p90", "n", "accuracy", "error"})
                row.put(Candidate(config=item.config, **found))

    @contextlib.contextmanager
    def _storing(self, group: Group, row: Row) -> Iterator[None]:
        """Store the row at the end, whatever happens; what breaks the CUDA context is not tried again."""
        try:
            yield
        except runner.ContextLost as lost:
            row.put(Candidate(config=_config(row, lost.implementation), error=str(lost)))
            raise
        finally:
            tuned.save(self._path(group), {**self.head, "op": group.op}, [row])

    def _inputs(self, case: Case) -> list[Inputs]:
        """Input sets of `case`; those of the last case asked for are kept."""
        if self._prepared is None or self._prepared[0] is not case:
            self._prepared = self._reference = None  # released before new ones are made
            first = self._first(case)
            self._prepared = case, [first, *self._more_sets(case, first, bounds.cost(case, first).bytes)]
        return self._prepared[1]

    def _stock(self, group: Group) -> list[float | None]:
        """Stock's stored µs for each case."""
        path = results.path_of(arch.gpu_slug(self.head["gpu"]), group.cases[0].spec.op, self.root)
        stored = results.load(path).rows if path.exists() else []
        known = {(row.definition, row.case): against(row) for row in stored}
        return [known.get((case.spec.name, case.name)) for case in group.cases]

    def _path(self, group: Group) -> Path:
        return tuned.path_of(arch.gpu_slug(self.head["gpu"]), group.op, self.root)


def _config(row: Row, label: str) -> Config:
    return next(found.config for found in row.candidates if label_of(found.config) == label)


def untimed(row: Row) -> list[Candidate]:
    """Candidates that neither have a time nor failed."""
    return [candidate for candidate in row.candidates if candidate.us is None and candidate.error is None]


def score(rows: list[Row], config: Config) -> float | None:
    """Geometric mean over the rows of the time relative to the heuristic's; None where it cannot serve all of them."""
    logs = []
    for row in rows:
        found, base = row.of(config), row.times()[0]
        if found is None or found.us is None or found.error is not None:
            return None
        best = min(c.us for c in row.candidates if c.us is not None)
        logs.append(math.log(found.us / (base or best)))
    return math.exp(sum(logs) / len(logs))


def promising(rows: list[Row]) -> list[Config]:
    """The heuristic's configurations, and the best others within `DROPPED` of the best: at most `FINALISTS`."""
    scores = [(value, c.config) for c in rows[0].candidates if (value := score(rows, c.config)) is not None]
    scores.sort(key=lambda item: item[0])
    near = [config for value, config in scores if value <= DROPPED * scores[0][0]][:FINALISTS]
    heuristics = [row.heuristic for row in rows]
    return [config for i, config in enumerate(heuristics) if config not in heuristics[:i]] + [
        config for config in near if config not in heuristics
    ]


def decide(rows: list[Row], among: list[Config], stock: Sequence[float | None] = ()) -> Config:
    """The configuration that serves all rows best; {} for the heuristic, also where the gain is noise.

    stock: its µs for each row, as far as they are known.
    """
    scores = [(-_cleared(rows, config, stock), value, config) for config in among if (value := score(rows, config))]
    if not scores:
        return {}
    worst, best, config = min(scores, key=lambda item: item[:2])
    works = all(row.times()[0] is not None for row in rows)
    if works and best >= 1 - NOISE and worst >= -_cleared(rows, None, stock):
        return {}
    return config


def _cleared(rows: list[Row], config: Config | None, stock: Sequence[float | None]) -> float:
    """Stock's time over ours where it is least, `CLEAR` at most; None: with the heuristic's configurations."""
    shares = [CLEAR]
    for row, us in zip(rows, stock, strict=False):
        found = row.of(row.heuristic if config is None else config)
        if us is not None and found is not None and found.us is not None:
            shares.append(us / found.us)
    return min(shares)
