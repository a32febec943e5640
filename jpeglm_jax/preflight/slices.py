"""TPU slices by name, and what their chips can do.

Names are those of Google Cloud: `v5e-64` counts chips, `v5p-64` counts cores, two a chip. `2xv5e-64` is two slices joined by the
data center's network. The compiler's own names, like `v5e:8x8`, are understood too.
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs, by a chip."""

    flops: float
    """Dense bfloat16 FLOP/s (Google's product pages)."""
    bandwidth: float
    """Bytes/s between HBM and chip (Google's product pages)."""
    hbm: float
    """GiB of HBM that a program can have: what the compiler of libtpu 0.0.42 names when one asks for more."""
    flops_per_cycle: int
    """Of all matrix units; with `flops` it gives the clock."""
    host_cpus: int
    """vCPUs of a host of a slice of many hosts (Google's machine types)."""
    shapes: dict[int, str]
    """Chips, or cores for v5p, of the slices there are, and how they are laid out."""


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
    2048: "8x8x16", 4096: "8x16x16",
}  # fmt: skip

GENERATIONS = {
    "v5e": Generation(197e12, 819e9, 15.75, 4 * 128 * 128 * 2, 112, _FLAT),
    "v6e": Generation(918e12, 1640e9, 31.25, 4 * 256 * 256 * 2, 180, _FLAT),
    "v5p": Generation(459e12, 2765e9, 95.74, 8 * 128 * 128 * 2, 208, _CUBES),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several equal ones."""

    name: str
    generation: str
    shape: str
    """As the compiler takes it: `8x8`."""
    count: int
    """Slices."""

    @property
    def chips(self) -> int:
        return self.count * math.prod(map(int, self.shape.split("x")))


def topology(name: str) -> Topology:
    """The slice, or slices, of a name.

    Raises:
      ValueError: there is no such slice; the message lists those there are.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(v\d+\w?)(?:litepod)?([-:])([\dx]+)", name.replace("v5litepod", "v5e"))
    count, kind, separator, size = match.groups() if match else (None,) * 4
    generation = GENERATIONS.get(kind)
    shapes = generation.shapes if generation else {}
    shape = shapes.get(int(size)) if separator == "-" and size.isdecimal() else size if size in shapes.values() else None
    if shape is None or count == "0":
        known = "; ".join(f"{kind}-{', -'.join(map(str, each.shapes))}" for kind, each in GENERATIONS.items())
        raise ValueError(f"no TPU slice {name!r}; there are: {known}; 2xv5e-64 is two of them, and v5e:8x8 is v5e-64")
    return Topology(name, kind, shape, int(count or 1))
