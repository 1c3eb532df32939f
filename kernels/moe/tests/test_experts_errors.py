"""moe_fp8_block_scale: what it refuses before any launch, what it says then, its configurations and its launches."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from triton.runtime.jit import KernelInterface

from blackwell_kernels.common import tables
from blackwell_kernels.common.arch import pretend
from blackwell_kernels.errors import TableError, UnsupportedInputError
from blackwell_kernels.moe import MoeConfig, case_of, config, op, select
from blackwell_kernels.moe.inputs import make_inputs

NAMES = ["hidden_states", "a_scale", "w13", "w13_scale", "w2", "w2_scale", "topk_weights", "topk_ids", "expert_map"]
FP8 = torch.float8_e4m3fn


def arguments(quantized=True, **changes):
    inputs = make_inputs(3, 256, 128, 2, 2, quantized=quantized)
    args = {**dict(zip(NAMES, inputs.args(), strict=True)), "out": torch.empty(3, 256, dtype=torch.bfloat16)}
    return {**args, **changes}


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda a: {"a_scale": None}, r"float8_e4m3fn\[3, 256\].*a_scale = None.*or bfloat16 to quantise"),
        (lambda a: {"hidden_states": a["hidden_states"].bfloat16()}, r"bfloat16\[3, 256\].*pass a_scale=None"),
        (lambda a: {"hidden_states": a["hidden_states"][:, :128]}, r"hidden_states of shape \[\*, 256\]"),
        (lambda a: {"hidden_states": a["hidden_states"].T.contiguous().T}, r"hidden_states with last stride 1"),
        (lambda a: {"a_scale": a["a_scale"].T.contiguous()}, r"a_scale of shape \[3, 2\]"),
        (lambda a: {"a_scale": a["a_scale"].double()}, r"a_scale of dtype float32"),
        (lambda a: {"w13": a["w13"][:, :-128]}, r"w13 of shape \[2, 256, 256\]"),
        (lambda a: {"w13": a["w13"].float()}, r"w13 of dtype float8_e4m3fn"),
        (lambda a: {"w13": a["w13"].transpose(1, 2).contiguous().transpose(1, 2)}, r"contiguous w13"),
        (lambda a: {"w13_scale": a["w13_scale"][:, :1]}, r"w13_scale of shape \[2, 2, 2\]"),
        (lambda a: {"w2": a["w2"][0]}, r"w2 of shape \[\*, \*, \*\]"),
        (lambda a: {"w2_scale": a["w2_scale"].bfloat16()}, r"w2_scale of dtype float32"),
        (lambda a: {"w2": torch.empty(2, 256, 100, dtype=FP8)}, r"intermediate 100.*multiples of 128.*tensor-parallel"),
        (lambda a: {"w2": torch.empty(2, 200, 128, dtype=FP8)}, r"hidden 200.*multiples of 128"),
        (lambda a: {"w2": torch.empty(0, 256, 128, dtype=FP8)}, r"0 local experts"),
        (lambda a: {"topk_ids": a["topk_ids"].long()}, r"topk_ids of dtype int32"),
        (lambda a: {"topk_ids": a["topk_ids"][:2]}, r"topk_ids of shape \[3, \*\]"),
        (lambda a: {"topk_ids": a["topk_ids"].T.contiguous().T}, r"contiguous topk_ids"),
        (lambda a: {"topk_weights": a["topk_weights"].bfloat16()}, r"topk_weights of dtype float32"),
        (lambda a: {"topk_weights": a["topk_weights"][:, :1]}, r"topk_weights of shape \[3, 2\]"),
        (
            lambda a: {k: a[k].repeat(1, 33) for k in ("topk_ids", "topk_weights")},
            r"top-66; supported: top-1 to top-64",
        ),
        (lambda a: {"expert_map": torch.zeros(4, dtype=torch.int64)}, r"expert_map of dtype int32"),
        (lambda a: {"expert_map": torch.zeros(2, 2, dtype=torch.int32)}, r"expert_map of shape \[\*\]"),
        (lambda a: {"out": a["out"].float()}, r"out of dtype bfloat16"),
        (lambda a: {"out": a["out"][:2]}, r"out of shape \[3, 256\]"),
        (lambda a: {"out": a["out"].T.contiguous().T}, r"out with last stride 1"),
        (lambda a: {"w2_scale": a["w2_scale"].to("meta")}, r"w2_scale on meta; supported: all tensors on cpu"),
    ],
)
def test_errors(name, changes, message):
    args = arguments()
    args |= changes(args)
    with pytest.raises(UnsupportedInputError, match=message):
        getattr(op, f"moe_fp8_block_scale_{name}")(*args.values())


# torch's schema test compares FP8 inputs with allclose, which has no FP8 kernel; the canaries of test_experts.py show
# that inputs stay as they are
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("quantized", [True, False])
def test_opcheck(quantized):
    args = arguments(quantized)
    overload = torch.ops.blackwell_kernels.moe_fp8_block_scale.default
    torch.library.opcheck(overload, tuple(args.values()), {"gate_first": False}, test_utils=OPCHECKS)
    args["expert_map"] = torch.tensor([1, -1, 0], dtype=torch.int32)
    options = {"apply_router_weight_on_input": True}
    torch.library.opcheck(overload, tuple(args.values()), options, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_t": 48}, "block_t is 48; supported: 16, 32, 64, 128"),
        ({"gate_up_t": 16}, "gate_up_t is 16; supported: block_t"),
        (
            {"block_t": 32, "gate_up_t": 32, "x_in_registers": True},
            "x_in_registers with gate_up_t 32; supported: 64 and",
        ),
        ({"gate_up_warps": 3}, "warps are 3 and 8; supported: 4, 8"),
        ({"gate_up_rows": 16}, "rows are 16 and 0; supported: 4, 8, 16, 32, 64, or both 0"),
        ({"gate_up_rows": 16, "down_rows": 16, "down_warps": 16}, "warps are 8 and 16; supported: 1, 2, 4, 8"),
        ({"down_stages": 0}, "supported: 1 to 8"),
        ({"fit": 8}, "fit is 8; supported: 0, 16, 32, 64"),
        ({"down_blocks": 3}, "down_blocks is 3; supported: 1, 2, 4, 8"),
        ({"down_wide": True}, "down_wide with down_blocks 1; supported: 2, 4, 8"),
    ],
)
def test_impossible_configurations(fields, message):
    good = {"block_t": 64, "gate_up_t": 64, "gate_up_warps": 8, "gate_up_stages": 4, "down_warps": 8, "down_stages": 4}
    MoeConfig(**good)
    with pytest.raises(ValueError, match=message):
        MoeConfig(**{**good, **fields})


def test_the_heuristic_follows_tokens_per_expert():
    qwen = case_of(2048, 512, 512, 512, 10)
    tiles = [config.heuristic(qwen, tokens).block_t for tokens in (1, 64, 819, 820, 2048, 8192)]
    assert tiles == [16, 16, 16, 32, 64, 128]
    assert config.heuristic(qwen, 8192).fit == 32  # a tile that is hardly filled is not computed at its full height
    # the same tokens spread over all experts, wherever they are; but a grid for those elsewhere would be mostly idle
    here, elsewhere = (config.heuristic(case_of(7168, 2048, 256, n, 8), 512) for n in (256, 32))
    assert (here.block_t, here.walk, elsewhere.block_t, elsewhere.walk) == (16, False, 16, True)


def test_the_heuristic_follows_bytes_for_few_tokens():
    """The same pairs' weights, in large experts of one token or in small ones of sixteen; then one token more."""
    for hidden, inter, experts, local, topk, most in (
        (7168, 2048, 256, 256, 8, 1),
        (7168, 2048, 256, 32, 8, 12),
        (7168, 256, 256, 256, 8, 12),
        (2048, 512, 512, 512, 10, 16),
        (2048, 128, 512, 512, 10, 16),
    ):
        case = case_of(hidden, inter, experts, local, topk)
        assert config.heuristic(case, most).direct
        assert not config.heuristic(case, most + 1).direct


