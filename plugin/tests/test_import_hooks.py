from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys

import pytest

from blackwell_kernels.import_hooks import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module on disk that nobody has imported yet."""
    name = "bk_hooked_module"
    (tmp_path / f"{name}.py").write_text("value = 1\ndef f():\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


def test_it_waits_for_the_import_and_runs_once(module):
    seen = []
    when_imported(module, lambda m: seen.append(m.value))
    assert seen == []
    importlib.import_module(module)
    importlib.import_module(module)
    assert seen == [1]


def test_an_imported_module_is_served_at_once(module):
    importlib.import_module(module)
    seen = []
    when_imported(module, lambda m: seen.append(m.__name__))
    assert seen == [module]


def test_from_import_sees_the_patched_name(module):
    when_imported(module, lambda m: setattr(m, "value", 2))
    namespace: dict = {}
    exec(f"from {module} import value", namespace)
    assert namespace["value"] == 2


def test_looking_a_spec_up_does_not_use_the_action_up(module):
    seen = []
    when_imported(module, lambda m: seen.append(1))
    assert importlib.util.find_spec(module) is not None
    assert seen == []
    importlib.import_module(module)
    assert seen == [1]


def test_several_actions_run_in_order_and_source_stays_readable(module):
    seen = []
    when_imported(module, lambda m: seen.append("a"))
    when_imported(module, lambda m: seen.append("b"))
    imported = importlib.import_module(module)
    assert seen == ["a", "b"]
    assert "return value" in inspect.getsource(imported.f)


def test_an_error_in_an_action_surfaces_in_the_import(module):
    def refuse(m):
        raise RuntimeError("no")

    when_imported(module, refuse)
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(module)


def test_a_missing_module_stays_missing():
    when_imported("bk_no_such_module", lambda m: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bk_no_such_module")
