from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import blackwell_kernels
from blackwell_kernels import doctor, env

PLUGIN = Path(blackwell_kernels.__file__).parent


@pytest.fixture(autouse=True)
def no_gpu_by_default(monkeypatch):
    doctor._gpus.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name, which=doctor.shutil.which: None if "smi" in name else which(name))
    yield
    doctor._gpus.cache_clear()


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def bare(tmp_path):
    """Run the command in a Python that has nothing but its standard library and this package."""
    (tmp_path / "blackwell_kernels").symlink_to(PLUGIN)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['blackwell-kernels', *sys.argv[1:]]; "
        "from blackwell_kernels.__main__ import main; main()"
    )

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables}
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, *arguments], capture_output=True, text=True, env=environment
        )

    return run


def test_it_runs_without_any_dependency_and_says_what_is_missing(bare):
    done = bare("doctor")
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "next: mend what failed, then blackwell-kernels doctor"
    for name in ("torch", "vllm", "dependencies", "entry point"):
        assert any(line.split()[:2] == ["fail", name.split()[0]] for line in lines), name
    assert any(line.startswith("ok    python") for line in lines)
    assert "fix: make setup, or pip install torch==2.13.0" in done.stdout


def test_its_json_has_a_fixed_shape(bare):
    done = bare("doctor", "--json")
    found = json.loads(done.stdout)
    assert set(found) == {"schema", "version", "exit_code", "checks", "next"}
    assert (found["schema"], found["exit_code"], done.returncode) == (1, 3, 3)
    for check in found["checks"]:
        assert set(check) == {"name", "status", "what", "why", "fix", "environment"}
        assert check["status"] in {"ok", "warn", "fail", "skip"}
        assert check["name"]
        assert check["what"]
        if check["status"] == "fail":
            assert check["fix"], check


def test_a_usage_error_is_2(bare):
    assert bare("doctor", "--jsn").returncode == 2


def test_other_commands_say_what_to_install(bare):
    done = bare("info")
    assert done.returncode == 3
    assert "needs the package typer: pip install typer" in done.stderr
    assert done.stderr.splitlines()[-1] == "next: blackwell-kernels doctor"


def check(name: str, status: str, environment: bool = False) -> doctor.Check:
    return doctor.Check(name, status, "what", environment=environment)


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([], 0),
        ([check("a", "ok"), check("b", "warn"), check("c", "skip"), check("d", "warn", True)], 0),
        ([check("a", "ok"), check("b", "fail")], 1),
        ([check("a", "fail"), check("b", "fail", True)], 3),
    ],
)
def test_exit_codes(checks, code):
    assert doctor.exit_code(checks) == code


def test_a_broken_examination_does_not_hide_the_others(monkeypatch):
    def _odd_thing():
        raise RuntimeError("boom")
        yield

    monkeypatch.setattr(doctor, "EXAMINATIONS", (_odd_thing, doctor._python))
    first, second = doctor.run()
    assert (first.name, first.status, first.what) == ("odd thing", "fail", "cannot be examined: RuntimeError: boom")
    assert second.name == "python"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_variable_that_means_nothing_fails_and_a_stranger_warns(monkeypatch):
    monkeypatch.setenv(env.DISABLE.name, "gdn_decod")
    monkeypatch.setenv("BLACKWELL_KERNELS_STRCT", "1")
    failed, warned = doctor._variables()
    assert (failed.status, warned.status) == ("fail", "warn")
    assert "did you mean 'gdn_decode'" in failed.what
    assert "did you mean 'BLACKWELL_KERNELS_STRICT'" in warned.what
    assert doctor.exit_code([failed]) == 1


@pytest.mark.parametrize(
    ("plugins", "enabled", "status", "words"),
    [
        (None, None, "ok", "unset"),
        ("blackwell_kernels", None, "ok", "asks for the plugin"),
        ("blackwell_kernels", "0", "warn", "wins"),
        ("other", None, "fail", "VLLM_PLUGINS=other,blackwell_kernels"),
        ("", None, "fail", "VLLM_PLUGINS=blackwell_kernels"),
        ("other, blackwell_kernels", None, "fail", "VLLM_PLUGINS=other,blackwell_kernels"),
    ],
)
def test_the_allow_list(monkeypatch, plugins, enabled, status, words):
    for name, value in (("VLLM_PLUGINS", plugins), ("BLACKWELL_KERNELS", enabled)):
        if value is not None:
            monkeypatch.setenv(name, value)
    (found,) = doctor._allow_list()
    assert found.status == status
    assert words in f"{found.what} {found.why} {found.fix}"


# --- the machine ------------------------------------------------------------------------------------------------------


def nvidia_smi(tmp_path, monkeypatch, script: str) -> None:
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(path) if name == "nvidia-smi" else "/usr/bin/cc")
    doctor._gpus.cache_clear()


