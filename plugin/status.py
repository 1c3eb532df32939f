"""What runs in this process: which implementation serves which layer and why, tokens handled, fall-backs.

The hooks call `record_layer`, `count` and `fallback`; each process keeps its own numbers and writes them to
`<status directory>/<pid>.json`; `read_all` merges a server's processes. Stdlib only.

`count` runs in Python, so a replayed CUDA graph does not reach it: its numbers are those of eager steps and captures.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from blackwell_kernels import env
from blackwell_kernels.errors import FallbackError

SCHEMA = 1
WRITE_EVERY_S = 1.0
logger = logging.getLogger("vllm.blackwell_kernels")

Snapshot = dict[str, Any]


class _State:
    def __init__(self) -> None:
        self.layers: dict[tuple[str, str], tuple[str, str]] = {}
        self.counts: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.fallbacks: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.arch = ""
        self.jit_warmup: list[str] = []
        self.jit_after_warmup: list[str] = []
        self.dirty = False
        self.writer: threading.Thread | None = None
        self.complained = False


_state = _State()


def reset() -> None:
    """Forget everything. A forked child starts from here: its parent's numbers are reported by its parent."""
    global _state
    _state = _State()


os.register_at_fork(after_in_child=reset)


def record_layer(op: str, layer: str, impl: str, reason: str) -> None:
    """State that `impl` ("triton", "cpu", "stock" or "mixed") serves `op` in `layer`; the last word counts."""
    _state.layers[op, layer] = (impl, reason)
    _state.dirty = True


def count(op: str, layer: str, impl: str, tokens: int, phase: str) -> None:
    """Add one call that handled `tokens` tokens; `phase` is prefill, decode, mixed or spec. Cheap."""
    entry = _state.counts[op, layer, impl, phase]
    entry[0] += 1
    entry[1] += tokens
    _state.dirty = True


def fallback(op: str, reason: str) -> None:
    """Count that stock vLLM serves `op` for `reason`, and warn the first time.

    Keep `reason` free of numbers that vary from call to call: it labels a metric.
    Raises: FallbackError when BLACKWELL_KERNELS_STRICT=1.
    """
    if env.STRICT.get():
        raise FallbackError(
            f"{op}: {reason}, so stock vLLM would serve it, and {env.STRICT.name}=1 forbids that. Unset it, or set "
            f"{env.DISABLE.name}={op} to leave this operator to stock on purpose."
        )
    _state.fallbacks[op, reason] += 1
    _state.dirty = True
    if _state.fallbacks[op, reason] == 1:
        logger.warning("%s: left to stock vLLM: %s (counted, not repeated)", op, reason)


def compiled(kernel: str, *, after_warmup: bool) -> None:
    """Note that Triton compiled one of our kernels."""
    (_state.jit_after_warmup if after_warmup else _state.jit_warmup).append(kernel)
    _state.dirty = True
    if after_warmup:
        logger.warning("%s was compiled after the warm-up: the request that met it had to wait", kernel)


def set_arch(arch: str) -> None:
    """`sm90`, `sm100`, ..., or `cpu`: the label of metrics and of the activation table."""
    _state.arch = arch
    _state.dirty = True


def snapshot() -> Snapshot:
    """This process's numbers as plain JSON data."""
    from blackwell_kernels import __version__
    from blackwell_kernels.activation import process_name

    state = _state
    return {
        "schema": SCHEMA,
        "run": env.RUN.get(),
        "version": __version__,
        "processes": [{"pid": os.getpid(), "name": process_name()}],
        "arch": state.arch,
        "layers": [
            {"op": op, "layer": layer, "impl": impl, "reason": reason}
            for (op, layer), (impl, reason) in list(state.layers.items())
        ],
        "counts": [
            {"op": op, "layer": layer, "impl": impl, "phase": phase, "calls": calls, "tokens": tokens}
            for (op, layer, impl, phase), (calls, tokens) in list(state.counts.items())
        ],
        "fallbacks": [{"op": op, "reason": reason, "count": n} for (op, reason), n in list(state.fallbacks.items())],
        "jit_warmup": list(state.jit_warmup),
        "jit_after_warmup": list(state.jit_after_warmup),
    }


def write() -> Path | None:
    """Write this process's snapshot to `<status directory>/<pid>.json`, whole or not at all.

    Returns the file, or None without a status directory or when it cannot be written (one warning): serving goes on.
    """
    directory = env.STATUS_DIR.get()
    if directory is None:
        return None
    target = Path(directory, f"{os.getpid()}.json")
    _state.dirty = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            try:
                json.dump(snapshot(), file)
                file.flush()
            except OSError:
                os.unlink(file.name)  # a full disk must not fill with what did not fit
                raise
        os.replace(file.name, target)
    except OSError as error:
        if not _state.complained:
            _state.complained = True
            logger.warning("no status is written to %s: %s. Set %s.", directory, error, env.STATUS_DIR.name)
        return None
    return target


