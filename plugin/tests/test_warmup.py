"""The plan's calls run on a CPU too, where the same operators check the same shapes and dtypes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels import warmup
from blackwell_kernels.common import arch
from blackwell_kernels.dsa import config as dsa_config
from blackwell_kernels.dsa.topk import MOST_HERE
from blackwell_kernels.e2e.models import MODELS, hf_config
from blackwell_kernels.errors import BlackwellKernelsError, MissingRequirementError
from blackwell_kernels.gdn import config as gdn_config
from blackwell_kernels.gdn import prefill
from blackwell_kernels.model_patches import indexer
from blackwell_kernels.moe import align
from blackwell_kernels.moe import config as moe_config

CPU = torch.device("cpu")
EXPECTED = {
    "qwen3-next": {"moe", "moe_routing", "gdn_decode", "gdn_prefill"},
    "deepseek-v3.2": {"moe", "moe_routing", "dsa_indexer", "dsa_topk", "dsa_sparse_mla"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "served",
    [
        warmup.Deployment(max_tokens=8, max_model_len=100),
        warmup.Deployment(tp=2, ep=True, max_tokens=4, max_model_len=64, fp8_kv=True),
    ],
    ids=["one rank", "two ranks, experts spread"],
)
def test_every_call_of_a_plan_is_one_that_the_operators_accept(model, served):
    steps = warmup.plan(hf_config(model), served, CPU)
    assert {step.op for step in steps} == EXPECTED[model]
    assert {step.tokens for step in steps} == set(range(1, served.max_tokens + 1))
    for step in steps:
        step.run()


def test_every_number_of_tokens_finds_its_experts_kernels_compiled():
    """Tables change at powers of two, the sort at numbers of pairs: between any two of them lies a size."""
    served = warmup.Deployment(max_tokens=8192)
    warm = {step.tokens for step in warmup.plan(hf_config("qwen3-next"), served, CPU) if step.op == "moe"}

    def variant(tokens: int) -> tuple[Any, ...]:
        pairs = tokens * case["topk"]
        return moe_config.select(case, tokens, CPU), [pairs <= bound for bound in (256, 1024, align._ONE_LAUNCH)]

    for experts, topk, hidden, inter in ((512, 10, 2048, 512), (256, 8, 7168, 2048)):
        case = moe_config.case_of(hidden, inter, experts, experts, topk)
        with arch.pretend("h200"):
            met = [variant(tokens) for tokens in warm]
            assert [tokens for tokens in range(1, 8193) if variant(tokens) not in met] == []


def test_every_prefill_step_finds_its_walk_compiled():
    warm = set()

    def variant(tokens: int, sequences: int) -> tuple[Any, ...]:
        case = gdn_config.prefill_case_of(16, 32, 128, torch.bfloat16, sequences)
        config = gdn_config.prefill_config(case, tokens, sequences, 128, CPU)
        cut = min(-(-tokens // config.piece), 3) if 0 < config.piece < tokens else 0
        # where a piece ends is the kernels' to find: it makes no other variant
        return dataclasses.replace(config, piece=0), cut, cut == 0 and 1 < sequences <= prefill.MOST_SORTED

    with arch.pretend("h200"):
        for step in warmup.plan(hf_config("qwen3-next"), warmup.Deployment(max_tokens=8192), CPU):
            if step.op == "gdn_prefill":
                warm.add(variant(step.tokens, step.run.args[1]))
        steps = ((n, some) for n in range(1, 8193, 7) for some in (1, 2, 3, 4, 5, 16, 17, 40, 256) if some <= n)
        assert [step for step in steps if variant(*step) not in warm] == []


def test_decode_steps_end_where_vllm_stops_capturing():
    steps = warmup.plan(hf_config("qwen3-next"), warmup.Deployment(max_tokens=2048), CPU)
    assert max(step.tokens for step in steps if step.op == "gdn_decode") == warmup.MAX_SEQS
    assert max(step.tokens for step in steps if step.op == "gdn_prefill") == 2048


def test_logits_are_laid_out_as_they_are_served_and_keys_are_of_any_number(monkeypatch):
    """A prompt of 4,095 keys must find its kernels compiled as one of 4,096 does; so must an odd longest model."""
    met: dict[str, set[tuple[int, int]]] = {"paged": set(), "ragged": set(), "topk": set()}

    def spied(name, logits, clean):
        assert clean is False, "vLLM asks for no clean columns, which is other code"
        # Triton compiles anew for strides that 16 does not divide: ours has none
        assert logits.stride() == indexer.new_logits(*logits.shape, CPU).stride()
        assert logits.stride(0) % 16 == 0
        met[name].add(tuple(logits.shape))

    def selected(logits, *_):
        # ours, of decode; a prefill's is DeepGEMM's: a block of 256 keys more, then a multiple of 8
        ours, stock = indexer.new_logits(*logits.shape, CPU).stride(0), -(-(logits.shape[1] + 256) // 8) * 8
        assert logits.stride(0) == (ours if logits.shape[1] == 1001 else stock)
        met["topk"].add(tuple(logits.shape))

    def paged(q, k_cache, weights, context_lens, block_table, logits, **kw):
        assert context_lens.shape == (len(q), 1), "vLLM's lengths have a column, without which they are other code"
        spied("paged", logits, **kw)

    monkeypatch.setattr(warmup.ops, "dsa_indexer_logits_paged", paged)
    monkeypatch.setattr(warmup.ops, "dsa_indexer_logits_ragged", lambda *args, **kw: spied("ragged", args[6], **kw))
    monkeypatch.setattr(warmup.ops, "dsa_topk", selected)
    for step in warmup.plan(hf_config("deepseek-v3.2"), warmup.Deployment(max_tokens=16, max_model_len=1001), CPU):
        if step.op in ("dsa_indexer", "dsa_topk"):
            step.run()
    by_fours = {(n, n - n % 4 - less) for n in range(4, 17) for less in (0, 1)}
    assert met["ragged"] == {(1, 1), (2, 2), (3, 3)} | by_fours
    assert met["paged"] == {(n, 1001) for n in range(1, 17)}
    octaves = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 40 * 1001 // 16 * 16)
    wide = {(n, keys - less) for n in range(1, 17) for keys in octaves for less in (0, 1, 8, 9, 16)}
    assert met["topk"] == met["paged"] | wide


def test_a_prefill_finds_its_top_k_compiled():
    """Served DeepSeek-V3.2 compiled 25 variants while requests waited, of more keys than rows; then seven, of strides
    that 16 does not divide and of the keys of several requests."""
    served = warmup.Deployment(max_tokens=8192, max_model_len=65536)
    warm: set[tuple[Any, ...]] = set()

    def variant(rows: int, columns: int) -> tuple[Any, ...]:
        stride = -(-(columns + 256) // 8) * 8  # DeepGEMM's
        vectors, sixteens = columns % 4 == 0, stride % 16 == 0
        config, words = dsa_config.topk_config(columns, 2048, rows, CPU), 1 << (-(-columns // 32) - 1).bit_length()
        threads, streams = 32 * config.num_warps, not config.cluster and columns > config.block
        here = words if config.splits == 1 and words <= MOST_HERE else 0
        marks = (max(threads, min(8 * threads, words)), here) if streams else None
        return config, vectors, sixteens, rows <= dsa_config.MANY_ROWS, marks

    with arch.pretend("h200"):
        for step in warmup.plan(hf_config("deepseek-v3.2"), served, CPU):
            if step.op == "dsa_topk" and len(step.run.args) == 2:
                warm.add(variant(*step.run.args))
        rows = sorted({*range(1, 300), *range(300, 8193, 37)})
        lengths = (257, 1023, 2049, 4000, 4008, 7999, 8193, 12345, 20000, 33333, 50001, 65535)
        steps = (
            (n, keys)
            for n in rows
            for length in (n, n + 1, n + 4, n + 9, *lengths)
            for keys in (length, 3 * length, 11 * length + 5)
            if n <= keys and 4 * n * keys <= warmup.LOGITS_BYTES
        )
        assert [step for step in steps if variant(*step) not in warm] == []


def test_an_unknown_model_type_is_refused_with_what_is_supported():
    with pytest.raises(BlackwellKernelsError, match=r"LlamaForCausalLM.*no kernels here; supported: Deep.*Qwen3Next"):
        warmup.plan({"architectures": ["LlamaForCausalLM"]}, warmup.Deployment(), CPU)


def test_a_config_is_found_by_folder_or_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "x"}))
    assert warmup.read_config(str(tmp_path)) == warmup.read_config(str(path)) == {"model_type": "x"}


def test_a_missing_config_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BlackwellKernelsError, match="Give the folder that holds the checkpoint"):
        warmup.read_config(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BlackwellKernelsError, match=r"config\.json is no config\.json: .*Restore it"):
        warmup.read_config(str(tmp_path))


def worker(model: str):
    """What vLLM's worker carries of its configuration."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=2, enable_expert_parallel=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=4),
        model_config=SimpleNamespace(
            max_model_len=64, hf_text_config=SimpleNamespace(to_dict=lambda: hf_config(model))
        ),
        cache_config=SimpleNamespace(cache_dtype="fp8_ds_mla", mamba_ssm_cache_dtype="float32"),
        get_model=lambda: experts_layer(model),
    )