def test_a_gpu_is_named_with_its_driver(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H200, 9.0, 570.1, 143771 MiB'")
    (found,) = doctor._gpu()
    assert (found.status, found.what) == ("ok", "NVIDIA H200, sm90, driver 570.1, 143771 MiB")


def test_an_old_gpu_is_warned_of(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA A100, 8.0, 570.1, 81920 MiB'")
    (found,) = doctor._gpu()
    assert found.status == "warn"
    assert "sm90" in found.why


@pytest.mark.parametrize("script", ["echo no driver >&2; exit 9", "true"])
def test_a_driver_that_does_not_answer_means_no_gpu(tmp_path, monkeypatch, script):
    nvidia_smi(tmp_path, monkeypatch, script)
    (found,) = doctor._gpu()
    assert found.status == "skip"
    assert not doctor._has_gpu()


@pytest.mark.parametrize(
    ("cuda", "status"), [("cuda: Optional[str] = '13.0'", "ok"), ("cuda: Optional[str] = None", "fail")]
)
def test_a_gpu_needs_a_cuda_build_of_torch(tmp_path, monkeypatch, cuda, status):
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H200, 9.0, 570.1, 143771 MiB'")
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{cuda}\n")
    monkeypatch.setattr(doctor, "_folder", lambda name: tmp_path)
    monkeypatch.setattr(doctor, "_version", lambda name: "2.11.0")
    (found,) = doctor._torch()
    assert found.status == status


def versions(monkeypatch, **known: str | None) -> None:
    monkeypatch.setattr(doctor, "_version", known.get)
    monkeypatch.setattr(doctor, "_folder", lambda name: Path("/there") if name in known else None)


@pytest.mark.parametrize(
    ("version", "status", "environment"),
    [("0.24.0", "ok", False), ("0.32.0+cpu", "ok", False), ("0.33.0", "warn", False), ("0.20.2", "fail", True)],
)
def test_versions_of_vllm(monkeypatch, version, status, environment):
    versions(monkeypatch, vllm=version)
    (found,) = doctor._vllm()
    assert (found.status, found.environment) == (status, environment)


def test_a_vllm_without_its_distribution_is_explained(monkeypatch):
    versions(monkeypatch, vllm=None)
    (found,) = doctor._vllm()
    assert (found.status, found.what) == ("fail", "a package without the distribution vllm")


def test_a_broken_contract_fails_with_what_it_is(monkeypatch):
    from blackwell_kernels.model_patches import contracts

    broken = contracts.Mismatch(("moe",), "vllm.m:apply", "(x)", "(y)")
    monkeypatch.setattr(contracts, "check_source", lambda root, version: [broken])
    versions(monkeypatch, vllm="0.33.0")
    (found,) = doctor._contracts()
    assert (found.status, found.what) == ("fail", "moe: vllm.m:apply: expected (x), found (y)")
    assert doctor.exit_code([found]) == 1
    monkeypatch.setenv(env.DISABLE.name, "moe")
    assert [check.status for check in doctor._contracts()] == ["ok"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}'])
def test_a_damaged_table_fails_with_the_file_and_what_to_do(tmp_path, monkeypatch, text):
    monkeypatch.setattr(doctor, "_folder", lambda name: tmp_path / name)
    tables = tmp_path / "blackwell_kernels.moe" / "configs" / "h200"
    tables.mkdir(parents=True)
    (tables / "moe_routing.json").write_text('{"rows": [1]}')
    (found,) = doctor._tables()
    assert found.status == "ok"
    assert "h200" in found.what
    (tables / "moe.json").write_text(text)
    (found,) = doctor._tables()
    assert found.status == "fail"
    assert str(tables / "moe.json") in found.what
    assert found.fix.endswith("blackwell-kernels bench dispatch h200")


def test_the_shipped_tables_are_whole():
    (found,) = doctor._tables()
    assert found.status == "ok"
    assert "h200" in found.what


def test_the_installed_vllm_has_every_signature():
    pytest.importorskip("vllm")
    assert [check.status for check in doctor._contracts()] == ["ok"]


def test_a_folder_named_kernels_on_the_path_is_found(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "kernels", raising=False)  # transformers may have looked for it
    (tmp_path / "kernels").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = doctor._shadowing()
    assert found.status == "ok"  # a plain folder shadows nothing
    (tmp_path / "kernels" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    (found,) = doctor._shadowing()
    assert (found.status, found.what) == ("fail", f"`import kernels` finds {tmp_path / 'kernels'}")


def test_a_cache_that_cannot_be_written_fails_with_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "new"))
    found = by_name(list(doctor._caches()))
    assert (found["triton cache"].status, found["vllm cache"].status) == ("fail", "ok")
    assert "TRITON_CACHE_DIR" in found["triton cache"].fix


def test_a_full_disk_is_warned_of(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1})())
    assert {check.status for check in doctor._caches()} == {"warn"}


def test_the_entry_point_is_there():
    (found,) = doctor._entry_point()
    assert found.status == "ok"


def test_a_compiler_and_headers_are_needed_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    (found,) = doctor._compiler()
    assert (found.status, found.environment) == ("fail", True)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (found,) = doctor._compiler()
    assert "-dev" in found.fix
    (tmp_path / "Python.h").write_text("")
    (found,) = doctor._compiler()
    assert found.status == "ok"
