"""The Gated Delta Net operators: validate -> select -> allocate -> launch.

All write the tensors marked `!` in their schema and return nothing. `<op>_triton` is the CUDA implementation; it takes
an explicit `config` too, for tuning. vLLM's functions of the same meaning: causal_conv1d_update,
fused_sigmoid_gating_delta_rule_update, fused_recurrent_gated_delta_rule_packed_decode (gdn_decode);
causal_conv1d_fn, fused_post_conv_prep (gdn_prepare); chunk_gated_delta_rule (gdn_prefill).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from blackwell_kernels.common.launch import lasting, once, replayed
from blackwell_kernels.common.library import register_op
from blackwell_kernels.gdn import config as configs
from blackwell_kernels.gdn import cpu, validate


@replayed
def gdn_decode_triton(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool = True,
    conv_state: torch.Tensor | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    config: configs.DecodeConfig | None = None,
) -> None:
    """One token, or a speculative window of a few, for each sequence.

    mixed_qkv [N, 2 H K + HV V] bf16, q | k | v packed; a, b [N, HV], A_log, dt_bias [HV], bf16 or f32;
    state [slots, HV, V, K] bf16 or f32, updated in place, slots may be strided; out [N, HV, V] bf16.

    Without cu_seqlens: N sequences of one token, state_indices [N] i32.
    With cu_seqlens [B + 1]: sequence i has tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1.
      state_indices [B]: its one slot is read and written.
      state_indices [B, S]: at most S tokens each; the state after token t goes to slot state_indices[i, t]; the initial
      state comes from column num_accepted_tokens[i] - 1 (1 <= num_accepted_tokens <= S), column 0 when that is None.
    Rows of out behind the last sequence's are not written.

    With conv_weight [C, 4] (and conv_bias [C]) the tokens first pass the causal convolution and silu, rounded to bf16
    as a separate convolution would. conv_state [slots, rows, C], any strides; its slot is conv_state_indices[i], else
    state_indices[i] (its column 0). Rows are oldest first:
      num_accepted_tokens None: rows 0..2 are the three tokens before; afterwards the last three. Further rows are left.
      else, m = num_accepted_tokens[i] - 1 and n tokens: the three tokens before are rows m..m+2 (the step before left
      its two oldest tokens and then all it had drafted). Afterwards rows 0 and 1 are the old m+1 and m+2, rows 2..n+1
      the n tokens, further rows are left. So S + 2 rows are needed.

    A sequence whose initial slot (or convolution slot) is <= 0 is padding: out 0, nothing stored. A step whose slot is
    <= 0 is computed, not stored. A sequence of no tokens changes nothing. Two sequences must not share a slot; with a
    fused convolution not even in two pools, where their launches may overlap in time (on two streams of a GPU).

    Raises: UnsupportedInputError. On a GPU index contents are not checked; num_accepted_tokens is clamped to 1..S and
    tokens beyond S are dropped, so that wrong contents stay inside a sequence's own slots.
    """
    dims = validate.check_decode(
        mixed_qkv, a, b, A_log, dt_bias, state, state_indices, out, conv_state, conv_weight, conv_bias, cu_seqlens,
        num_accepted_tokens, conv_state_indices,
    )  # fmt: skip
    validate.check_triton_dims("gdn_decode", dims)
    if mixed_qkv.shape[0] == 0 or dims.num_seqs == 0:
        return
    if config is None:
        case = configs.case_of(
            dims.H, dims.HV, dims.K, state.dtype, fused_conv=conv_weight is not None, multi_token=cu_seqlens is not None
        )
        config = configs.decode_config(case, mixed_qkv.shape[0], dims.V, mixed_qkv.device)
    rows, row_bytes = dims.HV // dims.H * dims.V, dims.K * state.element_size()
    supported = "a power of two that divides V or is divided by it, no fewer rows than the threads load at once, and "
    supported += f"splits x block_v dividing the {rows} rows of a query/key head"
    fits = config.fits(rows, dims.V, row_bytes)
    validate.require(
        fits, "gdn_decode", f"{config} for V = {dims.V}", f"block_v {supported}", "correct the table's config"
    )

    from blackwell_kernels.gdn import decode

    conv_indices, arrivals, conv_layout, packed = None, None, [0] * 5, False
    if conv_state is not None and conv_weight is not None:
        conv_indices = conv_state_indices
        if conv_indices is None:
            conv_indices = state_indices if state_indices.dim() == 1 else state_indices[:, 0]
        conv_layout = [*conv_state.stride(), conv_weight.stride(0), conv_indices.stride(0)]
        packed = _packed(conv_weight)
        arrivals = _arrival_counters(conv_state.shape[0] * dims.H, conv_state.device)
        if arrivals is None:
            once()  # outside a capture they will be there
            config = replace(config, splits=1)
        else:
            lasting(arrivals)
    pdl = _overlaps(config)
    pointers = (
        mixed_qkv, a, b, A_log, dt_bias, state, state_indices, out, conv_state, conv_weight, conv_bias, conv_indices,
        arrivals,
    )  # fmt: skip
    constants = {
        "H": dims.H, "HV": dims.HV, "K": dims.K, "V": dims.V,
        "SPLITS": config.splits, "BV": config.block_v, "RW": config.rows_a_load(row_bytes), "PDL": pdl,
        "CONV": conv_weight is not None, "HAS_BIAS": conv_bias is not None, "PACKED": packed,
        "L2NORM": use_qk_l2norm, "num_warps": config.num_warps, "launch_pdl": pdl,
    }  # fmt: skip
    strides = (mixed_qkv.stride(0), a.stride(0), b.stride(0), state.stride(0), state_indices.stride(0))
    grid = (dims.num_seqs * dims.H * config.splits,)
    with torch.cuda.device_of(mixed_qkv):
        if cu_seqlens is None:
            decode.gdn_decode_kernel[grid](
                *pointers, scale, *strides, out.stride(0), *conv_layout, STAGES=config.stages,
                AHEAD=config.ahead, PAIRS=_in_pairs(state), EVICT="evict_first" if config.stream else "",
                THREADS=32 * config.num_warps, EARLY=config.early and _compiled(), **constants,
            )  # fmt: skip
        else:
            stride_step = state_indices.stride(1) if state_indices.dim() == 2 else 0
            decode.gdn_decode_steps_kernel[grid](
                *pointers, scale, cu_seqlens, num_accepted_tokens, *strides, stride_step, out.stride(0), *conv_layout,
                dims.max_steps, ACCEPTED=num_accepted_tokens is not None, **constants,
            )  # fmt: skip


def _overlaps(config: configs.DecodeConfig | configs.PrefillConfig) -> bool:
    """Whether launches overlap as the configuration says: Triton's interpreter runs one after the other."""
    return config.pdl and _compiled()


