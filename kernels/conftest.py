"""Kernel tests run compiled where there is a CUDA device and in the repaired Triton interpreter elsewhere."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from blackwell_kernels.common.testing import interpreter

try:
    INTERPRETED = interpreter.enable()
    MODE = "interpreted on the CPU" if INTERPRETED else f"compiled for {torch.cuda.get_device_name()}"
except ImportError as error:
    MODE = f"not run: {error}"

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header() -> str:
    return f"triton kernels: {MODE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the CUDA device if there is one, else the CPU (interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
