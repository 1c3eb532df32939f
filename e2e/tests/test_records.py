"""Records survive a full disk, a killed load process and a torn line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from blackwell_kernels.e2e import metrics, records


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_there_when_write_returns(tmp_path: Path) -> None:
    file = records.RecordFile(tmp_path / "a" / "r.jsonl")
    for i in range(3):
        file.write({"i": i})
        assert lines(tmp_path / "a" / "r.jsonl")[-1] == {"i": i}
    assert file.close() is None
    assert file.close() is None


def test_a_full_disk_keeps_rows_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, room, write = tmp_path / "r.jsonl", [12], os.write

    def short(fd: int, data: bytes) -> int:
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        n = write(fd, data[: room[0]])
        room[0] -= n
        return n

    monkeypatch.setattr(records.os, "write", short)
    file = records.RecordFile(path)
    for i in range(4):
        file.write({"i": i})  # 9 bytes each
    assert lines(path) == [{"i": 0}], "no torn line"
    assert "cannot write" in capsys.readouterr().err
    room[0] = 1000
    file.write({"i": 4})
    assert lines(path) == [{"i": i} for i in range(5)]
    assert file.problem is None
    assert file.close() is None


def test_what_never_fits_is_put_aside_and_said_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records.tempfile, "tempdir", str(tmp_path))
    file = records.RecordFile(Path("/dev/full"))
    file.write({"i": 0})
    rest = file.close()
    assert rest is not None
    assert lines(rest) == [{"i": 0}]
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert str(rest) in message


def test_tokens_of_a_request_that_never_ended_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    about = {"session": 1, "turn": 0, "scheduled": 1.0, "sent": 1.0, "prompt_tokens": 5, "reusable_tokens": 0}
    cut = {"kind": metrics.CUT_OFF, "message": ""}
    rows = [
        {"kind": "partial", "id": "0.1", **about, "tokens": [1.5, 1.6], "end": None, "error": cut},
        {"kind": "partial", "id": "0.2", **about, "session": 2, "tokens": [1.7], "end": None, "error": cut},
        {"kind": "partial", "id": "0.1", "tokens": [2.5]},
        {"kind": "request", "id": "0.2", **about, "session": 2, "tokens": [1.7, 1.8], "end": 1.8, "error": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, complaints = metrics.read_records([path])
    assert complaints == []
    assert {row["session"]: row["tokens"] for row in found} == {1: [1.5, 1.6, 2.5], 2: [1.7, 1.8]}
    figures = metrics.summarise(found)
    assert (figures["completed"], figures["unfinished"], figures["output_tokens"]) == (1, 1, 5)
