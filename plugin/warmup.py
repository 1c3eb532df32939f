"""Compile the kernels that a model needs before a request meets them.

A Triton kernel is compiled for types, head counts and tile sizes, not for values: one call per number of tokens with
zeros of the model's own dimensions is enough. `run` (`blackwell-kernels warmup`) fills Triton's disk cache ahead of a
server; `in_worker` does it in a server after the model is loaded, before vLLM measures the memory that is left for the
KV cache: vLLM's own profile run leaves attention and recurrence out. `plan` derives the calls from a Hugging Face
config; it runs on a CPU too, where there is nothing to compile, which is how it is tested. What Triton's cache lacks is
compiled before the calls, in other processes on all cores (`compile_ahead`); a worker begins with it before its load.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels import compile_ahead, env, ops
from blackwell_kernels.common import arch, tables
from blackwell_kernels.compile_ahead import Ahead
from blackwell_kernels.errors import BlackwellKernelsError, MissingRequirementError
from blackwell_kernels.model_patches import deepseek_v32, indexer, qwen3_next

logger = logging.getLogger("vllm.blackwell_kernels")

PAGE = 64
MAX_SEQS = 512  # vLLM's largest captured decode batch
LOGITS_BYTES = 512 << 20  # of one chunk of a prefill: vLLM's VLLM_SPARSE_INDEXER_MAX_LOGITS_MB by default
CHUNK = 40  # times max_model_len: keys of the requests that vLLM puts into one chunk of a prefill
# sequences of one prefill step: each number is another variant of the walk (one, few, many in order of length, many)
SEQUENCES = (1, 4, 16, 64)
INT, LONG, FLOAT, BF16, FP8, BYTE = (
    torch.int32,
    torch.int64,
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
)


EXPERT_PARAMETERS = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
Weights = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Deployment:
    """How the model will be served: ranks, whether experts are spread over them, vLLM's two limits, caches."""

    tp: int = 1
    ep: bool = False
    max_tokens: int = 8192
    max_model_len: int = 8192
    fp8_kv: bool = False
    state_dtype: torch.dtype = BF16


@dataclass(frozen=True)
class Step:
    """One call to make: the hook op, the number of tokens, and the call itself."""

    op: str
    tokens: int
    run: Callable[[], None]


def read_config(model: str) -> dict[str, Any]:
    """The config.json of a model: a folder, the file itself, or a name in the local Hugging Face cache or on the Hub.

    Raises: BlackwellKernelsError saying what was looked for.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model, "config.json"))
        except Exception as error:
            raise BlackwellKernelsError(
                f"no config.json for {model!r}: neither a folder nor a file, and Hugging Face gave none "
                f"({type(error).__name__}). Give the folder that holds the checkpoint."
            ) from None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BlackwellKernelsError(f"{path} is no config.json: {error}. Restore it from the checkpoint.") from None


def plan(
    config: Mapping[str, Any], served: Deployment, device: torch.device, experts: Weights | None = None
) -> list[Step]:
    """The calls that compile every kernel this model uses when it is `served` like that.

    `experts`: one layer's weights, if they are there already; zeros of their size are made otherwise.

    Raises: BlackwellKernelsError for a model that the plugin has no hooks for.
    """
    asked = config.get("architectures") or []
    for model, build in ((deepseek_v32, _deepseek), (qwen3_next, _qwen3_next)):
        if set(asked) & set(model.ARCHITECTURES):
            return list(build(config, served, _Maker(device), experts))
    known = ", ".join((*deepseek_v32.ARCHITECTURES, *qwen3_next.ARCHITECTURES))
    raise BlackwellKernelsError(
        f"architectures {asked} have no kernels here; supported: {known}. Serve such a model without the plugin."
    )


def ahead_of_load(worker: Any, ops_expected: Collection[str]) -> Ahead:
    """Begin to compile what the worker's model will use of `ops_expected`, as far as it can serve on this GPU."""
    gpu, chip = arch.current_gpu(), arch.current_arch()
    ops_there = [op for op in ops_expected if gpu is not None and chip.sm >= 90 and _may_serve(op, gpu)]
    return compile_ahead.start(
        worker.model_config.hf_text_config.to_dict(), _served(worker), ops_there, gpu or "", chip
    )