def test_short_rows_are_walked_several_at_a_time():
    blocks = {
        inter: config.heuristic(case_of(7168, inter, 256, 256, 8), 64).down_blocks for inter in (128, 256, 384, 512)
    }
    assert blocks == {128: 4, 256: 2, 384: 1, 512: 1}


def write_table(tmp_path, monkeypatch, row_config, use="triton"):
    case = case_of(256, 128, 2, 2, 2)
    provenance = dict.fromkeys(("driver", "torch", "triton", "vllm", "commit"), "-") | {
        "gpu": "NVIDIA H200",
        "sm": 90,
        "date": "2026-01-01",
        "command": "test",
        "n": 1,
    }
    row = {"case": case, "tokens": 64, "config": row_config, "ours_us": None, "stock_us": None, "use": use}
    table = tables.Table.model_validate({"schema": 1, "op": "moe", "provenance": provenance, "rows": [row]})
    tables.write("moe", table, tmp_path)
    load = tables.load
    monkeypatch.setattr(tables, "load", lambda family, op, gpu: load(family, op, gpu, tmp_path))
    monkeypatch.setattr(config, "current_gpu", lambda device: "h200")
    return case


def test_the_table_decides(tmp_path, monkeypatch):
    tuned = {"block_t": 32, "gate_up_t": 16, "gate_up_warps": 4, "gate_up_stages": 2, "down_warps": 4, "down_stages": 3}
    case = write_table(tmp_path, monkeypatch, tuned)
    for tokens in (32, 64, 4096):
        assert select(case, tokens, "cuda") == MoeConfig(**tuned) != config.heuristic(case, tokens)
    for tokens in (1, 31):
        assert select(case, tokens, "cuda") == config.heuristic(case, tokens)
    other = case_of(256, 128, 4, 4, 2)
    assert select(other, 64, "cuda") == config.heuristic(other, 64)


