"""`blackwell-kernels info`: the operators, what serves them, where they were measured, and the device at hand."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from blackwell_kernels import env
from blackwell_kernels.status import aligned

SCHEMA = 1
# each hook op, and the torch operators it is made of
TORCH_OPS = {
    "moe": ("moe_fp8_block_scale",),
    "moe_routing": ("moe_grouped_topk", "moe_softmax_topk"),
    "dsa_indexer": (
        "dsa_indexer_k_insert",
        "dsa_gather_indexer_k",
        "dsa_indexer_logits_paged",
        "dsa_indexer_logits_ragged",
    ),
    "dsa_topk": ("dsa_topk",),
    "dsa_sparse_mla": ("dsa_kv_insert", "dsa_sparse_mla"),
    "gdn_decode": ("gdn_decode",),
    "gdn_prefill": ("gdn_prepare", "gdn_prefill"),
}


def collect() -> dict[str, Any]:
    """Everything `info` shows, as JSON data.

    Each operator carries `cpu` and `cuda` (whether an implementation is registered; None without torch) and `tables`,
    one entry for each GPU on which it was measured.
    """
    from blackwell_kernels import __version__

    return {
        "schema": SCHEMA,
        "version": __version__,
        "torch": find_spec("torch") is not None,
        "device": _device(),
        "ops": [_op(op, family) for op, family in env.HOOK_OPS.items()],
    }


def _op(op: str, family: str) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op, "family": family, "torch_ops": list(TORCH_OPS[op]), "cpu": None, "cuda": None}
    if find_spec("torch") is None:
        return {**row, "tables": []}
    return {**row, "cpu": _registered(op, "CPU"), "cuda": _registered(op, "CUDA"), "tables": _tables(family, op)}


def _registered(op: str, key: str) -> bool:
    import torch

    from blackwell_kernels import ops

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(hasattr(ops, name) and has_kernel(f"blackwell_kernels::{name}", key) for name in TORCH_OPS[op])


def _tables(family: str, op: str) -> list[dict[str, Any]]:
    from blackwell_kernels.common import tables

    found = []
    for path in sorted((tables.ROOT / family / "configs").glob(f"*/{op}.json")):
        table = tables.load(family, op, path.parent.name)
        if table is not None:
            provenance = table.provenance
            valid = [row for row in table.rows if row.kernels == tables.kernels_of(family)]
            ours = sum(row.use != "stock" for row in valid)
            found.append(
                {
                    "gpu": path.parent.name,
                    "date": provenance.date,
                    "rows": len(table.rows),
                    "ours": ours,
                    "outdated": len(table.rows) - len(valid),
                    "n": provenance.n,
                }
            )
    return found


def _device() -> dict[str, Any] | None:
    """The current CUDA device, or None."""
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from blackwell_kernels.common.arch import current_arch, gpu_slug

    name = torch.cuda.get_device_name()
    return {"name": name, "slug": gpu_slug(name), **asdict(current_arch())}


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    device = found["device"]
    lines = [f"blackwell-kernels {found['version']}"]
    if not found["torch"]:
        lines.append("torch is not installed, so no operator can be looked at: `make setup` in a clone installs it")
    elif device is None:
        lines.append("device: CPU (no CUDA device): every operator runs its CPU implementation")
    else:
        lines.append(f"device: {device['name']} (sm{device['sm']}, {device['sms']} multiprocessors)")
    lines += ["", *aligned([("operator", "CPU", "Triton", "measured on"), *map(_row, found["ops"])])]
    if device is not None and not any(t["gpu"] == device["slug"] for op in found["ops"] for t in op["tables"]):
        lines += ["", f"not measured on {device['slug']}: operators stay with stock unless {env.UNMEASURED.name}=1"]
    return "\n".join(lines)


def _row(op: dict[str, Any]) -> tuple[str, str, str, str]:
    measured = "; ".join(
        f"{t['gpu']} {t['date']} (ours in {t['ours']} of {t['rows']} rows"
        + (f", {t['outdated']} of them of kernels that changed since)" if t["outdated"] else ")")
        for t in op["tables"]
    )
    return op["op"], _yes(op["cpu"]), _yes(op["cuda"]), measured or "nothing yet"


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "?"}[value]
