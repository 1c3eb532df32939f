"""The worker's life as vLLM drives it: load, warm-up, serving."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace

import pytest

from blackwell_kernels import env, load_report, status


def compilation(module: str, *, hit: bool = False, name: str = "kernel") -> dict:
    return {"src": SimpleNamespace(fn=SimpleNamespace(__module__=module, __name__=name)), "cache_hit": hit}


def test_only_our_kernels_and_only_real_compilations_count():
    listener = load_report.CompileListener()
    listener.heard(compilation("blackwell_kernels.moe.gemm"))
    listener.heard(compilation("blackwell_kernels.moe.gemm", hit=True))
    listener.heard(compilation("vllm.model_executor.layers"))
    listener.heard({"src": object(), "cache_hit": False})
    listener.end_warmup()
    listener.heard(compilation("blackwell_kernels.gdn.decode"))
    found = status.snapshot()
    assert found["jit_warmup"] == ["blackwell_kernels.moe.gemm.kernel"]
    assert found["jit_after_warmup"] == ["blackwell_kernels.gdn.decode.kernel"]


def test_a_compilation_after_warm_up_is_warned_of(caplog):
    listener = load_report.CompileListener()
    listener.end_warmup()
    listener.heard(compilation("blackwell_kernels.gdn.decode"))
    assert "blackwell_kernels.gdn.decode.kernel was compiled after the warm-up" in caplog.text


@pytest.mark.aot
def test_triton_tells_the_listener_of_a_compilation_and_of_a_cache_hit(forked, tmp_path):
    pytest.importorskip("triton")
    source = tmp_path / "kernel_source.py"
    source.write_text(
        "import triton\nimport triton.language as tl\n\n"
        "@triton.jit\ndef add_one(x_ptr):\n    tl.store(x_ptr, tl.load(x_ptr) + 1)\n"
    )

    def compile_twice():
        os.environ["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
        os.environ.pop("TRITON_INTERPRET", None)
        import importlib.util

        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        spec = importlib.util.spec_from_file_location("kernel_source", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module.add_one, "cache_key"):
            return "interpreted"
        heard: list[dict] = []
        triton.knobs.compilation.listener = lambda **event: heard.append(event["cache_hit"])
        load_report.CompileListener().install()
        module.add_one.__module__ = "blackwell_kernels.moe.fake"
        for _ in range(2):
            source_ast = ASTSource(fn=module.add_one, signature={"x_ptr": "*fp32"}, constexprs={})
            triton.compile(source_ast, target=GPUTarget("cuda", 90, 32))
        return {"ours": status.snapshot()["jit_warmup"], "before us": heard}

    found = forked(compile_twice)
    if found == "interpreted":
        pytest.skip("Triton was imported as interpreter in this process")
    assert found == {"ours": ["blackwell_kernels.moe.fake.add_one"], "before us": [False, True]}


def test_a_worker_base_without_those_methods_is_warned_of_and_left_alone(caplog):
    module = ModuleType("worker_base")
    module.WorkerBase = type("WorkerBase", (), {"load_model": lambda self: None})  # type: ignore[attr-defined]
    load_report._wrap(module)
    assert "no compile_or_warm_up_model" in caplog.text
    assert module.WorkerBase.__init__ is object.__init__  # type: ignore[attr-defined]


@pytest.mark.parametrize(("impl", "warmed"), [("triton", {"moe", "dsa_topk"}), ("cpu", None), ("stock", None)])
def test_what_triton_serves_is_compiled_after_load(monkeypatch, impl, warmed):
    import torch

    from blackwell_kernels import warmup

    seen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(warmup, "in_worker", lambda worker, ops, device, _: seen.append((ops, str(device))))
    status.record_layer("moe", "l.0", impl, "r")
    status.record_layer("dsa_topk", "l.0", "mixed" if warmed else impl, "r")
    status.record_layer("moe_routing", "l.0", "stock", "r")
    load_report._warm_up(object(), None)
    assert seen == ([(warmed, "cuda:1")] if warmed else [])


class Compiling:
    """Compilation ahead that notes how long it lives."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __enter__(self):
        self.events.append("begins")
        return self

    def __exit__(self, *error):
        self.events.append("ends")


