"""What is compiled ahead is what the calls ask Triton's cache for; a process that fails costs its kernels only."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blackwell_kernels import compile_ahead
from blackwell_kernels.common.arch import ARCHS
from blackwell_kernels.e2e.models import MODELS

# what Triton's C code of a launch is linked with, where there is no driver
STUBS = """
int cuCtxGetCurrent(){return 0;} int cuCtxSetCurrent(){return 0;} int cuDeviceGet(){return 0;}
int cuDevicePrimaryCtxRetain(){return 0;} int cuFuncSetAttribute(){return 0;} int cuGetErrorString(){return 0;}
int cuPointerGetAttribute(){return 0;} int cuLaunchKernelEx(){return 0;}
"""
# two ranks at once, a start that finds all, the calls, a start that finds one kernel gone
STARTS = """
import json, shutil, sys, torch, triton
from pathlib import Path
from types import SimpleNamespace
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.cache import get_cache_manager
from blackwell_kernels import compile_ahead, env, warmup
from blackwell_kernels.common.arch import ARCHS
from blackwell_kernels.common.testing.compile import compile_only
from blackwell_kernels.dsa import op as dsa
from blackwell_kernels.e2e.models import hf_config
from blackwell_kernels.gdn import op as gdn
from blackwell_kernels.moe import op as moe

torch.set_num_threads(1)
config, served = hf_config(sys.argv[1]), warmup.Deployment(max_tokens=3, max_model_len=1001)
def start():
    return compile_ahead.start(config, served, env.HOOK_OPS, "h200", ARCHS["h200"])
def files():
    return {path for path in Path(triton.knobs.cache.dir).rglob("*") if path.is_file()}
found, hits = {}, []
with start() as one, start() as two:
    first, second = list(one.outcomes()), list(two.outcomes())
    found.update(compiled=[one.compiled, two.compiled], failed=one.failed + two.failed, last=[first[-1], second[-1]])
with start() as again:
    found.update(started=again._process is not None, outcomes=list(again.outcomes()))
there = files()
functions = {name: f for module in (dsa, gdn, moe) for name, f in vars(module).items() if name.endswith("_triton")}
warmup.ops = SimpleNamespace(**{name.removesuffix("_triton"): f for name, f in functions.items()})
triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
with compile_only(90) as compiled:
    for step in warmup.plan(config, served, torch.device("cpu")):
        step.run()
for launched in compiled:
    CudaLauncher(launched.kernel.src, launched.kernel.metadata)
kernels = {launched.kernel.hash for launched in compiled}
found.update(
    hits=hits, kernels=len(kernels), names=sorted({launched.name for launched in compiled}), new=len(files() - there)
)
shutil.rmtree(get_cache_manager(compiled[0].kernel.hash).cache_dir)
with start() as last:
    found.update(gone=[*last.outcomes()][-1], compiled_again=last.compiled)
