"""A JSONL file that loses nothing: lines are whole or absent, and what a full disk refuses is kept and tried again.

Standard library only: the Locust file runs where the project is not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


class RecordFile:
    """Appends one JSON object a line, unbuffered. Safe to share between greenlets and threads of one process.

    A write that fails (disk full, quota, a folder that went away) leaves the file as it was before the line; the line
    waits in memory and is written in order with the next. `close` tries once more, then puts what is left into the
    temporary directory and says where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[bytes] = []
        self.problem: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; never raises for want of space."""
        self.waiting.append(json.dumps(row).encode() + b"\n")
        self._flush()

    def close(self) -> Path | None:
        """Write what waits and close; the file that holds what this one could not take, or None. Safe to call again."""
        if self._file < 0:
            return None
        self._flush()
        os.close(self._file)
        self._file = -1
        if not self.waiting:
            return None
        with tempfile.NamedTemporaryFile("wb", prefix=f"{self.path.stem}-", suffix=".jsonl", delete=False) as rest:
            rest.write(b"".join(self.waiting))
        print(
            f"{self.path}: {self.problem}; its last {len(self.waiting)} rows are in {rest.name}: "
            f"free some space, then append them",
            file=sys.stderr,
        )
        return Path(rest.name)

    def _flush(self) -> None:
        while self.waiting and self._file >= 0:
            line = self.waiting[0]
            try:
                written = os.write(self._file, line)
            except OSError as error:
                written, reason = 0, error.strerror or str(error)
            else:
                reason = "no space for a whole line"
            if written == len(line):
                self.waiting.pop(0)
                continue
            if written:  # half a line: take it back
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            if self.problem is None:
                print(f"cannot write {self.path}: {reason}; records are kept in memory", file=sys.stderr)
            self.problem = reason
            return
        if not self.waiting and self.problem and self._file >= 0:
            self.problem = None
