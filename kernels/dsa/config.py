"""Launch configurations of the family: a measured table where there is one, else a heuristic written down here.

Table rows (`configs/<gpu>/<op>.json`) are keyed by the `case` dictionaries below and the number of rows or tokens; the
same rows carry the dispatch decision. A case never contains a value that is only known on the device, so choosing is
pure host work and safe under CUDA graph capture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from blackwell_kernels.common import arch, tables

MAX_SPLITS = 64
MAX_TOPK_SPLITS = 32
MANY_ROWS = 256  # top-k's, of which each finds little of the chip: from here on programs and lists are small
_TOPK_SHARED_COLUMNS, _TOPK_HELD_COLUMNS = 16_384, 16_384
# up to so many columns one program has a row; clusters of more than 8 programs are not portable
_TOPK_ALONE_COLUMNS, _TOPK_CLUSTER = 4096, 8
_TOPK_AHEAD_COLUMNS = 8192  # what rows of one and of eight were fastest with where buffers are wide
# (fp8, block_h) -> (block_n, num_warps, num_stages) of sparse MLA that spill nothing, Triton 3.6.0; the first is the
# heuristic's. fp8 entries pass through registers to shared memory once, as operands of wgmma; what mma.sync takes is
# loaded from there byte by byte.
_SPARSE_MLA_TILES = {
    (False, 16): [(32, 4, 3), (64, 8, 3)],
    (False, 32): [(32, 8, 3)],
    (False, 64): [(32, 8, 3)],
    (True, 64): [(64, 8, 3)],
}
# block_n, num_warps, num_stages where warps divide columns: two programs a multiprocessor have registers
_SPARSE_MLA_COLUMNS = {False: [(32, 4, 3)], True: [(32, 4, 3), (32, 4, 4)]}
_COLUMNS_HEADS, _FEW_BLOCKS = 16, 4
# block_n, num_warps, num_stages, registers, programs a multiprocessor: one tile on chip and more programs, instead of
# a program that copies one tile while it computes with another
_SPARSE_MLA_CROWDED = [(32, 4, 2, 168, 3), (64, 8, 2, 128, 2)]
# block_n, num_warps, num_stages of blocks of 64 heads, filled or not, whose warpgroups divide a tile's scores, either
# cache; the first is the heuristic's
_SPARSE_MLA_DIVIDED = [(64, 8, 2), (32, 8, 3)]
_DIVIDED_HEADS = 64
# where tcgen05 keeps the accumulator in tensor memory, conversion and padding cost more than mma.sync
_SPARSE_MLA_TILES_SM100 = {
    (False, 16): [(32, 4, 3), (32, 8, 3)],
    (False, 32): [(32, 8, 3)],
    (False, 64): [(32, 8, 2), (16, 8, 2)],
    (True, 16): [(32, 8, 3)],
    (True, 32): [(32, 8, 3)],
}


@dataclass(frozen=True)
class LogitsConfig:
    """Of the indexer logits. Ragged: `block_n` keys stay, `group` query rows (a power of two) stream past. Paged:
    `programs` a multiprocessor divide the pages, and score `pages` (1 or 2) of them at a time, `num_stages` such tiles
    on chip.

    early: launched while the kernel before it ends, whose ever that is, and waits for it (programmatic dependent
    launch); so in all operators. Their last kernels let nobody begin: behind them stands another's kernel in a model,
    and in a benchmark only they themselves.
    """

    block_n: int = 128
    group: int = 32
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 4
    early: bool = False
    pages: int = 1


@dataclass(frozen=True)
class TopkConfig:
    """`block` columns at a time, or all of them; `splits` (a power of two) programs share a row, in two launches from
    two on. A row that is short, at most `held` columns a thread, one program does whatever the columns are; 16 columns
    take registers that leave no room for a second program of 16 warps.

    cluster: so many programs (a power of two up to 16) on neighbouring multiprocessors share a row in one launch, and
    ask for its first `block` columns before they know how long it is; then up to `held` a thread at a time.
    pdl: the second launch gets ready while the first one runs, and waits for it (programmatic dependent launch).
    """

    block: int = 4096
    splits: int = 1
    num_warps: int = 16
    pdl: bool = False
    early: bool = False
    held: int = 8
    cluster: int = 0


@dataclass(frozen=True)
class SparseMlaConfig:
    """`block_h` heads and `block_n` cache entries a tile; the selected entries are divided over `splits` programs.

    pdl: the merge of several splits is launched while they run, and waits for them (programmatic dependent launch).
    bf16_parts: what several splits hand to the merge is rounded to bf16, half the traffic.
    by_columns: four warps divide the columns of the latent instead of a tile's entries; for blocks of 16 heads.
    registers: at most so many a thread, a few spilled, so that another program fits; 0: as the compiler likes.
    divided: two warpgroups score half a tile's entries each instead of all of them; for blocks of 64 heads, sm_90.
    """

    block_h: int = 64
    block_n: int = 32
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 3
    pdl: bool = False
    by_columns: bool = False
    early: bool = False
    bf16_parts: bool = False
    registers: int = 0
    divided: bool = False


def logits_case(mode: str, heads: int, next_n: int) -> dict[str, Any]:
    """Table axes of the indexer logits; `mode` is paged or ragged, `next_n` 0 in ragged rows."""
    return {"mode": mode, "heads": heads, "next_n": next_n}


def topk_case(columns: int, k: int) -> dict[str, Any]:
    """Table axes of the row top-k; columns are rounded up to a power of two so that neighbours share a row."""
    return {"columns": _power_of_two(columns), "k": k}


def sparse_mla_case(heads: int, topk: int, fp8: bool) -> dict[str, Any]:
    """Table axes of sparse MLA."""
    return {"heads": heads, "topk": topk, "kv": "fp8_ds_mla" if fp8 else "bf16"}


def logits_config(mode: str, heads: int, next_n: int, rows: int, device: torch.device) -> LogitsConfig:
    """Configuration for `rows` query rows."""
    tuned = _tuned("dsa_indexer", device, rows, **logits_case(mode, heads, next_n))
    if tuned:
        return LogitsConfig(**tuned)
    if mode == "ragged":
        return LogitsConfig()
    # two queries a sequence: two pages at a time; one: copies in flight are what counts
    return LogitsConfig(num_stages=4, programs=3, pages=2) if next_n > 1 else LogitsConfig(num_stages=3, programs=6)


def topk_config(columns: int, k: int, rows: int, device: torch.device) -> TopkConfig:
    """Configuration for `rows` rows of at most `columns` candidates."""
    tuned = _tuned("dsa_topk", device, rows, **topk_case(columns, k))
    if tuned:
        return TopkConfig(**tuned)
    # a row must be long enough to pay for a second launch; lengths are not known here, columns bound them
    chip = arch.current_arch(device)
    if columns > _TOPK_ALONE_COLUMNS and 2 * rows <= chip.sms and chip.sm >= 90:
        programs = 1 << (min(_TOPK_CLUSTER, chip.sms // rows).bit_length() - 1)
        # warps cost time at every barrier: four columns a thread before there are more of them
        return _topk_cluster(columns, programs, 32 if columns > 4 * 512 * programs else 16)
    if rows > MANY_ROWS:  # rows wait for multiprocessors: small programs that hold little, several on each
        return TopkConfig(2048, 1, 8, held=2)
    if columns < _TOPK_SHARED_COLUMNS:  # held by a program, 4 columns a thread as long as there are threads
        block = max(256, _power_of_two(columns))
        return TopkConfig(block, 1, min(32, max(4, block // 128)), early=chip.sm >= 90)
    programs = chip.sms if rows <= 8 else 2 * chip.sms
    splits = max(1, min(MAX_TOPK_SPLITS, programs // rows, columns // 4096))
    splits = 1 << (splits.bit_length() - 1)
    pdl = splits > 1 and chip.sm >= 90
    # all threads of a multiprocessor, unless there are rows for two programs each
    return TopkConfig(4096, splits, 32 if splits == 1 and rows <= chip.sms else 16, pdl, early=pdl)


def _topk_cluster(columns: int, programs: int, warps: int) -> TopkConfig:
    """Clusters that ask for all columns ahead if they hold them, else for two a thread: short rows in wide buffers."""
    threads, whole = 32 * warps * programs, _power_of_two(columns)
    first = max(whole, threads) if whole <= 8 * threads else 2 * threads
    return TopkConfig(first, 1, warps, early=True, cluster=programs)


def sparse_mla_config(heads: int, topk: int, fp8: bool, tokens: int, device: torch.device) -> SparseMlaConfig:
    """Configuration for `tokens` queries of `heads` heads and `topk` selected entries."""
    tuned = _tuned("dsa_sparse_mla", device, tokens, **sparse_mla_case(heads, topk, fp8))
    if tuned:
        return SparseMlaConfig(**tuned)
    chip = arch.current_arch(device)
    if chip.sm < 100:
        # several blocks of 16 heads for one token: 64 would leave most multiprocessors without a program
        few = tokens * -(-heads // _COLUMNS_HEADS)
        if heads <= _COLUMNS_HEADS or few <= _FEW_BLOCKS:
            return _few_heads_config(topk, fp8, few, chip.sms)
        return _divided_config(heads, topk, tokens, chip.sms)
    block_h, tiles = _sparse_mla_tiles(heads, fp8, chip.sm)
    block_n, num_warps, num_stages = tiles[0]
    # flash decoding: enough programs for one wave (two of four warps fit a multiprocessor), each with a tile of work
    programs = tokens * -(-heads // block_h)
    wave = chip.sms * (8 // num_warps)
    splits = max(1, min(wave // programs, topk // block_n, MAX_SPLITS))
    return SparseMlaConfig(block_h, block_n, splits, num_warps, num_stages, pdl=splits > 1 and chip.sm >= 90)


def _divided_config(heads: int, topk: int, tokens: int, sms: int) -> SparseMlaConfig:
    """One program a multiprocessor, of whole tiles: registers and shared memory have room for no more."""
    block_n, num_warps, num_stages = _SPARSE_MLA_DIVIDED[0]
    splits = max(1, min(sms // (tokens * -(-heads // _DIVIDED_HEADS)), topk // block_n, MAX_SPLITS))
    return SparseMlaConfig(_DIVIDED_HEADS, block_n, splits, num_warps, num_stages, splits > 1, divided=True)


def _few_heads_config(topk: int, fp8: bool, blocks: int, sms: int) -> SparseMlaConfig:
    """What was fastest on an H200: one program a multiprocessor, since parts cost more than a second one gains, unless
    each has 512 entries left."""
    one, two = (max(1, min(programs // blocks, topk // 32, MAX_SPLITS)) for programs in (sms, 2 * sms))
    if fp8:
        splits = two if topk // two >= 512 else one
        several = splits > 1
        return SparseMlaConfig(_COLUMNS_HEADS, 32, splits, 4, 3, several, by_columns=True, early=several)
    wide = one > 1 and topk // one >= 512
    block_n, num_warps = (64, 8) if wide else (32, 4)
    return SparseMlaConfig(_COLUMNS_HEADS, block_n, one, num_warps, 3, pdl=one > 1)


def _sparse_mla_tiles(heads: int, fp8: bool, sm: int) -> tuple[int, list[tuple[int, int, int]]]:
    """block_h, and what goes with it."""
    known = _SPARSE_MLA_TILES_SM100 if sm >= 100 else _SPARSE_MLA_TILES
    rows = [block_h for kind, block_h in known if kind == fp8]
    block_h = next((rows_held for rows_held in rows if rows_held >= heads), rows[-1])
    return block_h, known[fp8, block_h]


def logits_search_space(case: dict[str, Any], rows: int) -> list[LogitsConfig]:
    """What a tuner tries for `rows` query rows of a `logits_case`, a dozen. Ragged: queries come from L2 once a tile of
    keys, so that wide tiles are for many keys, and few rows a program for few of them."""
    if case["mode"] == "paged":
        # warps, stages, programs, pages: as many programs as fit beside each other, or fewer
        plain = [(4, 4, 4, 1), (4, 3, 6, 1), (4, 3, 7, 1), (4, 4, 6, 1), (4, 4, 3, 2), (4, 3, 3, 2), (8, 4, 3, 2)]
        early = [(4, 4, 4, 1), (4, 3, 6, 1), (4, 3, 7, 1), (4, 4, 3, 2), (8, 4, 3, 2)]
        return [
            LogitsConfig(num_warps=w, num_stages=s, programs=p, early=wait, pages=pages)
            for wait, some in ((False, plain), (True, early))
            for w, s, p, pages in some
        ]
    shapes = [(128, 4, 2), (128, 4, 3), (128, 4, 4), (256, 8, 2), (256, 8, 3), (64, 4, 3)]
    groups = [group for group in (16, 32, 64) if group <= max(rows, 16)]
    return [LogitsConfig(n, group, w, s) for n, w, s in shapes for group in groups[-2:]]


def topk_search_space(case: dict[str, Any], rows: int) -> list[TopkConfig]:
    """What a tuner tries for a `topk_case`, some dozen: clusters that take all multiprocessors, half of them or each
    twice, and such that ask for few columns ahead, as short rows in wide buffers like it; one program a row with 4 to 8
    columns a thread; several in two launches; of many rows, one that keeps nothing."""
    columns = int(case["columns"])
    held = [
        TopkConfig(columns, 1, warps, early=True)
        for warps in (32, 16)
        if 128 * warps <= columns <= min(256 * warps, _TOPK_HELD_COLUMNS)
    ]
    fit = min(16, 1 << (max(1, 132 // rows).bit_length() - 1))
    shapes = [(fit, 32), (fit, 16), (fit // 2, 32), (fit // 2, 16), (2 * fit, 16), (fit, 8)]
    if rows > 132:  # rows beside each other instead
        shapes = [(1, 32), (1, 16), (2, 16), (4, 8)]
    together = [
        _topk_cluster(columns, programs, warps)
        for programs, warps in shapes
        if 1 <= programs <= 16 and 32 * warps * programs <= columns
    ]
    for programs in (fit, fit // 2):
        first = min(2 * 512 * programs, _TOPK_AHEAD_COLUMNS)
        ahead = [TopkConfig(first, early=True, held=held_by, cluster=programs) for held_by in (8, 16)]
        together += [one for one in ahead if programs and first < columns and one not in together]
    fits = [splits for splits in (2, 4, 8, 16, 32) if splits * 2048 <= columns and splits * rows <= 264]
    long = columns >= 4 * _TOPK_SHARED_COLUMNS
    shared = [
        TopkConfig(4096, splits, 16, True, True) if long else TopkConfig(2048, splits, 8, True, True, held=16)
        for splits in (fits[-2:] if long else fits[-1:])
        if columns >= _TOPK_SHARED_COLUMNS
    ]
    small = [TopkConfig(block, 1, warps, held=2) for block, warps in ((1024, 4), (2048, 8), (2048, 16), (4096, 16))]
    alone = [one for one in small if rows > 132 and one.block < columns]
    return held + together + shared + alone or [TopkConfig(block=columns, num_warps=4)]


def sparse_mla_search_space(
    case: dict[str, Any], tokens: int, device: torch.device | None = None
) -> list[SparseMlaConfig]:
    """What a tuner tries for `tokens` queries of a `sparse_mla_case`, some dozen: tiles of either kind; splits that
    give each multiprocessor as many programs as fit, or half as many. Every entry is read once a block of heads, so
    that blocks of 16 of more heads are for few tokens, and blocks of 64 of 16 heads for many."""
    heads, topk, fp8 = int(case["heads"]), int(case["topk"]), case["kv"] == "fp8_ds_mla"
    chip = arch.current_arch(device)
    block_h, tiles = _sparse_mla_tiles(heads, fp8, chip.sm)
    few_heads, hopper = heads <= _COLUMNS_HEADS, chip.sm < 100
    # what is not said below, and how many programs a multiprocessor
    shapes: list[tuple[SparseMlaConfig, tuple[float, ...]]] = []
    if hopper and (not few_heads or tokens >= 512):
        for n, w, s in _SPARSE_MLA_DIVIDED[: 1 if few_heads else 2]:
            shapes.append((SparseMlaConfig(_DIVIDED_HEADS, n, 1, w, s, divided=True), (1.0, 0.5)))
    if fp8 if few_heads else tokens <= 4:
        for n, w, s in _SPARSE_MLA_COLUMNS[fp8] if few_heads else _SPARSE_MLA_COLUMNS[fp8][:1]:
            shapes.append((SparseMlaConfig(_COLUMNS_HEADS, n, 1, w, s, by_columns=True), (2.0, 1.0, 0.5)))
    if hopper and not few_heads and not fp8 and tokens <= 4:
        for n, w, s in _SPARSE_MLA_TILES[False, _COLUMNS_HEADS]:
            shapes.append((SparseMlaConfig(_COLUMNS_HEADS, n, 1, w, s), (1.0, 2.0)))
    if not few_heads or not fp8 or not hopper:
        fit = (2.0, 1.0, 0.5) if few_heads else (1.0, 0.5, 0.25)
        for n, w, s in tiles:
            shapes.append((SparseMlaConfig(block_h, n, 1, w, s), fit[:1] if hopper and not few_heads else fit))
    if few_heads and not fp8 and hopper:
        for n, w, s, most, resident in _SPARSE_MLA_CROWDED:
            shapes.append((SparseMlaConfig(block_h, n, 1, w, s, registers=most), (float(resident),)))
    found = []
    for shape, shares in shapes:
        programs, most = tokens * -(-heads // shape.block_h), min(MAX_SPLITS, max(1, topk // shape.block_n))
        for n in list(dict.fromkeys(max(1, min(most, int(share * chip.sms / programs))) for share in shares))[:2]:
            several = n > 1 and chip.sm >= 90
            plain = replace(shape, splits=n, pdl=several, early=shape.by_columns and several)
            found.append(plain)
            if not several or shape.by_columns or shape.registers:
                continue
            if few_heads:
                found.append(replace(plain, early=True))
            elif shape.divided and shape.block_n == _SPARSE_MLA_DIVIDED[0][0]:
                found += [replace(plain, early=True), replace(plain, early=True, bf16_parts=True)]
    return list(dict.fromkeys(found))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tuned(op: str, device: torch.device, tokens: int, **case: Any) -> dict[str, Any] | None:
    """The measured configuration of this device, or None."""
    gpu = arch.current_gpu(device)
    table = None if gpu is None else tables.load("dsa", op, gpu)
    row = None if table is None else table.lookup(case, tokens)
    return row.config if row else None
