"""The device mesh and every PartitionSpec, named by the dims that they lay out.

Dims, here and in the whole package: B batch, R a few rows, T time, S cache slots, V vocabulary, D width, F MLP width,
N query heads, K key/value heads, G query heads a key/value head, H head size, L layers.

The axes are Explicit: a layout is part of an array's type, and one that does not fit is an error at trace time.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jpeglm_jax.config import MeshConfig, ModelConfig

BATCH = ("data", "fsdp")
"""The axes that a batch is split over: fsdp holds shards of weights, but works on examples of its own."""

# Weights: one dim over fsdp (gathered when used), heads and MLP columns over tensor. The vocabulary is too small to split.
VD, DV = P(None, "fsdp"), P("fsdp", None)
DNH, NHD = P("fsdp", "tensor", None), P("tensor", None, "fsdp")
DF, FD = P("fsdp", "tensor"), P("tensor", "fsdp")
REPLICATED = P()

# Activations.
BT, BTD, BTV = P(BATCH, None), P(BATCH, None, None), P(BATCH, None, None)
BTF = P(BATCH, None, "tensor")
BTNH = P(BATCH, None, "tensor", None)
BNH = P(BATCH, "tensor", None)
LBKSH = P(None, BATCH, "tensor", None, None)
LRKTH = P(None, None, "tensor", None, None)  # a few rows, on every device


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes data, fsdp and tensor.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = int(np.prod([size for size in sizes.values() if size > 0]))
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if np.prod(list(sizes.values())) != len(devices):
        raise ValueError(
            f"mesh {' x '.join(f'{axis}={size}' for axis, size in sizes.items())} does not fit {len(devices)} devices; "
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to it, or one of them to -1"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Explicit,) * 3, devices=devices)


def check_divides(config: ModelConfig, mesh: Mesh) -> None:
    """Whether every weight can be split over the mesh.

    Raises:
      ValueError: one cannot; the message names both numbers.
    """
    for name, axis in (("width", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp_width", "tensor")):
        size, parts = getattr(config, name), mesh.shape[axis]
        if size % parts:
            raise ValueError(f"model.{name} ({size}) does not divide over mesh.{axis} ({parts}); change one of them")
