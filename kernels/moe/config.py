"""Which tiles the expert kernels use: from the tuned table of this GPU and case, else by tokens per expert."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from blackwell_kernels.common import tables
from blackwell_kernels.common.arch import current_arch, current_gpu
from blackwell_kernels.errors import TableError

OP = "moe"


@dataclass(frozen=True)
class MoeConfig:
    """block_t: tokens a tile; gate_up_t: tokens a program of the W13 (gate_up) kernel, block_t or half of it.

    Warps and pipeline stages of the gate_up and the W2 (down) kernel. pdl: each kernel is launched while the one before
    it ends (programmatic dependent launch).
    x_in_registers: tensor cores take activations of the gate_up kernel from registers, read once for both products.
    fit: least height at which a tile that is half or a quarter full is computed, block_t or 0: always at its own.
    down_blocks: 128-column blocks that a program of the down kernel walks, as far as they divide the hidden size.
    down_wide: it takes them two at a time, which reads its input once for both.
    walk: the grid has the tiles of an even load, whose programs walk on to further ones; else all that may be needed.
    gate_up_rows, down_rows: weight rows a program of direct_kernels.py, which block_t and gate_up_t do not concern;
    0 for both: the sorted path.
    """

    block_t: int
    gate_up_t: int
    gate_up_warps: int
    gate_up_stages: int
    down_warps: int
    down_stages: int
    pdl: bool = False
    gate_up_rows: int = 0
    down_rows: int = 0
    x_in_registers: bool = False
    fit: int = 0
    down_blocks: int = 1
    down_wide: bool = False
    walk: bool = False

    def heights(self, tile: int) -> int:
        """In how many heights, each half of the one before, a tile of `tile` tokens is computed."""
        return 1 if not self.fit or tile <= self.fit else min(3, (tile // self.fit).bit_length())

    @property
    def direct(self) -> bool:
        """Whether every pair is taken by itself, without a sort."""
        return self.gate_up_rows > 0

    def __post_init__(self) -> None:
        if self.block_t not in (16, 32, 64, 128):
            raise ValueError(f"block_t is {self.block_t}; supported: 16, 32, 64, 128")
        if self.gate_up_t < 16 or self.gate_up_t not in (self.block_t, self.block_t // 2):
            raise ValueError(f"gate_up_t is {self.gate_up_t}; supported: block_t ({self.block_t}) or half, 16 or more")
        if self.x_in_registers and self.gate_up_t < 64:
            raise ValueError(f"x_in_registers with gate_up_t {self.gate_up_t}; supported: 64 and 128")
        if self.fit not in (0, 16, 32, 64):
            raise ValueError(f"fit is {self.fit}; supported: 0, 16, 32, 64")
        if self.down_blocks not in (1, 2, 4, 8):
            raise ValueError(f"down_blocks is {self.down_blocks}; supported: 1, 2, 4, 8")
        if self.down_wide and self.down_blocks == 1:
            raise ValueError("down_wide with down_blocks 1; supported: 2, 4, 8")
        rows = {self.gate_up_rows, self.down_rows}
        if rows != {0} and rows - {4, 8, 16, 32, 64}:
            raise ValueError(
                f"rows are {self.gate_up_rows} and {self.down_rows}; supported: 4, 8, 16, 32, 64, or both 0"
            )
        warps = (1, 2, 4, 8) if self.direct else (4, 8, 16)
        if {self.gate_up_warps, self.down_warps} - set(warps):
            given = f"{self.gate_up_warps} and {self.down_warps}"
            raise ValueError(f"warps are {given}; supported: {', '.join(map(str, warps))}")
        if not (1 <= self.gate_up_stages <= 8 and 1 <= self.down_stages <= 8):
            raise ValueError(f"stages are {self.gate_up_stages} and {self.down_stages}; supported: 1 to 8")


def case_of(hidden: int, inter: int, experts: int, local_experts: int, topk: int) -> dict[str, tables.Scalar]:
    """The axes, but tokens, under which tables keep measurements. inter: per rank; local_experts: on this rank."""
    return {"hidden": hidden, "inter": inter, "experts": experts, "local_experts": local_experts, "topk": topk}


_FEW = 16  # tokens up to which each pair may be taken by itself: two of them seldom share an expert
_FEW_BYTES = 1 << 29  # of weights that pairs taken so read: sorted, the same bytes come faster but start 6 us later
_WAVES = 4 * 132  # programs from which one of each multiprocessor, with more on its way, replaces two


def _pairs(case: dict[str, tables.Scalar], tokens: int) -> float:
    """Pairs on this rank, where routing is even."""
    return tokens * int(case["topk"]) * int(case["local_experts"]) / int(case["experts"])


def _direct(case: dict[str, tables.Scalar], tokens: int) -> MoeConfig:
    """Programs of 2 warps: 16 rows, which quantise x half as often as 8 do, or 8 where there are few programs at all.

    Stages so that 60 KB and more are on their way to a multiprocessor and yet it holds ten warps and more.
    """
    inter = int(case["inter"])
    gate_up_rows = 8 if _pairs(case, tokens) * inter / 16 < 1000 else 16
    # a step of the down kernel takes 512 bytes of a row where the row's length is a multiple of them
    return MoeConfig(16, 16, 2, 3, 2, 3 if inter % 512 == 0 else 5, gate_up_rows=gate_up_rows, down_rows=16)


def heuristic(case: dict[str, tables.Scalar], tokens: int) -> MoeConfig:
    """Few bytes take few launches, each pair by itself; else the smallest tile that holds an average expert's tokens:
    more pads, less reads the expert's weights again.
    """
    bytes_read = _pairs(case, tokens) * 3 * int(case["hidden"]) * int(case["inter"])
    return _direct(case, tokens) if tokens <= _FEW and bytes_read <= _FEW_BYTES else _sorted(case, tokens)


def _sorted(case: dict[str, tables.Scalar], tokens: int) -> MoeConfig:
    per_expert = -(-tokens * int(case["topk"]) // int(case["experts"]))
    inter, local = int(case["inter"]), int(case["local_experts"])
    shared: dict[str, Any] = {
        # short rows are little work for a program of the down kernel: it takes as many as make four steps
        "down_blocks": max(1, 512 // inter),
        # under expert parallelism most of the tiles that there may be are elsewhere
        "walk": local < int(case["experts"]),
    }
    if per_expert <= 16:
        programs = min(local, _pairs(case, tokens)) * inter // 128
        gate_up_stages = 5 if programs >= _WAVES else 3
        return MoeConfig(16, 16, gate_up_warps=4, gate_up_stages=gate_up_stages, down_warps=4, down_stages=3, **shared)
    if per_expert <= 32:
        if current_arch().sm < 100:
            return MoeConfig(32, 32, gate_up_warps=4, gate_up_stages=4, down_warps=4, down_stages=3, **shared)
        shared["walk"] = False  # it spills, as four warps do
        return MoeConfig(32, 32, gate_up_warps=8, gate_up_stages=3, down_warps=8, down_stages=3, **shared)
    if per_expert <= 64:
        return MoeConfig(64, 64, gate_up_warps=8, gate_up_stages=4, down_warps=8, down_stages=5, **shared)
    if current_arch().sm < 100:
        return _TALL
    return MoeConfig(128, 64, gate_up_warps=8, gate_up_stages=4, down_warps=8, down_stages=4, **shared)


# 128 tokens at three heights, which pad least of all tiles that read the weights so seldom; four wide blocks spill
_TALL = MoeConfig(128, 128, 8, 4, 8, 4, x_in_registers=True, fit=32, down_blocks=2, down_wide=True, walk=True)


def search_space(case: dict[str, tables.Scalar], tokens: int, around: MoeConfig | None = None) -> list[MoeConfig]:
    """What a tuner tries, about a dozen: both paths where both may win, tiles near the average expert's tokens, and the
    down kernel in other ways.

    around: the best so far. Nothing is added to it, so that everything can be compiled ahead.
    """
    if around is not None:
        return []
    found = _few(case, tokens) if tokens <= _FEW else _tiles(case, tokens)
    return [config for config in dict.fromkeys(found) if config.direct or _fits(config, current_arch().sm)]


def _longer(c: MoeConfig) -> MoeConfig:
    """Twice the column blocks a program of the down kernel."""
    return replace(c, down_blocks=2 * c.down_blocks)


def _few(case: dict[str, tables.Scalar], tokens: int) -> list[MoeConfig]:
    direct, base = _direct(case, tokens), _sorted(case, tokens)
    found = [replace(direct, gate_up_rows=rows, gate_up_warps=warps) for rows, warps in ((8, 2), (16, 2), (32, 4))]
    ways = ((16, 2, 5), (16, 4, 3), (32, 4, 3))
    found += [replace(direct, down_rows=rows, down_warps=warps, down_stages=stages) for rows, warps, stages in ways]
    deeper = replace(base, gate_up_stages=8 - base.gate_up_stages)
    return [*found, base, replace(base, pdl=True), deeper, _longer(base)]


def _tiles(case: dict[str, tables.Scalar], tokens: int) -> list[MoeConfig]:
    """The heuristic's tile in other ways, and its neighbours'."""
    base = _sorted(case, tokens)
    if base.block_t == 16:
        found = [replace(base, gate_up_stages=n) for n in (3, 4, 5)]
        found += [replace(base, gate_up_warps=8), replace(base, pdl=True), replace(base, walk=not base.walk)]
        found += [replace(base, down_stages=4), replace(base, down_warps=8)]
        return [*found, _longer(base), replace(base, down_blocks=4 if base.down_blocks == 1 else 1)]
    blocks = max(1, 512 // int(case["inter"]))
    half = MoeConfig(64, 64, gate_up_warps=4, gate_up_stages=2, down_warps=4, down_stages=3, down_blocks=blocks)
    small = MoeConfig(64, 64, 8, 4, 8, 3, fit=16, down_blocks=blocks, walk=base.walk)
    if base.block_t == 32:
        found = [base, replace(base, gate_up_stages=3), replace(base, walk=not base.walk), _longer(base)]
        eight = replace(base, gate_up_warps=8, gate_up_stages=3, down_warps=8)
        return [*found, eight, _longer(eight), half, _longer(half), small, _longer(small)]
    narrow = replace(_TALL, down_wide=False, down_blocks=max(2, blocks))
    if base.block_t == 64:
        fitted = replace(base, fit=16, walk=False)
        found = [base, _longer(base), fitted, _longer(fitted), replace(fitted, x_in_registers=True)]
        return [*found, small, _longer(small), half, _longer(half), _TALL, narrow]
    small = replace(small, down_stages=4, walk=False)
    found = [base, replace(base, walk=not base.walk), replace(base, fit=0), replace(base, fit=64), narrow]
    found += [small, _longer(small), half]
    return found if base.down_wide else [*found, _longer(base)]


def _fits(c: MoeConfig, sm: int) -> bool:
    """Whether it neither spills much nor falls back to mma.sync's slow tensor cores; found by compiling all."""
    if c.block_t == 128 and c.down_warps == 4:
        return False
    if sm >= 100:
        return (
            not c.x_in_registers
            and (c.gate_up_t == 16 or c.gate_up_warps == 8)
            and c.gate_up_t <= 64
            and c.down_warps <= 8
            and not (c.walk and (c.fit or c.block_t == 32))
            and not c.down_wide
        )
    if c.gate_up_t == 128:
        return c.gate_up_warps >= 8 and c.gate_up_stages <= 4
    return c.gate_up_warps != 16 and (c.gate_up_t < 64 or c.gate_up_warps == 8 or c.gate_up_stages == 2)


