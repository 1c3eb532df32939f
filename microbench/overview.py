"""The README's table of a GPU: what stored results come to, one line for shapes that a user would name together.

`bench report GPU --write` puts it between `<!-- GPU:begin -->` and `<!-- GPU:end -->` of the README of a checkout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from blackwell_kernels.common import arch, tables
from blackwell_kernels.microbench import report, results, scores
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Results, Row
from blackwell_kernels.microbench.specs import SPECS
from blackwell_kernels.microbench.timing import quantile

README = results.ROOT.parent.parent / "README.md"  # of a checkout; an installed package has none
HEAD = [
    "operator", "shapes", "cases", "vLLM's / ours, median (worst–best)", "ours slower", "its worst",
    "fastest peer's / ours, median (worst)", "the plugin runs ours",
]  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Rows whose `definition case` matches one of `names` (globs), of so many tokens, sequences or rows.

    A row belongs to the first group that has it.
    """

    operator: str
    shapes: str
    names: tuple[str, ...]
    tokens: tuple[int, int] = (0, 1 << 40)

    def has(self, row: Row) -> bool:
        """Whether the row is one of these."""
        low, high = self.tokens
        name, tokens = f"{row.definition} {row.case}", int(row.axes[SPECS[row.definition].tokens])
        return low <= tokens <= high and any(fnmatchcase(name, glob) for glob in self.names)


GROUPS = (
    Group("experts", "Qwen3-Next, one GPU", ("moe_fp8_block */qwen3-next/num_tokens=*",)),
    Group("experts", "… unevenly used (Zipf's law)", ("moe_fp8_block */qwen3-next/routing=*",)),
    Group("experts", "Qwen3-Next, two GPUs", ("moe_fp8_block */qwen3-next/tp2/*",)),
    Group("experts", "Qwen3-Next, four GPUs", ("moe_fp8_block */qwen3-next/tp4/*",)),
    Group("experts", "Qwen3-Next, EP 8", ("moe_fp8_block_ep */qwen3-next/*",)),
    Group("experts", "DeepSeek-V3.2, all 256 on one GPU", ("moe_fp8_block */deepseek-v3.2/num_tokens=*",)),
    Group("experts", "… and on eight, unevenly used", ("moe_fp8_block */deepseek-v3.2/*routing=*",)),
    Group("experts", "DeepSeek-V3.2, 2, 4, 8 GPUs", ("moe_fp8_block */deepseek-v3.2/tp*",)),
    Group("experts", "DeepSeek-V3.2, EP 8", ("moe_fp8_block_ep */deepseek-v3.2/*",)),
    Group("routing", "both models", ("moe_routing_*",)),
    Group("GDN decode, with its convolution, as served", "one GPU", ("gdn_core_decode* */qwen3-next/batch_size=*",)),
    Group("GDN decode, with its convolution, as served", "2, 4, 8 GPUs", ("gdn_core_decode* */qwen3-next/tp*",)),
    Group("GDN decode, with its convolution, as served", "drafts of three tokens, 1–8 GPUs", ("drafts_gdn_core_*",)),
    Group("GDN decode, the recurrence alone", "1, 2, 4, 8 GPUs; no model here asks for it", ("gdn_decode_state_*",)),
    Group("GDN prefill, with its convolution, as served", "one GPU", ("gdn_core_prefill */qwen3-next/lengths=*",)),
    Group("GDN prefill, with its convolution, as served", "2, 4, 8 GPUs", ("gdn_core_prefill */qwen3-next/tp*",)),
    Group("GDN prefill, its kernels alone", "one GPU", ("gdn_prefill_state_* */qwen3-next/lengths=*",)),
    Group("GDN prefill, its kernels alone", "2, 4, 8 GPUs", ("gdn_prefill_state_* */qwen3-next/tp*",)),
    Group("indexer", "decode", ("dsa_indexer_logits_paged */deepseek-v3.2/batch_size=*",)),
    Group("indexer", "decode of two queries", ("dsa_indexer_logits_paged */deepseek-v3.2/next_n=*",)),
    Group("indexer", "prefill chunks", ("dsa_indexer_logits_ragged *",)),
    Group("top-k 2048", "prefill chunks of one request", ("dsa_topk2048 */causal=True/num_rows=*",)),
    Group("top-k 2048", "prefill chunks of eight requests", ("dsa_topk2048 */causal=True/requests=*",)),
    Group("top-k 2048", "decode, 1–8 rows in 160K columns, the model's", ("dsa_topk2048 */columns=163840/*",), (1, 8)),
    Group("top-k 2048", "decode, 1–8 rows in 4K–128K columns", ("dsa_topk2048 *",), (1, 8)),
    Group("top-k 2048", "decode, 16–64 rows in 160K columns", ("dsa_topk2048 */columns=163840/*",)),
    Group("top-k 2048", "decode, 16–64 rows in 4K–128K columns, shorter", ("dsa_topk2048 */columns=*",)),
    Group("top-k 2048", "decode, 16–64 rows in 4K–128K columns, full", ("dsa_topk2048 *",)),
    Group("indexer and top-k as one", "decode", ("dsa_pair_decode *",)),
    Group("indexer and top-k as one", "prefill chunks", ("dsa_pair_prefill *",)),
    Group("sparse MLA", "bf16 cache, 1–32 tokens, 16–128 heads", ("dsa_sparse_mla_bf16 *",), (1, 32)),
    Group("sparse MLA", "bf16 cache, 64 tokens", ("dsa_sparse_mla_bf16 *",), (33, 64)),
    Group("sparse MLA", "bf16 cache, 200–4,096 tokens", ("dsa_sparse_mla_bf16 *",)),
    Group("sparse MLA", "fp8 cache, 1–64 tokens", ("dsa_sparse_mla_fp8 *",), (1, 64)),
    Group("sparse MLA", "fp8 cache, 512–4,096 tokens", ("dsa_sparse_mla_fp8 *",)),
    Group("attention step, all of it ours", "16 heads", ("dsa_step_decode */tp8/*",)),
    Group("attention step, all of it ours", "128 heads", ("dsa_step_decode *",)),
)  # fmt: skip


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """The rows of each group, in the groups' order. The contest's and what no hook calls have none."""
    found: dict[Group, list[Row]] = {group: [] for group in GROUPS}
    for row in rows:
        group = next((group for group in GROUPS if group.has(row)), None)
        if group is not None:
            found[group].append(row)
    return found


