"""What a server's step is made of: the time of every kernel, by what it is for.

Three kinds of steps are put before a running server: decoding one request, decoding many, prefilling one prompt. Each
is timed first, without a profiler, by the server's own clock, which is read from /metrics between blocks of tokens: the
mean time between tokens, taken where the engine makes them, and the time to the first one. Where a server has none, by
what the client saw: each request's span over many tokens, the time to the first. Then again under vLLM's torch profiler
(`/start_profile`, `/stop_profile`). Kernel times are the profiler's; gaps are what the step took without it minus the
time in which any kernel ran. A step that is shorter than its kernels was not timed right, and is an error.

Kernels are told apart by name. Ours by the names in our sources; within a layer of stock's experts (from sorting the
tokens, or their first GEMM, to summing their results) quantisation, activation and the sum count as the experts', as
they do in ours. What is ambiguous between the arms stands in one sum as well (TOGETHER).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import time
import urllib.error
import urllib.request
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from blackwell_kernels.e2e import host_time, probe, prometheus
from blackwell_kernels.e2e.server import Server
from blackwell_kernels.e2e.streams import Streams
from blackwell_kernels.errors import ServerError

GAPS = "gaps"
# one arm's kernels do in one what the other's do in several: only these sums compare
TOGETHER = {
    "experts + quantisation + activation": ("moe", "quantise", "activation"),
    "GDN + its convolution": ("gdn_decode", "gdn_prefill", "gdn_conv"),
}
# not by `ast`: two arms are read in two threads, and CPython 3.11's parser fails when it runs in both (gh-106905)
_KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
# of our kernels, by family: the first whose part is in the kernel's name
OUR_OPERATORS = {
    "moe": (("topk", "moe_routing"), ("", "moe")),
    "gdn": (("decode", "gdn_decode"), ("conv", "gdn_conv"), ("prepare", "gdn_conv"), ("", "gdn_prefill")),
    "dsa": (
        *(("topk", "dsa_topk"), ("indexer", "dsa_indexer")),
        *(("kv_insert", "rope and cache"), ("", "dsa_sparse_mla")),
    ),
}
# of vLLM 0.24 and what it brings; the first that matches counts
_STOCK = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        ("compiled", r"^triton_(poi|red|per|tem|for)_"),  # torch.compile's: norms, activations, copies in one
        ("moe_routing", r"topkGating|topk_softmax|grouped_topk|moeTopK|moeSoftmax|topk_sigmoid"),
        (
            "moe",
            r"fused_moe|moe_|count_and_sort_expert|m_grouped|ep_scatter|ep_gather|MoeRouting|ExpertFirst|expandInput",
        ),
        ("dsa_topk", r"top_?k_(transform|per_row)|[Tt]op[Kk]PerRow|persistent_topk"),
        ("dsa_indexer", r"mqa_logits|indexer_k"),
        ("dsa_sparse_mla", r"sparse_(attn_)?fwd|sparse_attn|splitkv_mla|flash_mla|convert_req_index"),
        ("gdn_decode", r"packed_decode|fused_sigmoid_gating|fused_recurrent"),
        ("gdn_prefill", r"chunk_gated_delta|chunk_fwd_kernel_o|chunk_scaled_dot|solve_tril|_inverse_kernel"),
        ("gdn_prefill", r"recompute_w_u|chunk_local_cumsum|l2norm_fwd|delta_rule|DeltaRule"),
        ("gdn_conv", r"causal_conv1d|fused_post_conv"),
        ("communication", r"nccl|all_?reduce|all_?gather|cross_device|multimem"),
        ("attention", r"flash::|FlashAttn|flash_fwd|fmha|unified_attention|merge_attn|Batch(Prefill|Decode)With"),
        ("GEMM", r"gemm|nvjet|cutlass|cublas|splitK|xmma"),
        ("quantise", r"quant"),
        ("norm", r"norm"),
        ("rope and cache", r"rope|rotary|Rotary|_and_cache|slot_mapping|CosSin"),
        ("activation", r"act_and_mul|silu|gelu"),
        ("copy", r"[Mm]emcpy|Memset|copy|Fill|CatArray|gather|scatter|index"),
    )
)
# a layer of stock's experts: sorting (not for one token), two GEMMs, then a sum of vLLM's, of DeepGEMM's or of torch's
_SORT = re.compile(r"moe_align|count_and_sort_expert|ep_scatter")
_EXPERT_GEMM = re.compile(r"fused_moe_kernel|m_grouped")
_SUM = re.compile(r"moe_(fused_mul_)?sum|ep_gather|reduce_kernel.*sum_functor")
_STEP = re.compile(r"execute_context_(\d+)\((\d+)\)_generation_(\d+)\((\d+)\)")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Shape:
    """A kind of step: `decode` of so many requests, each with `prompt` tokens behind it, or `prefill` of one prompt."""

    kind: str
    requests: int
    prompt: int

    @property
    def name(self) -> str:
        """decode 1, decode 64, prefill 4096."""
        return f"{self.kind} {self.requests if self.kind == 'decode' else self.prompt}"

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.requests if self.kind == "decode" else self.prompt


SHAPES = {
    # the short prefill is a coding agent's median append: there the host may be what takes the time
    "cuda": (Shape("decode", 1, 2304), Shape("decode", 64, 2304), Shape("prefill", 1, 4096), Shape("prefill", 1, 704)),
    "cpu": (Shape("decode", 1, 64), Shape("decode", 4, 64), Shape("prefill", 1, 256)),
}
BEGUN = 4  # tokens of a request that decodes
SETTLE = 16  # more tokens until what came during the prefills has been delivered
STEADY = 128  # tokens over which the time without a profiler is taken
BLOCK = 8  # of them are one sample, and after each of them the server's clock is read
STEPS = 12  # to profile
ATTEMPTS = 3  # prompts whose time to the first token is taken
TRACED = 0.05  # kernels may take this much longer under the profiler


def arguments(folder: Path) -> list[str]:
    """What `vllm serve` is told, so that it can be profiled. Until it is, the profiler is not even created."""
    settings = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.absolute()),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
    }
    return ["--profiler-config", json.dumps(settings)]


def capture(server: Server, folder: Path, vocab: int, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Each shape's step: {shape name: {tokens, seconds, server_s, client_s, groups, kernels, ...}}, in µs unless said.

    `seconds` is `server_s` where the server has such a clock, else `client_s`. `server_blocks` are [values, their sum
    in seconds] of the server's histogram between two looks at it, `samples_s` what the client saw. All shapes are timed
    before anything is traced: what a profiler leaves behind makes launches slower.
    `folder` is where the server writes traces (`arguments`). Raises ServerError when it does not answer.
    """
    seeds = {shape: 7919 + 1000 * i for i, shape in enumerate(shapes, 1)}
    found = {}
    for shape, seed in seeds.items():
        found[shape] = (_time_prefill if shape.kind == "prefill" else _time_decode)(server, vocab, shape, seed)
    for shape, seed in seeds.items():
        if shape.kind == "prefill":
            trace = _profiled(server, folder, partial(_first_token, server, vocab, shape, seed + ATTEMPTS + 1))
        else:
            with _decoding(server, vocab, shape, seed + 500) as streams:
                trace = _profiled(server, folder, lambda: streams.wait_tokens(STEPS, time.time()))
        found[shape] = judged({**found[shape], **digest(trace, shape, found[shape]["seconds"])})
    return {shape.name: step for shape, step in found.items()}


