"""The search of vLLM's Triton MoE configurations, with a stand-in for the GPU's clock."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import bounds, cli, moe_search, peers_moe, precompile, tuned
from blackwell_kernels.microbench.cases import select
from blackwell_kernels.microbench.implementations import stock
from blackwell_kernels.microbench.results import Impl

OWN = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 32, "num_warps": 4}
OWN |= {"num_stages": 3}
TABLE_NAME = moe_search.peers_moe_search.table_name
HEAD = dict.fromkeys(("driver", "torch", "triton", "vllm", "commit", "source", "command"), "-")
HEAD |= {"schema": 1, "gpu": "NVIDIA H200", "sm": 90, "date": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(("rows", "tiles"), [(0.02, {16, 32, 64}), (20, {16, 32, 64}), (160, {64, 128, 256})])
def test_what_is_drawn_fits_and_follows_the_rows_of_an_expert(rows, tiles):
    configs = moe_search.drawn(rows)
    assert {c["BLOCK_SIZE_M"] for c in configs} == tiles
    assert len({str(c) for c in configs}) == len(configs) >= 48
    for c in configs:
        assert (c["BLOCK_SIZE_M"] + c["BLOCK_SIZE_N"]) * c["BLOCK_SIZE_K"] * c["num_stages"] <= 232_448
    assert configs == moe_search.drawn(rows)


class Clock:
    """A bench that gives each configuration a time of its own and counts what it was asked for."""

    rounds, head = 15, HEAD

    def __init__(self, root):
        self.root, self.timed = root, []

    def _first(self, case):
        return {}

    def _more_sets(self, case, first, touched):
        return []

    def _time(self, case, ready, sets):
        self.timed += [item.config for item in ready]
        made = {}
        for item in ready:
            c = item.config
            us = 100.0 + c["BLOCK_SIZE_M"] - c["num_stages"] + c["GROUP_SIZE_M"] / 100 + c["num_warps"] / 1000
            us += c["BLOCK_SIZE_N"] / 1e6
            made[item.name] = Impl(error="too large") if c["num_stages"] == 5 else Impl(us=us, n=self.rounds)
        return made


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.setattr(peers_moe, "own_config", lambda inputs: OWN)
    monkeypatch.setattr(bounds, "cost", lambda case, inputs: bounds.Cost(1, 1))
    monkeypatch.setattr(moe_search.peers_moe_search, "table_name", lambda local, inter: f"{local}-{inter}.json")
    chosen = select(sets=("model",), case="*qwen3-next/num_tokens=*")
    return [c for c in chosen if c.definition == "moe_fp8_block" and c.tokens in (1, 64)]


def test_the_fastest_wins_and_is_stored_with_all_it_was_compared_with(tmp_path, cases):
    bench = Clock(tmp_path)
    rows = list(moe_search.Search(bench, 48, 1000).rows(cases))
    assert [row.tokens for row in rows] == [1, 64]
    for row in rows:
        times = {c.us: c.config for c in row.candidates if c.us is not None}
        assert row.best == times[min(times)]
        assert row.best["BLOCK_SIZE_M"] == 16
        assert row.heuristic == OWN
        assert len(row.candidates) >= 48
        assert any(c.error for c in row.candidates)
    stored = tuned.load(tmp_path / "h200" / "tune" / "vllm_moe.json")
    assert stored is not None
    assert stored.rows == rows
    again = Clock(tmp_path)
    assert list(moe_search.Search(again, 48, 1000).rows(cases)) == rows
    assert again.timed == []


def test_a_search_that_ran_out_of_time_has_no_winner_and_goes_on_later(tmp_path, cases, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr(moe_search.time, "monotonic", lambda: float(next(now)))
    rows = list(moe_search.Search(Clock(tmp_path), 48, 8).rows(cases))
    assert [row.best for row in rows] == [None, None]
    before = [c.config for c in rows[0].candidates if c.us or c.error]
    assert 0 < len(before) < 48
    assert moe_search._state(rows[0]).startswith(f"cut: {len(before)} of {len(rows[0].candidates)} timed")
    assert moe_search._state(rows[1]).startswith(f"cut: 0 of {len(rows[1].candidates)} timed")
    later = Clock(tmp_path)
    assert all(row.best for row in moe_search.Search(later, 48, 1000).rows(cases))
    first_pass = later.timed[: len(rows[0].candidates) - len(before)]
    assert not [config for config in first_pass if config in before]


def test_cases_share_the_time_and_what_is_stopped_is_stored(tmp_path, cases, monkeypatch):
    class Stopped(Clock):
        def _time(self, case, ready, sets):
            if len(self.timed) >= 16:
                raise KeyboardInterrupt
            return super()._time(case, ready, sets)

    with pytest.raises(KeyboardInterrupt):
        list(moe_search.Search(Stopped(tmp_path), 48, 1000).rows(cases))
    (row,) = tuned.load(tmp_path / "h200" / "tune" / "vllm_moe.json").rows
    assert len([c for c in row.candidates if c.us or c.error]) == 16
    assert row.best is None

    now = iter(range(10_000))
    monkeypatch.setattr(moe_search.time, "monotonic", lambda: float(next(now)))
    first, second = moe_search.Search(Clock(tmp_path), 48, 12).rows(cases)
    assert first.best is None
    assert second.best is None
    assert any(c.us for c in second.candidates)


def test_the_likely_come_first():
    few, many = moe_search.drawn(1)[0], moe_search.drawn(160)[0]
    assert (few["BLOCK_SIZE_M"], few["num_warps"]) == (16, 4)
    assert (many["BLOCK_SIZE_M"], many["num_warps"]) == (128, 8)


def test_each_configuration_is_compiled_once_for_each_kind_of_kernel(monkeypatch):
    monkeypatch.setattr(peers_moe, "own_config", lambda inputs: OWN)
    chunks = []
    monkeypatch.setattr(precompile, "compile_all", lambda jobs, *rest: chunks.extend(jobs) or [None] * len(jobs))
    cases = select(sets=("model",), case="model/deepseek-v3.2/tp2/*")
    moe_search._compile([c for c in cases if c.definition in moe_search.DEFINITIONS and c.tokens <= 256], 48, 90, 4)
    compiled = {}
    for chunk in chunks:
        compiled.setdefault(chunk.axes["num_tokens"], []).extend(chunk.configs)
    # 8 pairs unsorted, 32 pairs unsorted, sorted from 128 pairs on
    assert sorted(compiled) == [1, 4, 16]
    for tokens, configs in compiled.items():
        wanted = [OWN, *moe_search.drawn(tokens * 8 / 256)]
        assert all(configs.count(config) == 1 for config in wanted)


def test_a_table_has_the_winner_as_soon_as_it_is_known_and_else_the_best_so_far(tmp_path, cases, monkeypatch):
    rows = moe_search.Search(Clock(tmp_path), 48, 1000).rows(cases)
    path = tmp_path / "h200" / "tune" / "vllm" / "512-512.json"
    first = next(rows)
    assert json.loads(path.read_text()) == {"1": first.best}
    second = next(rows)
    assert json.loads(path.read_text()) == {"1": first.best, "64": second.best}

    now = iter(range(10_000))
    monkeypatch.setattr(moe_search.time, "monotonic", lambda: float(next(now)))
    cut = next(moe_search.Search(Clock(tmp_path / "cut"), 48, 12).rows(cases))
    assert cut.best is None
    times = {c.us: c.config for c in cut.candidates if c.us is not None}
    assert json.loads((tmp_path / "cut" / path.relative_to(tmp_path)).read_text()) == {"1": times[min(times)]}


def test_a_search_of_another_machine_is_taken_in_and_gives_the_plugin_nothing(tmp_path, cases):
    found = list(moe_search.Search(Clock(tmp_path / "there"), 48, 1000).rows(cases))
    tune, plugin = tmp_path / "here" / "h200" / "tune", tmp_path / "plugin"
    tuned.into_vllm_table(tune / "vllm" / "512-512.json", {"1": {"num_warps": 1}, "256": {"num_warps": 8}})
    command = ["merge", str(tmp_path / "there"), "--results", str(tmp_path / "here"), "--tables", str(plugin)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "tuning of vllm_moe: 2 cases are new\n" in done.output
    assert tuned.load(tune / "vllm_moe.json").rows == found
    table = json.loads((tune / "vllm" / "512-512.json").read_text())
    assert table == {"1": found[0].best, "256": {"num_warps": 8}, "64": found[1].best}
    assert not plugin.exists()


def test_tables_are_in_vllms_format(tmp_path, cases, monkeypatch):
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    monkeypatch.setattr(moe_search.peers_moe_search, "table_name", TABLE_NAME)
    run = moe_search.Search(Clock(tmp_path), 48, 1000)
    assert len(list(run.rows(cases))) == 2
    name = fused_moe.get_config_file_name(512, 512, "fp8_w8a8", [128, 128])
    assert set(json.loads((run.folder / name).read_text())) == {"1", "64"}
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(run.folder))
    assert peers_moe.tuned_table(512, 512)[64]["BLOCK_SIZE_M"] == 16


@pytest.fixture
def h200(monkeypatch):
    """vLLM looks for the tables of an H200, which it ships."""
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    # how 0.24 asks, and how 0.32 does
    monkeypatch.setattr(fused_moe.current_platform, "get_device_name", lambda *device: "NVIDIA H200")
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: "NVIDIA_H200", raising=False)
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)


def test_what_vllm_ships_a_table_for_is_not_searched(h200, capsys):
    cases = select(sets=("model",), case="num_tokens=64")
    cases = [c for c in cases if c.definition in moe_search.DEFINITIONS and c.model == "deepseek-v3.2"]
    left = moe_search._not_shipped(cases)
    assert {(c.tp, c.ep) for c in cases} - {(c.tp, c.ep) for c in left} == {(4, 1), (8, 1), (1, 8)}
    assert "E=32,N=2048" in capsys.readouterr().err


def test_where_a_table_is_shipped_the_heuristic_is_a_peer_of_its_own(h200, monkeypatch):
    shipped, other = (
        precompile.meta_inputs(next(c for c in select(sets=("model",), case=name) if c.spec.op == "moe"))
        for name in ("model/deepseek-v3.2/ep8/num_tokens=64", "model/qwen3-next/num_tokens=64")
    )
    monkeypatch.setattr(peers_moe, "configured", lambda inputs, config: config)
    assert peers_moe.triton(shipped)["BLOCK_SIZE_M"] == 64
    assert peers_moe.triton_heuristic(shipped)["BLOCK_SIZE_M"] == 16
    with pytest.raises(MissingRequirementError, match=r"vLLM ships E=32,N=2048.*vllm\.TritonExperts runs with it"):
        peers_moe.triton_tuned(shipped)
    assert peers_moe.triton(other) == peers_moe.heuristic_config(other)
    with pytest.raises(MissingRequirementError, match="ships no table"):
        peers_moe.triton_heuristic(other)
    with pytest.raises(MissingRequirementError, match="moe_search"):
        peers_moe.triton_tuned(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM selects by the GPU that is there")
@pytest.mark.parametrize("ep", [1, 8])
def test_stock_is_what_vllm_selects(ep):
    pytest.importorskip("vllm")
    case = next(c for c in select(sets=("model",)) if c.definition in moe_search.DEFINITIONS and c.ep == ep)
    axes = case.full_axes()
    shapes = {"w2": ("num_experts", "hidden_size", "intermediate_size"), "topk_ids": ("num_tokens", "top_k")}
    shapes |= {"hidden_states": ("num_tokens", "hidden_size"), "expert_map": ("num_global_experts",)}
    present = {name: [axes[axis] for axis in shape] for name, shape in shapes.items() if set(shape) <= set(axes)}
    inputs = {name: torch.empty(shape, dtype=torch.uint8, device="cuda") for name, shape in present.items()}
    major, minor = torch.cuda.get_device_capability()
    assert f"vllm.{peers_moe.selected(inputs)}".startswith(stock(case, 10 * major + minor))
