"""Seeded inputs with sane values for every definition, made on the device that will use them.

Values are what the models produce: unit-length q and k (a delta rule explodes otherwise), positive scales, distinct
experts per token, block tables of distinct shuffled pages. What no implementation may read, pages that belong to
nobody and slots that no sequence has, holds NaN. The same seed gives the same tensors on the same kind of device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch

from blackwell_kernels.dsa.reference import indexer_k_insert
from blackwell_kernels.microbench.cases import PAGE, Case

Inputs = dict[str, Any]
FP8 = torch.float8_e4m3fn
EVEN = "even"
KINDS = (EVEN, "zipf", "one", "empty")  # of routing


class Maker:
    """Random tensors of one workload: a generator and a device."""

    def __init__(self, seed: int, device: torch.device, run_seed: int = 0, reuse: Inputs | None = None) -> None:
        self.device, self.run_seed, self.reuse = device, run_seed, reuse or {}
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """float32 in [low, high)."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Normal values."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * std).to(dtype)

    def unit(self, *shape: int) -> torch.Tensor:
        """float32 rows of length 1."""
        return torch.nn.functional.normalize(self.normal(*shape, dtype=torch.float32), dim=-1)

    def permutation(self, n: int) -> torch.Tensor:
        """int64 permutation of 0..n-1."""
        return torch.randperm(n, generator=self.generator, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Zeros on the device."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def fp8_weight(self, name: str, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 [E, rows, columns] and block scales; values of standard deviation columns^-0.5. Those of `reuse`, if
        there is one; they depend on name, shape and the run's seed only, so that cases of one layer can share them."""
        if name in self.reuse:
            return self.reuse[name], self.reuse[f"{name}_scale"]
        text = f"{name} {experts}x{rows}x{columns}"
        return Maker(_seed(text, self.run_seed), self.device)._fp8_weight(experts, rows, columns)

    def _fp8_weight(self, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.empty(experts, rows, columns, dtype=FP8, device=self.device)
        for expert in range(experts):  # the float32 copy of all of them would not fit
            weight[expert] = self.normal(rows, columns, std=64.0, dtype=torch.float32).clamp_(-448, 448).to(FP8)
        scale = self.uniform(experts, -(-rows // 128), -(-columns // 128), low=0.5, high=1.5)
        return weight, scale / (64.0 * math.sqrt(columns))

    def fp8_rows(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 [..., 128] of unit rows and their power-of-two scales [...]."""
        x = self.unit(*shape)
        scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1).clamp(min=1e-4) / 448.0)))
        return (x / scale[..., None]).to(FP8), scale

    def block_table(self, requests: int, pages_each: int, num_pages: int) -> torch.Tensor:
        """int32 [requests, pages_each]: distinct shuffled pages, page 0 is nobody's; too few are shared."""
        pages = 1 + self.permutation(num_pages - 1)
        need = requests * pages_each
        repeats = -(-need // max(1, len(pages)))
        return pages.repeat(repeats)[:need].view(requests, pages_each).to(torch.int32)


def indexer_cache(m: Maker, num_pages: int, table: torch.Tensor) -> torch.Tensor:
    """int8 [num_pages, 64, 132], planar; pages outside `table` are all NaN."""
    cache = torch.full((num_pages, PAGE * 132), 0x7F, dtype=torch.int8, device=m.device)  # 0x7f is e4m3's NaN
    cache[:, PAGE * 128 :] = torch.full((1, PAGE), torch.nan, device=m.device).view(torch.int8)
    used = table.unique().long()
    values, scale = m.fp8_rows(len(used), PAGE, 128)
    cache[used, : PAGE * 128] = values.view(torch.int8).flatten(1)
    cache[used, PAGE * 128 :] = scale.contiguous().view(torch.int8)
    return cache.view(num_pages, PAGE, 132)


def latent_cache(m: Maker, num_pages: int, table: torch.Tensor, fp8: bool) -> torch.Tensor:
    """bfloat16 [num_pages, 64, 576], or int8 [num_pages, 64, 656] with e4m3 values and scales; the rest NaN."""
    used = table.unique().long()
    values = m.normal(len(used), PAGE, 576)
    if not fp8:
        cache = torch.full((num_pages, PAGE, 576), torch.nan, dtype=torch.bfloat16, device=m.device)
        cache[used] = values
        return cache
    groups = values[..., :512].float().unflatten(-1, (4, 128))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1) / 448.0)))
    latent = (groups / scale[..., None]).to(FP8).flatten(-2)
    packed = [latent.view(torch.int8), scale.contiguous().view(torch.int8)]
    packed.append(values[..., 512:].contiguous().view(torch.int8))
    cache8 = torch.full((num_pages, PAGE, 656), 0x7F, dtype=torch.int8, device=m.device)
    cache8[used] = torch.cat(packed, -1)
    return cache8


def _contexts(m: Maker, batch: int, context: int, at_least: int = 1) -> torch.Tensor:
    """int32 [batch] lengths: the first sequence has `context`, the others the last tenth below it."""
    lens = context - (m.uniform(batch) * (context // 10)).to(torch.int32)
    lens[0] = context
    return lens.clamp(min=at_least).to(torch.int32)


def _choices(m: Maker, rows: int, valid: torch.Tensor, top_k: int) -> torch.Tensor:
    """int32 [rows, top_k]: distinct positions below valid[row] in random order, -1 where there are fewer."""
    chosen = torch.full((rows, top_k), -1, dtype=torch.int32, device=m.device)
    for row, limit in enumerate(valid.tolist()):
        count = min(limit, top_k)
        chosen[row, :count] = m.permutation(limit)[:count].to(torch.int32)
    return chosen


def _offsets(m: Maker, case: Case) -> torch.Tensor:
    """int32 [num_seqs + 1]; lengths as the case says, else random ones of at least one token."""
    given = case.options.get("lengths")
    if given is None:
        total, count = case.axes["total_seq_len"], case.axes["num_seqs"]
        cuts = 1 + m.permutation(total - 1)[: count - 1].sort().values
        bounds = torch.cat([m.zeros(1, dtype=torch.int64), cuts, torch.tensor([total], device=m.device)])
        return bounds.to(torch.int32)
    return torch.tensor([0, *given], device=m.device).cumsum(0).to(torch.int32)


def _experts(m: Maker, tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = m.uniform(tokens, experts).topk(top_k, dim=-1).indices.to(torch.int32)
    weights = m.uniform(tokens, top_k, low=0.1)
    return weights / weights.sum(-1, keepdim=True), ids


def _moe(m: Maker, case: Case) -> Inputs:
    x = case.axes
    tokens, hidden, inter, experts = (x[k] for k in ("num_tokens", "hidden_size", "intermediate_size", "num_experts"))
    w13, w13_scale = m.fp8_weight("w13", experts, 2 * inter, hidden)
    w2, w2_scale = m.fp8_weight("w2", experts, hidden, inter)
    everywhere = x.get("num_global_experts", experts)
    weights, ids = _experts(m, tokens, everywhere, x["top_k"])
    inputs = {
        "hidden_states": m.normal(tokens, hidden),
        "w13": w13,
        "w13_scale": w13_scale,
        "w2": w2,
        "w2_scale": w2_scale,
        "topk_weights": weights,
        "topk_ids": ids,
    }
    if "num_global_experts" in x:  # this rank holds the second block of experts
        expert_map = torch.full((everywhere,), -1, dtype=torch.int32, device=m.device)
        expert_map[experts : 2 * experts] = torch.arange(experts, dtype=torch.int32, device=m.device)
        inputs["expert_map"] = expert_map
    return routed(inputs, case.options["routing"], m.generator.initial_seed())


def routed(x: Inputs, kind: str, seed: int) -> Inputs:
    """`x` with a token's experts, always distinct ones, chosen in one of the `KINDS`: `even`, as they are; `zipf`, the
    r-th most popular expert ∝ 1/r; `one`, the same for all tokens, of which one is here under expert parallelism;
    `empty`, three of four experts get nothing."""
    if kind == EVEN:
        return x
    ids, mapping = x["topk_ids"], x.get("expert_map")
    experts = x["w2"].shape[0] if mapping is None else mapping.numel()
    rng = torch.Generator(ids.device).manual_seed(seed)
    order = torch.randperm(experts, generator=rng, device=ids.device)
    if kind == "one" and mapping is not None:
        here = mapping[order] >= 0
        order = torch.cat([order[here][:1], order[~here], order[here][1:]])
    rank = torch.arange(experts, device=ids.device, dtype=torch.float32)
    log_popularity = torch.empty_like(rank)
    if kind == "zipf":
        log_popularity[order] = -torch.log1p(rank)
    elif kind == "one":
        log_popularity[order] = -1e3 * rank  # no noise reaches the next rank
    else:
        log_popularity[order] = torch.where(rank < experts // 4, 0.0, float("-inf"))
    # the K largest of log p plus Gumbel noise are K draws without replacement
    noise = -torch.empty(len(ids), experts, device=ids.device).exponential_(generator=rng).log()
    chosen = (log_popularity + noise).topk(ids.shape[1], dim=-1).indices
    return {**x, "topk_ids": chosen.to(torch.int32)}


def _moe_contest(m: Maker, case: Case) -> Inputs:
    x = case.full_axes()
    tokens, hidden, inter, local = (x[k] for k in ("seq_len", "hidden_size", "intermediate_size", "num_local_experts"))
    groups = m.normal(tokens, hidden, dtype=torch.float32).unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1) / 448.0
    w1, w1_scale = m.fp8_weight("gemm1_weights", local, 2 * inter, hidden)
    w2, w2_scale = m.fp8_weight("gemm2_weights", local, hidden, inter)
    return {
        "routing_logits": m.normal(tokens, x["num_experts"], dtype=torch.float32),
        "routing_bias": m.normal(x["num_experts"], std=0.1),
        "hidden_states": (groups / scale[..., None]).to(FP8).flatten(-2),
        "hidden_states_scale": scale.t().contiguous(),
        "gemm1_weights": w1,
        "gemm1_weights_scale": w1_scale,
        "gemm2_weights": w2,
        "gemm2_weights_scale": w2_scale,
        "local_expert_offset": local,
        "routed_scaling_factor": 2.5,
    }


def _routing(m: Maker, case: Case) -> Inputs:
    tokens, experts = case.axes["num_tokens"], case.axes["num_experts"]
    if "softmax" in case.definition:
        return {"router_logits": m.normal(tokens, experts), "renormalize": True}
    return {
        "router_logits": m.normal(tokens, experts, dtype=torch.float32),
        "bias": m.normal(experts, std=0.1, dtype=torch.float32),
        "n_group": case.options["n_group"],
        "topk_group": case.options["topk_group"],
        "renormalize": True,
        "routed_scaling_factor": 2.5,
    }


def _paged(m: Maker, case: Case) -> Inputs:
    x = case.full_axes()
    batch, next_n, heads = x["batch_size"], x["next_n"], x["num_index_heads"]
    table = m.block_table(batch, x["max_num_pages"], x["num_pages"])
    return {
        "q": m.fp8_rows(batch, next_n, heads, 128)[0],
        "k_cache": indexer_cache(m, x["num_pages"], table),
        "weights": m.normal(batch * next_n, heads, dtype=torch.float32),
        "context_lens": _contexts(m, batch, case.options["context"], next_n),
        "block_table": table,
    }


def _contest_topk(m: Maker, case: Case) -> Inputs:
    x = case.full_axes()
    batch, heads = x["batch_size"], x["num_index_heads"]
    table = m.block_table(batch, x["max_num_pages"], x["num_pages"])
    return {
        "q_index_fp8": m.fp8_rows(batch, heads, 128)[0],
        "k_index_cache_fp8": indexer_cache(m, x["num_pages"], table).unsqueeze(2),
        "weights": m.normal(batch, heads, dtype=torch.float32),
        "seq_lens": _contexts(m, batch, case.options["context"]),
        "block_table": table,
    }


def _ragged(m: Maker, case: Case) -> Inputs:
    rows, heads, keys = (case.axes[k] for k in ("num_rows", "num_index_heads", "num_keys"))
    k, k_scale = m.fp8_rows(keys, 128)
    return {
        "q": m.fp8_rows(rows, heads, 128)[0],
        "k": k,
        "k_scale": k_scale,
        "weights": m.normal(rows, heads, dtype=torch.float32),
        "row_starts": m.zeros(rows),
        "row_ends": torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device=m.device),
    }


def _topk(m: Maker, case: Case) -> Inputs:
    rows, columns = case.axes["num_rows"], case.axes["num_columns"]
    context, requests = case.options["context"], case.options["requests"]
    starts = m.zeros(rows)
    if case.options["causal"]:
        each = rows // requests
        within = torch.arange(rows, dtype=torch.int32, device=m.device)
        starts = within // each * context
        ends = starts + context - each + within % each + 1
    else:
        ends = _contexts(m, rows, context)
    logits = m.normal(rows, columns, dtype=torch.float32)
    # what lies beyond a row's ends is whatever the buffer held before
    position = torch.arange(columns, device=m.device)
    beyond = (position < starts[:, None]) | (position >= ends[:, None])
    return {"logits": logits.masked_fill_(beyond, torch.nan), "row_starts": starts, "row_ends": ends}


def _gather(m: Maker, case: Case) -> Inputs:
    x, context = case.axes, case.options["context"]
    table = m.block_table(x["batch_size"], x["max_num_pages"], x["num_pages"])
    return {
        "k_cache": indexer_cache(m, x["num_pages"], table),
        "block_table": table,
        "cu_seqlens": torch.arange(x["batch_size"] + 1, dtype=torch.int32, device=m.device) * context,
        "k": torch.full((x["num_keys"], 128), torch.nan, device=m.device).to(FP8),
        "k_scale": torch.full((x["num_keys"],), torch.nan, device=m.device),
    }


def _kv_insert(m: Maker, case: Case) -> Inputs:
    tokens, pages = case.axes["num_tokens"], case.axes["num_pages"]
    return {
        "kv_c": m.normal(tokens, 512),
        "k_pe": m.normal(tokens, 64),
        "kv_cache": m.normal(pages, PAGE, 576),
        "slot_mapping": PAGE + m.permutation((pages - 1) * PAGE)[:tokens],
    }


def _sparse_mla(m: Maker, case: Case) -> Inputs:
    x = case.full_axes()
    tokens, requests = x["num_tokens"], x["num_requests"]
    table = m.block_table(requests, x["max_num_pages"], x["num_pages"])
    context = x["max_num_pages"] * PAGE
    # tokens of one request are neighbours; a few early ones see less than top_k keys
    req_id = (torch.arange(tokens, device=m.device) * requests // tokens).to(torch.int32)
    visible = torch.full((tokens,), context, device=m.device)
    visible[0] = min(context, x["top_k"] // 2 + 1)
    return {
        "q": m.normal(tokens, x["num_heads"], 576),
        "kv_cache": latent_cache(m, x["num_pages"], table, case.definition.endswith("fp8")),
        "indices": _choices(m, tokens, visible, x["top_k"]),
        "req_id": req_id,
        "block_table": table,
        "sm_scale": 192.0**-0.5,
    }


def _contest_attention(m: Maker, case: Case) -> Inputs:
    x = case.full_axes()
    tokens, heads, pages = x["num_tokens"], x["num_qo_heads"], x["num_pages"]
    cache = m.normal(pages, PAGE, 576)
    visible = torch.full((tokens,), pages * PAGE, device=m.device)
    visible[0] = min(pages * PAGE, x["topk"] // 2 + 1)
    return {
        "q_nope": m.normal(tokens, heads, 512),
        "q_pe": m.normal(tokens, heads, 64),
        "ckv_cache": cache[..., :512].contiguous(),
        "kpe_cache": cache[..., 512:].contiguous(),
        "sparse_indices": _choices(m, tokens, visible, x["topk"]),
        "sm_scale": 192.0**-0.5,
    }


def _step(m: Maker, case: Case) -> Inputs:
    paged = _paged(m, case)
    table, position = paged["block_table"], paged["context_lens"].long() - 1
    k_index = m.unit(len(table), 128).bfloat16()
    slots = table.gather(1, (position // PAGE)[:, None])[:, 0].long() * PAGE + position % PAGE
    # the key of the step is in the cache already: writing it again, as often as a step is timed, changes nothing
    cache = indexer_k_insert(k_index, paged["k_cache"].view(torch.uint8), slots)
    return {
        "q_index": paged.pop("q"),
        "k_index": k_index,
        "slot_mapping": slots,
        **paged,
        "k_cache": cache.view(torch.int8),
        "q": m.normal(case.axes["batch_size"], case.axes["num_heads"], 576),
        "kv_cache": latent_cache(m, case.axes["num_pages"], table, False),
        "sm_scale": 192.0**-0.5,
    }


def _gate_inputs(m: Maker, *shape: int) -> Inputs:
    """A_log and dt_bias as the model initialises them: decays of e^-0.001 to e^-1.6 a token."""
    v_heads = shape[-1]
    step = torch.exp(m.uniform(v_heads, low=math.log(1e-3), high=math.log(0.1)))
    return {
        "a": m.normal(*shape),
        "b": m.normal(*shape),
        "A_log": m.uniform(v_heads, low=1.0, high=16.0).log(),
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # inverse of softplus
    }


def _pool(m: Maker, slots: int, used: torch.Tensor, v_heads: int, dtype: torch.dtype) -> torch.Tensor:
    state = torch.full((slots, v_heads, 128, 128), torch.nan, dtype=dtype, device=m.device)
    state[used.long()] = m.normal(len(used), v_heads, 128, 128, std=0.1, dtype=dtype)
    return state


def _slots(m: Maker, count: int, num_slots: int) -> torch.Tensor:
    return (1 + m.permutation(num_slots - 1)[:count]).to(torch.int32)


def _state_dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.spec.inputs["state"].startswith("float32") else torch.bfloat16


def _conv(m: Maker, case: Case, used: torch.Tensor) -> Inputs:
    slots, channels = case.axes["num_slots"], case.axes["qkv_size"]
    rows = case.axes.get("conv_rows", 3)
    history = torch.full((slots, rows, channels), torch.nan, dtype=torch.bfloat16, device=m.device)
    history[used.long()] = m.normal(len(used), rows, channels)
    return {"conv_state": history, "conv_weight": m.normal(channels, 4, std=0.5)}


def _decode(m: Maker, case: Case) -> Inputs:
    x = case.axes
    batch, v_heads = x["batch_size"], x["num_v_heads"]
    slots = _slots(m, batch, x["num_slots"])
    gates = _gate_inputs(m, batch, v_heads)
    inputs = {"mixed_qkv": m.normal(batch, x["qkv_size"]), **gates}
    if "core" in case.definition:
        inputs |= _conv(m, case, slots)
    inputs["state"] = _pool(m, x["num_slots"], slots, v_heads, _state_dtype(case))
    return inputs | {"state_indices": slots, "scale": 128**-0.5}


def _drafts(m: Maker, case: Case) -> Inputs:
    x = case.axes
    batch, steps, tokens = x["batch_size"], x["num_steps"], x["num_tokens"]
    table = _slots(m, tokens, x["num_slots"]).view(batch, steps)
    accepted = 1 + m.permutation(tokens)[:batch] % steps
    initial = table.gather(1, accepted[:, None] - 1)[:, 0]
    return {
        "mixed_qkv": m.normal(tokens, x["qkv_size"]),
        **_gate_inputs(m, tokens, x["num_v_heads"]),
        **_conv(m, case, table[:, 0]),
        "state": _pool(m, x["num_slots"], initial, x["num_v_heads"], torch.bfloat16),
        "state_indices": table,
        "cu_seqlens": torch.arange(0, tokens + 1, steps, dtype=torch.int32, device=m.device),
        "num_accepted_tokens": accepted.to(torch.int32),
        "scale": 128**-0.5,
    }


def _prefill(m: Maker, case: Case) -> Inputs:
    x = case.axes
    tokens, v_heads, count = x["total_seq_len"], x["num_v_heads"], x["num_seqs"]
    slots = _slots(m, count, x["num_slots"])
    gates = _gate_inputs(m, tokens, v_heads)
    has_initial = torch.arange(count, device=m.device) % 2 == 0  # sessions append to a context; new ones do not
    tail = {
        "state": _pool(m, x["num_slots"], slots, v_heads, _state_dtype(case)),
        "state_indices": slots,
        "has_initial_state": has_initial,
        "cu_seqlens": _offsets(m, case),
        "scale": 128**-0.5,
    }
    if "core" in case.definition:
        return {"mixed_qkv": m.normal(tokens, x["qkv_size"]), **gates, **_conv(m, case, slots), **tail}
    decay = -gates["A_log"].exp() * torch.nn.functional.softplus(gates["a"].float() + gates["dt_bias"])
    keys = m.normal if "raw" in case.definition else m.unit
    return {
        "q": keys(tokens, x["num_q_heads"], 128).bfloat16(),
        "k": keys(tokens, x["num_q_heads"], 128).bfloat16(),
        "v": m.normal(tokens, v_heads, 128),
        "g": decay,
        "beta": gates["b"].float().sigmoid(),
        **tail,
    }


def _contest_gdn(m: Maker, case: Case) -> Inputs:
    x = case.full_axes()
    lead = (x["batch_size"], 1) if "batch_size" in x else (x["total_seq_len"],)
    count, v_heads = x.get("num_seqs", lead[0]), x["num_v_heads"]
    gates = _gate_inputs(m, *lead, v_heads)
    return {
        "q": m.unit(*lead, x["num_q_heads"], 128).bfloat16(),
        "k": m.unit(*lead, x["num_k_heads"], 128).bfloat16(),
        "v": m.normal(*lead, v_heads, 128),
        "state": m.normal(count, v_heads, 128, 128, std=0.1, dtype=torch.float32),
        **gates,
        **({"cu_seqlens": _offsets(m, case).to(torch.int64)} if "num_seqs" in x else {}),
        "scale": 128**-0.5,
    }


_MAKERS: tuple[tuple[str, Callable[[Maker, Case], Inputs]], ...] = (
    ("moe_fp8_block_scale", _moe_contest),
    ("moe_fp8_block", _moe),
    ("moe_routing", _routing),
    ("dsa_topk_indexer", _contest_topk),
    ("dsa_sparse_attention", _contest_attention),
    ("dsa_indexer_logits_paged", _paged),
    ("dsa_indexer_logits_ragged", _ragged),
    ("dsa_pair_decode", _paged),
    ("dsa_pair_prefill", _ragged),
    ("dsa_topk", _topk),
    ("dsa_sparse_mla", _sparse_mla),
    ("dsa_step", _step),
    ("dsa_gather", _gather),
    ("dsa_kv_insert", _kv_insert),
    ("gdn_decode_qk4", _contest_gdn),
    ("gdn_prefill_qk4", _contest_gdn),
    ("gdn_decode", _decode),
    ("gdn_core_decode", _decode),
    ("drafts_gdn_core", _drafts),
    ("gdn_prefill", _prefill),
    ("gdn_core_prefill", _prefill),
)


def seed_of(case: Case, seed: int = 0) -> int:
    """A 63-bit seed from the case's identifier and the run's seed, the same in every process."""
    return _seed(case.uuid, seed)


def _seed(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{text}#{seed}".encode()).digest()[:8], "big") >> 1


def generate(case: Case, *, seed: int = 0, device: torch.device | str = "cpu", reuse: Inputs | None = None) -> Inputs:
    """Inputs of `case` in the definition's order: tensors on `device`, Python scalars.

    reuse: another set of the same case, whose expert weights are taken instead of new ones.
    """
    maker = next(make for prefix, make in _MAKERS if case.definition.startswith(prefix))
    made = maker(Maker(seed_of(case, seed), torch.device(device), seed, reuse), case)
    return {name: made[name] for name in case.spec.inputs}
