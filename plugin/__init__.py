"""blackwell-kernels: faster MoE, sparse-attention and Gated Delta Net kernels for vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """vLLM's entry point."""
