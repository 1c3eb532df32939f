"""Whether the plugin was asked for, and switching it on in this process. Stdlib only until it is."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import time

from blackwell_kernels import env
from blackwell_kernels.errors import ContractError

NAME = "blackwell_kernels"
GROUP = "vllm.general_plugins"
MINIMUM = (0, 24)
TESTED = ((0, 24), (0, 32))
# Ray's workers get the variables that start like this; without ours they would serve stock, unasked
RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"

logger = logging.getLogger("vllm.blackwell_kernels")  # below "vllm", whose handlers vLLM sets up
_activated = False
_warned = False


def asked_by() -> str | None:
    """How the user asked for the plugin, or None when it is merely installed."""
    _warn_of_unknown_variables()
    enabled = env.ENABLED.get()
    if enabled is not None:
        return f"{env.ENABLED.name}=1" if enabled else None
    if NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
        return "VLLM_PLUGINS"
    return None


def activate(asked_by: str) -> None:
    """Switch the plugin on in this process and, through the environment, in those it starts. Idempotent.

    Raises: EnvironmentSettingError for a variable that means nothing, ContractError when this vLLM is too old or lacks
    a signature that a hook needs. Nothing is caught: an explicit request never ends in stock vLLM quietly.
    """
    global _activated
    if _activated:
        return
    if mistakes := env.problems():
        raise env.EnvironmentSettingError("\n".join(mistakes))
    version = vllm_version()
    release = check_version(version)
    if env.DISABLE.get() == frozenset(env.HOOK_OPS):
        _say(f"blackwell-kernels: {env.DISABLE.name}=all, vLLM runs unpatched in {process_name()}")
        _activated = True
        return
    tested = release in TESTED
    if not tested and not env.RUN.get():  # the first process answers for those it starts
        _check_untested(version)
    _open_run()
    from blackwell_kernels import load_report, metrics, model_patches, status

    model_patches.activate()
    load_report.install()
    metrics.install()
    _activated = True
    status.write()
    from blackwell_kernels import __version__

    known = "" if tested else ", untested"
    where = f"{process_name()} (pid {os.getpid()}, asked for by {asked_by}, vLLM {version}{known})"
    _say(f"blackwell-kernels {__version__}: on in {where}")


def _say(line: str) -> None:
    if logger.hasHandlers():
        logger.info(line)
    else:  # from 0.32 on vLLM sets its log up after it has parsed the command line
        print(line, file=sys.stderr)


def vllm_version() -> str:
    """Version of the vLLM in this environment, without importing it."""
    module = sys.modules.get("vllm")
    if module is not None and isinstance(getattr(module, "__version__", None), str):
        return module.__version__
    from importlib.metadata import version

    return version("vllm")


def parse_release(version: str) -> tuple[int, int] | None:
    """(major, minor) of a version; None for a build without a real number ("dev", "0.1.dev7" of an untagged clone)."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or re.match(r"0\.[01]\.dev", version):
        return None
    return int(match[1]), int(match[2])


def check_version(version: str) -> tuple[int, int] | None:
    """(major, minor) of a vLLM that is new enough.

    Raises: ContractError saying which versions will do.
    """
    release = parse_release(version)
    if release is not None and release < MINIMUM:
        tested = " or ".join(f"{major}.{minor}" for major, minor in TESTED)
        raise ContractError(
            f"blackwell-kernels was asked for, but this is vLLM {version}; it needs "
            f"{MINIMUM[0]}.{MINIMUM[1]} or newer (tested: {tested}). Upgrade vLLM, or start it without --plugin "
            f"{NAME}, without {env.ENABLED.name}=1 and without {NAME} in VLLM_PLUGINS."
        )
    return release


def _check_untested(version: str) -> None:
    """Warn of a vLLM that the project is not tested with.

    Raises: ContractError when a hook that is switched on would not fit it.
    """
    from importlib.util import find_spec
    from pathlib import Path

    from blackwell_kernels.model_patches import contracts

    spec = find_spec("vllm")
    source = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    off = env.DISABLE.get()
    broken = [mismatch for mismatch in contracts.check_source(source, version) if not off.issuperset(mismatch.ops)]
    tested = " or ".join(f"{major}.{minor}" for major, minor in TESTED)
    if broken:
        ops = ",".join(sorted(contracts.mismatched_ops(broken) | off))
        raise ContractError(
            f"blackwell-kernels is not tested with vLLM {version}, and it differs where hooks are set:\n  "
            + "\n  ".join(map(str, broken))
            + f"\nUse vLLM {tested}, or leave these operators to stock: {env.DISABLE.name}={ops}."
        )
    logger.warning(
        "blackwell-kernels is not tested with vLLM %s (tested: %s). Every signature it touches is as expected, so it "
        "runs; %s=1 makes any fall-back an error.",
        version,
        tested,
        env.STRICT.name,
    )


def process_name() -> str:
    """vLLM names its processes: MainProcess, EngineCore, VllmWorker-0, ..."""
    from multiprocessing import current_process

    return current_process().name


def _warn_of_unknown_variables() -> None:
    global _warned
    if not _warned and not env.RUN.get():  # the first process says it for all
        _warned = True
        for message in env.unknown():
            logger.warning("blackwell-kernels: %s. `blackwell-kernels env` lists them.", message)


def _open_run() -> None:
    """Name this run and its status directory for all processes started from here, Ray's among them."""
    if env.RUN.get():
        return
    os.environ[env.RUN.name] = f"{time.time_ns()}-{os.getpid()}"
    prefixes = [*filter(None, os.environ.get(RAY_PREFIXES, "").split(",")), env.PREFIX]
    os.environ[RAY_PREFIXES] = ",".join(prefixes)
    if env.STATUS_DIR.get() is None:
        import tempfile

        directory = tempfile.mkdtemp(prefix="blackwell-kernels-")
        os.environ[env.STATUS_DIR.name] = directory
        atexit.register(_remove, directory, os.getpid())


def _remove(directory: str, owner: int) -> None:
    import shutil

    if os.getpid() == owner:  # a forked child runs this handler too, and the directory is not its own
        shutil.rmtree(directory, ignore_errors=True)
