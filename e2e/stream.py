"""One streamed completion, read into its record: the time of every token. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

CUT_OFF = "unfinished"  # a request still running when the load ended: no error of the server
LEAD_S = 1.0  # from the load generator's start to the first arrival: users are spawned meanwhile
PARTIAL_S = 1.0  # of token times that are at risk when the load process is killed


class Refused(Exception):
    """The server said no, or gave up in the middle of an answer."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def collect(
    lines: Iterable[bytes],
    row: dict[str, Any],
    *,
    clock: Callable[[], float],
    keep: Callable[[dict[str, Any]], None],
    abort_after: int | None = None,
) -> None:
    """Read a stream of server-sent events into `row`: the time of every token, the usage.

    Once a second what came since is given to `keep` as a row of its own. Returns early, with row["aborted"] set, after
    `abort_after` tokens. Raises Refused for an error in the stream, ValueError or KeyError for what is no completion.
    """
    kept, saved = 0, row["sent"]
    for line in lines:
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        arrived = round(clock(), 6)
        data = json.loads(line[6:])
        if "error" in data:
            raise Refused("error in the stream", str(data["error"]))
        if data.get("usage"):
            row["usage"] = data["usage"]
        for choice in data["choices"]:
            # a chunk is one token, unless the server says how many it carries
            row["tokens"] += [arrived] * len(choice.get("token_ids") or (0,))
        if abort_after is not None and len(row["tokens"]) >= abort_after:
            row["aborted"] = True
            return
        if arrived - saved >= PARTIAL_S:
            about = row if kept == 0 else {"id": row["id"]}
            keep({**about, "kind": "partial", "tokens": row["tokens"][kept:]})
            kept, saved = len(row["tokens"]), arrived


def wrong_length(row: dict[str, Any]) -> dict[str, str] | None:
    """The error of an answer that has not the tokens it was asked for."""
    got = row["usage"]["completion_tokens"] if row["usage"] else len(row["tokens"])
    if got == row["expected_tokens"]:
        return None
    return {"kind": "wrong length", "message": f"asked for {row['expected_tokens']} tokens, got {got}"}