def _compiled() -> bool:
    """Whether kernels are compiled, not interpreted: inline assembly is there."""
    import triton

    return not triton.knobs.runtime.interpret


def _in_pairs(state: torch.Tensor) -> bool:
    """Whether two neighbours of a row are four aligned bytes."""
    return state.dtype == torch.bfloat16 and state.stride(0) % 2 == 0 and state.data_ptr() % 4 == 0


# by device, the last one in use: launches leave it zero. Graphs captured before it grew go on using the others
_arrivals: dict[torch.device, list[torch.Tensor]] = {}


def _arrival_counters(count: int, device: torch.device) -> torch.Tensor | None:
    """At least `count` zeros, int32; None where they would have to be allocated inside a capture."""
    known = _arrivals.setdefault(device, [])
    if not known or known[-1].numel() < count:
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            # for every stream from now on
            known.append(torch.zeros(count, dtype=torch.int32, device=device))
            torch.cuda.current_stream(device).synchronize()
        else:
            known.append(torch.zeros(count, dtype=torch.int32, device=device))
    return known[-1]


def _gdn_decode_cpu(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool = True,
    conv_state: torch.Tensor | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> None:
    optional = (conv_state, conv_weight, conv_bias, cu_seqlens, num_accepted_tokens, conv_state_indices)
    dims = validate.check_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, out, *optional)
    tokens, slots = mixed_qkv.shape[0], state.shape[0]
    validate.check_values(
        "gdn_decode", cu_seqlens, tokens, slots, state_indices,
        max_steps=dims.max_steps, num_accepted_tokens=num_accepted_tokens,
    )  # fmt: skip
    if conv_state is not None:
        conv_indices = state_indices[..., :1] if conv_state_indices is None else conv_state_indices
        validate.check_values("gdn_decode", None, tokens, conv_state.shape[0], conv_indices)
    cpu.gdn_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, out, scale, use_qk_l2norm, *optional)


