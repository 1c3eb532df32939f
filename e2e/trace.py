"""Which kernels ran, by the profiler: in eager steps each is traced to the operator that launched it, and under CUDA
graphs, where no operator runs, the same kernels are recognised by their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from blackwell_kernels.e2e.engine import Engine
from blackwell_kernels.e2e.plan import Request

PREFIX = "blackwell_kernels::"
PHASES = ("prefill", "decode", "mixed")
# the operators of each hook; a hook's kernels are those of any of them
OPERATORS = {
    "moe": ("moe_fp8_block_scale",),
    "moe_routing": ("moe_grouped_topk", "moe_softmax_topk"),
    "dsa_indexer": ("dsa_indexer_logits_paged", "dsa_indexer_logits_ragged"),
    "dsa_topk": ("dsa_topk",),
    "dsa_sparse_mla": ("dsa_sparse_mla",),
    "gdn_decode": ("gdn_decode",),
    "gdn_prefill": ("gdn_prefill", "gdn_prepare"),
}


def phase_requests(vocab: int, scale: float = 1.0) -> tuple[list[Request], list[Request]]:
    """(three that one step prefills together, two that arrive while these decode)."""
    import random

    rng = random.Random("phases")

    def make(name: str, n: int) -> Request:
        tokens = tuple(rng.randrange(3, vocab) for _ in range(max(4, round(n * scale)) + 16))
        return Request(name, tokens[16:], tokens[:16], scored=False)

    first = [make("first-0", 600), make("first-1", 200), make("first-2", 2300)]
    return first, [make("later-0", 500), make("later-1", 40)]


def run_phases(engine: Engine, vocab: int, scale: float, around: Any) -> None:
    """One prefill step, four decode steps and one mixed step, each inside `around(phase)`; then drain."""
    first, later = phase_requests(vocab, scale)
    greedy = 0 if engine.force else 16
    for request in first:
        engine.add(request, greedy_tokens=greedy)
    with around("prefill"):
        engine.engine.step()
    with around("decode"):
        for _ in range(4):
            engine.engine.step()
    for request in later:
        engine.add(request, greedy_tokens=greedy)
    with around("mixed"):
        engine.engine.step()
    while engine.engine.has_unfinished_requests():
        engine.engine.step()


def profile_phases(engine: Engine, vocab: int, scale: float) -> dict[str, Any]:
    """{phase: {operators: {name: calls}, kernels: {name: calls}, of_operator: {name: [kernels]}}}."""
    found: dict[str, Any] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    @contextmanager
    def around(phase: str) -> Iterator[None]:
        with torch.profiler.profile(activities=activities) as profiler:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        found[phase] = digest(profiler.events())

    run_phases(engine, vocab, scale, around)
    return found


def digest(events: Any) -> dict[str, Any]:
    """Operators of ours, all kernels, and which kernels each operator launched, from a profiler's events."""
    operators: dict[str, int] = {}
    kernels: dict[str, int] = {}
    of_operator: dict[str, set[str]] = {}
    for event in events or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] = kernels.get(event.name, 0) + 1
        elif event.name.startswith(PREFIX):
            name = event.name.removeprefix(PREFIX)
            operators[name] = operators.get(name, 0) + 1
            of_operator.setdefault(name, set()).update(_launched(event))
    return {
        "operators": operators,
        "kernels": kernels,
        "of_operator": {name: sorted(names) for name, names in of_operator.items()},
    }


def _launched(event: Any) -> set[str]:
    names = {kernel.name for kernel in event.kernels}
    for child in event.cpu_children:
        names |= _launched(child)
    return names


def kernels_by_hook(eager: dict[str, Any]) -> dict[str, set[str]]:
    """The kernels that belong to each hook alone, from an eager trace; shared helpers (fills, copies) prove nothing."""
    found: dict[str, set[str]] = {}
    for hook, operators in OPERATORS.items():
        names = {kernel for phase in eager.values() for op in operators for kernel in phase["of_operator"].get(op, ())}
        if names:
            found[hook] = names
    own: dict[str, set[str]] = {}
    for hook, names in found.items():
        others = set().union(*(n for h, n in found.items() if h != hook))
        own[hook] = {n for n in names - others if not n.startswith(("void at::", "Memset", "Memcpy"))}
    return own
