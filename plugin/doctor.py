"""`blackwell-kernels doctor`: can this machine serve with the plugin, and if not, what to do.

Stdlib only, and nothing of what it examines is imported: it works without torch, vLLM, a GPU, or our own dependencies,
because those are what may be broken. Exit code 0: nothing failed; 1: a setting or a signature is wrong; 3: the machine
or the environment lacks something.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

from blackwell_kernels import activation, env
from blackwell_kernels.errors import ContractError, EnvironmentSettingError

SCHEMA = 1
PYTHONS = ((3, 11), (3, 12))
TRITONS = ((3, 6), (3, 7))
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding. status: ok, warn, fail or skip; `environment` tells a lack of the machine from a wrong setting."""

    name: str
    status: str
    what: str
    why: str = ""
    fix: str = ""
    environment: bool = False


def run() -> list[Check]:
    """All findings, in the order in which they are best mended."""
    found: list[Check] = []
    for examine in EXAMINATIONS:
        try:
            found += examine()
        except Exception as error:  # what is broken must not hide the findings on the rest
            name = examine.__name__.strip("_").replace("_", " ")
            found.append(Check(name, "fail", f"cannot be examined: {type(error).__name__}: {error}"))
    return found


def exit_code(checks: Iterable[Check]) -> int:
    """0, 1 or 3, as the module's documentation says."""
    failed = [check for check in checks if check.status == "fail"]
    if any(check.environment for check in failed):
        return 3
    return 1 if failed else 0


def report(as_json: bool) -> int:
    """Print the findings and return the exit code."""
    checks = run()
    code = exit_code(checks)
    following = "mend what failed, then blackwell-kernels doctor" if code else "blackwell-kernels info"
    if as_json:
        from blackwell_kernels import __version__

        found = {"schema": SCHEMA, "version": __version__, "exit_code": code, "checks": [asdict(c) for c in checks]}
        print(json.dumps({**found, "next": following}, indent=1))
        return code
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<5} {check.name:<{width}}  {check.what}")
        for label in ("why", "fix"):
            if text := getattr(check, label):
                print(f"{'':<{6 + width}}  {label}: {text}")
    print(f"next: {following}")
    return code


