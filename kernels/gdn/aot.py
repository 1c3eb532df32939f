"""Ahead-of-time cases: every kernel at the shipped head counts (Qwen3-Next at TP 1, 2, 4, 8), both state dtypes, each
configuration the heuristic chooses and each in a shipped table. Contents of the tensors do not matter: nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from blackwell_kernels.common import tables
from blackwell_kernels.common.arch import ARCHS
from blackwell_kernels.common.testing.gates import AotCase
from blackwell_kernels.gdn import config as configs
from blackwell_kernels.gdn import op

HEADS = {"tp1": (16, 32), "tp2": (8, 16), "tp4": (4, 8), "tp8": (2, 4)}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
SIZE = 128
# the inverses of 16 x 16 blocks are too small for wgmma and tcgen05
_PREFILL_MMA = {"gdn_prefill_chunks_kernel": "f16+mma.sync", "gdn_prefill_walk_kernel": "f16"}
_PIECES_MMA = {**_PREFILL_MMA, "gdn_prefill_carry_kernel": "f16"}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _indices(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def decode(
    H: int, HV: int, dtype: torch.dtype, tokens: int, steps: int, conv: bool, K: int = SIZE, V: int = SIZE, **more: Any
) -> None:
    """steps 0: one token a sequence; else a speculative window of that many."""
    channels, seqs = 2 * H * K + HV * V, tokens // max(steps, 1)
    arguments: dict[str, Any] = {}
    if conv:
        arguments = {"conv_state": _empty(8, 3 + max(steps - 1, 0), channels), "conv_weight": _empty(channels, 4)}
    if steps:
        arguments |= {"cu_seqlens": _indices(seqs + 1), "num_accepted_tokens": _indices(seqs)}
    op.gdn_decode_triton(
        _empty(tokens, channels), _empty(tokens, HV), _empty(tokens, HV), _empty(HV, dtype=torch.float32), _empty(HV),
        _empty(8, HV, V, K, dtype=dtype), _indices(seqs, steps) if steps else _indices(seqs),
        _empty(tokens, HV, V), scale=K**-0.5, **arguments, **more,
    )  # fmt: skip


def prefill(
    H: int, HV: int, dtype: torch.dtype, tokens: int, seqs: int, K: int = SIZE, V: int = SIZE, **more: Any
) -> None:
    gates = _empty(tokens, HV, dtype=torch.float32)
    op.gdn_prefill_triton(
        _empty(tokens, H, K), _empty(tokens, H, K), _empty(tokens, HV, V), gates, gates,
        _empty(8, HV, V, K, dtype=dtype), _indices(seqs), torch.empty(seqs, dtype=torch.bool),
        _indices(seqs + 1), _empty(tokens, HV, V), scale=K**-0.5, **more,
    )  # fmt: skip


def before_prefill(
    H: int, HV: int, tokens: int, seqs: int, K: int = SIZE, V: int = SIZE, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Preparation, without a convolution and with it; dtype: of the convolution's history."""
    channels = 2 * H * K + HV * V
    x = _empty(tokens, channels)
    fused: dict[str, Any] = {
        "conv_state": _empty(8, 3, channels, dtype=dtype), "conv_weight": _empty(channels, 4),
        "state_indices": _indices(seqs), "has_initial_state": torch.empty(seqs, dtype=torch.bool),
        "cu_seqlens": _indices(seqs + 1),
    }  # fmt: skip
    for conv in ({}, fused):
        op.gdn_prepare_triton(
            x, _empty(tokens, HV), _empty(tokens, HV), _empty(HV, dtype=torch.float32), _empty(HV),
            _empty(tokens, H, K), _empty(tokens, H, K), _empty(tokens, HV, V),
            _empty(tokens, HV, dtype=torch.float32), _empty(tokens, HV, dtype=torch.float32), **conv,
        )  # fmt: skip


def _heuristic_cases() -> Iterator[AotCase]:
    for tp, (H, HV) in HEADS.items():
        for name, dtype in DTYPES.items():
            for what, steps, conv in (("", 0, False), ("_conv", 0, True), ("_spec", 4, False), ("_spec_conv", 4, True)):
                # few and many programs, which the heuristic tells apart
                for tokens in (64,) if steps else (4, 64, 1024):
                    run = partial(decode, H, HV, dtype, tokens, steps, conv)
                    yield AotCase(f"decode{what}_{tp}_{name}_{tokens}", run)
            # with all heads one sequence fills the chip in two pieces, between which there is nothing to carry over
            for seqs, mma in ((1, _PREFILL_MMA if tp == "tp1" else _PIECES_MMA), (256, _PREFILL_MMA)):
                yield AotCase(f"prefill_{tp}_{name}_{seqs}", partial(prefill, H, HV, dtype, 4096, seqs), mma=mma)
        yield AotCase(f"before_prefill_{tp}", partial(before_prefill, H, HV, 4096, 8))
    # a name may not be bound to tiles of keys and to those of values, which differ in shape only here
    heads = {"H": 2, "HV": 4, "K": 64, "V": 128}
    # a history of fp32, which no model has, is held in twice the registers
    yield AotCase("before_prefill_oblong",
                  partial(before_prefill, **heads, tokens=4096, seqs=8, dtype=torch.float32),
                  spill_allowance={"gdn_conv_prepare_kernel": 8})  # fmt: skip
    yield AotCase("prefill_oblong", partial(prefill, **heads, dtype=torch.float32, tokens=4096, seqs=1),
                  mma=_PIECES_MMA)  # fmt: skip
    for what, steps in (("conv", 0), ("spec_conv", 4)):
        run = partial(decode, **heads, dtype=torch.float32, tokens=64, steps=steps, conv=True)
        yield AotCase(f"decode_{what}_oblong", run)
    yield AotCase("prefill_normalise", partial(prefill, 16, 32, torch.bfloat16, 4096, 8, use_qk_l2norm=True),
                  mma=_PREFILL_MMA)  # fmt: skip


def _tuned_cases() -> Iterator[AotCase]:
    """What the shipped tables hold, each for its chip."""
    kinds: dict[str, tuple[type[Any], Callable[..., None]]] = {
        "gdn_decode": (configs.DecodeConfig, decode),
        "gdn_prefill": (configs.PrefillConfig, prefill),
    }
    for gpu, chip in ARCHS.items():
        for name, (kind, call) in kinds.items():
            table = tables.load("gdn", name, gpu)
            for row in () if table is None else table.rows:
                if not row.config:
                    continue
                H, HV = int(row.case["num_k_heads"]), int(row.case["num_v_heads"])
                dtype = getattr(torch, str(row.case["state_dtype"]))
                config = configs.from_row(name, kind, row.config, gpu)
                if name == "gdn_decode":
                    steps, conv = 4 * bool(row.case["multi_token"]), bool(row.case["fused_conv"])
                    run = partial(call, H, HV, dtype, max(row.tokens, steps), steps, conv, config=config)
                    mma: Any = "none"
                else:
                    run = partial(call, H, HV, dtype, row.tokens, 1, config=config)
                    mma = _PIECES_MMA if 2 * config.piece_of(row.tokens) < row.tokens else _PREFILL_MMA
                label = "_".join(str(value) for value in row.case.values())
                yield AotCase(f"{gpu}_{name}_{label}_{row.tokens}", run, mma=mma, archs=(chip.sm,))


CASES = [*_heuristic_cases(), *_tuned_cases()]
