"""What a disassembly (cuobjdump -sass) says of a kernel: its innermost tensor-core loop, registers nothing writes."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", re.MULTILINE)
_GUARD = re.compile(r"^@!?U?P\w+\s+")
# tcgen05, wgmma and mma.sync, in this order
_MMA = re.compile(r"(UTC\w*MMA|[QHI]GMMA|[HQI]MMA|DMMA)")
_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)\b")
# an instruction's first register is its result, predicates may come before it
_RESULT = re.compile(r"(?:!?U?P(?:T|\d+), )*(U?R)(\d+)(?:\.\w+)*(?:,|$)")
# or none: predicates, memory, control
_NO_RESULT = re.compile(
    r"\w*SETP|R2P|FCHK|ST|RED(?!UX)|BAR|BRX|JMX|RET|CALL|BSSY|NANOSLEEP|WARPSYNC|CCTL|SYNCS|UTMA|UBLK|UTC"
)
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")

Code = list[tuple[int, str]]


def parse(text: str) -> Code:
    """(address, instruction without its predicate) of every instruction in a disassembly."""
    return [(int(address, 16), _GUARD.sub("", code.strip())) for address, code in _INSTRUCTION.findall(text)]


def innermost_mma_loop(code: Code) -> int:
    """Instructions in the longest loop that has a tensor-core instruction and no smaller such loop inside."""
    loops = [(target, at) for at, text in code if (target := _branch_target(text)) is not None and target <= at]
    mmas = [at for at, text in code if _MMA.match(text)]
    loops = [(a, b) for a, b in loops if any(a <= at <= b for at in mmas)]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return max((sum(a <= at <= b for at, _ in code) for a, b in innermost), default=0)


def unwritten(code: Code) -> tuple[str, ...]:
    """Registers that some instruction names as an operand and none writes: ptxas 12.8 once made addresses from one.

    Registers that only belong to a wider operand are seen in matrix descriptors alone; a register that one instruction
    writes counts as written everywhere. So what is found is wrong, and not all that is wrong is found.
    """
    written: set[tuple[str, int]] = set()
    read: set[tuple[str, int]] = set()
    for _, text in code:
        name, _, operands = text.partition(" ")
        result = None if _NO_RESULT.match(name) else _RESULT.match(operands)
        if result:
            kind, first = result[1], int(result[2])
            written.update((kind, first + i) for i in range(_result_registers(name)))
            operands = operands[result.end() :]
        read.update((kind, int(number)) for kind, number in _REGISTER.findall(_spelled_out(name, operands)))
    return tuple(f"{kind}{number}" for kind, number in sorted(read - written))


def _result_registers(name: str) -> int:
    """Registers that an instruction of this name writes, from its result's on: the most it can be where names leave it
    open."""
    wgmma = re.match(r"[QHI]GMMA\.\d+x(\d+)x\d+", name)
    if wgmma:
        return int(wgmma[1]) // 2
    if name.startswith("LDTM"):
        return 128
    if name.startswith("LDSM") or re.match(r"[HQIO]MMA", name):
        return 4
    if name.startswith("CS2R"):
        return 1 if name.endswith(".32") else 2
    bits = re.search(r"\.[SUF]?(64|128|256)\b", name)
    if bits:
        return int(bits[1]) // 32
    return 2 if re.match(r"D(ADD|MUL|FMA|MMA)|F(ADD|MUL|FMA)2|\w+\.WIDE", name) else 1


def _spelled_out(name: str, operands: str) -> str:
    """Operands with all registers of a matrix descriptor in place of its first: 64 bits for tcgen05; for wgmma two of
    those side by side, the first unused where that operand lies in registers."""

    def registers(match: re.Match[str]) -> str:
        first, wgmma = int(match[1]), not name.startswith("UTC")
        skipped = 2 if wgmma and re.match(r"\W*R\d+\S* gdesc", operands) else 0
        return " ".join(f"UR{first + i}" for i in range(skipped, 4 if wgmma else 2))

    return _DESCRIPTOR.sub(registers, operands)


def _branch_target(text: str) -> int | None:
    match = re.match(r"BRA\b.*?\b0x([0-9a-f]+)\s*$", text)
    return int(match.group(1), 16) if match else None
