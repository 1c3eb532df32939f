"""PTX as Python functions, for `ptx.py`, which runs them: one for the instructions from a label or meeting on.

Whatever is not known here, an instruction or a form of one, is a PtxError when a kernel is translated.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WORD, LANES = 4, 32  # bytes, threads
SHARED, WINDOW = 1 << 10, 24  # where shared memory begins; bits of addresses that a program of a cluster has
_ALL = 0xFFFFFFFF

# registers, thread -> the block that follows, or what the thread waits for
Block = Callable[[list[Any], Any], "int | Wait"]


class PtxError(Exception):
    """The kernel did what it must not, or something that is not modelled."""


@dataclass(frozen=True)
class Source:
    """PTX of one kernel and how it is launched. arguments: names of its parameters; shared: bytes that Triton manages;
    early: while the kernel before it ends, for which it waits."""

    ptx: str
    arguments: tuple[str, ...]
    warps: int
    programs: int = 1
    shared: int = 0
    early: bool = False

    @classmethod
    def of(cls, compiled: Any) -> Source:
        """Of a `compile.Compiled`."""
        kernel = compiled.kernel
        names = tuple(name for name, kind in kernel.src.signature.items() if kind != "constexpr")
        sizes = kernel.metadata
        return cls(kernel.asm["ptx"], names, sizes.num_warps, sizes.num_ctas, sizes.shared, sizes.launch_pdl)


class Wait(NamedTuple):
    """A thread at an instruction at which it meets others; `then` is where it goes on."""

    kind: str
    at: int
    then: int
    given: tuple[int, ...] = ()
    to: tuple[int, ...] = ()


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(value: float) -> int:
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return _bits(float("inf") if value > 0 else -float("inf"))


def _number(choose: Callable[[float, float], float], a: float, b: float) -> float:
    """The one of two that is a number, or what `choose` says."""
    return b if a != a else a if b != b else choose(a, b)


def _bfe(value: int, start: int, length: int, signed: bool, bits: int) -> int:
    if not 0 < length <= bits - start:
        raise PtxError(f"bfe of {length} bits from {start} on")
    found = value >> start & (1 << length) - 1
    return found - (1 << length) if signed and found >> length - 1 else found


def _of_all(mask: int, given: tuple[int, ...]) -> tuple[int, ...]:
    if mask != _ALL:
        raise PtxError(f"lanes {mask:#x} are not a full warp")
    return given


# what is written as Python; operands are read by the instruction's type, results are cut to its bits
_INTEGER = {
    "mov": "{0}", "add": "{0} + {1}", "sub": "{0} - {1}", "mul.lo": "{0} * {1}", "mad.lo": "{0} * {1} + {2}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "neg": "-{0}",
    "min": "min({0}, {1})", "max": "max({0}, {1})", "shl": "{0} << min({1}, 64)", "shr": "{0} >> {1}",
    "brev": "int(f'{{{0}:0{bits}b}}'[::-1], 2)", "clz": "{bits} - {0}.bit_length()", "popc": "{0}.bit_count()",
    "mul.wide": "{0} * {1}",
    "mad.wide": "{0} * {1} + {2}", "bfe": "_bfe({0}, {1}, {2}, {signed}, {bits})",
}  # fmt: skip
_FLOAT = {"add": "{0} + {1}", "max": "_number(max, {0}, {1})", "min": "_number(min, {0}, {1})", "abs": "abs({0})"}
_LOGIC = {"mov": "{0}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "1 - {0}"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COUNTS = {"bfe": (1, 2), "shl": (1,), "shr": (1,)}  # operands that are u32 whatever the type
_SPECIAL = {
    "%tid.x": "t.tid", "%ntid.x": "t.ntid", "%cluster_ctarank": "t.program.rank",
    "%clusterid.x": "t.program.index[0]",
    "%ctaid.x": "(t.program.index[0] * len(t.program.cluster) + t.program.rank)", "%ctaid.y": "t.program.index[1]",
}  # fmt: skip
_TYPE = r"([bsu](?:32|64)|f32|pred)"
_MEMORY = re.compile(
    r"(ld|st)\.(param|global|shared::cluster|shared::cta|shared)(?:\.c[ag])?(?:\.v([24]))?\.([bsu])(32|64)"
)
_ATOMIC = re.compile(r"(red|atom)\.(?:relaxed\.)?(?:gpu\.)?(shared|global)(?:\.gpu)?(?:\.relaxed)?\.(add|or)\.[bsu]32")
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$.]+):(?!:)|([^;]*);)")


class Kernel:
    """A translated kernel. blocks: by the number of their first instruction; arrays: addresses in shared memory, bytes.

    Raises: PtxError.
    """

    def __init__(self, source: Source):
        self.source = source
        entry = re.search(r"\.entry \w+\((.*?)\)[^{]*\{", source.ptx, re.DOTALL)
        if entry is None:
            raise PtxError("no entry")
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", entry[1].strip())
        body = re.sub(r"//[^\n]*|^\s*\.(loc|file)\b[^\n]*", "", source.ptx[entry.end() :], flags=re.MULTILINE)
        self._scopes: list[tuple[int, dict[str, tuple[int, int]]]] = [(-1, {})]  # outer one, name -> register, bits
        self._labels: dict[tuple[int, str], int] = {}
        self.arrays: dict[str, tuple[int, int]] = {}  # address, bytes
        self.register_count = 0
        self._end = SHARED
        statements = self._parse(body[: body.index("$L__func_end")])
        if "global_smem" in source.ptx:
            self._array("global_smem", source.shared)
        self.statements = [text for _, text in statements]
        self.blocks = self._translated(statements)

    def _array(self, name: str, size: int) -> None:
        self.arrays[name] = self._end, size
        self._end += -(-size // 128) * 128 + 128

    def _parse(self, body: str) -> list[tuple[int, str]]:
        """(scope, instruction)s; registers, labels and arrays are noted."""
        found: list[tuple[int, str]] = []
        scope = at = 0
        while match := _STATEMENT.match(body, at):
            at = match.end()
            brace, label, text = match[1], match[2], " ".join((match[3] or "").split())
            if brace == "{":
                self._scopes.append((scope, {}))
                scope = len(self._scopes) - 1
            elif brace:
                scope = self._scopes[scope][0]
            elif label:
                self._labels[scope, label] = len(found)
            elif array := re.fullmatch(r"\.shared \.align \d+ \.b(\d+) (\w+)\[(\d+)\]", text):
                self._array(array[2], int(array[1]) // 8 * int(array[3]))
            elif register := re.fullmatch(r"\.reg \.(pred|[bfsu]\d+) (.*)", text):
                bits = 1 if register[1] == "pred" else int(register[1][1:])
                for name in re.split(r"\s*,\s*", register[2]):
                    self._declare(scope, name, bits)
            elif text and not text.startswith(".pragma"):
                found.append((scope, text))
        if body[at:].strip(" \n\t}"):
            raise PtxError(f"cannot read {body[at : at + 80]!r}")
        return found

    def _declare(self, scope: int, name: str, bits: int) -> None:
        several = re.fullmatch(r"(%\w+)<(\d+)>", name)
        for each in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]:
            self._scopes[scope][1][each] = self.register_count, bits
            self.register_count += 1

    def _register(self, scope: int, name: str) -> tuple[int, int]:
        while scope >= 0:
            outer, names = self._scopes[scope]
            if name in names:
                return names[name]
            scope = outer
        raise PtxError(f"unknown register or operand {name}")

    def _target(self, scope: int, label: str) -> int:
        while (scope, label) not in self._labels:
            if scope < 0:
                raise PtxError(f"unknown label {label}")
            scope = self._scopes[scope][0]
        return self._labels[scope, label]

    def _translated(self, statements: Sequence[tuple[int, str]]) -> dict[int, Block]:
        lines, begins, ended = [], set(self._labels.values()) | {0}, True
        self._line: dict[int, int] = {}  # of the Python source -> statement
        for i, (scope, text) in enumerate(statements):
            if ended or i in begins:
                lines += [f" return {i}"] * (not ended) + [f"def block{i}(r, t):"]
                begins.add(i)
            match = re.fullmatch(r"(?:@(!?)(%?\w+) )?(\S+) ?(.*)", text)
            assert match is not None
            negated, predicate, name, operands = match.groups()
            try:
                code = self._instruction(i, scope, name, _operands(operands))
                if predicate:
                    guard = f"if {'not ' * bool(negated)}(r[{self._register(scope, predicate)[0]}] & 1): "
                else:
                    guard = ""
            except (PtxError, KeyError, IndexError, ValueError) as error:
                raise PtxError(f"not modelled: {text} ({error})") from error
            lines.append(f" {guard}{code}")
            self._line[len(lines)] = i
            ended = code.startswith("return ")
            if ended:
                lines.append(f" return {i + 1}")
        names: dict[str, Any] = {f.__name__: f for f in (Wait, _float, _bits, _number, _bfe, _of_all)}
        exec(compile("\n".join(lines), "<ptx>", "exec"), names)
        return {i: names[f"block{i}"] for i in begins if f"block{i}" in names}

    def _read(self, scope: int, operand: str, kind: str = "b32") -> str:
        """Python for an operand's value, read as `kind`."""
        bits, signed = (1, False) if kind == "pred" else (int(kind[1:]), kind[0] == "s")
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand in self.arrays or operand == "global_smem":
            return str(self.arrays[operand][0])
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)|0f[0-9a-fA-F]{8}", operand):
            value = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
            value &= (1 << bits) - 1
            code = str(value - (1 << bits) if signed and value >> bits - 1 else value)
        else:
            index, wide = self._register(scope, operand)
            if wide != bits:
                raise PtxError(f"{operand} has {wide} bits, not {bits}")
            code = f"((r[{index}] ^ {1 << bits - 1}) - {1 << bits - 1})" if signed else f"r[{index}]"
        return f"_float({code})" if kind == "f32" else code

    def _write(self, scope: int, register: str, code: str, kind: str) -> str:
        index, bits = self._register(scope, register)
        if kind == "f32":
            return f"r[{index}] = _bits({code})"
        return f"r[{index}] = ({code}) & {(1 << bits) - 1}"

    def _instruction(self, i: int, scope: int, name: str, operands: list[str]) -> str:
        """One line of Python; it begins with return where a block ends."""
        read = lambda at, kind="b32": self._read(scope, operands[at], kind)  # noqa: E731
        if name in ("bra", "bra.uni"):
            return f"return {self._target(scope, operands[0])}"
        if name == "ret":
            return f"return Wait('ret', {i}, {i})"
        if name == "bar.sync" and operands == ["0"]:
            return f"return Wait('bar', {i}, {i + 1})"
        if re.fullmatch(r"barrier\.cluster\.arrive(\.release)?(\.aligned)?", name):
            return "t.arrive()"
        if re.fullmatch(r"barrier\.cluster\.wait(\.acquire)?(\.aligned)?", name):
            return f"return Wait('cluster', {i}, {i + 1})"
        if name.startswith("griddepcontrol."):
            return {"wait": "t.depend()", "launch_dependents": "pass"}[name.partition(".")[2]]
        if name in COLLECTIVES:
            return self._collective(i, scope, name, operands)
        if match := _MEMORY.fullmatch(name):
            return self._memory(scope, match, operands)
        if match := _ATOMIC.fullmatch(name):
            to, address, value = ["", *operands] if match[1] == "red" else operands
            code = f"t.atomic('{match[2]}', {self._address(scope, address)}, '{match[3]}', {self._read(scope, value)})"
            return self._write(scope, to, code, "u32") if to else code
        if name == "mapa.shared::cluster.u32":
            return self._write(scope, operands[0], f"{read(1)} | ({read(2)} + 1) << {WINDOW}", "u32")
        if name.startswith("mov") and "{" in "".join(operands):
            if operands[0].startswith("{"):
                low, high = _list(operands[0])
                parts = [(to, f"{read(1, 'b64')} >> {by}") for to, by in ((low, 0), (high, 32)) if to != "_"]
                return "; ".join(self._write(scope, to, code, "b32") for to, code in parts)
            low, high = (self._read(scope, each) for each in _list(operands[1]))
            return self._write(scope, operands[0], f"{low} | {high} << 32", "b64")
        if match := re.fullmatch(rf"setp\.(\w+)(\.and|\.or)?\.{_TYPE}", name):
            code = f"{read(1, match[3])} {_COMPARE[match[1]]} {read(2, match[3])}"
            if match[2]:
                code = f"({code}) {'&' if match[2] == '.and' else '|'} {read(3, 'pred')}"
            return self._write(scope, operands[0], code, "pred")
        if match := re.fullmatch(rf"selp\.{_TYPE}", name):
            code = f"{read(1, match[1])} if {read(3, 'pred')} & 1 else {read(2, match[1])}"
            return self._write(scope, operands[0], code, match[1])
        if match := re.fullmatch(r"cvt\.[bsu](?:32|64)\.([bsu](?:32|64))", name):
            return self._write(scope, operands[0], read(1, match[1]), "b64")
        if name == "add.f32x2":
            a, b = read(1, "b64"), read(2, "b64")
            low, high = (f"_bits(_float({a} >> {by} & {_ALL}) + _float({b} >> {by} & {_ALL}))" for by in (0, 32))
            return self._write(scope, operands[0], f"{low} | {high} << 32", "b64")
        if match := re.fullmatch(rf"([a-z.]+)\.{_TYPE}", name):
            kind, wide = match[2], match[1].endswith(".wide")
            table = {"f32": _FLOAT, "pred": _LOGIC}.get(kind, _INTEGER)
            kinds = ["u32" if at in _COUNTS.get(match[1], ()) else kind for at in range(3)]
            if wide:
                kinds[2] = f"{kind[0]}64"
            values = [read(at + 1, kinds[at]) for at in range(len(operands) - 1)]
            bits = 1 if kind == "pred" else int(kind[1:])
            return self._write(
                scope, operands[0], table[match[1]].format(*values, bits=bits, signed=kind[0] == "s"), kind
            )
        raise PtxError("unknown instruction")

    def _address(self, scope: int, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
        if match is None:
            raise PtxError(f"address {operand}")
        name = match[1]
        wide = name not in self.arrays and self._register(scope, name)[1] == 64
        return f"{self._read(scope, name, 'b64' if wide else 'b32')} + {match[2] or 0}"

    def _memory(self, scope: int, match: re.Match[str], operands: list[str]) -> str:
        """A load or store of one or several numbers of one or two words each."""
        space, wide = match[2].removesuffix("::cta"), match[5] == "64"
        if space == "param":
            value = f"t.arguments[{self.parameters.index(operands[1].strip('[]'))}]"
            return self._write(scope, operands[0], value, "b64")
        vector, address = operands if match[1] == "ld" else reversed(operands)
        names, address = _list(vector), self._address(scope, address)
        if len(names) != int(match[3] or 1):
            raise PtxError("operands")
        if match[1] == "st":
            values = [self._read(scope, name, "b64" if wide else "b32") for name in names]
            words = [f"{v} >> {by} & {_ALL}" for v in values for by in (0, 32)] if wide else values
            return f"t.store('{space}', {address}, {', '.join(words)})"
        if any(self._register(scope, name)[1] != int(match[5]) for name in names):
            raise PtxError("width of the register")
        indices = [self._register(scope, name)[0] for name in names]
        if not wide:
            targets = ", ".join(f"r[{index}]" for index in indices)
            return f"{targets}, = t.load('{space}', {address}, {len(names)})"
        parts = "; ".join(f"r[{index}] = w[{2 * k}] | w[{2 * k + 1}] << 32" for k, index in enumerate(indices))
        return f"w = t.load('{space}', {address}, {2 * len(names)}); {parts}"

    def _collective(self, i: int, scope: int, name: str, operands: list[str]) -> str:
        """What each lane of a full warp gives, and where its result goes."""
        *operands, mask = operands
        if name.startswith("shfl"):
            if operands.pop() != ("0" if ".up." in name else "31"):
                raise PtxError("part of a warp")
            operands[:1] = operands[0].split("|")
        kind = "pred" if name.startswith("vote") else "b32"
        count = 2 if name.startswith("shfl") else 1
        to = "".join(f"{self._register(scope, each)[0]}, " for each in operands[:-count])
        given = "".join(f"{self._read(scope, each, kind)}, " for each in operands[-count:])
        return f"return Wait('{name}', {i}, {i + 1}, _of_all({self._read(scope, mask)}, ({given})), ({to}))"

    def place(self, line: int) -> str:
        """The instruction at a line of the Python."""
        return self.statements[self._line[line]]


def _operands(text: str) -> list[str]:
    return [each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def _list(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{} ").split(",")]


def _shuffled(source: Callable[[int, int], int]) -> Callable[[list[tuple[int, ...]]], list[tuple[int, int]]]:
    """(value, whether it came from another lane) of every lane, which gives a value and a number."""

    def result(given: list[tuple[int, ...]]) -> list[tuple[int, int]]:
        froms = [source(lane, by) for lane, (_, by) in enumerate(given)]
        return [(given[j if j >= 0 else lane][0], int(j >= 0)) for lane, j in enumerate(froms)]

    return result


COLLECTIVES: dict[str, Callable[[list[tuple[int, ...]]], list[Any]]] = {
    "shfl.sync.up.b32": _shuffled(lambda lane, by: lane - by),
    "shfl.sync.bfly.b32": _shuffled(lambda lane, by: lane ^ by),
    "shfl.sync.idx.b32": _shuffled(lambda lane, by: by % LANES),
    "vote.sync.ballot.b32": lambda given: [(sum((bit & 1) << i for i, (bit,) in enumerate(given)),)] * LANES,
    "redux.sync.add.s32": lambda given: [(sum(value for (value,) in given) & _ALL,)] * LANES,
    "redux.sync.max.s32": lambda given: [max(given, key=lambda value: value[0] ^ 1 << 31)] * LANES,
}  # fmt: skip
