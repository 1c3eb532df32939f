"""How exact a server is: log-probabilities of given tokens, and greedy answers, against transformers' own.

The reference is `reference.Reference`: the same checkpoint, dequantised, float32, on the CPU. Both sides score the
same tokens, so one early difference cannot make the rest incomparable.
"""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e.server import SERVED_NAME
from blackwell_kernels.errors import ServerError

LENGTHS = (200, 60, 7)
GREEDY_TOKENS = 16
# Mean |Δ log p| over the tokens of all prompts that still counts as the same model. The served model computes in bf16
# with FP8 inputs and picks experts and keys by comparisons that rounding can tip; the tiny models feel each flip.
TOLERANCE = 0.2


def prompts(vocab: int, lengths: Sequence[int] = LENGTHS, seed: int = 1, first: int = 3) -> list[list[int]]:
    """Seeded prompts of the given lengths, as token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(first, vocab) for _ in range(n)] for n in lengths]


def complete(base_url: str, prompt: Sequence[int], timeout: float = 300.0, **options: Any) -> dict[str, Any]:
    """One non-streamed greedy completion of token ids; the first choice of the reply. Raises ServerError."""
    body = {"model": SERVED_NAME, "prompt": list(prompt), "temperature": 0, "ignore_eos": True, **options}
    request = urllib.request.Request(
        f"{base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)["choices"][0]
    except urllib.error.HTTPError as error:
        raise ServerError(f"the server refused a completion: HTTP {error.code}: {error.read(300).decode()}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"no answer to a completion from {base_url}: {error}") from error


def score(base_url: str, prompt: Sequence[int], tokens: int = GREEDY_TOKENS) -> dict[str, Any]:
    """Greedy tokens and log p of prompt[1:] followed by those tokens, as the server sees them."""
    choice = complete(base_url, prompt, max_tokens=tokens, prompt_logprobs=0, logprobs=0, return_token_ids=True)
    of_prompt = [
        row[str(token)]["logprob"] for token, row in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    return {"tokens": choice["token_ids"], "log_probs": of_prompt + choice["logprobs"]["token_logprobs"]}


def check(base_url: str, checkpoint: Path, vocab: int, *, cuda: bool = False) -> dict[str, Any]:
    """Compare the server with transformers on a few prompts: rows per prompt, the mean over all tokens, a verdict."""
    from blackwell_kernels.e2e.reference import Reference, differences

    served = [(prompt, score(base_url, prompt)) for prompt in prompts(vocab)]
    reference = Reference(checkpoint, inputs="all" if cuda else "experts")
    rows, expected, got = [], [], []
    for prompt, answer in served:
        ours = answer["log_probs"]
        theirs = reference.log_probs([*prompt, *answer["tokens"]]).tolist()
        rows.append({"prompt": len(prompt), "generated": len(answer["tokens"]), **differences(theirs, ours)})
        expected += theirs
        got += ours
    overall = differences(expected, got)
    return {
        "against": "transformers, float32 on the CPU, weights dequantised, FP8 rounding of inputs repeated",
        "rows": rows,
        "overall": overall,
        "tolerance": TOLERANCE,
        "passed": overall["mean"] <= TOLERANCE,
    }
