"""A program compiled for a TPU, as text: its operations with the compiler's estimate of their cycles. No benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Operation:
    cycles: int  # of all its turns
    turns: int
    product: bool  # a matrix product, with what is fused to it
    what: str  # opcode and result
    source: str  # JAX's name of it, and the line of Python


def operations(text: str) -> Iterator[Operation]:
    """What a compiled program executes, with the compiler's estimate."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name and line.startswith("  "):
            bodies[name].append(line)
    frames = python_lines(text)

    def multiplies(line: str) -> bool:
        inner = called(line, "calls")
        return bool(re.search(r" (convolution|dot)\(", line)) or any(map(multiplies, bodies.get(inner, ())))

    def walk(computation: str, turns: int) -> Iterator[Operation]:
        for line in bodies.get(computation, ()):
            opcode = re.search(r"[})\]] ([a-z][\w\-]*)\(", line)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            if cycles and int(cycles[1]):
                shape = re.search(r" = \(?(\w+\[[\d,]*\])", line)
                what = f"{opcode[1] if opcode else '?'} {shape[1] if shape else ''}"
                source = source_of((line, *bodies.get(called(line, "calls"), ())), frames)
                yield Operation(turns * int(cycles[1]), turns, multiplies(line), what, source)
            # What holds other computations: a loop, a call; of branches the longest.
            if opcode and opcode[1] == "while":
                yield from walk(called(line, "body"), turns * trips(bodies[called(line, "condition")], line))
            elif opcode and opcode[1] in ("call", "async-start"):
                yield from walk(called(line, "to_apply") or called(line, "calls"), turns)
            elif opcode and opcode[1] == "conditional":
                names = re.findall(r"%([\w.\-]+)", re.search(r"branch_computations=\{(.*?)\}", line)[1])
                yield from max((list(walk(one, turns)) for one in names), key=lambda ops: sum(o.cycles for o in ops))

    yield from walk(entry, 1)


def called(line: str, role: str) -> str:
    found = re.search(rf"{role}=%?([\w.\-]+)", line)
    return found[1] if found else ""


def trips(condition: list[str], line: str) -> int:
    """How often a loop turns: as the compiler says, or the constant that its counter, from 0 on, stays below."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    bounds = [int(found) for found in re.findall(r" constant\((\d+)\)", "\n".join(condition))]
    if not known and len(bounds) != 1:
        raise ValueError(f"How often does this loop turn? {line[:200]}")
    return int(known[1]) if known else bounds[0]


def python_lines(text: str) -> dict[str, str]:
    """The id of a stack frame -> "file.py:line"."""
    tables = text.split("\n\n")[:8]
    table = {part.strip().splitlines()[0]: part for part in tables if part.strip()}
    files = dict(re.findall(r'^(\d+) "(.*)"$', table.get("FileNames", ""), re.M))
    at = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", table.get("FileLocations", ""), re.M)
    lines = {one: f"{Path(files.get(file, '?')).name}:{line}" for one, file, line in at}
    found = re.findall(r"^(\d+) \{file_location_id=(\d+)", table.get("StackFrames", ""), re.M)
    return {frame: lines.get(location, "") for frame, location in found}


def source_of(lines: Sequence[str], frames: Mapping[str, str]) -> str:
    """Where an operation comes from, by its own line or else by those that are fused to it."""
    for line in lines:
        name, frame = re.search(r'op_name="([^"]*/[^"]*)"', line), re.search(r"stack_frame_id=(\d+)", line)
        if name:  # the passes that matter, and the end of the path
            passes = [word for word in ("transpose", "rematted_computation") if word in name[1]]
            return " ".join([*passes, name[1].rsplit("/", 1)[-1], frames.get(frame[1] if frame else "", "")])
    # The compiler's own: what it works on tells more than nothing.
    operand = re.search(r"\w\((%[\w.\-]+)", lines[0])
    return f"on {operand[1]}" if operand else ""
