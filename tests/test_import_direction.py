"""Imports point one way, nothing heavy is imported early, and this test notices when that is broken."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "blackwell_kernels"
FAMILIES = frozenset({"moe", "dsa", "gdn"})
KERNELS = FAMILIES | {"common"}
LEAVES = frozenset({"errors", "env"})
HEAVY = frozenset({"torch", "triton", "vllm"})


@dataclass(frozen=True)
class Layer:
    """What a part of the tree may import of the project, and which packages it must not.

    uses: at any time, besides itself and the leaves. later: only inside functions. not_early: packages that are not
    to be imported with the module; never: nor later. With `by_entry`, early is only what importing a package or
    running it with `python -m` brings in: all that a module imports which is itself imported late counts as later.
    """

    uses: frozenset[str] = frozenset()
    later: frozenset[str] = frozenset()
    not_early: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset({"vllm"})
    by_entry: bool = False


# "" is plugin/__init__.py, "plugin" its other modules; "testing" is common/testing, "peers" microbench/peers*.py,
# "cases" the modules of a family that serve its tests and benchmarks and no operator
LAYERS = {
    "": Layer(later=KERNELS | {"plugin"}, not_early=HEAVY | {"pydantic", "rich", "typer"}),
    "errors": Layer(never=HEAVY),
    "env": Layer(never=HEAVY),
    "plugin": Layer(
        uses=frozenset({""}),
        later=KERNELS | {"model_patches", "microbench", "e2e"},
        not_early=HEAVY,
        never=frozenset(),
        by_entry=True,
    ),
    "common": Layer(not_early=frozenset({"triton"})),
    "testing": Layer(uses=frozenset({"common"})),
    "moe": Layer(uses=frozenset({"common"})),
    "dsa": Layer(uses=frozenset({"common"})),
    "gdn": Layer(uses=frozenset({"common"})),
    "cases": Layer(uses=KERNELS | {"testing"}),
    "model_patches": Layer(
        uses=KERNELS | {"", "plugin"}, not_early=frozenset({"vllm"}), never=frozenset(), by_entry=True
    ),
    "microbench": Layer(uses=KERNELS | {"testing", "cases", "", "plugin", "peers"}),
    # vLLM's own kernels are what ours are measured against
    "peers": Layer(uses=KERNELS | {"testing", "cases", "microbench"}, not_early=frozenset({"vllm"}), never=frozenset()),
    # it drives vLLM, over HTTP and for comparisons in one process, and takes no kernel from here
    "e2e": Layer(uses=frozenset({""}), later=frozenset({"plugin"}), not_early=frozenset({"vllm"}), never=frozenset()),
}
FOLDERS = {
    "plugin": "plugin",
    "kernels/common/testing": "testing",
    "kernels/common": "common",
    "kernels/moe": "moe",
    "kernels/dsa": "dsa",
    "kernels/gdn": "gdn",
    "model_patches": "model_patches",
    "microbench": "microbench",
    "e2e": "e2e",
}


@dataclass(frozen=True)
class Import:
    """One import: the module, its line, and whether importing the file imports it."""

    module: str
    line: int
    early: bool


def violations(root: Path) -> list[str]:
    """Every import in the tree that its layer forbids, as `file:line: what`."""
    files = {}
    for path in sorted(p for top in {folder.split("/")[0] for folder in FOLDERS} for p in (root / top).rglob("*.py")):
        relative = path.relative_to(root)
        if layer_of(relative) is not None:
            files[relative] = list(imports(ast.parse(path.read_text()), _package_of(relative)))
    entered = _entered(files)
    return [
        f"{relative}:{line}: {what}"
        for relative, found in files.items()
        for line, what in _violations_in(relative, found, relative in entered)
    ]


def layer_of(relative: Path) -> str | None:
    """The layer of a source file; None for tests and what is outside the packages."""
    if "tests" in relative.parts or relative.name == "conftest.py" or relative.name.startswith("test_"):
        return None
    name = relative.as_posix()
    for folder, layer in FOLDERS.items():
        if name.startswith(folder + "/"):
            if layer == "plugin":
                return {"__init__": "", "errors": "errors", "env": "env"}.get(relative.stem, layer)
            return _part(layer, relative.stem)
    return None


def _part(layer: str, stem: str) -> str:
    if layer == "microbench" and stem.startswith("peers"):
        return "peers"
    return "cases" if layer in FAMILIES and stem in {"aot", "inputs", "oracles", "testing"} else layer


def _entered(files: dict[Path, list[Import]]) -> set[Path]:
    """The files that importing one of the packages, or running one with `python -m`, executes."""
    by_module = {_module_of(relative): relative for relative in files}
    entered: set[Path] = set()
    pending = [relative for relative in files if relative.stem in {"__init__", "__main__"}]
    while pending:
        relative = pending.pop()
        if relative not in entered:
            entered.add(relative)
            pending += [by_module[i.module] for i in files[relative] if i.early and i.module in by_module]
    return entered


def _violations_in(relative: Path, found: list[Import], entered: bool) -> Iterator[tuple[int, str]]:
    name = layer_of(relative) or ""
    layer = LAYERS[name]
    uses = layer.uses | {name} | LEAVES
    for i in found:
        early = i.early and (entered or not layer.by_entry)
        top, when = i.module.partition(".")[0], "while it is imported" if early else "at all"
        if top == PACKAGE:
            allowed = _layer_of_module(i.module) in (uses if early else uses | layer.later)
        elif top in {"kernels", "plugin", "model_patches", "microbench", "e2e"}:
            allowed, when = False, f"from a folder: import {PACKAGE}.…"
        else:
            allowed = top not in layer.never and not (early and top in layer.not_early)
        if not allowed:
            yield i.line, f"{name or 'plugin/__init__'} may not import {i.module} {when}"


def _layer_of_module(module: str) -> str:
    parts = module.split(".")[1:]
    if parts[:2] == ["common", "testing"]:
        return "testing"
    # `from blackwell_kernels import __version__, ops, register` is the plugin's own face
    if not parts or parts[0] in {"__version__", "ops", "register"}:
        return ""
    return _part(parts[0], "".join(parts[1:2])) if parts[0] in LAYERS else "plugin"


def _module_of(relative: Path) -> str:
    package = _package_of(relative)
    return package if relative.stem == "__init__" else f"{package}.{relative.stem}"


def _package_of(relative: Path) -> str:
    """The package a file belongs to, for its relative imports."""
    folder = relative.parent.as_posix()
    return ".".join([PACKAGE, *folder.removeprefix("kernels/").split("/")]) if folder != "plugin" else PACKAGE


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """Every import of a file, those for type checkers left out."""
    yield from _walk(tree, package, early=True)


def _walk(node: ast.AST, package: str, *, early: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, early) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], base]))
        if base != PACKAGE:
            yield Import(base, node.lineno, early)
        if base.partition(".")[0] == PACKAGE:
            # what is imported from one of our packages may be a module
            yield from (Import(f"{base}.{alias.name}", node.lineno, early) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (Import(str(a.value), node.lineno, early) for a in node.args if isinstance(a, ast.Constant))
    inside = early and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, early=inside)


def test_the_tree_obeys():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_the_tree_was_read():
    layers = {layer_of(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert set(LAYERS) <= layers


@pytest.mark.parametrize(
    ("file", "source", "forbidden"),
    [
        ("plugin/__init__.py", "import torch", "torch"),
        ("plugin/__init__.py", "from blackwell_kernels import select", "blackwell_kernels.select"),
        ("plugin/__init__.py", "def f():\n    from blackwell_kernels import select", None),
        ("plugin/errors.py", "def f():\n    import torch", "torch"),
        ("plugin/__main__.py", "class C:\n    import torch", "torch"),
        ("plugin/__main__.py", "from blackwell_kernels.gdn import op", "blackwell_kernels.gdn"),
        ("plugin/warmup.py", "from blackwell_kernels.gdn import op", None),
        ("plugin/warmup.py", "from blackwell_kernels.common.testing import poison", "common.testing"),
        ("plugin/select.py", "def f():\n    from blackwell_kernels.gdn import op", None),
        ("plugin/flag.py", "def f():\n    import vllm.engine", None),
        ("kernels/common/tables.py", "from blackwell_kernels.moe import config", "blackwell_kernels.moe"),
        ("kernels/common/tables.py", "from ..moe import config", "blackwell_kernels.moe"),
        ("kernels/common/tables.py", "from . import arch", None),
        ("kernels/common/tables.py", "from blackwell_kernels.common.testing import poison", "common.testing"),
        ("kernels/common/tables.py", "from blackwell_kernels.common import testing", "common.testing"),
        ("kernels/common/arch.py", "try:\n    import triton\nexcept ImportError:\n    pass", "triton"),
        ("kernels/moe/op.py", "from blackwell_kernels.errors import TableError", None),
        ("kernels/moe/op.py", "def f():\n    from blackwell_kernels.dsa import op", "blackwell_kernels.dsa"),
        ("kernels/moe/op.py", "def f():\n    import vllm", "vllm"),
        ("kernels/moe/op.py", "from blackwell_kernels.common.testing import poison", "common.testing"),
        ("kernels/moe/aot.py", "from blackwell_kernels.common.testing.gates import AotCase", None),
        ("kernels/moe/inputs.py", "from blackwell_kernels.common.testing import generators", None),
        ("kernels/moe/op.py", "from blackwell_kernels.moe import inputs", "moe.inputs"),
        ("kernels/moe/op.py", "from .inputs import tokens", "moe.inputs"),
        ("kernels/moe/tests/test_op.py", "import vllm", None),
        ("kernels/gdn/op.py", "from blackwell_kernels import select", "blackwell_kernels.select"),
        ("kernels/gdn/op.py", "from kernels.gdn import reference", "kernels.gdn"),
        ("model_patches/gdn.py", "from blackwell_kernels.select import policy", None),
        ("model_patches/__init__.py", "import vllm", "vllm"),
        ("model_patches/__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm", None),
        ("microbench/runner.py", "def f():\n    import importlib\n    importlib.import_module('vllm.x')", "vllm.x"),
        ("microbench/peers_moe.py", "import vllm", "vllm"),
        ("microbench/peers_moe.py", "def f():\n    import vllm", None),
        ("e2e/server.py", "def f():\n    from blackwell_kernels.gdn import op", "blackwell_kernels.gdn"),
        ("e2e/server.py", "from blackwell_kernels import __version__", None),
        ("e2e/engine.py", "import vllm", "vllm"),
        ("e2e/engine.py", "def f():\n    import vllm", None),
    ],
)
def test_a_wrong_import_is_found_and_a_right_one_is_not(tmp_path, file, source, forbidden):
    plant(tmp_path, {file: source})
    found = violations(tmp_path)
    assert bool(found) == (forbidden is not None), found
    if forbidden is not None:
        assert found[0].startswith(f"{file}:")
        assert forbidden in found[0]


@pytest.mark.parametrize(
    ("importer", "found"),
    [
        ("def f():\n    from blackwell_kernels.model_patches import backend", False),
        ("from blackwell_kernels.model_patches import backend", True),
        ("from . import backend", True),
        ("from .hooks import x", True),
    ],
)
def test_a_module_with_vllm_classes_must_be_imported_late(tmp_path, importer, found):
    plant(
        tmp_path,
        {
            "model_patches/__init__.py": importer,
            "model_patches/hooks.py": "from blackwell_kernels.model_patches.backend import Backend",
            "model_patches/backend.py": "from vllm import Backend",
        },
    )
    what = "model_patches/backend.py:1: model_patches may not import vllm while it is imported"
    assert violations(tmp_path) == ([what] if found else [])


def plant(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source + "\n")


def loaded_after(statement: str, *, without: tuple[str, ...] = ()) -> dict[str, bool]:
    """Which packages a fresh interpreter holds after a statement, with some made impossible to import."""
    code = (
        f"import json, sys\nfor name in {without!r}: sys.modules[name] = None\n{statement}\n"
        "tops = {name.partition('.')[0] for name, module in sys.modules.items() if module is not None}\n"
        "cuda = 'torch' in tops and sys.modules['torch'].cuda.is_initialized()\n"
        "print(json.dumps({**{name: True for name in tops - sys.stdlib_module_names}, 'cuda started': cuda}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_plugin_itself_needs_the_standard_library_alone():
    before, after = loaded_after("pass"), loaded_after(f"import {PACKAGE}")
    assert after.keys() - before.keys() == {PACKAGE}


@pytest.mark.parametrize("module", ["common.arch", "common.tables", "moe", "dsa", "gdn"])
def test_operators_import_without_triton_and_start_no_device(module):
    pytest.importorskip("torch")
    loaded = loaded_after(f"import {PACKAGE}.{module}", without=("triton", "vllm"))
    assert loaded["cuda started"] is False
    # torch itself imports triton where it can, so its absence shows only in a run without it: this one


@pytest.mark.parametrize("module", ["model_patches", "microbench", "e2e"])
def test_the_outer_packages_import_without_vllm(module):
    loaded = loaded_after(f"import {PACKAGE}.{module}", without=("vllm",))
    assert loaded["cuda started"] is False
