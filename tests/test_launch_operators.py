"""Every operator launches again what it launched: the same kernels, grids, flags and arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from blackwell_kernels.common import arch  # noqa: E402
from blackwell_kernels.common.testing.launches import Launched, copies, f32  # noqa: E402
from blackwell_kernels.dsa import config as dsa_configs  # noqa: E402
from blackwell_kernels.dsa import op as dsa  # noqa: E402
from blackwell_kernels.gdn import op as gdn  # noqa: E402
from blackwell_kernels.moe import MoeConfig  # noqa: E402
from blackwell_kernels.moe import op as moe  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="launches nothing where Triton interprets")
BF16, F32, I32, FP8 = torch.bfloat16, torch.float32, torch.int32, torch.float8_e4m3fn


def fp8(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=FP8)


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=I32)


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16)


def experts(tokens: int, *, quantised: bool, mapped: bool, config: MoeConfig | None = None) -> Any:
    hidden, inter, topk = 256, 128, 2
    x = (fp8(tokens, hidden), f32(tokens, 2)) if quantised else (bf16(tokens, hidden), None)
    weights = (fp8(4, 2 * inter, hidden), f32(4, 2, 2), fp8(4, hidden, inter), f32(4, 2, 1))
    args = (*x, *weights, f32(tokens, topk), ints(tokens, topk), ints(8) if mapped else None, bf16(tokens, hidden))
    return args, {"apply_router_weight_on_input": mapped, "config": config}


def decode(tokens: int, *, conv: bool, steps: int, state: torch.dtype) -> Any:
    H, HV, K = 2, 4, 128
    channels, gates = 2 * H * K + HV * K, bf16(tokens, 2 * HV)
    sequences = tokens // max(1, steps)
    kwargs: dict[str, Any] = {"scale": K**-0.5}
    if conv:
        kwargs |= {"conv_state": bf16(9, 7, channels)[:, : 3 + steps], "conv_weight": bf16(channels, 4)}
    if steps:
        kwargs |= {"cu_seqlens": ints(sequences + 1), "num_accepted_tokens": ints(sequences)}
    slots = ints(sequences, steps) if steps else ints(sequences)
    states = torch.empty(9, HV, K, K, dtype=state)
    args = (bf16(tokens, channels), gates[:, :HV], gates[:, HV:], f32(HV), bf16(HV), states, slots, bf16(tokens, HV, K))
    return args, kwargs


def prefill(tokens: int, sequences: int, *, norm: bool, state: torch.dtype) -> Any:
    H, HV, K = 2, 4, 128
    args = (
        bf16(tokens, H, K), bf16(tokens, H, K), bf16(tokens, HV, K), f32(tokens, HV), f32(tokens, HV),
        torch.empty(9, HV, K, K, dtype=state), ints(sequences), torch.empty(sequences, dtype=torch.bool),
        ints(sequences + 1), bf16(tokens, HV, K),
    )  # fmt: skip
    return args, {"scale": K**-0.5, "use_qk_l2norm": norm}


def prepare(tokens: int, sequences: int, *, conv: bool) -> Any:
    H, HV, K = 2, 4, 128
    channels, gates = 2 * H * K + HV * K, bf16(tokens, 2 * HV)
    args = (
        bf16(tokens, channels), gates[:, :HV], gates[:, HV:], f32(HV), bf16(HV), bf16(tokens, H, K),
        bf16(tokens, H, K), bf16(tokens, HV, K), f32(tokens, HV), f32(tokens, HV),
    )  # fmt: skip
    history = {
        "conv_state": bf16(9, 4, channels)[:, :3], "conv_weight": bf16(channels, 4), "state_indices": ints(sequences),
        "has_initial_state": torch.empty(sequences, dtype=torch.bool), "cu_seqlens": ints(sequences + 1),
    }  # fmt: skip
    return args, history if conv else {}


def pages(fp8: bool) -> torch.Tensor:
    """A cache as vLLM allocates it: some pages of a pool."""
    return torch.empty(6, 64, 656, dtype=torch.uint8)[1:] if fp8 else bf16(6, 64, 576)[1:]


def index_pages() -> torch.Tensor:
    return torch.empty(6, 64, 132, dtype=torch.uint8)[1:]


def paged_scores(batch: int, next_n: int, pages: int = 40) -> Any:
    args = (
        fp8(batch, next_n, 64, 128), index_pages(), f32(batch * next_n, 64), ints(batch, next_n), ints(batch, pages),
        f32(batch * next_n, 64 * 40),
    )  # fmt: skip
    return args, {"clean": True, "topk": 2048}


def ragged_scores(rows: int, keys: int) -> Any:
    return (fp8(rows, 64, 128), fp8(keys, 128), f32(keys), f32(rows, 64), ints(rows), ints(rows), f32(rows, keys)), {}


def top_k(rows: int, columns: int, **config: Any) -> Any:
    chosen = {"config": dsa_configs.TopkConfig(**config)} if config else {}
    return (f32(rows, columns), ints(rows), ints(rows), ints(rows, 2048)), chosen


def attention(tokens: int, *, fp8: bool, slots: bool, lse: bool, config: Any = None) -> Any:
    places = (None, None) if slots else (ints(tokens), ints(4, 40))
    written = bf16(tokens, 16, 512), f32(tokens, 16) if lse else None
    return (bf16(tokens, 16, 576), pages(fp8), ints(tokens, 2048), *places, 0.1, *written), {"config": config}


def key_insert(tokens: int, slots: torch.dtype) -> Any:
    return (bf16(tokens, 128), index_pages(), torch.empty(tokens, dtype=slots)), {}


def kv_insert(tokens: int, fp8: bool) -> Any:
    latent = bf16(tokens, 576)
    slots = torch.empty(tokens, dtype=torch.int64)
    return (latent[:, :512], latent[:, 512:], pages(fp8), slots), {"power_of_two_scale": False}


OPERATORS: dict[str, tuple[Callable[..., None], Callable[[], Any], int]] = {
    "index keys": (dsa.dsa_indexer_k_insert_triton, partial(key_insert, 5, I32), 1),
    "gathered keys": (
        dsa.dsa_gather_indexer_k_triton,
        lambda: ((index_pages(), ints(3, 40), ints(4), fp8(300, 128), f32(300)), {}),
        1,
    ),
    "paged scores": (dsa.dsa_indexer_logits_paged_triton, partial(paged_scores, 3, 2), 1),
    "ragged scores": (dsa.dsa_indexer_logits_ragged_triton, partial(ragged_scores, 70, 300), 1),
    "KV entries, bf16": (dsa.dsa_kv_insert_triton, partial(kv_insert, 5, False), 1),
    "KV entries, fp8": (dsa.dsa_kv_insert_triton, partial(kv_insert, 5, True), 1),
    "softmax top-k": (moe.moe_softmax_topk_triton, lambda: ((bf16(5, 64), True, f32(5, 8), ints(5, 8)), {}), 1),
    "grouped top-k": (
        moe.moe_grouped_topk_triton,
        lambda: ((f32(5, 64), f32(64), 8, 4, True, 2.5, f32(5, 8), ints(5, 8)), {}),
        1,
    ),
    "decode, steps": (gdn.gdn_decode_triton, partial(decode, 8, conv=True, steps=4, state=BF16), 1),
    "prepare": (gdn.gdn_prepare_triton, partial(prepare, 100, 3, conv=False), 1),
    "prepare, convolution": (gdn.gdn_prepare_triton, partial(prepare, 100, 3, conv=True), 1),
    "prefill, normalised": (gdn.gdn_prefill_triton, partial(prefill, 200, 2, norm=True, state=BF16), 4),
    "prefill, few": (gdn.gdn_prefill_triton, partial(prefill, 300, 3, norm=False, state=F32), 2),
    "prefill, pieces": (gdn.gdn_prefill_triton, partial(prefill, 8192, 1, norm=False, state=BF16), 4),
}
for dtype, conv in product((BF16, F32), (False, True)):
    make = partial(decode, 6, conv=conv, steps=0, state=dtype)
    OPERATORS[f"decode {dtype} {conv}"] = (gdn.gdn_decode_triton, make, 1)
for tokens, launches in ((1, 2), (64, 4), (4096, 6)):
    for quantised, mapped in product((False, True), repeat=2):
        make = partial(experts, tokens, quantised=quantised, mapped=mapped)
        number = launches + (tokens == 4096 and not quantised)
        OPERATORS[f"experts {tokens} {quantised} {mapped}"] = (moe.moe_fp8_block_scale_triton, make, number)


for form, launches in (
    ({"block": 4096, "cluster": 0}, 1), ({"block": 1024, "cluster": 0, "splits": 1}, 1),
    ({"block": 1024, "cluster": 0, "splits": 4}, 2), ({"block": 1024, "cluster": 4}, 1),
    ({"block": 1024, "cluster": 0, "splits": 4, "early": True, "pdl": True}, 2),
    ({"block": 1024, "cluster": 4, "early": True}, 1),
):  # fmt: skip
    OPERATORS[f"top-k {form}"] = dsa.dsa_topk_triton, partial(top_k, 3, 4000, **form), launches
for fp8_pages, slots, lse in product((False, True), repeat=3):
    for splits in (1, 4):
        config = dsa_configs.SparseMlaConfig(splits=splits)
        make = partial(attention, 3, fp8=fp8_pages, slots=slots, lse=lse, config=config)
        OPERATORS[f"sparse MLA {fp8_pages} {slots} {lse} {splits}"] = (
            dsa.dsa_sparse_mla_triton, make, 1 + (splits > 1)
        )  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("gpu", ["h200", "b200"])
@pytest.mark.parametrize("inference", [False, True])
def test_operators_launch_again_what_they_launched(launched: Launched, gpu: str, name: str, inference: bool) -> None:
    """inference: vLLM's mode, in which operators of PyTorch are composed elsewhere."""
    op, make, launches = OPERATORS[name]
    with arch.pretend(gpu), torch.inference_mode(inference):
        assert len(copies(op, make, launched)) == launches


def test_every_operator_is_replayed_here() -> None:
    there = {f for part in (dsa, gdn, moe) for name, f in vars(part).items() if name.endswith("_triton")}
    assert there == {op for op, _, _ in OPERATORS.values()}


def test_scores_without_pages_are_filled_in_every_call(launched: Launched) -> None:
    with arch.pretend("h200"):
        for _ in range(4):
            args, kwargs = paged_scores(3, 2, pages=0)
            args[-1].zero_()
            dsa.dsa_indexer_logits_paged_triton(*args, **kwargs)
            assert args[-1].isneginf().all()


def test_the_wrapped_operator_is_what_torch_calls(launched: Launched) -> None:
    """`__wrapped__` is the operator as it is written."""
    assert gdn.gdn_decode_triton.__wrapped__.__name__ == "gdn_decode_triton"  # type: ignore[attr-defined]