def main(arguments: list[str]) -> int:
    """The command, parsed without typer."""
    parser = argparse.ArgumentParser("blackwell-kernels doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return report(parser.parse_args(arguments).json)


# --- what is there --------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _folder(module: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@cache
def _gpus() -> list[list[str]] | str:
    """Name, compute capability, driver and memory of each GPU, or why there is none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "nvidia-smi is not installed"
    fields = "name,compute_cap,driver_version,memory.total"
    try:
        answer = subprocess.run(
            [smi, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    if answer.returncode:
        return f"nvidia-smi failed: {(answer.stderr or answer.stdout).strip()}"
    return [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]


def _has_gpu() -> bool:
    return isinstance(_gpus(), list) and bool(_gpus())


# --- the examinations -----------------------------------------------------------------------------------------------


def _python() -> Iterable[Check]:
    what = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        yield Check("python", "ok", what)
    else:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        yield Check("python", "fail", what, f"the project supports {wanted}", "make PYTHON=python3.11 setup", True)


def _system() -> Iterable[Check]:
    what = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() == "Linux":
        yield Check("system", "ok", what)
    else:
        yield Check("system", "fail", what, "vLLM serves on Linux", "use a Linux machine or container", True)


def _gpu() -> Iterable[Check]:
    gpus = _gpus()
    if isinstance(gpus, str) or not gpus:
        reason = gpus if isinstance(gpus, str) else "nvidia-smi lists none"
        yield Check("gpu", "skip", f"no GPU ({reason})", "the operators then run their CPU implementations")
        return
    for index, (name, capability, driver, memory) in enumerate(gpus):
        what = f"{name}, sm{capability.replace('.', '')}, driver {driver}, {memory}"
        if float(capability) < 9:
            why = "the kernels need sm90 (Hopper) or newer; on this GPU every operator stays with stock vLLM"
            yield Check(f"gpu {index}", "warn", what, why)
        else:
            yield Check(f"gpu {index}", "ok", what)


def _dependencies() -> Iterable[Check]:
    missing = [name for name in ("pydantic", "rich", "typer") if _version(name) is None]
    if missing:
        why = "the other commands and the tuned tables need them"
        yield Check(
            "dependencies", "fail", f"missing: {', '.join(missing)}", why, f"pip install {' '.join(missing)}", True
        )
    else:
        yield Check("dependencies", "ok", "pydantic, rich, typer")


def _torch() -> Iterable[Check]:
    version, folder = _version("torch"), _folder("torch")
    if version is None or folder is None:
        fix = "make setup, or pip install torch==2.13.0"
        yield Check("torch", "fail", "not installed", "vLLM and the operators run on it", fix, True)
        return
    found = re.search(r"^cuda\b[^=\n]*= *'([^']+)'", _text(folder / "version.py"), re.MULTILINE)
    build = f"CUDA {found[1]}" if found else "CPU build"
    if _has_gpu() and not found:
        why = "this machine has a GPU, and a CPU build cannot use it"
        yield Check("torch", "fail", f"{version} ({build})", why, "make setup BACKEND=cuda", True)
    else:
        yield Check("torch", "ok", f"{version} ({build})")


def _triton() -> Iterable[Check]:
    version = _version("triton")
    if version is None:
        if _has_gpu():
            why = "the GPU kernels are written in it"
            yield Check("triton", "fail", "not installed", why, "reinstall torch; its CUDA build brings it", True)
        else:
            yield Check("triton", "skip", "not installed", "needed on a GPU only")
        return
    if activation.parse_release(version) in TRITONS:
        yield Check("triton", "ok", version)
    else:
        tested = " and ".join(f"{major}.{minor}" for major, minor in TRITONS)
        yield Check("triton", "warn", version, f"tested with {tested}", "compare results: pytest -m gpu kernels")
    if _has_gpu():
        yield from _compiler()


def _compiler() -> Iterable[Check]:
    """Triton builds a small C launcher for each kernel when it first meets it."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler is None:
        why = "Triton compiles a launcher for each kernel"
        yield Check("c compiler", "fail", "no gcc, clang or cc", why, "apt-get install gcc", True)
    elif not header.exists():
        why = "Triton compiles a launcher for each kernel against Python's headers"
        fix = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield Check("c compiler", "fail", f"{compiler}, but no {header}", why, fix, True)
    else:
        yield Check("c compiler", "ok", compiler)


def _vllm() -> Iterable[Check]:
    version, folder = _version("vllm"), _folder("vllm")
    if folder is None:
        yield Check("vllm", "fail", "not installed", "the plugin is for it", "make setup, or pip install vllm", True)
    elif version is None:
        why = (
            "its command line asks for a distribution named vllm, which a CPU build under another name does not provide"
        )
        yield Check("vllm", "fail", "a package without the distribution vllm", why, "make setup", True)
    else:
        try:
            release = activation.check_version(version)
        except ContractError as error:
            yield Check("vllm", "fail", version, str(error), "pip install --upgrade vllm", True)
            return
        if release in activation.TESTED:
            yield Check("vllm", "ok", version)
        else:
            why = "not a version the project is tested with; see the contracts below"
            yield Check("vllm", "warn", version, why, f"{env.STRICT.name}=1 makes a fall-back an error")


def _entry_point() -> Iterable[Check]:
    found = [entry.value for entry in entry_points(group=activation.GROUP) if entry.name == activation.NAME]
    if set(found) == {f"{activation.NAME}:register"}:
        yield Check("entry point", "ok", f"{activation.NAME} in {activation.GROUP}")
    else:
        why = f"vLLM finds plugins by entry points of the group {activation.GROUP}"
        what = f"{activation.NAME} leads to {', '.join(found)}" if found else f"no {activation.NAME} is registered"
        yield Check("entry point", "fail", what, why, "pip install -e . in a clone of the project", True)


def _allow_list() -> Iterable[Check]:
    text = os.environ.get("VLLM_PLUGINS")
    if text is None:
        yield Check("VLLM_PLUGINS", "ok", "unset: vLLM loads every plugin")
        return
    names = text.split(",")
    why = "vLLM then never loads us, and --plugin is an unknown flag"
    if activation.NAME in names:
        if env.ENABLED.get() is False:
            why = f"{env.ENABLED.name}=0 wins: the plugin stays off"
            yield Check("VLLM_PLUGINS", "warn", text, why, f"unset {env.ENABLED.name}")
        else:
            yield Check("VLLM_PLUGINS", "ok", f"{text}: asks for the plugin")
    elif activation.NAME in [name.strip() for name in names]:
        fix = f"VLLM_PLUGINS={','.join(name.strip() for name in names)}"
        yield Check("VLLM_PLUGINS", "fail", f"{text!r} has spaces, which vLLM takes as part of a name", why, fix)
    else:
        fix = f"VLLM_PLUGINS={','.join([*filter(None, names), activation.NAME])}, or unset it"
        yield Check("VLLM_PLUGINS", "fail", f"{text!r} does not name {activation.NAME}", why, fix)


def _variables() -> Iterable[Check]:
    mistakes, strangers = env.problems(), env.unknown()
    for message in mistakes:
        yield Check("variables", "fail", message, fix="blackwell-kernels env lists them")
    for message in strangers:
        yield Check("variables", "warn", message, fix="blackwell-kernels env lists them")
    if not mistakes and not strangers:
        given = [variable.name for variable in env.REGISTRY if variable.name in os.environ]
        yield Check("variables", "ok", ", ".join(given) or "none set")


def _contracts() -> Iterable[Check]:
    folder, version = _folder("vllm"), _version("vllm")
    if folder is None or version is None:
        yield Check("contracts", "skip", "no vLLM to compare with")
        return
    try:
        from blackwell_kernels.model_patches import contracts
    except ImportError as error:
        yield Check("contracts", "skip", f"cannot be compared: {error}")
        return
    try:
        off = env.DISABLE.get()
    except EnvironmentSettingError:  # told among the variables
        off = frozenset()
    mismatches = [found for found in contracts.check_source(folder, version) if not off.issuperset(found.ops)]
    for mismatch in mismatches:
        why = "a hook relies on this signature of vLLM and refuses to run without it"
        fix = f"use a tested vLLM, or {env.DISABLE.name}=<operator> for the operators concerned"
        yield Check("contracts", "fail", str(mismatch), why, fix)
    if not mismatches:
        yield Check("contracts", "ok", f"vLLM {version} has every signature that the hooks touch")


def _tables() -> Iterable[Check]:
    """Whether the tables that decide are whole; what they say is checked where they are used."""
    folders = [_folder(f"blackwell_kernels.{family}") for family in dict.fromkeys(env.HOOK_OPS.values())]
    paths = [path for folder in folders if folder for path in sorted(folder.glob("configs/*/*.json"))]
    damaged = False
    for path in paths:
        try:
            whole = bool(json.loads(path.read_text(encoding="utf-8"))["rows"])
        except (OSError, ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            damaged = True
            why = f"a server on {path.parent.name} that asks it for {path.stem} ends with an error"
            fix = f"restore the shipped file, or blackwell-kernels bench dispatch {path.parent.name}"
            yield Check("tables", "fail", f"{path} is damaged", why, fix)
    if not damaged:
        measured = ", ".join(sorted({path.parent.name for path in paths})) or "no GPU: every operator stays with stock"
        yield Check("tables", "ok", f"measured on {measured}")


def _shadowing() -> Iterable[Check]:
    """transformers imports Hugging Face's `kernels`; a folder of that name on the path takes its place."""
    folder, version = _folder("kernels"), _version("kernels")
    if folder is None:
        yield Check("kernels", "ok", "nothing shadows Hugging Face's `kernels`")
        return
    genuine = version is not None and folder in {
        Path(str(file.locate())).parent for file in distribution("kernels").files or () if file.name == "__init__.py"
    }
    if genuine:
        yield Check("kernels", "ok", f"Hugging Face's kernels {version}")
    else:
        why = "transformers, and so vLLM, imports Hugging Face's package of that name"
        yield Check(
            "kernels", "fail", f"`import kernels` finds {folder}", why, "start from another folder, or rename it"
        )


def _libnuma() -> Iterable[Check]:
    if _folder("vllm") is None or _has_gpu():
        return
    if ctypes.util.find_library("numa"):
        yield Check("libnuma", "ok", "found")
    else:
        yield Check("libnuma", "fail", "not found", "vLLM's CPU build links it", "apt-get install libnuma1", True)


def _caches() -> Iterable[Check]:
    home = Path.home()
    places = {
        "triton cache": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "vllm cache": Path(os.environ.get("VLLM_CACHE_ROOT") or home / ".cache" / "vllm"),
    }
    if status_dir := env.STATUS_DIR.get():
        places["status"] = Path(status_dir)
    for name, place in places.items():
        # the folder itself may not exist yet: then the nearest parent decides
        standing = next(path for path in [place.absolute(), *place.absolute().parents] if path.exists())
        if not (standing.is_dir() and os.access(standing, os.W_OK | os.X_OK)):
            why = "what is compiled or reported is written there"
            variable = {"triton cache": "TRITON_CACHE_DIR", "vllm cache": "VLLM_CACHE_ROOT"}.get(
                name, env.STATUS_DIR.name
            )
            yield Check(name, "fail", f"{place} cannot be written", why, f"set {variable} to a writable folder", True)
        elif shutil.disk_usage(standing).free < CACHE_BYTES:
            yield Check(
                name, "warn", f"{place}: less than 1 GiB is free", "compiled kernels fill it", "free some space"
            )
        else:
            yield Check(name, "ok", str(place))


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


EXAMINATIONS: tuple[Callable[[], Iterable[Check]], ...] = (
    _python,
    _system,
    _gpu,
    _dependencies,
    _torch,
    _triton,
    _vllm,
    _libnuma,
    _entry_point,
    _allow_list,
    _variables,
    _contracts,
    _tables,
    _shadowing,
    _caches,
)
