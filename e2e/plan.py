"""The comparison of two servers of one model: which tokens are scored, in which batches, and what counts as equal.

Every arm scores the same tokens: those of the prompts, in prefill, and a forced continuation, one decode step each.
Tokens are seeded, so no arm has to wait for another. Two compositions run the same requests in other company: another
order, other arrivals, other batch sizes, other chunk boundaries. What stock shows between its own two compositions is
the noise that the model itself makes of rounding; an arm is equal if it differs from stock by little more than that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MEAN_FACTOR = 1.5
P99_FACTOR = 2.0
COMPOSITIONS = ("A", "B")
# A comparison needs samples; a group with fewer is reported and not judged
MIN_SAMPLES = 100
SMALL_STEP = 64
REQUESTS = 96


@dataclass(frozen=True)
class Request:
    """One request: prompt and forced continuation as token ids. `scored`: whether the prompt's log p are asked for
    (vLLM then neither reads nor shares its prefix cache; the others do)."""

    name: str
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    scored: bool


def requests(vocab: int, *, seed: int = 0, n: int = REQUESTS, forced: int = 48, scale: float = 1.0) -> list[Request]:
    """n requests of mixed lengths: of ten, four short (8-128), three medium (129-1024), two long (2,100-5,000, beyond
    what sparse attention selects) and one that repeats most of an earlier medium prompt without scoring it, so that the
    prefix cache serves it. `scale` shrinks the lengths for a tiny model."""
    rng = random.Random(f"requests/{seed}")
    made: list[Request] = []
    bounds = {"short": (8, 128), "medium": (129, 1024), "long": (2100, 5000)}
    kinds = ["short", "medium", "long", "short", "medium", "short", "long", "short", "medium", "repeat"]
    for i in range(n):
        kind = kinds[i % len(kinds)]
        tokens: tuple[int, ...]
        if kind == "repeat":
            source = next(r for r in reversed(made) if r.name.endswith("medium") and len(r.prompt) > 150 * scale)
            tokens = source.prompt[: int(len(source.prompt) * 0.9)] + _tokens(rng, 16, vocab)
        else:
            low, high = (max(2, round(b * scale)) for b in bounds[kind])
            tokens = _tokens(rng, rng.randint(low, high), vocab)
        made.append(Request(f"{i:03d}-{kind}", tokens, _tokens(rng, forced, vocab), kind != "repeat"))
    return made


def _tokens(rng: random.Random, n: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocab) for _ in range(n))


def arrivals(made: Sequence[Request], composition: str) -> list[tuple[int, Request]]:
    """(engine step, request) in order of arrival. A: three quarters at once, then one every other step, so that
    prefills meet decodes. B: from the other end, few at once, then one every fifth step. With REQUESTS requests most
    decodes of A share a step with more than SMALL_STEP others, and those of B do not."""
    if composition == "A":
        crowd, every, order = len(made) * 3 // 4, 2, list(made)
    else:
        crowd, every, order = 6, 5, list(reversed(made))
    return [(max(0, i - crowd + 1) * every, request) for i, request in enumerate(order)]


def step_tokens(composition: str, most: int, at_least: int) -> int:
    """Tokens a step may hold. A: as many as the engine allows. B: SMALL_STEP, yet `at_least` those.

    vLLM's experts take other tiles for up to 64 tokens and the same ones for all larger batches: with large steps in
    both compositions stock repeats itself almost bit for bit, which says nothing about what rounding does to the model.
    """
    return most if composition == "A" else max(SMALL_STEP, at_least)


def groups(made: Sequence[Request], topk: int | None) -> dict[str, np.ndarray]:
    """Names of groups of samples and their masks over all samples of an arm, in the order of `flatten`.

    A fault of a decode operator hides among many more prefill samples, and one of sparse selection among positions that
    see few keys: each group is judged for itself.
    """
    decode: list[bool] = []
    position: list[int] = []
    for request in made:
        n = len(request.prompt)
        if request.scored:
            decode += [False] * (n - 1)
            position += range(1, n)
        decode += [True] * len(request.forced)
        position += range(n, n + len(request.forced))
    is_decode, at = np.array(decode), np.array(position)
    found = {"prompt": ~is_decode, "decode": is_decode}
    if topk is not None:
        # a key that is left out must be one of many, or little differs
        beyond = at > topk * 5 // 4
        found |= {"prompt, sparse": ~is_decode & beyond, "decode, sparse": is_decode & beyond}
    return found


def flatten(made: Sequence[Request], scores: dict[str, dict[str, list[float]]]) -> np.ndarray:
    """All samples of an arm's composition as one vector: per request, prompt log p (if scored), then decode log p.

    Raises ValueError when a request has another number of samples than it must have.
    """
    parts = []
    for request in made:
        score = scores[request.name]
        expected = (len(request.prompt) - 1 if request.scored else 0, len(request.forced))
        if (len(score["prompt"]), len(score["decode"])) != expected:
            got = (len(score["prompt"]), len(score["decode"]))
            raise ValueError(f"request {request.name} has {got} samples, not {expected}")
        parts += [score["prompt"], score["decode"]]
    return np.concatenate([np.asarray(p, dtype=np.float32) for p in parts])


def agreement(made: Sequence[Request], tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Mask over all samples, in the order of `flatten`: those that score the same token after the same tokens in every
    one of `tokens` (each [requests, generated])."""
    same = np.all([t == tokens[0] for t in tokens], axis=0).cumprod(axis=1).astype(bool)
    parts = []
    for request, row in zip(made, same, strict=True):
        parts += [np.ones(len(request.prompt) - 1 if request.scored else 0, dtype=bool), row]
    return np.concatenate(parts)


