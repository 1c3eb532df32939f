"""Configurations: the heuristic's always fit, a tuned row wins, a wrong one is refused; importing needs no triton."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import TableError
from blackwell_kernels.gdn import config as configs
from blackwell_kernels.gdn.aot import CASES, HEADS

DEVICE = torch.device("cuda", 0)
CASE: dict[str, Any] = {"num_k_heads": 4, "num_v_heads": 8, "head_size": 128, "state_dtype": "bfloat16"}


@pytest.mark.parametrize("chip", ["h200", "b200"])
@pytest.mark.parametrize("V", [16, 64, 128])
@pytest.mark.parametrize("heads", [*HEADS.values(), (1, 3)])
def test_heuristics_fit(chip: str, V: int, heads: tuple[int, int]) -> None:
    H, HV = heads
    with arch.pretend(chip), tables.override("gdn_decode", {}), tables.override("gdn_prefill", {}):
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in (1, 8, 64, 1024):
                for conv in (False, True):
                    for multi in (False, True):
                        case = configs.case_of(H, HV, 128, dtype, fused_conv=conv, multi_token=multi)
                        c = configs.decode_config(case, tokens, V, DEVICE)
                        assert c.fits(HV // H * V, V, 128 * dtype.itemsize)
                        assert c.pdl != multi  # where measured: it gains 0.1 to 0.4 µs
                p = configs.prefill_config(
                    configs.prefill_case_of(H, HV, 128, dtype, tokens), tokens * 8, tokens, V, DEVICE
                )
                assert V % p.block_v == 0


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("heads", HEADS.values())
def test_decode_candidates_fit(heads: tuple[int, int], tokens: int) -> None:
    H, HV = heads
    for dtype in (torch.bfloat16, torch.float32):
        for conv in (False, True):
            for multi in (False, True):
                case = configs.case_of(H, HV, 128, dtype, fused_conv=conv, multi_token=multi)
                space = configs.decode_search_space(case, tokens, 128)
                assert 8 <= len(space) <= (22 if multi else 12)
                assert len(set(space)) == len(space)
                assert all(c.fits(HV // H * 128, 128, 128 * dtype.itemsize) for c in space)
                with arch.pretend("h200"), tables.override("gdn_decode", {}):
                    heuristic = configs.decode_config(case, tokens, 128, DEVICE)
                assert any(c.block_v == heuristic.block_v and c.num_warps == heuristic.num_warps for c in space)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_of_several_searches_what_wins_on_one_for_the_same_bytes(dtype: torch.dtype, conv: bool) -> None:
    spaces = [
        configs.decode_search_space(
            configs.case_of(H, HV, 128, dtype, fused_conv=conv, multi_token=False), 32 * 16 // H, 128
        )
        for H, HV in HEADS.values()
    ]
    assert all(space == spaces[0] for space in spaces)
    assert {c.early for c in spaces[0]} == ({False, True} if conv else {False}), "asked for early or not at all"


def _table(op: str, case: dict[str, Any], config: dict[str, Any]) -> tables.Table:
    provenance: dict[str, Any] = dict.fromkeys(("driver", "torch", "triton", "vllm", "commit"), "x")
    provenance |= {"gpu": "NVIDIA H200", "sm": 90, "date": "2026-01-01", "command": "x", "n": 1}
    row = {"case": case, "tokens": 8, "config": config, "use": "triton"}
    return tables.Table.model_validate({"schema": 1, "op": op, "provenance": provenance, "rows": [row]})


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch):
    """On an H200 without tables until it is called with one."""
    shipped: list[tables.Table] = []
    monkeypatch.setattr(
        tables, "load", lambda family, op, gpu: next((t for t in shipped if (op, gpu) == (t.op, "h200")), None)
    )
    with arch.pretend("h200"):
        yield lambda *row: shipped.append(_table(*row))


def test_a_tuned_row_wins_where_its_case_is_the_same(tuned) -> None:
    asked = configs.case_of(4, 8, 128, torch.bfloat16, fused_conv=False, multi_token=False)
    other = configs.case_of(4, 8, 128, torch.float32, fused_conv=False, multi_token=False)
    heuristic, best = configs.decode_config(other, 5, 128, DEVICE), configs.DecodeConfig(16, 2, 2)
    assert configs.decode_config(asked, 5, 128, DEVICE) != best
    case = {**CASE, "fused_conv": False, "multi_token": False}
    tuned("gdn_decode", case, {"block_v": 16, "splits": 2, "num_warps": 2})
    assert configs.decode_config(asked, 5, 128, DEVICE) == best
    assert configs.decode_config(other, 5, 128, DEVICE) == heuristic
    assert configs.decode_config(asked, 5, 64, DEVICE) != best, "tables hold square states"


def test_a_row_that_only_decides_leaves_the_heuristic(tuned) -> None:
    asked = configs.prefill_case_of(4, 8, 128, torch.bfloat16, 2)
    heuristic = configs.prefill_config(asked, 100, 2, 128, DEVICE)
    tuned("gdn_prefill", CASE | {"sequences": "few"}, {})
    assert configs.prefill_config(asked, 100, 2, 128, DEVICE) == heuristic


def test_prefills_rows_go_by_the_number_of_sequences() -> None:
    kinds = [configs.prefill_case_of(4, 8, 128, torch.bfloat16, n)["sequences"] for n in (1, 2, 4, 5, 64)]
    assert kinds == ["one", "few", "few", "many", "many"]


def test_a_row_of_another_kernel_is_refused(tuned) -> None:
    tuned("gdn_prefill", CASE | {"sequences": "few"}, {"block_m": 64})
    with pytest.raises(TableError, match=r"gdn_prefill\.json.*block_m"):
        configs.prefill_config(configs.prefill_case_of(4, 8, 128, torch.bfloat16, 2), 100, 2, 128, DEVICE)


def test_ahead_of_time_cases_cover_what_ships() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert {f"{kind}_oblong" for kind in ("before_prefill", "prefill", "decode_conv", "decode_spec_conv")} <= names
    for tp in HEADS:
        assert f"before_prefill_{tp}" in names
        for dtype in ("bf16", "f32"):
            for kind in (
                f"decode_{tp}_{dtype}_64",
                f"decode_{tp}_{dtype}_1024",
                f"decode_conv_{tp}_{dtype}_4",
                f"decode_spec_conv_{tp}_{dtype}_64",
            ):
                assert kind in names
            assert f"prefill_{tp}_{dtype}_1" in names


def test_import_needs_neither_triton_nor_vllm() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['vllm'] = None\n"
        "import torch, blackwell_kernels.gdn, blackwell_kernels.gdn.aot\n"
        "assert torch.ops.blackwell_kernels.gdn_decode and not torch.cuda.is_initialized()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