def _may_serve(op: str, gpu: str) -> bool:
    """Whether `select.policy` can choose ours for some shape."""
    family = env.HOOK_OPS[op]
    if op in env.DISABLE.get() or op in env.FORCE.get() or env.UNMEASURED.get():
        return op not in env.DISABLE.get()
    table = tables.load(family, op, gpu)
    rows = table.rows if table is not None else ()
    return any(row.use == "triton" and row.kernels == tables.kernels_of(family) for row in rows)


def _served(worker: Any) -> Deployment:
    return Deployment(
        tp=worker.parallel_config.tensor_parallel_size,
        ep=worker.parallel_config.enable_expert_parallel,
        max_tokens=worker.scheduler_config.max_num_batched_tokens,
        max_model_len=worker.model_config.max_model_len,
        fp8_kv=str(worker.cache_config.cache_dtype).startswith("fp8"),
        state_dtype=FLOAT if worker.cache_config.mamba_ssm_cache_dtype == "float32" else BF16,
    )


def in_worker(worker: Any, ops_in_use: Collection[str], device: torch.device, ahead: Ahead | None = None) -> None:
    """Compile what the worker's model will use of `ops_in_use`, what is compiled `ahead` waited for.

    A failure is logged; kernels then compile when met.
    """
    started = time.monotonic()
    try:
        if ahead is not None:
            for _ in ahead.outcomes():
                pass
            _tell(ahead, time.monotonic() - started)
        config = worker.model_config.hf_text_config.to_dict()
        experts = expert_weights(worker.get_model()) if "moe" in ops_in_use else None
        steps = [step for step in plan(config, _served(worker), device, experts) if step.op in ops_in_use]
        logger.info("blackwell-kernels: warming up %d calls; Triton keeps what it compiles in %s", len(steps), _cache())
        for step in steps:
            step.run()
    except Exception as error:
        logger.warning("blackwell-kernels: warm-up stopped, kernels will compile when first met: %s", error)
    else:
        logger.info("blackwell-kernels: warmed up in %.1f s", time.monotonic() - started)
    if device.type == "cuda":
        with suppress(RuntimeError):  # whoever uses a broken context next is told, too
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # vLLM measures next what is free


def _tell(ahead: Ahead, waited_s: float) -> None:
    if ahead.compiled:
        logger.info("blackwell-kernels: %d kernels compiled ahead; waited %.1f s for them", ahead.compiled, waited_s)
    for failure in ahead.failed:
        logger.warning("blackwell-kernels: not compiled ahead, so when it is called: %s", failure)


