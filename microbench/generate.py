"""Writes the FlashInfer-Bench files that are checked in, `definitions/` and `solutions/`, from the specs.

They are for FlashInfer-Bench and its users; this package reads its specs. A test compares the files with what this
module gives, so they cannot drift: `blackwell-kernels bench definitions --write` renews them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blackwell_kernels.microbench.bundle import bundle
from blackwell_kernels.microbench.implementations import OURS, Implementation, implementations
from blackwell_kernels.microbench.spec import Spec, dtype_of, shape_of
from blackwell_kernels.microbench.specs import SPECS

ROOT = Path(__file__).parent
AUTHOR = "blackwell-kernels"


def _tensor(text: str) -> dict[str, Any]:
    shape = shape_of(text)
    return {"shape": None if shape is None else list(shape), "dtype": dtype_of(text)}


def definition(spec: Spec) -> dict[str, Any]:
    """The FlashInfer-Bench definition of a spec, reference text included."""
    return {
        "name": spec.name,
        "op_type": spec.op,
        "description": spec.description,
        "tags": list(spec.tags) + [f"inplace:{source}" for source in spec.mutates.values()],
        "axes": {
            name: {"type": "var"} if value is None else {"type": "const", "value": value}
            for name, value in spec.axes.items()
        },
        "constraints": list(spec.constraints),
        "inputs": {name: _tensor(text) for name, text in spec.inputs.items()},
        "outputs": {name: _tensor(text) for name, text in spec.outputs.items()},
        "reference": bundle("blackwell_kernels.microbench.references", f"run_{spec.reference}"),
    }


def solution(item: Implementation) -> dict[str, Any]:
    """The FlashInfer-Bench solution of an implementation: a few lines that import an installed package."""
    source = (
        "from blackwell_kernels.microbench.implementations import find\n\n"
        f"run = find({item.definition!r}, {item.name!r}).run\n"
    )
    return {
        "name": f"{item.definition}__{item.name}",
        "definition": item.definition,
        "author": AUTHOR if item.name == OURS else item.name.split(".")[0],
        "description": "our operator" if item.name == OURS else f"{item.name}, prepared and run in each call",
        "spec": {
            "language": "python",
            "target_hardware": ["cuda", "cpu"] if item.name == OURS else ["cuda"],
            "entry_point": "main.py::run",
            "dependencies": list(item.packages),
            "destination_passing_style": False,
        },
        "sources": [{"path": "main.py", "content": source}],
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def files(specs: list[Spec] | None = None) -> dict[str, str]:
    """Relative path -> text of every generated file."""
    made = {}
    for spec in list(SPECS.values()) if specs is None else specs:
        made[f"definitions/{spec.op}/{spec.name}.json"] = _json(definition(spec))
        for item in implementations(spec.name):
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{spec.name}__{item.name}").strip("_")
            made[f"solutions/{spec.op}/{name}.json"] = _json(solution(item))
    return made


def stale(root: Path = ROOT) -> list[str]:
    """Files that differ from what is generated, are missing, or should not be there."""
    wanted = files()
    there = {str(p.relative_to(root)) for kind in ("definitions", "solutions") for p in (root / kind).rglob("*.json")}
    changed = [name for name in wanted if name in there and (root / name).read_text(encoding="utf-8") != wanted[name]]
    return sorted({*changed, *(there ^ wanted.keys())})


def write(root: Path = ROOT) -> list[str]:
    """Renew all files, remove those that are no longer generated; returns what changed."""
    changed, wanted = stale(root), files()
    for name in changed:
        path = root / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    return changed
