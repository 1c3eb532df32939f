"""What the hooks share about the step that vLLM is running: metadata of a layer, kind of batch, names of layers.

Why: operators are counted per layer and kind of batch, but experts, routers and the indexer's kernels are called
without either.
How: the kind of batch is read off vLLM's forward context; names are noted where vLLM still knows them.
Upstream: none.
Remove when: no hook is left.
"""

from __future__ import annotations

from typing import Any

from blackwell_kernels import status

_names: dict[int, str] = {}


def name(thing: object, layer: str) -> None:
    """Remember that `thing`, which lives as long as the model, belongs to `layer`."""
    _names[id(thing)] = layer


def name_of(thing: object) -> str:
    """The layer that `thing` belongs to; a stable placeholder for a thing that was never named."""
    return _names.get(id(thing), f"{type(thing).__name__}@{id(thing):x}")


def step_metadata() -> dict[str, Any] | None:
    """Attention metadata of the running step by layer, or None in a profile or warm-up run."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # one dictionary per micro-batch
        metadata = metadata[0] if metadata else None
    return metadata if isinstance(metadata, dict) else None


def batch_phase(metadata: dict[str, Any]) -> str:
    """prefill, decode, mixed or spec: what the running batch holds."""
    longest = 1
    for layer in metadata.values():
        prefills, decodes = getattr(layer, "num_prefills", None), getattr(layer, "num_decodes", None)
        if prefills is not None and decodes is not None:
            if getattr(layer, "num_spec_decodes", 0):
                return "spec"
            return "mixed" if prefills and decodes else "prefill" if prefills else "decode"
        longest = max(longest, getattr(layer, "max_query_len", None) or 1)
    return "decode" if longest == 1 else "prefill"


def count(op: str, layer: str, impl: str, tokens: int) -> None:
    """Count `tokens` handled in a real step. Profile runs, and code that torch.compile is tracing, count nothing."""
    import torch

    if torch.compiler.is_compiling():
        return
    metadata = step_metadata()
    if metadata is not None:
        status.count(op, layer, impl, tokens, batch_phase(metadata))
