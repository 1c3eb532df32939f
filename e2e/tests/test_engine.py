"""Experts of generated weights: given to their loader in one piece, or the usual way where that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blackwell_kernels.e2e import models, weights
from blackwell_kernels.e2e.engine import whole_layers


class Experts:
    """Loads as vLLM's RoutedExperts does on one rank: [E, 2 I, H] and [E, H, I], one expert or all."""

    def __init__(self, experts: int, total: int) -> None:
        self.global_num_experts, self.experts = total, experts
        self.calls = 0

    def parameter(self, *shape: int) -> Any:
        made = torch.nn.Parameter(torch.full((self.experts, *shape), torch.nan), requires_grad=False)
        made.weight_loader = self.load
        return made

    def load(self, param: Any, loaded: torch.Tensor, name: str, *, shard_id: str, expert_id: int) -> None:
        self.calls += 1
        data = param.data if loaded.ndim == 3 else param.data[expert_id]
        if shard_id != "w2":
            data = data.chunk(2, -2)[("w1", "w3").index(shard_id)]
        data.copy_(loaded)


@pytest.mark.parametrize("model", models.MODELS)
@pytest.mark.parametrize("inner", ["routed_experts.", ""])
def test_every_expert_is_where_its_own_loading_would_put_it(model: str, inner: str) -> None:
    config = models.hf_config(model, "tiny")
    experts = config.get("num_experts") or config["n_routed_experts"]
    layer, only = "model.layers.1.mlp.experts", ("model.layers.1.mlp",)
    hidden, size = config["hidden_size"], config["moe_intermediate_size"]
    owner = Experts(experts, experts)
    blocks = (-(-size // 128), -(-hidden // 128))
    parameters = {
        f"{layer}.{inner}w13_weight": owner.parameter(2 * size, hidden),
        f"{layer}.{inner}w2_weight": owner.parameter(hidden, size),
        f"{layer}.{inner}w13_weight_scale_inv": owner.parameter(2 * blocks[0], blocks[1]),
        f"{layer}.{inner}w2_weight_scale_inv": owner.parameter(blocks[1], blocks[0]),
    }
    rest = dict(whole_layers(parameters, weights.generate(config, only=only)))
    assert owner.calls == 6
    every = dict(weights.generate(config, only=only))
    assert rest.keys() == {name for name in every if ".experts." not in name}
    for kind in ("weight", "weight_scale_inv"):
        for e in range(experts):
            gate, up, down = (every[f"{layer}.{e}.{which}_proj.{kind}"].float() for which in ("gate", "up", "down"))
            assert torch.equal(parameters[f"{layer}.{inner}w13_{kind}"][e], torch.cat([gate, up])), (e, kind)
            assert torch.equal(parameters[f"{layer}.{inner}w2_{kind}"][e], down), (e, kind)


def test_experts_that_are_split_or_unknown_go_the_usual_way() -> None:
    owner = Experts(2, 4)  # of four, two are here
    made = [(f"a.experts.{e}.{which}_proj.weight", torch.ones(2, 3)) for e in range(4) for which in ("gate", "up")]
    parameters = {"a.experts.w13_weight": owner.parameter(4, 3)}
    assert [name for name, _ in whole_layers(parameters, made)] == [name for name, _ in made]
    assert [name for name, _ in whole_layers({}, made)] == [name for name, _ in made]
    assert owner.calls == 0


def test_experts_out_of_order_are_refused() -> None:
    owner = Experts(2, 2)
    parameters = {"a.experts.w2_weight": owner.parameter(2, 3)}
    made = [(f"a.experts.{e}.down_proj.weight", torch.ones(2, 3)) for e in (1, 0)]
    with pytest.raises(ValueError, match="experts come in order"):
        list(whole_layers(parameters, made))
