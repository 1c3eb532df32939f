"""Every test starts with a clean environment and a plugin that has done nothing yet."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from blackwell_kernels import activation, env, flag, import_hooks, status

# how long an example takes says how busy the host is
_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("plugin", deadline=None, derandomize=True, suppress_health_check=_SLOW)
hypothesis.settings.load_profile("plugin")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a forked child leaves its status directory behind
    for name in [name for name in os.environ if name.startswith("BLACKWELL_KERNEL") or name == "VLLM_PLUGINS"]:
        monkeypatch.delenv(name)
    # our own code writes these: setting and deleting makes monkeypatch take away what a test leaves behind
    ours = ("BLACKWELL_KERNELS", "BLACKWELL_KERNELS_RUN", "BLACKWELL_KERNELS_STATUS_DIR")
    for name in (*ours, "VLLM_PLUGINS", activation.RAY_PREFIXES):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(activation, "_activated", False)
    monkeypatch.setattr(activation, "_warned", False)
    monkeypatch.setattr(flag, "_installed", False)
    monkeypatch.setattr(import_hooks, "_waiting", {})
    status.reset()
    yield
    status.reset()


@pytest.fixture(scope="session")
def make_table() -> Callable[..., Any]:
    """A tuned table of an operator from rows of (case, tokens, "triton" or "stock")."""
    from blackwell_kernels.common import tables

    def make(op: str, rows: list[tuple[dict[str, Any], int, str]], gpu: str = "NVIDIA H200") -> tables.Table:
        provenance = {"gpu": gpu, "sm": 90, "n": 9, "date": "2025-01-01", "command": "test"}
        provenance |= dict.fromkeys(("driver", "torch", "triton", "vllm", "commit"), "1")
        listed = [
            tables.Row.model_validate(
                {"case": case, "tokens": tokens, "config": {}, "ours_us": 1.0, "stock_us": 1.0, "use": use}
                | {"kernels": tables.kernels_of(env.HOOK_OPS[op])}
            )
            for case, tokens, use in rows
        ]
        sorted_rows = [row.model_dump() for row in tables.sort_rows(listed)]
        return tables.Table.model_validate({"schema": 1, "op": op, "provenance": provenance, "rows": sorted_rows})

    return make


@pytest.fixture
def forked() -> Callable[[Callable[[], Any]], Any]:
    """Run a function in a forked child and return its JSON-able result: what it patches dies with it.

    A SystemExit comes back as {"exit": code, "stderr": text}; any other exception fails the test.
    """

    def run(function: Callable[[], Any]) -> Any:
        sys.stdout.flush()
        sys.stderr.flush()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            signal.alarm(300)  # a child that hangs dies and fails its test
            answer = _answer(function)
            with os.fdopen(write, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, code = os.waitpid(pid, 0)
        assert code == 0, f"the child died with wait status {code}"
        answer = json.loads(text)
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer["result"]

    return run


def _answer(function: Callable[[], Any]) -> dict[str, Any]:
    import contextlib
    import io

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return {"result": function()}
    except SystemExit as stop:
        return {"result": {"exit": stop.code, "stderr": errors.getvalue()}}
    except BaseException:
        return {"error": traceback.format_exc()}
