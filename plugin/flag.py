"""`vllm serve --plugin NAME`: the one thing that a merely installed plugin adds to vLLM. Stdlib only.

vLLM calls the general plugins just before `EngineArgs.add_cli_args(parser)` (0.24, 0.32, 0.33), so wrapping that method
is early enough. Python's `LLM(...)` has no command line: BLACKWELL_KERNELS=1 is for that.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from blackwell_kernels import activation
from blackwell_kernels.env import ENABLED
from blackwell_kernels.errors import BlackwellKernelsError, did_you_mean
from blackwell_kernels.import_hooks import when_imported

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_MARK = "_blackwell_kernels_flag"
_installed = False
logger = logging.getLogger("vllm.blackwell_kernels")


def install() -> None:
    """Add `--plugin` to vLLM's parser, now or when vLLM's argument module is imported."""
    global _installed
    if not _installed:
        _installed = True
        when_imported("vllm.engine.arg_utils", _wrap)


def _wrap(arg_utils: ModuleType) -> None:
    engine_args = getattr(arg_utils, "EngineArgs", None)
    stock: Callable[..., Any] | None = getattr(engine_args, "add_cli_args", None)
    if engine_args is None or stock is None:  # a merely installed plugin must not break a vLLM it does not know
        logger.warning("this vLLM has no EngineArgs.add_cli_args, so no --plugin: use %s=1", ENABLED.name)
        return
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def add_cli_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser = stock(parser, *args, **kwargs)
        if "--plugin" not in parser._option_string_actions:  # vLLM may grow its own
            parser.add_argument_group("Plugins", "Plugins to switch on by name.").add_argument(
                "--plugin",
                action=PluginAction,
                metavar="NAME[,NAME]",
                help="Switch on an installed vLLM plugin, such as blackwell_kernels. May be repeated; other plugins "
                "stay as they are.",
            )
        return parser

    setattr(add_cli_args, _MARK, True)
    engine_args.add_cli_args = staticmethod(add_cli_args)


class PluginAction(argparse.Action):
    """Collects names; an unknown one ends parsing with what is installed and the nearest match."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from importlib.metadata import entry_points

        installed = {entry.name: entry for entry in entry_points(group=activation.GROUP)}
        names = [name.strip() for name in str(values).split(",") if name.strip()]
        if not names:
            parser.error("--plugin needs the name of a plugin; installed: " + ", ".join(sorted(installed)))
        for name in names:
            if name not in installed:
                listed = ", ".join(sorted(installed))
                hint = did_you_mean(name, installed)
                parser.error(f"--plugin: no installed plugin is named {name!r}{hint} (installed: {listed})")
        chosen = list(getattr(namespace, self.dest, None) or [])
        setattr(namespace, self.dest, chosen + [name for name in names if name not in chosen])
        try:
            for name in names:
                _switch_on(installed[name])
        except BlackwellKernelsError as error:
            parser.error(str(error))


def _switch_on(plugin: EntryPoint) -> None:
    """Make this process and its children load `plugin`, whatever allow-list is set, without dropping another."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and plugin.name not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join([*filter(None, allowed.split(",")), plugin.name])
        if plugin.name != activation.NAME:
            plugin.load()()  # vLLM has passed it over in this process
    if plugin.name == activation.NAME:
        if ENABLED.get() is False:
            raise BlackwellKernelsError("--plugin blackwell_kernels contradicts BLACKWELL_KERNELS=0: drop one of them")
        os.environ[ENABLED.name] = "1"
        activation.activate("--plugin")
