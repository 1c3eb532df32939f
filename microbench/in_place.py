"""`python -m blackwell_kernels.microbench.in_place`: what memory allows a kernel that updates slots where they lie.

Gated Delta Net's decode reads each sequence's state and writes it back to the same addresses, slots in any order. A
large copy between two buffers, the ceiling that floors are derived from, is faster than that: here both are timed
beside each other, over slots of 1 MiB (Qwen3-Next's bf16 state of one layer), with nothing else to do. Times go to
`results/<gpu>/limits/in_place.json`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
import typer
from rich.console import Console
from rich.table import Table

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import device, results
from blackwell_kernels.microbench.timing import Call, GraphEngine, measure

SLOT = 1 << 19  # bf16 elements
POOL = 1024
SETS = 4  # rotated: what one call wrote is out of L2 when it is called again
# (elements a program, in how many steps, warps): the best of dozens tried, between whole heads and single rows
TILES = ((1024, 1, 2), (2048, 1, 4), (512, 8, 1), (2048, 8, 4))


@triton.jit
def update_kernel(pool_ptr, slots_ptr, TILE: tl.constexpr, STEPS: tl.constexpr, SLOT: tl.constexpr):
    """Grid: (slots x SLOT / (TILE x STEPS)). pool [POOL, SLOT] bf16; slots [B] i32."""
    programs = SLOT // (TILE * STEPS)
    slot = tl.load(slots_ptr + tl.program_id(0) // programs).to(tl.int64)
    p = pool_ptr + slot * SLOT + tl.program_id(0) % programs * (TILE * STEPS) + tl.arange(0, TILE)
    for i in tl.static_range(STEPS):
        x = tl.load(p + i * TILE)
        tl.store(p + i * TILE, (x.to(tl.float32) * 0.5 + 1.0).to(tl.bfloat16))


def calls(pool: torch.Tensor, slots: list[torch.Tensor]) -> dict[str, list[Call]]:
    """Name -> a call for each set of slots. pool [POOL, SLOT] bf16; slots: SETS tensors [B] i32, no slot in two."""
    batch = len(slots[0])
    target = torch.empty(batch, SLOT, dtype=pool.dtype, device=pool.device)
    parts = [pool[i * batch : (i + 1) * batch] for i in range(SETS)]
    found: dict[str, list[Call]] = {"copy": [partial(target.copy_, part) for part in parts]}
    for tile, steps, warps in TILES:
        launch = update_kernel[(batch * (SLOT // (tile * steps)),)]
        sizes = {"TILE": tile, "STEPS": steps, "SLOT": SLOT, "num_warps": warps}
        found[f"in place, {tile} x {steps}"] = [partial(launch, pool, one, **sizes) for one in slots]
    return found


def run(
    batches: Annotated[
        list[int], typer.Option("--slots", min=1, max=POOL // SETS, help="Slots a call; repeatable.")
    ] = [32, 64, 128, 256],  # noqa: B006  typer's way
    rounds: Annotated[int, typer.Option(min=3, help="Samples of each.")] = 15,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    root: Annotated[Path, typer.Option("--results", help="Where results are kept.")] = results.ROOT,
) -> None:
    """Time updates in place beside copies of the same size."""
    if not torch.cuda.is_available():
        raise MissingRequirementError("updates in place are timed on a GPU, and there is none here")
    pool = torch.zeros(POOL, SLOT, dtype=torch.bfloat16, device="cuda")
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(0)).to(torch.int32).cuda()
    head = device.facts(device.command("python -m blackwell_kernels.microbench.in_place"), commit)
    rows: list[dict[str, Any]] = []
    shown = Table("slots", "what", "µs", "p10–p90", "TB/s", title=f"{head['gpu']}, n = {rounds}")
    for batch in batches:
        sets = [order[i * batch : (i + 1) * batch].contiguous() for i in range(SETS)]
        for name, one in measure([GraphEngine()], calls(pool, sets), rounds).items():
            if isinstance(one, str):
                raise RuntimeError(f"{name}: {one}")
            tbps = 4 * SLOT * batch / one.us / 1e6
            shown.add_row(str(batch), name, f"{one.us:.2f}", f"{one.p10:.2f}–{one.p90:.2f}", f"{tbps:.3f}")
            rows.append({"slots": batch, "what": name, "us": one.us, "tbps": tbps, "samples_us": one.samples_us})
    path = root / arch.gpu_slug(head["gpu"]) / "limits" / "in_place.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.replace_text(path, json.dumps({**head, "slot_bytes": 2 * SLOT, "rows": rows}, indent=1) + "\n")
    Console(soft_wrap=True).print(shown)


if __name__ == "__main__":
    try:
        typer.run(run)
    except MissingRequirementError as error:
        raise SystemExit(f"error: {error}") from None
