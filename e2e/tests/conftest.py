"""A stand-in for vLLM's server, and a cache that belongs to this test run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture
def fake() -> list[str]:
    """The command that takes the place of `vllm`."""
    return [sys.executable, str(FAKE)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """XDG_CACHE_HOME for the whole run: checkpoints are built once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
