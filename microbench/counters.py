"""Hardware counters through Nsight Compute: names that differ by chip, its CSV, and why there are none.

A counter that could not be read is a reason, never a zero.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

# what we call it -> ncu's names for it, the first one that the chip has
ALIASES: dict[str, tuple[str, ...]] = {
    "duration_ns": ("gpu__time_duration.sum",),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
    "shared_bytes": ("launch__shared_mem_per_block",),
    "tensor_pct": (
        "sm__pipe_tc_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "dram_read_bytes": ("dram__bytes_read.sum",),
    "dram_write_bytes": ("dram__bytes_write.sum",),
    "l2_hit_pct": ("lts__t_sector_hit_rate.pct",),
    "load_efficiency_pct": ("smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct",),
    "store_efficiency_pct": ("smsp__sass_average_data_bytes_per_sector_mem_global_op_st.pct",),
    "threads_per_instruction": ("smsp__thread_inst_executed_per_inst_executed.ratio",),
    "local_loads": ("smsp__sass_inst_executed_op_local_ld.sum", "smsp__inst_executed_op_local_ld.sum"),
    "local_stores": ("smsp__sass_inst_executed_op_local_st.sum", "smsp__inst_executed_op_local_st.sum"),
}
# only with --deep: each costs passes of its own
DEEP: dict[str, tuple[str, ...]] = {
    f"pipe_{pipe}": (f"sm__inst_executed_pipe_{pipe}.sum", f"smsp__inst_executed_pipe_{pipe}.sum")
    for pipe in ("alu", "fma", "fmaheavy", "lsu", "xu", "uniform", "cbu")
}
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Launch:
    """One kernel launch as ncu saw it; `values` by our names, only those it could read."""

    kernel: str
    values: dict[str, float]


def resolve(listing: str, deep: bool) -> dict[str, str]:
    """Our names -> ncu's, of those a chip has. listing: what `ncu --query-metrics` prints."""
    there = {line.split()[0] for line in listing.splitlines() if line.split() and "__" in line.split()[0]}
    wanted = ALIASES | (DEEP if deep else {})
    found = {}
    for name, aliases in wanted.items():
        # launch__ metrics are facts of the launch, which the query does not list
        known = [a for a in aliases if a.partition(".")[0] in there or a.startswith("launch__")]
        if known:
            found[name] = known[0]
    return found


def parse(text: str, names: dict[str, str]) -> list[Launch]:
    """Launches in the output of `ncu --csv --page raw --print-units base`.

    Raises: ValueError with ncu's own message where there is no table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        told = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:] or ["it printed nothing"]
        raise ValueError(told[0].removeprefix("==ERROR==").strip())
    table = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    launches = []
    for row in table:
        if not row.get("ID"):  # the line of units
            continue
        values = {name: value for name, column in names.items() if (value := _number(row.get(column))) is not None}
        launches.append(Launch(row["Kernel Name"].partition("(")[0], values))
    if not launches:
        raise ValueError("no kernel was profiled")
    return launches


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None  # n/a


def collect(definition: str, case: str, *, deep: bool) -> list[Launch]:
    """Profile one call of ours.

    Raises: ValueError saying why there are no counters here.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("ncu (Nsight Compute) is not installed")
    names = resolve(_run([ncu, "--query-metrics"]), deep)
    target = [sys.executable, "-m", "blackwell_kernels.microbench.profile_target", definition, case]
    # the target marks the call, so that generating inputs and warming up are not replayed
    options = ["--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--metrics"]
    return parse(_run([ncu, *options, ",".join(names.values()), *target]), names)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"ncu did not end well: {type(error).__name__}") from None
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise ValueError("reading GPU counters is not permitted here (ERR_NVGPUCTRPERM)")
    if done.returncode:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"ncu ended with status {done.returncode}: {last}")
    return done.stdout


def of(launches: Iterable[Launch], kernel: str) -> dict[str, float]:
    """Counters of a kernel: of its longest launch."""
    mine = [launch.values for launch in launches if launch.kernel == kernel]
    return max(mine, key=lambda values: values.get("duration_ns", 0.0), default={})
