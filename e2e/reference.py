"""What transformers says: log-probabilities of given tokens under a checkpoint, in float32 on the CPU.

transformers' FP8 path needs a GPU, so FP8 weights are dequantised first. Served models also quantise inputs, by groups
of 128: those of the experts and the indexer's queries and keys always, with power-of-two scales; on a GPU those of all
FP8 linears as well, with the float32 scales of vLLM's cutlass kernels, which the demo asks for. `inputs` repeats that,
which leaves order of summation and bf16. That is little, but for it e4m3 rounds a value near a boundary the other way,
and a few layers on both sides' roundings have little in common: `dtype` bf16 tells how far that carries.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from blackwell_kernels.e2e.checkpoints import load_weights
from blackwell_kernels.e2e.weights import E4M3_MAX, dequantise_blocks

INDEX_DIM = 128  # of one index query or key


class Reference:
    """A checkpoint loaded into transformers' own model, eager attention; weights and activations in `dtype`."""

    def __init__(
        self, folder: Path, *, inputs: Literal["none", "experts", "all"] = "experts", dtype: torch.dtype = torch.float32
    ) -> None:
        import transformers

        # its progress bars, and its advice about GPU kernels, are not for someone who waits for a comparison
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights below are already dequantised
        raw = dict(load_weights(folder))
        state: dict[str, torch.Tensor] = {}
        fp8: set[str] = set()
        for name, tensor in raw.items():
            if name.endswith("weight_scale_inv"):
                continue
            scale = raw.get(name.removesuffix("weight") + "weight_scale_inv")
            if scale is not None:
                fp8.add(name.removesuffix(".weight"))
            state[name] = tensor.float() if scale is None else dequantise_blocks(tensor, scale)
        # from_pretrained rather than load_state_dict: it fuses the experts the way this transformers version wants
        with _without("fla", "causal_conv1d"):
            model_class = getattr(transformers, config.architectures[0])
        self.model = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.vocab = int(config.vocab_size)
        if inputs != "none":
            self._quantise_inputs(fp8, linears=inputs == "all")

    def _quantise_inputs(self, fp8: set[str], *, linears: bool) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name in fp8 and linears:
                module.register_forward_pre_hook(_quantise_exactly)
            elif name.endswith("mlp.experts") and f"{name}.0.down_proj" in fp8:
                module.forward = _Experts(module)
            elif name.endswith(".indexer"):
                module.forward = _IndexScores()(module.forward)

    @torch.no_grad()
    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        """log p of tokens[1:] given what precedes each, natural logarithm: float32 [len(tokens) - 1]."""
        ids = torch.tensor([list(tokens)])
        logits = self.model(ids, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()


class _Experts:
    """Replaces the forward of transformers' fused experts: the same sum with FP8 inputs to both projections."""

    def __init__(self, module: Any) -> None:
        self.w13, self.w2, self.act = module.gate_up_proj, module.down_proj, module.act_fn

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        x = quantise_groups(hidden_states)
        out = torch.zeros_like(x)
        for e in top_k_index.unique().tolist():
            if e >= self.w13.shape[0]:
                continue
            token, slot = torch.where(top_k_index == e)
            gate, up = (x[token] @ self.w13[e].T).chunk(2, -1)
            y = quantise_groups(self.act(gate) * up) @ self.w2[e].T
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        return out


class _IndexScores(TorchFunctionMode):
    """Decorates the forward of transformers' indexer: queries and keys are rounded where they are multiplied."""

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def rounded(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return rounded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul and args[0].shape[-1] == INDEX_DIM:  # the other product there sums over heads
            args = quantise_groups(args[0]), quantise_groups(args[1].mT).mT
        return func(*args, **(kwargs or {}))


def _quantise_exactly(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return quantise_groups(args[0], powers_of_two=False), *args[1:]


def quantise_groups(x: torch.Tensor, *, powers_of_two: bool = True) -> torch.Tensor:
    """Round each group of 128 to e4m3 with its own scale and back: same shape and dtype."""
    groups = nn.functional.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / E4M3_MAX
    if powers_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    rounded = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def differences(reference: Sequence[float] | np.ndarray, served: Sequence[float] | np.ndarray) -> dict[str, float]:
    """mean, p99 and max of |Δ log p| over two sequences of equal length."""
    delta = np.abs(np.asarray(reference, dtype=np.float64) - np.asarray(served, dtype=np.float64))
    if delta.size == 0 or not np.isfinite(delta).all():
        return {"n": int(delta.size), "mean": float("inf"), "p99": float("inf"), "max": float("inf")}
    return {
        "n": int(delta.size),
        "mean": float(delta.mean()),
        "p99": float(np.percentile(delta, 99)),
        "max": float(delta.max()),
    }


@contextlib.contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Make packages look missing: transformers' models take kernels from them for good when their modules are
    imported, and those kernels refuse tensors on the CPU."""
    before = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(before)
