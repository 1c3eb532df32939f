"""Cases: a definition at concrete axes, with the deployment it stands for. Expanded from `workloads.json`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from blackwell_kernels.microbench.spec import Spec
from blackwell_kernels.microbench.specs import SPECS

SETS = ("contest", "model", "agent", "cpu")
INDEX = Path(__file__).with_name("workloads.json")
PAGE = 64


@dataclass(frozen=True)
class Model:
    """The dimensions of a model's operators before any parallelism divides them."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    n_group: int = 8
    topk_group: int = 4
    mla_heads: int = 128
    index_heads: int = 64
    gdn_heads: int = 16
    gdn_v_heads: int = 32
    mla_context: int = 65536
    mla_top_k: int = 2048


MODELS = {
    "deepseek-v3.2": Model(7168, 2048, 256, 8),
    "qwen3-next": Model(2048, 512, 512, 10),
    # for machines without a GPU
    "tiny": Model(
        256, 128, 32, 4, mla_heads=16, index_heads=8, gdn_heads=2, gdn_v_heads=4, mla_context=320, mla_top_k=128
    ),
}
# the deployment whose dimensions a contest definition has: model, tp, ep
_CONTEST = {
    "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048": ("deepseek-v3.2", 1, 8),
    "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64": ("deepseek-v3.2", 1, 1),
    "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64": ("deepseek-v3.2", 8, 1),
    "gdn_decode_qk4_v8_d128_k_last": ("qwen3-next", 4, 1),
    "gdn_prefill_qk4_v8_d128_k_last": ("qwen3-next", 4, 1),
}


@dataclass(frozen=True)
class Case:
    """`axes`: the definition's variable axes. `options`: what the workload generator needs beyond them.

    `count`: how many of the contest's workloads have this shape (1 elsewhere).
    """

    definition: str
    name: str
    set: str
    axes: dict[str, int]
    model: str
    tp: int = 1
    ep: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    count: int = 1

    @property
    def spec(self) -> Spec:
        """The definition; the reduced one for cases of the cpu set."""
        spec = SPECS[self.definition]
        return spec.cpu() if self.set == "cpu" else spec

    @property
    def uuid(self) -> str:
        """Stable identifier within the data set; also what the seed is derived from."""
        return f"{self.spec.name}-{self.name}".replace("/", "-")

    @property
    def tokens(self) -> int:
        """The size a tuned table is indexed by."""
        return self.axes[self.spec.tokens]

    @property
    def graphed(self) -> bool:
        """Whether vLLM serves it from a CUDA graph: a decode of no more tokens than it captures by default (512)."""
        prefill = "stage:prefill" in self.spec.tags or "prefill" in self.definition or self.options.get("causal", False)
        return not prefill and self.tokens <= 512

    def full_axes(self) -> dict[str, Any]:
        """All axes of the definition, constants included, and model, tp, ep, dtype: what a results row carries."""
        axes = {k: self.axes[k] if v is None else v for k, v in self.spec.axes.items()}
        return {**axes, "model": self.model, "tp": self.tp, "ep": self.ep, "dtype": dtype(self.definition)}


def dtype(definition: str) -> str:
    """The data type that tells variants of an operator apart: of the weights, the cache or the state."""
    if definition.startswith("gdn"):
        return "float32" if definition.endswith("f32") or "k_last" in definition else "bfloat16"
    return "bfloat16" if "bf16" in definition or "attention" in definition or "step" in definition else "fp8"


def lengths(text: str) -> list[int]:
    """`8x1024` -> eight times 1024; `200+700` -> both."""
    parts: list[int] = []
    for part in text.split("+"):
        count, _, length = part.rpartition("x")
        parts += [int(length)] * (int(count) if count else 1)
    return parts