@contextmanager
def _decoding(server: Server, vocab: int, shape: Shape, seed: int) -> Iterator[Streams]:
    prompts = [probe.prompts(vocab, [shape.prompt], seed + i)[0] for i in range(shape.requests)]
    with Streams(server.base_url, prompts) as streams:
        streams.wait_tokens(BEGUN)
        streams.wait_tokens(SETTLE, streams.everyone_has(BEGUN))
        yield streams


def _time_decode(server: Server, vocab: int, shape: Shape, seed: int) -> dict[str, Any]:
    with _decoding(server, vocab, shape, seed) as streams:
        pages, begin = [server.metrics()], time.time()
        for tokens in range(BLOCK, STEADY + 1, BLOCK):
            streams.wait_tokens(tokens, begin)
            pages.append(server.metrics())
        client_s, samples = median(streams.paces(begin)), streams.paces(begin, BLOCK)
    blocks = _blocks(pages, prometheus.ITL)
    server_s = sum(s for _, s in blocks) / sum(n for n, _ in blocks) if blocks else None
    return _about(shape, client_s, samples, server_s, blocks)


def _time_prefill(server: Server, vocab: int, shape: Shape, seed: int) -> dict[str, Any]:
    _first_token(server, vocab, shape, seed)  # warm
    pages, times = [server.metrics()], []
    for i in range(ATTEMPTS):
        times.append(_first_token(server, vocab, shape, seed + i + 1))
        pages.append(server.metrics())
    blocks = _blocks(pages, prometheus.TTFT)
    return _about(shape, median(times), times, median(s / n for n, s in blocks) if blocks else None, blocks)