def reaches(searched: int, tokens: int) -> bool:
    """Whether a configuration found for `searched` tokens serves so many fewer: half of them, no less.

    Its tiles would be half empty: 2,000 tokens took 788 us by what was found for 4,096, 558 by the heuristic (H200,
    Qwen3-Next).
    """
    return 2 * tokens >= searched


def select(case: dict[str, tables.Scalar], tokens: int, device: torch.device | str) -> MoeConfig:
    """Configuration for `tokens` tokens on this device; a CPU or a GPU without a table gets the heuristic's.

    Raises: TableError when the table is corrupt or holds a configuration that this version does not know.
    """
    gpu = current_gpu(device)
    table = tables.load("moe", OP, gpu) if gpu is not None else None
    row = table.lookup(case, tokens) if table is not None else None
    # a row that says "stock" need not have a configuration of ours; whoever forces ours gets the heuristic's
    if row is None or not row.config or not reaches(row.tokens, tokens):
        return heuristic(case, tokens)
    try:
        return MoeConfig(**row.config)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(MoeConfig))
        raise TableError(
            f"{tables.path_of('moe', OP, str(gpu))}: {case} at {row.tokens} tokens: {error}; "
            f"supported: a config of {names}; run `blackwell-kernels bench --op {OP} --write-dispatch` again"
        ) from None
