"""Launch configurations: a row of the tuned table for this GPU and case where there is one, else the heuristic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import TableError

Case = dict[str, bool | int | float | str]
_Config = TypeVar("_Config")
SEQUENCES = ("one", "few", "many")


@dataclass(frozen=True)
class DecodeConfig:
    """block_v: state rows a program holds at a time. splits: programs that share the rows of one query/key head of one
    sequence. stages: where a program walks several blocks of rows, 1 keeps the next `ahead` ones in registers, the
    first ones asked for before all else; more keep as many, but one, in shared memory. pdl: launched while the kernel
    before still runs (programmatic dependent launch), waiting for it on the chip, and the next one may do the same.
    stream: the state leaves the L2 cache first. early: a fused convolution's history is asked for before the state."""

    block_v: int
    splits: int
    num_warps: int
    stages: int = 3
    pdl: bool = False
    stream: bool = False
    ahead: int = 1
    early: bool = False

    def rows_a_load(self, row_bytes: int) -> int:
        """State rows of row_bytes that one 16-byte load of every thread fetches."""
        return 512 * self.num_warps // row_bytes

    def fits(self, rows: int, head_v_dim: int, row_bytes: int) -> bool:
        """rows: state rows of one query/key head."""
        block, at_once = self.block_v, self.rows_a_load(row_bytes)
        whole_heads = block % head_v_dim == 0 or head_v_dim % block == 0
        return whole_heads and block & (block - 1) == 0 and rows % (self.splits * block) == 0 and 0 < at_once <= block


@dataclass(frozen=True)
class PrefillConfig:
    """chunk_registers: bound on a thread's registers, for as many programs on a multiprocessor as fit without spills.
    block_v: value channels a program of the walk takes; walk_stages: chunks in shared memory at once.
    piece: tokens, whole chunks; a longer sequence is walked in pieces of at most so many at the same time, a shorter
    one as it is, however many sequences share the tokens that a table's row is for. 0: no sequence is cut.
    pdl: kernels are launched while the one before still runs (programmatic dependent launch)."""

    chunk_warps: int
    chunk_registers: int
    block_v: int
    walk_warps: int
    walk_stages: int
    piece: int = 0
    pdl: bool = False

    def piece_of(self, tokens: int) -> int:
        """Tokens of a piece where `tokens` are all there are: not less than an eighth, as each piece costs a step of
        the carry and is walked twice or, from the third one on, three times."""
        return max(self.piece, _piece(tokens, _MOST_PIECES)) if self.piece else _piece(tokens, 1)


_MOST_PIECES = 8


