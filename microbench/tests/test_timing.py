"""The timing engine without a GPU: turns, percentiles, fall-back between engines."""

import numpy
import pytest
from microbench_examples import FakeEager, FakeEngine

from blackwell_kernels.microbench import timing as module
from blackwell_kernels.microbench.timing import MAX_CALLS, TARGET_US, Timing, host_us, measure, quantile, repeats


@pytest.mark.parametrize("q", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_quantiles_are_numpys(q):
    samples = [3.5, 1.25, 9.0, 2.0, 2.0, 7.75]
    assert quantile(samples, q) == pytest.approx(float(numpy.quantile(samples, q)), abs=1e-12)
    assert quantile([4.0], q) == 4.0


def timing(results, name) -> Timing:
    assert isinstance(results[name], Timing), results[name]
    return results[name]


def test_implementations_take_turns_and_the_first_one_changes():
    log: list[int] = []
    results = measure([FakeEngine(log)], {"a": [lambda: 100], "b": [lambda: 200], "c": [lambda: 300]}, 6, warmup=2)
    assert log[:6] == [100, 100, 200, 200, 300, 300]  # warm-up
    timed = [log[6 + 3 * i : 9 + 3 * i] for i in range(6)]
    assert all(sorted(turn) == [100, 200, 300] for turn in timed)
    assert [turn[0] for turn in timed] == [100, 200, 300, 100, 200, 300]
    # warm-up samples are not kept: sample i of `a` costs 100 + i
    assert timing(results, "a").samples_us == (102, 103, 104, 105, 106, 107)
    assert timing(results, "b").us == 204.5
    assert (timing(results, "a").p10, timing(results, "a").p90) == (102.5, 106.5)


def test_rotated_sets_are_all_called():
    results = measure([FakeEngine([])], {"a": [lambda: 10, lambda: 30]}, 3, warmup=0)
    assert timing(results, "a").samples_us == (20, 21, 22)


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so():
    engines = [FakeEngine([], refuses={7}), FakeEager([])]
    results = measure(engines, {"a": [lambda: 1], "b": [lambda: 7]}, 3)
    assert timing(results, "a").method == "graph"
    assert timing(results, "b").method == "eager"


def test_what_no_engine_can_time_says_why_and_the_others_are_timed():
    engines = [FakeEngine([], refuses={7}), FakeEager([], refuses={7})]
    results = measure(engines, {"b": [lambda: 7], "a": [lambda: 1]}, 3)
    assert results["b"] == "graph: RuntimeError: cannot capture; eager: RuntimeError: cannot capture"
    assert isinstance(results["a"], Timing)
    assert list(results) == ["b", "a"]


def test_a_replay_is_long_enough_and_not_too_long():
    assert repeats(10, 40.0) * 40.0 == TARGET_US
    assert repeats(1, 1.3) * 1 <= MAX_CALLS
    assert repeats(64, 1.0) == MAX_CALLS // 64
    assert repeats(4, 10 * TARGET_US) == 1
    assert repeats(10**6, 1.0) == 1


def test_host_time_is_of_the_call_alone(monkeypatch):
    now, log = [0], []
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: now[0])

    class Output:
        def __del__(self):
            now[0] += 1_000_000
            log.append("freed")

    def call():
        now[0] += 7_500
        log.append("call")
        return Output()

    def synchronize():
        now[0] += 1_000_000
        log.append("synchronize")

    assert host_us(call, synchronize) == 7.5
    assert log == ["synchronize", "call", "freed"]
