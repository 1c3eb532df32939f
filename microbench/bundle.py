"""Turns a function and everything it uses from this project into one self-contained module text.

FlashInfer-Bench carries a reference as text. Copying it by hand would be a second source of truth, so the text is
generated: start from one function, follow the names it uses through `from blackwell_kernels... import` statements and
module-level definitions, and emit what was reached, dependencies first.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PROJECT = "blackwell_kernels"


@dataclass
class _Module:
    name: str
    source: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # local name -> (module, name) of this project
    externals: dict[str, str] = field(default_factory=dict)  # local name -> import statement of another package


@cache
def _load(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"no source for module {name}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    module = _Module(name, source)
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=defined) | ast.ClassDef(name=defined):
                module.definitions[defined] = node
            case ast.Assign(targets=targets):
                for target in ast.walk(ast.Module(body=list(targets), type_ignores=[])):  # type: ignore[arg-type]
                    if isinstance(target, ast.Name):
                        module.definitions[target.id] = node
            case ast.AnnAssign(target=ast.Name(id=defined)):
                module.definitions[defined] = node
            case ast.ImportFrom(module=origin, names=aliases) if (origin or "").split(".")[0] == PROJECT:
                for alias in aliases:
                    module.imports[alias.asname or alias.name] = (str(origin), alias.name)
            case ast.ImportFrom(module="__future__"):
                pass
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    module.externals[(alias.asname or alias.name).split(".")[0]] = ast.unparse(node)
    return module


def _text(module: _Module, node: ast.stmt) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = decorators[0].lineno if decorators else node.lineno
    return "\n".join(module.source.splitlines()[first - 1 : node.end_lineno])


def bundle(module: str, function: str, *, entry: str = "run") -> str:
    """Text of a module that defines `function` of `module` under the name `entry`, and all it depends on.

    Raises: ValueError when two reached definitions share a name, or a project module (not a name in it) is used.
    """
    imports: set[str] = set()
    emitted: dict[str, tuple[str, str]] = {}  # name -> (module, text), in order of emission
    visiting: set[tuple[str, str]] = set()

    def visit(origin: str, name: str) -> None:
        if (origin, name) in visiting:
            return
        visiting.add((origin, name))
        source = _load(origin)
        node = source.definitions[name]
        for child in ast.walk(node):
            if not isinstance(child, ast.Name) or child.id == name:
                continue
            if child.id in source.externals:
                imports.add(source.externals[child.id])
            elif child.id in source.imports:
                target, original = source.imports[child.id]
                if original != child.id or original not in _load(target).definitions:
                    raise ValueError(f"{origin}.{name} uses {child.id}: import functions by their own name to bundle")
                visit(target, original)
            elif child.id in source.definitions:
                visit(origin, child.id)
        if name in emitted and emitted[name][0] != origin:
            raise ValueError(f"{name} is defined in both {emitted[name][0]} and {origin}: rename one to bundle them")
        emitted[name] = (origin, _text(source, node))

    visit(module, function)
    text = emitted.pop(function)[1]
    head = f"def {function}("
    if not text.startswith(head):
        raise ValueError(f"{module}.{function} is not a plain function")
    # an assignment to several names was reached once for each
    body = [*dict.fromkeys(item for _, item in emitted.values()), f"def {entry}(" + text.removeprefix(head)]
    # annotations stay text, as in the sources
    return (
        "\n".join(["from __future__ import annotations", "", *sorted(imports)]) + "\n\n\n" + "\n\n\n".join(body) + "\n"
    )
