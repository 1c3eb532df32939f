from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest
import typer

from blackwell_kernels import cli, env
from blackwell_kernels.errors import EnvironmentSettingError, TableError


@pytest.fixture
def command(capsys):
    """Run a command line; exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_table_of_variables_is_what_env_generates(command):
    assert command("env", "--markdown") == (0, env.markdown_table(), "")


def test_env_shows_what_is_set(command, monkeypatch):
    monkeypatch.setenv(env.STRICT.name, "1")
    code, out, _ = command("env", "--json")
    found = {row["name"]: row["value"] for row in json.loads(out)["variables"]}
    assert (code, found[env.STRICT.name], found[env.DISABLE.name]) == (0, "1", "")
    assert command("env")[1].splitlines()[-1] == "next: blackwell-kernels doctor"


def test_info_names_every_operator(command):
    code, out, _ = command("info", "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["op"] for row in found["ops"]] == list(env.HOOK_OPS)
    for row in found["ops"]:
        assert row["cpu"] is True, row
        assert row["cuda"] is True, row
        assert row["torch_ops"]
    text = command("info")[1]
    assert all(op in text for op in env.HOOK_OPS)
    assert text.splitlines()[-1] == "next: vllm serve MODEL --plugin blackwell_kernels"


def test_info_tells_where_an_operator_was_measured(command, tmp_path, monkeypatch, make_table):
    from blackwell_kernels.common import tables

    tables.write("moe", make_table("moe", [({"heads": 16}, 1, "triton"), ({"heads": 16}, 64, "stock")]), tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables.load, "__defaults__", (tmp_path,))
    assert "h200 2025-01-01 (ours in 1 of 2 rows)" in command("info")[1]


def test_doctor_is_the_same_through_typer(command):
    code, out, _ = command("doctor", "--json")
    assert json.loads(out)["exit_code"] == code


@pytest.mark.parametrize("arguments", [("inf",), ("info", "--jsn"), ("env", "--x")])
def test_usage_errors_are_2(command, arguments):
    code, _, err = command(*arguments)
    assert code == 2
    assert "inf" in err or "--" in err


@pytest.mark.parametrize("name", ["bench", "e2e"])
def test_a_sub_application_gets_its_arguments_and_its_exit_code_counts(command, monkeypatch, name):
    application = typer.Typer()

    @application.callback()
    def main() -> None: ...

    @application.command()
    def go(case: str = "none", code: int = 0) -> None:
        """Goes."""
        print(f"case {case}")
        raise typer.Exit(code)

    monkeypatch.setattr(importlib, "import_module", lambda module: SimpleNamespace(app=application))
    assert command(name, "go", "--case", "x", "--code", "1")[:2] == (1, "case x\n")
    assert command(name, "go")[:2] == (0, "case none\n")
    code, out, _ = command(name, "go", "--help")
    assert code == 0
    assert f"blackwell-kernels {name} go" in out


def test_warmup_without_a_gpu_is_an_environment_error(command, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3NextForCausalLM"]}')
    code, out, err = command("warmup", str(tmp_path))
    assert (code, out) == (3, "")
    assert "there is no CUDA device here" in err


@pytest.mark.parametrize("late", [False, True], ids=["of all commands", "of one"])
@pytest.mark.parametrize(("name", "extra"), [("bench", "bench"), ("e2e", "e2e")])
def test_a_missing_dependency_is_named_with_how_to_install_it(command, monkeypatch, name, extra, late):
    def missing(*_args, **_options):
        raise ModuleNotFoundError("No module named 'locust'", name="locust")

    there = SimpleNamespace(app=missing)
    monkeypatch.setattr(importlib, "import_module", (lambda module: there) if late else missing)
    code, _, err = command(name, "anything")
    assert code == 3
    assert f"`{name}` needs locust" in err
    assert f"pip install -e '.[{extra}]'" in err


@pytest.mark.parametrize(
    ("error", "code"), [(TableError("moe.json: broken"), 1), (EnvironmentSettingError("STRICT=2"), 3)]
)
def test_our_own_errors_are_one_line_and_an_exit_code(command, monkeypatch, error, code):
    from blackwell_kernels import info

    def fail():
        raise error

    monkeypatch.setattr(info, "collect", fail)
    found = command("info")
    assert found == (code, "", f"error: {error}\nnext: blackwell-kernels doctor\n")


@pytest.mark.parametrize("arguments", [("e2e", "demo", "--out"), ("e2e", "soak", "--out"), ("bench", "dataset")])
def test_a_place_that_cannot_be_written_is_one_line_and_an_environment_error(command, tmp_path, arguments):
    (tmp_path / "file").write_text("in the way")
    code, _, err = command(*arguments, str(tmp_path / "file"))
    assert code == 3
    assert f"error: {tmp_path / 'file'}" in err
    assert "next: the same command" in err