def test_a_row_for_stock_needs_no_configuration(tmp_path, monkeypatch):
    case = write_table(tmp_path, monkeypatch, {}, use="stock")
    assert select(case, 1, "cuda") == config.heuristic(case, 1)


@pytest.mark.parametrize("bad", [{"block_t": 32}, {"tile": 1}])
def test_a_table_of_another_version_is_refused(tmp_path, monkeypatch, bad):
    case = write_table(tmp_path, monkeypatch, bad)
    message = r"moe\.json: .*64 tokens.*supported: a config of block_t.*bench --op moe --write-dispatch"
    with pytest.raises(TableError, match=message):
        select(case, 64, "cuda")


@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_the_search_is_a_dozen_at_once(chip):
    sizes = (1, 16, 64, 256, 1024, 1500, 4096, 8192, 14107)
    cases = (
        case_of(2048, 512, 512, 512, 10),
        case_of(2048, 128, 512, 512, 10),
        case_of(7168, 2048, 256, 256, 8),
        case_of(7168, 2048, 256, 32, 8),
        case_of(7168, 256, 256, 256, 8),
    )
    for case, tokens in product(cases, sizes):
        with pretend(chip):
            space = config.search_space(case, tokens)
            heuristic = config.heuristic(case, tokens)
            assert config.search_space(case, tokens, heuristic) == []
        assert heuristic in space
        assert 4 <= len(set(space)) == len(space) <= 12
        assert {c.direct for c in space} == ({True, False} if tokens <= 16 else {False})


def test_heights_of_a_tile():
    fitted = MoeConfig(128, 64, 8, 4, 8, 4, fit=32)
    assert [fitted.heights(t) for t in (128, 64, 32, 16)] == [3, 2, 1, 1]
    assert [replace(fitted, fit=16).heights(t) for t in (128, 64)] == [3, 3]  # down to a quarter
    assert replace(fitted, fit=0).heights(128) == 1


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels in the order of their launches, none of which runs."""
    names = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **options: names.append(kernel.__name__)
    )
    return names


@pytest.mark.parametrize(
    ("hidden", "inter", "experts", "local", "topk"),
    [
        *((2048, 512 // tp, 512, 512, 10) for tp in (1, 2, 4)),
        *((7168, 2048 // tp, 256, 256, 8) for tp in (1, 2, 4, 8)),
        (7168, 2048, 256, 32, 8),
    ],
)
def test_four_launches_at_most_up_to_256_tokens(launched, hidden, inter, experts, local, topk):
    """From bf16 activations to the summed output, in every configuration that a search may choose."""

    def empty(*shape, dtype=FP8):
        return torch.empty(shape, dtype=dtype, device="meta")

    case, i32, f32 = case_of(hidden, inter, experts, local, topk), torch.int32, torch.float32
    weights = [empty(local, 2 * inter, hidden), empty(local, 2 * inter // 128, hidden // 128, dtype=f32)]
    weights += [empty(local, hidden, inter), empty(local, hidden // 128, inter // 128, dtype=f32)]
    mapping = None if local == experts else empty(experts, dtype=i32)

    def launches(tokens, tiles):
        launched.clear()
        x, out = (empty(tokens, hidden, dtype=torch.bfloat16) for _ in range(2))
        picks = [empty(tokens, topk, dtype=dtype) for dtype in (f32, i32)]
        op.moe_fp8_block_scale_triton(x, None, *weights, *picks, mapping, out, config=tiles)
        return list(launched)

    with pretend("h200"):
        for tokens in (1, 4, 16, 17, 64, 256):
            for tiles in config.search_space(case, tokens):
                made = launches(tokens, tiles)
                assert len(made) == (2 if tiles.direct else 4), made
                assert made[-1] == ("direct_down_kernel" if tiles.direct else "combine_kernel")
        assert len(launches(8192, config.heuristic(case, 8192))) == 7
