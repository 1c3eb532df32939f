"""How exact a server is: log-probabilities of given tokens, and greedy answers, against transformers' own.

The reference is `reference.Reference`: the same checkpoint, dequantised, on the CPU. Both sides score the same tokens,
so one early difference cannot make the rest incomparable.

What counts as the same model depends on what is served: FP8 inputs, routing and sparse attention turn bf16's rounding
into differences of log p that vary by platform, model and prompt. So the reference scores the tokens twice, in float32
and in bf16, and the server may be FACTOR times as far from the first as the second is. Prompts and answers are judged
apart, since operators for decode see the answers alone, which would drown among the prompts.
"""

from __future__ import annotations

import concurrent.futures
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from blackwell_kernels.e2e.server import SERVED_NAME
from blackwell_kernels.errors import ServerError

if TYPE_CHECKING:
    from blackwell_kernels.e2e.reference import Reference

LENGTHS = (200, 60, 7)
CHECK_TOKENS = 64  # of an answer that is checked: enough to average over, and to feel a state that goes wrong
# Half-way from the farthest that was right, 1.36, to the nearest that was wrong, 2.58: README.md has them.
FACTOR = 1.8
MIN_NOISE = 0.04  # without FP8, bf16 may tip no expert of the reference's, and one of the server's


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


def score(base_url: str, prompt: Sequence[int], tokens: int, *, forced: int | None = None) -> dict[str, Any]:
    """Tokens and log p of prompt[1:] followed by those tokens, as the server sees them.

    The tokens are greedy, or every one is `forced`; log p are the model's own then too.
    """
    only: dict[str, Any] = {} if forced is None else {"allowed_token_ids": [forced]}
    choice = complete(base_url, prompt, max_tokens=tokens, prompt_logprobs=0, logprobs=0, return_token_ids=True, **only)
    of_prompt = [
        row[str(token)]["logprob"] for token, row in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    return {"tokens": choice["token_ids"], "log_probs": of_prompt + choice["logprobs"]["token_logprobs"]}


def check(base_url: str, references: References, vocab: int) -> dict[str, Any]:
    """Compare the server with transformers on a few prompts: `verdict` of what all three say, and who took how long."""
    clock = [time.monotonic()]
    answers = [(prompt, score(base_url, prompt, CHECK_TOKENS)) for prompt in prompts(vocab)]
    clock.append(time.monotonic())
    exact, rounded = references.log_probs([[*prompt, *answer["tokens"]] for prompt, answer in answers])
    clock.append(time.monotonic())
    served = [np.asarray(answer["log_probs"]) for _, answer in answers]
    took = dict(zip(("the server", "transformers"), np.diff(clock).round(2).tolist(), strict=True))
    took["loading it"] = references.load_s
    return {**verdict([len(prompt) for prompt, _ in answers], served, exact, rounded), "seconds": took}


class References:
    """transformers' model in float32 and in bf16, loaded in a thread while the server that it judges starts.

    All of it computes in that one thread. A small model is thousands of small steps, and threads that meet after each
    wait for the one that a busy host took a core from: on 32 cores beside servers this took two minutes; one thread of
    an idle core needs five seconds.
    """

    def __init__(self, checkpoint: Path, *, cuda: bool = False) -> None:
        self.load_s: float | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._loaded = self._pool.submit(self._load, checkpoint, "all" if cuda else "experts")

    def _load(self, checkpoint: Path, inputs: Literal["all", "experts"]) -> list[Reference]:
        start = time.monotonic()
        import torch

        from blackwell_kernels.e2e.reference import Reference

        torch.set_num_threads(1)  # of this thread and those made from here on
        made = [Reference(checkpoint, inputs=inputs, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        self.load_s = round(time.monotonic() - start, 2)
        return made

    def log_probs(self, texts: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
        """log p of every text's tokens but the first, by each model. Raises what loading raised."""
        return self._pool.submit(
            lambda: [[reference.log_probs(text) for text in texts] for reference in self._loaded.result()]
        ).result()

    def __enter__(self) -> References:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def verdict(
    lengths: Sequence[int], served: Sequence[np.ndarray], exact: Sequence[np.ndarray], rounded: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Rows per prompt, per phase and overall, and whether both phases are within FACTOR of rounding.

    `lengths` are the prompts'; the rest are log p of each text's tokens but the first, by the server, the reference in
    float32 and the reference in bf16. Every row has `noise`, the mean |Δ log p| of the last two.
    """
    from blackwell_kernels.e2e.reference import differences

    def row(parts: Sequence[slice]) -> dict[str, Any]:
        def pick(texts: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([text[part] for text, part in zip(texts, parts, strict=True)])

        return {**differences(pick(exact), pick(served)), "noise": differences(pick(exact), pick(rounded))["mean"]}

    whole = slice(None)
    rows = []
    for i, n in enumerate(lengths):
        parts = [whole if j == i else slice(0) for j in range(len(lengths))]
        rows.append({"prompt": n, "generated": len(served[i]) - n + 1, **row(parts)})
    phases = {
        "prefill": row([slice(n - 1) for n in lengths]),
        "decode": row([slice(n - 1, None) for n in lengths]),
    }
    for phase in phases.values():
        # a reference that is no number measures nothing
        noise = max(phase["noise"], MIN_NOISE) if np.isfinite(phase["noise"]) else 0.0
        phase["ratio"] = phase["mean"] / noise if noise else float("inf")
    return {
        "against": "transformers, float32 on the CPU, weights dequantised, FP8 rounding of inputs repeated",
        "rows": rows,
        "phases": phases,
        "overall": row([whole] * len(lengths)),
        "factor": FACTOR,
        "passed": all(phase["ratio"] <= FACTOR for phase in phases.values()),
    }
