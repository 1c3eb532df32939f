"""`blackwell-kernels e2e …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Serve a model for real: agent traffic, speed and exactness.", no_args_is_help=True, add_completion=False
)
Model = Annotated[str, typer.Option("--model", help="qwen3-next or deepseek.")]


@app.callback()
def _commands() -> None:
    """Keeps the commands' names when there is only one."""


@app.command()
def demo(
    model: Model = "qwen3-next",
    seconds: Annotated[float, typer.Option(min=1.0, help="How long agents send requests.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder for the report, records and logs.")] = Path("out/demo"),
    quant: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    users: Annotated[int, typer.Option(min=1, help="Sessions that can run at once.")] = 8,
    port: Annotated[int | None, typer.Option(help="Loopback port; default: a free one.")] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Without the plugin.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights and the traffic.")] = 0,
) -> None:
    """A minute of agent sessions on a tiny real model: what runs, how fast, how exact."""
    from blackwell_kernels.e2e import demo as module

    plugin = None if stock else "blackwell_kernels"
    options = module.Options(model, seconds, out, quant, port, users, plugin, seed)
    raise typer.Exit(module.run(options))
