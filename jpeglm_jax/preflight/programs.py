"""What a compiled TPU program says of itself: memory, the compiler's estimate of cycles, and collectives."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax

GIB = 2**30

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Program:
    """Figures of a program, of one chip."""

    peak: float
    """GiB at the highest point, arguments included."""
    arguments: float
    """GiB of the arguments."""
    cycles: float | None
    """The compiler's estimate for everything but Pallas kernels and collectives; None if the program's text could not be had,
    as with some pairs of jax and libtpu."""
    collectives: dict[str, float]
    """GiB by kind that a chip gives into, or for an all-gather gets out of, collectives."""


def read(compiled: jax.stages.Compiled, layers: int, parts: int = 1) -> Program:
    """The figures of a compiled program.

    Args:
      layers: iterations of its loops over layers: the text of a program does not carry them.
      parts: iterations of a loop around those.
    """
    memory = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        cycles, collectives = None, {}
    else:
        cycles, collectives = cycles_and_collectives(text, layers, parts)
    return Program(memory.peak_memory_in_bytes / GIB, memory.argument_size_in_bytes / GIB, cycles, collectives)


def cycles_and_collectives(text: str, layers: int, parts: int) -> tuple[float, dict[str, float]]:
    """Of a program's text: estimated cycles, and GiB by kind of collective."""
    computations, entry = _computations(text)
    cycles, moved, seen = 0, collections.Counter(), set()

    def loops(name: str) -> list[str]:
        return [body for line in computations[name] if (body := _found(r" while\(.*body=%?([\w.\-]+)", line))]

    def visit(name: str, times: int) -> None:
        nonlocal cycles
        for line in computations[name]:
            if (body := _found(r" while\(.*body=%?([\w.\-]+)", line)) is not None:
                visit(body, times * (parts if loops(body) else layers))
                continue
            cycles += times * int(_found(r'"estimated_cycles":"?(\d+)', line) or 0)
            collective(line, name, times)
            # A collective that runs beside other work is taken apart over several fusions, in which it stands again.
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                inside(called, times)

    def inside(name: str, times: int) -> None:
        for line in computations[name]:
            collective(line, name, times)
            for called in re.findall(r"calls=%?([\w.\-]+)", line):
                inside(called, times)

    def collective(line: str, where: str, times: int) -> None:
        match = re.search(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(.*channel_id=(\d+)", line)
        if not match or (*match.groups()[1:], match[1]) in seen:
            return
        seen.add((*match.groups()[1:], match[1]))
        # The TPU's compiler writes a reduce-scatter as an all-reduce in a fusion of this name.
        kind = "reduce-scatter" if where.startswith("all-reduce-scatter") else match[2]
        moved[kind] += times * max(map(_size, re.findall(r"(\w+)\[([\d,]*)\]", match[1])), default=0) / GIB

    visit(entry, 1)
    return cycles, dict(moved)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the name of the entry."""
    found, current, entry = {}, None, ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line) if current is None else None
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":  # a Pallas call's text has lines that begin with one
            current = None
        elif current is not None:
            current.append(line)
    return found, entry


def _found(pattern: str, line: str) -> str | None:
    match = re.search(pattern, line)
    return match and match[1]


def _size(shape: tuple[str, str]) -> int:
    return _BYTES.get(shape[0], 0) * math.prod(int(dim) for dim in shape[1].split(",") if dim)


def excess(error: Exception) -> float | None:
    """GiB that a program has too much, from the compiler's refusal; None where it was not refused for memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}
    sizes: list[Any] = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", text) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text
    )
    if not sizes:
        return math.nan
    used, unit, available, available_unit = sizes.groups()
    return float(used) * units[unit] - float(available) * units[available_unit]
