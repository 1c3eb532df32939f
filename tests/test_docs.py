"""The documents say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from blackwell_kernels import env, ops
from blackwell_kernels.__main__ import main  # noqa: F401  the command that the documents show exists

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MATRIX = (ROOT / "kernels" / "README.md").read_text()


def test_readme_lists_the_environment_variables_as_the_registry_has_them():
    shown = re.search(r"<!-- env:begin -->\n(.*)<!-- env:end -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == env.markdown_table(), "run: blackwell-kernels env --markdown, and paste it"


def test_the_support_matrix_has_every_operator():
    assert ops is torch.ops.blackwell_kernels
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("blackwell_kernels::")
    }
    named = set(re.findall(r"`((?:moe|dsa|gdn)_\w+)`", MATRIX))
    named |= {f"dsa_indexer_logits_{kind}" for kind in re.findall(r"`…_(\w+)`", MATRIX)}
    assert named == registered


PAGES = sorted(str(path.relative_to(ROOT)) for pattern in ("*.md", "*/*.md", "*/*/*.md") for path in ROOT.glob(pattern))


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith((".", "out/", "build/"))])
def test_links_and_paths_exist(page):
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / target).exists(), f"{page} links {target}"
    for path in re.findall(r"`((?:kernels|model_patches|microbench|plugin|e2e|requirements)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"
