"""Seeded random weights that behave: every linear keeps the RMS of its input, attention and routing have spread.

One list of tensors per model, in the names and shapes of the published checkpoints, and one generator that writes each
tensor straight on a device. Tensors depend only on (seed, name, device type), so a file written shard by shard, a
loader that streams into vLLM and a second process all see the same model.

Choices that matter to a comparison of two implementations:
- 128×128 blocks differ in magnitude (log-normal), so a scale read from the wrong block shows;
- attention scores have a standard deviation of about 2, so dropping or adding keys shows;
- router logits have a standard deviation of 3, so experts differ in use, and in weight;
- Gated Delta Net decays reach from one token to hundreds, so a wrong state shows late;
- scales are positive, and powers of two where the config says `scale_fmt: ue8m0`.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

BLOCK = 128
E4M3_MAX = 448.0
SUCCESSOR_LOGIT = 18.0  # times the share of the embedding in the last hidden state, about a third: some drafts fail
BLOCK_SIGMA = 0.5  # log-normal spread of the 128×128 blocks' magnitudes
WINDOW = 1 << 26  # values of tensors that are quantised together: a GPU's time is otherwise spent on 74,000 launches


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: `normal` has mean `a` and standard deviation `b`; `uniform` lies in [a, b]."""

    name: str
    shape: tuple[int, ...]
    a: float
    b: float
    draw: Literal["normal", "uniform"] = "normal"
    fp8: bool = False
    dtype: torch.dtype = torch.bfloat16


def tensor_specs(config: dict[str, Any], *, mtp: bool = False) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint described by a config.json (`models.hf_config`), in file order.

    `mtp` adds Qwen3-Next's multi-token-prediction layer, for speculative decoding.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    qwen = config["model_type"] == "qwen3_next"
    yield TensorSpec("model.embed_tokens.weight", (vocab, hidden), 0.0, 1.0)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        if qwen:
            yield from _qwen_layer(config, prefix, config["layer_types"][i])
        else:
            yield from _deepseek_layer(config, prefix, i)
    yield _norm("model.norm.weight", hidden, centred=qwen)
    yield TensorSpec("lm_head.weight", (vocab, hidden), 0.0, hidden**-0.5)
    if mtp:
        yield TensorSpec("mtp.fc.weight", (hidden, 2 * hidden), 0.0, (2 * hidden) ** -0.5)
        yield from _qwen_layer(config, "mtp.layers.0", "full_attention")
        for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
            yield _norm(f"mtp.{name}.weight", hidden, centred=True)


def _norm(name: str, size: int, *, centred: bool, mean: float | None = None) -> TensorSpec:
    # Qwen3-Next's norms multiply by 1 + weight
    return TensorSpec(name, (size,), (0.0 if centred else 1.0) if mean is None else mean, 0.1)


def _linear(name: str, n: int, k: int, gain: float = 1.0, *, fp8: bool = True) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (n, k), 0.0, gain * k**-0.5, fp8=fp8)


def _mlp(prefix: str, hidden: int, inner: int, down_gain: float = 1.0) -> Iterator[TensorSpec]:
    yield _linear(f"{prefix}.gate_proj", inner, hidden)
    yield _linear(f"{prefix}.up_proj", inner, hidden)
    yield _linear(f"{prefix}.down_proj", hidden, inner, down_gain)


