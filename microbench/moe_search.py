"""`python -m blackwell_kernels.microbench.moe_search`: tune the peer, vLLM's Triton MoE kernel, as hard as ours.

For each case 48 configurations or more of the space that vLLM's own tuner walks (benchmarks/kernels/benchmark_moe.py:
tile, group, warps, stages; its BLOCK_SIZE_K of 256 is 128 to a block-scaled kernel) and what vLLM picks by itself are
timed as the benchmark times everything, the best of them again with more samples. All times and the winner go to
`results/<gpu>/tune/vllm_moe.json`, the winners into a table in vLLM's format in `results/<gpu>/tune/vllm/`, which
`VLLM_TUNED_CONFIG_FOLDER` gives to the benchmark's `vllm.TritonExperts[tuned]` or to a server. What is stored is not
searched again, nor is a shape for which vLLM ships a table: there `vllm.TritonExperts` is tuned as it comes.

Cases share the time evenly, and each goes from what is most likely to win to what is least. A case whose time is over
has no winner but keeps its list, in which what was not timed has no time; its best so far is in the table all the same,
so that the peer is never worse than what is known of it, and the next run goes on with the rest.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from blackwell_kernels.common import arch
from blackwell_kernels.common.testing.gates import MAX_SHARED
from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import bounds, device, peers_moe, peers_moe_search, precompile, results, tuned, tuning
from blackwell_kernels.microbench.cases import Case, select
from blackwell_kernels.microbench.dispatch import key_of
from blackwell_kernels.microbench.implementations import Implementation
from blackwell_kernels.microbench.ours import Call, Inputs
from blackwell_kernels.microbench.runner import Bench, Checked
from blackwell_kernels.microbench.timing import GraphEngine

OP = "vllm_moe"
DEFINITIONS = ("moe_fp8_block", "moe_fp8_block_ep")
TILES = (16, 32, 64, 128, 256)
Config = peers_moe_search.Config
errors = Console(stderr=True, soft_wrap=True)


def drawn(rows: float, count: int = 48) -> list[Config]:
    """`count` configurations that fit a multiprocessor, a third for each tile nearest `rows` tokens an expert.

    The draw of a tile is always the same, so that neighbouring sizes share what was compiled. The likely ones come
    first: the nearest tile, about four stages, warps that the tile keeps busy.
    """
    nearest = sorted(TILES, key=lambda tile: abs(math.log2(tile / max(rows, 1.0))))[:3]
    found = []
    for m in sorted(nearest):
        space = [
            {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": group, "num_warps": warps}
            | {"num_stages": stages}
            for n, group, warps, stages in product((128, 256), (1, 16, 32, 64), (4, 8), (2, 3, 4, 5))
            if (m + n) * 128 * stages <= MAX_SHARED
        ]
        found += random.Random(m).sample(space, -(-count // 3))

    def unlikely(c: Config) -> tuple[int, ...]:
        m, warps = c["BLOCK_SIZE_M"], c["num_warps"]
        return nearest.index(m), abs(c["num_stages"] - 4), abs(warps - (4 if m <= 64 else 8)), c["BLOCK_SIZE_N"]

    return sorted(found, key=unlikely)


@dataclass(frozen=True)
class Trial(Implementation):
    """vLLM's kernel with one configuration."""

    config: Config = field(default_factory=dict, hash=False)

    def bind(self, inputs: Inputs, shared: dict[str, Any] | None = None) -> Call:
        """The call that is timed."""
        return peers_moe.configured(inputs, self.config)


