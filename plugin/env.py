"""The BLACKWELL_KERNELS_* variables: name, type, default, meaning. Stdlib only: any module may import it.

`env.STRICT.get()` reads one; `unknown()` and `problems()` find what a user mistyped; `markdown_table()` is README's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from blackwell_kernels.errors import EnvironmentSettingError, did_you_mean

PREFIX = "BLACKWELL_KERNELS"
# what can be switched, counted and reported on its own, and the kernel family that serves it
HOOK_OPS = {
    "moe": "moe",
    "moe_routing": "moe",
    "dsa_indexer": "dsa",
    "dsa_topk": "dsa",
    "dsa_sparse_mla": "dsa",
    "gdn_decode": "gdn",
    "gdn_prefill": "gdn",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One variable: how its text is read, and what it means when absent or empty."""

    name: str
    kind: str
    default: T
    doc: str
    parse: Callable[[str], T]

    def get(self) -> T:
        """The value in this process's environment.

        Raises: EnvironmentSettingError when the text means nothing.
        """
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise EnvironmentSettingError(
                f"{self.name}={text}: {error}. It takes {self.kind}: {self.doc} Correct or unset it."
            ) from None


def _flag(text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return value[text.lower()]
    except KeyError:
        raise ValueError("neither 0 nor 1") from None


def _ops(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return frozenset(HOOK_OPS)
    for name in names:
        if name not in HOOK_OPS:
            raise ValueError(f"no operator is named {name!r}{did_you_mean(name, HOOK_OPS)} ({', '.join(HOOK_OPS)})")
    return frozenset(names)


_FLAG, _OPS = "0 or 1", "all or a list of operators"

ENABLED: Variable[bool | None] = Variable(
    PREFIX,
    _FLAG,
    None,
    "1 asks for the plugin, like `--plugin blackwell_kernels`, and works for `LLM(...)` too. 0 keeps it off.",
    _flag,
)
STRICT = Variable(f"{PREFIX}_STRICT", _FLAG, False, "1 turns every fall-back to stock vLLM into an error.", _flag)
DISABLE = Variable(
    f"{PREFIX}_DISABLE",
    _OPS,
    frozenset[str](),
    "Leaves these operators to stock vLLM; `all` patches nothing. Wins over FORCE. Operators, separated by commas: "
    + ", ".join(HOOK_OPS)
    + ".",
    _ops,
)
FORCE = Variable(
    f"{PREFIX}_FORCE",
    _OPS,
    frozenset[str](),
    "Runs ours wherever it supports the input, whatever was measured.",
    _ops,
)
UNMEASURED = Variable(
    f"{PREFIX}_UNMEASURED",
    _FLAG,
    False,
    "1 runs ours on a GPU, or for a shape, that nobody has measured yet; 0 leaves those to stock vLLM.",
    _flag,
)
REPLAY = Variable(
    f"{PREFIX}_REPLAY",
    _FLAG,
    True,
    "1 launches an operator's kernels, for inputs laid out as ones before, without asking Triton again: about half "
    "of the host's time a call where the driver was a stub. 0 has Triton launch every kernel.",
    _flag,
)
STATUS_DIR: Variable[str | None] = Variable(
    f"{PREFIX}_STATUS_DIR",
    "a directory",
    None,
    "Where every process of a server writes `<pid>.json`: what runs, token counts, fall-backs. "
    "Default: a temporary directory, removed at exit.",
    str,
)
RUN: Variable[str | None] = Variable(
    f"{PREFIX}_RUN",
    "set by the plugin",
    None,
    "Names one server's processes, so that older files in the status directory are not mixed in.",
    str,
)

REGISTRY: tuple[Variable, ...] = (ENABLED, STRICT, DISABLE, FORCE, UNMEASURED, REPLAY, STATUS_DIR, RUN)


def unknown() -> list[str]:
    """One warning for each variable of the environment that looks like ours and is none."""
    known = {variable.name for variable in REGISTRY}
    # one letter short, so that BLACKWELL_KERNEL_STRICT is caught as well
    names = sorted(name for name in os.environ if name.startswith(PREFIX[:-1]) and name not in known)
    return [f"{name} is set, but no such variable exists{did_you_mean(name, known)}" for name in names]


def problems() -> list[str]:
    """One message for each variable whose value means nothing."""
    found = []
    for variable in REGISTRY:
        try:
            variable.get()
        except EnvironmentSettingError as error:
            found.append(str(error))
    return found


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, frozenset):
        return ",".join(sorted(value)) or "none"
    return str(value)


def rows() -> list[dict[str, str]]:
    """Name, type, default, meaning and present text of every variable."""
    return [
        {
            "name": variable.name,
            "type": variable.kind,
            "default": _shown(variable.default),
            "doc": variable.doc,
            "value": os.environ.get(variable.name, ""),
        }
        for variable in REGISTRY
    ]


def markdown_table() -> str:
    """README's table of environment variables."""
    lines = ["| variable | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row['name']}` | {row['type']} | {row['default']} | {row['doc']} |" for row in rows()]
    return "\n".join(lines) + "\n"