def _qwen_layer(c: dict[str, Any], prefix: str, kind: str) -> Iterator[TensorSpec]:
    hidden = c["hidden_size"]
    yield _norm(f"{prefix}.input_layernorm.weight", hidden, centred=True)
    yield _norm(f"{prefix}.post_attention_layernorm.weight", hidden, centred=True)
    if kind == "linear_attention":
        p = f"{prefix}.linear_attn"
        heads = c["linear_num_value_heads"]
        key = c["linear_num_key_heads"] * c["linear_key_head_dim"]
        value = heads * c["linear_value_head_dim"]
        yield _linear(f"{p}.in_proj_qkvz", 2 * key + 2 * value, hidden)
        yield _linear(f"{p}.in_proj_ba", 2 * heads, hidden, fp8=False)
        yield TensorSpec(f"{p}.conv1d.weight", (2 * key + value, 1, c["linear_conv_kernel_dim"]), 0.0, 0.5)
        yield TensorSpec(f"{p}.A_log", (heads,), -4.0, 1.0, "uniform")
        yield TensorSpec(f"{p}.dt_bias", (heads,), -2.0, 1.0, "uniform")
        yield _norm(f"{p}.norm.weight", c["linear_value_head_dim"], centred=False)
        yield _linear(f"{p}.out_proj", hidden, value)
    else:
        p = f"{prefix}.self_attn"
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        yield _linear(f"{p}.q_proj", 2 * q, hidden)  # query and output gate
        yield _linear(f"{p}.k_proj", kv, hidden)
        yield _linear(f"{p}.v_proj", kv, hidden)
        yield _linear(f"{p}.o_proj", hidden, q)
        yield _norm(f"{p}.q_norm.weight", c["head_dim"], centred=True, mean=0.5)
        yield _norm(f"{p}.k_norm.weight", c["head_dim"], centred=True, mean=0.5)
    yield _linear(f"{prefix}.mlp.gate", c["num_experts"], hidden, 3.0, fp8=False)
    yield _linear(f"{prefix}.mlp.shared_expert_gate", 1, hidden, fp8=False)
    yield from _mlp(f"{prefix}.mlp.shared_expert", hidden, c["shared_expert_intermediate_size"])
    for e in range(c["num_experts"]):
        yield from _mlp(f"{prefix}.mlp.experts.{e}", hidden, c["moe_intermediate_size"], 2.0)


def _deepseek_layer(c: dict[str, Any], prefix: str, index: int) -> Iterator[TensorSpec]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    yield _norm(f"{prefix}.input_layernorm.weight", hidden, centred=False)
    yield _norm(f"{prefix}.post_attention_layernorm.weight", hidden, centred=False)
    p, q_rank, kv_rank = f"{prefix}.self_attn", c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield _linear(f"{p}.q_a_proj", q_rank, hidden)
    yield _norm(f"{p}.q_a_layernorm.weight", q_rank, centred=False)
    # yarn already multiplies the scores by mscale² = 1.87 where the config scales RoPE
    yield _linear(f"{p}.q_b_proj", heads * (nope + rope), q_rank, 1.2 if c["rope_scaling"] else 2.0)
    yield _linear(f"{p}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield _norm(f"{p}.kv_a_layernorm.weight", kv_rank, centred=False)
    yield _linear(f"{p}.kv_b_proj", heads * (nope + v), kv_rank)
    yield _linear(f"{p}.o_proj", hidden, heads * v)
    index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
    yield _linear(f"{p}.indexer.wq_b", index_heads * index_dim, q_rank)
    yield _linear(f"{p}.indexer.wk", index_dim, hidden)
    yield _norm(f"{p}.indexer.k_norm.weight", index_dim, centred=False)
    yield TensorSpec(f"{p}.indexer.k_norm.bias", (index_dim,), 0.0, 0.1)
    yield _linear(f"{p}.indexer.weights_proj", index_heads, hidden, fp8=False)
    if index < c["first_k_dense_replace"]:
        yield from _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
        return
    experts = c["n_routed_experts"]
    yield _linear(f"{prefix}.mlp.gate", experts, hidden, 3.0, fp8=False)
    yield TensorSpec(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), 0.0, 0.05, dtype=torch.float32)
    yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, c["moe_intermediate_size"] * c["n_shared_experts"])
    for e in range(experts):
        yield from _mlp(f"{prefix}.mlp.experts.{e}", hidden, c["moe_intermediate_size"])


