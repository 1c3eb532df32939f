"""Which implementation serves an operator: ours or stock vLLM's, decided once per layer from what was measured.

`policy(op, case, device)` is asked at construction and cached; `Policy.use_ours(tokens)` is asked at each step and is
one bisect on the host. On CPU ours serves. On a GPU the measured table of that very chip decides, per number of tokens;
an unmeasured chip or shape stays with stock unless BLACKWELL_KERNELS_UNMEASURED=1, and so do what was measured before
the kernels changed and far more tokens than were measured.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from blackwell_kernels import env
from blackwell_kernels.errors import UnsupportedInputError, did_you_mean

if TYPE_CHECKING:
    import torch

Case = tuple[tuple[str, Any], ...]
BEYOND = 4  # times the largest number of tokens that was measured: as far as what was found there decides
STEP = 16384  # tokens: steps of more are rare, and not worth a word


@dataclass(frozen=True)
class Policy:
    """`impl` is "triton", "cpu", "stock" or "mixed"; `bounds` and `ours` are a step function of the token count."""

    impl: str
    reason: str
    bounds: tuple[int, ...] = ()
    ours: tuple[bool, ...] = ()

    def use_ours(self, tokens: int) -> bool:
        """Whether a step of `tokens` tokens is ours. Pure host code: safe while a CUDA graph is captured."""
        if not self.bounds:
            return self.impl != "stock"
        return self.ours[min(bisect_left(self.bounds, tokens), len(self.ours) - 1)]


def summary(parts: dict[str, Policy]) -> tuple[str, str]:
    """Implementation and reason of an operator whose decode and prefill parts are decided apart."""
    impls = {chosen.impl for chosen in parts.values()}
    reasons = {chosen.reason for chosen in parts.values()}
    if len(impls) == len(reasons) == 1:
        return impls.pop(), reasons.pop()
    impl = impls.pop() if len(impls) == 1 else "mixed"
    return impl, "; ".join(f"{part}: {chosen.reason}" for part, chosen in parts.items())


def policy(op: str, case: dict[str, Any], device: torch.device | str, most: int | None = None) -> Policy:
    """The decision for operator `op` (a name of env.HOOK_OPS) with the axes `case` (all but tokens) on `device`.

    most: rows of a table for more tokens are of other calls than these, and decide nothing.
    Raises: UnsupportedInputError for a name that is no operator, EnvironmentSettingError, TableError.
    """
    if op not in env.HOOK_OPS:
        raise UnsupportedInputError(
            "policy", f"op {op!r}", ", ".join(env.HOOK_OPS), f"use one of these{did_you_mean(op, env.HOOK_OPS)}"
        )
    settings = (op in env.DISABLE.get(), op in env.FORCE.get(), env.UNMEASURED.get())
    kind, _, index = str(device).partition(":")
    return _decide(op, tuple(sorted(case.items())), kind, int(index) if index else None, settings, most)


@cache
def _decide(
    op: str, case: Case, kind: str, index: int | None, settings: tuple[bool, bool, bool], most: int | None
) -> Policy:
    disabled, forced, unmeasured = settings
    if disabled:
        return Policy("stock", f"disabled by {env.DISABLE.name}")
    if kind == "cpu":
        return Policy("cpu", "on a CPU ours serves")
    if kind != "cuda":
        return Policy("stock", f"no kernels for {kind} devices")
    name, sm = _device(index)
    if sm < 90:
        return Policy("stock", f"{name} is not an NVIDIA GPU of sm90 or newer, which these kernels need")
    if forced:
        return Policy("triton", f"forced by {env.FORCE.name}")
    return _measured(op, dict(case), name, unmeasured, most)


def _device(index: int | None) -> tuple[str, int]:
    """Name and compute capability (90, 100, ...); 0 for a GPU that is not NVIDIA's."""
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), 0 if torch.version.hip else 10 * major + minor


def _measured(op: str, case: dict[str, Any], name: str, unmeasured: bool, most: int | None) -> Policy:
    from blackwell_kernels.common import arch, tables

    gpu = arch.gpu_slug(name)
    family = env.HOOK_OPS[op]
    table = tables.load(family, op, gpu)
    rows = [] if table is None else [row for row in table.rows if table.lookup(case, row.tokens) is row]
    rows = [row for row in rows if most is None or row.tokens <= most]
    # a tuner leaves rows that nobody has measured against stock yet
    if all(row.stock_us is None for row in rows):
        where = gpu if table is None else f"{gpu} for {_text(case)}"
        if unmeasured:
            return Policy("triton", f"not measured on {where}: runs because {env.UNMEASURED.name}=1")
        return Policy("stock", f"not measured on {where}: {env.UNMEASURED.name}=1 runs it all the same")
    valid = [unmeasured or row.kernels == tables.kernels_of(family) for row in rows]
    if table is not None and not any(valid):
        where = f"{gpu} since its kernels changed (last at {table.provenance.commit})"
        return Policy("stock", f"not measured on {where}: {env.UNMEASURED.name}=1 runs it all the same")
    ours = tuple(row.use != "stock" and fresh for row, fresh in zip(rows, valid, strict=True))
    bounds = tuple(row.tokens for row in rows)
    found = set(ours)
    impl, reason = "mixed" if len(found) > 1 else "triton" if ours[0] else "stock", _steps(gpu, bounds, ours)
    if ours[-1] and not unmeasured:  # top-k, measured up to 64 rows, was 1.4 times slower than stock's in 4,096
        bounds, ours = (*bounds, BEYOND * bounds[-1]), (*ours, True, False)
        reason += f", to {bounds[-1]} tokens" if bounds[-1] < STEP else ""
    return Policy(impl, reason, bounds, ours)


def _steps(gpu: str, bounds: tuple[int, ...], ours: tuple[bool, ...]) -> str:
    """`measured on h200: stock up to 64 tokens, then ours`."""
    names = ["ours" if mine else "stock" for mine in ours]
    changes = [f"{name} up to {bounds[i]} tokens" for i, name in enumerate(names[:-1]) if names[i + 1] != name]
    if not changes:
        return f"measured on {gpu}: {names[0]} is faster"
    return f"measured on {gpu}: {', '.join(changes)}, then {names[-1]}"


def _text(case: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in case.items()) or "this shape"
