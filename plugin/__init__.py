"""blackwell-kernels: FP8 MoE, DeepSeek sparse attention and Gated Delta Net kernels for vLLM.

vLLM calls `register()` in each of its processes. Merely installed, that adds the `--plugin` flag and patches nothing;
asked for (`--plugin blackwell_kernels`, `BLACKWELL_KERNELS=1`, or our name in VLLM_PLUGINS) it activates the kernels.
Importing this package costs nothing: torch, Triton and vLLM are imported when something needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    ops: Any

__all__ = ["__version__", "ops", "register"]


def register() -> None:
    """vLLM's entry point (group vllm.general_plugins). Safe to call any number of times."""
    from blackwell_kernels import activation, flag

    flag.install()
    if asked_by := activation.asked_by():
        activation.activate(asked_by)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("blackwell-kernels")
        except PackageNotFoundError:  # imported from a source tree that was not installed
            return "0+uninstalled"
    if name == "ops":
        import torch

        from blackwell_kernels import dsa, gdn, moe  # noqa: F401  importing a family registers its operators

        return torch.ops.blackwell_kernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