def followed(monkeypatch, load_model, architecture: str = "Qwen3NextForCausalLM", device: str = "sm90"):
    """A worker's load_model as it is followed, and what happens meanwhile."""
    from blackwell_kernels import warmup

    events: list[str] = []
    monkeypatch.setattr(load_report, "device_arch", lambda: device)
    monkeypatch.setattr(warmup, "ahead_of_load", lambda worker, ops: Compiling(events))
    monkeypatch.setattr(load_report, "_warm_up", lambda worker, ahead: events.append(f"warm-up: {ahead is not None}"))
    worker = SimpleNamespace(
        load_model=lambda: load_model(events),
        compile_or_warm_up_model=lambda: None,
        model_config=SimpleNamespace(architectures=[architecture]),
    )
    load_report._follow(worker)
    return worker.load_model, events


def test_kernels_compile_while_the_model_loads(monkeypatch):
    load, events = followed(monkeypatch, lambda events: events.append("load") or "loaded")
    assert load() == "loaded"
    assert events == ["begins", "load", "warm-up: True", "ends"]


def test_a_load_that_fails_ends_the_compilation(monkeypatch):
    def fail(events):
        raise RuntimeError("no weights")

    load, events = followed(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="no weights"):
        load()
    assert events == ["begins", "ends"]


@pytest.mark.parametrize("where", [{"architecture": "LlamaForCausalLM"}, {"device": "cpu"}])
def test_nothing_compiles_ahead_for_another_model_or_on_a_cpu(monkeypatch, where):
    load, events = followed(monkeypatch, lambda events: events.append("load"), **where)
    load()
    assert events == ["load", "warm-up: False"]


def test_a_compilation_that_cannot_begin_is_said(monkeypatch, caplog):
    from blackwell_kernels import warmup

    def fail(worker, ops):
        raise OSError("no space left")

    load, events = followed(monkeypatch, lambda events: events.append("load"))
    monkeypatch.setattr(warmup, "ahead_of_load", fail)
    load()
    assert events == ["load", "warm-up: False"]
    assert "nothing is compiled ahead, kernels will when they are called: no space left" in caplog.text


def live(worker_class_overrides: dict, calls: list[str]) -> list[str]:
    """Build a worker on vLLM's own base class and drive it as an executor does."""
    from unittest import mock

    from vllm.v1.worker import worker_base

    from blackwell_kernels import model_patches

    load_report.install()
    load_report.install()
    model_patches.expected_ops = lambda architectures: {"moe"} if "Known" in architectures else set()  # type: ignore[attr-defined]
    worker_class = type("Worker", (worker_base.WorkerBase,), worker_class_overrides)
    config = mock.MagicMock()
    config.model_config.architectures = ["Known"]
    worker = worker_class(vllm_config=config, local_rank=0, rank=0, distributed_init_method="")
    for call in calls:
        getattr(worker, call)()
    return calls


@pytest.fixture
def vllm_worker(forked, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv(env.STATUS_DIR.name, str(tmp_path))

    def run(records: bool, calls: list[str]):
        def load_model(self, *, load_dummy_weights=False):
            if records:
                status.record_layer("moe", "l.0", "cpu", "on a CPU ours serves")

        def compile_or_warm_up_model(self):
            return "times"

        def child():
            live({"load_model": load_model, "compile_or_warm_up_model": compile_or_warm_up_model}, calls)
            return status.read_all(tmp_path)

        return forked(child)

    return run


def test_after_load_the_status_file_holds_the_layers(vllm_worker):
    found = vllm_worker(True, ["load_model", "compile_or_warm_up_model"])
    assert [row["op"] for row in found["layers"]] == ["moe"]
    assert (found["arch"], found["fallbacks"]) == ("cpu", [])


def test_a_known_model_whose_layers_never_reach_us_is_a_fallback(vllm_worker):
    found = vllm_worker(False, ["load_model"])
    assert found["fallbacks"] == [{"op": "moe", "reason": "no layer of the model reached our hook", "count": 1}]


def test_under_strict_such_a_model_does_not_load(vllm_worker, monkeypatch):
    monkeypatch.setenv(env.STRICT.name, "1")
    with pytest.raises(pytest.fail.Exception, match="no layer of the model reached our hook"):
        vllm_worker(False, ["load_model"])


def test_vllms_worker_wrapper_calls_what_was_wrapped(forked):
    """An executor calls through WorkerWrapperBase, which looks the method up on the instance."""
    worker_base = pytest.importorskip("vllm.v1.worker.worker_base")

    def call():
        calls = []
        worker = SimpleNamespace(load_model=lambda: calls.append("stock"))
        worker.load_model = load_report._then(worker.load_model, lambda: calls.append("ours"))
        wrapper = worker_base.WorkerWrapperBase()
        wrapper.worker = worker
        wrapper.load_model()
        return calls

    assert forked(call) == ["stock", "ours"]
