"""Jobs in processes of their own: whatever one does, the others are done."""

from __future__ import annotations

import multiprocessing
import os
import time

from blackwell_kernels.common import ahead, arch

FORK = multiprocessing.get_context("fork")


def work(send, what):
    if what == "crash":
        os._exit(11)
    if what == "hang":
        time.sleep(1000)
    send.send(f"{what} done")


def test_a_job_that_dies_costs_itself():
    jobs = [(what,) for what in ("a", "crash", "b", "crash", "c")]
    found = dict(ahead.in_processes(FORK, work, jobs, 2, 100.0))
    died = ahead.Lost("the compiler died with exit status 11")
    assert found == {0: "a done", 1: died, 2: "b done", 3: died, 4: "c done"}


def test_a_job_that_hangs_is_stopped():
    assert list(ahead.in_processes(FORK, work, [("hang",)], 1, 0.0)) == [
        (0, ahead.Lost("no end of the compilation after 0 s"))
    ]


def test_whoever_leaves_early_leaves_nothing_running():
    found = ahead.in_processes(FORK, work, [("a",), ("hang",)], 2, 100.0)
    assert next(found) == (0, "a done")
    assert multiprocessing.active_children()
    found.close()
    assert not multiprocessing.active_children()


def test_a_pretended_gpu_may_be_one_that_is_not_listed():
    chip = arch.Arch(90, 78, 232_448, 2.0, 700.0, 400.0, 1.2, measured=False)
    with arch.pretend("h200-mig", chip):
        assert (arch.current_gpu(), arch.current_arch()) == ("h200-mig", chip)
