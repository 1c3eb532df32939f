"""Faults for a test of the test: each makes one operator of ours wrong the way a real mistake would.

Used only inside the comparison's own process, which must then find the difference. The operators are looked up at
`torch.ops.blackwell_kernels.<name>` on every call, so a wrapper put there is what the hooks run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Op = Callable[..., None]


def _swap_gate_and_up(op: Op, *args: Any, **kwargs: Any) -> None:
    op(*args, **{**kwargs, "gate_first": not kwargs.get("gate_first", True)})


def _next_experts(op: Op, *args: Any, **kwargs: Any) -> None:
    """Experts are off by one. (Weights that change places would not show: sigmoid routing makes them nearly equal.)"""
    op(*args, **kwargs)
    args[-1].add_(1).remainder_(args[0].shape[-1])


def _shift_logits(op: Op, *args: Any, **kwargs: Any) -> None:
    """Keys are off by one."""
    op(*args, **kwargs)
    logits = args[-1]
    finite = torch.isfinite(logits)
    logits.copy_(torch.where(finite, logits.nan_to_num(0.0, 0.0, 0.0).roll(1, -1), logits))


def _lose_half(op: Op, *args: Any, **kwargs: Any) -> None:
    """The second half of every selection is lost."""
    op(*args, **kwargs)
    indices = args[-1]
    indices[:, indices.shape[1] // 2 :] = -1


def _half_scale(op: Op, *args: Any, **kwargs: Any) -> None:
    """Attention scores are halved."""
    op(*args[:5], args[5] / 2, *args[6:], **kwargs)


def _swap_gates(op: Op, *args: Any, **kwargs: Any) -> None:
    """The decay's and the update's gates are mixed up."""
    op(args[0], args[2], args[1], *args[3:], **kwargs)


def _shift_keys(op: Op, *args: Any, **kwargs: Any) -> None:
    """Keys are read one element off."""
    op(args[0], args[1].roll(1, -1), *args[2:], **kwargs)


CORRUPTIONS: dict[str, dict[str, Callable[..., None]]] = {
    "moe": {"moe_fp8_block_scale": _swap_gate_and_up},
    "moe_routing": {"moe_grouped_topk": _next_experts, "moe_softmax_topk": _next_experts},
    "dsa_indexer": {"dsa_indexer_logits_paged": _shift_logits, "dsa_indexer_logits_ragged": _shift_logits},
    "dsa_topk": {"dsa_topk": _lose_half},
    "dsa_sparse_mla": {"dsa_sparse_mla": _half_scale},
    "gdn_decode": {"gdn_decode": _swap_gates},
    "gdn_prefill": {"gdn_prefill": _shift_keys},
}


@contextmanager
def corrupted(op: str) -> Iterator[dict[str, int]]:
    """Make one hook's operators wrong; yields how often each was called."""
    namespace = torch.ops.blackwell_kernels
    calls: dict[str, int] = {}
    kept: dict[str, Any] = {}

    def wrap(name: str, fault: Callable[..., None]) -> Callable[..., None]:
        def wrong(*args: Any, **kwargs: Any) -> None:
            calls[name] += 1
            fault(kept[name], *args, **kwargs)

        return wrong

    for name, fault in CORRUPTIONS[op].items():
        kept[name], calls[name] = getattr(namespace, name), 0
        setattr(namespace, name, wrap(name, fault))
    try:
        yield calls
    finally:
        for name, original in kept.items():
            setattr(namespace, name, original)
