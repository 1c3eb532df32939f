"""Bad input raises before anything runs and says what was asked and what is supported; the ops pass opcheck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from blackwell_kernels import gdn
from blackwell_kernels.errors import UnsupportedInputError
from blackwell_kernels.gdn.config import DecodeConfig, PrefillConfig
from blackwell_kernels.gdn.inputs import (
    Heads,
    conv_prepare_inputs,
    decode_inputs,
    prefill_inputs,
    prepare_inputs,
)

SMALL = Heads(H=2, HV=4, K=16, V=32)
Change = Callable[[dict[str, Any]], None]


def set_to(name: str, value: Callable[[Any], Any]) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name] = value(arguments[name])

    return change


def drop(name: str) -> Change:
    return lambda arguments: arguments.pop(name)


def _decode() -> dict[str, Any]:
    x = decode_inputs(torch.Generator().manual_seed(0), SMALL, [2, 1], window=3, accepted=True, bias=True)
    x = replace(x, conv_state_indices=x.state_indices[:, 0])
    return {**x.arguments(), "out": torch.empty(3, 4, 32, dtype=torch.bfloat16)}


def _prefill() -> dict[str, Any]:
    x = prefill_inputs(torch.Generator().manual_seed(0), SMALL, [3, 2])
    return {**x.arguments(), "out": torch.empty_like(x.v)}


def _prepare() -> dict[str, Any]:
    x, keys = conv_prepare_inputs(torch.Generator().manual_seed(0), SMALL, [1, 2], bias=True), (3, 2, 16)
    outputs = {name: torch.empty(keys, dtype=torch.bfloat16) for name in "qk"}
    outputs |= {"v": torch.empty(3, 4, 32, dtype=torch.bfloat16), "g": torch.empty(3, 4), "beta": torch.empty(3, 4)}
    return {**x.arguments(), **outputs}


ARGUMENTS = {"gdn_decode": _decode, "gdn_prefill": _prefill, "gdn_prepare": _prepare}


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


BAD = [
    # what is wrong, the operator, how to break its arguments, a word the message must have
    ("channels that are no q, k, v", "gdn_decode", set_to("mixed_qkv", lambda x: x[:, 1:]), "channels"),
    ("float16", "gdn_decode", set_to("mixed_qkv", lambda x: x.half()), "float16"),
    ("strided channels", "gdn_decode", set_to("mixed_qkv", lambda x: x[:, ::2]), "mixed_qkv"),
    ("gates of other heads", "gdn_decode", set_to("a", lambda x: x[:, :3]), "a of shape"),
    ("gates of fewer tokens", "gdn_decode", set_to("b", lambda x: x[:2]), "b of shape"),
    ("float64 A_log", "gdn_decode", set_to("A_log", lambda x: x.double()), "A_log"),
    ("a flat state", "gdn_decode", set_to("state", lambda x: x.flatten(2)), "state"),
    ("float16 state", "gdn_decode", set_to("state", lambda x: x.half()), "float16"),
    ("state with K and V swapped in memory", "gdn_decode", set_to("state", transposed), "strides"),
    ("int64 slots", "gdn_decode", set_to("state_indices", lambda x: x.long()), "int64"),
    ("slots of three dimensions", "gdn_decode", set_to("state_indices", lambda x: x[..., None]), "state_indices"),
    ("no columns", "gdn_decode", set_to("state_indices", lambda x: x[:, :0]), "column"),
    ("windows without cu_seqlens", "gdn_decode", drop("cu_seqlens"), "without cu_seqlens"),
    ("short cu_seqlens", "gdn_decode", set_to("cu_seqlens", lambda x: x[:-1]), "cu_seqlens"),
    ("float cu_seqlens", "gdn_decode", set_to("cu_seqlens", lambda x: x.float()), "cu_seqlens"),
    ("accepted of other sequences", "gdn_decode", set_to("num_accepted_tokens", lambda x: x[:1]), "accepted"),
    ("accepted with one slot", "gdn_decode", set_to("state_indices", lambda x: x[:, 0].contiguous()), "accepted"),
    ("narrow history", "gdn_decode", set_to("conv_state", lambda x: x[:, :4]), "at least 5 rows"),
    ("history of other channels", "gdn_decode", set_to("conv_state", lambda x: x[..., :8]), "conv_state"),
    ("convolution without history", "gdn_decode", drop("conv_state"), "conv_state"),
    ("history without convolution", "gdn_decode", drop("conv_weight"), "conv_weight"),
    ("three taps", "gdn_decode", set_to("conv_weight", lambda x: x[:, :3]), "conv_weight"),
    ("output of another type", "gdn_decode", set_to("out", lambda x: x.float()), "out"),
    ("output heads apart", "gdn_decode", set_to("out", lambda x: x[..., :16].repeat(1, 1, 2)[:, :2]), "out"),
    ("another device", "gdn_decode", set_to("b", lambda x: x.to("meta")), "meta"),
    ("keys of another length", "gdn_prefill", set_to("k", lambda x: x[:4]), "k of shape"),
    ("float32 queries", "gdn_prefill", set_to("q", lambda x: x.float()), "q of dtype"),
    ("heads that do not divide", "gdn_prefill", set_to("v", lambda x: x[:, :3]), "multiple of H"),
    ("bf16 gates", "gdn_prefill", set_to("g", lambda x: x.bfloat16()), "g of dtype"),
    ("state of other heads", "gdn_prefill", set_to("state", lambda x: x[:, :2]), "state"),
    ("integers for booleans", "gdn_prefill", set_to("has_initial_state", lambda x: x.int()), "bool"),
    ("slots of more sequences", "gdn_prefill", set_to("state_indices", lambda x: x.repeat(2)), "has_initial_state"),
    ("output not contiguous", "gdn_prefill", set_to("out", transposed), "strides"),
    ("float16 channels", "gdn_prepare", set_to("mixed_qkv", lambda x: x.half()), "float16"),
    ("channels that do not add up", "gdn_prepare", set_to("mixed_qkv", lambda x: x[:, :-16]), "channels"),
    ("keys strided", "gdn_prepare", set_to("k", lambda x: transposed(x)), "strides"),
    ("half a convolution", "gdn_prepare", drop("cu_seqlens"), "all of them"),
    ("two rows of history", "gdn_prepare", set_to("conv_state", lambda x: x[:, :2]), "at least 3 rows"),
    ("weights of other channels", "gdn_prepare", set_to("conv_weight", lambda x: x[:8]), "conv_weight"),
    ("bias of other channels", "gdn_prepare", set_to("conv_bias", lambda x: x[:4]), "conv_bias"),
    ("slots on another device", "gdn_prepare", set_to("state_indices", lambda x: x.to("meta")), "meta"),
    ("bias on another device", "gdn_prepare", set_to("conv_bias", lambda x: x.to("meta")), "meta"),
    ("bf16 beta", "gdn_prepare", set_to("beta", lambda x: x.bfloat16()), "beta"),
]  # fmt: skip

# contents the host knows on a CPU only
BAD_VALUES = [
    ("a slot too large", "gdn_decode", set_to("state_indices", lambda x: x + 100), "slot"),
    ("descending cu_seqlens", "gdn_decode", set_to("cu_seqlens", lambda x: x.flip(0)), "cu_seqlens"),
    ("more tokens than columns", "gdn_decode", set_to("cu_seqlens", lambda x: torch.tensor([0, 0, 4])), "at most 3"),
    ("none accepted", "gdn_decode", set_to("num_accepted_tokens", lambda x: x * 0), "num_accepted_tokens"),
    ("too many accepted", "gdn_decode", set_to("num_accepted_tokens", lambda x: x * 0 + 4), "num_accepted_tokens"),
    ("a convolution slot too large", "gdn_decode", set_to("conv_state_indices", lambda x: x + 90), "slot"),
    ("cu_seqlens past the end", "gdn_prefill", set_to("cu_seqlens", lambda x: x + 1), "0..5"),
    ("a slot too large", "gdn_prefill", set_to("state_indices", lambda x: x + 100), "slot"),
    ("negative cu_seqlens", "gdn_prepare", set_to("cu_seqlens", lambda x: x - 1), "cu_seqlens"),
]  # fmt: skip


def _ids(cases: list[tuple[str, str, Change, str]]) -> list[str]:
    return [f"{op}: {what}" for what, op, _, _ in cases]


@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize(("what", "op", "change", "word"), BAD, ids=_ids(BAD))
def test_bad_input(path: str, what: str, op: str, change: Change, word: str) -> None:
    arguments = ARGUMENTS[op]()
    change(arguments)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    call = getattr(gdn, f"{op}_triton") if path == "triton" else getattr(torch.ops.blackwell_kernels, op)
    with pytest.raises(UnsupportedInputError) as error:
        # a tensor on another device would not reach the CPU implementation through the dispatcher
        (getattr(gdn, f"{op}_triton") if "device" in what else call)(**arguments)
    assert error.value.op == op
    assert word in str(error.value)
    for name, value in before.items():
        assert torch.equal(arguments[name].nan_to_num(7.0), value.nan_to_num(7.0)), f"{name} was written"


@pytest.mark.parametrize(("what", "op", "change", "word"), BAD_VALUES, ids=_ids(BAD_VALUES))
def test_bad_values_on_a_cpu(what: str, op: str, change: Change, word: str) -> None:
    arguments = ARGUMENTS[op]()
    if "tokens than" in what:
        arguments = {**arguments, **_more_tokens(arguments)}
    change(arguments)
    with pytest.raises(UnsupportedInputError, match=word):
        getattr(torch.ops.blackwell_kernels, op)(**arguments)


def _more_tokens(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: arguments[name].repeat(2, *[1] * (arguments[name].dim() - 1)) for name in ("mixed_qkv", "a", "b", "out")
    }


@pytest.mark.parametrize(
    ("op", "size"), [("gdn_decode", 8), ("gdn_decode", 24), ("gdn_prefill", 8), ("gdn_prepare", 8)]
)
def test_head_sizes_the_kernels_lack(op: str, size: int) -> None:
    """The CPU takes any size; the kernels say which they have."""
    rng, heads = torch.Generator().manual_seed(0), Heads(1, 2, size, size)
    if op == "gdn_decode":
        x: Any = decode_inputs(rng, heads, 2)
        outputs = {"out": torch.empty(2, 2, size, dtype=torch.bfloat16)}
    elif op == "gdn_prefill":
        x = prefill_inputs(rng, heads, [2])
        outputs = {"out": torch.empty_like(x.v)}
    else:
        x = prepare_inputs(rng, heads, 2)
        outputs = {name: torch.empty(2, 1, size, dtype=torch.bfloat16) for name in "qk"}
        outputs |= {
            "v": torch.empty(2, 2, size, dtype=torch.bfloat16),
            "g": torch.empty(2, 2),
            "beta": torch.empty(2, 2),
        }
    with pytest.raises(UnsupportedInputError, match="head sizes"):
        getattr(gdn, f"{op}_triton")(**x.arguments(), **outputs)
    getattr(gdn, op)(**x.arguments(), **outputs)


def test_configurations_that_do_not_fit() -> None:
    arguments = _decode()
    for config in (
        DecodeConfig(block_v=32, splits=3, num_warps=1),  # programs share rows evenly
        DecodeConfig(block_v=24, splits=1, num_warps=1),
        DecodeConfig(block_v=256, splits=1, num_warps=1),  # more rows than there are
        DecodeConfig(block_v=16, splits=2, num_warps=4),  # more threads than pieces of a block
    ):
        with pytest.raises(UnsupportedInputError, match="block_v"):
            gdn.gdn_decode_triton(**arguments, config=config)
    with pytest.raises(UnsupportedInputError, match="block_v dividing V"):
        gdn.gdn_prefill_triton(**_prefill(), config=PrefillConfig(4, 168, 64, 4, 2))


def test_opcheck_decode() -> None:
    rng = torch.Generator().manual_seed(0)
    for lengths, more in ((3, {}), ([2, 1], {"window": 2, "accepted": True}), (2, {"conv": False})):
        x = decode_inputs(rng, SMALL, lengths, gap=0, **more)  # type: ignore[arg-type]
        # opcheck compares mutated tensors, and NaN never compares equal
        x = replace(
            x, state=x.state.nan_to_num(0.0), conv_state=None if x.conv_state is None else x.conv_state.nan_to_num(0.0)
        )
        arguments = x.arguments()
        names = ("mixed_qkv", "a", "b", "A_log", "dt_bias", "state", "state_indices")
        positional = [arguments.pop(name) for name in names]
        out = torch.zeros(len(x.mixed_qkv), 4, 32, dtype=torch.bfloat16)
        torch.library.opcheck(gdn.gdn_decode, (*positional, out), arguments)


def test_opcheck_prefill_prepare() -> None:
    rng = torch.Generator().manual_seed(0)
    x = prefill_inputs(rng, SMALL, [3, 70], gap=0)
    arguments = replace(x, state=x.state.nan_to_num(0.0)).arguments()
    keywords = {name: arguments.pop(name) for name in ("scale", "use_qk_l2norm")}
    torch.library.opcheck(gdn.gdn_prefill, (*arguments.values(), torch.zeros_like(x.v)), keywords)

    prepared = _prepare()
    prepared["conv_state"] = prepared["conv_state"].nan_to_num(0.0).contiguous()
    required = ("mixed_qkv", "a", "b", "A_log", "dt_bias")
    positional = [prepared.pop(name) for name in required]
    positional += [torch.zeros_like(prepared.pop(name)) for name in ("q", "k", "v", "g", "beta")]
    torch.library.opcheck(gdn.gdn_prepare, tuple(positional), prepared)
    torch.library.opcheck(gdn.gdn_prepare, tuple(positional), {"use_qk_l2norm": True})
