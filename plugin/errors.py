"""Every error this project raises on purpose. Stdlib only: any module may import it.

A message says what was asked, what is supported, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlackwellKernelsError(Exception):
    """Base of all errors raised on purpose."""


class UnsupportedInputError(BlackwellKernelsError, ValueError):
    """An operator was called with a shape, dtype, stride, device or value it does not support."""

    def __init__(self, op: str, asked: str, supported: str, fix: str) -> None:
        super().__init__(f"{op}: got {asked}; supported: {supported}; {fix}")
        self.op, self.asked, self.supported, self.fix = op, asked, supported, fix


class TableError(BlackwellKernelsError):
    """A tuned table is missing, unreadable, of an unknown schema, or contradicts itself."""


class EnvironmentSettingError(BlackwellKernelsError, ValueError):
    """A BLACKWELL_KERNELS_* variable has a value that means nothing."""


class ContractError(BlackwellKernelsError, RuntimeError):
    """vLLM does not have the signature a hook expects: the hook refuses rather than guesses."""


class FallbackError(BlackwellKernelsError, RuntimeError):
    """An operator would have been left to stock vLLM although BLACKWELL_KERNELS_STRICT=1 forbids it."""


class MissingRequirementError(BlackwellKernelsError, RuntimeError):
    """A package or a device that a command needs is not there."""


class ServerError(BlackwellKernelsError, RuntimeError):
    """A vLLM server did not start, died, or cannot be reached."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'moe'?` when one of `known` is close to `name`, else an empty string."""
    import difflib  # only on the way to an error message

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