def markdown(files: Sequence[Results]) -> str:
    """The table and what it was made of."""
    rows = [row for one in files for row in one.rows]
    found = {group: listed for group, listed in grouped(rows).items() if listed}
    lines, operator = [], ""
    for group, listed in found.items():
        lines.append(["" if group.operator == operator else group.operator, *_cells(group, listed)])
        operator = group.operator
    told = [row for listed in found.values() for row in listed]
    commits = ", ".join(f"{commit} ({count})" for commit, count in _counted(row.commit for row in told))
    samples = sorted({row.impls[OURS].n for row in told if row.impls[OURS].us})
    stand_ins = sum(row.ratio_stock is None and row.ratio_best_peer is not None for row in told)
    absent = ", ".join(f"{name} in {count}" for name, count in results.not_set_up(told).items())
    return (
        f"{report.markdown_table(HEAD, lines)}\n"
        f"Medians of {report.span(samples)} samples on an {files[0].gpu}, theirs and ours taking turns in one process; "
        f"rows of commits {commits}; every case, and why a peer has no time: "
        f"[results](microbench/results/{_slug(files)}/README.md).\n"
        + _timings(told)
        + (f"Peers that were not set up when rows were measured: {absent} of {len(told)}.\n" if absent else "")
        + (
            f"In {stand_ins} rows vLLM's choice has no time, and the fastest peer stands in for it.\n"
            if stand_ins
            else ""
        )
    )