def start_writer() -> None:
    """Write the status whenever it changed, at most once a second, from a daemon thread of this process."""
    if _state.writer is None:
        _state.writer = threading.Thread(target=_write_changes, args=(_state,), daemon=True, name="blackwell-status")
        _state.writer.start()


def _write_changes(state: _State) -> None:
    pause = threading.Event()
    while state is _state:
        if state.dirty:
            write()
        pause.wait(WRITE_EVERY_S)


def read_all(directory: str | os.PathLike[str], run: str | None = None) -> Snapshot:
    """Merge the files of one run: `run`, or the newest in the directory.

    Layers that several ranks report alike appear once; counts and fall-backs are sums over processes. A file that
    cannot be read (a process may die while writing) is named under "unreadable" and does not hide the others.
    """
    snapshots, unreadable = [], []
    for path in sorted(Path(directory).glob("*.json")):
        try:
            found = json.loads(path.read_text())
            if found["schema"] != SCHEMA:
                raise ValueError(f"schema {found['schema']}")
            merge([found])  # touches every field
            snapshots.append(found)
        except (OSError, ValueError, LookupError, TypeError):
            unreadable.append(path.name)
    if run is None:
        run = max((found["run"] or "" for found in snapshots), default="", key=_started)
    return {**merge(found for found in snapshots if (found["run"] or "") == run), "unreadable": unreadable}


def _started(run: str) -> int:
    start = run.partition("-")[0]
    return int(start) if start.isdigit() else 0


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """One snapshot for several processes of a run."""
    merged: Snapshot = {"schema": SCHEMA, "run": None, "version": None, "processes": [], "arch": ""}
    layers: dict[tuple[str, ...], None] = {}
    counts: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    fallbacks: defaultdict[tuple[str, str], int] = defaultdict(int)
    jit_warmup: list[str] = []
    jit_after_warmup: list[str] = []
    for one in snapshots:
        merged["run"], merged["version"] = one["run"], one["version"]
        merged["arch"] = merged["arch"] or one["arch"]
        merged["processes"] += one["processes"]
        for row in one["layers"]:
            layers[row["op"], row["layer"], row["impl"], row["reason"]] = None
        for row in one["counts"]:
            total = counts[row["op"], row["layer"], row["impl"], row["phase"]]
            total[0] += row["calls"]
            total[1] += row["tokens"]
        for row in one["fallbacks"]:
            fallbacks[row["op"], row["reason"]] += row["count"]
        jit_warmup += one["jit_warmup"]
        jit_after_warmup += one["jit_after_warmup"]
    merged["layers"] = [dict(zip(("op", "layer", "impl", "reason"), key, strict=True)) for key in layers]
    merged["counts"] = [
        {**dict(zip(("op", "layer", "impl", "phase"), key, strict=True)), "calls": calls, "tokens": tokens}
        for key, (calls, tokens) in counts.items()
    ]
    merged["fallbacks"] = [{"op": op, "reason": reason, "count": n} for (op, reason), n in fallbacks.items()]
    merged["jit_warmup"], merged["jit_after_warmup"] = jit_warmup, jit_after_warmup
    return merged


def activation_rows(found: Snapshot) -> list[dict[str, Any]]:
    """Operator, implementation, number of layers, reason: one row for each distinct answer, ordered as HOOK_OPS."""
    groups: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in found["layers"]:
        groups[row["op"], row["impl"], row["reason"]].add(row["layer"])
    order = {op: i for i, op in enumerate(env.HOOK_OPS)}
    rows = [
        {"op": op, "impl": impl, "layers": len(names), "reason": reason} for (op, impl, reason), names in groups.items()
    ]
    return sorted(rows, key=lambda row: (order.get(row["op"], len(order)), row["impl"], row["reason"]))


def activation_table(found: Snapshot) -> str:
    """The activation table as aligned text: operator, implementation, layers, reason."""
    head = ("operator", "implementation", "layers", "reason")
    body = [
        (row["op"], _named(row["impl"], found["arch"]), str(row["layers"]), row["reason"])
        for row in activation_rows(found)
    ]
    if not body:
        return "no layer of this model uses an operator of blackwell-kernels"
    return "\n".join(aligned([head, *body]))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _named(impl: str, arch: str) -> str:
    return f"{impl} {arch}" if impl in ("triton", "mixed") and arch else impl


def report_after_load(expected: Iterable[str] = (), *, log: bool = True) -> None:
    """After the model is loaded: log the activation table, and count as fall-back each `expected` operator that no
    layer reported, because a hook that nobody reaches is how a plugin ends up doing nothing.

    Raises: FallbackError under BLACKWELL_KERNELS_STRICT=1 for such an operator.
    """
    reported = {op for op, _ in _state.layers}
    missing = sorted(set(expected) - reported - env.DISABLE.get())
    if log:
        logger.info("blackwell-kernels after model load:\n%s", activation_table(snapshot()))
    for op in missing:
        fallback(op, "no layer of the model reached our hook")
    write()
