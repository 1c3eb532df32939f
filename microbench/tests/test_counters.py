"""Nsight Compute's output as it prints it: names of two chips, units, counters that are not there, refusals."""

import subprocess

import pytest

from blackwell_kernels.microbench import counters

HOPPER = """
Device NVIDIA H200 (GH100)
-------------------------------------------------------- --------------- ----------------------------------------
Metric Name                                              Metric Type     Metric Unit     Metric Description
dram__bytes_read                                         Counter         byte            what it counts
dram__bytes_write                                        Counter         byte            what it counts
gpu__time_duration                                       Counter         nsecond         time
lts__t_sector_hit_rate                                   Ratio                           hits
sm__pipe_tensor_op_gmma_cycles_active                    Counter         cycle           what it counts
sm__pipe_tensor_cycles_active                            Counter         cycle           what it counts
sm__warps_active                                         Counter         warp            cumulative # of warps in flight
sm__inst_executed_pipe_alu                               Counter         inst            what it counts
"""
BLACKWELL = HOPPER.replace("sm__pipe_tensor_op_gmma_cycles_active ", "sm__pipe_tc_cycles_active ")

NAMES = {
    "duration_ns": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "registers": "launch__registers_per_thread",
    "load_efficiency_pct": "smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct",
}
RAW = """==PROF== Connected to process 4242 (/usr/bin/python3.11)
==PROF== Profiling "gdn_decode_kernel" - 0: 0%....50%....100% - 4 passes
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","gpu__time_duration.sum","launch__registers_per_thread",\
"smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct"
"","","","","","","","","","","","byte","nsecond","register/thread","%"
"0","4242","python3.11","127.0.0.1","gdn_decode_kernel(float *, int)","1","7","(128, 1, 1)","(512, 1, 1)","0","9.0",\
"33,554,432","9,120","64","n/a"
"1","4242","python3.11","127.0.0.1","gdn_decode_kernel(float *, int)","1","7","(128, 1, 1)","(512, 1, 1)","0","9.0",\
"1,024","12,000","64","97.5"
"""


def test_names_are_those_that_the_chip_has():
    hopper, blackwell = counters.resolve(HOPPER, deep=False), counters.resolve(BLACKWELL, deep=False)
    assert hopper["tensor_pct"].startswith("sm__pipe_tensor_op_gmma_cycles_active")
    assert blackwell["tensor_pct"].startswith("sm__pipe_tc_cycles_active")
    assert hopper["registers"] == "launch__registers_per_thread", "facts of the launch are not listed by the query"
    assert "local_loads" not in hopper, "what the chip does not have is not asked for"
    assert "pipe_alu" not in hopper
    assert counters.resolve(HOPPER, deep=True)["pipe_alu"] == "sm__inst_executed_pipe_alu.sum"


def test_numbers_names_and_what_is_not_available():
    first, second = counters.parse(RAW, NAMES)
    assert first.kernel == second.kernel == "gdn_decode_kernel"
    assert first.values == {"duration_ns": 9120.0, "dram_read_bytes": 33554432.0, "registers": 64.0}
    assert second.values["load_efficiency_pct"] == 97.5
    assert counters.of([first, second], "gdn_decode_kernel") is second.values, "the longest launch speaks"
    assert counters.of([first], "another") == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("==ERROR== The application returned an error code (11).", "The application returned an error code"),
        ("", "it printed nothing"),
        (RAW.split('"0",')[0], "no kernel was profiled"),
    ],
)
def test_no_table_is_a_reason(text, why):
    with pytest.raises(ValueError, match=why.replace("(", r"\(")):
        counters.parse(text, NAMES)


def test_collecting_asks_for_what_the_chip_has_and_profiles_the_marked_call(monkeypatch):
    asked = []

    def run(command, **more):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, HOPPER if "--query-metrics" in command else RAW, "")

    monkeypatch.setattr(counters.shutil, "which", lambda name: "ncu")
    monkeypatch.setattr(counters.subprocess, "run", run)
    assert len(counters.collect("gdn_decode_state_bf16", "some case", deep=False)) == 2
    command = asked[1]
    assert command[-2:] == ["gdn_decode_state_bf16", "some case"]
    assert command[command.index("--profile-from-start") + 1] == "off"
    assert "sm__warps_active" in command[command.index("--metrics") + 1]


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (
            subprocess.CompletedProcess([], 1, "", "==ERROR== ERR_NVGPUCTRPERM - The user does not"),
            "not permitted here",
        ),
        (subprocess.CompletedProcess([], 9, "", "boom"), "status 9: boom"),
    ],
)
def test_refusals_are_reasons(done, why, monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: "ncu")
    monkeypatch.setattr(counters.subprocess, "run", lambda command, **more: done)
    with pytest.raises(ValueError, match=why):
        counters.collect("d", "c", deep=False)
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        counters.collect("d", "c", deep=False)