class Search:
    """One run: cases one after another until the time is over, which those that are left share evenly; a case that is
    not finished has no winner.
    """

    def __init__(self, bench: Bench, count: int, seconds: float) -> None:
        self.bench, self.count, self.end = bench, count, time.monotonic() + seconds
        self.until = self.end  # of the case at hand
        self.gpu = arch.gpu_slug(bench.head["gpu"])
        self.path = tuned.path_of(self.gpu, OP, bench.root)
        self.folder = self.path.parent / "vllm"  # of the tables

    def rows(self, cases: list[Case]) -> Iterator[tuned.Row]:
        """Each case's row as soon as it and its line of vLLM's table are stored."""
        stored = tuned.load(self.path)
        same = stored is not None and all(
            getattr(stored, name) == self.bench.head[name] for name in ("vllm", "triton", "gpu")
        )
        known = {(row.definition, row.case): row for row in stored.rows} if stored is not None and same else {}
        left = [case for case in cases if (row := known.get((case.definition, case.name))) is None or row.best is None]
        for case in cases:
            row = known.get((case.definition, case.name))
            if case in left:
                if time.monotonic() >= self.end:
                    return
                row = self._search(case, row, len(left) - left.index(case))
            assert row is not None
            self._write(row)
            yield row

    def _search(self, case: Case, row: tuned.Row | None, left: int) -> tuned.Row:
        """left: cases that share the time from here on, this one included."""
        first = self.bench._first(case)
        sets = [first, *self.bench._more_sets(case, first, bounds.cost(case, first).bytes)]
        own: tuned.Config = {**peers_moe.own_config(first)}
        key, head = key_of(case), self.bench.head
        assert key is not None
        if row is None:
            row = tuned.Row(
                definition=case.definition,
                case=case.name,
                key=key[1],
                tokens=case.tokens,
                heuristic=own,
                commit=head["commit"],
                source=head["source"],
                date=head["date"],
            )
        axes = case.full_axes()
        every = axes.get("num_global_experts", axes["num_experts"])
        for config in [own, *drawn(axes["num_tokens"] * axes["top_k"] / every, self.count)]:
            if row.of(config) is None:
                row.put(tuned.Candidate(config=config))
        now = time.monotonic()
        self.until = now + (self.end - now) / left
        if self._time(case, row, tuning.untimed(row), sets, tuning.SCREENING):
            finalists = _fastest(row)[: tuning.FINALISTS]
            if self._time(case, row, finalists, sets, self.bench.rounds):
                measured = [c.config for c in finalists]
                row.best = next((c.config for c in _fastest(row) if c.config in measured), own)
        tuned.save(self.path, {**head, "op": OP}, [row])
        return row

    def _time(
        self, case: Case, row: tuned.Row, wanted: list[tuned.Candidate], sets: list[Inputs], samples: int
    ) -> bool:
        """Time what is wanted, a few at a time; False when the time was over before the end."""
        bench = self.bench
        for i in range(0, len(wanted), tuning.TOGETHER):
            if time.monotonic() >= self.until:
                return False
            ready: dict[Implementation, Checked] = {}
            for c in wanted[i : i + tuning.TOGETHER]:
                name = tuning.label_of(c.config)
                ready[Trial(name, case.definition, "peers_moe", "configured", config=dict(c.config))] = Checked(None)
            rounds, bench.rounds = bench.rounds, samples
            made = bench._time(case, ready, sets)
            bench.rounds = rounds
            for item in ready:
                found = made[item.name].model_dump(include={"us", "p10", "p90", "n", "error"})
                row.put(tuned.Candidate(config=item.config, **found))  # type: ignore[attr-defined]
            tuned.save(self.path, {**bench.head, "op": OP}, [row])  # whoever stops this has what was timed
        return True

    def _write(self, row: tuned.Row) -> None:
        """The winner, or the best so far, into vLLM's table for this number of local experts and intermediate size."""
        best = row.best or next((c.config for c in _fastest(row)), None)
        if best is None:
            return
        name = peers_moe_search.table_name(int(row.key["local_experts"]), int(row.key["inter"]))
        tuned.into_vllm_table(self.folder / name, {str(row.tokens): best})


def _fastest(row: tuned.Row) -> list[tuned.Candidate]:
    return sorted((c for c in row.candidates if c.us is not None), key=lambda c: c.us or 0.0)


def _state(row: tuned.Row) -> str:
    """What a row says of its case, in a line."""
    base, best = row.times()
    if row.best:
        return f"{base} -> {best} µs, {row.best}"
    timed, fastest = len(row.candidates) - len(tuning.untimed(row)), _fastest(row)[:1]
    so_far = f"; best so far {fastest[0].us} µs, {fastest[0].config}" if fastest else ""
    return f"cut: {timed} of {len(row.candidates)} timed, vLLM's own {base} µs{so_far}"


