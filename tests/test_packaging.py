"""The wheel and the editable install hold the whole package under one name, and shadow nobody else's."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIRS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "out")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    # nothing of this process's checkout may leak into the installed one
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BLACKWELL_KERNELS"))}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**clean, **environment}
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree, so that building leaves nothing in the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "checkout", ignore=NOT_SOURCE))


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new virtual environment with this wheel, and with this environment's dependencies in reach."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    # a path in a .pth file is searched, but its own .pth files, editable installs among them, are not run
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="session")
def editable(source, tmp_path_factory) -> Path:
    # what `pip install --editable` asks the build backend for, by the backend of this environment
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    folder = tmp_path_factory.mktemp("editable")
    run(sys.executable, "-W", "ignore", "-c", build, folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return environment(folder / "environment", built)


def test_the_wheel_has_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"blackwell_kernels"}


def test_the_wheel_holds_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {}
    for package, folder in PACKAGE_DIRS.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            # results are this repository's record, not the package's
            skipped = {"tests", "results", "__pycache__"} & set(inside.parts) or path.name == "conftest.py"
            # nested packages have an entry of their own
            nested = any(path.is_relative_to(ROOT / other) and other > folder for other in PACKAGE_DIRS.values())
            if not skipped and not nested and path.suffix in {".py", ".json", ".html", ".jinja", ".j2"}:
                wanted["/".join([*package.split("."), *inside.parts])] = path.relative_to(ROOT)
    missing = {str(path) for name, path in wanted.items() if name not in held}
    assert len(wanted) > 30
    assert not missing, f"add them to packages or package-data in pyproject.toml: {sorted(missing)}"


def test_tests_stay_out_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "/tests/" in name or name.endswith("conftest.py")]


def test_metadata_states_entry_point_licence_and_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
    assert dict(entry_points["vllm.general_plugins"]) == {"blackwell_kernels": "blackwell_kernels:register"}
    assert dict(entry_points["console_scripts"]) == {"blackwell-kernels": "blackwell_kernels.__main__:main"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(PROJECT["project"]["requires-python"])


WHERE = "import importlib, sys; print(importlib.import_module(sys.argv[1]).__file__)"


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_every_package_imports_from_where_it_was_installed(kind, request, tmp_path, source):
    python = request.getfixturevalue(kind)
    home = source if kind == "editable" else python.parent.parent
    for package, folder in PACKAGE_DIRS.items():
        file = Path(run(python, "-c", WHERE, package, cwd=tmp_path).strip())
        assert file.is_relative_to(home), f"{package} came from {file}"
        if kind == "editable":
            assert file == source / folder / "__init__.py"


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_vllm_would_find_and_load_the_entry_point(kind, request, tmp_path):
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "entry = list(entry_points(group='vllm.general_plugins', name='blackwell_kernels'))[0]\n"
        "print(callable(entry.load()), 'torch' in sys.modules, 'vllm' in sys.modules)"
    )
    python = request.getfixturevalue(kind)
    assert run(python, "-c", code, cwd=tmp_path).split() == ["True", "False", "False"]


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_the_command_runs_as_a_module_and_as_a_script(kind, request, tmp_path):
    python = request.getfixturevalue(kind)
    assert "doctor" in run(python, "-m", "blackwell_kernels", "--help", cwd=tmp_path)
    assert "doctor" in run(python.parent / "blackwell-kernels", "--help", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_there_is_no_top_level_kernels_module(kind, request, tmp_path, source):
    python = request.getfixturevalue(kind)
    code = "from importlib.util import find_spec; s = find_spec('kernels'); print(s and s.submodule_search_locations)"
    found = run(python, "-c", code, cwd=tmp_path)
    # Hugging Face's may be there
    assert str(source) not in found
    assert str(python.parent.parent) not in found
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's kernels from the repo root"


def test_another_kernels_package_wins_in_the_repository_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("NAME = 'Hugging Face'\n")
    code = "import sys; sys.path.append(sys.argv[1]); import kernels; print(kernels.NAME)"
    assert run(sys.executable, "-c", code, tmp_path).strip() == "Hugging Face"


def test_transformers_imports_in_the_repository_root():
    pytest.importorskip("transformers")
    code = "import transformers.integrations.hub_kernels, transformers; print(transformers.AutoConfig.__name__)"
    assert run(sys.executable, "-c", code).strip() == "AutoConfig"
