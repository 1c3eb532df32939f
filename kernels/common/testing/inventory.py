"""Which kernels a family has, read from its source, so that tests can tell which of them nobody exercises."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def kernels(folder: Path) -> set[str]:
    """Names of the @triton.jit functions in a folder that no other one refers to: those are launched, or dead.

    Raises: ValueError when two have the same name, by which gates and tests know them.
    """
    functions = _jit_functions(folder)
    helpers = {name for f in functions.values() for name in _names(f) if name in functions and name != f.name}
    return functions.keys() - helpers


def _jit_functions(folder: Path) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                if node.name in found:
                    raise ValueError(f"{path}: a jit function {node.name} is there twice in {folder}; rename one")
                found[node.name] = node
    return found


def _names(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
