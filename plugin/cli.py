"""The commands. Each imports what it needs when it runs, and ends with the command that is useful next.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 environment.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from blackwell_kernels import doctor as doctor_module
from blackwell_kernels import env as variables
from blackwell_kernels.errors import (
    BlackwellKernelsError,
    EnvironmentSettingError,
    MissingRequirementError,
    ServerError,
)

app = typer.Typer(
    help="Faster FP8 MoE, DeepSeek sparse attention and Gated Delta Net kernels for vLLM, as a plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# everything after the name belongs to the sub-command's own application
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        app(args=arguments, prog_name="blackwell-kernels")
    except (EnvironmentSettingError, MissingRequirementError, ServerError) as error:
        print(f"error: {error}\nnext: blackwell-kernels doctor", file=sys.stderr)
        return 3
    except BlackwellKernelsError as error:
        print(f"error: {error}\nnext: blackwell-kernels doctor", file=sys.stderr)
        return 1
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        print("next: the same command, once there is a place that it can write to", file=sys.stderr)
        return 3
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def show(found: dict[str, Any], text: str, as_json: bool, following: str) -> None:
    """Print a result: JSON data that carries the next command, or text that ends with it."""
    print(json.dumps({**found, "next": following}, indent=1) if as_json else f"{text}\nnext: {following}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Can this machine serve with the plugin, and if not, what to do."""
    raise typer.Exit(doctor_module.report(as_json))


@app.command()
def info(as_json: Json = False) -> None:
    """The operators, what serves them here, and where they were measured."""
    from blackwell_kernels import info as info_module

    found = info_module.collect()
    show(found, info_module.text(found), as_json, "vllm serve MODEL --plugin blackwell_kernels")


@app.command()
def env(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print README's table.")] = False,
) -> None:
    """The environment variables: type, default, meaning, present value."""
    if markdown:
        print(variables.markdown_table(), end="")
        return
    rows = variables.rows()
    lines = []
    for row in rows:
        here = f", here {row['value']}" if row["value"] else ""
        lines += [f"{row['name']}  {row['type']}, default {row['default']}{here}", f"    {row['doc']}"]
    show({"schema": 1, "variables": rows}, "\n".join(lines), as_json, "blackwell-kernels doctor")


@app.command()
def warmup(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, its config.json, or a Hugging Face name.")],
    tp: Annotated[int, typer.Option(min=1, help="--tensor-parallel-size of the server.")] = 1,
    ep: Annotated[bool, typer.Option("--ep", help="The server runs with --enable-expert-parallel.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="--max-num-batched-tokens of the server.")] = 8192,
    max_model_len: Annotated[int, typer.Option(min=1, help="--max-model-len of the server.")] = 8192,
    fp8_kv: Annotated[bool, typer.Option("--fp8-kv", help="The server runs with --kv-cache-dtype fp8.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a model's kernels into Triton's cache, so that a server need not."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            raise MissingRequirementError(
                f"warmup compiles GPU kernels and needs {package}, which is not installed: make setup in a clone"
            )
    from blackwell_kernels import warmup as warmup_module

    served = warmup_module.Deployment(tp, ep, max_tokens, max_model_len, fp8_kv)
    found = warmup_module.run(warmup_module.read_config(model), served)
    text = f"{found['calls']} calls on {found['device']}, {found['compiled']} kernels compiled into {found['cache']}"
    show(found, text, as_json, f"vllm serve {model} --plugin blackwell_kernels")


@app.command(context_settings=PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure our operators against stock vLLM's and other kernels."""
    _pass_on(context, "blackwell_kernels.microbench.cli", extra="bench")


@app.command(context_settings=PASS_ON, add_help_option=False)
def tune(context: typer.Context) -> None:
    """Find the fastest launch configurations on this GPU and keep them in the tables."""
    _pass_on(context, "blackwell_kernels.microbench.tune", extra="bench")


@app.command(context_settings=PASS_ON, add_help_option=False)
def profile(context: typer.Context) -> None:
    """Why an operator takes the time it takes, and what to try next."""
    _pass_on(context, "blackwell_kernels.microbench.profile_cli", extra="bench")


@app.command(context_settings=PASS_ON, add_help_option=False)
def validate(context: typer.Context) -> None:
    """Test, tune, measure and compare on this GPU, then switch the plugin on for it."""
    _pass_on(context, "blackwell_kernels.microbench.validate_cli", extra="bench")


@app.command("compile", context_settings=PASS_ON, add_help_option=False)
def compile_(context: typer.Context) -> None:
    """Compile every kernel for a chip that is not here: registers, spills, memory, instructions, verdict."""
    _pass_on(context, "blackwell_kernels.common.testing.gate_table", extra="vllm")


@app.command(context_settings=PASS_ON, add_help_option=False)
def e2e(context: typer.Context) -> None:
    """Serve a model for real: agent traffic, speed and exactness."""
    _pass_on(context, "blackwell_kernels.e2e.cli", extra="e2e")


def _pass_on(context: typer.Context, module: str, extra: str) -> None:
    try:
        application = importlib.import_module(module).app
        application(args=context.args, prog_name=f"blackwell-kernels {context.info_name}")
    except ModuleNotFoundError as error:  # some packages are imported by those of its commands that use them
        if (error.name or "").startswith("blackwell_kernels"):
            raise  # not the user's to install
        print(f"error: `{context.info_name}` needs {error.name}, which is not installed", file=sys.stderr)
        print(f"next: pip install -e '.[{extra}]' in a clone of the project", file=sys.stderr)
        raise typer.Exit(3) from None
