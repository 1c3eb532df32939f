"""Our GDN core against vLLM's own, run from its released source over torch stand-ins, for every kind of batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels import gdn as _operators  # noqa: F401  registers them
from blackwell_kernels import status
from blackwell_kernels.model_patches import gdn
from blackwell_kernels.select import Policy

_spec = importlib.util.spec_from_file_location("gdn_stock", Path(__file__).with_name("gdn_stock.py"))
assert _spec is not None
stock: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stock)  # type: ignore[union-attr]

VERSIONS = ("0.24.0", "0.32.0", "0.33.0")
OURS, STOCK = Policy("triton", "ours"), Policy("stock", "stock")
UP_TO_2 = Policy("mixed", "ours up to 2 tokens", (2, 4), (True, False))
LAYER = "model.layers.0.linear_attn"


class World:
    """One released vLLM's layer and metadata, and a forward context for both cores."""

    def __init__(self, sources: Path, version: str, extract: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        root = sources / f"vllm-{version}" / "vllm"
        self.batch: dict[str, Any] = {}
        context = SimpleNamespace(attn_metadata=self.batch)
        spaces = {
            **stock.NAMESPACE,
            "get_forward_context": lambda: context,
            "dataclass": __import__("dataclasses").dataclass,
        }
        extract(root / "v1/attention/backends/gdn_attn.py", {"GDNAttentionMetadata": None}, spaces)
        methods = ["_forward_core", "_forward_core_decode_non_spec", "rearrange_mixed_qkv"]
        extract(
            root / "model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py",
            {"QwenGatedDeltaNetAttention": methods},
            spaces,
        )
        self.metadata, self.base = spaces["GDNAttentionMetadata"], spaces["QwenGatedDeltaNetAttention"]
        monkeypatch.setattr(gdn, "step_metadata", lambda: self.batch)
        monkeypatch.setattr(gdn, "_on_cpu", lambda: False)
        monkeypatch.setattr(gdn, "policies", lambda layer: layer.chosen)
        self.monkeypatch = monkeypatch

    def layers(
        self, chosen: tuple[Policy, Policy, Policy], spec_rows: int = 0, many: Policy | None = None
    ) -> tuple[Any, Any]:
        """A stock layer and ours, with equal weights and caches. `many`: prefill's policy from five sequences on."""
        theirs, cls = self.base(), gdn.layer_class(self.base)
        ours = cls.__new__(cls)
        for layer in (theirs, ours):
            stock.prepare_layer(layer, spec_rows=spec_rows)
        decode, prefill, draft = chosen
        ours.chosen = decode, gdn.Prefill({"one": prefill, "few": prefill, "many": many or prefill}), draft
        self.monkeypatch.setattr(self.base, "__init__", lambda self: None)
        ours.__init__()
        return theirs, ours

    def run(self, layer: Any, metadata: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.batch.clear()
        self.batch[LAYER] = metadata
        mixed_qkv, b, a = (tensor.clone() for tensor in inputs)
        out = torch.zeros(mixed_qkv.shape[0], stock.HV, stock.D, dtype=torch.bfloat16)
        layer._forward_core(mixed_qkv, b, a, out)
        assert self.batch == {LAYER: metadata}, "the step's metadata is put back"
        return out


@pytest.fixture
def world(request: pytest.FixtureRequest, sources: Path, extract: Any, monkeypatch: pytest.MonkeyPatch) -> World:
    status.reset()
    return World(sources, getattr(request, "param", "0.24.0"), extract, monkeypatch)


def inputs(tokens: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    r = torch.Generator().manual_seed(seed)
    sizes = (stock.CHANNELS, stock.HV, stock.HV)
    return tuple(torch.randn(tokens, n, generator=r).to(torch.bfloat16) for n in sizes)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plain(world: World, decodes: int, lens: list[int], started: list[bool], padding: int = 0) -> Any:
    """Metadata as 0.24's builder makes it for a batch without drafts."""
    all_lens = [1] * decodes + lens
    slots = ints(*range(1, len(all_lens) + 1), *[0] * padding)
    cu = ints(0, *torch.tensor(all_lens).cumsum(0).tolist())
    fields: dict[str, Any] = {}
    if lens:
        initial = torch.tensor([True] * decodes + started)
        lists = stock.programs(all_lens)
        fields = {
            "has_initial_state": initial,
            "prefill_query_start_loc": cu[decodes:] - decodes,
            "prefill_state_indices": slots[decodes:],
            "prefill_has_initial_state": initial[decodes:],
            "nums_dict": {8: lists},
            "batch_ptr": lists["batch_ptr"],
            "token_chunk_offset_ptr": lists["token_chunk_offset_ptr"],
        }
    return world.metadata(
        num_prefills=len(lens),
        num_prefill_tokens=sum(lens),
        num_decodes=decodes,
        num_decode_tokens=decodes,
        num_spec_decodes=0,
        num_spec_decode_tokens=0,
        num_actual_tokens=sum(all_lens) + padding,
        non_spec_query_start_loc=cu,
        non_spec_state_indices_tensor=slots,
        **fields,
    )


def drafts(world: World, lens: list[int], accepted: list[int], others: list[int], started: list[bool]) -> Any:
    """A batch with draft tokens: sequences with drafts and others alternate, as they may after reordering."""
    order, spec_lens, other_lens = [], list(lens), list(others)
    while spec_lens or other_lens:
        if other_lens:
            order += [False] * other_lens.pop(0)
        if spec_lens:
            order += [True] * spec_lens.pop(0)
    mask = torch.tensor(order)
    width = max(lens)
    n = len(lens)
    slots = torch.arange(1, n * width + 1, dtype=torch.int32).view(n, width)
    fields: dict[str, Any] = {}
    if others:
        lists = stock.programs(others)
        cu, other_slots = (
            ints(0, *torch.tensor(others).cumsum(0).tolist()),
            ints(*range(n * width + 1, n * width + 1 + len(others))),
        )
        fields = {
            "has_initial_state": torch.tensor(started),
            "prefill_has_initial_state": torch.tensor(started),
            "non_spec_query_start_loc": cu,
            "prefill_query_start_loc": cu,
            "non_spec_state_indices_tensor": other_slots,
            "prefill_state_indices": other_slots,
            "nums_dict": {8: lists},
            "batch_ptr": lists["batch_ptr"],
            "token_chunk_offset_ptr": lists["token_chunk_offset_ptr"],
        }
    return world.metadata(
        num_prefills=len(others),
        num_prefill_tokens=sum(others),
        num_decodes=0,
        num_decode_tokens=0,
        num_spec_decodes=n,
        num_spec_decode_tokens=sum(lens),
        num_actual_tokens=len(order),
        spec_query_start_loc=ints(0, *torch.tensor(lens).cumsum(0).tolist()),
        spec_state_indices_tensor=slots,
        spec_sequence_masks=torch.ones(n, dtype=torch.bool),
        spec_token_indx=mask.nonzero()[:, 0],
        non_spec_token_indx=(~mask).nonzero()[:, 0],
        num_accepted_tokens=ints(*accepted),
        **fields,
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # outputs are about 2e-3, states 8e-2: one bf16 rounding apart at most, here and there
    torch.testing.assert_close(actual.float(), expected.float(), atol=2e-4, rtol=1e-2)


def same_layers(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.kv_cache[0], theirs.kv_cache[0]), "convolution history"
    close(ours.kv_cache[1], theirs.kv_cache[1])


def counted() -> dict[tuple[str, str, str], int]:
    return {(c["op"], c["impl"], c["phase"]): c["tokens"] for c in status.snapshot()["counts"]}


@pytest.mark.parametrize("world", VERSIONS, indirect=True)
@pytest.mark.parametrize(
    ("decodes", "lens", "started"),
    [(3, [], []), (0, [70, 9], [False, True]), (2, [5, 66], [True, False]), (1, [2], [False])],
    ids=["decode", "prefill", "mixed", "short"],
)
@pytest.mark.parametrize("decode", [OURS, STOCK], ids=["decode-ours", "decode-stock"])
@pytest.mark.parametrize("prefill", [OURS, STOCK], ids=["prefill-ours", "prefill-stock"])
def test_each_half_by_its_policy(
    world: World, decodes: int, lens: list[int], started: list[bool], decode: Policy, prefill: Policy
) -> None:
    theirs, ours = world.layers((decode, prefill, OURS))
    metadata = plain(world, decodes, lens, started)
    x = inputs(metadata.num_actual_tokens)
    close(world.run(ours, metadata, x), world.run(theirs, metadata, x))
    same_layers(ours, theirs)
    phase = "mixed" if decodes and lens else "decode" if decodes else "prefill"
    expected = {}
    if decodes:
        expected["gdn_decode", decode.impl, phase] = decodes
    if lens:
        expected["gdn_prefill", prefill.impl, phase] = sum(lens)
    assert counted() == expected


@pytest.mark.parametrize("padding", [0, 3], ids=["whole", "padded"])
@pytest.mark.parametrize(("decodes", "lens"), [(3, []), (0, [9, 4]), (2, [9, 4])], ids=["decode", "prefill", "mixed"])
def test_steps_without_drafts_leave_the_rows_of_drafts_alone(
    world: World, decodes: int, lens: list[int], padding: int
) -> None:
    """With speculative decoding a history has a row more for each draft; an eager step has rows behind the batch."""
    theirs, ours = world.layers((OURS, OURS, OURS), spec_rows=2)
    before = ours.kv_cache[0].clone()
    metadata = plain(world, decodes, lens, [True, False])
    x = inputs(metadata.num_actual_tokens + padding)
    out = world.run(ours, metadata, x)
    close(out, world.run(theirs, metadata, x))
    assert not out[metadata.num_actual_tokens :].any()
    same_layers(ours, theirs)
    assert torch.equal(ours.kv_cache[0][:, 3:], before[:, 3:])
    assert not torch.equal(ours.kv_cache[0][:, :3], before[:, :3])


def test_padding_rows_of_a_captured_graph_stay_zero(world: World) -> None:
    theirs, ours = world.layers((OURS, OURS, OURS))
    metadata = plain(world, 3, [], [], padding=5)
    x = inputs(8)
    out = world.run(ours, metadata, x)
    close(out[:3], world.run(theirs, metadata, x)[:3])
    assert not out[3:].any()
    same_layers(ours, theirs)


def test_two_steps_in_a_row_share_no_cut_metadata(world: World) -> None:
    theirs, ours = world.layers((OURS, STOCK, OURS))
    for seed, lens in ((1, [9, 20]), (2, [12])):
        metadata = plain(world, 2, lens, [True] * len(lens))
        x = inputs(metadata.num_actual_tokens, seed)
        close(world.run(ours, metadata, x), world.run(theirs, metadata, x))
        same_layers(ours, theirs)


@pytest.mark.parametrize(("prefill", "stock_warms_up"), [(OURS, False), (UP_TO_2, True), (STOCK, True)])
def test_profile_run_compiles_what_will_run(
    world: World, monkeypatch: pytest.MonkeyPatch, prefill: Policy, stock_warms_up: bool
) -> None:
    _, ours = world.layers((OURS, prefill, OURS), spec_rows=2)
    monkeypatch.setattr(gdn, "_warmed", set())
    monkeypatch.setattr(gdn, "_WARM_DECODES", (1, 4))
    monkeypatch.setattr(gdn, "_WARM_PREFILLS", ((1, 1), (70, 2)))
    called: list[Any] = []
    for name in ("decode", "draft", "prefill"):
        real = getattr(gdn._Step, name)

        def spied(self: Any, *args: Any, name: str = name, real: Any = real) -> None:
            called.append((name, self.mixed_qkv.shape[0]))
            real(self, *args)

        monkeypatch.setattr(gdn._Step, name, spied)
    stock_called: list[Any] = []
    ours._warmup_prefill_kernels = lambda *args: stock_called.append(args)
    before = [cache.clone() for cache in ours.kv_cache]
    monkeypatch.setattr(gdn, "step_metadata", lambda: None)
    x, out = inputs(5), torch.zeros(5, stock.HV, stock.D, dtype=torch.bfloat16)
    # stock finds no metadata in the forward context either
    no_metadata = SimpleNamespace(attn_metadata=None)
    monkeypatch.setitem(world.base._forward_core.__globals__, "get_forward_context", lambda: no_metadata)
    for _ in range(2):
        ours._forward_core(*x, out)
    assert bool(stock_called) == stock_warms_up
    once = [("decode", 1), ("draft", 3), ("decode", 4), ("draft", 12), ("prefill", 1), ("prefill", 70)]
    assert called == ([] if prefill is STOCK else once)
    assert all(torch.equal(a, b) for a, b in zip(ours.kv_cache, before, strict=True))
    assert counted() == {}


def test_the_policy_is_asked_with_each_halfs_tokens(world: World) -> None:
    _, ours = world.layers((UP_TO_2, UP_TO_2, UP_TO_2))
    metadata = plain(world, 2, [5], [False])
    world.run(ours, metadata, inputs(7))
    assert counted() == {("gdn_decode", "triton", "mixed"): 2, ("gdn_prefill", "stock", "mixed"): 5}


@pytest.mark.parametrize(("lengths", "impl"), [([9], "triton"), ([2, 3, 1, 3], "triton"), ([2, 1, 2, 3, 1], "stock")])
def test_prefills_policy_goes_by_the_number_of_sequences(world: World, lengths: list[int], impl: str) -> None:
    theirs, ours = world.layers((OURS, OURS, OURS), many=STOCK)
    metadata = plain(world, 2, lengths, [False] * len(lengths))
    x = inputs(11)
    close(world.run(ours, metadata, x), world.run(theirs, metadata, x))
    assert counted() == {("gdn_decode", "triton", "mixed"): 2, ("gdn_prefill", impl, "mixed"): 9}


@pytest.mark.parametrize("world", VERSIONS, indirect=True)
@pytest.mark.parametrize("accepted", [[1, 3, 2], [2, 1, 1]])
def test_drafts(world: World, accepted: list[int]) -> None:
    theirs, ours = world.layers((OURS, OURS, OURS), spec_rows=2)
    metadata = drafts(world, [3, 3, 2], accepted, [], [])
    x = inputs(8)
    close(world.run(ours, metadata, x), world.run(theirs, metadata, x))
    same_layers(ours, theirs)
    assert counted() == {("gdn_decode", "triton", "spec"): 8}


@pytest.mark.parametrize("world", ["0.32.0", "0.33.0"], indirect=True)
def test_drafts_beside_prefills(world: World) -> None:
    theirs, ours = world.layers((OURS, OURS, OURS), spec_rows=2)
    metadata = drafts(world, [3, 2], [3, 1], [1, 17], [True, False])
    x = inputs(metadata.num_actual_tokens)
    close(world.run(ours, metadata, x), world.run(theirs, metadata, x))
    same_layers(ours, theirs)
    assert counted() == {("gdn_decode", "triton", "spec"): 5, ("gdn_prefill", "triton", "spec"): 18}


def test_drafts_beside_prefills_where_stock_is_wrong(
    sources: Path, extract: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.24 gives the drafts the gates of the batch's first tokens: ours must equal 0.32 instead."""
    results = {}
    for version in ("0.24.0", "0.32.0"):
        world = World(sources, version, extract, monkeypatch)
        theirs, ours = world.layers((STOCK, UP_TO_2, UP_TO_2), spec_rows=2)
        metadata = drafts(world, [3, 2], [3, 1], [4, 17], [True, False])
        x = inputs(metadata.num_actual_tokens)
        results[version] = world.run(ours, metadata, x), world.run(theirs, metadata, x)
    close(results["0.24.0"][0], results["0.32.0"][1])
    wrong = (results["0.24.0"][1] - results["0.32.0"][1]).float().abs().max()
    assert wrong > 0.01, "vLLM 0.24 is right here: this rule can go"


def test_drafts_stay_with_stock_when_an_operator_is_off(world: World) -> None:
    theirs, ours = world.layers((STOCK, OURS, STOCK), spec_rows=2)
    metadata = drafts(world, [3, 2], [3, 1], [4], [True])
    x = inputs(metadata.num_actual_tokens)
    assert torch.equal(world.run(ours, metadata, x), world.run(theirs, metadata, x))
    assert counted() == {("gdn_decode", "stock", "spec"): 5, ("gdn_prefill", "stock", "spec"): 4}


def test_dim_first_convolution_state(world: World) -> None:
    theirs, ours = world.layers((OURS, OURS, OURS))
    ours.kv_cache = (ours.kv_cache[0].transpose(1, 2).contiguous(), ours.kv_cache[1])
    metadata = plain(world, 2, [9], [True])
    x = inputs(11)
    close(world.run(ours, metadata, x), world.run(theirs, metadata, x))
    assert torch.equal(ours.kv_cache[0].transpose(1, 2), theirs.kv_cache[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_k_dim": 64}, "64 and 128"),
        ({"num_v_heads": 3, "num_k_heads": 2}, "no multiple"),
        ({"conv_kernel_size": 3}, "3 tokens"),
        ({"activation": "gelu"}, "gelu"),
    ],
)
def test_unsupported_layers_say_why(change: dict[str, Any], reason: str) -> None:
    layer = SimpleNamespace(
        **{
            "head_k_dim": 128,
            "head_v_dim": 128,
            "num_k_heads": 2,
            "num_v_heads": 4,
            "conv_kernel_size": 4,
            "activation": "silu",
            **change,
        }
    )
    assert reason in str(gdn.unsupported(layer))