def distance(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """n, mean, p99 and max of |a − b|; anything that is not finite makes them infinite."""
    delta = np.abs(a.astype(np.float64) - b.astype(np.float64))
    if not np.isfinite(delta).all():
        return {"n": int(delta.size), "mean": float("inf"), "p99": float("inf"), "max": float("inf")}
    if delta.size == 0:
        return {"n": 0, "mean": 0.0, "p99": 0.0, "max": 0.0}
    p99 = float(np.percentile(delta, 99))
    return {"n": int(delta.size), "mean": float(delta.mean()), "p99": p99, "max": float(delta.max())}


def compare(
    stock: dict[str, np.ndarray], other: dict[str, np.ndarray], masks: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """One row per group: stock's noise (A against B), the other arm's distance to stock over the compositions it ran,
    the ratios, and whether both are within bounds. `stock` and `other` map a composition to its samples.

    The noise is taken over the samples that the other composition touched: where stock repeats itself bit for bit
    (`repeated`, a share) it did the same arithmetic twice, which is no sample of rounding. The distance is over all.
    """
    rows = []
    for name, mask in masks.items():
        if mask.sum() < MIN_SAMPLES:
            rows.append({"group": name, "judged": False, "passed": True, "n": int(mask.sum())})
            continue
        touched = mask & (stock["A"] != stock["B"])
        noise = distance(stock["A"][touched], stock["B"][touched])
        pairs = [(stock[c][mask], other[c][mask]) for c in COMPOSITIONS if c in other]
        apart = distance(np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))
        mean, p99 = _ratio(apart["mean"], noise["mean"]), _ratio(apart["p99"], noise["p99"])
        rows.append(
            {
                "group": name,
                "judged": True,
                "n": apart["n"],
                "noise": noise,
                "repeated": float(1 - touched.sum() / mask.sum()),
                "distance": apart,
                "mean_ratio": mean,
                "mean_ratio_all": _ratio(apart["mean"], noise["mean"] * float(touched.sum() / mask.sum())),
                "p99_ratio": p99,
                "passed": mean <= MEAN_FACTOR and p99 <= P99_FACTOR,
            }
        )
    return rows


def _ratio(distance: float, noise: float) -> float:
    if distance == 0:
        return 0.0
    return distance / noise if noise else float("inf")