@replayed
def gdn_prefill_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool = False,
    config: configs.PrefillConfig | None = None,
) -> None:
    """Whole (pieces of) sequences: q, k [T, H, K]; v, out [T, HV, V] bf16; g (log decay, <= 0), beta [T, HV] f32.

    state [slots, HV, V, K] bf16 or f32, updated in place, slots may be strided: sequence i starts from slot
    state_indices[i] (i32) where has_initial_state[i] (bool), else from zero, and leaves its final state there. A slot
    <= 0 is padding: zero initial state, nothing stored, out computed. A sequence of no tokens leaves its slot as it is.
    cu_seqlens [B + 1] i32 or i64 may start above 0; rows of out outside it are not written.
    Two sequences must not share a slot.

    Raises: UnsupportedInputError. On a GPU index contents are not checked.
    """
    dims = validate.check_prefill(q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, out)
    validate.check_triton_dims("gdn_prefill", dims)
    tokens, num_seqs, H, HV, K, V = q.shape[0], dims.num_seqs, dims.H, dims.HV, dims.K, dims.V
    if tokens == 0 or num_seqs == 0:
        return
    if config is None:
        config = configs.prefill_config(
            configs.prefill_case_of(H, HV, K, state.dtype, num_seqs), tokens, num_seqs, V, q.device
        )
    fits = V % config.block_v == 0
    validate.require(fits, "gdn_prefill", f"{config} for V = {V}", "block_v dividing V", "correct the table's config")

    from blackwell_kernels.gdn import prefill, prepare

    C = prefill.CHUNK.value
    chunks = tokens // C + num_seqs
    x = torch.empty(chunks, HV, 2, C, C, dtype=q.dtype, device=q.device)
    decays = torch.empty(chunks, HV, C, 2, dtype=torch.float32, device=q.device)
    piece, blocks, carry = config.piece_of(tokens), V // config.block_v, None
    places = tokens // piece + num_seqs
    if piece < tokens:
        carry = torch.empty(places, HV, V + K, K, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        if use_qk_l2norm:
            norm, rows = configs.prepare_config(False, tokens), tokens * H
            grid = (-(-rows // norm.block_t),)
            q_in, k_in = q, k
            q, k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
            for raw, unit in ((q_in, q), (k_in, k)):
                prepare.l2_normalise_kernel[grid](
                    raw, unit, raw.stride(0), raw.stride(1), rows, H=H, K=K, BT=norm.block_t, num_warps=norm.num_warps
                )
        pdl = dict.fromkeys(("PDL", "launch_pdl"), _overlaps(config))
        prefill.gdn_prefill_chunks_kernel[(chunks * HV,)](
            q, k, g, beta, cu_seqlens, x, decays, *q.stride()[:2], *k.stride()[:2], g.stride(0), beta.stride(0),
            num_seqs, H=H, HV=HV, K=K, num_warps=config.chunk_warps, maxnreg=config.chunk_registers, **pdl,
        )  # fmt: skip
        arguments = (
            q, k, v, x, decays, state, state_indices, has_initial_state, cu_seqlens, out, carry, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], state.stride(0),
            state_indices.stride(0), num_seqs, piece,
        )  # fmt: skip
        is_sorted = piece >= tokens and 1 < num_seqs <= prefill.MOST_SORTED
        constants = {"H": H, "HV": HV, "K": K, "V": V, "STAGES": config.walk_stages, "SORTED": is_sorted, **pdl}
        walk = {"BV": config.block_v, "num_warps": config.walk_warps, **constants}
        if piece >= tokens:
            prefill.gdn_prefill_walk_kernel[(num_seqs * HV * blocks,)](*arguments, blocks, PASS="whole", **walk)
            return
        # a summary needs so much less shared memory that two programs of half the channels fit a multiprocessor
        halves = 2 if config.block_v > 64 else 1
        block_v, several = config.block_v // halves, -(-tokens // piece) > 2
        parts = V // block_v + (-(-K // block_v) if several else 0)
        prefill.gdn_prefill_walk_kernel[(places * HV * parts,)](
            *arguments, parts, PASS="summary", BV=block_v, num_warps=config.walk_warps // halves, **constants
        )
        if several:
            prefill.gdn_prefill_carry_kernel[(num_seqs * HV * (V // block_v),)](
                carry, cu_seqlens, piece, HV=HV, K=K, V=V, BV=block_v, BK=min(K, 32), num_warps=4, **pdl
            )
        prefill.gdn_prefill_walk_kernel[(places * HV * blocks,)](*arguments, blocks, PASS="pieces", **walk)


def _gdn_prefill_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool = False,
) -> None:
    arguments = (q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, out)
    validate.check_prefill(*arguments)
    validate.check_values("gdn_prefill", cu_seqlens, q.shape[0], state.shape[0], state_indices)
    cpu.gdn_prefill(*arguments, scale, use_qk_l2norm)


@replayed
def gdn_prepare_triton(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    use_qk_l2norm: bool = True,
    conv_state: torch.Tensor | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    config: configs.PrepareConfig | None = None,
) -> None:
    """What stands before gdn_prefill: split, L2 norm (epsilon 1e-6 under the root), gates.

    mixed_qkv [T, 2 H K + HV V] bf16; a, b [T, HV], A_log, dt_bias [HV] bf16 or f32; written: q, k [T, H, K],
    v [T, HV, V] bf16, g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b) [T, HV] f32.

    With conv_weight [C, 4] (and conv_bias [C]; then conv_state, state_indices, has_initial_state and cu_seqlens too)
    mixed_qkv are whole (pieces of) sequences that first pass the causal convolution and silu, in the same launch.
    conv_state [slots, >= 3, C], any strides: rows 0..2 are the three tokens before the sequence, oldest first; read
    where has_initial_state[i] (else zero), afterwards the last three tokens; further rows are left. A slot <= 0 is
    padding: zero history, nothing stored, outputs computed. A sequence of no tokens leaves its slot as it is.
    cu_seqlens [B + 1] i32 or i64 may start above 0; rows of the outputs outside it are then not written.

    Raises: UnsupportedInputError.
    """
    conv = (conv_state, conv_weight, conv_bias, state_indices, has_initial_state, cu_seqlens)
    dims = validate.check_prepare(mixed_qkv, a, b, A_log, dt_bias, q, k, v, g, beta, *conv)
    validate.check_triton_dims("gdn_prepare", dims)
    tokens, H, HV, K, V = mixed_qkv.shape[0], dims.H, dims.HV, dims.K, dims.V
    if tokens == 0:
        return
    config = configs.prepare_config(conv_weight is not None, tokens) if config is None else config

    from blackwell_kernels.gdn import prepare

    strides = [x.stride(0) for x in (mixed_qkv, a, b, q, k, v, g, beta)]
    constants = {"H": H, "HV": HV, "K": K, "V": V, "BT": config.block_t, "L2NORM": use_qk_l2norm}
    with torch.cuda.device_of(mixed_qkv):
        if conv_state is None or conv_weight is None or state_indices is None:
            prepare.gdn_prepare_kernel[(-(-tokens // config.block_t), H + HV)](
                mixed_qkv, a, b, A_log, dt_bias, q, k, v, g, beta, *strides, tokens, num_warps=config.num_warps,
                **constants,
            )  # fmt: skip
            return
        blocks = 2 * -(-H * K // config.block_c) + -(-HV * V // config.block_c) + 1
        prepare.gdn_conv_prepare_kernel[((tokens // config.block_t + dims.num_seqs) * blocks,)](
            mixed_qkv, a, b, A_log, dt_bias, q, k, v, g, beta, conv_weight, conv_bias, conv_state, state_indices,
            has_initial_state, cu_seqlens, *strides, conv_weight.stride(0), *conv_state.stride(),
            state_indices.stride(0), dims.num_seqs, GATES=1 << (HV - 1).bit_length(), BC=config.block_c,
            HAS_BIAS=conv_bias is not None, PACKED=_packed(conv_weight), num_warps=config.num_warps, **constants,
        )  # fmt: skip


def _packed(conv_weight: torch.Tensor) -> bool:
    """Whether the four weights of a channel are eight aligned bytes."""
    return conv_weight.dtype == torch.bfloat16 and conv_weight.stride(0) == 4 and conv_weight.data_ptr() % 8 == 0


def _gdn_prepare_cpu(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    use_qk_l2norm: bool = True,
    conv_state: torch.Tensor | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    gates, outputs = (a, b, A_log, dt_bias), (q, k, v, g, beta)
    conv = (conv_state, conv_weight, conv_bias, state_indices, has_initial_state, cu_seqlens)
    validate.check_prepare(mixed_qkv, *gates, *outputs, *conv)
    if conv_state is None or conv_weight is None or state_indices is None or cu_seqlens is None:
        cpu.gdn_prepare(mixed_qkv, *gates, *outputs, use_qk_l2norm)
        return
    assert has_initial_state is not None
    validate.check_values("gdn_prepare", cu_seqlens, len(mixed_qkv), len(conv_state), state_indices)
    if len(mixed_qkv) and len(state_indices):
        sequences = (state_indices, has_initial_state, cu_seqlens)
        rows = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
        convolved = cpu.causal_conv(mixed_qkv, conv_weight, conv_bias, conv_state, *sequences)
        q, k, v, g, beta = (x[rows] for x in outputs)
        cpu.gdn_prepare(convolved, a[rows], b[rows], A_log, dt_bias, q, k, v, g, beta, use_qk_l2norm)


gdn_decode = register_op(
    "gdn_decode(Tensor mixed_qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, "
    "Tensor state_indices, Tensor(b!) out, *, float scale, bool use_qk_l2norm=True, Tensor(c!)? conv_state=None, "
    "Tensor? conv_weight=None, Tensor? conv_bias=None, Tensor? cu_seqlens=None, Tensor? num_accepted_tokens=None, "
    "Tensor? conv_state_indices=None) -> ()",
    cpu=_gdn_decode_cpu,
    cuda=gdn_decode_triton,
)
gdn_prefill = register_op(
    "gdn_prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor state_indices, "
    "Tensor has_initial_state, Tensor cu_seqlens, Tensor(b!) out, *, float scale, bool use_qk_l2norm=False) -> ()",
    cpu=_gdn_prefill_cpu,
    cuda=gdn_prefill_triton,
)
gdn_prepare = register_op(
    "gdn_prepare(Tensor mixed_qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) q, Tensor(b!) k, "
    "Tensor(c!) v, Tensor(d!) g, Tensor(e!) beta, *, bool use_qk_l2norm=True, Tensor(f!)? conv_state=None, "
    "Tensor? conv_weight=None, Tensor? conv_bias=None, Tensor? state_indices=None, Tensor? has_initial_state=None, "
    "Tensor? cu_seqlens=None) -> ()",
    cpu=_gdn_prepare_cpu,
    cuda=gdn_prepare_triton,
)
