"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Launches as the driver would get them, without a GPU: see the module."""
    from blackwell_kernels.common.testing import launches

    yield from launches.launched(monkeypatch)