def _piece(tokens: int, pieces: int) -> int:
    """Whole chunks, so that `tokens` are so many pieces."""
    return 64 * -(-tokens // (64 * pieces))


@dataclass(frozen=True)
class PrepareConfig:
    """block_t: tokens a program takes; block_c: channels, whole heads, where it convolves too."""

    block_t: int
    num_warps: int
    block_c: int = 512


def case_of(
    num_k_heads: int, num_v_heads: int, head_size: int, state_dtype: torch.dtype, **more: bool | int | str
) -> Case:
    """The axes, tokens aside, by which tables of this family are keyed; gdn_decode adds fused_conv and multi_token."""
    return {
        "num_k_heads": num_k_heads,
        "num_v_heads": num_v_heads,
        "head_size": head_size,
        "state_dtype": str(state_dtype).removeprefix("torch."),
        **more,
    }


def prefill_case_of(
    num_k_heads: int, num_v_heads: int, head_size: int, state_dtype: torch.dtype, num_seqs: int
) -> Case:
    """The axes, tokens aside, of gdn_prefill's table: case_of's and how many sequences share the tokens."""
    return case_of(num_k_heads, num_v_heads, head_size, state_dtype, sequences=sequences_of(num_seqs))


def sequences_of(num_seqs: int) -> str:
    """One of SEQUENCES. Kernels that give every sequence its own programs need several to fill a chip, ours one."""
    return SEQUENCES[0 if num_seqs <= 1 else 1 if num_seqs <= 4 else 2]


def decode_config(case: Case, tokens: int, head_v_dim: int, device: torch.device) -> DecodeConfig:
    """Configuration of gdn_decode; tokens: rows of mixed_qkv."""
    tuned = _tuned("gdn_decode", DecodeConfig, case, tokens, device)
    # tables hold square states, as the models' are
    if tuned is not None and head_v_dim == case["head_size"]:
        return tuned
    rows, row_bytes = _decode_rows(case, head_v_dim)
    heads, sms = tokens * int(case["num_k_heads"]), arch.current_arch(device).sms
    states = heads * rows * row_bytes
    small = states < sms * 8 * 2048
    if case["fused_conv"] and not case["multi_token"]:
        # the prologue is paid once where there are programs enough without sharing a head
        if heads > sms and states > 16 << 20:
            shared = states <= 64 << 20
            splits = 2 if shared else 1
            walk = DecodeConfig(4096 // row_bytes, splits, 2, stages=1, pdl=True, stream=shared, ahead=2, early=True)
            if walk.fits(rows, head_v_dim, row_bytes):
                return walk
        block_v = min(16384 // row_bytes, head_v_dim)
        num_warps = min(4, block_v * row_bytes // 512)
        return DecodeConfig(block_v, 1 if heads > sms else rows // block_v, num_warps, stages=1, pdl=True, early=True)
    block_v = min((4096 if small or not case["multi_token"] else 8192) // row_bytes, head_v_dim)
    most_warps = 4 if small or case["multi_token"] else 2 if states < 16 << 20 else 1
    num_warps = max(1, min(most_warps, block_v * row_bytes // 512))
    return DecodeConfig(block_v, rows // block_v, num_warps, stages=1, pdl=not case["multi_token"])


def decode_search_space(case: Case, tokens: int, head_v_dim: int) -> list[DecodeConfig]:
    """Configurations of gdn_decode worth timing, all of them valid, a dozen at most for one token a sequence; tokens:
    rows of mixed_qkv.

    A block is num_warps x passes x 512 B. One block a program: from a kilobyte, for the shortest way through a small
    batch; with a fused convolution up to all rows of a head, which then needs no counters. Walks over several: small
    batches have too few programs for them. All are tried with pdl and early, the likeliest without one of them too;
    batches larger than the L2 cache with stream, which only loses from 64 MB of states on where walks are long.
    """
    rows, row_bytes = _decode_rows(case, head_v_dim)
    heads = tokens * int(case["num_k_heads"])
    states, wide = heads * rows * row_bytes, case["state_dtype"] == "float32"
    small, early = states <= 16 << 20, bool(case["fused_conv"] and not case["multi_token"])

    def config(warps: int, passes: int, splits: int = 0, stages: int = 1, ahead: int = 1) -> DecodeConfig:
        block_v = 512 * warps * passes // row_bytes
        return DecodeConfig(
            block_v, splits or max(1, rows // block_v), warps, stages, pdl=True, ahead=ahead, early=early
        )

    # (warps, passes), and for walks splits, stages and ahead
    shapes: list[tuple[int, ...]]
    streamed: list[tuple[int, ...]] = []
    if case["multi_token"]:
        shapes = [(1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (1, 2), (2, 2), (4, 2), (8, 2), (8, 4)]
        plain = shapes
    elif case["fused_conv"] and small:
        shapes = [(4, 8), (2, 8), (8, 8), (16, 8), (4, 4), (8, 4)]
        shapes += [(4, 8, 2), (8, 8, 1), (4, 4, 2, 1, 2)] if heads >= 64 else [(2, 4), (1, 8)]
        plain = shapes[:2]
    elif case["fused_conv"]:
        walks = [(2, 4, 1, 1, 2), (4, 4, 1, 1, 2), (2, 4, 2, 1, 2), (4, 4, 2, 1, 2)]
        if states <= 64 << 20:
            streamed, shapes = [*walks, (4, 8, 1), (4, 8)], [*walks[:2], (4, 8, 1, 3)]
            plain = [walks[2], walks[0], (4, 8)]
        else:
            # the one left out spills where the state is bf16
            streamed, shapes = [walks[0], (4, 8)], [*walks[:2], *walks[2 if wide else 3 :]]
            shapes += [(4, 8), (8, 8), (4, 8, 1), (4, 8, 1, 3)]
            plain = [walks[0], (4, 8)]
    elif small:
        shapes = [(1, 4), (2, 4), (1, 2), (2, 2), (4, 2), (4, 4), (1, 8)]
        shapes += [(8, 4), (2, 8)] if wide else [(8, 2), (4, 8)]
        plain = shapes[:2]
    else:
        shapes = [(1, 8), (1, 4), (2, 4), *([(1, 16)] if wide else [])]
        streamed = [*shapes, (2, 4, 1, 1, 2)]
        plain = shapes[:2]
    found = [replace(config(*shape), stream=True) for shape in streamed] + [config(*shape) for shape in shapes]
    if early:
        found += [replace(config(*s), early=False, stream=s in streamed and s not in shapes) for s in plain]
    else:
        found += [replace(config(*s), pdl=False, stream=s in streamed) for s in plain]
    return [c for c in dict.fromkeys(found) if c.fits(rows, head_v_dim, row_bytes)]


def _decode_rows(case: Case, head_v_dim: int) -> tuple[int, int]:
    """State rows of a query/key head, and a row's bytes."""
    rows = int(case["num_v_heads"]) // int(case["num_k_heads"]) * head_v_dim
    dtype: torch.dtype = getattr(torch, str(case["state_dtype"]))
    return rows, int(case["head_size"]) * dtype.itemsize


def prefill_config(case: Case, tokens: int, num_seqs: int, head_v_dim: int, device: torch.device) -> PrefillConfig:
    """Configuration of gdn_prefill."""
    tuned = _tuned("gdn_prefill", PrefillConfig, case, tokens, device)
    if tuned is not None:
        return tuned
    chip, heads = arch.current_arch(device), int(case["num_v_heads"])
    # of many sequences there are programs enough for twice the channels, which loads half; of a few one may be long
    wide = chip.sm < 100 and case["sequences"] == "many" and num_seqs * heads >= chip.sms
    block_v = min(128 if wide else 64, head_v_dim)
    piece = _piece_of(tokens, num_seqs, heads * (head_v_dim // block_v), chip.sms)
    return PrefillConfig(
        chunk_warps=4,
        chunk_registers=128,
        block_v=block_v,
        walk_warps=8 if chip.sm >= 100 or block_v > 64 else 4,
        walk_stages=2 if chip.sm >= 100 else 3,
        piece=piece,
        pdl=not piece,
    )


def _piece_of(tokens: int, num_seqs: int, programs: int, sms: int) -> int:
    """PrefillConfig's for sequences of one length, `programs` being those of one piece of one sequence.

    A first walk summarises all but the last one, for which all but the first take twice the programs. Its steps take
    some two thirds of the second's, so that two pieces save a sixth, and two of its programs fit a multiprocessor,
    one of the second walk's. Carrying the state on, from three pieces, costs as much as some chunks.
    """
    chunks = tokens // (64 * num_seqs)
    for pieces in range(min(chunks // 12, _MOST_PIECES), 1, -1):
        if num_seqs * programs * pieces <= sms:
            return _piece(-(-tokens // num_seqs), pieces)
    return 0


def prefill_search_space(case: Case, tokens: int, num_seqs: int, head_v_dim: int) -> list[PrefillConfig]:
    """Configurations of gdn_prefill worth timing for a case, none with spills inside the walk on the current chip.

    (block_v, walk_warps, walk_stages): programs of 64 channels; of 128, which halves what is loaded and gives a
    multiprocessor's schedulers two warps. One sequence is cut until the chip is full; a few, of which one may be far
    longer, into pieces of all tokens.
    """
    sms, heads = arch.current_arch().sms, int(case["num_v_heads"])
    walks = [(64, 8, 2)] if arch.current_arch().sm >= 100 else [(64, 4, 3), (128, 8, 3)]
    found = []
    for walk in walks:
        if head_v_dim % walk[0]:
            continue
        found.append(PrefillConfig(4, 128, *walk))
        programs = heads * (head_v_dim // walk[0])
        cuts = [n for n in (2, 3, 4, 6, 8) if n <= max(sms // programs, 2)][-2:] if num_seqs == 1 else [2, 4]
        cuts = [n for n in cuts if num_seqs <= 4 and tokens >= 64 * 4 * n]
        found += [PrefillConfig(4, 128, *walk, piece=_piece(tokens, n)) for n in cuts]
    return found + [replace(config, pdl=True) for config in found]


def prepare_config(conv: bool, tokens: int) -> PrepareConfig:
    """Configuration of gdn_prepare, with its convolution or without, and of the normalisation inside gdn_prefill."""
    if not conv:
        return PrepareConfig(block_t=16, num_warps=4)
    # a program reads three tokens before its own; few tokens are cut small, to be under way at once
    return PrepareConfig(block_t=16 if tokens <= 2048 else 32, num_warps=2)


def _tuned(op: str, kind: type[_Config], case: Case, tokens: int, device: torch.device) -> _Config | None:
    gpu = arch.current_gpu(device)
    table = None if gpu is None else tables.load("gdn", op, gpu)
    row = None if table is None else table.lookup(case, tokens)
    return None if gpu is None or row is None or not row.config else from_row(op, kind, row.config, gpu)


def from_row(op: str, kind: type[_Config], config: Mapping[str, Any], gpu: str) -> _Config:
    """A table row's config as `kind`. Raises: TableError when its fields are not those of `kind`."""
    try:
        return kind(**config)
    except TypeError as error:
        fix = f"run `blackwell-kernels bench --op {op} --write-dispatch` again"
        raise TableError(f"{tables.path_of('gdn', op, gpu)}: config {dict(config)}: {error}; {fix}") from None