def experts_layer(model: str) -> torch.nn.Module:
    """A model that is one layer of experts, as a rank of two holds it."""
    config = hf_config(model)
    experts = config.get("n_routed_experts") or config["num_experts"]
    hidden, inter = config["hidden_size"], 2 * config["moe_intermediate_size"] // 2
    shapes = {"w13_weight": (2 * inter, hidden), "w2_weight": (hidden, inter)}
    layer = torch.nn.Module()
    for name, (rows, columns) in shapes.items():
        weight = torch.zeros(experts, rows, columns, dtype=torch.float8_e4m3fn)
        scale = torch.ones(experts, -(-rows // 128), -(-columns // 128))
        layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        layer.register_parameter(f"{name}_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
    return torch.nn.ModuleDict({"experts": layer})


def test_a_worker_warms_up_what_it_uses_with_its_own_experts(monkeypatch, caplog):
    caplog.set_level("INFO")
    run: list[str] = []
    build = warmup.plan

    def spied(config, served, device, experts):
        expected = warmup.Deployment(2, False, max_tokens=4, max_model_len=64, fp8_kv=True, state_dtype=torch.float32)
        assert served == expected
        assert [w.dim() for w in experts] == [3] * 4
        return [dataclasses.replace(s, run=partial(run.append, s.op)) for s in build(config, served, device, experts)]

    monkeypatch.setattr(warmup, "plan", spied)
    warmup.in_worker(worker("deepseek-v3.2"), {"moe", "moe_routing", "dsa_topk"}, CPU)
    assert set(run) == {"moe", "moe_routing", "dsa_topk"}
    assert f"warming up {len(run)} calls" in caplog.text
    assert "warmed up in" in caplog.text


def test_a_failing_warm_up_is_said_and_serving_goes_on(monkeypatch, caplog):
    def fail(config, served, device, experts):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(warmup, "plan", fail)
    warmup.in_worker(worker("qwen3-next"), {"gdn_decode"}, CPU)
    assert "warm-up stopped, kernels will compile when first met: out of memory" in caplog.text


def test_a_worker_waits_for_what_is_compiled_ahead_and_says_what_was_not(monkeypatch, caplog):
    caplog.set_level("INFO")
    events: list[str] = []
    ahead = SimpleNamespace(
        compiled=3, failed=["gate_up_kernel: it crashed"], outcomes=lambda: map(events.append, ["a kernel"] * 3)
    )
    step = warmup.Step("moe", 1, lambda: events.append("call"))
    monkeypatch.setattr(warmup, "plan", lambda config, served, device, experts: [step])
    warmup.in_worker(worker("qwen3-next"), {"moe"}, CPU, ahead)
    assert events == ["a kernel"] * 3 + ["call"]
    assert "3 kernels compiled ahead" in caplog.text
    assert "not compiled ahead, so when it is called: gate_up_kernel: it crashed" in caplog.text


def test_only_what_may_serve_is_compiled_ahead_of_a_load(monkeypatch, make_table):
    """The layers, which decide, are not there yet: one row of a table that chooses ours is enough."""
    asked: list[tuple[Any, ...]] = []
    known = {
        "moe": make_table("moe", [({"x": 1}, 1, "stock"), ({"x": 2}, 1, "triton")]),
        "moe_routing": make_table("moe_routing", [({"x": 1}, 1, "stock")]),
    }
    monkeypatch.setattr(warmup.tables, "load", lambda family, op, gpu: known.get(op))
    monkeypatch.setattr(warmup.compile_ahead, "start", lambda *args: asked.append(args))

    def ops_on(gpu: str) -> list[str]:
        with arch.pretend(gpu):
            warmup.ahead_of_load(worker("qwen3-next"), ["gdn_decode", "moe", "moe_routing"])
        config, served, ops, *chip = asked.pop()
        assert config == hf_config("qwen3-next")
        assert served == warmup.Deployment(2, False, 4, 64, fp8_kv=True, state_dtype=torch.float32)
        assert chip == [gpu, arch.ARCHS[gpu]]
        return ops

    assert ops_on("h200") == ["moe"]
    monkeypatch.setenv("BLACKWELL_KERNELS_FORCE", "gdn_decode")
    assert ops_on("h200") == ["gdn_decode", "moe"]
    monkeypatch.setenv("BLACKWELL_KERNELS_UNMEASURED", "1")
    monkeypatch.setenv("BLACKWELL_KERNELS_DISABLE", "moe")
    assert ops_on("b200") == ["gdn_decode", "moe_routing"]


def test_without_a_gpu_it_says_that_there_is_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match=r"no CUDA device here\. On a CPU the operators are torch code"):
        warmup.run(hf_config("qwen3-next"), warmup.Deployment())


@pytest.mark.gpu
def test_a_second_warm_up_finds_everything_in_the_cache(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (tmp_path / "config.json").write_text(json.dumps(hf_config("qwen3-next")))
    command = [sys.executable, "-m", "blackwell_kernels", "warmup", str(tmp_path), "--max-tokens", "4", "--json"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    first, second = (
        json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)["compiled"]
        for _ in range(2)
    )
    assert first > 0
    assert second == 0
