from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from blackwell_kernels import env, status
from blackwell_kernels.errors import FallbackError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv(env.STATUS_DIR.name, str(tmp_path))
    monkeypatch.setenv(env.RUN.name, "2-1")
    return tmp_path


def test_a_snapshot_holds_what_was_recorded(directory):
    status.set_arch("sm90")
    status.record_layer("moe", "layers.0", "stock", "first")
    status.record_layer("moe", "layers.0", "triton", "tuned")
    status.count("moe", "layers.0", "triton", 7, "prefill")
    status.count("moe", "layers.0", "triton", 1, "prefill")
    status.count("moe", "layers.0", "stock", 1, "decode")
    found = status.snapshot()
    assert found["layers"] == [{"op": "moe", "layer": "layers.0", "impl": "triton", "reason": "tuned"}]
    assert found["counts"] == [
        {"op": "moe", "layer": "layers.0", "impl": "triton", "phase": "prefill", "calls": 2, "tokens": 8},
        {"op": "moe", "layer": "layers.0", "impl": "stock", "phase": "decode", "calls": 1, "tokens": 1},
    ]
    assert (found["run"], found["arch"], found["processes"][0]["pid"]) == ("2-1", "sm90", os.getpid())
    assert json.loads(json.dumps(found)) == found


def test_a_fallback_is_warned_of_once_and_counted_each_time(caplog):
    for _ in range(3):
        status.fallback("moe", "block shape")
    status.fallback("moe", "another reason")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert status.snapshot()["fallbacks"] == [
        {"op": "moe", "reason": "block shape", "count": 3},
        {"op": "moe", "reason": "another reason", "count": 1},
    ]


def test_strict_turns_a_fallback_into_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setenv(env.STRICT.name, "1")
    with pytest.raises(FallbackError, match=f"moe: block shape.*{env.STRICT.name}=1.*{env.DISABLE.name}=moe"):
        status.fallback("moe", "block shape")


def test_several_processes_are_merged(directory):
    code = """
import sys
from blackwell_kernels import status
rank = int(sys.argv[1])
status.set_arch("sm90")
status.record_layer("moe", "layers.0", "triton", "tuned")
status.record_layer("gdn_decode", f"layers.{rank}", "stock", "slow")
status.count("moe", "layers.0", "triton", 10, "decode")
status.fallback("moe", "odd")
status.compiled("k", after_warmup=True)
status.write()
"""
    for rank in range(3):
        subprocess.run([sys.executable, "-c", code, str(rank)], check=True, capture_output=True)
    found = status.read_all(directory)
    assert len({process["pid"] for process in found["processes"]}) == 3
    assert found["counts"] == [
        {"op": "moe", "layer": "layers.0", "impl": "triton", "phase": "decode", "calls": 3, "tokens": 30}
    ]
    assert found["fallbacks"] == [{"op": "moe", "reason": "odd", "count": 3}]
    assert found["jit_after_warmup"] == ["k", "k", "k"]
    assert [(row["op"], row["layers"]) for row in status.activation_rows(found)] == [("moe", 1), ("gdn_decode", 3)]
    assert found["unreadable"] == []


def test_an_earlier_run_in_the_same_directory_is_left_out(directory, monkeypatch):
    status.count("moe", "l", "triton", 1, "decode")
    status.write()
    stale = json.loads((directory / f"{os.getpid()}.json").read_text())
    (directory / "1.json").write_text(json.dumps({**stale, "run": "1-99"}))
    assert status.read_all(directory)["counts"][0]["tokens"] == 1
    assert status.read_all(directory)["run"] == "2-1"
    assert status.read_all(directory, "1-99")["run"] == "1-99"


@pytest.mark.parametrize("text", ["", "{", '{"schema": 0}', '{"schema": 1}', "[]", "null", '"x"'])
def test_a_file_that_cannot_be_read_is_named_and_hides_nothing(directory, text):
    status.count("moe", "l", "triton", 1, "decode")
    status.write()
    (directory / "1.json").write_text(text)
    found = status.read_all(directory)
    assert found["unreadable"] == ["1.json"]
    assert found["counts"][0]["tokens"] == 1


