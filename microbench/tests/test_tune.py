"""The tuner on a CPU: candidates whose costs are made up, compilers that die, runs that end early and go on."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from microbench_examples import HEAD
from microbench_examples import row as example
from typer.testing import CliRunner

from blackwell_kernels.common import tables
from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import ours, precompile, results, runner, tune, tuned, tuning
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.precompile import Failure, Job
from blackwell_kernels.microbench.results import Results
from blackwell_kernels.microbench.tuned import Candidate, Row

FACTS = {name: value for name, value in HEAD.items() if name != "ceilings"}


@dataclass(frozen=True)
class Config:
    """One knob."""

    x: int


def chosen() -> int:
    """The knob of whoever is running, as an operator on a GPU would read it."""
    return int(tables.load("gdn", "gdn_decode", "h200").lookup({}, 1).config.get("x", -1))


class KnobEngine:
    """A call costs what `costs` says of its knob."""

    method = "graph"

    def __init__(self, costs):
        self.costs, self.log = costs, []

    def prepare(self, calls):
        for call in calls:
            call()
        x = self.seen[-1]
        cost = self.costs[x]
        if isinstance(cost, Exception):
            raise cost

        def sample():
            self.log.append(x)
            return cost

        return sample


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """A tuner of gdn_decode with knobs 1 to 6 (1 is the heuristic's), given what each of them costs."""

    def make(costs, space=(2, 3, 4, 5, 6), heuristic=1, **more):
        engine = KnobEngine(costs)
        engine.seen = seen = []
        monkeypatch.setitem(
            tuning.SPACES,
            "gdn_decode",
            tuning.Space(
                lambda case, key, device: Config(heuristic), lambda case, key, around: [Config(x) for x in space]
            ),
        )
        real = bind.get("real") or bind.setdefault("real", ours.gdn_decode)

        def bound(inputs):
            inner = real(inputs)

            def call():
                seen.append(chosen())
                return inner() if costs.get("wrong") != seen[-1] else tuple(torch.zeros_like(x) for x in inner())

            return call

        monkeypatch.setattr(ours, "gdn_decode", bound)
        settings = {"root": tmp_path, "table_root": tmp_path / "tables", "l2_bytes": 1, "head": FACTS, **more}
        return tuning.Tuner(device=torch.device("cpu"), engines=[engine], rates={}, **settings), engine

    bind: dict = {}
    return make


def group(*parts):
    """The tiny bfloat16 decode cases with these names as one group."""
    found = [c for c in select(sets=("cpu",)) if c.definition == "gdn_decode_state_bf16"]
    picked = tuple(c for c in found if not parts or any(part in c.name for part in parts))
    assert picked
    op, key = tuning.key_of(picked[0])
    return tuning.Group(op, key, picked[0].tokens, picked)


def table(tmp_path):
    return tables.load("gdn", "gdn_decode", "h200", tmp_path / "tables")


def test_the_fastest_right_candidate_wins_and_reaches_the_table(tuner, tmp_path):
    costs = {1: 10.0, 2: 5.0, 3: 8.0, 4: 12.0, 5: RuntimeError("out of resource"), 6: 40.0, "wrong": 2}
    run, _ = tuner(costs)
    one = group("batch_size=5")
    ((row,),) = run.tune([one])
    assert row.best == {"x": 3}
    assert row.times() == (10.0, 8.0)
    found = {c.config["x"]: c for c in row.candidates}
    assert found[2].error.startswith("wrong: ")
    assert found[5].error == "graph: RuntimeError: out of resource"
    # 12 and 40 are too slow to be timed again; 8 is not, although it was beside the 5 that turned out to be wrong
    assert {x: c.n for x, c in found.items()} == {1: 15, 2: 0, 3: 15, 4: 3, 5: 0, 6: 3}
    assert found[3].accuracy < 1e-4
    stored = tuned.load(tuned.path_of("h200", "gdn_decode", tmp_path))
    assert stored.rows == [row]
    assert (stored.command, stored.gpu) == (HEAD["command"], HEAD["gpu"])
    made = table(tmp_path).lookup(one.key, 5)
    assert (made.config, made.ours_us, made.stock_us, made.use) == ({"x": 3}, 8.0, None, "stock")


def test_finalists_take_turns_for_all_samples(tuner):
    run, engine = tuner({1: 10.0, 2: 9.0, 3: 9.5, 4: 50.0, 5: 60.0, 6: 70.0}, samples=7)
    list(run.tune([group("batch_size=5")]))
    last = engine.log[-21:]
    assert [sorted(last[i : i + 3]) for i in range(0, 21, 3)] == [[1, 2, 3]] * 7
    assert len({last[i] for i in range(0, 21, 3)}) == 3


def test_a_gain_within_noise_keeps_the_heuristic(tuner, tmp_path):
    run, _ = tuner({1: 10.0, 2: 9.95, 3: 11.0, 4: 11.0, 5: 11.0, 6: 11.0})
    one = group("batch_size=5")
    ((row,),) = run.tune([one])
    assert row.best == {}
    assert row.times() == (10.0, 10.0)
    assert table(tmp_path).lookup(one.key, 5).config == {}


def test_a_heuristic_that_cannot_run_is_replaced(tuner):
    run, _ = tuner({1: RuntimeError("no"), 2: 9.95, 3: 9.0, 4: 11.0, 5: 11.0, 6: 11.0})
    ((row,),) = run.tune([group("batch_size=5")])
    assert row.best == {"x": 3}
    assert row.times() == (None, 9.0)


def test_a_run_goes_on_where_the_last_one_ended(tuner, monkeypatch):
    costs = {x: 10.0 - x for x in range(1, 7)}
    one = group("batch_size=5")
    run, engine = tuner(costs)
    monkeypatch.setattr(tuning, "TOGETHER", 2)
    time, turns = runner.Bench._time, iter(range(100))

    def dies(self, case, ready, sets):
        if next(turns) == 2:
            raise KeyboardInterrupt
        return time(self, case, ready, sets)

    monkeypatch.setattr(runner.Bench, "_time", dies)
    with pytest.raises(KeyboardInterrupt):
        list(run.tune([one]))
    assert set(engine.log) == {1, 2, 3, 4}
    run, engine = tuner(costs)
    ((row,),) = run.tune([one])
    assert set(engine.log[: engine.log.index(6) + 1]) == {5, 6}, "what was screened is not screened again"
    assert row.best == {"x": 6}
    run, engine = tuner(costs)
    assert list(run.tune([one])) == [[row]]
    assert engine.log == [], "nothing is left to do"
    run, engine = tuner(costs, head=FACTS | {"source": "other sources"})
    list(run.tune([one]))
    assert set(engine.log) == set(range(1, 7))


def test_new_candidates_reopen_a_finished_case(tuner):
    one = group("batch_size=5")
    run, _ = tuner({1: 10.0, 2: 5.0}, space=(2,))
    list(run.tune([one]))
    run, engine = tuner({1: 10.0, 2: 5.0, 3: 4.0}, space=(2, 3))
    ((row,),) = run.tune([one])
    assert row.best == {"x": 3}
    assert engine.log[0] == 3


def test_what_breaks_the_context_is_stored_and_not_tried_again(tuner, monkeypatch):
    costs = {1: 10.0, 2: 9.0, 3: 8.0, 4: 7.0, 5: RuntimeError("illegal memory access"), 6: 20.0}
    run, _ = tuner(costs)
    one = group("batch_size=5")
    monkeypatch.setattr(runner.Bench, "alive", lambda self: False)
    with pytest.raises(runner.ContextLost, match="x=5: it broke the CUDA context"):
        list(run.tune([one]))
    monkeypatch.setattr(runner.Bench, "alive", lambda self: True)
    run, engine = tuner(costs)
    ((row,),) = run.tune([one])
    assert 5 not in engine.log
    assert "illegal memory access" in row.of({"x": 5}).error
    assert row.best == {"x": 4}


def test_cases_of_one_table_row_are_tuned_together(tuner, monkeypatch):
    cases = group().cases[:2]
    assert len(cases) == 2
    both = tuning.Group("gdn_decode", group().key, 5, cases)
    run, engine = tuner({x: 10.0 for x in range(1, 7)})
    screened = {cases[0].name: {1: 10.0, 2: 5.0, 3: 7.0}, cases[1].name: {1: 10.0, 2: 30.0, 3: 7.0}}
    time = runner.Bench._time

    def priced(self, case, ready, sets):
        engine.costs = {**dict.fromkeys(range(1, 7), 90.0), **screened[case.name]}
        return time(self, case, ready, sets)

    monkeypatch.setattr(runner.Bench, "_time", priced)
    (rows,) = run.tune([both])
    assert [row.best for row in rows] == [{"x": 3}, {"x": 3}], "2 wins on one case and loses more on the other"


def test_candidates_are_compiled_before_any_is_timed_and_verdicts_are_final(tuner):
    asked = []

    def compile(jobs):
        asked.extend(jobs)
        verdict = {2: Failure("kernel needs 300000 B of shared memory", True), 3: Failure("no meta tensors", False)}
        return [verdict.get(job.config["x"]) for job in jobs]

    run, engine = tuner({1: 10.0, 2: 1.0, 3: 5.0, 4: 50.0, 5: 50.0, 6: 50.0}, compile=compile)
    ((row,),) = run.tune([group("batch_size=5")])
    assert sorted(job.config["x"] for job in asked) == [1, 2, 3, 4, 5, 6]
    assert row.of({"x": 2}).error == "kernel needs 300000 B of shared memory"
    assert 2 not in engine.log
    assert row.best == {"x": 3}


def test_a_row_for_many_tokens_does_not_serve_few(tmp_path):
    key = {"heads": 16}
    for tokens, config in ((64, {"x": 1}), (8, {"x": 2})):
        tuned.write_table("moe", FACTS, key, {tokens: (config, 3.0)}, {1, 8, 64, 512}, 15, tmp_path)
    made = tables.load("moe", "moe", "h200", tmp_path)
    assert {tokens: made.lookup(key, tokens).config for tokens in (1, 3, 8, 9, 64, 100, 9999)} == {
        1: {}, 3: {"x": 2}, 8: {"x": 2}, 9: {"x": 1}, 64: {"x": 1}, 100: {}, 9999: {},
    }  # fmt: skip
    assert made.provenance.command == HEAD["command"]


def test_decisions_of_a_benchmark_stay(tmp_path):
    key = {"heads": 16}
    provenance = tables.Provenance(
        **{name: FACTS[name] for name in ("gpu", "sm", "driver", "torch", "triton", "vllm", "commit", "command")},
        date="2026-01-01",
        n=9,
    )
    row = tables.Row(case=key, tokens=8, config={}, ours_us=2.0, stock_us=3.0, use="triton")
    tables.write("moe", tables.Table(schema=1, op="moe", provenance=provenance, rows=(row,)), tmp_path)
    tuned.write_table("moe", FACTS, key, {8: ({"x": 2}, 1.5)}, {8}, 15, tmp_path)
    (made,) = tables.load("moe", "moe", "h200", tmp_path).rows
    assert made == row.model_copy(update={"config": {"x": 2}})


def test_what_another_machine_found_reaches_the_table_here(tuner, tmp_path):
    """A search's file was taken in without its configurations once: rows measured with them were taken for stale."""
    run, _ = tuner({1: 10.0, 2: 9.0, 3: 5.0, 4: 12.0, 5: 12.0, 6: 12.0})
    one = group("batch_size=5")
    ((found,),) = run.tune([one])
    there, here = tuned.path_of("h200", "gdn_decode", tmp_path), tmp_path / "here" / "gdn_decode.json"
    assert tuning.merge(there, here, tmp_path / "merged") == [found]
    made = tables.load("gdn", "gdn_decode", "h200", tmp_path / "merged").lookup(one.key, 5)
    assert made == table(tmp_path).lookup(one.key, 5)
    assert (made.config, made.ours_us) == ({"x": 3}, 5.0)
    # what is known already says nothing new: a table that was changed since stays as it is
    tuned.write_table("gdn_decode", FACTS, one.key, {5: ({"x": 6}, 4.0)}, {5}, 15, tmp_path / "merged")
    assert tuning.merge(there, here, tmp_path / "merged") == []
    assert tables.load("gdn", "gdn_decode", "h200", tmp_path / "merged").lookup(one.key, 5).config == {"x": 6}
    assert tuning.merge(tmp_path / "none.json", here, tmp_path / "merged") == []


def rows_of(*costs):
    """Rows with the given {knob: µs}; knob 1 is the heuristic's."""
    facts = {"definition": "d", "key": {}, "tokens": 1, "commit": "c", "source": "s", "date": "d"}
    timed = [[Candidate(config={"x": x}, us=us) for x, us in each.items()] for each in costs]
    return [Row(**facts, case=str(i), heuristic={"x": 1}, candidates=each) for i, each in enumerate(timed)]


def test_promising_candidates_are_few_and_near_the_best():
    (row,) = rows_of({1: 20.0, 2: 10.0, 3: 12.9, 4: 13.1} | {x: 11.0 + x / 1000 for x in range(5, 30)})
    found = [config["x"] for config in tuning.promising([row])]
    assert found[:3] == [1, 2, 5]
    assert len(found) == 1 + tuning.FINALISTS
    assert 4 not in found


def test_a_candidate_that_fails_anywhere_serves_nobody():
    rows = rows_of({1: 10.0, 2: 5.0, 3: 9.0}, {1: 10.0, 3: 9.0})
    assert tuning.decide(rows, [{"x": 1}, {"x": 2}, {"x": 3}]) == {"x": 3}


def test_what_loses_to_stock_on_one_case_serves_none():
    every = [{"x": 1}, {"x": 2}, {"x": 3}]
    rows = rows_of({1: 10.0, 2: 9.0, 3: 4.0}, {1: 10.0, 2: 9.5, 3: 10.5})
    assert tuning.decide(rows, every) == {"x": 3}
    assert tuning.decide(rows, every, [None, None]) == {"x": 3}
    assert tuning.decide(rows, every, [11.0, 10.0]) == {"x": 2}, "3 is slower than stock on the second"
    assert tuning.decide(rows, every, [20.0, 20.0]) == {"x": 3}, "no one is near stock: the product counts"
    assert tuning.decide(rows_of({1: 10.0, 2: 8.0}, {1: 9.0, 2: 10.4}), every[:2], [20.0, 10.0]) == {}
    even = rows_of({1: 10.0, 2: 10.2}, {1: 10.0, 2: 9.9})
    assert tuning.decide(even, every[:2], [20.0, 9.95]) == {"x": 2}, (
        "no faster on the whole, but slower than stock nowhere"
    )
    assert tuning.decide(even, every[:2]) == {}


def test_a_search_hears_what_stock_took(tuner):
    made, *_ = tuner({x: float(x) for x in range(1, 7)})
    (group,) = tuning.groups("gdn_decode", ("model",), "model/qwen3-next/batch_size=8", (8,))[:1]
    assert made._stock(group) == [None]
    case = group.cases[0]
    stored = example() | {"definition": case.spec.name, "case": case.name}
    results.write(made.root / "h200" / "gdn_decode.json", Results.model_validate(HEAD | {"rows": [stored]}))
    assert made._stock(group) == [9.0]


def test_groups_are_the_rows_of_the_table():
    sets = ("model", "agent")
    for op, space in tuning.SPACES.items():
        found = tuning.groups(op, sets)
        assert found
        assert len({(str(g.key), g.tokens) for g in found}) == len(found)
        assert all(g.tokens in tuning.indexed_tokens(op, g.key) for g in found)
        for item in found:
            with tables.override(op, {}):
                first = space.heuristic(item.cases[0], item.key, torch.device("cpu"))
            searched = list(space.search(item.cases[0], item.key, None))
            assert searched
            assert {type(config) for config in searched} == {type(first)}
    found = tuning.groups("gdn_prefill", sets, "model/qwen3-next/lengths*", (8192,))
    prefill = {g.key["sequences"]: g for g in found if g.key["state_dtype"] == "bfloat16"}
    assert {kind: {case.name.rpartition("=")[2] for case in g.cases} for kind, g in prefill.items()} == {
        "one": {"1x8192"},
        "many": {"8x1024", "32x256"},
    }
    # one configuration serves short rows and full ones: a filter that meets some of them means all
    (wide,) = tuning.groups("dsa_topk", sets, "*columns=131072/num_rows=8/*")
    assert {case.options["context"] for case in wide.cases} == {2048, 4096, 8192, 16384, 32768, 65536, 131072}


# compilation ahead of time


def crash(send, job, sm):
    os._exit(11)


def answer(send, job, sm):
    send.send(Failure(f"{job.config['x']} for sm{sm}", final=True))


def test_jobs_run_in_processes_of_their_own(monkeypatch):
    # the processes find crash and answer by the name under which this file was imported
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    jobs = [Job("moe", {"x": x}, ()) for x in range(5)]
    heard = []
    told = precompile.compile_all(jobs, 90, 2, heard.append, answer)
    assert [failure.why for failure in told] == [f"{x} for sm90" for x in range(5)]
    assert sorted(job.config["x"] for job in heard) == list(range(5))
    dead = precompile.compile_all(jobs[:2], 90, 2, heard.append, crash)
    assert dead == [Failure("the compiler died with exit status 11", final=True)] * 2
    assert precompile.compile_all(jobs, 89, 2, heard.append, crash) == [None] * 5


def test_inputs_have_the_shapes_that_are_generated():
    from blackwell_kernels.microbench.workloads import generate

    for definition in ("moe_fp8_block", "gdn_core_decode", "dsa_sparse_mla_fp8", "dsa_indexer_logits_paged"):
        case = next(c for c in select(sets=("cpu",)) if c.definition == definition)
        real, meta = generate(case), precompile.meta_inputs(case)
        assert list(meta) == list(real)
        for name, x in real.items():
            if isinstance(x, torch.Tensor):
                assert (meta[name].shape, meta[name].dtype, meta[name].stride()) == (x.shape, x.dtype, x.stride()), name


# the command


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match="no CUDA device is visible"):
        tune.app(["gdn_decode"], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gdn_decod"], "nothing to tune is named 'gdn_decod'"),
        (["moe", "--set", "cpu"], "no set is named 'cpu'"),
        (["moe", "--case", "no such case"], "no case of moe matches"),
    ],
)
def test_usage_errors_exit_with_2(arguments, complaint):
    done = CliRunner().invoke(tune.app, arguments)
    assert done.exit_code == 2
    assert complaint in done.output


def test_the_table_shows_what_changed():
    (row,) = rows_of({1: 10.0, 2: 8.0})
    row.best = {"x": 2}
    assert tune.cells(row) == ["d 0", "10.00", "8.00", "1.25x", "x=2"]
    row.best = {}
    assert tune.cells(row)[2:] == ["10.00", "1.00x", "heuristic"]
    assert json.loads(json.dumps(row.model_dump()))["best"] == {}
