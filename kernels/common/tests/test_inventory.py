"""Kernels are told from their helpers, and a run of a family's tests that leaves one out fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blackwell_kernels.common.testing.interpreter import interpreting
from blackwell_kernels.common.testing.inventory import kernels

CONFTEST = Path(__file__).resolve().parents[2] / "conftest.py"
DEVICE = """
import triton

@triton.jit
def helper(x):
    return x

@triton.jit(do_not_specialize=["n"])
def first_kernel(x_ptr, n):
    helper(x_ptr)

@triton.jit
def second_kernel(x_ptr):
    pass
"""
TEST = """
import pathlib, sys, torch
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import device as kernels
import triton.language as tl
kernels.tl = tl

def test_first():
    kernels.first_kernel[(1,)](torch.zeros(1), 1)

def test_second():
    kernels.second_kernel[(1,)](torch.zeros(1))
"""


@pytest.fixture
def family(tmp_path) -> Path:
    folder = tmp_path / "kernels/toy"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(CONFTEST, tmp_path / "kernels")
    (folder / "device.py").write_text(DEVICE)
    (folder / "tests/test_toy.py").write_text(TEST)
    return folder


def test_kernels_are_told_from_helpers(family):
    assert kernels(family) == {"first_kernel", "second_kernel"}


def test_a_name_is_there_once(family):
    (family / "more.py").write_text("@triton.jit\ndef helper(): pass\n")
    with pytest.raises(ValueError, match="helper is there twice"):
        kernels(family)


@pytest.mark.skipif(not interpreting(), reason="only interpreted runs are checked")
@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_a_kernel_without_a_test_fails_the_run(family, workers):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, *workers, *arguments], cwd=family.parents[1], capture_output=True, text=True, env=clean
        )

    if workers:
        pytest.importorskip("xdist")
    whole = run("kernels")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    test = family / "tests/test_toy.py"
    # a part of the tests may leave kernels out
    assert run(str(test)).returncode == run("kernels", "-k", "first").returncode == 0
    test.write_text(test.read_text().split("def test_second")[0])
    left_out = run("kernels/toy")
    assert left_out.returncode == 1
    assert "kernels/toy: no test launched second_kernel" in left_out.stdout
