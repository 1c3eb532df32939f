"""From measurements to decisions: which implementation the plugin uses, and the tables that make it so.

`bench --write-dispatch` writes `kernels/<family>/configs/<gpu>/<op>.json`. A case of a table may have been measured
with several data (contexts, batch shapes): ours serves it only where it was not slower by more than 2 % on any of them,
and not slower on the whole, and only while all of them launch what was measured.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels import env
from blackwell_kernels.common import arch, tables
from blackwell_kernels.dsa import config as dsa
from blackwell_kernels.gdn import config as gdn
from blackwell_kernels.microbench import launched
from blackwell_kernels.microbench import results as stored
from blackwell_kernels.microbench.cases import Case, all_cases
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.parts import PARTS
from blackwell_kernels.microbench.results import Results, Row, best_peer
from blackwell_kernels.moe import case_of as moe_case
from blackwell_kernels.moe import config as moe

Key = tuple[str, dict[str, Any]]
# the plugin runs the chain: where it was measured, that decides, not its inner operator alone
_SERVED = {"gdn_core_prefill": "gdn_prefill"}
_NOT_CALLED = {spec.name for spec in PARTS}


def key_of(case: Case) -> Key | None:
    """(hook operator, case of its table) that a measurement of `case` decides; None for contest layouts, chains, and
    what the plugin does not call."""
    x: dict[str, Any] = case.full_axes()
    if "contest" in case.spec.tags or case.definition in _NOT_CALLED:
        return None
    match case.definition.split("_"):
        case ["moe", "fp8", *_]:
            experts = x.get("num_global_experts", x["num_experts"])
            return "moe", moe_case(x["hidden_size"], x["intermediate_size"], experts, x["num_experts"], x["top_k"])
        case ["moe", "routing", kind, _]:
            return "moe_routing", {"routing": kind, "experts": x["num_experts"], "topk": x["top_k"]}
        case ["dsa", "indexer", "logits", mode]:
            return "dsa_indexer", dsa.logits_case(mode, x["num_index_heads"], x.get("next_n", 0))
        case ["dsa", "topk2048"]:
            return "dsa_topk", dsa.topk_case(x["num_columns"], x["top_k"])
        case ["dsa", "sparse", "mla", kind]:
            return "dsa_sparse_mla", dsa.sparse_mla_case(x["num_heads"], x["top_k"], kind == "fp8")
        case ["gdn", *_] | ["drafts", "gdn", *_]:
            dtype = torch.float32 if case.definition.endswith("f32") else torch.bfloat16
            v_heads = x["num_v_heads"]
            heads = x["num_q_heads"] if "num_q_heads" in x else (x["qkv_size"] // 128 - v_heads) // 2
            if "prefill" in case.definition:
                return "gdn_prefill", gdn.prefill_case_of(heads, v_heads, 128, dtype, x["num_seqs"])
            more = {"fused_conv": "core" in case.definition, "multi_token": case.definition.startswith("drafts")}
            return "gdn_decode", gdn.case_of(heads, v_heads, 128, dtype, **more)
    return None


def keys_of(case: Case) -> list[Key]:
    """Every operator the plugin decides over to serve `case`: one, none (contest layouts), or those of the chain."""
    x: dict[str, Any] = case.full_axes()
    if case.spec.op in ("dsa_pair", "dsa_step"):
        paged = "max_num_pages" in x
        columns = x["max_num_pages"] * x["page_size"] if paged else x["num_keys"]
        attention = [("dsa_sparse_mla", dsa.sparse_mla_case(x["num_heads"], 2048, False))] if "num_heads" in x else []
        return [
            ("dsa_indexer", dsa.logits_case("paged" if paged else "ragged", x["num_index_heads"], int(paged))),
            ("dsa_topk", dsa.topk_case(columns, 2048)),
            *attention,
        ]
    key = key_of(case)
    return [] if key is None else [key]


def against(row: Row) -> float | None:
    """What ours must not be slower than, µs: stock's time, or the fastest peer's where stock has none."""
    stock = row.impls[row.stock].us
    if stock is not None:
        return stock
    peer = best_peer(row.impls)
    return None if peer is None else row.impls[peer].us


def by_tables(row: Row, gpu: str, root: Path = tables.ROOT) -> str:
    """What the plugin uses for a row's case with the tables of a GPU, which need not be here: `ours` or stock."""
    case = _cases().get((row.definition, row.case))
    decisions = []
    for op, key in keys_of(case) if case else []:
        table = tables.load(env.HOOK_OPS[op], op, gpu, root)
        found = table.lookup(key, case.tokens) if table and case else None
        holds = found is not None and found.kernels == tables.kernels_of(env.HOOK_OPS[op])
        decisions.append(found is not None and found.use == "triton" and holds)
    return OURS if decisions and all(decisions) else row.stock


def audit(results: Results, root: Path = tables.ROOT) -> list[str]:
    """One message for each row whose `dispatched` is not what the tables of its GPU say."""
    gpu = arch.gpu_slug(results.gpu)
    told = [(row, by_tables(row, gpu, root)) for row in results.rows]
    return [
        f"{row.definition} {row.case}: dispatched is {row.dispatched}, the tables say {said}"
        for row, said in told
        if row.dispatched != said
    ]


def holds(row: Row, gpu: str) -> bool:
    """Whether a row's case launches on its GPU what was measured."""
    case = _cases().get((row.definition, row.case))
    return case is not None and row.kernels == launched.of(case, gpu)