def search(
    case: Annotated[str | None, typer.Option("--case", help="A part of case names, or a glob.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Only these sizes; repeatable.")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which no further candidate is timed.")] = 600.0,
    count: Annotated[int, typer.Option(min=3, help="Configurations a case.")] = 48,
    rounds: Annotated[int, typer.Option(min=3, help="Samples a finalist.")] = 15,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; by default a core each, 16.")] = None,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Fill Triton's cache and stop.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    root: Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")] = results.ROOT,
) -> None:
    """Search vLLM's Triton MoE configurations for the benchmark's cases; the same command goes on where it stopped."""
    chosen = [c for c in select(sets=("model",), case=case) if c.definition in DEFINITIONS]
    chosen = [c for c in chosen if not tokens or c.tokens in tokens]
    if not chosen:
        raise typer.BadParameter(f"no case of moe matches {case}; `blackwell-kernels bench cases` lists all")
    if not torch.cuda.is_available():
        raise MissingRequirementError("the search measures on a GPU, and no CUDA device is visible here")
    chosen = _not_shipped(chosen)
    if not chosen:
        return
    here = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(here)
    bench = Bench(
        device=here,
        engines=(GraphEngine(here),),
        head=device.facts(device.command("python -m blackwell_kernels.microbench.moe_search"), commit),
        rates={},
        rounds=rounds,
        l2_bytes=properties.L2_cache_size,
        root=root,
    )
    _compile(chosen, count, 10 * properties.major + properties.minor, jobs or precompile.default_jobs())
    if compile_only:
        return
    run = Search(bench, count, limit)
    done = []
    for row in run.rows(chosen):
        done.append(row)
        errors.print(f"[{len(done)}/{len(chosen)}] {row.case}: {_state(row)}", markup=False, highlight=False)
    errors.print(f"next: VLLM_TUNED_CONFIG_FOLDER={run.folder} blackwell-kernels bench --op moe", highlight=False)
    raise typer.Exit(0 if len(done) == len(chosen) and all(row.best for row in done) else 1)


def _not_shipped(cases: list[Case]) -> list[Case]:
    """Those of shapes that vLLM ships no table for; says which it leaves out."""
    left = []
    for case in cases:
        axes = case.full_axes()
        path = peers_moe.shipped_table(axes["num_experts"], axes["intermediate_size"])
        if path is None:
            left.append(case)
        else:
            errors.print(f"{case.name}: not searched, vLLM ships {path.name}", markup=False, highlight=False)
    return left


def _compile(cases: list[Case], count: int, sm: int, processes: int) -> None:
    """All at once on all cores: one case of each layer and kind of kernel stands for its other sizes."""
    groups: dict[str, tuple[dict[str, Any], list[Config]]] = {}
    seen: set[str] = set()
    for case in cases:
        axes = case.full_axes()
        every = axes.get("num_global_experts", axes["num_experts"])
        pairs = axes["num_tokens"] * axes["top_k"]
        unsorted = every == axes["num_experts"] and pairs * 4 <= every
        # Triton compiles anew for an argument that is a multiple of 16
        kind = f"{unsorted} {pairs % 16 == 0}"
        layer = f"{axes['hidden_size']} {axes['intermediate_size']} {axes['num_experts']} {kind}"
        own: Config = {**peers_moe.own_config(precompile.meta_inputs(case))}
        for config in [own, *drawn(axes["num_tokens"] * axes["top_k"] / every, count)]:
            name = f"{layer} {tuning.label_of(config)}"
            if name not in seen:
                seen.add(name)
                groups.setdefault(layer, (axes, []))[1].append(config)
    # a process a core: each imports vLLM, which takes as long as ten configurations do
    share = math.ceil(len(seen) / processes)
    chunks = []
    for axes, configs in groups.values():
        parts = math.ceil(len(configs) / share)
        chunks += [peers_moe_search.Chunk(axes, tuple(configs[i::parts])) for i in range(parts)]
    failures = precompile.compile_all(chunks, sm, processes, lambda chunk: None, peers_moe_search.compile_chunk)  # type: ignore[arg-type]
    for why in sorted({failure.why for failure in failures if failure is not None}):
        errors.print(f"not compiled ahead: {why}", markup=False, highlight=False)


if __name__ == "__main__":
    try:
        typer.run(search)
    except MissingRequirementError as error:
        raise SystemExit(f"error: {error}") from None
