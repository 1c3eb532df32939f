"""Lower bounds: the bytes and operations a case cannot do without, over what the chip was measured to do.

Counted from the actual inputs (which experts are hit, which cache entries are selected), each byte once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.ours import Inputs

# what one multiprocessor can load and store: 64 bytes a clock each way, at 1.98 GHz
SM_BYTES_PER_US = 2 * 64 * 1980
# a launch may get ready before the one ahead of it has ended (programmatic dependent launch), but not all of it
FURTHER = 1 / 3
Bound = Literal["memory", "compute", "launch"]


@dataclass(frozen=True)
class Cost:
    """bytes read and written at least once; flops of matrix products and the operand type they run in."""

    bytes: int
    flops: int = 0
    kind: Literal["fp8", "bf16"] = "bf16"


def _size(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def _moe(x: Inputs, ids: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, activations: int) -> Cost:
    local, hidden, inter = w2.shape
    if "expert_map" in x:
        ids = x["expert_map"][ids.long()]
    ids = ids[(ids >= 0) & (ids < local)]
    active = int(ids.unique().numel())
    per_expert = (w13[0].numel() + w2[0].numel()) * (1 + 4 / 128 / 128)
    return Cost(int(active * per_expert) + activations, int(ids.numel()) * 6 * hidden * inter, "fp8")


def _contest_moe(x: Inputs) -> Cost:
    from blackwell_kernels.moe.reference import moe_grouped_topk

    ids = moe_grouped_topk(x["routing_logits"], x["routing_bias"], 8, 8, 4)[1] - int(x["local_expert_offset"])
    tokens, hidden = x["hidden_states"].shape
    activations = _size(x["hidden_states"], x["hidden_states_scale"], x["routing_logits"]) + 2 * tokens * hidden
    return _moe({}, ids, x["gemm1_weights"], x["gemm2_weights"], activations)


def _keys(lens: torch.Tensor) -> int:
    return int(lens.clamp(min=0).sum())


def _mla(x: Inputs, indices: torch.Tensor, q: int, entry: int, heads: int, requests: Any) -> Cost:
    valid = indices >= 0
    flat = indices.long() if requests is None else indices.long() + requests.long()[:, None] * (1 << 40)
    unique = int(flat[valid].unique().numel())
    out = indices.shape[0] * heads * (512 * 2 + 4)
    return Cost(unique * entry + q + out + _size(indices), int(valid.sum()) * heads * 2 * (576 + 512))


def _gdn(x: Inputs, tokens: int, sequences: int, read: int) -> Cost:
    state = x["state"]
    v_heads = state.shape[1]
    per_state = v_heads * 128 * 128 * state.element_size()
    # three products with a 128 x 128 state a token and value head is the least arithmetic there is
    return Cost(2 * sequences * per_state + read + tokens * v_heads * 256, tokens * v_heads * 6 * 128 * 128)


def cost(case: Case, x: Inputs) -> Cost:
    """What `case` with these inputs must move and multiply."""
    small = _size(*(v for k, v in x.items() if k not in ("state", "conv_state", "kv_cache", "k_cache")))
    match case.definition.split("_"):
        case ["moe", "fp8", "block", "scale", *_]:
            return _contest_moe(x)
        case ["moe", "fp8", *_]:
            own = _size(x["hidden_states"], x["topk_ids"], x["topk_weights"]) + _size(x["hidden_states"])
            return _moe(x, x["topk_ids"], x["w13"], x["w2"], own)
        case ["moe", "routing", *_]:
            top_k = case.spec.constants["top_k"]
            return Cost(small + len(x["router_logits"]) * top_k * 8)
        case ["dsa", "indexer", "logits", "paged"]:
            next_n, heads = x["q"].shape[1:3]
            keys = _keys(x["context_lens"])
            moved = keys * 132 + keys * next_n * 4 + _size(x["q"], x["weights"])
            return Cost(moved, keys * next_n * heads * 256, "fp8")
        case ["dsa", "indexer", "logits", "ragged"]:
            pairs = _keys(x["row_ends"] - x["row_starts"])
            return Cost(small + pairs * 4, pairs * x["q"].shape[1] * 256, "fp8")
        case ["dsa", "topk", "indexer", *_]:
            keys = _keys(x["seq_lens"])
            return Cost(keys * 132 + len(x["seq_lens"]) * 8192, keys * 64 * 256, "fp8")
        case ["dsa", "pair", "decode"]:
            scored = x["context_lens"][x["context_lens"] > 2048]  # of a row that is selected whole no key need be read
            moved = _keys(scored) * 132 + len(x["context_lens"]) * 8192 + _size(x["q"], x["weights"])
            return Cost(moved, _keys(scored) * x["q"].shape[2] * 256, "fp8")
        case ["dsa", "pair", "prefill"]:
            pairs = _keys(x["row_ends"] - x["row_starts"])
            return Cost(small + len(x["row_ends"]) * 8192, pairs * x["q"].shape[1] * 256, "fp8")
        case ["dsa", "topk2048"]:
            return Cost(_keys(x["row_ends"] - x["row_starts"]) * 4 + len(x["logits"]) * 8192)
        case ["dsa", "sparse", "mla", _]:
            entry = x["kv_cache"].shape[-1] * x["kv_cache"].element_size()
            return _mla(x, x["indices"], _size(x["q"]), entry, x["q"].shape[1], x["req_id"])
        case ["dsa", "sparse", "attention", *_]:
            return _mla(x, x["sparse_indices"], _size(x["q_nope"], x["q_pe"]), 1152, 16, None)
        case ["dsa", "step", *_]:
            keys, heads = _keys(x["context_lens"]), x["q"].shape[1]
            selected = _keys(x["context_lens"].clamp(max=2048))
            moved = keys * 132 + selected * 1152 + _size(x["q_index"], x["q"]) + len(x["q"]) * heads * 1024
            return Cost(moved, selected * heads * 2 * (576 + 512))
        case ["dsa", "gather", *_]:
            return Cost(_size(x["block_table"]) + 2 * _size(x["k"], x["k_scale"]))
        case ["dsa", "kv", "insert", _]:
            return Cost(_size(x["slot_mapping"]) + 2 * _size(x["kv_c"], x["k_pe"]))
        case ["gdn", "decode", *_] | ["gdn", "core", "decode", *_]:
            sequences = x["state"].shape[0] if "q" in x else len(x["state_indices"])
            conv = 2 * 3 * sequences * x["mixed_qkv"].shape[1] * 2 if "conv_state" in x else 0
            return _gdn(x, sequences, sequences, small + conv)
        case ["drafts", "gdn", *_]:
            (sequences, steps), channels = x["state_indices"].shape, x["mixed_qkv"].shape[1]
            # a state is read once and written after every step; of the history, three rows are read, steps + 2 written
            more = (steps - 1) * sequences * x["state"][0].numel() * x["state"].element_size()
            conv = (steps + 5) * sequences * channels * 2
            return _gdn(x, sequences * steps, sequences, small + conv + more)
    lead = x["mixed_qkv"] if "mixed_qkv" in x else x["v"]
    return _gdn(x, lead.shape[0], len(x["cu_seqlens"]) - 1, small)


def mean(works: Sequence[Cost]) -> Cost:
    """Of the rotated inputs that a time is the mean over: what they hit differs (experts of few tokens above all)."""
    n = len(works)
    return Cost(sum(one.bytes for one in works) // n, sum(one.flops for one in works) // n, works[0].kind)


def floor(
    work: Cost, *, copy_tbps: float, fp8_tflops: float, bf16_tflops: float, launch_us: float
) -> tuple[float, Bound]:
    """(µs, what limits): the largest of moving the bytes, doing the products, and launching one kernel."""
    times: dict[Bound, float] = {
        "memory": work.bytes / copy_tbps / 1e6,
        "compute": work.flops / (fp8_tflops if work.kind == "fp8" else bf16_tflops) / 1e6,
        "launch": launch_us,
    }
    limit = max(times, key=lambda name: times[name])
    return times[limit], limit


def own(
    floor_us: float,
    moved: int,
    flops: int,
    blocks: Sequence[int],
    *,
    sms: int,
    fp8_tflops: float,
    launch_us: float,
) -> tuple[float, str]:
    """(µs, what limits) of a call that launches grids of `blocks` one after another: never below the floor.

    moved: bytes. The first launch takes the time of the smallest one, each further one at least FURTHER of it, and a
    grid of fewer blocks than the chip has multiprocessors (`sms`) leaves the others idle. Products count at the FP8
    rate, the highest there is.
    """
    busy = min(sms, max(blocks, default=sms))
    times = {
        "the floor": floor_us,
        f"{len(blocks)} launches": (1 + FURTHER * (len(blocks) - 1)) * launch_us,
        f"memory, {busy} multiprocessors": moved / (busy * SM_BYTES_PER_US),
        f"compute, {busy} multiprocessors": flops / (fp8_tflops * busy / sms) / 1e6,
    }
    limit = max(times, key=lambda name: times[name])
    return times[limit], limit
