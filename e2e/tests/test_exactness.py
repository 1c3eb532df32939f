"""The demo's comparison with transformers: rounding passes whatever it amounts to, a wrong operator does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blackwell_kernels.e2e import checkpoints, models, probe, reference

LENGTHS, ANSWER = (200, 60, 7), 64


def texts_of(scale: float, seed: int) -> list[np.ndarray]:
    """Made-up log p of all texts: nearly the same for every seed, apart by about `scale`."""
    noise = np.random.default_rng(seed)
    return [-7 + noise.normal(0, scale, n - 1 + ANSWER) for n in LENGTHS]


@pytest.mark.parametrize("scale", [0.06, 0.1, 0.3])
def test_the_bound_grows_with_what_rounding_does(scale: float) -> None:
    exact, rounded = texts_of(0, 0), texts_of(scale, 1)
    found = probe.verdict(LENGTHS, texts_of(scale, 2), exact, rounded)
    assert found["passed"], found
    assert found["overall"]["n"] == sum(LENGTHS) - 3 + 3 * ANSWER == sum(row["n"] for row in found["rows"])
    assert [(row["prompt"], row["generated"]) for row in found["rows"]] == [(n, ANSWER) for n in LENGTHS]
    assert not probe.verdict(LENGTHS, texts_of(2.5 * scale, 2), exact, rounded)["passed"]


def test_a_reference_that_rounding_spared_leaves_room_for_one_that_it_did_not() -> None:
    exact, rounded = texts_of(0, 0), texts_of(0.01, 1)
    assert probe.verdict(LENGTHS, texts_of(0.05, 2), exact, rounded)["passed"]
    assert not probe.verdict(LENGTHS, texts_of(0.2, 2), exact, rounded)["passed"]


@pytest.mark.parametrize(("phase", "other"), [("decode", "prefill"), ("prefill", "decode")])
def test_a_fault_of_one_phase_is_not_averaged_away(phase: str, other: str) -> None:
    served = texts_of(0.1, 2)
    for text, n in zip(served, LENGTHS, strict=True):
        text[slice(n - 1, None) if phase == "decode" else slice(n - 1)] += 0.3
    found = probe.verdict(LENGTHS, served, texts_of(0, 0), texts_of(0.1, 1))
    assert found["phases"][phase]["ratio"] > probe.FACTOR > 1.2 > found["phases"][other]["ratio"]
    assert not found["passed"]


def test_what_is_no_number_or_missing_does_not_pass() -> None:
    exact, rounded, served = texts_of(0, 0), texts_of(0.1, 1), texts_of(0.1, 2)
    served[1][3] = np.nan
    assert not probe.verdict(LENGTHS, served, exact, rounded)["passed"]
    assert not probe.verdict(LENGTHS, exact, exact, served)["passed"], "nor does a reference that is no number"
    prompts = [[text[: n - 1] for text, n in zip(kind, LENGTHS, strict=True)] for kind in (texts_of(0.1, 2), exact)]
    assert not probe.verdict(LENGTHS, *prompts, prompts[1])["passed"], "no token was decoded"


def test_scales_of_linears_are_exact_and_those_of_experts_powers_of_two() -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    exact, power = (reference.quantise_groups(x, powers_of_two=kind) for kind in (False, True))
    for group in (slice(0, 128), slice(128, 256), slice(256, 300)):
        most = x[:, group].abs().amax(-1)
        assert exact[:, group].abs().amax(-1) == pytest.approx(most.numpy(), rel=1e-6), "the largest is kept"
        steps = power[:, group] / torch.exp2(torch.floor(torch.log2(power[:, group].abs()))) * 8
        assert torch.equal(steps, steps.round()), "three bits after the first"
    assert not torch.equal(exact, power)


def test_references_load_beside_in_one_thread_and_say_what_failed(cache: Path, tmp_path: Path) -> None:
    folder, text = checkpoints.build("qwen3-next"), probe.prompts(1024, [9])[0]
    with probe.References(folder) as references:
        exact, rounded = references.log_probs([text, text[:5]])
        assert references._pool.submit(torch.get_num_threads).result() == 1
    assert references.load_s is not None
    np.testing.assert_allclose(exact[0], reference.Reference(folder).log_probs(text), rtol=1e-5)
    np.testing.assert_allclose(exact[1], exact[0][:4], rtol=1e-4)
    assert 0 < np.abs(exact[0] - rounded[0]).mean() < 0.5
    with probe.References(tmp_path) as broken, pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        broken.log_probs([text])


def test_index_queries_and_keys_are_rounded_where_they_meet() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 5, 4, 128, generator=g), torch.randn(1, 1, 6, 128, generator=g)
    weights = torch.randn(1, 5, 1, 4, generator=g)

    def forward(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.matmul(q, k.transpose(-1, -2))
        return scores, torch.matmul(weights, scores)

    scores, summed = reference._IndexScores()(forward)(q, k)
    assert torch.equal(scores, reference.quantise_groups(q) @ reference.quantise_groups(k).mT)
    assert not torch.equal(scores, forward(q, k)[0])
    assert torch.equal(summed, weights @ scores), "heads are summed as they are"


def gate_and_up(ref: reference.Reference, _: pytest.MonkeyPatch) -> None:
    """Faults below are those of `corrupt`, in transformers' words."""
    for module in parts(ref, "mlp.experts"):
        gate, up = module.forward.w13.chunk(2, 1)
        module.forward.w13 = torch.cat([up, gate], 1)