def _blocks(pages: Sequence[str], names: Sequence[str]) -> list[tuple[float, float]]:
    """(values, their sum in seconds) that the server's histogram took in between each page and the next, if any."""
    read = [prometheus.parse_prometheus(page) for page in pages]
    return [block for one, following in pairwise(read) if (block := prometheus.taken_in(one, following, names))[0]]


def _first_token(server: Server, vocab: int, shape: Shape, seed: int) -> float:
    """Seconds from sending a prompt to its first token."""
    begin = time.time()
    with Streams(server.base_url, probe.prompts(vocab, [shape.prompt], seed)) as streams:
        streams.wait_tokens(1)
        return streams.first() - begin


def _about(
    shape: Shape, client_s: float, samples: list[float], server_s: float | None, blocks: list[tuple[float, float]]
) -> dict[str, Any]:
    about = {"kind": shape.kind, "requests": shape.requests, "prompt": shape.prompt, "tokens": shape.tokens}
    about |= {"n": len(samples), "samples_s": [round(s, 6) for s in samples], "server_blocks": blocks}
    return {**about, "seconds": server_s or client_s, "client_s": client_s, "server_s": server_s}


def judged(step: dict[str, Any]) -> dict[str, Any]:
    """The step, with what is wrong about its time as its `why`."""
    return {**step, "why": step["why"] or mistimed(step)}


def mistimed(step: dict[str, Any]) -> str | None:
    """Why a step's time cannot be right, None where it can be: kernels do not run for longer than their step lasts."""
    busy, us = step.get("busy_us"), step["seconds"] * 1e6
    if busy is None or us >= busy * (1 - TRACED):
        return None
    return f"not timed right: {us:.0f} µs a step, and kernels that run for {busy:.0f} µs of it"


def _profiled(server: Server, folder: Path, work: Any) -> list[dict[str, Any]]:
    """The events of rank 0's trace of what runs while `work()` does."""
    before = set(folder.glob("*.json*"))
    _post(server, "start_profile")
    try:
        work()
    finally:
        _post(server, "stop_profile")
    new = sorted(set(folder.glob("*.json*")) - before)
    if not new:
        raise ServerError(f"the server wrote no trace into {folder}; see {server.log}")
    return read_trace(next((path for path in new if "rank0" in path.name or "rank" not in path.name), new[0]))


def _post(server: Server, what: str) -> None:
    request = urllib.request.Request(f"{server.base_url}/{what}", b"", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=300):
            pass
    except (urllib.error.URLError, OSError) as error:
        raise ServerError(f"the server refused /{what}: {error}") from error


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a chrome trace, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(raw)["traceEvents"]