def generate(
    config: dict[str, Any],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    mtp: bool = False,
    only: tuple[str, ...] = ("",),
    predictable: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a checkpoint on `device`; FP8 weights are followed by their `weight_scale_inv`.

    `only` keeps the names with one of these prefixes. `predictable` makes token t + 1 the likely successor of token t,
    for the model and its MTP layer alike, so that drafts of speculative decoding are accepted more often than by luck.
    """
    quantised = "quantization_config" in config
    ue8m0 = quantised and config["quantization_config"].get("scale_fmt") == "ue8m0"
    device = torch.device(device)
    specs = {spec.name: spec for spec in tensor_specs(config, mtp=mtp)}
    for window in _windows(spec for spec in specs.values() if spec.name.startswith(only)):
        alike: dict[tuple[int, ...], list[TensorSpec]] = defaultdict(list)
        for spec in window:
            if spec.fp8 and quantised:
                alike[spec.shape].append(spec)
        made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in alike.values():
            weights, scales = quantise_blocks(_draw_alike(group, seed, device), ue8m0=ue8m0)
            made |= {spec.name: pair for spec, pair in zip(group, zip(weights, scales, strict=True), strict=True)}
        for spec in window:
            if spec.name in made:
                weight, scale = made.pop(spec.name)
                yield spec.name, weight
                yield spec.name.removesuffix("weight") + "weight_scale_inv", scale
                continue
            value = _draw(spec, seed, device)
            if predictable and spec.name == "lm_head.weight":
                embedding = _draw(specs["model.embed_tokens.weight"], seed, device)
                value.add_(embedding.roll(1, 0), alpha=SUCCESSOR_LOGIT / config["hidden_size"])
            if predictable and spec.name == "mtp.fc.weight":
                value.mul_(0.3).diagonal().add_(1.0)  # the token's embedding passes through
            yield spec.name, value.to(spec.dtype)


def _windows(specs: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors, in windows of at most WINDOW values (or of one tensor)."""
    window: list[TensorSpec] = []
    held = 0
    for spec in specs:
        size = math.prod(spec.shape)
        if window and held + size > WINDOW:
            yield window
            window, held = [], 0
        window.append(spec)
        held += size
    if window:
        yield window


def _draw(spec: TensorSpec, seed: int, device: torch.device) -> torch.Tensor:
    return _draw_alike([spec], seed, device)[0]


def _draw_alike(specs: list[TensorSpec], seed: int, device: torch.device) -> torch.Tensor:
    """Tensors of one shape, stacked; each depends on its own name alone."""
    shape = specs[0].shape
    # vLLM loads models with another default dtype
    values = torch.empty((len(specs), *shape), device=device, dtype=torch.float32)
    blocks = [-(-s // BLOCK) for s in shape] if specs[0].fp8 else [0]
    spread = torch.empty((len(specs), *blocks), device=device, dtype=torch.float32)
    for spec, value, z in zip(specs, values, spread, strict=True):
        # 32 bits: torch's CPU generator ignores the rest of a seed
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{spec.name}".encode()))
        if spec.draw == "uniform":
            value.uniform_(spec.a, spec.b, generator=generator)
        else:
            value.normal_(0.0, spec.b, generator=generator)
        if spec.fp8:
            z.normal_(0.0, BLOCK_SIGMA, generator=generator)
        if spec.a and spec.draw == "normal":
            value.add_(spec.a)
    if specs[0].fp8:
        factor = torch.exp(spread - BLOCK_SIGMA**2)  # mean square 1
        rows, cols = shape
        values *= factor.repeat_interleave(BLOCK, 1)[:, :rows].repeat_interleave(BLOCK, 2)[:, :, :cols]
    return values


def quantise_blocks(weight: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [..., N, K] to e4m3 with one float32 scale per 128×128 block.

    Returns (weight [..., N, K], scale [..., ⌈N/128⌉, ⌈K/128⌉]).
    """
    *batch, n, k = weight.shape
    rows, cols = -(-n // BLOCK), -(-k // BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, cols * BLOCK - k, 0, rows * BLOCK - n))
    blocks = padded.view(*batch, rows, BLOCK, cols, BLOCK)
    scale = blocks.abs().amax((-3, -1)).clamp_(min=1e-12) / E4M3_MAX
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    q = (blocks / scale[..., :, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q.view(*batch, rows * BLOCK, cols * BLOCK)[..., :n, :k].contiguous(), scale


def dequantise_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 [N, K] that `quantise_blocks` stored."""
    n, k = weight.shape
    return weight.float() * scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
