from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from blackwell_kernels import activation, env
from blackwell_kernels.errors import ContractError, EnvironmentSettingError

LOADING = """
import json, sys
before = set(sys.modules)
import blackwell_kernels
blackwell_kernels.register()
once = list(sys.meta_path)
blackwell_kernels.register()
from blackwell_kernels import import_hooks
print(json.dumps({
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names),
    "finders": len(sys.meta_path) - len(once),
    "waiting": {name: len(actions) for name, actions in import_hooks._waiting.items()},
}))
"""

# every attribute of vLLM's imported modules and of their classes, before and after
UNTOUCHED = """
import importlib, inspect, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name == "vllm" or name.startswith("vllm."):
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if inspect.isclass(value) and value.__module__ == name:
                    found.update({(name, f"{key}.{k}"): id(v) for k, v in list(vars(value).items())})
    return found

before = attributes()
import blackwell_kernels
blackwell_kernels.register()
after = attributes()
print(json.dumps({"count": len(before), "changed": sorted(".".join(k) for k in after if after[k] != before.get(k))}))
"""


def _python(code: str, *arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_imports_nothing_outside_the_standard_library_and_registers_once():
    found = _python(LOADING)
    assert found == {"loaded": ["blackwell_kernels"], "finders": 0, "waiting": {"vllm.engine.arg_utils": 1}}


@pytest.mark.parametrize("variables", [{}, {"BLACKWELL_KERNELS_DISABLE": "all", "BLACKWELL_KERNELS": "1"}])
def test_merely_installed_or_all_disabled_touches_nothing_but_the_flag(monkeypatch, variables):
    pytest.importorskip("vllm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = _python(
        UNTOUCHED,
        "vllm.engine.arg_utils",
        "vllm.v1.worker.worker_base",
        "vllm.model_executor.layers.fused_moe.oracle.fp8",
        "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn",
        "vllm.v1.attention.backends.registry",
    )
    assert found["count"] > 1000
    assert found["changed"] == ["vllm.engine.arg_utils.EngineArgs.add_cli_args"]


@pytest.mark.parametrize(
    ("enabled", "plugins", "asked"),
    [
        (None, None, None),
        (None, "", None),
        (None, "other", None),
        (None, "blackwell_kernels", "VLLM_PLUGINS"),
        (None, "other,blackwell_kernels", "VLLM_PLUGINS"),
        (None, "blackwell_kernels_too", None),
        ("1", None, "BLACKWELL_KERNELS=1"),
        ("1", "other", "BLACKWELL_KERNELS=1"),
        ("0", None, None),
        ("0", "blackwell_kernels", None),
    ],
)
def test_asked_for(monkeypatch, enabled, plugins, asked):
    for name, value in (("BLACKWELL_KERNELS", enabled), ("VLLM_PLUGINS", plugins)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert activation.asked_by() == asked


def test_a_mistyped_master_switch_is_an_error_not_a_shrug(monkeypatch):
    monkeypatch.setenv("BLACKWELL_KERNELS", "ja")
    with pytest.raises(EnvironmentSettingError, match="BLACKWELL_KERNELS=ja"):
        activation.asked_by()


def test_a_stranger_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setenv("BLACKWELL_KERNELS_STRCT", "1")
    activation.asked_by()
    activation.asked_by()
    assert [record.getMessage() for record in caplog.records] == [
        "blackwell-kernels: BLACKWELL_KERNELS_STRCT is set, but no such variable exists; did you mean "
        "'BLACKWELL_KERNELS_STRICT'?. `blackwell-kernels env` lists them."
    ]


@pytest.fixture
def patches(monkeypatch):
    """Stands in for model_patches and for the two modules that wrap vLLM: counts activations."""
    from blackwell_kernels import load_report, metrics, model_patches

    calls: list[str] = []
    monkeypatch.setattr(model_patches, "activate", lambda: calls.append("patches"), raising=False)
    monkeypatch.setattr(load_report, "install", lambda: calls.append("load"))
    monkeypatch.setattr(metrics, "install", lambda: calls.append("metrics"))
    monkeypatch.setattr(activation, "vllm_version", lambda: "0.32.0+cpu")
    return calls


def test_activation_happens_once_and_says_so_in_one_line(patches, caplog):
    caplog.set_level("INFO")
    activation.activate("--plugin")
    activation.activate("--plugin")
    assert patches == ["patches", "load", "metrics"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "asked for by --plugin, vLLM 0.32.0+cpu)" in lines[0]


def test_the_line_is_not_lost_before_vllm_sets_its_log_up(patches, monkeypatch, capsys):
    monkeypatch.setattr(activation, "logger", logging.Logger("without handlers"))
    activation.activate("--plugin")
    assert "on in MainProcess" in capsys.readouterr().err


def test_activation_names_the_run_for_children_and_writes_a_status(patches, monkeypatch, tmp_path):
    monkeypatch.setenv(env.STATUS_DIR.name, str(tmp_path))
    activation.activate("--plugin")
    run = env.RUN.get()
    assert run
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["run"] == run
    monkeypatch.setattr(activation, "_activated", False)
    activation.activate("BLACKWELL_KERNELS=1")  # as a child would
    assert env.RUN.get() == run


def test_an_own_status_directory_is_private_and_vanishes_at_exit(patches):
    code = """
import os, stat
from blackwell_kernels import activation, env
activation._open_run()
print(env.STATUS_DIR.get(), stat.S_IMODE(os.stat(env.STATUS_DIR.get()).st_mode))
if os.fork() == 0:
    raise SystemExit  # a forked child's exit must leave it standing
os.wait()
print(os.path.isdir(env.STATUS_DIR.get()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    directory, mode, standing = done.stdout.split()
    assert int(mode) == 0o700
    assert standing == "True"
    import os

    assert not os.path.exists(directory)


def test_too_old_a_vllm_is_refused_with_what_to_do(patches, monkeypatch):
    monkeypatch.setattr(activation, "vllm_version", lambda: "0.20.2")
    with pytest.raises(ContractError, match=r"this is vLLM 0\.20\.2; it needs 0\.24 or newer.*Upgrade vLLM, or start"):
        activation.activate("VLLM_PLUGINS")
    assert patches == []


@pytest.fixture
def untested(patches, monkeypatch):
    """An untested vLLM; what a test puts in the list differs from the contracts."""
    from blackwell_kernels.model_patches import contracts

    mismatches: list[contracts.Mismatch] = []
    monkeypatch.setattr(activation, "vllm_version", lambda: "0.33.0")
    monkeypatch.setattr(contracts, "check_source", lambda root, version: mismatches)
    return mismatches


def test_an_untested_vllm_with_other_signatures_is_refused_with_what_to_leave_out(patches, untested, monkeypatch):
    from blackwell_kernels.model_patches.contracts import Mismatch

    untested.append(Mismatch(("dsa_indexer",), "vllm.m:f", "(a, b)", "(a, c)"))
    with pytest.raises(
        ContractError, match=r"vllm\.m:f: expected \(a, b\), found \(a, c\)\nUse vLLM 0\.24 or 0\.32"
    ) as e:
        activation.activate("--plugin")
    assert f"{env.DISABLE.name}=dsa_indexer" in str(e.value)
    assert patches == []
    monkeypatch.setenv(env.DISABLE.name, "dsa_indexer")
    activation.activate("--plugin")
    assert patches == ["patches", "load", "metrics"]


def test_the_process_that_started_this_one_has_checked_already(patches, untested, monkeypatch, caplog):
    monkeypatch.setenv(env.RUN.name, "1-1")
    activation.activate("BLACKWELL_KERNELS=1")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_an_untested_vllm_with_the_right_signatures_is_warned_of(patches, untested, caplog):
    activation.activate("--plugin")
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "not tested with vLLM 0.33.0 (tested: 0.24 or 0.32)" in warning.getMessage()
    assert patches == ["patches", "load", "metrics"]


def test_a_broken_contract_reaches_the_user(patches, monkeypatch):
    from blackwell_kernels import model_patches

    def refuse():
        raise ContractError("forward_core has changed")

    monkeypatch.setattr(model_patches, "activate", refuse)
    with pytest.raises(ContractError, match="forward_core has changed"):
        activation.activate("--plugin")


def test_a_bad_variable_stops_activation_before_anything_is_touched(patches, monkeypatch):
    monkeypatch.setenv(env.DISABLE.name, "gdn")
    monkeypatch.setenv(env.STRICT.name, "2")
    with pytest.raises(EnvironmentSettingError) as caught:
        activation.activate("--plugin")
    assert env.DISABLE.name in str(caught.value)
    assert env.STRICT.name in str(caught.value)
    assert patches == []


@pytest.mark.parametrize(
    ("version", "release"),
    [("0.24.0", (0, 24)), ("0.32.1rc1.dev3+gabc", (0, 32)), ("1.0", (1, 0)), ("dev", None), ("0.1.dev7+g1", None)],
)
def test_releases(version, release):
    assert activation.parse_release(version) == release
    assert activation.check_version(version) == release