def _axes(definition: str, m: Model, tp: int, ep: int, point: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """(variable axes, generator options) of one point of a sweep."""
    tokens, batch, context = (point.get(k, 0) for k in ("num_tokens", "batch_size", "context"))
    pages = -(-context // PAGE)
    sequences = lengths(point["lengths"]) if "lengths" in point else []
    packed = {"total_seq_len": sum(sequences), "num_seqs": len(sequences), "len_cu_seqlens": len(sequences) + 1}
    heads, v_heads = m.gdn_heads // tp, m.gdn_v_heads // tp
    gdn = {"num_v_heads": v_heads, "qkv_size": (2 * heads + v_heads) * 128}
    match definition.split("_"):
        case ["moe", "fp8", "block", *ep_suffix] if ep_suffix in ([], ["ep"]):
            inter, experts = m.intermediate // tp, m.experts // ep
            axes = {
                "num_tokens": tokens,
                "hidden_size": m.hidden,
                "num_experts": experts,
                "gate_up_size": 2 * inter,
                "num_gate_up_blocks": 2 * inter // 128,
                "num_hidden_blocks": m.hidden // 128,
                "intermediate_size": inter,
                "num_intermediate_blocks": inter // 128,
                "top_k": m.top_k,
            }
            routing = {"routing": point.get("routing", "even")}
            return axes | ({"num_global_experts": m.experts} if ep_suffix else {}), routing
        case ["moe", "fp8", "block", "scale", *_]:
            return {"seq_len": tokens}, {}
        case ["moe", "routing", *_]:
            return {"num_tokens": tokens, "num_experts": m.experts}, {"n_group": m.n_group, "topk_group": m.topk_group}
        case ["dsa", "topk", "indexer", *_]:
            return {"batch_size": batch, "max_num_pages": pages, "num_pages": batch * pages + 8}, {"context": context}
        case ["dsa", "sparse", "attention", *_]:
            return {"num_tokens": tokens, "num_pages": pages + 8}, {"context": context}
        case ["dsa", "indexer", "logits", "paged"]:
            next_n = point.get("next_n", 1)
            axes = {"batch_size": batch, "next_n": next_n, "num_rows": batch * next_n, "max_num_pages": pages}
            axes |= {"num_index_heads": m.index_heads, "num_pages": batch * pages + 8}
            return axes, {"context": context}
        case ["dsa", "indexer", "logits", "ragged"] | ["dsa", "pair", "prefill"]:
            return {"num_rows": point["num_rows"], "num_index_heads": m.index_heads, "num_keys": context}, {}
        case ["dsa", "topk2048"]:
            # a chunk of a prefill has the keys of all its requests, a row those of one
            requests = point.get("requests", 1)
            axes = {"num_rows": point["num_rows"], "num_columns": point.get("columns", requests * context)}
            return axes, {"causal": point.get("causal", False), "context": context, "requests": requests}
        case ["dsa", "sparse", "mla", _]:
            requests, pages = min(tokens, 16), -(-(context or m.mla_context) // PAGE)
            axes = {"num_tokens": tokens, "num_heads": m.mla_heads // tp, "top_k": m.mla_top_k}
            axes |= {"num_requests": requests, "max_num_pages": pages, "num_pages": requests * pages + 8}
            return axes, {}
        case ["dsa", ("pair" | "step") as chain, _]:
            axes = {"batch_size": batch, "num_index_heads": m.index_heads}
            axes |= {"num_heads": m.mla_heads // tp} if chain == "step" else {}
            return axes | {"max_num_pages": pages, "num_pages": batch * pages + 8}, {"context": context}
        case ["dsa", "gather", *_]:
            axes = {"batch_size": batch, "len_cu_seqlens": batch + 1, "num_keys": batch * context}
            return axes | {"max_num_pages": pages, "num_pages": batch * pages + 8}, {"context": context}
        case ["dsa", "kv", "insert", _]:
            return {"num_tokens": tokens, "num_pages": pages + 8}, {"context": context}
        case ["gdn", "decode", "qk4", *_]:
            return {"batch_size": batch}, {}
        case ["gdn", "prefill", "qk4", *_]:
            return packed, {"lengths": sequences}
        case ["gdn", "decode", *_] | ["gdn", "core", "decode", *_]:
            return {"batch_size": batch, "num_slots": batch + 2, **gdn}, {}
        case ["drafts", "gdn", "core", _]:
            steps = point["num_steps"]
            axes = {"batch_size": batch, "num_steps": steps, "num_tokens": batch * steps, "conv_rows": steps + 2}
            return axes | {"num_slots": batch * steps + 2, "len_cu_seqlens": batch + 1, **gdn}, {}
        case ["gdn", "prefill", *_]:
            axes = {"num_q_heads": heads, "num_v_heads": v_heads, "num_slots": len(sequences) + 2}
            return axes | packed, {"lengths": sequences}
        case ["gdn", "core", "prefill"]:
            return {"num_slots": len(sequences) + 2, **gdn, **packed}, {"lengths": sequences}
    raise KeyError(definition)


def _sweep(set_name: str, definition: str, entry: dict[str, Any]) -> Iterator[Case]:
    default_model, default_tp, default_ep = _CONTEST.get(definition, ("", 1, 1))
    model = entry.get("model", default_model)
    fixed = {k: v for k, v in entry.items() if not isinstance(v, list) and k != "model"}
    lists = {"tp": [default_tp], "ep": [default_ep]} | {k: v for k, v in entry.items() if isinstance(v, list)}
    for values in itertools.product(*lists.values()):
        point = dict(zip(lists, values, strict=True))
        tp, ep = point.pop("tp"), point.pop("ep")
        axes, options = _axes(definition, MODELS[model], tp, ep, fixed | point)
        split = [f"tp{tp}"] if tp > 1 else [f"ep{ep}"] if ep > 1 else []
        name = "/".join([set_name, model, *split, *(f"{k}={v}" for k, v in (fixed | point).items())])
        yield Case(definition, name, set_name, axes, model, tp, ep, options)


def _contest(definition: str, entry: dict[str, Any]) -> Iterator[Case]:
    model, tp, ep = _CONTEST[definition]
    for *shape, count in entry["shapes"]:
        axes = dict(zip(entry["axes"], shape, strict=True))
        name = "/".join(["contest", *(f"{k}={v}" for k, v in axes.items())])
        options: dict[str, Any] = {}
        if "num_seqs" in axes:
            axes["len_cu_seqlens"] = axes["num_seqs"] + 1
        if "max_num_pages" in axes:
            options["context"] = axes["max_num_pages"] * PAGE
        yield Case(definition, name, "contest", axes, model, tp, ep, options, count)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of every set, in the order of `workloads.json`."""
    index = json.loads(INDEX.read_text(encoding="utf-8"))
    found: list[Case] = []
    for definition, entry in index["contest"].items():
        found += _contest(definition, entry)
    for name in SETS[1:]:
        for definition, entries in index[name].items():
            for entry in entries:
                found += _sweep(name, definition, entry)
    return tuple(found)


def select(
    *, sets: tuple[str, ...], op: str | None = None, case: str | None = None, definition: str | None = None
) -> list[Case]:
    """Cases of `sets`, narrowed by operator, definition, and case (a glob, or a part of the name)."""
    wanted = []
    for item in all_cases():
        if item.set not in sets or (op and item.spec.op != op) or (definition and item.definition != definition):
            continue
        if case and case not in item.name and not fnmatchcase(item.name, case):
            continue
        wanted.append(item)
    return wanted
