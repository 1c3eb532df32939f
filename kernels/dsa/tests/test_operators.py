"""The registered operators: torch's own checks, refusals with a message, configuration choice, imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blackwell_kernels import dsa
from blackwell_kernels.common import arch, tables
from blackwell_kernels.common.testing.generators import cu_seqlens, normal, seeded
from blackwell_kernels.dsa import config, op, testing
from blackwell_kernels.errors import UnsupportedInputError

FP8, BF16, F32, I32, I64 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32, torch.int64
NAMES = sorted(name for name in dir(dsa) if name.startswith("dsa_"))


def arguments(name: str) -> dict[str, Any]:
    """Valid arguments of an operator, by name, in the order of its schema."""
    rng = seeded(1)
    index_cache, table = testing.index_cache([70, 30], 64, rng)
    kv_cache, kv_table = testing.kv_cache([70, 30], 64, True, rng)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "dsa_indexer_k_insert": lambda: {
            "k": normal((3, 128), rng),
            "k_cache": index_cache,
            "slot_mapping": torch.tensor([0, -1, 5]),
        },
        "dsa_gather_indexer_k": lambda: {
            "k_cache": index_cache,
            "block_table": table,
            "cu_seq_lens": cu_seqlens([70, 30]),
            "k": torch.zeros(100, 128).to(FP8),
            "k_scale": torch.zeros(100),
        },
        "dsa_indexer_logits_paged": lambda: {
            "q": testing.fp8_queries((2, 1, 4, 128), rng),
            "k_cache": index_cache,
            "weights": torch.rand(2, 4, generator=rng),
            "context_lens": torch.tensor([70, 30], dtype=I32),
            "block_table": table,
            "logits": torch.zeros(2, 128),
        },
        "dsa_indexer_logits_ragged": lambda: {
            "q": testing.fp8_queries((3, 4, 128), rng),
            "k": testing.fp8_queries((50, 128), rng),
            "k_scale": torch.rand(50, generator=rng),
            "weights": torch.rand(3, 4, generator=rng),
            "row_starts": torch.zeros(3, dtype=I32),
            "row_ends": torch.tensor([10, 50, 0], dtype=I32),
            "logits": torch.zeros(3, 50),
        },
        "dsa_topk": lambda: {
            "logits": torch.randn(3, 60, generator=rng),
            "row_starts": torch.zeros(3, dtype=I32),
            "row_ends": torch.tensor([10, 60, 0], dtype=I32),
            "indices": torch.zeros(3, 16, dtype=I32),
        },
        "dsa_sparse_mla": lambda: {
            "q": normal((2, 8, 576), rng),
            "kv_cache": kv_cache,
            "indices": torch.tensor([[0, 5, -1], [29, 2, 2]], dtype=I32),
            "req_id": torch.tensor([0, 1], dtype=I32),
            "block_table": kv_table,
            "sm_scale": 0.1,
            "out": torch.zeros(2, 8, 512, dtype=BF16),
            "lse": torch.zeros(2, 8),
        },
        "dsa_kv_insert": lambda: {
            "kv_c": normal((3, 512), rng),
            "k_pe": normal((3, 64), rng),
            "kv_cache": kv_cache,
            "slot_mapping": torch.tensor([0, -1, 5]),
        },
    }
    return cases[name]()


def to_device(value: Any, device: torch.device) -> Any:
    return testing.moved(value, device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, device: torch.device):
    values = tuple(to_device(value, device) for value in arguments(name).values())
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(value, torch.Tensor) and value.dtype == FP8 for value in values):
        # torch cannot compare FP8 tensors there; that only what the schema names is written, Canaries check elsewhere
        tests.remove("test_schema")
    torch.library.opcheck(getattr(torch.ops.blackwell_kernels, name).default, values, test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_operator_runs_what_the_module_exports(name: str):
    ours, registered = arguments(name), arguments(name)
    getattr(op, f"{name}_cpu")(*ours.values())
    getattr(torch.ops.blackwell_kernels, name)(*registered.values())
    assert getattr(dsa, name) is getattr(torch.ops.blackwell_kernels, name).default
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.view(torch.uint8), registered[key].view(torch.uint8)), key


def test_operator_on_the_device_agrees_with_the_cpu(device: torch.device):
    for name in NAMES:
        here = arguments(name)
        there = {key: to_device(value, device) for key, value in arguments(name).items()}
        getattr(torch.ops.blackwell_kernels, name)(*here.values())
        getattr(torch.ops.blackwell_kernels, name)(*there.values())
        for key, value in here.items():
            if isinstance(value, torch.Tensor) and value.dtype not in (F32, BF16):
                assert torch.equal(value.view(torch.uint8), there[key].cpu().view(torch.uint8)), (name, key)


# one entry a refusal: operator, what to spoil, what the message must name
SPOILED: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("dsa_indexer_k_insert", "k", lambda x: x[:, :64], r"k = bfloat16\[3, 64\].*k of shape \[\*, 128\]"),
    ("dsa_indexer_k_insert", "k", lambda x: x.to(torch.int8), "dtype bfloat16 or float16 or float32"),
    ("dsa_indexer_k_insert", "k", lambda x: x.t().contiguous().t(), "call k.contiguous"),
    ("dsa_indexer_k_insert", "k_cache", lambda x: x[:, :, :128], r"\[\*, \*, 132\]"),
    ("dsa_indexer_k_insert", "k_cache", lambda x: x.view(torch.int8), "k_cache of dtype uint8"),
    ("dsa_indexer_k_insert", "k_cache", lambda x: x[:0], "at least one page"),
    ("dsa_indexer_k_insert", "k_cache", lambda x: x[:, :60], "multiple of 16 tokens"),
    ("dsa_indexer_k_insert", "k_cache", lambda x: x.expand(-1, -1, -1).transpose(0, 1), "multiple of 16 tokens"),
    ("dsa_indexer_k_insert", "slot_mapping", lambda x: x[:2], r"slot_mapping of shape \[3\]"),
    ("dsa_indexer_k_insert", "slot_mapping", lambda x: x.float(), "dtype int32 or int64"),
    ("dsa_indexer_k_insert", "slot_mapping", lambda x: x.repeat(2)[::2], "call slot_mapping.contiguous"),
    ("dsa_gather_indexer_k", "cu_seq_lens", lambda x: x[:-1], r"cu_seq_lens of shape \[3\]"),
    ("dsa_gather_indexer_k", "block_table", lambda x: x.long(), "block_table of dtype int32"),
    ("dsa_gather_indexer_k", "k", lambda x: x.view(torch.uint8), "k of dtype float8_e4m3fn"),
    ("dsa_gather_indexer_k", "k_scale", lambda x: x[:-1], r"k_scale of shape \[100\]"),
    ("dsa_indexer_logits_paged", "q", lambda x: x.bfloat16(), "q of dtype float8_e4m3fn"),
    ("dsa_indexer_logits_paged", "q", lambda x: x[:, 0], r"q of shape \[\*, \*, \*, 128\]"),
    ("dsa_indexer_logits_paged", "q", lambda x: x.repeat(1, 1, 33, 1), "132 heads; supported: 1 to 128 heads"),
    ("dsa_indexer_logits_paged", "weights", lambda x: x.bfloat16(), "weights of dtype float32"),
    ("dsa_indexer_logits_paged", "context_lens", lambda x: x[:, None].repeat(1, 2), r"context_lens of shape \[2, 1\]"),
    ("dsa_indexer_logits_paged", "context_lens", lambda x: x.long(), "context_lens of dtype int32"),
    ("dsa_indexer_logits_paged", "block_table", lambda x: x[:1], r"block_table of shape \[2, \*\]"),
    ("dsa_indexer_logits_paged", "logits", lambda x: x[:1], r"logits of shape \[2, \*\]"),
    ("dsa_indexer_logits_paged", "logits", lambda x: x.half(), "logits of dtype float32"),
    ("dsa_indexer_logits_ragged", "k", lambda x: x[:, :64], r"k of shape \[\*, 128\]"),
    ("dsa_indexer_logits_ragged", "k_scale", lambda x: x[:, None], r"k_scale of shape \[50\]"),
    ("dsa_indexer_logits_ragged", "row_ends", lambda x: x[:2], r"row_ends of shape \[3\]"),
    ("dsa_indexer_logits_ragged", "logits", lambda x: x[:, :49], "one column a key"),
    ("dsa_topk", "logits", lambda x: x.double(), "logits of dtype float32"),
    ("dsa_topk", "logits", lambda x: x.t().contiguous().t(), "call logits.contiguous"),
    ("dsa_topk", "row_starts", lambda x: x[:1].expand(3), "call row_starts.contiguous"),
    ("dsa_topk", "indices", lambda x: x.long(), "indices of dtype int32"),
    ("dsa_topk", "indices", lambda x: x[:, :0], "K >= 1"),
    ("dsa_sparse_mla", "q", lambda x: x[..., :512], r"q of shape \[\*, \*, 576\]"),
    ("dsa_sparse_mla", "q", lambda x: x.float(), "q of dtype bfloat16"),
    ("dsa_sparse_mla", "q", lambda x: x.repeat(1, 17, 1), "136 heads; supported: 1 to 128 heads"),
    ("dsa_sparse_mla", "kv_cache", lambda x: x[..., :576], r"kv_cache of shape \[\*, \*, 656\]"),
    ("dsa_sparse_mla", "kv_cache", lambda x: x.view(torch.int8), "kv_cache of dtype bfloat16 or uint8"),
    ("dsa_sparse_mla", "kv_cache", lambda x: testing.paged_bytes(2, 64, 656, 8), "stride and offset multiples of 16"),
    ("dsa_sparse_mla", "indices", lambda x: x[:1], r"indices of shape \[2, \*\]"),
    ("dsa_sparse_mla", "req_id", lambda x: None, "both .request-local indices. or neither"),
    ("dsa_sparse_mla", "req_id", lambda x: x.long(), "req_id of dtype int32"),
    ("dsa_sparse_mla", "out", lambda x: x.float(), "out of dtype bfloat16"),
    ("dsa_sparse_mla", "lse", lambda x: x.half(), "lse of dtype float32"),
    ("dsa_kv_insert", "kv_c", lambda x: x[:, :500], r"kv_c of shape \[\*, 512\]"),
    ("dsa_kv_insert", "k_pe", lambda x: x[:, None], r"k_pe of shape \[3, 64\]"),
    ("dsa_kv_insert", "slot_mapping", lambda x: x[:, None], r"slot_mapping of shape \[3\]"),
]


@pytest.mark.parametrize(("name", "argument", "spoil", "message"), SPOILED)
def test_bad_input_is_refused_before_anything_is_written(
    impl: Any, name: str, argument: str, spoil: Callable[[Any], Any], message: str
):
    values = arguments(name)
    values[argument] = spoil(values[argument])
    before = {key: value.clone() for key, value in values.items() if isinstance(value, torch.Tensor)}
    moved = {key: to_device(value, impl.device) for key, value in values.items()}
    with pytest.raises(UnsupportedInputError, match=message) as raised:
        impl.run(name, *moved.values())
    assert raised.value.op == name
    for key, value in before.items():
        same = moved[key].cpu().contiguous().view(torch.uint8) == value.contiguous().view(torch.uint8)
        assert same.all(), key


def test_tensors_of_two_devices_are_refused():
    values = arguments("dsa_topk")
    values["indices"] = torch.empty(3, 16, dtype=I32, device="meta")
    with pytest.raises(UnsupportedInputError, match=r"indices on meta; supported: all tensors on cpu"):
        op.dsa_topk_triton(*values.values())


# configuration


@pytest.mark.parametrize("gpu", ["h200", "b200"])
def test_heuristics_fit_the_problem(gpu: str):
    cpu = torch.device("cpu")
    with arch.pretend(gpu):
        sms = arch.current_arch().sms
        for heads in (8, 16, 32, 64, 128):
            for fp8 in (False, True):
                for tokens in (1, 2, 8, 64, 512, 8192):
                    chosen = config.sparse_mla_config(heads, 2048, fp8, tokens, cpu)
                    programs = tokens * -(-heads // chosen.block_h)
                    assert chosen.block_h <= 64
                    assert chosen.splits * programs <= max(2 * sms, programs)
                    assert 2048 // chosen.splits >= chosen.block_n
        assert config.sparse_mla_config(16, 2048, False, 1, cpu).splits > 8
        assert config.sparse_mla_config(16, 2048, False, 4096, cpu).splits == 1
        for columns in (1, 100, 4096, 163_840):
            chosen_topk = config.topk_config(columns, 2048, 8, cpu)
            assert 256 <= chosen_topk.block <= (16_384 if chosen_topk.cluster else 4096)
            assert chosen_topk.num_warps * 32 * max(chosen_topk.cluster, 1) <= chosen_topk.block
        for rows in (1, 8, 9, 32, 64, 66, 67, 256):
            cluster = config.topk_config(163_840, 2048, rows, cpu).cluster
            assert cluster.bit_count() == (2 * rows <= sms)
            assert cluster * rows <= sms


def write_table(root: Path, name: str, case: dict[str, Any], chosen: dict[str, Any]) -> None:
    provenance: dict[str, Any] = dict.fromkeys(("driver", "torch", "triton", "vllm", "commit"), "x")
    provenance |= {"gpu": "NVIDIA H200", "sm": 90, "date": "2026-01-01", "command": "tune", "n": 1}
    row = {"case": case, "tokens": 16, "config": chosen, "ours_us": 1.0, "stock_us": 2.0, "use": "triton"}
    path = tables.path_of("dsa", name, "h200", root)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, "op": name, "provenance": provenance, "rows": [row]}))


@pytest.mark.parametrize(
    ("name", "case", "tuned", "choose"),
    [
        (
            "dsa_indexer",
            config.logits_case("paged", 64, 1),
            config.LogitsConfig(block_n=256, group=8, num_warps=8, num_stages=3),
            lambda: config.logits_config("paged", 64, 1, 8, torch.device("cpu")),
        ),
        (
            "dsa_topk",
            config.topk_case(5000, 2048),
            config.TopkConfig(block=512, splits=4, num_warps=2),
            lambda: config.topk_config(8192, 2048, 3, torch.device("cpu")),
        ),
        (
            "dsa_sparse_mla",
            config.sparse_mla_case(16, 2048, True),
            config.SparseMlaConfig(block_h=32, block_n=64, splits=5, num_warps=2, num_stages=4),
            lambda: config.sparse_mla_config(16, 2048, True, 99, torch.device("cpu")),
        ),
    ],
)
def test_a_measured_table_wins(
    name: str, case: dict[str, Any], tuned: Any, choose: Callable[[], Any], tmp_path: Path, monkeypatch: Any
):
    write_table(tmp_path, name, case, dict(vars(tuned)))
    load = tables.load
    monkeypatch.setattr(tables, "load", lambda family, op, gpu: load(family, op, gpu, tmp_path))
    with arch.pretend("h200"):
        assert choose() == tuned
        with tables.override(name, {}):
            assert choose() != tuned
    with arch.pretend("b200"):
        assert choose() != tuned


def test_search_spaces_hold_what_fits():
    paged = config.logits_search_space(config.logits_case("paged", 64, 1), 8)
    ragged = config.logits_search_space(config.logits_case("ragged", 64, 0), 1024)
    with arch.pretend("h200"):
        assert config.logits_config("paged", 64, 1, 8, torch.device("cpu")) in paged
        assert config.logits_config("ragged", 64, 0, 1024, torch.device("cpu")) in ragged
    assert len(set(paged)) == len(paged) <= 12
    assert len(set(ragged)) == len(ragged) <= 12
    for columns in (64, 4096, 131_072):
        space = config.topk_search_space(config.topk_case(columns, 2048), 8)
        assert 0 < len(set(space)) == len(space) <= 12
        assert all(c.block * c.splits <= columns and c.splits.bit_count() == 1 for c in space)
        assert all(32 * c.num_warps * c.cluster <= c.block and c.cluster.bit_count() <= 1 for c in space)


@pytest.mark.parametrize("gpu", ["h200", "b200"])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_search_space_of_sparse_mla(gpu: str, heads: int, fp8: bool):
    case = config.sparse_mla_case(heads, 2048, fp8)
    with arch.pretend(gpu), tables.override("dsa_sparse_mla", {}):
        few, many = config.sparse_mla_search_space(case, 1), config.sparse_mla_search_space(case, 4096)
        heuristics = [config.sparse_mla_config(heads, 2048, fp8, tokens, torch.device("cpu")) for tokens in (1, 4096)]
    assert len(set(few)) == len(few) <= 12
    assert {c.splits for c in many} == {1}
    assert max(c.splits for c in few) >= 32
    assert heuristics[1] in many
    for c in (*few, *heuristics):
        assert c.splits * c.block_n <= 2048
        assert c.splits > 1 or not c.pdl
    # warps divide columns where that was faster, or nobody knows
    by_columns = [c for c in few if c.by_columns]
    assert {(c.block_h, c.num_warps) for c in by_columns} == ({(16, 4)} if fp8 or heads > 16 else set())
    # a tile holds all heads of a token, or as many as registers allow, or 16 of them where programs are few
    tiles = {c.block_h for c in (*few, *heuristics) if not c.by_columns}
    if gpu == "b200":
        assert tiles == {(32 if heads > 16 else 16) if fp8 else min(heads, 64)}
    elif heads == 16:
        assert tiles == (set() if fp8 else {16})
    else:
        assert tiles == ({64} if fp8 else {16, min(heads, 64), 64})
    # 64 heads are one warpgroup's rows, filled or not; 16 of them only for many tokens
    divided = [c for c in (*few, *heuristics) if c.divided]
    assert {(c.block_h, c.num_warps) for c in divided} == ({(64, 8)} if gpu == "h200" and heads > 16 else set())
    assert any(c.divided for c in many) == (gpu == "h200")


@pytest.mark.parametrize(("heads", "fp8", "tokens", "block_h", "splits", "block_n"), [
    (32, False, 1, 16, 64, 32), (64, False, 1, 16, 33, 32), (64, True, 1, 16, 33, 32), (128, False, 1, 64, 32, 64),
    (64, False, 8, 64, 16, 64), (128, True, 8, 64, 8, 64), (128, False, 32, 64, 2, 64), (64, True, 64, 64, 2, 64),
    (128, False, 64, 64, 1, 64),
])  # fmt: skip
def test_heuristic_of_many_heads_fills_the_chip_once(
    heads: int, fp8: bool, tokens: int, block_h: int, splits: int, block_n: int
):
    with arch.pretend("h200"), tables.override("dsa_sparse_mla", {}):
        chosen = config.sparse_mla_config(heads, 2048, fp8, tokens, torch.device("cpu"))
    assert (chosen.block_h, chosen.splits, chosen.block_n) == (block_h, splits, block_n)
    assert chosen.divided == (block_h == 64)


@pytest.mark.parametrize(("fp8", "tokens", "splits", "block_n"), [
    (False, 1, 64, 32), (False, 8, 16, 32), (False, 64, 2, 64), (False, 512, 1, 32),
    (True, 1, 64, 32), (True, 8, 16, 32), (True, 64, 4, 32), (True, 512, 1, 32),
])  # fmt: skip
def test_heuristic_of_few_heads_is_what_was_fastest(fp8: bool, tokens: int, splits: int, block_n: int):
    with arch.pretend("h200"), tables.override("dsa_sparse_mla", {}):
        chosen = config.sparse_mla_config(16, 2048, fp8, tokens, torch.device("cpu"))
    assert (chosen.splits, chosen.block_n, chosen.by_columns) == (splits, block_n, fp8)


def test_importing_the_family_needs_neither_triton_nor_a_gpu():
    program = (
        "import sys; sys.modules['triton'] = None; import blackwell_kernels.dsa, torch; "
        "assert not torch.cuda.is_initialized(); print(len(blackwell_kernels.dsa.__all__))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "7"
