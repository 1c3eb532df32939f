"""The order, what is run again, when the tables are written, the report; and that the rented GPU runs exactly that."""

import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from microbench_examples import HEAD, row
from typer.testing import CliRunner

from blackwell_kernels.errors import MissingRequirementError, TableError
from blackwell_kernels.microbench import validate, validate_cli
from blackwell_kernels.microbench.results import Results, write
from blackwell_kernels.microbench.specs import OPS
from blackwell_kernels.microbench.validate import Step

STEPS = [Step("tests", ("t",), gates=True), Step("bench", ("b",), gates=True), Step("profile moe", ("p",))]
TABLES = Step("tables", ("d",))


class Machine:
    """Pretends to run commands; `broken` ones fail."""

    def __init__(self, *broken):
        self.broken, self.ran = set(broken), []

    def __call__(self, command, log):
        self.ran.append(command[0])
        log.write_text(f"output of {command[0]}\nits last line\n")
        return int(command[0] in self.broken)


def run(folder, machine, source="s1", **more):
    return validate.run(STEPS, TABLES, folder, source=source, say=lambda line: None, execute=machine, **more)


def test_all_steps_in_order_then_the_tables(tmp_path):
    machine = Machine()
    state = run(tmp_path, machine)
    assert machine.ran == ["t", "b", "p", "d"]
    assert {outcome.status for outcome in state.steps.values()} == {"passed"}
    assert not validate.failed(state)
    assert (tmp_path / "profile-moe.log").is_file()


def test_what_passed_with_this_source_is_not_run_again(tmp_path):
    run(tmp_path, Machine("b"))
    again = Machine()
    state = run(tmp_path, again)
    assert again.ran == ["b", "d"]
    assert not validate.failed(state)
    other = Machine()
    run(tmp_path, other, source="s2")
    assert other.ran == ["t", "b", "p", "d"], "another source has passed nothing"


def test_what_follows_from_stored_results_is_made_anew(tmp_path):
    steps = [*STEPS, Step("pages", ("r",), always=True)]
    for ran in (["t", "b", "p", "r", "d"], ["r", "d"]):
        machine = Machine()
        validate.run(steps, TABLES, tmp_path, source="s1", say=lambda line: None, execute=machine)
        assert machine.ran == ran


@pytest.mark.parametrize("broken", ["t", "b"])
def test_no_tables_where_a_gate_failed(broken, tmp_path):
    machine = Machine(broken)
    state = run(tmp_path, machine)
    assert machine.ran == ["t", "b", "p"], "a failure keeps no later step from running"
    assert state.steps["tables"].status == "skipped"
    assert "did not pass with this source" in state.steps["tables"].why
    assert validate.failed(state)
    name = {"t": "tests", "b": "bench"}[broken]
    assert state.steps[name].why == "exit status 1: its last line"


def test_a_failed_profile_fails_the_command_and_not_the_tables(tmp_path):
    state = run(tmp_path, Machine("p"))
    assert state.steps["tables"].status == "passed"
    assert validate.failed(state)


def test_a_gate_that_was_skipped_or_left_out_holds_nothing(tmp_path):
    machine = Machine()
    state = run(tmp_path, machine, only=["bench"])
    assert machine.ran == ["b"]
    assert "tests did not pass" in state.steps["tables"].why
    skipped = [Step("tests", ("t",), gates=True, skipped="no tests here"), *STEPS[1:]]
    state = validate.run(skipped, TABLES, tmp_path, source="s1", say=lambda line: None, execute=machine)
    assert state.steps["tests"].status == "skipped"
    assert state.steps["tables"].status == "skipped"


def test_the_plan_is_tests_tuning_bench_profiles_equality(tmp_path):
    steps = validate.plan(tmp_path, "b200", sets=("model",))
    names = [step.name for step in steps]
    models = ["equality qwen3-next", "equality deepseek-v3.2"]
    assert names == ["tests", "guards", "tune", "bench", "audit", "profile", "bounds", *models, "pages"]
    assert {step.name for step in steps if step.gates} == {"tests", "guards", "bench", "audit", *models}
    bench = next(step for step in steps if step.name == "bench")
    assert bench.command[1:] == ("-m", "blackwell_kernels", "bench", "--resume", "--set", "model")
    assert validate.tables_step("b200").command[-3:] == ("bench", "dispatch", "b200")
    elsewhere = validate.plan(tmp_path, "b200", sets=(), checkout=tmp_path)
    assert "run this in a clone" in elsewhere[0].skipped


def test_every_command_of_the_plan_exists_with_its_options(tmp_path):
    from blackwell_kernels.cli import run as command_line

    for step in [*validate.plan(tmp_path, "b200", sets=("model",), commit="abc"), validate.tables_step("b200")]:
        if step.name in ("tests", "guards"):
            paths = [word for word in step.command[3:] if "/" in word]
            assert paths
            assert all(Path(path).is_dir() for path in paths)
            continue
        words = list(step.command[3:])
        # `--help` in front of the operands is parsed after every option before it was accepted
        assert command_line([*words, "--help"]) == 0, step.command


def test_what_records_a_commit_is_told_it(tmp_path):
    told = [step.name for step in validate.plan(tmp_path, "b200", sets=(), commit="abc") if "abc" in step.command]
    assert told == ["tune", "bench", "profile", "equality qwen3-next", "equality deepseek-v3.2"]
    assert not any("--commit" in step.command for step in validate.plan(tmp_path, "b200", sets=()))