def _timings(rows: list[Row]) -> str:
    found = scores.verdicts(rows)
    if not found.n:
        return ""
    return (
        f"Ours is ahead of vLLM's choice in {found.graph} of {found.n} rows by graph replays, as in the table, and in "
        f"{found.fib} by FlashInfer-Bench's timing, which counts the host's launches of an eager call, too.\n"
    )


def _cells(group: Group, rows: list[Row]) -> list[str]:
    served = sum(row.dispatched == OURS for row in rows)
    told = "always" if served == len(rows) else f"in {served} of {len(rows)}" if served else "never"
    timed = [row for row in rows if row.ratio_best_peer]
    if not timed:
        return [group.shapes, str(len(rows)), "–", "–", "–", "–", told]
    ratios = [_stock(row) for row in timed]
    slower = sum(ratio < 1.0 for ratio in ratios)
    peers = [row.ratio_best_peer or 0.0 for row in timed]
    closest = timed[peers.index(min(peers))]
    name = f", {(closest.best_peer or '').removeprefix('vllm.')}" if min(peers) < 1.0 else ""
    return [
        group.shapes,
        str(len(rows)),
        f"{quantile(ratios, 0.5):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})",
        f"**{slower}**" if slower else "0",
        label(min(timed, key=_stock)),
        f"{quantile(peers, 0.5):.2f}× ({min(peers):.2f}{name})",
        told,
    ]


def _stock(row: Row) -> float:
    """Theirs / ours; where stock has no time the fastest peer stands in, as it does when tables are made."""
    return row.ratio_stock or row.ratio_best_peer or 0.0


# part of a case's name: what it says
_WORDS = {
    "requests": "{} requests:",
    "next_n": "{} queries each:",
    "num_steps": "{} tokens each:",
    "num_tokens": "{} tokens",
    "batch_size": "{} sequences",
    "num_rows": "{} rows",
    "lengths": "{} tokens",
    "context": "of {}",
    "columns": "in {}",
    "heads": "with {} heads",
    "tp": "on {} GPUs",
}


def label(row: Row) -> str:
    """A case in words: `8 rows of 4K in 64K`."""
    values = dict(found for part in row.case.split("/") if (found := _value(part)))
    if "num_heads" in row.axes:  # which says how many GPUs there are
        values = {**values, "heads": str(row.axes["num_heads"])}
        values.pop("tp", None)
    told = [text.format(values[name]) for name, text in _WORDS.items() if name in values]
    return " ".join(told) + (", float32 state" if row.definition.endswith("f32") else "")


def _value(part: str) -> tuple[str, str] | None:
    """(name, value in words) of `num_tokens=1024`, `lengths=8x1024` or `tp8`."""
    found = re.fullmatch(r"(tp)(\d+)|(\w+)=([\dx+]+)", part)
    if found is None:
        return None
    name, value = found[1] or found[3], found[2] or found[4]
    words = re.sub(r"\d+", lambda n: _number(int(n[0]), in_k=name in ("context", "columns")), value)
    return name, words.replace("x", " × ").replace("+", " + ")


def _number(value: int, *, in_k: bool) -> str:
    return f"{value >> 10}K" if in_k and value % 1024 == 0 else f"{value:,}"


def _counted(values: Iterable[str]) -> list[tuple[str, int]]:
    listed = list(values)
    return sorted(((one, listed.count(one)) for one in set(listed)), key=lambda pair: -pair[1])


def _slug(files: Sequence[Results]) -> str:
    return arch.gpu_slug(files[0].gpu)


def stale(files: Sequence[Results], readme: Path | None = None, *, write: bool = False) -> list[str]:
    """[the README's name] where its table of this GPU is not what is stored; with `write` it then is."""
    readme = readme or README
    slug = _slug(files)
    begin, end = f"<!-- {slug}:begin -->\n", f"<!-- {slug}:end -->"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if begin not in text or end not in text:
        return []  # an installed package, or a GPU that the README does not speak of
    before, _, rest = text.partition(begin)
    made = f"{before}{begin}{markdown(files)}{end}{rest.partition(end)[2]}"
    if made == text:
        return []
    if write:
        tables.replace_text(readme, made)
    return [readme.name]
