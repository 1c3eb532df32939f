"""The two servers of a comparison differ by the plugin alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blackwell_kernels.e2e import serving
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.errors import BlackwellKernelsError


def choose(**given: Any) -> serving.Serving:
    return serving.Serving.choose("qwen3-next", **{"backend": "cuda", **given})


def test_what_is_chosen_for_a_machine() -> None:
    gpu, cpu = choose(), choose(backend="cpu")
    assert (gpu.size, gpu.quant, gpu.weights) == ("real", "fp8", "generated")
    assert (cpu.size, cpu.quant, cpu.weights) == ("tiny", "bf16", "disk")
    assert serving.traffic(gpu, None, {}, 5).max_context == 65536
    fitted = serving.traffic(cpu, None, {"gap_cap_s": 0.5}, 5)
    assert (fitted.seed, fitted.vocab, fitted.gap_cap_s, fitted.max_context) == (5, 1024, 0.5, 1000)


def test_arms_differ_by_the_plugin_and_what_is_given_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLACKWELL_KERNELS_FORCE", "all")
    monkeypatch.setenv("BLACKWELL_KERNELS", "1")
    made = choose(
        size="tiny",
        weights="dummy",
        tp=2,
        args=("--seed", "7"),
        only={"stock": ("--moe-backend", "x"), "plugin": ()},
        env={"plugin": {"BLACKWELL_KERNELS_STRICT": "1"}, "stock": {}},
    )
    traffic = serving.traffic(made, "demo", {}, 0)
    stock, plugin = (made.server(arm, tmp_path / arm, tmp_path, traffic, port=1) for arm in ("stock", "plugin"))
    assert [a for a in plugin.command if a not in stock.command] == ["--plugin", "blackwell_kernels"]
    assert [a for a in stock.command if a not in plugin.command] == ["--moe-backend", "x"]
    for server in (stock, plugin):
        text = " ".join(server.command)
        for flags in ("--tensor-parallel-size 2", "--load-format dummy", "--seed 7", "--enable-prefix-caching"):
            assert flags in text
    pairs = (("stock", stock), ("plugin", plugin))
    own = {arm: {k: v for k, v in s.env.items() if k.startswith("BLACKWELL_KERNELS")} for arm, s in pairs}
    assert own["stock"] == {"BLACKWELL_KERNELS": "0"}
    assert own["plugin"] == {
        "BLACKWELL_KERNELS": "1",
        "BLACKWELL_KERNELS_STRICT": "1",
        "BLACKWELL_KERNELS_STATUS_DIR": str(tmp_path / "plugin" / "status"),
    }
    assert stock.env["PATH"] == os.environ["PATH"]


def test_weights_made_in_the_server_need_a_hook_that_is_cheap(cache: Path, tmp_path: Path) -> None:
    made = choose(backend="cpu", weights="generated", seed=4)
    folder = made.folder(Steps())
    assert json.loads((folder / "generator.json").read_text()) == {"seed": 4, "predictable": False}
    assert not list(folder.glob("*.safetensors"))
    server = made.server("stock", tmp_path, folder, serving.traffic(made, None, {}, 0))
    assert "--load-format blackwell_kernels_generated" in " ".join(server.command)
    code = (
        "import sys; from blackwell_kernels import import_hooks as h; "
        "assert 'vllm.model_executor.model_loader' in h._waiting; "
        "assert not {'torch', 'vllm', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=server.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_says_what_can() -> None:
    with pytest.raises(BlackwellKernelsError, match="unknown weights 'x'; there are disk, generated, dummy"):
        choose(weights="x")
    with pytest.raises(BlackwellKernelsError, match="unknown size 'huge'; there are tiny, small, real"):
        choose(size="huge")
    with pytest.raises(BlackwellKernelsError, match="an environment variable is given as NAME=VALUE, not 'abc'"):
        serving.parse_env(["abc"])
    with pytest.raises(BlackwellKernelsError, match="a scenario setting is given as NAME=VALUE"):
        serving.parse_settings(["abc"])
    assert serving.parse_settings(["arrivals=gamma", "burstiness=0.5"]) == {"arrivals": "gamma", "burstiness": 0.5}
