"""Nsight Compute's output as it prints it: names of two chips, units, counters that are not there, refusals."""

import json
import sys
from pathlib import Path

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
OLDER = HOPPER.replace("sm__pipe_tensor_cycles_active ", "sm__pipe_fp64_cycles_active   ")

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
    hopper, older = counters.resolve(HOPPER, deep=False), counters.resolve(OLDER, deep=False)
    assert hopper["tensor_pct"].startswith("sm__pipe_tensor_cycles_active")
    assert older["tensor_pct"].startswith("sm__pipe_tensor_op_gmma_cycles_active")
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


def test_what_an_h200_printed_is_read_in_base_units():
    """Of Nsight Compute 2025.3 on an H200 at commit cc573a87, columns and launches left out; its units as it chose."""
    text = (Path(__file__).parent / "recorded" / "ncu-h200.csv").read_text()
    listed = {name.split(".")[0] for name in text.splitlines()[0].replace('"', "").split(",") if "__" in name}
    names = counters.resolve("\n".join(f"{name} Counter" for name in listed), deep=False)
    assert set(names) == set(counters.ALIASES), "a chip of this kind has all"
    prefill, decode, step = counters.split(counters.parse(text, names), 3)
    assert [one.kernel for one in prefill] == ["gdn_prefill_chunks_kernel", "gdn_prefill_walk_kernel"]
    assert [one.kernel for one in step][-2:] == ["sparse_mla_kernel", "merge_kernel"]
    (values,) = (one.values for one in decode)
    assert values["duration_ns"] == pytest.approx(34592.0), "35.49 µs by CUPTI"
    assert counters.dram_bytes(decode[0]) == pytest.approx(110_160_600.0), "64 MiB of states, part of them back"
    assert (values["registers"], values["shared_bytes"], values["local_loads"]) == (64.0, pytest.approx(1056.0), 0.0)
    assert (prefill[1].values["tensor_pct"], prefill[1].values["occupancy_pct"]) == (46.819991, 12.452891)
    assert "load_efficiency_pct" not in values, "that run did not ask for it"


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


def test_what_other_versions_print_around_the_table_is_no_launch():
    noisy = RAW.replace('"ID"', '\ufeff"ID"') + "==WARNING== Found outdated or misconfigured profiles.\n"
    assert counters.parse(noisy, NAMES) == counters.parse(RAW, NAMES)
    renamed = RAW.replace('"gpu__time_duration.sum"', '"gpu__time_duration.sum [ns]"').replace("97.5", "nan")
    first, second = counters.parse(renamed, NAMES)
    assert (first.values["duration_ns"], second.values["duration_ns"]) == (9120.0, 12000.0)
    assert "load_efficiency_pct" not in second.values, "nan is no value"
    assert counters.parse(RAW, {"missing": "gpu__cycles_active.max"})[0].values == {}


@pytest.mark.parametrize(
    ("printed", "function"),
    [
        ("gate_up_kernel", "gate_up_kernel"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>(int)",
         "vectorized_elementwise_kernel"),
        ("at::cuda::(anonymous namespace)::spin_kernel(long)", "spin_kernel"),
        ("at::cuda::<unnamed>::spin_kernel(long)", "spin_kernel"),
    ],
)  # fmt: skip
def test_kernels_go_by_their_functions_name(printed, function):
    (one,) = counters.parse(RAW.split('"1",')[0].replace("gdn_decode_kernel(float *, int)", printed), NAMES)
    assert one.kernel == function


def test_each_case_has_the_launches_behind_its_separator():
    a, b, mark = (counters.Launch(name, {}) for name in ("a", "b", counters.SEPARATOR))
    assert counters.split([mark, a, b, mark, mark, b], 3) == [[a, b], [], [b]]
    with pytest.raises(ValueError, match="ncu saw 1 of 2 cases"):
        counters.split([mark, a], 2)


def test_bytes_of_device_memory_need_both_counts():
    both = counters.Launch("a", {"dram_read_bytes": 3.0, "dram_write_bytes": 4.0})
    assert counters.dram_bytes(both) == 7.0
    assert counters.dram_bytes(counters.Launch("a", {"dram_read_bytes": 3.0})) is None


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A command that stands for ncu: it notes how it was called, and does what `script` says."""

    def install(script):
        path = tmp_path / "bin" / "ncu"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport json, os, sys\nasked = sys.argv[1:]\n{script}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))
        return path

    return install


LOGS = f"""
if "--query-metrics" in asked:
    print({HOPPER!r})
else:
    json.dump([asked, os.environ["LC_ALL"]], open({{told!r}}, "w"))
    print('"ID" of the profiled process itself, which is no table')
    open(asked[asked.index("--log-file") + 1], "w").write({{table!r}})
    sys.exit({{status}})
"""


@pytest.mark.parametrize("status", [0, 9])
def test_collecting_asks_for_what_the_chip_has_and_profiles_the_marked_calls(ncu, tmp_path, status):
    first, rest = RAW.split('"0",', 1)
    marked = first + '"0","4242","python3.11","127.0.0.1","begin_case","1"\n"1",' + rest
    ncu(LOGS.format(told=str(tmp_path / "told"), table=marked, status=status))
    (launches,) = counters.collect([("gdn_decode_state_bf16", "some case")], deep=False)
    assert [launch.values["duration_ns"] for launch in launches] == [9120.0, 12000.0]
    asked, locale = json.loads((tmp_path / "told").read_text())
    assert asked[-3:] == ["-", "gdn_decode_state_bf16", "some case"]
    assert asked[asked.index("--profile-from-start") + 1] == "off"
    assert asked[asked.index("--clock-control") + 1] == "none"
    assert "sm__warps_active" in asked[asked.index("--metrics") + 1]
    assert locale == "C", "numbers have points"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("print('==ERROR== ERR_NVGPUCTRPERM - The user does not'); sys.exit(1)", "not permitted here"),
        ("print('boom', file=sys.stderr); sys.exit(9)", "status 9: boom"),
        (
            "print('==ERROR== Failed to initialize the profiler: LibraryNotLoaded\\nmore'); sys.exit(1)",
            "LibraryNotLoaded",
        ),
        ("import time; time.sleep(60)", "no end of ncu after 1 s"),
    ],
)
def test_refusals_are_reasons(script, why, ncu):
    ncu(script)
    limit = 1.0 if "sleep" in script else counters.LIMIT_S
    with pytest.raises(ValueError, match=why):
        counters.collect([("d", "c")], deep=False, limit_s=limit)


def test_without_ncu_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name, **more: None)
    with pytest.raises(ValueError, match="neither on the path nor in"):
        counters.collect([("d", "c")], deep=False)
