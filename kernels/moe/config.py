"""Which tiles the expert kernels use: from the tuned table of this GPU and case, else by tokens per expert."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import product

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


_FEW = 8  # tokens up to which each pair is taken by itself: two of them seldom share an expert


def _direct(tokens: int) -> MoeConfig:
    """Programs of 2 warps: 16 rows, which quantise x half as often as 8 do, or 8 where there are few programs at all.

    Stages so that 60 KB and more are on their way to a multiprocessor and yet it holds ten warps and more.
    """
    if tokens <= 2:
        return MoeConfig(16, 16, 2, 3, 2, 5, gate_up_rows=8, down_rows=8)
    return MoeConfig(16, 16, 2, 3, 2, 3, gate_up_rows=16, down_rows=16)


def heuristic(case: dict[str, tables.Scalar], tokens: int) -> MoeConfig:
    """Smallest tile that holds an average expert's tokens: more pads, less reads the expert's weights again."""
    return _direct(tokens) if tokens <= _FEW else _sorted(case, tokens)


def _sorted(case: dict[str, tables.Scalar], tokens: int) -> MoeConfig:
    per_expert = -(-tokens * int(case["topk"]) // int(case["experts"]))
    # few rows are bound by memory: stages that let two programs of gate_up, three of down share a multiprocessor
    if per_expert <= 16:
        down_stages = min(3, 1 + int(case["inter"]) // 128)
        return MoeConfig(16, 16, gate_up_warps=4, gate_up_stages=3, down_warps=4, down_stages=down_stages)
    if per_expert <= 32:
        return MoeConfig(32, 32, gate_up_warps=8, gate_up_stages=3, down_warps=8, down_stages=3)
    if per_expert <= 64:
        return MoeConfig(64, 64, gate_up_warps=8, gate_up_stages=4, down_warps=8, down_stages=5)
    # whole tiles of 128 read less, but three tiles of 64 hold up to 192 rows where two of 128 pad
    if current_arch().sm < 100 and not 128 < per_expert <= 192:
        return MoeConfig(128, 128, 8, 4, 8, 4, x_in_registers=True)
    return MoeConfig(128, 64, gate_up_warps=8, gate_up_stages=4, down_warps=8, down_stages=4)


def search_space(
    case: dict[str, tables.Scalar], tokens: int, around: MoeConfig | None = None, sm: int | None = None
) -> list[MoeConfig]:
    """What a tuner tries: both paths where both may win, tiles near the average expert's tokens, one kernel varied at a
    time.

    The kernels' times add up, so the best of each is the best together: `around` the best so far, the next call varies
    the other kernel. sm: of the chip, 90 or 100; by default this machine's.
    """
    sm = current_arch().sm if sm is None else sm
    found = []
    if around is None:
        base = _sorted(case, tokens)
        found = [base, replace(base, pdl=True)]
    if around.direct if around else tokens <= 2 * _FEW:
        found += _direct_space(around or _direct(tokens))
    if not around.direct if around else tokens > _FEW:
        found += _sorted_space(case, tokens, around)
    return [config for config in dict.fromkeys(found) if config.direct or _fits(config, sm)]


def _sorted_space(case: dict[str, tables.Scalar], tokens: int, around: MoeConfig | None) -> list[MoeConfig]:
    per_expert = tokens * int(case["topk"]) / int(case["experts"])
    tiles = [t for t in (16, 32, 64, 128) if min(64, per_expert / 4) <= t <= max(16, 4 * per_expert)]
    found = []
    for block_t in [around.block_t] if around else tiles:
        warps, halves = 4 if block_t == 16 else 8, sorted({block_t, max(16, block_t // 2)})
        base = around or MoeConfig(block_t, min(block_t, 64), warps, 4, warps, 4)
        found += [base, replace(base, pdl=True)]
        for warps, stages in product((4, 8, 16) if block_t == 128 else (4, 8), (2, 3, 4, 5)):
            for t, registers in product(halves, (False, True) if max(halves) >= 64 and warps == 8 else (False,)):
                gate_up = replace(base, gate_up_t=t, gate_up_warps=warps, gate_up_stages=stages, x_in_registers=False)
                found.append(replace(gate_up, x_in_registers=registers and t >= 64))
            found.append(replace(base, down_warps=warps, down_stages=stages))
    return found


def _direct_space(base: MoeConfig) -> list[MoeConfig]:
    """32 to 128 bytes of each matrix a thread and step; without a pipeline, and with one that is short or long."""
    found = [base, replace(base, pdl=True)]
    for (rows, warps), stages in product(((8, 2), (16, 2), (16, 4), (32, 4), (32, 8)), (1, 3, 5)):
        found.append(replace(base, gate_up_rows=rows, gate_up_warps=warps, gate_up_stages=min(stages, 4)))
        found.append(replace(base, down_rows=rows, down_warps=warps, down_stages=stages))
    return found


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
        )
    if c.gate_up_t == 128:
        return c.gate_up_warps >= 8 and c.gate_up_stages <= 4
    return c.gate_up_warps != 16 and (c.gate_up_t < 64 or c.gate_up_warps == 8 or c.gate_up_stages == 2)


def select(case: dict[str, tables.Scalar], tokens: int, device: torch.device | str) -> MoeConfig:
    """Configuration for `tokens` tokens on this device; a CPU or a GPU without a table gets the heuristic's.

    Raises: TableError when the table is corrupt or holds a configuration that this version does not know.
    """
    gpu = current_gpu(device)
    table = tables.load("moe", OP, gpu) if gpu is not None else None
    row = table.lookup(case, tokens) if table is not None else None
    # a row that says "stock" need not have a configuration of ours; whoever forces ours gets the heuristic's
    if row is None or not row.config:
        return heuristic(case, tokens)
    try:
        return MoeConfig(**row.config)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(MoeConfig))
        raise TableError(
            f"{tables.path_of('moe', OP, str(gpu))}: {case} at {row.tokens} tokens: {error}; "
            f"supported: a config of {names}; run `blackwell-kernels bench --op {OP} --write-dispatch` again"
        ) from None
