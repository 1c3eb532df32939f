"""Golden answers: which tokens bind, and how much another processor's rounding may move."""

from __future__ import annotations

from typing import Any

import pytest

from blackwell_kernels.e2e import golden


def answer(tokens: list[int], leads: list[float]) -> dict[str, Any]:
    return {"prompt": [3, 4, 5], "tokens": tokens, "leads": leads}


KEPT = [answer([7, 8, 9], [0.9, 0.5, 0.1])] * 20


def test_a_token_binds_up_to_the_first_near_tie() -> None:
    assert golden.binding(KEPT[0]) == 2
    assert golden.disagreements(KEPT, [answer([7, 8, 4], [0.9, 0.5, 3.0])] * 20) == []


@pytest.mark.parametrize(("lead", "differ", "wrong"), [(0.2, 1, 1), (0.05, 2, 0), (0.05, 3, 3)])
def test_few_answers_may_be_near_ties_here(lead: float, differ: int, wrong: int) -> None:
    got = [*KEPT[differ:], *[answer([7, 1, 9], [0.9, lead, 0.1])] * differ]
    found = golden.disagreements(KEPT, got)
    assert found == [f"token 1 after 3 prompt tokens is 1, by {lead}, not 8, which led by 0.5"] * wrong
