"""Requests that no server should choke on: malformed in every usual way, sent beside real traffic."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e.records import RecordFile
from blackwell_kernels.e2e.server import SERVED_NAME


def malformed(vocab: int, longest: int) -> dict[str, bytes]:
    """Bodies of /v1/completions that must be answered with HTTP 4xx, by what is wrong with them."""
    fine: dict[str, Any] = {"model": SERVED_NAME, "prompt": [3, 4, 5], "max_tokens": 4, "temperature": 0}

    def changed(**changes: Any) -> bytes:
        return json.dumps({**fine, **changes}).encode()

    return {
        "no JSON": b'{"model": "tiny", "prompt": [3, 4',
        "no prompt": json.dumps({"model": SERVED_NAME, "max_tokens": 4}).encode(),
        "unknown model": changed(model="no such model"),
        "negative max_tokens": changed(max_tokens=-1),
        "prompt of the wrong type": changed(prompt={"a": 1}),
        "token beyond the vocabulary": changed(prompt=[vocab + 100000]),
        "prompt longer than the context": changed(prompt=[3] * (longest + 1)),
    }


def longest(base_url: str, otherwise: int) -> int:
    """Tokens that the server says fit its context (vLLM does); `otherwise` when it does not say."""
    with urllib.request.urlopen(f"{base_url}/v1/models", timeout=60) as reply:
        return int(json.load(reply)["data"][0].get("max_model_len") or otherwise)


def send(base_url: str, name: str, body: bytes, timeout: float = 60.0) -> dict[str, Any]:
    """Send one malformed request: {kind, time, fault, status, passed, detail}. Refused as such is what passes."""
    request = urllib.request.Request(f"{base_url}/v1/completions", body, {"Content-Type": "application/json"})
    status: int | None
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            status, detail = reply.status, reply.read(200).decode(errors="replace")
    except urllib.error.HTTPError as error:
        status, detail = error.code, error.read(200).decode(errors="replace")
    except OSError as error:
        status, detail = None, str(error)
    passed = status is not None and 400 <= status < 500
    return {"kind": "fault", "time": time.time(), "fault": name, "status": status, "passed": passed, "detail": detail}


class Heckler:
    """Sends every kind of malformed request, again and again, from a thread until it is left."""

    def __init__(self, base_url: str, path: Path, bodies: dict[str, bytes], every_s: float) -> None:
        self.base_url, self.bodies, self.every_s = base_url, bodies, every_s
        self.file = RecordFile(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heckler")

    def round(self) -> list[dict[str, Any]]:
        """Send each once and keep what came back."""
        rows = [send(self.base_url, name, body) for name, body in self.bodies.items()]
        for row in rows:
            self.file.write(row)
        return rows

    def _run(self) -> None:
        while not self._stop.is_set():
            self.round()
            self._stop.wait(self.every_s)

    def __enter__(self) -> Heckler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(70.0)
        self.file.close()
