"""The two servers of a comparison: the same model, arguments and environment, with and without the plugin."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e import checkpoints, demo, in_server, kernel_time, models
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import VLLM, Server
from blackwell_kernels.e2e.sessions import Scenario, named
from blackwell_kernels.errors import BlackwellKernelsError

SCENARIO = {"cpu": "demo", "cuda": "agent64k"}
WEIGHTS = {
    "disk": "a generated checkpoint on disk",
    "generated": "the same tensors, made on the device while the server loads",
    "dummy": "vLLM's own dummy weights",
}


@dataclass(frozen=True)
class Serving:
    """What is served, the same for both arms but for `only`: more arguments and variables of one of them."""

    model: str
    backend: str
    size: str
    quant: str
    layers: int | None = None
    weights: str = "disk"  # one of WEIGHTS
    tp: int = 1
    seed: int = 0
    args: tuple[str, ...] = ()
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    command: Sequence[str] = VLLM

    @classmethod
    def choose(cls, model: str, **given: Any) -> Serving:
        """With what was not given (None) chosen for this machine. Raises BlackwellKernelsError for what cannot be."""
        backend = given.pop("backend", None) or demo.detect_backend()
        size = given.pop("size", None) or ("real" if backend == "cuda" else "tiny")
        # stock vLLM has no block-FP8 path on CPUs without AMX
        quant = given.pop("quant", None) or ("fp8" if backend == "cuda" else "bf16")
        weights = given.pop("weights", None) or ("generated" if size == "real" else "disk")
        if weights not in WEIGHTS:
            raise BlackwellKernelsError(f"unknown weights {weights!r}; there are {', '.join(WEIGHTS)}")
        if size not in models.SIZES:
            raise BlackwellKernelsError(f"unknown size {size!r}; there are {', '.join(models.SIZES)}")
        name = models.canonical(model)
        return cls(name, backend, size, quant, weights=weights, **{k: v for k, v in given.items() if v is not None})

    def vocab(self) -> int:
        """Token ids of the model."""
        return int(self.config()["vocab_size"])

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return models.hf_config(self.model, self.size, self.quant, self.layers)

    def folder(self, steps: Steps) -> Path:
        """The checkpoint, made now unless it is there."""
        if self.weights == "dummy":
            return checkpoints.without_weights(self.model, self.size, self.quant, self.layers)
        if self.weights == "generated":
            return in_server.write(self.model, self.size, self.quant, self.layers, self.seed)
        import torch

        device = "cuda" if self.backend == "cuda" and torch.cuda.is_available() else "cpu"
        return checkpoints.build(
            self.model,
            size=self.size,
            quant=self.quant,
            seed=self.seed,
            layers=self.layers,
            device=device,
            say=steps.say,
        )

    def arguments(self, scenario: Scenario) -> list[str]:
        """Arguments of `vllm serve` for both arms; what the user gives comes after and wins."""
        if self.backend == "cpu":
            args = demo.server_args("cpu", self.model)
        else:
            args = ["--max-model-len", str(scenario.max_context), "--gpu-memory-utilization", "0.9"]
            args += ["--enable-prefix-caching", "--tensor-parallel-size", str(self.tp)]
            if self.model == "qwen3-next" and not any("gdn-prefill-backend" in a for a in self._given()):
                args += ["--gdn-prefill-backend", "triton"]  # FlashInfer's is compiled at start, for minutes
        loading = {"disk": [], "dummy": ["--load-format", "dummy"], "generated": in_server.arguments()}
        return [*args, *loading[self.weights], *self.args]

    def _given(self) -> list[str]:
        return [*self.args, *(a for args in self.only.values() for a in args)]

    def server(
        self,
        arm: str,
        folder: Path,
        checkpoint: Path,
        scenario: Scenario,
        port: int | None = None,
        *,
        gpus: Sequence[int] = (),
        traces: Path | None = None,
    ) -> Server:
        """One arm's server, not started: on the GPUs of these indices (all), able to write profiles into `traces`."""
        made = in_server.environment(checkpoint) if self.weights == "generated" else {}
        if gpus:
            # counted as nvidia-smi and NVML do
            made |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        profiling = kernel_time.arguments(traces) if traces else []
        return Server(
            checkpoint,
            folder,
            plugin="blackwell_kernels" if arm == "plugin" else None,
            port=port,
            args=[*self.arguments(scenario), *profiling, *self.only.get(arm, ())],
            env={**made, "BLACKWELL_KERNELS": "0" if arm == "stock" else "1", **self.env.get(arm, {})},
            # the user's own BLACKWELL_KERNELS_* are for neither: an arm is what this comparison says it is
            inherit=lambda name: not name.startswith("BLACKWELL_KERNELS"),
            cuda=self.backend == "cuda",
            command=self.command,
        )

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            **{key: getattr(self, key) for key in ("model", "backend", "size", "quant", "layers", "weights", "tp")},
            "seed": self.seed,
            "args": shlex.join(self.args),
            "only": {arm: shlex.join(args) for arm, args in self.only.items()},
            "env": self.env,
        }


def traffic(serving: Serving, name: str | None, settings: dict[str, Any], seed: int) -> Scenario:
    """The scenario of a comparison: named, or the one for this machine; its context and vocabulary fit the model."""
    chosen = named(name or SCENARIO[serving.backend])
    longest = int(serving.config().get("max_position_embeddings", chosen.max_context))
    fitted = {"max_context": min(chosen.max_context, longest), "vocab": serving.vocab(), "seed": seed}
    return Scenario.from_dict({**chosen.to_dict(), **fitted, **settings})


def parse_env(items: Sequence[str], what: str = "an environment variable") -> dict[str, str]:
    """NAME=VALUE items. Raises BlackwellKernelsError for anything else."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BlackwellKernelsError(f"{what} is given as NAME=VALUE, not {item!r}")
        found[name] = value
    return found


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE scenario settings; values as JSON, or bare words."""
    found: dict[str, Any] = {}
    for name, value in parse_env(items, "a scenario setting").items():
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