def expert_weights(model: torch.nn.Module) -> Weights | None:
    """w13, its scales, w2 and its scales of the model's first FP8 expert layer, which are too large to make twice."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf in EXPERT_PARAMETERS:
            layers.setdefault(layer, {})[leaf] = parameter.data
    whole = [found for found in layers.values() if len(found) == len(EXPERT_PARAMETERS)]
    return tuple(whole[0][leaf] for leaf in EXPERT_PARAMETERS) if whole else None


def _cache() -> str:
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    return str(knobs.cache.dir) if knobs is not None else "no cache (Triton is not there)"


def run(config: Mapping[str, Any], served: Deployment) -> dict[str, Any]:
    """Make the calls on the current CUDA device, with progress on stderr; what was done as JSON data.

    Raises: MissingRequirementError without such a device.
    """
    if not torch.cuda.is_available():
        raise MissingRequirementError(
            "warmup compiles GPU kernels, and there is no CUDA device here. On a CPU the operators are torch code: "
            "nothing needs compiling, and a server starts without it."
        )
    from rich.console import Console
    from rich.progress import Progress, track

    from blackwell_kernels import load_report, status

    load_report.CompileListener().install()
    steps = plan(config, served, torch.device("cuda"))
    console = Console(stderr=True)
    console.print(f"warm-up: {len(steps)} calls for {', '.join(config['architectures'])}; Triton's cache is {_cache()}")
    gpu, chip = arch.current_gpu(), arch.current_arch()
    bar = Progress(console=console, disable=not console.is_terminal)
    with compile_ahead.start(config, served, {step.op for step in steps}, gpu or "", chip) as ahead, bar:
        compiling = bar.add_task("compiling", total=None)
        for done, missing in ahead.outcomes():
            bar.update(compiling, completed=done, total=missing)
    for failure in ahead.failed:
        console.print(f"not compiled ahead, so when it is called: {failure}", highlight=False, markup=False)
    for step in track(steps, "calling", console=console, disable=not console.is_terminal):
        step.run()
    torch.cuda.synchronize()
    return {
        "schema": 1,
        "device": torch.cuda.get_device_name(),
        "calls": len(steps),
        "compiled": ahead.compiled + len(status.snapshot()["jit_warmup"]),
        "cache": _cache(),
    }


class _Maker:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def zeros(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def full(self, *shape: int, value: float, dtype: torch.dtype = INT) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def range(self, start: int, stop: int, dtype: torch.dtype = INT) -> torch.Tensor:
        return torch.arange(start, stop, dtype=dtype, device=self.device)


def _sizes(limit: int) -> Iterator[int]:
    """Every size up to 33, then eight to an octave, and `limit`.

    A kernel's variant follows from a table's row, whose bounds are powers of two, and from limits that are not (256
    pairs of ten experts a token): any two of them leave a size in between. (33 is
    the most rows of which each has four of 132 multiprocessors.)
    """
    sizes = set(range(1, 34))
    octave = 32
    while octave <= limit:
        sizes |= set(range(octave, 2 * octave, octave // 8))
        octave *= 2
    yield from sorted({size for size in sizes if size < limit} | {limit})


def _widths(rows: int, longest: int) -> Iterator[int]:
    """Numbers of columns, from `rows` on, that find every variant of top-k, as far as vLLM's logits go.

    Of each octave, which shares a row of a table, five: its end, where the heuristic takes more programs; and what 4
    divides or not, which is read differently, with a stride of stock's logits that is divided by 16 or only by 8, for
    which Triton compiles apart.
    """
    most = min(longest, LOGITS_BYTES // (4 * rows))
    width = max(256, 1 << (rows - 1).bit_length())
    while width // 2 < most:
        whole = min(width, most) // 16 * 16
        yield from (columns for columns in (whole, whole - 16, whole - 8, whole - 1, whole - 9) if columns > 0)
        width *= 2


def _deepseek(config: Mapping[str, Any], served: Deployment, make: _Maker, weights: Weights | None) -> Iterator[Step]:
    experts, topk = config["n_routed_experts"], config["num_experts_per_tok"]
    yield from _experts(config, served, make, experts, topk, weights)

    def route(tokens: int) -> None:
        ops.moe_grouped_topk(
            make.zeros(tokens, experts, dtype=FLOAT), make.zeros(experts, dtype=FLOAT), config["n_group"],
            config["topk_group"], config["norm_topk_prob"], config["routed_scaling_factor"],
            make.zeros(tokens, topk, dtype=FLOAT), make.zeros(tokens, topk, dtype=INT),
        )  # fmt: skip

    yield from (Step("moe_routing", n, partial(route, n)) for n in _sizes(served.max_tokens))
    yield from _sparse_attention(config, served, make)


def _qwen3_next(config: Mapping[str, Any], served: Deployment, make: _Maker, weights: Weights | None) -> Iterator[Step]:
    experts, topk = config["num_experts"], config["num_experts_per_tok"]
    yield from _experts(config, served, make, experts, topk, weights)

    def route(tokens: int) -> None:
        ops.moe_softmax_topk(
            make.zeros(tokens, experts), config["norm_topk_prob"], make.zeros(tokens, topk, dtype=FLOAT),
            make.zeros(tokens, topk, dtype=INT),
        )  # fmt: skip

    yield from (Step("moe_routing", n, partial(route, n)) for n in _sizes(served.max_tokens))
    yield from _gated_delta_net(config, served, make)


def _experts(
    config: Mapping[str, Any], served: Deployment, make: _Maker, experts: int, topk: int, given: Weights | None
) -> Iterator[Step]:
    hidden, inter = config["hidden_size"], config["moe_intermediate_size"] // (1 if served.ep else served.tp)
    local = experts // (served.tp if served.ep else 1)

    @cache  # one layer's weights serve every step
    def weights() -> Weights:
        if given is not None:
            return given
        shapes = ((local, 2 * inter, hidden), (local, hidden, inter))
        made = []
        for experts_here, rows, columns in shapes:
            made.append(make.zeros(experts_here, rows, columns, dtype=FP8))
            made.append(make.full(experts_here, -(-rows // 128), -(-columns // 128), value=1, dtype=FLOAT))
        return tuple(made)

    def run(tokens: int) -> None:
        ids = make.range(0, tokens * topk).view(tokens, topk) % experts
        mapped = make.full(experts, value=-1)
        mapped[:local] = make.range(0, local)
        scales = make.full(tokens, hidden // 128, value=1, dtype=FLOAT)
        ops.moe_fp8_block_scale(
            make.zeros(tokens, hidden, dtype=FP8), scales, *weights(),
            make.full(tokens, topk, value=1 / topk, dtype=FLOAT), ids,
            mapped if served.ep else None, make.zeros(tokens, hidden),
        )  # fmt: skip

    yield from (Step("moe", n, partial(run, n)) for n in _sizes(served.max_tokens))


def _sparse_attention(config: Mapping[str, Any], served: Deployment, make: _Maker) -> Iterator[Step]:
    index_heads, topk = config["index_n_heads"], config["index_topk"]
    heads = config["num_attention_heads"] // served.tp
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    scale = (config["qk_nope_head_dim"] + rope) ** -0.5
    index_cache = make.zeros(2, PAGE, 132, dtype=BYTE)
    kv_cache = make.zeros(2, PAGE, 656, dtype=BYTE) if served.fp8_kv else make.zeros(2, PAGE, latent + rope)
    columns = -(-served.max_model_len // PAGE) * PAGE

    # logits as the model patch lays them out, and what else vLLM passes: lengths [B, 1], columns that stay as they are
    def indexer_decode(rows: int) -> None:
        logits = indexer.new_logits(rows, served.max_model_len, make.device)
        ops.dsa_indexer_logits_paged(
            make.zeros(rows, 1, index_heads, 128, dtype=FP8), index_cache, make.zeros(rows, index_heads, dtype=FLOAT),
            make.full(rows, 1, value=PAGE), make.full(rows, columns // PAGE, value=1), logits, clean=False,
        )  # fmt: skip

    def indexer_prefill(tokens: int, keys: int) -> None:
        ops.dsa_indexer_logits_ragged(
            make.zeros(tokens, index_heads, 128, dtype=FP8), make.zeros(keys, 128, dtype=FP8),
            make.zeros(keys, dtype=FLOAT), make.zeros(tokens, index_heads, dtype=FLOAT), make.full(tokens, value=0),
            make.range(1, tokens + 1).clamp(max=keys), indexer.new_logits(tokens, keys, make.device), clean=False,
        )  # fmt: skip

    def select(logits: torch.Tensor) -> None:
        rows = len(logits)
        ops.dsa_topk(
            logits, make.full(rows, value=0), make.full(rows, value=1), make.full(rows, topk, value=-1)
        )  # fmt: skip

    def select_decode(rows: int) -> None:
        select(indexer.new_logits(rows, served.max_model_len, make.device))

    def select_prefill(rows: int, keys: int) -> None:
        select(indexer.stock_logits(rows, keys, make.device))

    def attend(tokens: int) -> None:
        ops.dsa_sparse_mla(
            make.zeros(tokens, heads, latent + rope), kv_cache, make.full(tokens, topk, value=-1),
            make.full(tokens, value=0), make.full(1, columns // PAGE, value=1), scale,
            make.zeros(tokens, heads, latent), None,
        )  # fmt: skip

    for n in _sizes(min(served.max_tokens, MAX_SEQS)):
        yield Step("dsa_indexer", n, partial(indexer_decode, n))
        yield Step("dsa_topk", n, partial(select_decode, n))
    for n in _sizes(served.max_tokens):
        # a prefill has any number of keys: where 4 divides it, rows are read in vectors of four; else the code is other
        whole = n - n % 4
        for keys in (whole, whole - 1) if whole else (n,):
            yield Step("dsa_indexer", n, partial(indexer_prefill, n, keys))
        # and it may be few tokens behind long contexts, of several requests
        for keys in _widths(n, CHUNK * served.max_model_len):
            yield Step("dsa_topk", n, partial(select_prefill, n, keys))
        yield Step("dsa_sparse_mla", n, partial(attend, n))


def _gated_delta_net(config: Mapping[str, Any], served: Deployment, make: _Maker) -> Iterator[Step]:
    heads, value_heads = (config[f"linear_num_{kind}_heads"] // served.tp for kind in ("key", "value"))
    size, value_size = config["linear_key_head_dim"], config["linear_value_head_dim"]
    channels = 2 * heads * size + value_heads * value_size
    weight, scale = make.zeros(channels, config["linear_conv_kernel_dim"]), size**-0.5
    decay = (make.zeros(value_heads, dtype=FLOAT), make.zeros(value_heads))

    def gates(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return make.zeros(tokens, value_heads), make.zeros(tokens, value_heads)

    def decode(sequences: int) -> None:
        state = make.zeros(sequences + 1, value_heads, value_size, size, dtype=served.state_dtype)
        ops.gdn_decode(
            make.zeros(sequences, channels), *gates(sequences), *decay, state, make.range(1, sequences + 1),
            make.zeros(sequences, value_heads, value_size), scale=scale,
            conv_state=make.zeros(sequences + 1, 3, channels), conv_weight=weight,
        )  # fmt: skip

    def prefill(tokens: int, sequences: int) -> None:
        x, slots = make.zeros(tokens, channels), make.range(1, sequences + 1)
        fresh, lengths = make.zeros(sequences, dtype=torch.bool), make.range(0, sequences + 1) * (tokens // sequences)
        history = make.zeros(sequences + 1, 3, channels)
        q, k = make.zeros(tokens, heads, size), make.zeros(tokens, heads, size)
        v, out = (make.zeros(tokens, value_heads, value_size) for _ in range(2))
        g, beta = (make.zeros(tokens, value_heads, dtype=FLOAT) for _ in range(2))
        ops.gdn_prepare(
            x, *gates(tokens), *decay, q, k, v, g, beta, conv_state=history, conv_weight=weight, state_indices=slots,
            has_initial_state=fresh, cu_seqlens=lengths,
        )  # fmt: skip
        state = make.zeros(sequences + 1, value_heads, value_size, size, dtype=served.state_dtype)
        ops.gdn_prefill(q, k, v, g, beta, state, slots, fresh, lengths, out, scale=scale)

    yield from (Step("gdn_decode", n, partial(decode, n)) for n in _sizes(min(served.max_tokens, MAX_SEQS)))
    for n in _sizes(served.max_tokens):
        for sequences in sorted({min(n, some) for some in SEQUENCES}):
            yield Step("gdn_prefill", n, partial(prefill, n, sequences))