print(json.dumps(found))
"""
WANTED = {
    "qwen3-next": ("gdn_decode", "prepare", "gdn_prefill", "softmax_topk", "gate_up"),
    "deepseek-v3.2": ("indexer_logits", "topk", "sparse_mla", "grouped_topk", "gate_up"),
}


@pytest.mark.aot
@pytest.mark.parametrize("model", MODELS)
def test_the_calls_find_every_kernel_compiled_ahead(tmp_path, model):
    """The calls go through the real launcher, on CPU tensors and for sm_90a: what a worker on a GPU does up to the
    launch. Ahead of them the kernels come from meta tensors."""
    if shutil.which("gcc") is None:
        pytest.skip("Triton compiles the C code of a launch with gcc")
    (tmp_path / "stubs.c").write_text(STUBS)
    subprocess.run(["gcc", "-shared", "-fPIC", "stubs.c", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment |= dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(tmp_path))
    done = subprocess.run([sys.executable, "-c", STARTS, model], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = " ".join(found["names"])
    assert [name for name in WANTED[model] if name not in names] == []
    assert found["failed"] == []
    many = found["kernels"]
    assert sorted(found["compiled"]) == [0, many], "of two ranks one compiles everything, and the other waits for it"
    assert sorted(found["last"]) == [[0, 0], [many, many]]
    assert (found["started"], found["outcomes"]) == (False, []), "a warm cache starts no process"
    assert found["hits"] == [True] * many
    assert found["new"] == 0, "nor is C code of a launch compiled"
    assert (found["gone"], found["compiled_again"]) == ([1, 1], 1)


@pytest.fixture
def ahead(monkeypatch):
    """Compilation ahead whose process runs this code instead."""
    monkeypatch.setattr(compile_ahead, "_listed", lambda key: False)
    request = compile_ahead.Request({}, {}, ["moe"], "h200", ARCHS["h200"])

    def start(code: str) -> compile_ahead.Ahead:
        monkeypatch.setattr(compile_ahead, "_LEAD", code)
        return compile_ahead.Ahead(request, "key")

    return start


def lead_with(body: str) -> str:
    """The process as it is, but for what it compiles."""
    lines = ("import os, time", "from blackwell_kernels import compile_ahead as c")
    return "\n".join((*lines, f"c._lead = lambda request, key, say: {body}", "c.lead()"))


def test_a_kernel_that_fails_is_told_and_the_others_count(ahead):
    told = [{"missing": 2}, {"kernel": "a", "why": ""}, {"kernel": "b", "why": "it crashed"}, {"finished": True}]
    with ahead(lead_with(f"[print('noise'), [say(told) for told in {told}]]")) as compiling:
        assert list(compiling.outcomes()) == [(0, 2), (1, 2), (2, 2)]
        assert (compiling.compiled, compiling.failed) == (1, ["b: it crashed"])


@pytest.mark.parametrize("code", ["raise SystemExit(3)", lead_with("[say({'missing': 1}), os.abort()]")])
def test_a_process_that_dies_is_told(ahead, code):
    with ahead(code) as compiling:
        assert {done for done, _ in compiling.outcomes()} <= {0}
        assert compiling.failed == ["the process that compiles ahead stopped before its end"]


def test_a_silent_process_is_given_up_and_stopped(ahead, monkeypatch):
    monkeypatch.setattr(compile_ahead, "SILENT_S", 0.0)
    with ahead("import time; time.sleep(1000)") as compiling:
        assert list(compiling.outcomes()) == []
        assert compiling.failed == ["the process that compiles ahead stopped before its end"]
        process = compiling._process
    assert process.returncode == -signal.SIGKILL


def test_it_dies_with_whoever_started_it(ahead):
    with ahead(lead_with("[say({'missing': 1}), time.sleep(1000)]")) as compiling:
        assert next(compiling.outcomes()) == (0, 1)
        compiling._process.stdin.close()  # as the system does at any end of a process
        assert compiling._process.wait(100) == -signal.SIGKILL


def test_it_sees_no_gpu(ahead, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with ahead(lead_with("say({'missing': len(os.environ['CUDA_VISIBLE_DEVICES'])})")) as compiling:
        assert next(compiling.outcomes()) == (0, 0)


def test_without_operators_nothing_starts(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_listed", lambda key: False)
    request = compile_ahead.Request({}, {}, [], "h200", ARCHS["h200"])
    with compile_ahead.Ahead(request, "key") as compiling:
        assert (compiling._process, list(compiling.outcomes()), compiling.failed) == (None, [], [])


def test_a_rank_waits_for_another_only_so_long(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    # by the environment: a knob that was set once, even to its own value, is deaf to it in all later tests
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "LOCK_S", 0.0)
    lock = tmp_path / compile_ahead._LOCK
    with compile_ahead._alone(), compile_ahead._alone(), lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_another_plan_or_gpu_has_another_list():
    pytest.importorskip("triton")
    h200 = ARCHS["h200"]
    one = compile_ahead.Request({"heads": 1}, {"tp": 1}, ["moe"], "h200", h200)
    others = [
        compile_ahead.Request({"heads": 2}, {"tp": 1}, ["moe"], "h200", h200),
        compile_ahead.Request({"heads": 1}, {"tp": 2}, ["moe"], "h200", h200),
        compile_ahead.Request({"heads": 1}, {"tp": 1}, ["moe", "dsa_topk"], "h200", h200),
        compile_ahead.Request({"heads": 1}, {"tp": 1}, ["moe"], "b200", ARCHS["b200"]),
    ]
    keys = [request.key() for request in (one, *others)]
    assert len(set(keys)) == 5
    assert one.key() == keys[0]


def test_a_changed_table_is_another_list(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    request = compile_ahead.Request({}, {}, ["moe"], "h200", ARCHS["h200"])
    before = request.key()
    sources = [Path(path) for path in compile_ahead._sources("h200")]
    assert {"warmup.py", "indexer.py", "op.py", "config.py", "moe.json"} <= {path.name for path in sources}
    changed = tmp_path / "moe.json"
    changed.write_text("{}")
    monkeypatch.setattr(compile_ahead, "_sources", lambda gpu: iter([*sources, changed]))
    assert request.key() != before
