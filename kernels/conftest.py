"""Kernel tests run compiled where there is a CUDA device and in the repaired Triton interpreter elsewhere.

An interpreted run of all of a family's tests fails if one of its kernels was never launched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from blackwell_kernels.common import launch
from blackwell_kernels.common.testing import interpreter, inventory

HERE = Path(__file__).resolve().parent
LAUNCHED = pytest.StashKey[set[str]]()
# `-m sanitize`: small shapes that launch every kernel, for compute-sanitizer, under which every launch is slow
SANITIZED = {
    "dsa": ("test_indexer_insert_bit_exact", "test_gather_bit_exact", "test_kv_insert_bit_exact", "test_paged_lengths",
            "test_ragged_odd_ranges", "test_lengths_around_k", "test_list_lengths_and_splits", "test_hostile_indices"),
    "gdn": ("test_one_token_a_sequence", "test_fused_convolution_equals_the_separate_one", "test_speculative_windows",
            "test_programs_that_share_a_head", "test_lengths_around_the_chunk", "test_normalisation_inside",
            "test_segments", "test_ragged_sequences", "test_prepare_slices_of_wider_projections"),
    "moe": ("test_many_chunks", "test_the_kernel_quantises_as_torch_does_bit_for_bit", "test_tokens", "test_expert_map",
            "test_few_rows", "test_a_group_scores_by_its_two_best"),
}  # fmt: skip

try:
    INTERPRETED = interpreter.enable()
    MODE = "interpreted on the CPU" if INTERPRETED else f"compiled for {torch.cuda.get_device_name()}"
except ImportError as error:
    INTERPRETED = False
    MODE = f"not run: {error}"

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header() -> str:
    return f"triton kernels: {MODE}"


def pytest_configure(config: pytest.Config) -> None:
    # workers that each take every core for torch's CPU operators get in each other's way
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    config.stash[LAUNCHED] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, _, parameters = item.name.partition("[")
        if name in SANITIZED.get(item.path.parent.parent.name, ()) and "cpu" not in parameters:
            item.add_marker("sanitize")
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


@pytest.fixture(autouse=True)
def as_written() -> None:
    """Tests patch what operators look at besides their arguments."""
    launch.forget()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect from each of pytest-xdist's workers."""
    launched: list[str] = getattr(node, "workeroutput", {}).get("launched", [])
    node.config.stash[LAUNCHED].update(launched)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    launched = config.stash[LAUNCHED]
    launched.update(interpreter.launched())
    if hasattr(config, "workeroutput"):
        config.workeroutput["launched"] = sorted(launched)
    elif session.exitstatus == pytest.ExitCode.OK and never_launched(config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for family, names in never_launched(config).items():
        terminalreporter.write_line(f"kernels/{family}: no test launched {', '.join(names)}", red=True)


def never_launched(config: pytest.Config) -> dict[str, list[str]]:
    """Kernels by family that ran in no test, of the families all of whose tests were asked for and interpreted."""
    partial = config.option.keyword or config.option.markexpr not in ("", "sanitize")
    if not INTERPRETED or partial or config.option.collectonly:
        return {}
    asked = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    found = {}
    for folder in sorted(path.parent for path in HERE.glob("*/tests")):
        if any(folder.is_relative_to(path) for path in asked):
            missing = inventory.kernels(folder) - config.stash[LAUNCHED]
            if missing:
                found[folder.name] = sorted(missing)
    return found
