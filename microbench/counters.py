"""Hardware counters through Nsight Compute: names that differ by chip, its CSV, and why there are none.

A counter that could not be read is a reason, never a zero.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

# what we call it -> ncu's names for it, the first one that the chip has
ALIASES: dict[str, tuple[str, ...]] = {
    "duration_ns": ("gpu__time_duration.sum",),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
    "shared_bytes": ("launch__shared_mem_per_block",),
    # the unit that multiplies, whichever generation of instructions feeds it; the others count one kind each
    "tensor_pct": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tc_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "dram_read_bytes": ("dram__bytes_read.sum",),
    "dram_write_bytes": ("dram__bytes_write.sum",),
    "l2_hit_pct": ("lts__t_sector_hit_rate.pct",),
    "load_efficiency_pct": ("smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct",),
    "store_efficiency_pct": ("smsp__sass_average_data_bytes_per_sector_mem_global_op_st.pct",),
    "threads_per_instruction": ("smsp__thread_inst_executed_per_inst_executed.ratio",),
    "local_loads": ("smsp__inst_executed_op_local_ld.sum", "smsp__sass_inst_executed_op_local_ld.sum"),
    "local_stores": ("smsp__inst_executed_op_local_st.sum", "smsp__sass_inst_executed_op_local_st.sum"),
}
# only with --deep: each costs passes of its own
DEEP: dict[str, tuple[str, ...]] = {
    f"pipe_{pipe}": (f"sm__inst_executed_pipe_{pipe}.sum", f"smsp__inst_executed_pipe_{pipe}.sum")
    for pipe in ("alu", "fma", "fmaheavy", "lsu", "xu", "uniform", "cbu")
}
# of what is asked for; --print-units base is not heeded by every version and page
_UNITS = {"us": 1e3, "ms": 1e6, "s": 1e9, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_UNITS |= {"usecond": 1e3, "msecond": 1e6, "second": 1e9}
SEPARATOR = "begin_case"
LIMIT_S = 300.0


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
    """Launches in what `ncu --csv --page raw` writes, progress and warnings around it or not; times in ns, sizes in B.

    Raises: ValueError with ncu's own message where there is no table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.lstrip("\ufeff").startswith('"ID"')), None)
    if start is None:
        told = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:] or ["it printed nothing"]
        raise ValueError(told[0].removeprefix("==ERROR==").strip())
    table = csv.DictReader([lines[start].lstrip("\ufeff"), *(x for x in lines[start + 1 :] if x.startswith('"'))])
    columns = {name: _column(metric, table.fieldnames or ()) for name, metric in names.items()}
    launches, units = [], dict[str, str]()
    for row in table:
        if not (row.get("ID") or "").strip().isdigit():  # the line of units
            units = {name: row.get(column) or "" for name, column in columns.items() if column}
            continue
        read = {name: _number(row.get(column), units.get(name, "")) for name, column in columns.items() if column}
        kernel = _function(row.get("Kernel Name") or "")
        launches.append(Launch(kernel, {name: value for name, value in read.items() if value is not None}))
    if not launches:
        raise ValueError("no kernel was profiled")
    return launches


def _column(metric: str, fields: Sequence[str]) -> str | None:
    """The column of a metric; some versions add its section before the name or its unit behind it."""
    return next((f for f in fields if f == metric), None) or next((f for f in fields if metric in f.split()), None)


def _function(name: str) -> str:
    """`void at::native::f<float>(int)` -> `f`: kernels go by their function's name, as Triton's always do."""
    plain = re.sub(r"\((anonymous namespace|unnamed)\)|<unnamed>", "", name)
    while (shorter := re.sub(r"<[^<>]*>", "", plain)) != plain:
        plain = shorter
    return plain.partition("(")[0].split()[-1].rpartition("::")[2] if plain.strip() else name


def _number(text: str | None, unit: str = "") -> float | None:
    """In the base unit; None for what ncu prints where it has none: n/a, nan, nothing."""
    try:
        value = float((text or "").replace(",", "")) * _UNITS.get(unit.partition("/")[0], 1.0)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def split(launches: Sequence[Launch], cases: int) -> list[list[Launch]]:
    """The launches of each case, which `begin_case` of `profile_target.py` separates.

    Raises: ValueError when there are not as many of those as cases.
    """
    found: list[list[Launch]] = []
    for launch in launches:
        if launch.kernel == SEPARATOR:
            found.append([])
        elif found:
            found[-1].append(launch)
    if len(found) != cases:
        raise ValueError(f"ncu saw {len(found)} of {cases} cases: the profiled process ended early")
    return found


def collect(cases: Sequence[tuple[str, str]], *, deep: bool, limit_s: float = LIMIT_S) -> list[list[Launch]]:
    """Profile one call of ours on each (definition, case), in one process, for `limit_s` seconds at most.

    Raises: ValueError saying why there are no counters here.
    """
    ncu = find_ncu()
    names = resolve(_run([ncu, "--query-metrics"], limit_s), deep)
    target = [sys.executable, "-m", "blackwell_kernels.microbench.profile_target", "-", *chain.from_iterable(cases)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"  # apart from what the profiled process prints
        options = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        # clocks as the benchmark had them; the target marks the calls, so that nothing else is replayed
        options += ["--clock-control", "none", "--profile-from-start", "off", "--metrics", ",".join(names.values())]
        told = _run([ncu, *options, *target], limit_s, log)
    return split(parse(told, names), len(cases))


def find_ncu() -> str:
    """Nsight Compute's command line: on the path, or in CUDA's folder.

    Raises: ValueError where there is none.
    """
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    found = shutil.which("ncu") or shutil.which("ncu", path=cuda)
    if found is None:
        raise ValueError(f"ncu (Nsight Compute) is neither on the path nor in {cuda}; CUDA_HOME names another folder")
    return found


def _run(command: list[str], limit_s: float, log: Path | None = None) -> str:
    """What it printed, or wrote to `log`; a table is worth reading even where it ended badly."""
    environment = {**os.environ, "LC_ALL": "C"}  # numbers with points
    try:
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        raise ValueError(f"ncu cannot be started: {error.strerror}") from None
    try:
        out, problems = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # what it profiles too, which would hold the GPU
        child.wait()
        raise ValueError(f"no end of ncu after {limit_s:.0f} s") from None
    told = log.read_text(encoding="utf-8", errors="replace") if log is not None and log.exists() else out
    if "ERR_NVGPUCTRPERM" in told + out + problems:
        raise ValueError("reading GPU counters is not permitted here (ERR_NVGPUCTRPERM)")
    if child.returncode and '"ID"' not in told:
        said = [line for line in (told + "\n" + out).splitlines() if line.startswith("==ERROR==")]
        said = said or (problems or told or out).strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"ncu ended with status {child.returncode}: {said[0].removeprefix('==ERROR==').strip()}")
    return told


def of(launches: Iterable[Launch], kernel: str) -> dict[str, float]:
    """Counters of a kernel: of its longest launch."""
    mine = [launch.values for launch in launches if launch.kernel == kernel]
    return max(mine, key=lambda values: values.get("duration_ns", 0.0), default={})


def dram_bytes(launch: Launch) -> float | None:
    """Bytes that a launch read from and wrote to device memory; None where ncu could not count them."""
    read, written = (launch.values.get(name) for name in ("dram_read_bytes", "dram_write_bytes"))
    return None if read is None or written is None else read + written
