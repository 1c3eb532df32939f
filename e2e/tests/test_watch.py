"""Sampling beside a load: rows as they happen, failures said, drift found."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackwell_kernels.e2e import watch

PAGE = (
    'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 2\n'
    'vllm:num_requests_waiting{engine="0"} 7\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'
)

BIG = 64 << 20


def test_rows_are_kept_as_they_are_sampled(tmp_path: Path) -> None:
    clock, path = itertools.count(10), tmp_path / "series.jsonl"
    pages: Iterator[str | Exception] = iter([PAGE, RuntimeError("too busy"), PAGE])

    def page() -> str:
        found = next(pages)
        if isinstance(found, Exception):
            raise found
        return found

    def memory() -> Mapping[str, Any]:
        return {"rss": 5}

    seen = watch.Watch(path, [watch.server_reader(page), memory], clock=lambda: float(next(clock)))
    for _ in range(3):
        seen.sample()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["time"] for row in rows] == [10.0, 11.0, 12.0]
    assert (rows[0]["running"], rows[0]["waiting"], rows[0]["kv_cache"]) == (5.0, 7.0, 0.5)
    assert rows[0]["generated"] is None, "not exported"
    assert rows[1] == {"kind": "watch", "time": 11.0, "missed": "RuntimeError: too busy", "rss": 5}
    assert watch.series(rows, "waiting").tolist() == [[10.0, 7.0], [12.0, 7.0]]
    assert watch.series(rows, "waiting", (11.5, 20.0)).tolist() == [[12.0, 7.0]]
    found = watch.summarise(rows, None, "not measured: no NVIDIA GPU")
    assert found["waiting"] == {"mean": 7.0, "max": 7.0}
    assert found["gpu_power"] == "not measured: no NVIDIA GPU"
    assert found["missed"] == 1


def test_the_thread_samples_and_ends(tmp_path: Path) -> None:
    with watch.Watch(tmp_path / "s.jsonl", [lambda: {"rss": 1}], every_s=0.01) as seen:
        while not (tmp_path / "s.jsonl").read_text().count("\n") >= 3:
            pass
    assert not seen._thread.is_alive()


def test_memory_is_a_process_s_own_or_pages_of_mapped_files(tmp_path: Path) -> None:
    read = watch.memory_reader(os.getpid())
    (tmp_path / "file").write_bytes(bytes(BIG))
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        before = read()
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            mapped = read()
        filled = bytes([1]) * BIG
        after = read()
    finally:
        child.kill()
        child.communicate()
    assert mapped["mapped_files"] - before["mapped_files"] == BIG, "a file that nobody has read yet counts as well"
    assert mapped["own_memory"] == pytest.approx(before["own_memory"], abs=BIG / 4)
    assert after["own_memory"] - mapped["own_memory"] == pytest.approx(len(filled), rel=0.25)
    each = before["processes"]
    assert {int(name.split("(")[-1][:-1]) for name in each} >= {os.getpid(), child.pid}
    assert sum(own for own, _ in each.values()) == before["own_memory"]
    assert sum(own + files for own, files in each.values()) == before["rss"]
    assert all(own > 0 and 0 < files < before["mapped_files"] for own, files in each.values())


def test_a_gpu_is_measured_or_the_reason_is_said() -> None:
    reader, why = watch.gpu_reader()
    if reader is None:
        assert why.startswith("not measured: ")
    else:
        assert reader()["gpu_memory"] > 0


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("echo '1024, 300.5'; echo '2048, 200'", {"gpu_memory": 3 << 30, "gpu_power": 500.5}),
        ("echo '1024, [N/A]'", {"gpu_memory": 1 << 30, "gpu_power": None}),
        ("echo 'No devices were found'; exit 6", "not measured: nvidia-smi: No devices were found"),
    ],
)
def test_nvidia_smi_tells_where_its_library_is_not_installed(
    printed: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{printed}\n')
    smi.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(watch.shutil, "which", lambda name: str(smi))
    reader, why = watch.gpu_reader("1,0")
    assert (reader() if reader else why) == expected
    assert watch.gpu_memory_gib("1,0") == (expected["gpu_memory"] / 2**30 if isinstance(expected, dict) else None)
    assert "--id=1,0" in (tmp_path / "asked").read_text()
    monkeypatch.setattr(watch.shutil, "which", lambda name: None)
    assert watch.gpu_reader() == (None, "not measured: neither nvidia-ml-py nor nvidia-smi is installed")


@pytest.mark.parametrize("per_hour", [0.0, 50.0, -20.0])
def test_drift_is_the_slope_whatever_single_points_do(per_hour: float) -> None:
    t = np.linspace(0, 3600, 300)
    y = 1000 + per_hour * t / 3600
    y[::17] += 400  # spikes
    found = watch.flatness(np.column_stack([t, y]))
    assert found is not None
    assert found["per_hour"] == pytest.approx(per_hour, abs=1)
    assert found["drift"] == pytest.approx(per_hour / 1000, abs=0.002)
    assert watch.flatness(np.column_stack([t, y])[:7]) is None
