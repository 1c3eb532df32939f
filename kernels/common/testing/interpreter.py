"""Run Triton kernels on a CPU: `enable()` turns Triton's interpreter on and repairs it, before Triton is imported.

What the interpreter cannot show, whatever is repaired: races, missing barriers, layouts, resource limits, speed, and
the reduced-precision accumulation of Hopper's FP8 tensor cores. The ahead-of-time gate (`compile.py`) and a GPU do.
"""

from __future__ import annotations

import os
import sys

_VARIABLE = "TRITON_INTERPRET"


def enable() -> bool:
    """Interpret Triton kernels unless this machine has a CUDA device; return whether kernels are interpreted.

    Call it before anything imports triton: Triton decides while it is imported how its own library is built. It may be
    called again. With a CUDA device it does nothing, so that the same tests run compiled; TRITON_INTERPRET=1, set by
    the caller, interprets (repaired) there too.

    Raises: RuntimeError when triton was imported in compiled mode before; ImportError when there is no triton.
    """
    if os.environ.get(_VARIABLE) != "1":
        import torch

        if torch.cuda.is_available():
            return False
        if "triton.language" in sys.modules:
            raise RuntimeError(
                f"triton was imported before {__name__}.enable() and is in compiled mode; supported: enabling the "
                f"interpreter first; call enable() earlier (kernels/conftest.py does) or set {_VARIABLE}=1"
            )
        os.environ[_VARIABLE] = "1"
    from blackwell_kernels.common.testing import interpreter_repair

    interpreter_repair.repair()
    return True


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter."""
    return os.environ.get(_VARIABLE) == "1"


def launched() -> set[str]:
    """Names of the kernels that this process's interpreter has run."""
    if not interpreting():
        return set()
    from blackwell_kernels.common.testing import interpreter_repair

    return set(interpreter_repair.BoundedExecutor.launched)
