"""Bytes that one device moves in a program: to its neighbours by kind, and through its memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hippocampus.planning.hlo import Computation, Counts, Instruction, Module, Shape, count_runs

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "optimization-barrier", "add-dependency",
    "async-start"))
_CHAIN = "chain_id="
_WINDOWS = frozenset(("dynamic-slice", "slice", "gather"))


@dataclass(frozen=True)
class Traffic:
    """What one device moves in one run.

    Attributes:
      sent: kind of collective -> bytes that leave the device, if all of them go round rings.
      count: kind of collective -> how many are run.
      memory: bytes read from and written to the main memory.
      unknown_loops: loops whose trip count is unknown; they were counted once.
    """

    sent: dict[str, int]
    count: dict[str, int]
    memory: int
    unknown_loops: tuple[str, ...]


def traffic(module: Module) -> Traffic:
    """Adds up every instruction times how often it runs.

    Memory traffic is an estimate: operands plus results of every instruction that is not fused
    into another; of a slice only what is sliced, of an update in place only what is written. What
    the compiler keeps in the on-chip memory (layout `S(1)`) does not count.
    """
    counts = count_runs(module)
    sent, count = dict.fromkeys(COLLECTIVES, 0), dict.fromkeys(COLLECTIVES, 0)
    for table in (counts.executed, counts.fused):
        for name, times in table.items():
            computation = module.computations.get(name)
            if computation is None:
                continue
            for kind, size in _collectives(module, computation):
                sent[kind] += times * size
                count[kind] += times
    memory = sum(size for _, size in memory_traffic(module, counts))
    return Traffic(sent, count, memory, counts.unknown_loops)


def memory_traffic(module: Module, counts: Counts | None = None
                   ) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that runs by itself, and the bytes it moves in one run of the program."""
    counts = counts or count_runs(module)
    for name, times in counts.executed.items():
        if computation := module.computations.get(name):
            for instruction in computation.instructions.values():
                yield instruction, times * _memory_bytes(module, computation, instruction)


def ring_bytes(kind: str, operand_bytes: float, group: int) -> float:
    """Bytes that each of `group` devices sends, for the operand that each of them gives.

    All-reduce is a reduce-scatter and an all-gather; each of those sends all but one of the
    `group` parts on.

    Source: Patarasuk & Yuan 2009, Bandwidth optimal all-reduce algorithms, section 3.
    """
    if kind == "collective-permute":
        return operand_bytes
    share = (group - 1) / group
    return operand_bytes * {"all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share,
                            "all-gather": group - 1}[kind]


def group_size(attributes: str, partitions: int) -> int:
    """Devices that take part together, from any of the forms of `replica_groups`."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        # 'x':(1)2 is the part of size 2 of the axis x.
        return math.prod(int(part or sizes[axis]) for axis, part in
                         re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d, ]*)\}", attributes):
        return len(listed[1].split(","))
    return partitions


def _collectives(module: Module, computation: Computation) -> Iterator[tuple[str, int]]:
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if _CHAIN in instruction.attributes and _part(computation) != "start":
            continue
        group = group_size(instruction.attributes, module.partitions)
        if computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU compiler's form: an all-reduce fused with a slice
        if group > 1 or kind == "collective-permute":
            operands = sum(shape.bytes for shape in _operand_shapes(computation, instruction))
            yield kind, round(ring_bytes(kind, operands, group))


def _operand_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
    return [shape for name in instruction.operands if name in computation.instructions
            for shape in computation.instructions[name].shapes]


def _in_memory(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.in_main_memory)


def _memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    known = computation.instructions
    operands = [known[name].shapes for name in instruction.operands if name in known]
    if opcode == "copy-start":  # (destination, source, context)
        return _in_memory(instruction.shapes[:2])
    if opcode in ("slice-start", "dynamic-slice-start"):  # (operands, window, context)
        window = instruction.shapes[-2]
        read = window.bytes if _in_memory(operands[0] if operands else ()) else 0
        return read + _in_memory((window,))
    if opcode in _WINDOWS:
        source = operands[0] if operands else ()
        read = sum(s.bytes for s in instruction.shapes) if _in_memory(source) else 0
        return read + _in_memory(instruction.shapes)
    if opcode == "dynamic-update-slice":
        written = sum(s.bytes for s in operands[1]) if _in_memory(instruction.shapes) else 0
        return written + _in_memory(operands[1])
    if opcode == "fusion":
        callee = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
        inner = module.computations.get(callee[1]) if callee else None
        if inner is not None:
            return _fusion_bytes(inner, operands, instruction)
    if opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, …)
        return _in_memory(instruction.shapes)
    return sum(map(_in_memory, operands)) + _in_memory(instruction.shapes)


def _fusion_bytes(inner: Computation, operands: list[tuple[Shape, ...]],
                  fusion: Instruction) -> int:
    """Reads of each parameter, by what the fusion does with it, and writes of each result."""
    part = _part(inner)
    if part in ("start", "done"):  # the one gives (operands, results, …), the other nothing new
        return _in_memory(fusion.shapes) if part == "start" else 0
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.instructions.values():
        for name in dict.fromkeys(instruction.operands):
            users.setdefault(name, []).append(instruction)
    total = 0
    for parameter in inner.instructions.values():
        if parameter.opcode == "parameter" and int(parameter.inside) < len(operands):
            if part and all(_CHAIN in user.attributes or user.name == inner.root
                            for user in users.get(parameter.name, ())):
                continue
            whole = _in_memory(operands[int(parameter.inside)])
            total += min(whole, _read_bytes(parameter, users)) if whole else 0
    root = inner.instructions[inner.root]
    results = [root] if root.opcode != "tuple" else [
        inner.instructions[name] for name in root.operands if name in inner.instructions]
    if len(results) != len(fusion.shapes):
        return total + _in_memory(fusion.shapes)
    for result, shape in zip(results, fusion.shapes, strict=True):
        while result.opcode == "bitcast" and result.operands[0] in inner.instructions:
            result = inner.instructions[result.operands[0]]
        if part and (result.opcode == "parameter" or _CHAIN in result.attributes):
            continue
        size = shape.bytes
        if result.opcode == "dynamic-update-slice":
            size = sum(s.bytes for s in inner.instructions[result.operands[1]].shapes)
        total += size if shape.in_main_memory else 0
    return total


def _part(computation: Computation) -> str:
    """What of a collective in a chain of fusions this one is: "start", "middle", "done" or "".

    The TPU compiler runs a collective beside others' work: one fusion begins it, any number, which
    compute something else, take its arrays in and hand them on, and one ends it. Each of them has
    a copy of the instruction with the number of the chain; the work is done once.
    """
    found = ""
    for instruction in computation.instructions.values():
        if "AsyncCollectiveStart" in instruction.attributes:
            return "start"
        if "AsyncCollectiveDone" in instruction.attributes:
            return "done"
        if _CHAIN in instruction.attributes:
            found = "middle"
    return found


def _read_bytes(array: Instruction, users: dict[str, list[Instruction]]) -> int:
    """What is read of an array in a fusion: all, or the windows that are cut from it."""
    total = 0
    for user in users.get(array.name, ()):
        if user.opcode == "bitcast":
            total += _read_bytes(user, users)
        elif user.opcode in _WINDOWS and user.operands[0] == array.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == array.name:
            continue  # updated in place
        else:
            return sum(shape.bytes for shape in array.shapes)
    return total
