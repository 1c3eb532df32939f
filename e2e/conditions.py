"""Under what conditions a comparison ran: its traffic, and back ends that vLLM may not have chosen by itself."""

from __future__ import annotations

import re
from typing import Any

from blackwell_kernels.e2e import report

STEADY = 1.25  # times the sessions that ran when a load point began, at its end, at most
_GDN = "--gdn-prefill-backend flashinfer"


def traffic(result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and rows: what was asked of each arm at each load point. Results of before have no rows."""
    return (
        "What was asked: tokens of a turn, p50 and p90; what ran when a load point began and ended",
        ["sessions/s", "run", "arm", "turns", "prompt", "", "of it new", "", "answer", "", "sessions", "requests"],
        [_row(p) for p in result["points"] if "traffic" in p["summary"]],
    )


def _row(p: dict[str, Any]) -> list[str]:
    seen = p["summary"]["traffic"]
    kinds = (seen["prompt_tokens"], seen["fresh_tokens"], seen["answer_tokens"])
    tokens = ["–" if of.get(q) is None else f"{of[q]:,.0f}" for of in kinds for q in ("p50", "p90")]
    ran = [" → ".join(map(report.number, seen[what])) for what in ("sessions_at", "requests_at")]
    return [f"{p['rate']:g}", str(p["run"]), p["arm"], str(p["summary"]["requests"]), *tokens, *ran]


def unsteady(result: dict[str, Any]) -> list[str]:
    """The load point whose number of sessions grew most, if one's did."""
    found = [(p, *p["summary"]["traffic"]["sessions_at"]) for p in result["points"] if "traffic" in p["summary"]]
    grown = [row for row in found if row[2] > STEADY * row[1] + 1]
    if not grown:
        return []
    p, begin, end = max(grown, key=lambda row: row[2] - row[1])
    return [
        f"The load was not steady: sessions outlast a load point, so that ever more of them ran in {len(grown)} of "
        f"{len(found)}, at most {begin} at the begin and {end} at the end ({p['arm']}, {p['rate']:g} sessions/s)."
    ]


def back_ends(settings: dict[str, Any]) -> list[str]:
    """What a reader must know of the serving settings: vLLM's own choice is another."""
    told = " ".join([settings["args"], *settings["only"].values()]).replace("=", " ")
    found = []
    if settings["backend"] == "cuda" and settings["model"] == "qwen3-next" and _GDN not in told:
        found.append("Stock's GDN prefill is vLLM's Triton one, not FlashInfer's, its choice on Hopper and the faster.")
    if dense := re.search(r"--linear-backend[= ](\w+)", settings["args"]):
        found.append(
            f"Dense FP8 layers ran by {dense[1]} in both arms, as asked for; vLLM's own choice may be another."
        )
    return found
