"""A few streamed completions at once, and the time of each token: for looking at a server, not for loading it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from blackwell_kernels.e2e import stream
from blackwell_kernels.e2e.server import SERVED_NAME
from blackwell_kernels.errors import ServerError

TOKENS = 512  # asked for; the streams are dropped long before


class Streams:
    """Requests of the given prompts (token ids) that decode until the block is left."""

    def __init__(self, base_url: str, prompts: Sequence[Sequence[int]], timeout: float = 300.0) -> None:
        self.base_url, self.timeout = base_url, timeout
        self.rows: list[dict[str, Any]] = [{"id": i, "tokens": [], "usage": None} for i in range(len(prompts))]
        self._errors: list[str] = []
        self._left = threading.Event()
        self._threads = [
            threading.Thread(target=self._read, args=(row, prompt), daemon=True, name="stream")
            for row, prompt in zip(self.rows, prompts, strict=True)
        ]

    def wait_tokens(self, n: int, since: float = 0.0) -> None:
        """Wait until every request has n tokens that came after `since`.

        Raises ServerError when one fails, ends before it has them, or brings none for long.
        """
        until = time.monotonic() + self.timeout
        while (fewest := self.fewest(since)) < n:
            if not self._errors and not all(thread.is_alive() for thread in self._threads) and self.fewest(since) < n:
                raise ServerError(f"a streamed completion ended after {fewest} of {n} tokens")
            if self._errors:
                raise ServerError(f"a streamed completion failed: {self._errors[0]}")
            if time.monotonic() > until:
                raise ServerError(f"{fewest} of {n} tokens after {self.timeout:.0f} s")
            time.sleep(0.002)

    def fewest(self, since: float = 0.0) -> int:
        """Tokens that came after `since`, of the request that has fewest."""
        return min(sum(t > since for t in list(row["tokens"])) for row in self.rows)

    def everyone_has(self, n: int) -> float:
        """When the last request got its n-th token."""
        return max(row["tokens"][n - 1] for row in self.rows)

    def first(self) -> float:
        """When the first token of the first request came."""
        return self.rows[0]["tokens"][0]

    def paces(self, since: float, block: int = 0) -> list[float]:
        """Seconds a token of each request takes from `since` on, (last − first) / (tokens − 1); of every `block` tokens
        of each request instead, where that is given.

        Tokens arrive in bursts where the reader or the server's front end is behind: the median gap between two is no
        step's time.
        """
        found = []
        for row in self.rows:
            times = [t for t in list(row["tokens"]) if t >= since]
            size = block or max(len(times) - 1, 1)
            found += [(times[i + size] - times[i]) / size for i in range(0, len(times) - size, size)]
        return found

    def _read(self, row: dict[str, Any], prompt: Sequence[int]) -> None:
        body = {"model": SERVED_NAME, "prompt": list(prompt), "max_tokens": TOKENS, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"{self.base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        row["sent"] = time.time()
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                stream.collect(self._lines(reply), row, clock=time.time, keep=lambda _: None)
        except urllib.error.HTTPError as error:
            self._errors.append(f"HTTP {error.code}: {error.read(300).decode(errors='replace')}")
        except (OSError, ValueError, KeyError, stream.Refused) as error:
            if not self._left.is_set():
                self._errors.append(f"{type(error).__name__}: {error}")

    def _lines(self, reply: Iterable[bytes]) -> Iterator[bytes]:
        for line in reply:
            if self._left.is_set():
                return
            yield line.strip()

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(30.0)
