"""The search for the knee on servers whose knee is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blackwell_kernels.e2e import knee


def server(capacity: float) -> tuple[list[float], Callable[[float], knee.Reading]]:
    """Readings of a server that turns late beyond `capacity`, and the rates it was asked for."""
    asked: list[float] = []

    def measure(rate: float) -> knee.Reading:
        asked.append(rate)
        return knee.Reading(rate, 1.0 if rate <= capacity else 0.5, 100 * min(rate, capacity))

    return asked, measure


@pytest.mark.parametrize("capacity", [0.07, 0.25, 0.9, 3.0, 17.0])
@pytest.mark.parametrize("first", [0.25, 2.0])
def test_found_from_below_and_from_above(capacity: float, first: float) -> None:
    asked, measure = server(capacity)
    found = knee.search(measure, first)
    assert capacity / 2**0.25 * 0.99 <= found["knee"] <= capacity
    assert len(asked) == len(set(asked)), "each rate is measured once"
    assert [r["rate"] for r in found["readings"]] == sorted(asked)


def test_throughput_that_no_longer_grows_is_beyond_the_knee() -> None:
    # a lenient SLO never fails, but the server gives no more than 100 tokens/s
    found = knee.search(lambda rate: knee.Reading(rate, 1.0, 100 * min(rate, 1.0)), 0.25)
    assert 0.8 <= found["knee"] <= 1.5


def test_a_server_that_never_keeps_up_has_none() -> None:
    found = knee.search(lambda rate: knee.Reading(rate, 0.0, 5.0), 0.25)
    assert found["knee"] is None
    assert "miss the SLO" in found["why"]
    assert knee.search(lambda rate: knee.Reading(rate, None, None), 1.0)["knee"] is None


def test_three_load_points_up_to_it_and_one_beyond() -> None:
    assert knee.around(2.0) == [1.0, 1.5, 2.0, 4.0]