def digest(events: list[dict[str, Any]], shape: Shape, seconds: float) -> dict[str, Any]:
    """{steps, groups: {group: {us, ours_us}}, busy_us, kernels: [[name, group, calls, us], ...], host, why}, per step.

    Steps are vLLM's own annotations; a kernel belongs to the step in which it was launched. A prefill that took several
    steps counts as one. `host`: what the host did (`host_time`). `why` says why nothing was measured, else it is None.
    """
    steps = sorted(
        (event["ts"], [int(n) for n in match.groups()])
        for event in events
        if event.get("cat") == "user_annotation" and (match := _STEP.match(event["name"]))
    )
    wanted = {i for i, (_, (contexts, _, decodes, _)) in enumerate(steps) if _is(shape, contexts, decodes)}
    wanted -= {len(steps) - 1} if shape.kind == "decode" and len(wanted) > 2 else set()  # the last may be cut off
    by_step = _by_step(events, [begin for begin, _ in steps])
    lists = [by_step[i] for i in sorted(wanted) if by_step.get(i)]
    if not lists:
        why = "no step of this kind was traced" if not wanted else "no GPU kernel was traced"
        return {"steps": 0, "groups": {}, "busy_us": None, "kernels": [], "host": None, "why": f"not measured: {why}"}
    if shape.kind == "prefill":
        lists = [[kernel for kernels in lists for kernel in kernels]]
    return {**_groups(lists, seconds), "host": host_time.digest(events, lists), "why": None}


def _is(shape: Shape, contexts: int, decodes: int) -> bool:
    return contexts > 0 if shape.kind == "prefill" else contexts == 0 and decodes == shape.requests


def _by_step(events: list[dict[str, Any]], begins: list[float]) -> dict[int, list[dict[str, Any]]]:
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _DEVICE and event.get("ph") == "X":
            at = launched.get(event["args"].get("correlation"))
            if at is not None and (step := bisect_right(begins, at) - 1) >= 0:
                found[step].append(event)
    return found


def _groups(steps: list[list[dict[str, Any]]], seconds: float) -> dict[str, Any]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    ours: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    busy = []
    for i, step in enumerate(steps):
        for event, group, mine in classified(step):
            sums[group][i] += event["dur"]
            ours[group][i] += event["dur"] if mine else 0.0
            one = kernels[event["name"][:160], group]
            one[0] += 1
            one[1] += event["dur"]
        busy.append(covered((event["ts"], event["ts"] + event["dur"]) for event in step))
    n, total = len(steps), median(busy)
    groups = {group: {"us": median(sums[group]), "ours_us": median(ours[group])} for group in sums}
    groups[GAPS] = {"us": max(0.0, seconds * 1e6 - total), "ours_us": 0.0}
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:60]
    rows = [[name, group, calls / n, us / n] for (name, group), (calls, us) in longest]
    return {"steps": n, "groups": groups, "busy_us": total, "kernels": rows}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reach = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reach))
        reach = max(reach, end)
    return total


def classified(kernels: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """(event, group, whether the kernel is ours) in order of start; experts are followed on each stream."""
    gemms: dict[Any, int] = {}  # stream: GEMMs of the layer of stock's experts that it is in
    for event in sorted(kernels, key=lambda event: event["ts"]):
        name, stream = event["name"], event["tid"]
        group, mine = classify(name)
        if not mine and _SORT.search(name):
            gemms.setdefault(stream, 0)
        elif not mine and _EXPERT_GEMM.search(name):
            gemms[stream] = gemms.get(stream, 0) + 1
        elif stream in gemms and _SUM.search(name):
            group = "moe"
            del gemms[stream]
        elif group == "moe_routing" or gemms.get(stream) == 2:  # the next layer's, or the sum is done elsewhere
            gemms.pop(stream, None)
        elif stream in gemms and group in ("quantise", "activation", "copy"):
            group = "moe"
        yield event, group, mine


@cache
def classify(name: str) -> tuple[str, bool]:
    """(group, whether it is ours) of one kernel by its name."""
    if group := our_kernels().get(name):
        return group, True
    return next((group for group, pattern in _STOCK if pattern.search(name)), "other"), False


@cache
def our_kernels() -> dict[str, str]:
    """{kernel: operator} of every Triton kernel in our sources, which are read and not imported."""
    found: dict[str, str] = {}
    for family in OUR_OPERATORS:
        spec = importlib.util.find_spec(f"blackwell_kernels.{family}")
        for folder in (spec.submodule_search_locations if spec else None) or ():
            for path in Path(folder).glob("*.py"):
                for name in _KERNEL.findall(path.read_text()):
                    found[name] = next(op for part, op in OUR_OPERATORS[family] if part in name)
    return found
