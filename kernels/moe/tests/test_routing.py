"""Both routings, CPU and Triton, against the reference: ids exactly, weights to float32 rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blackwell_kernels.errors import UnsupportedInputError
from blackwell_kernels.moe import op, reference

ON_GPU = torch.cuda.is_available()
# exp, reciprocal, product and a sum of up to 64 weights, a few units in the last place each
WEIGHTS_RTOL = 16 * torch.finfo(torch.float32).eps


def many_rows(impl):
    """The interpreter takes milliseconds a pick."""
    return 10 if impl.name == "triton" and not ON_GPU else 1000


def random_logits(tokens, experts, dtype=torch.float32, seed=0, spread=2.0):
    return (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def assert_softmax(impl, logits, topk, renormalize=True):
    weights, ids = impl.softmax_topk(logits, topk, renormalize)
    want_weights, want_ids = reference.moe_softmax_topk(logits, topk, renormalize)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=WEIGHTS_RTOL, atol=1e-37)


def decided(logits, bias, topk, n_group, topk_group):
    """Rows whose selection does not hang on the last bits of a sigmoid: candidates next to each other in score order
    are equal bit for bit because their logits and biases are, or further apart than any good sigmoid errs."""
    scores = logits.double().sigmoid() + (0 if bias is None else bias.double())
    margin = 2.0**-20
    groups = (
        scores.view(len(logits), n_group, scores.shape[1] // n_group)
        .topk(2)
        .values.sum(-1)
        .sort(-1, descending=True)
        .values
    )
    clear = torch.ones(len(logits), dtype=torch.bool)
    if topk_group < n_group:
        gap = groups[:, topk_group - 1] - groups[:, topk_group]
        clear &= (gap == 0) | (gap > margin)
    ordered = scores.sort(-1, descending=True).values
    gaps = ordered[:, :-1] - ordered[:, 1:]
    return clear & ((gaps == 0) | (gaps > margin)).all(-1)


def assert_grouped(impl, logits, bias, topk, n_group, topk_group, renormalize=True, factor=1.0, least_decided=0.5):
    weights, ids = impl.grouped_topk(logits, bias, topk, n_group, topk_group, renormalize, factor)
    want_weights, want_ids = reference.moe_grouped_topk(logits, bias, topk, n_group, topk_group, renormalize, factor)
    rows = decided(logits.float(), bias, topk, n_group, topk_group)
    assert rows.float().mean() >= least_decided if len(rows) else True
    assert torch.equal(ids[rows], want_ids[rows])
    torch.testing.assert_close(weights[rows], want_weights[rows], rtol=WEIGHTS_RTOL, atol=0)
    # an undecided row must still be a selection: distinct, in range, of scores next to the reference's
    scores = logits.float().sigmoid() + (0 if bias is None else bias.float())
    assert all(len(set(row)) == topk for row in ids.tolist())
    picked, wanted = scores.gather(1, ids.long()), scores.gather(1, want_ids.long())
    torch.testing.assert_close(picked[~rows], wanted[~rows], rtol=0, atol=2.0**-19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "topk"), [(512, 10), (60, 4), (8, 8), (1, 1), (129, 17)])
def test_softmax(impl, experts, topk, renormalize, dtype):
    assert_softmax(impl, random_logits(many_rows(impl), experts, dtype), topk, renormalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "topk"), [(256, 8, 4, 8), (96, 6, 2, 5), (40, 5, 5, 12), (16, 1, 1, 16)]
)
def test_grouped(impl, experts, n_group, topk_group, topk, bias_dtype, dtype):
    logits = random_logits(many_rows(impl), experts, dtype)
    bias = None if bias_dtype is None else random_logits(1, experts, bias_dtype, seed=1, spread=0.2)[0]
    # bf16 logits tie often and then hang on the bias' last bits less
    assert_grouped(impl, logits, bias, topk, n_group, topk_group, True, 2.5)
    assert_grouped(impl, logits, bias, topk, n_group, topk_group, False, 1.0)


def test_the_most_picks(impl):
    assert_softmax(impl, random_logits(2, 129), 64)
    assert_grouped(impl, random_logits(2, 128), None, 64, 4, 3, least_decided=0)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_rows(impl, tokens):
    assert_softmax(impl, random_logits(tokens, 24), 3)
    assert_grouped(impl, random_logits(tokens, 24), None, 3, 4, 2, least_decided=0)


def test_equal_scores_go_to_the_lower_index(impl):
    logits = torch.zeros(4, 64)
    logits[1] = -3.0
    logits[2, 40:] = 1.0
    logits[3, ::2] = -0.0  # equals +0.0
    weights, ids = impl.softmax_topk(logits, 6)
    assert ids.tolist() == [list(range(6)), list(range(6)), list(range(40, 46)), list(range(6))]
    torch.testing.assert_close(weights, torch.full((4, 6), 1 / 6), rtol=WEIGHTS_RTOL, atol=0)
    # groups of 8: all equal keeps groups 0 and 1; row 2 keeps groups 5 and 6
    _, ids = impl.grouped_topk(logits, None, 12, 8, 2)
    first = list(range(12))
    assert ids.tolist() == [first, first, list(range(40, 52)), first]


def test_ties_on_a_coarse_grid(impl):
    """Most rows have ties at the border of the selection."""
    logits = random_logits(many_rows(impl), 64, seed=3, spread=1.0).round()
    bias = torch.zeros(64)
    border = logits.sort(-1, descending=True).values
    assert (border[:, 5] == border[:, 6]).float().mean() > 0.5
    assert_softmax(impl, logits, 6)
    assert_grouped(impl, logits, bias, 6, 8, 3, least_decided=1.0)


def test_bias_chooses_but_does_not_weigh(impl):
    logits = torch.zeros(1, 16)
    logits[0, 3] = 2.0
    bias = torch.zeros(16)
    bias[12] = 5.0
    weights, ids = impl.grouped_topk(logits, bias, 2, 4, 2, False, 2.0)
    assert ids.tolist() == [[12, 3]]
    torch.testing.assert_close(weights, 2 * logits.sigmoid()[:, [12, 3]], rtol=WEIGHTS_RTOL, atol=0)


def test_a_group_scores_by_its_two_best(impl):
    """Group 0 has the best expert, group 1 the better pair."""
    logits = torch.full((1, 8), -4.0)
    logits[0, 0], logits[0, 4], logits[0, 5] = 3.0, 2.0, 2.0
    _, ids = impl.grouped_topk(logits, None, 2, 2, 1)
    assert ids.tolist() == [[4, 5]]


def test_large_logits_keep_their_precision(impl):
    logits = 1e4 + random_logits(many_rows(impl), 64)
    assert_softmax(impl, logits, 6)
    assert_softmax(impl, -logits, 6, renormalize=False)


def test_rows_without_a_softmax_get_the_first_ids_and_no_weight(impl):
    logits = random_logits(5, 20)
    logits[0, 7], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 1:] = -math.inf
    for renormalize in (True, False):
        weights, ids = impl.softmax_topk(logits, 4, renormalize)
        assert ids[:3].tolist() == [[0, 1, 2, 3]] * 3
        assert weights[:3].tolist() == [[0.0] * 4] * 3
        # -inf alone is an ordinary logit of probability 0
        assert ids[3].tolist() == [0, 1, 2, 3]
        assert weights[3].tolist() == [1.0, 0.0, 0.0, 0.0]
        assert_softmax(impl, logits, 4, renormalize)


def test_nan_scores_are_never_preferred(impl):
    logits = random_logits(3, 16)
    logits[0, 5], logits[1] = math.nan, math.nan
    bias = torch.zeros(16)
    weights, ids = impl.grouped_topk(logits, bias, 8, 4, 2)
    assert 5 not in ids[0].tolist() or weights[0][ids[0] == 5].item() == 0
    assert ids[1].tolist() == list(range(8))
    assert weights[1].tolist() == [0.0] * 8
    want_weights, want_ids = reference.moe_grouped_topk(logits, bias, 8, 4, 2)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=WEIGHTS_RTOL, atol=0)


def test_a_row_stride_beyond_the_experts(impl):
    wide = torch.full((6, 80), math.nan)
    wide[:, :64] = random_logits(6, 64)
    assert_softmax(impl, wide[:, :64], 5)
    assert_grouped(impl, wide[:, :64], None, 5, 8, 3)


ROUTINGS = st.tuples(
    st.integers(0, 5),  # tokens
    st.integers(1, 6),  # groups
    st.integers(2, 20),  # experts a group
    st.integers(0, 2**31),  # seed
    st.booleans(),  # renormalise
    st.booleans(),  # coarse grid: ties
)


def check_routing(impl, drawn, topk_share):
    tokens, n_group, members, seed, renormalize, coarse = drawn
    logits = random_logits(tokens, n_group * members, seed=seed)
    logits = logits.round() if coarse else logits
    topk = max(1, min(64, round(topk_share * n_group * members)))
    assert_softmax(impl, logits, topk, renormalize)
    topk_group = max(1, -(-topk // members))
    bias = random_logits(1, n_group * members, seed=seed + 1)[0] if seed % 2 else None
    if coarse and bias is not None:
        bias = bias.round()
    assert_grouped(impl, logits, bias, topk, n_group, topk_group, renormalize, 2.5, least_decided=0)


def test_groups_and_members_that_are_no_powers_of_two(impl):
    for n_group, members in ((3, 10), (5, 7), (6, 20)):
        for seed in range(4):
            check_routing(impl, (3, n_group, members, seed, False, False), 0.0)


@settings(max_examples=300)
@given(drawn=ROUTINGS, topk_share=st.floats(0, 1))
def test_fuzz_cpu(cpu_impl, drawn, topk_share):
    check_routing(cpu_impl, drawn, topk_share)


# on a GPU nearly every example is a compilation: the number of experts and picks are constants of the kernels
@settings(max_examples=40 if ON_GPU else 25)
@given(drawn=ROUTINGS, topk_share=st.floats(0, 1 if ON_GPU else 0.1))
def test_fuzz_triton(triton_impl, drawn, topk_share):
    check_routing(triton_impl, drawn, topk_share)


def outputs(tokens=3, topk=2):
    return torch.empty(tokens, topk), torch.empty(tokens, topk, dtype=torch.int32)


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (torch.zeros(3, 8, dtype=torch.float64), True, *outputs()), r"router_logits of dtype bfloat16"),
        (lambda: (torch.zeros(8), True, *outputs()), r"router_logits of shape \[\*, \*\]"),
        (lambda: (torch.zeros(8, 3).T, True, *outputs()), r"last stride 1"),
        (lambda: (torch.zeros(3, 8), True, *outputs(4)), r"topk_weights of shape \[3, \*\]"),
        (lambda: (torch.zeros(3, 8), True, torch.empty(3, 2), torch.empty(3, 2)), r"topk_ids of dtype int32"),
        (lambda: (torch.zeros(3, 8), True, outputs()[0], outputs(3, 3)[1]), r"topk_ids of shape \[3, 2\]"),
        (lambda: (torch.zeros(3, 8), True, *outputs(3, 9)), r"top-9 of 8 experts; supported: top-1 to top-8"),
        (lambda: (torch.zeros(3, 8), True, *outputs(3, 0)), r"top-0 of 8 experts"),
        (lambda: (torch.zeros(3, 2048), True, *outputs()), r"2048 experts.*supported: 1 to 1024"),
        (lambda: (torch.zeros(3, 8), True, torch.empty(2, 3).T, outputs()[1]), r"contiguous topk_weights"),
    ],
)
def test_softmax_errors(name, arguments, message):
    with pytest.raises(UnsupportedInputError, match=message):
        getattr(op, f"moe_softmax_topk_{name}")(*arguments())


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("bias", "n_group", "topk_group", "topk", "message"),
    [
        (None, 3, 1, 2, r"n_group = 3 for 8 experts"),
        (None, 0, 1, 2, r"n_group = 0 for 8 experts"),
        (None, 8, 4, 2, r"groups of 2 or more"),
        (None, 4, 5, 2, r"topk_group = 5 of n_group = 4"),
        (None, 4, 0, 2, r"topk_group = 0 of n_group = 4"),
        (None, 4, 1, 3, r"top-3 from 1 groups of 2 experts; supported: at most top-2"),
        (torch.zeros(7), 4, 2, 2, r"bias of shape \[8\]"),
        (torch.zeros(8, dtype=torch.float64), 4, 2, 2, r"bias of dtype"),
    ],
)
def test_grouped_errors(name, bias, n_group, topk_group, topk, message):
    with pytest.raises(UnsupportedInputError, match=message):
        getattr(op, f"moe_grouped_topk_{name}")(
            torch.zeros(3, 8), bias, n_group, topk_group, True, 1.0, *outputs(3, topk)
        )


def test_opcheck():
    logits, bias = random_logits(3, 16), torch.zeros(16)
    grouped = torch.ops.blackwell_kernels.moe_grouped_topk.default
    softmax = torch.ops.blackwell_kernels.moe_softmax_topk.default
    torch.library.opcheck(grouped, (logits, bias, 4, 2, True, 2.5, *outputs()))
    torch.library.opcheck(grouped, (logits, None, 4, 2, True, 2.5, *outputs()))
    torch.library.opcheck(softmax, (logits, True, *outputs()))
