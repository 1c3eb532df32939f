"""Golden answers: greedy tokens of the tiny models as served with the plugin, kept in tests/golden with provenance.

Rounding differs between processors, and a model of random weights has near ties: a golden token binds only where its
lead over the runner-up was at least MARGIN, and only as far as everything before it agreed. Some processors round so
differently (AMX tiles) that such a lead is gone there: few answers may be near ties where they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e import checkpoints, demo, models, probe
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.equal import commit
from blackwell_kernels.e2e.processes import signals_stop
from blackwell_kernels.e2e.report import write_atomic
from blackwell_kernels.e2e.server import Server

FOLDER = Path(__file__).parent / "tests" / "golden"
MARGIN = 0.4  # log p; some five times what rounding moves it by on a processor of one kind
TIE, TIES = 0.1, 0.1  # a lead that is none; the share of answers that may have one in place of a token that binds
TOKENS = 6
LENGTHS = (5, 12, 20, 33, 48, 64, 65, 80, 100, 129, 150, 180, 7, 25, 90, 200)
KEPT = 24


def path(model: str) -> Path:
    """The golden file of a model."""
    return FOLDER / f"{models.canonical(model)}-fp8.json"


def serve(model: str, folder: Path, steps: Steps) -> Server:
    """A server of a tiny FP8 model with the plugin on the CPU, not started."""
    checkpoint = checkpoints.build(model, say=steps.say)
    return Server(checkpoint, folder, args=demo.server_args("cpu", models.canonical(model)))


def answer(base_url: str, prompt: Sequence[int]) -> dict[str, Any]:
    """Greedy tokens, their log p, and each one's lead over the runner-up."""
    choice = probe.complete(base_url, prompt, max_tokens=TOKENS, logprobs=2, return_token_ids=True)
    scores = choice["logprobs"]
    leads = []
    for own, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
        # several tokens may share a text, which is the key here: then the second is unknown and nothing binds
        others = sorted(top.values(), reverse=True)[1:]
        leads.append(round(own - others[0], 4) if others else 0.0)
    log_probs = [round(x, 4) for x in scores["token_logprobs"]]
    return {"prompt": list(prompt), "tokens": choice["token_ids"], "log_probs": log_probs, "leads": leads}


def binding(golden: dict[str, Any]) -> int:
    """How many tokens bind: those before the first near tie."""
    return next((i for i, lead in enumerate(golden["leads"]) if lead < MARGIN), len(golden["leads"]))


def disagreements(kept: Sequence[dict[str, Any]], got: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with answers to the golden prompts. After a near tie that went the other way nothing binds."""
    found = [_first_difference(*pair) for pair in zip(kept, got, strict=True)]
    wrong = [told for told in found if told]
    ties = [text for text, lead in wrong if lead < TIE]
    return [text for text, lead in wrong if lead >= TIE or len(ties) > TIES * len(kept)]


def _first_difference(golden: dict[str, Any], got: dict[str, Any]) -> tuple[str, float] | None:
    """(the first token that binds and is another, and the other one's lead)."""
    for i, (want, token) in enumerate(zip(golden["tokens"], got["tokens"], strict=True)):
        if want != token:
            lead, here = golden["leads"][i], got["leads"][i]
            if lead < MARGIN:
                return None
            where = f"token {i} after {len(golden['prompt'])} prompt tokens"
            return f"{where} is {token}, by {here}, not {want}, which led by {lead}", here
    return None


def write(model: str, folder: Path, steps: Steps) -> Path:
    """Serve a model, keep the answers that bind longest, and write them with provenance."""
    vocab = models.hf_config(model)["vocab_size"]
    with signals_stop(), serve(model, folder, steps) as server:
        server.wait_ready(steps)
        answers = [answer(server.base_url, prompt) for prompt in probe.prompts(vocab, LENGTHS * 12, seed=7)]
    answers.sort(key=binding, reverse=True)
    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": demo.versions(),
        "machine": demo.machine("cpu"),
        "checkpoint": checkpoints.build(model).name,
        "command": f"blackwell-kernels e2e golden --model {models.canonical(model)}",
    }
    target = path(model)
    rows = ",\n".join(json.dumps(row) for row in answers[:KEPT])
    write_atomic(target, f'{{"schema": 1,\n"provenance": {json.dumps(provenance)},\n"answers": [\n{rows}\n]}}\n')
    steps.say(f"{target}: {sum(binding(a) for a in answers[:KEPT])} binding tokens in {KEPT} answers")
    return target
