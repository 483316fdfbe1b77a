"""Compiled HLO as text, read as far as a plan needs it: instructions, calls and loop counts.

XLA's own cost analysis counts the body of a loop once. Here every computation knows how often it
runs: the product of the trip counts of the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALL = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)="
                   r"%?([\w.\-]+)")
_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')


@dataclass(frozen=True)
class Shape:
    """One array of a type: its size in bytes, and whether it lies in the main memory (HBM)."""

    bytes: int
    in_main_memory: bool


@dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    """What stands between the parentheses: operands, or a constant's value."""
    attributes: str


@dataclass
class Computation:
    """A list of instructions, in the order they run; the last one of `root` is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name; callees stand before their callers.
      entry: name of the one that is run.
      partitions: devices that the program was partitioned for.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int


@dataclass(frozen=True)
class Counts:
    """How often computations run.

    Attributes:
      executed: of those whose instructions each run by themselves (a body, a branch).
      fused: of those that run inside one instruction (a fusion, a reduction's function).
      unknown_loops: loops whose trip count could not be found; they count once.
    """

    executed: dict[str, int]
    fused: dict[str, int]
    unknown_loops: tuple[str, ...]


def parse(text: str) -> Module:
    """Reads the text of a compiled module (`jax.stages.Compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    for line in text.splitlines():
        if _END.match(line):  # attributes of a kernel may hold line breaks and braces
            current = None
        elif current is None:
            if begin := _COMPUTATION.match(line):
                current = computations[begin[2]] = Computation(begin[2])
                entry = begin[2] if begin[1] else entry
        elif begin := _INSTRUCTION.match(line):
            current.instructions[begin[2]] = _instruction(begin[2], line[begin.end():])
            current.root = begin[2] if begin[1] else current.root
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(Shape(math.ceil(_item_bits(kind) * math.prod(_dimensions(sizes)) / 8),
                       "S(" not in layout)
                 for kind, sizes, layout in _SHAPE.findall(text))


def count_runs(module: Module) -> Counts:
    """How often every computation runs in one run of the program.

    A conditional counts every branch. A loop's trips are the compiler's `known_trip_count`, or
    the constant that its condition compares a counter with.
    """
    executed = {module.entry: 1}
    fused: dict[str, int] = {}
    unknown = []
    for name in reversed(module.computations):  # callers before callees
        computation = module.computations[name]
        for table, inside in ((executed, False), (fused, True)):
            if name not in table:
                continue
            for instruction in computation.instructions.values():
                if instruction.opcode.endswith(("-done", "-update")):
                    continue  # names the computation that its -start has called
                times = table[name]
                if instruction.opcode == "while":
                    trips = _trips(module, instruction)
                    if trips is None:
                        unknown.append(instruction.name)
                    times *= trips or 1
                for role, callee in _callees(instruction):
                    own = executed if not inside and _runs_alone(instruction, role) else fused
                    own[callee] = own.get(callee, 0) + times
    return Counts(executed, fused, tuple(dict.fromkeys(unknown)))


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1:end - 1]
    return Instruction(name, shapes(kind), opcode, tuple(_NAME.findall(inside)), inside,
                       rest[end:])


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    return len(text)


def _item_bits(kind: str) -> int:
    bits = re.match(r"[a-z]+(\d+)", kind)  # f32, s4, u8, bf16, f8e4m3fn
    return _BITS.get(kind, int(bits[1]) if bits else 0)


def _dimensions(sizes: str) -> list[int]:
    return [int(size.strip(" <=")) for size in sizes.split(",") if size.strip(" <=")]


def _callees(instruction: Instruction) -> Iterator[tuple[str, str]]:
    yield from _CALL.findall(instruction.attributes)
    for names in _CALLS.findall(instruction.attributes):
        for name in names.split(","):
            yield "branch", name.strip().lstrip("%")


def _runs_alone(instruction: Instruction, role: str) -> bool:
    return (role in ("body", "condition", "branch", "true_computation", "false_computation")
            or instruction.opcode in ("call", "async-start"))


def _trips(module: Module, loop: Instruction) -> int | None:
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    roles = dict(_CALL.findall(loop.attributes))
    condition = module.computations.get(roles.get("condition", ""))
    test = condition.instructions.get(condition.root) if condition else None
    if condition is None or test is None:
        return None
    # The comparison may have been put into a fusion; the bound then stays outside, or inside.
    bounds = [i.inside for i in condition.instructions.values() if i.opcode == "constant"]
    inner = module.computations.get(dict(_CALL.findall(test.attributes)).get("calls", ""))
    tests = [test, *(inner.instructions.values() if inner else ())]
    if inner:
        bounds += [i.inside for i in inner.instructions.values() if i.opcode == "constant"]
    compares = [i for i in tests if i.opcode == "compare"]
    if len(compares) != 1 or len(bounds) != 1 or not bounds[0].isdigit():
        return None
    # jax.lax.scan and fori_loop count up from 0 by 1.
    return int(bounds[0]) if "direction=LT" in compares[0].attributes else None
