"""Two arms' log p of the same tokens: rounding passes whatever it amounts to, a fault of one phase does not."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from blackwell_kernels.e2e import alike, probe

LENGTHS = (7, 60, 200)
RECORDED = json.loads((Path(__file__).parent / "data" / "compare-h200.json").read_text())["scores"]


def start(
    scale: float, seed: int, *, together: float | None = None, fault: float = 0.0, phase: str = ""
) -> alike.Scores:
    """Made-up scores: the model's own (the same for every seed), noise of a size, a fault in one phase."""
    rng, model = np.random.default_rng(seed), np.random.default_rng(0)
    texts = [model.normal(-11, 1, n - 1 + alike.FORCED) for n in LENGTHS]

    def company() -> list[list[float]]:
        made = []
        for n, text in zip(LENGTHS, texts, strict=True):
            wrong = np.zeros_like(text)
            wrong[slice(n - 1) if phase == "prefill" else slice(n - 1, None)] = fault if phase else 0.0
            made.append((text + rng.normal(0, scale, text.size) + wrong).tolist())
        return made

    return {"prompts": list(LENGTHS), "alone": company(), "together": company()}


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.3])
def test_the_bound_grows_with_what_rounding_does(scale: float) -> None:
    found = alike.compare([start(scale, 1)], [start(scale, 2)])
    assert found
    assert found["passed"], found
    for phase, n in (("prefill", sum(LENGTHS) - 3), ("decode", 3 * alike.FORCED)):
        assert found["phases"][phase]["n"] == 2 * n
        assert found["phases"][phase]["noise"] == pytest.approx(scale * 2 / np.pi**0.5, rel=0.35)
    worse = alike.compare([start(scale, 1)], [start(max(3 * scale, 0.15), 2)])
    assert worse
    assert worse["passed"] is False


@pytest.mark.parametrize(("phase", "other"), [("decode", "prefill"), ("prefill", "decode")])
def test_a_fault_of_one_phase_is_not_averaged_away(phase: str, other: str) -> None:
    found = alike.compare([start(0.1, 1)], [start(0.1, 2, fault=0.4, phase=phase)])
    assert found
    assert found["passed"] is False
    assert found["phases"][phase]["ratio"] > probe.FACTOR > 1.3 > found["phases"][other]["ratio"]


def test_the_plugins_worst_start_counts_and_so_does_stocks_other_start() -> None:
    stock, good, bad = start(0.1, 1), start(0.1, 2), start(0.35, 3)
    for plugins in ([good, bad], [bad, good]):
        found = alike.compare([stock], plugins)
        assert found
        assert found["passed"] is False
    # that far from each other are two starts of stock, too
    found = alike.compare([stock, start(0.35, 4)], [bad])
    assert found
    assert found["passed"]


def test_where_stock_repeats_itself_the_floor_holds() -> None:
    still = start(0.0, 1)
    found = alike.compare([still], [start(0.05, 2)])
    assert found
    assert found["passed"]
    assert found["phases"]["prefill"]["noise"] == 0.0
    found = alike.compare([still], [start(0.2, 2)])
    assert found
    assert found["passed"] is False


def test_samples_that_no_company_touched_are_no_noise() -> None:
    one = start(0.0, 1)
    for text in one["together"][:2]:  # 60 of 200 and more
        text[:] = [x + 0.2 for x in text]
    found = alike.compare([one], [one])
    assert found
    assert found["phases"]["prefill"]["noise"] == pytest.approx(0.2)


def test_noise_that_drowns_every_fault_is_no_verdict_and_no_number_is_a_failure() -> None:
    found = alike.compare([start(2.0, 1)], [start(2.0, 2)])
    assert found
    assert found["passed"] is None
    for arm in range(2):
        arms = [start(0.1, 1), start(0.1, 2)]
        arms[arm]["alone"][1][3] = float("nan")
        found = alike.compare([arms[0]], [arms[1]])
        assert found
        assert found["passed"] is False, arm
    assert alike.compare([], [start(0.1, 1)]) is None


def test_what_stock_repeats_in_part_is_no_sample_of_rounding() -> None:
    """Recorded on H200s: of 200 tokens stock repeats 80 and is near itself after; shorter prompts it computes anew."""
    stock, plugin = RECORDED["stock"], RECORDED["plugin"]
    found = alike.compare([stock], [plugin])
    assert found
    prefill, decode = found["phases"]["prefill"], found["phases"]["decode"]
    assert prefill["noise_n"] == 22 + 47, "the two prompts of up to 64 tokens"
    alone, together = (stock[c][0][:22] + stock[c][1][:47] for c in alike.COMPANIES)
    assert prefill["noise"] == pytest.approx(np.abs(np.subtract(alone, together)).mean())
    assert prefill["repeated"] == pytest.approx(80 / (22 + 47 + 199), abs=0.01), "rounded to 4 digits"
    assert prefill["ratio"] < probe.FACTOR < prefill["ratio_with_parts"]
    assert decode["noise_n"] == 3 * alike.FORCED
    assert found["passed"]
    # the same check still sees one arm's faults
    wrong = deepcopy(plugin)
    for company in alike.COMPANIES:
        wrong[company] = [[x - 0.8 if i % 2 else x for i, x in enumerate(text)] for text in wrong[company]]
    noticed = alike.compare([stock], [wrong])
    assert noticed
    assert noticed["passed"] is False


def test_where_every_text_is_repeated_in_part_what_differs_is_the_noise() -> None:
    one = start(0.0, 1)
    for text in one["together"]:
        text[3:] = [x + 0.1 for x in text[3:]]
    found = alike.compare([one], [one])
    assert found
    assert found["phases"]["prefill"]["noise"] == pytest.approx(0.1)
    assert found["phases"]["prefill"]["noise_n"] == sum(LENGTHS) - 3 - 3 * 3