def test_a_process_killed_while_it_writes_leaves_a_whole_file(directory):
    code = """
from blackwell_kernels import status
for i in range(2000):
    status.record_layer("moe", f"layers.{i}", "triton", "tuned")
status.write()
print("ready", flush=True)
while True:
    status.write()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = status.read_all(directory)
    assert found["unreadable"] == []
    assert len(found["layers"]) == 2000


def test_an_empty_or_missing_directory_gives_an_empty_snapshot(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        found = status.read_all(path)
        assert (found["processes"], found["layers"], found["unreadable"]) == ([], [], [])
        assert status.activation_table(found) == "no layer of this model uses an operator of blackwell-kernels"


def test_a_forked_child_starts_from_nothing(forked):
    status.count("moe", "l", "triton", 1, "decode")
    status.fallback("moe", "odd")
    assert forked(lambda: [status.snapshot()["counts"], status.snapshot()["fallbacks"]]) == [[], []]
    assert len(status.snapshot()["counts"]) == 1


def test_a_directory_that_cannot_be_written_is_warned_of_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(env.STATUS_DIR.name, str(tmp_path / "file" / "below"))
    assert status.write() is None
    assert status.write() is None
    assert len(caplog.records) == 1
    assert env.STATUS_DIR.name in caplog.text


def test_a_full_disk_leaves_what_was_written_last_and_nothing_else(directory, monkeypatch, caplog):
    status.count("moe", "l", "triton", 1, "decode")
    path = status.write()

    def full(found, file):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    status.count("moe", "l", "triton", 1, "decode")
    with monkeypatch.context() as patch:
        patch.setattr(status.json, "dump", full)
        assert [status.write(), status.write()] == [None, None]
    assert list(directory.iterdir()) == [path]
    assert status.read_all(directory)["counts"][0]["tokens"] == 1
    assert len(caplog.records) == 1


def test_the_writer_writes_what_changed(directory, monkeypatch):
    monkeypatch.setattr(status, "WRITE_EVERY_S", 0.001)
    status.start_writer()
    status.start_writer()
    status.count("moe", "l", "triton", 5, "decode")
    writer = status._state.writer
    assert writer is not None
    while not (rows := status.read_all(directory)["counts"]):
        writer.join(0.001)
    assert rows[0]["tokens"] == 5
    status.reset()  # ends the thread
    writer.join(10)
    assert not writer.is_alive()


def test_the_table_names_operator_implementation_layers_and_reason():
    status.set_arch("sm90")
    for i in range(36):
        status.record_layer("gdn_decode", f"model.layers.{i}", "triton", "measured on h200: ours is faster")
    for i in range(48):
        status.record_layer("moe", f"model.layers.{i}", "stock", "not measured on b200")
    assert status.activation_table(status.snapshot()).splitlines() == [
        "operator    implementation  layers  reason",
        "moe         stock           48      not measured on b200",
        "gdn_decode  triton sm90     36      measured on h200: ours is faster",
    ]


def test_the_report_after_load_counts_hooks_that_no_layer_reached(directory, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setenv(env.DISABLE.name, "moe_routing")
    status.record_layer("moe", "l", "triton", "tuned")
    status.report_after_load(["moe", "moe_routing", "gdn_decode"])
    assert "operator  implementation  layers  reason" in caplog.text
    assert [row["op"] for row in status.snapshot()["fallbacks"]] == ["gdn_decode"]
    assert status.read_all(directory)["fallbacks"] == status.snapshot()["fallbacks"]


def test_under_strict_a_hook_that_no_layer_reached_is_an_error(monkeypatch):
    monkeypatch.setenv(env.STRICT.name, "1")
    with pytest.raises(FallbackError, match="gdn_decode: no layer of the model reached our hook"):
        status.report_after_load(["gdn_decode"])
