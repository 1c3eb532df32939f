"""Whether the two arms of a comparison serve the same model, told by log p of the same tokens.

Every start scores seeded prompts and a forced continuation of each (one token again and again, the only one allowed, so
that a first difference ends no comparison), twice: one request alone after the other, and all at once.
Requests in other company take other tiles, chunks and orders of sums: what lies between stock's two is what rounding
does to this model there. The plugin may be probe.FACTOR times as far from stock as stock is from itself, prompts and
answers each. `e2e equal` scores a hundred times as many tokens; this is the guard of the servers that are timed.

A sample of rounding is a text that stock computes otherwise from its first token on: prompts of up to 64 tokens, whose
experts take other tiles alone than together. Of a longer one stock repeats the beginning bit for bit; the rest is in
the same tiles too, behind another chunk boundary, and differs by less than half of what other arithmetic makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np

from blackwell_kernels.e2e import probe
from blackwell_kernels.e2e.server import Server

# most of up to 64 tokens: alone they take tiles of vLLM's experts that they do not take together; one of more tokens
# than DeepSeek's sparse attention selects
PROMPTS = (7, 23, 31, 40, 48, 52, 60, 61, 63, 200, 333, 700, 3000)
FORCED = 16
COMPANIES = ("alone", "together")
# fewer samples than these are no measure of rounding: stock that repeats itself bit for bit did the same sums twice
MIN_TOUCHED = 30
Scores = dict[str, Any]  # {"prompts": lengths, "alone": one list of log p per prompt, "together": the same}


def score(server: Server, vocab: int, longest: int) -> Scores:
    """log p of the probe set in both companies; `longest` is what a request may hold. Raises ServerError."""
    made = probe.prompts(vocab, [n for n in PROMPTS if n + FORCED < longest])
    again = [prompt[0] for prompt in made]

    def one(prompt: list[int], token: int) -> list[float]:
        found = probe.score(server.base_url, prompt, FORCED, forced=token)["log_probs"]
        return [*found, *[math.nan] * (len(prompt) - 1 + FORCED - len(found))]  # where an answer is short

    alone = [one(*pair) for pair in zip(made, again, strict=True)]
    with ThreadPoolExecutor(len(made)) as pool:
        together = list(pool.map(one, made, again))
    return {"prompts": [len(prompt) for prompt in made], "alone": alone, "together": together}


def compare(stock: Sequence[Scores], plugin: Sequence[Scores]) -> dict[str, Any] | None:
    """{phases: {name: {n, mean, noise, unrelated, ratio}}, factor, passed} of each arm's starts, None without both.

    `noise` is the largest mean |Δ log p| between two looks at stock (of `noise_n` tokens), `mean` the largest of a
    plugin's start from stock's first, `unrelated` that between stock's log p of different tokens; `repeated` is the
    share of tokens that stock repeats bit for bit, `ratio_with_parts` counts texts repeated in part as noise, too.
    `passed` is None where the bound reaches what answers have that share nothing: no fault could show there.
    """
    if not stock or not plugin:
        return None
    phases = {phase: _phase(stock, plugin, phase) for phase in ("prefill", "decode")}
    verdicts = [phase["passed"] for phase in phases.values()]
    passed = False if False in verdicts else None if None in verdicts else True
    return {"phases": phases, "factor": probe.FACTOR, "passed": passed}


def _phase(stock: Sequence[Scores], plugin: Sequence[Scores], phase: str) -> dict[str, Any]:
    ours, others = ([_samples(start, phase) for start in starts] for starts in (stock, plugin))
    looks = [(*pair, _anew(*pair, stock[0]["prompts"], phase)) for pair in _looks(ours)]
    noises = [_noise(*look) for look in looks]
    noise, parts = float(np.max([found for found, _ in noises])), float(np.max([_touched(*look[:2]) for look in looks]))
    first = np.concatenate(ours[0])
    apart = [np.abs(first - np.concatenate(other)) for other in others]
    mean = max(float(delta.mean()) for delta in apart) if all(np.isfinite(d).all() for d in apart) else float("inf")
    # half a turn further is another token's, of another prompt for most
    unrelated = float(np.abs(ours[0][0] - np.roll(ours[0][0], len(ours[0][0]) // 2)).mean())
    bound = probe.FACTOR * max(noise, probe.MIN_NOISE)
    known = np.isfinite(noise) and np.isfinite(unrelated)
    passed = bool(mean <= bound) if known and bound < unrelated else None if known and np.isfinite(mean) else False
    ratios = [mean / max(x, probe.MIN_NOISE) if known else float("inf") for x in (noise, parts)]
    return {
        **{"n": first.size, "mean": mean, "noise": noise, "unrelated": unrelated, "ratio": ratios[0]},
        **{"ratio_with_parts": ratios[1], "passed": passed, "noise_n": max(n for _, n in noises)},
        "repeated": float(np.mean([np.mean(one == other) for one, other, _ in looks])),
    }


def _samples(start: Scores, phase: str) -> list[np.ndarray]:
    """log p of one phase's tokens, a vector per company."""
    parts = [_part(n, phase) for n in start["prompts"]]
    return [
        np.concatenate([np.asarray(text[part], float) for text, part in zip(start[company], parts, strict=True)])
        for company in COMPANIES
    ]


def _part(n: int, phase: str) -> slice:
    """Where the phase's tokens are among those of a prompt of n tokens and its answer, without the first."""
    return slice(n - 1) if phase == "prefill" else slice(n - 1, None)


def _looks(starts: Sequence[Sequence[np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of stock's log p of the same tokens: in both companies of a start, and in one company of two starts."""
    yield from ((alone, together) for alone, together in starts)
    for one, other in combinations(starts, 2):
        yield from zip(one, other, strict=True)


def _anew(one: np.ndarray, other: np.ndarray, prompts: Sequence[int], phase: str) -> np.ndarray:
    """Mask of the samples of those texts that were computed otherwise from the phase's first token on."""
    sizes = [n - 1 if phase == "prefill" else FORCED for n in prompts]
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    return np.repeat(one[begins] != other[begins], sizes)


def _noise(one: np.ndarray, other: np.ndarray, anew: np.ndarray) -> tuple[float, int]:
    """(mean |Δ|, n) of texts computed otherwise throughout; where those are too few, of all samples that differ."""
    if anew.sum() >= MIN_TOUCHED:
        return _touched(one[anew], other[anew]), int(anew.sum())
    return _touched(one, other), int((one != other).sum())


def _touched(one: np.ndarray, other: np.ndarray) -> float:
    """Mean |Δ| over the samples that differ at all; 0 where too few do."""
    delta = np.abs(one - other)
    touched = delta[delta != 0]
    return float(touched.mean()) if touched.size >= MIN_TOUCHED else 0.0
