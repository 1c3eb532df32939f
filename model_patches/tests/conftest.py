"""Released vLLM sources for the tests, read and never imported.

RELEASED_VLLM_SOURCES names a folder that holds vllm-0.24.0/, vllm-0.32.0/ and vllm-0.33.0/, each with the
package folder vllm/ in it; `python model_patches/tests/fetch_sources.py FOLDER` makes it.
"""

from __future__ import annotations
import __future__

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VERSIONS = ("0.24.0", "0.32.0", "0.33.0")
VARIABLE = "RELEASED_VLLM_SOURCES"


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder of released sources."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} is not set: python model_patches/tests/fetch_sources.py FOLDER, then set it to FOLDER")
    missing = [version for version in VERSIONS if not Path(folder, f"vllm-{version}", "vllm").is_dir()]
    assert not missing, f"{VARIABLE}={folder} lacks vLLM {', '.join(missing)}: run fetch_sources.py again"
    return Path(folder)


@pytest.fixture
def extract() -> Callable[..., dict[str, Any]]:
    """See `_extract`."""
    return _extract


def _extract(path: Path, wanted: dict[str, list[str] | None], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run chosen definitions of a source file in `namespace`, which stands in for everything that it imports.

    `wanted` maps a function or class to None, or a class to the methods to keep; decorators and bases are dropped,
    except `dataclass`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body: list[ast.stmt] = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in wanted:
            continue
        node.decorator_list = [d for d in node.decorator_list if "dataclass" in ast.unparse(d)]
        methods = wanted[node.name]
        if isinstance(node, ast.ClassDef):
            node.bases = []
            if methods is not None:
                node.body = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in methods]
                assert len(node.body) == len(methods), f"{path} {node.name} lacks one of {methods}"
        body.append(node)
    assert len(body) == len(wanted), f"{path} lacks one of {list(wanted)}"
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(body, []), str(path), "exec", flags=flags), namespace)
    return namespace
