"""Real processes that hang, crash, leave and eat memory: each is an entry, and the run goes on."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from supervised_examples import BAD, DEFINITION, MEMORY

from blackwell_kernels.microbench import results, supervise, worker
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.runner import Bench
from blackwell_kernels.microbench.worker import Job

DEPLOYMENTS = ("model/qwen3-next/lengths", "/tp2/", "/tp4/")
CASES = [(c.definition, c.name) for c in select(sets=("cpu",)) if c.definition == DEFINITION]


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_every_way_to_end_a_process_is_an_entry_and_the_rest_is_measured(tmp_path):
    job = Job(cases=CASES, factory="supervised_examples:make", root=tmp_path)
    told = list(supervise.run(job, quiet_s=30, memory_bytes=MEMORY))
    assert [next(iter(message)) for message in told] == ["head", "row", "row"], "one head, each case once, in order"
    small, large = (results.Row.model_validate(message["row"]) for message in told[1:])
    errors = {name: impl.error for name, impl in small.impls.items()}
    assert errors["ours"] is None
    assert errors["hangs"] == "killed: no end after 30 s (check)"
    assert errors["crashes"].startswith("it ended the process by SIGABRT (check)")
    assert errors["hangs_in_a_child"].startswith("it ended the process by SIGSEGV (check)")
    assert "MiB of memory, allowed 1,536 (check)" in errors["exhausts_memory"]
    assert errors["leaves"].startswith("it ended the process with status 0 (check)")
    assert errors["loses_context"] == "it broke the CUDA context: RuntimeError: illegal memory access"
    assert {large.impls[action.__name__].error for action in BAD} == {None}
    assert {row.date for row in (small, large)} == {"first worker"}, "restarts keep the first worker's floors"
    stored = results.load(results.path_of("h200", "gdn_decode", tmp_path))
    assert stored.rows == [small, large]
    assert results.audit(stored) == []


def test_who_ends_two_cases_is_left_out_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "MAX_LOSSES", 1)
    skip = [(DEFINITION, "*", action.__name__, "not this time") for action in BAD]
    job = Job(cases=CASES, factory="supervised_examples:make", root=tmp_path, skip=skip)
    rows = [results.Row.model_validate(m["row"]) for m in supervise.run(job) if "row" in m]
    assert rows[0].impls["loses_context"].error.startswith("it broke the CUDA context")
    assert rows[1].impls["loses_context"].error.startswith("left out after 1 cases that ended the process: it broke")


def test_no_case_is_begun_that_would_last_beyond_the_limit(tmp_path, monkeypatch):
    now = [100.0]
    clock = SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(worker, "time", clock)
    three = [CASES[0], CASES[1], CASES[0]]
    skip = [(DEFINITION, "*", action.__name__, "not this time") for action in BAD]
    skip.append((DEFINITION, "*", "loses_context", "not this time"))
    job = Job(cases=three, factory="supervised_examples:make", root=tmp_path, skip=skip)

    def names(until):
        now[0] = 100.0
        for message in worker.messages(job.model_copy(update={"until": until})):
            now[0] += 10.0 if "row" in message else 0.0  # a case lasts until the next one is asked for
            yield message["failed"][1] if "failed" in message else next(iter(message))

    assert list(names(None)) == list(names(125.0 + 5.0)) == ["head", "row", "row", "row"]
    assert list(names(125.0)) == ["head", "row", "row", worker.NOT_BEGUN], "the third would have ended at 130"
    assert list(names(99.0)) == ["head", *[worker.NOT_BEGUN] * 3]
    late = job.model_copy(update={"until": 99.0, "head": {"date": "of an earlier worker"}})
    monkeypatch.setattr(supervise, "_Worker", lambda *_: pytest.fail("started a process to find out"))
    assert [message["failed"] for message in supervise.run(late)] == [[name, worker.NOT_BEGUN] for _, name in three]


def test_what_a_deployment_pays_once_does_not_count_for_its_other_cases(tmp_path, monkeypatch):
    now, lasting = [0.0], {}
    monkeypatch.setattr(worker, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))

    def row(bench, cases):
        now[0] += lasting[cases[0].name]
        yield results.Row.model_construct()

    monkeypatch.setattr(Bench, "run", row)
    tp1, tp2, tp4 = (select(sets=("model",), definition="gdn_prefill_state_bf16", case=part) for part in DEPLOYMENTS)
    order = [tp1[0], tp2[0], *tp2[1:3], tp4[0], *tp2[3:4]]
    lasting.update(zip([case.name for case in order], [9.0, 80.0, 2.0, 2.0, 80.0, 2.0], strict=True))
    keys = [(case.definition, case.name) for case in order]
    job = Job(cases=keys, factory="supervised_examples:make", root=tmp_path, until=100.0)
    told = ["".join(message.get("failed", ["row"])[-1:]) for message in worker.messages(job)][1:]
    assert told == ["row"] * 4 + [worker.NOT_BEGUN, "row"], "80 s are lost for another TP, 2 s for one that is known"


def test_a_worker_that_cannot_start_is_an_error_that_says_why(tmp_path):
    job = Job(cases=CASES, factory="supervised_examples:broken", root=tmp_path)
    with pytest.raises(supervise.WorkerError, match=r"status 1 \(start\): ImportError: no such library"):
        list(supervise.run(job))


def test_a_worker_ends_with_a_supervisor_that_was_killed(tmp_path):
    job = Job(cases=CASES, factory="supervised_examples:make", root=tmp_path)
    code = (
        "import sys; from blackwell_kernels.microbench import supervise, worker\n"
        "list(supervise.run(worker.Job.model_validate_json(sys.argv[1]), quiet_s=1200))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, job.model_dump_json()])
    stat = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not (children := stat.read_text().split()):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while command_line(children[0]):  # a hang ends with the tests' own limit
        time.sleep(0.1)


def command_line(pid):
    """Empty once a process is dead, also where nobody has reaped it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