def next_experts(ref: reference.Reference, _: pytest.MonkeyPatch) -> None:
    experts = next(parts(ref, "mlp.experts")).forward.w13.shape[0]
    for gate in parts(ref, "mlp.gate"):
        gate.register_forward_hook(lambda _m, _a, out: (*out[:-1], (out[-1] + 1) % experts))


def keys_one_off(_: reference.Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    rule = qwen.torch_chunk_gated_delta_rule
    monkeypatch.setattr(
        qwen, "torch_chunk_gated_delta_rule", lambda q, k, v, **options: rule(q, k.roll(1, -1), v, **options)
    )


def gates_swapped(ref: reference.Reference, _: pytest.MonkeyPatch) -> None:
    for module in parts(ref, "linear_attn"):
        order = module.fix_query_key_value_ordering
        module.fix_query_key_value_ordering = lambda *a, order=order: (*(r := order(*a))[:4], r[5], r[4])


def half_scores(ref: reference.Reference, _: pytest.MonkeyPatch) -> None:
    for module in parts(ref, "self_attn"):
        module.scaling /= 2


def half_the_keys(ref: reference.Reference, _: pytest.MonkeyPatch) -> None:
    for module in parts(ref, "indexer"):
        module.register_forward_hook(lambda _m, _a, out: out[..., : out.shape[-1] // 2])


def parts(ref: reference.Reference, name: str) -> Iterator[Any]:
    """The model's modules of this name."""
    return (module for path, module in ref.model.named_modules() if path.endswith(f".{name}"))


FAULTS: dict[str, list[Callable[..., None]]] = {
    "qwen3-next": [gate_and_up, next_experts, keys_one_off, gates_swapped],
    "deepseek-v3.2": [gate_and_up, next_experts, half_scores, half_the_keys],
}


@pytest.mark.parametrize("inputs", ["experts", "all"])
@pytest.mark.parametrize("model", models.MODELS)
def test_another_rounding_passes_and_every_fault_fails(cache: Any, model: str, inputs: Any) -> None:
    folder = checkpoints.build(model)
    texts = probe.prompts(models.hf_config(model)["vocab_size"], [n + ANSWER for n in LENGTHS])

    def scores(fault: Callable[..., None] | None = None, *, moved: bool = True, **options: Any) -> list[np.ndarray]:
        ref = reference.Reference(folder, inputs=inputs, **options)
        noise = torch.Generator().manual_seed(0)
        if moved:  # stands for a server: as much as bf16 rounds, elsewhere than transformers does
            ref.model.model.embed_tokens.register_forward_hook(
                lambda _m, _a, out: out * (1 + 2**-8 * torch.rand(out.shape, generator=noise)).to(out.dtype)
            )
        with pytest.MonkeyPatch.context() as patch:
            if fault:
                fault(ref, patch)
            return [ref.log_probs(text) for text in texts]

    bf16 = {"dtype": torch.bfloat16}
    exact, rounded = scores(moved=False), scores(moved=False, **bf16)
    right = probe.verdict(LENGTHS, scores(**bf16), exact, rounded)
    assert right["passed"], right["phases"]
    for fault in FAULTS[model]:
        wrong = probe.verdict(LENGTHS, scores(fault, **bf16), exact, rounded)
        assert not wrong["passed"], (fault.__name__, wrong["phases"])