@cache
def _cases() -> dict[tuple[str, str], Case]:
    return {(case.spec.name, case.name): case for case in all_cases()}


def table_rows(results: list[Results]) -> dict[str, list[tables.Row]]:
    """Hook operator -> rows of its table, from results files of one GPU. Those whose cases launch what was measured
    have the digits of their family's present kernels."""
    measured: dict[tuple[str, str, int], list[tuple[dict[str, Any], Row, bool]]] = {}
    lasting: set[int] = set()
    for result in results:
        gpu = arch.gpu_slug(result.gpu)
        for row in result.rows:
            case = _cases().get((row.definition, row.case))
            key = key_of(case) if case else None
            if case is None or key is None:
                continue
            served = case.definition in _SERVED
            if holds(row, gpu):
                lasting.add(id(row))
            measured.setdefault((key[0], str(key[1]), case.tokens), []).append((key[1], row, served))
    made: dict[str, list[tables.Row]] = {}
    for (op, _, tokens), listed in measured.items():
        chosen = [item for item in listed if item[2]] or listed
        rows = [row for _, row, _ in chosen]
        kernels = tables.kernels_of(env.HOOK_OPS[op]) if all(id(row) in lasting for row in rows) else ""
        made.setdefault(op, []).append(_combined(chosen[0][0], tokens, rows, kernels))
    return made


def _decided(result: Results) -> set[str]:
    """Hook operators that its rows decide about."""
    keys = [key_of(case) for row in result.rows if (case := _cases().get((row.definition, row.case)))]
    return {key[0] for key in keys if key}


def _combined(case: dict[str, Any], tokens: int, rows: list[Row], kernels: str) -> tables.Row:
    """The row in which ours fared worst speaks for all of them."""

    def share(row: Row) -> float:
        ours, theirs = row.impls[OURS].us, against(row)
        return theirs / ours if ours and theirs else 0.0

    worst = min(rows, key=share)
    serves = share(worst) * tables.TOLERATED >= 1.0 and math.prod(share(row) for row in rows) >= 1.0
    return tables.Row(
        case=case,
        tokens=tokens,
        config={},
        ours_us=worst.impls[OURS].us,
        stock_us=against(worst),
        use="triton" if serves else "stock",
        kernels=kernels,
    )


def _told(row: tables.Row) -> bool:
    return bool(row.config) or row.ours_us is not None


def write_tables(results: list[Results], *, root: Path = tables.ROOT) -> list[Path]:
    """Write the decisions; configurations that a tuner found for the same case and tokens are kept."""
    written = []
    for op, rows in table_rows(results).items():
        sources = [result for result in results if op in _decided(result)]
        family, gpu = env.HOOK_OPS[op], arch.gpu_slug(sources[-1].gpu)
        old = tables.load(family, op, gpu, root)
        before = {(str(row.case), row.tokens): row for row in (old.rows if old else ())}
        for i, row in enumerate(rows):
            before.pop((str(row.case), row.tokens), None)
            # what it was measured with, which may be the configuration of a row for more tokens
            measured = old.lookup(row.case, row.tokens) if old is not None else None
            if measured is not None and _reaches(op, measured.tokens, row.tokens):
                rows[i] = row.model_copy(update={"config": measured.config})
        # a search's rows, or of cases that are no more: no stored time decides there
        rest = [row.model_copy(update={"kernels": ""}) for row in tables.sort_rows(before.values())]
        # a row that says nothing bounds what was measured, but does not stand between
        largest = {str(row.case): row.tokens for row in tables.sort_rows([*rows, *(one for one in rest if _told(one))])}
        kept = [row for row in rest if _told(row) or row.tokens > largest.get(str(row.case), 0)]
        ordered = tables.sort_rows([*rows, *kept])
        table = tables.Table(schema=1, op=op, provenance=_provenance(sources), rows=ordered)
        written.append(tables.write(family, table, root))
    return written


def _reaches(op: str, searched: int, tokens: int) -> bool:
    """Whether what was found for `searched` tokens is what ran with so many fewer."""
    return moe.reaches(searched, tokens) if op == moe.OP else True


def _provenance(sources: list[Results]) -> tables.Provenance:
    """Machine and versions of the newest of the results that a table was made of, and the commands of all."""
    newest = max(sources, key=lambda result: result.date)
    return tables.Provenance(
        gpu=newest.gpu,
        sm=newest.sm,
        driver=newest.driver,
        torch=newest.torch,
        triton=newest.triton,
        vllm=newest.vllm,
        commit=newest.commit,
        date=newest.date[:10],
        command="; ".join(dict.fromkeys(result.command for result in sources)),
        # nothing has a time where nothing runs on a chip yet: its rows say stock
        n=min(
            (impl.n for result in sources for row in result.rows for impl in row.impls.values() if impl.n), default=1
        ),
    )


def apply(gpu: str, *, results_root: Path = stored.ROOT, root: Path = tables.ROOT) -> list[Path]:
    """Write the tables that the stored results of one GPU give, and what they decide into the results themselves."""
    paths = sorted((results_root / gpu).glob("*.json"))
    files = {path: stored.load(path) for path in paths}
    written = write_tables(list(files.values()), root=root)
    for path, found in files.items():
        for row in found.rows:
            row.dispatched = by_tables(row, gpu, root)
        stored.write(path, found)
    return written
