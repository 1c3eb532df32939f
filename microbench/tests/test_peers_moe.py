"""Weights that a peer wants in a layout of its own: made once a layer, and gone with the layer."""

from __future__ import annotations

import gc

import pytest
import torch

from blackwell_kernels.microbench import peers_moe


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(peers_moe, "_kept", {})


def maker(weights, log):
    def make():
        log.append(weights)
        return (weights.flip(0),)

    return make


def test_a_layers_sets_and_cases_share_what_was_made():
    first, second, log = torch.arange(3), torch.arange(4), []
    made = peers_moe._once({"w13": first}, maker(first, log))
    assert torch.equal(made[0], first.flip(0))
    assert peers_moe._once({"w13": first, "more": 1}, maker(first, log)) is made
    assert len(log) == 1
    assert torch.equal(peers_moe._once({"w13": second}, maker(second, log))[0], second.flip(0))
    assert len(log) == 2


def test_peers_keep_theirs_apart():
    def other():
        return (torch.zeros(2),)

    weights = torch.arange(3)
    mine = peers_moe._once({"w13": weights}, maker(weights, []))
    theirs = peers_moe._once({"w13": weights}, other)
    assert torch.equal(theirs[0], torch.zeros(2))
    assert peers_moe._once({"w13": weights}, maker(weights, [])) is mine


def test_what_was_made_goes_with_the_weights_and_not_with_earlier_ones():
    earlier, weights = torch.arange(3), torch.arange(4)
    peers_moe._once({"w13": earlier}, maker(earlier, []))
    made = peers_moe._once({"w13": weights}, maker(weights.clone(), []))
    del earlier
    gc.collect()
    assert peers_moe._once({"w13": weights}, maker(weights.clone(), [])) is made
    del weights
    gc.collect()
    assert peers_moe._kept == {}