def test_the_report_has_the_machine_the_steps_and_every_operator(tmp_path, monkeypatch):
    root = tmp_path / "results"
    write(root / "b200" / "gdn_decode.json", Results.model_validate({**HEAD, "gpu": "NVIDIA B200", "rows": [row()]}))
    state = run(tmp_path / "out", Machine("b"))
    facts = {"power.limit": "1000.00 W", "clocks.max.sm": "1965 MHz", "driver_version": "580.1"}
    validate.write_report(state, facts, "b200", root, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    for part in ("1000.00 W", "1965 MHz", "580.1", "| bench | failed |", "exit status 1", "| gdn_decode | 1 of 1 |"):
        assert part in text
    assert text.count("not measured") == len(OPS) - 1
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["steps"]["bench"]["status"] == "failed"
    assert told["machine"] == facts


def test_machine_facts_say_what_could_not_be_read(monkeypatch):
    def none(*arguments, **more):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(validate.subprocess, "run", none)
    assert validate.machine()["nvidia-smi"] == "not read: FileNotFoundError"
    line = ", ".join(f"value {i}" for i in range(len(validate._SMI)))
    answer = types.SimpleNamespace(stdout=line + "\n")
    monkeypatch.setattr(validate.subprocess, "run", lambda *arguments, **more: answer)
    assert validate.machine()["power.limit"] == "value 2"


def test_a_damaged_state_is_an_error_that_names_it(tmp_path):
    (tmp_path / "state.json").write_text("{}}")
    with pytest.raises(TableError, match=r"state\.json.*remove it to start anew"):
        validate.read_state(tmp_path)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(validate_cli.app, [])
    assert isinstance(done.exception, MissingRequirementError)
    assert "no CUDA device is here" in str(done.exception)
    assert CliRunner().invoke(validate_cli.app, ["--set", "models"]).exit_code == 2


class Recorder:
    """Stands for the modal package: remembers every call, returns itself."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **more):
            self.calls.append((name, arguments, more))
            return self

        call.from_registry = call.from_name = lambda *a, **k: call(*a, **k)
        return call

    def __call__(self, function):
        self.function = function
        return function


@pytest.fixture
def rented(tmp_path, monkeypatch):
    """(the app's module, the calls that it made to modal), in folders of its own."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "modal", recorder)
    monkeypatch.delitem(sys.modules, "blackwell_kernels.microbench.modal_app", raising=False)
    app = importlib.import_module("blackwell_kernels.microbench.modal_app")
    monkeypatch.delitem(sys.modules, "blackwell_kernels.microbench.modal_app")
    monkeypatch.setattr(app, "OUT", str(tmp_path / "out"))
    monkeypatch.setattr(app, "REPOSITORY", str(tmp_path / "repository"))
    return app, recorder.calls


def test_the_rented_gpu_runs_exactly_that(rented, monkeypatch):
    app, calls = rented
    (function,) = [more for name, _, more in calls if name == "function"]
    assert function["gpu"] == "B200"
    words = app.command("--only bench")
    assert words[:2] == ["blackwell-kernels", "validate"]
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", app.commit())
    (copied,) = [(arguments, more) for name, arguments, more in calls if name == "add_local_dir"]
    assert (Path(copied[0][0]) / "pyproject.toml").is_file()
    assert {".git", ".venv"} <= set(copied[1]["ignore"])
    for kept in app.KEPT:
        assert (Path(copied[0][0]) / kept).is_dir()


def test_the_rented_gpu_has_what_the_kernels_tests_import(rented):
    app, calls = rented
    installed = {word for name, words, _ in calls if name == "pip_install" for word in words}
    text = "".join(path.read_text() for path in (app.HERE / "kernels").rglob("tests/*.py"))
    text = re.sub(r"\"{3}.*?\"{3}", "", text, flags=re.DOTALL)  # sources that a test writes are not its own
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) - set(sys.stdlib_module_names)
    of_ours_and_vllm = {"blackwell_kernels", "torch", "triton", "numpy", "pydantic", "typer"}
    assert {"pytest", "hypothesis"} <= imported
    assert imported - of_ours_and_vllm <= installed


def test_what_is_measured_there_is_kept_at_once(rented, tmp_path, monkeypatch):
    app, calls = rented
    repository, out = tmp_path / "repository", tmp_path / "out"
    for kept in app.KEPT:
        (repository / kept).mkdir(parents=True)
    (repository / "microbench/results/h200").mkdir()
    (out / "kernels/gdn/configs").mkdir(parents=True)
    for place in ("out/kernels/gdn/configs", "repository/kernels/gdn/configs", "repository/microbench/results/h200"):
        (tmp_path / place / "x.json").write_text(place)
    ran = []

    def run(command, **more):
        ran.append(command)
        (repository / "microbench/results/b200").mkdir(exist_ok=True)
        (repository / "microbench/results/b200/moe.json").write_text("measured")
        raise KeyboardInterrupt  # as when its time is up

    monkeypatch.setattr(app.subprocess, "run", run)
    for _ in range(2):  # again in the same container
        with pytest.raises(KeyboardInterrupt):
            app.validate("--only bench")
        assert (out / "microbench/results/b200/moe.json").read_text() == "measured"
        assert (out / "microbench/results/h200/x.json").is_file()
        assert (repository / "kernels/gdn/configs/x.json").read_text() == "out/kernels/gdn/configs", "the earlier run's"
    assert ran == [app.command("--only bench")] * 2
    assert ("commit", (), {}) in calls
