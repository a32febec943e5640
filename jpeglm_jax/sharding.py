"""The device mesh and every PartitionSpec, named by the dims that they lay out.

Dims, here and in the whole package: B batch, R a few rows, T time, S cache slots, V vocabulary, D width, F MLP width,
N query heads, K key/value heads, G query heads a key/value head, H head size, L layers.

The axes are Explicit: a layout is part of an array's type, and one that does not fit is an error at trace time.
"""

import math

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jpeglm_jax.config import MeshConfig, ModelConfig

FSDP = ("fsdp_x", "fsdp_y", "fsdp_z")
"""The axes that `mesh.fsdp` is made of: one for each dim of the TPU's torus, see `make_mesh`."""

BATCH = ("data", *FSDP)
"""The axes that a batch is split over: fsdp holds shards of weights, but works on examples of its own."""

# Weights: one dim over fsdp (gathered when used), heads and MLP columns over tensor. The vocabulary is too small to split.
VD, DV = P(None, FSDP), P(FSDP, None)
DNH, NHD = P(FSDP, "tensor", None), P("tensor", None, FSDP)
DF, FD = P(FSDP, "tensor"), P("tensor", FSDP)
REPLICATED = P()

# Activations.
BT, BTD, BTV = P(BATCH, None), P(BATCH, None, None), P(BATCH, None, None)
BTF = P(BATCH, None, "tensor")
BNTH = P(BATCH, "tensor", None, None)
BNH = P(BATCH, "tensor", None)
LBKSH = P(None, BATCH, "tensor", None, None)
LRKTH = P(None, None, "tensor", None, None)  # a few rows, on every device


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes data, fsdp_x, fsdp_y, fsdp_z and tensor.

    Where fsdp covers whole dims of a TPU's torus it gets an axis for each of them: the TPU's compiler reduce-scatters along
    one dim of the torus, while over several at once it all-reduces whole gradients. Slices are joined along data.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or a copy of the model would lie on several slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {' x '.join(f'{axis}={size}' for axis, size in sizes.items())} does not fit {len(devices)} devices; "
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to it, or one of them to -1"
        )
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh.data ({sizes['data']}) must be a multiple of the {slices} slices: only whole copies of the model may be "
            "joined by the slow network between them"
        )
    axes = ("data", *FSDP, "tensor")
    shape = (sizes["data"] // slices, *_fsdp_shape(devices, sizes["fsdp"], len(devices) // slices, sizes["tensor"]), sizes["tensor"])
    # An axis may take a part of a dim of the torus: heads over 32 chips of a slice of 8x8.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        between = (slices,) + (1,) * (len(axes) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(shape, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes, (AxisType.Explicit,) * len(axes))


def _fsdp_shape(devices: list[jax.Device], fsdp: int, slice_size: int, tensor: int) -> tuple[int, int, int]:
    """Sizes of the axes of fsdp: dims of the torus that tensor leaves whole, or else everything along one axis."""
    if fsdp * tensor == slice_size and getattr(devices[0], "coords", None):
        torus = np.max([device.coords for device in devices], axis=0) + 1
        for dim in range(2, -1, -1):
            shared = math.gcd(torus[dim], tensor)
            torus[dim], tensor = torus[dim] // shared, tensor // shared
        if math.prod(torus) == fsdp:
            return tuple(map(int, torus))
    return fsdp, 1, 1


def decode_mesh(model: ModelConfig, devices: int) -> MeshConfig:
    """For sampling: weights and cache split over as many devices as heads allow, and copies of that over the rest.

    A weight over fsdp would be gathered for every token.
    """
    tensor = math.gcd(devices, model.kv_heads, model.mlp_width)
    return MeshConfig(data=devices // tensor, fsdp=1, tensor=tensor)


def gather(weight: Array, dtype: str) -> Array:
    """A weight cast to `dtype`, whole but for its shards over tensor; its gradient is reduced to the shards of the weight.

    One axis after the other, so that each gradient can be reduce-scattered along a dim of the torus.
    """
    if weight.dtype != dtype:
        # The barrier keeps the compiler from casting the weights of all layers ahead of the loop over them.
        weight = jax.lax.optimization_barrier(weight).astype(dtype)
    for axis in ("data", *reversed(FSDP)):
        spec = jax.typeof(weight).sharding.spec
        weight = jax.reshard(weight, P(*(_without(axis, axes) for axes in spec.partitions), reduced=spec.reduced | {axis}))
    return weight


def _without(axis: str, axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    return tuple(other for other in ((axes,) if isinstance(axes, str) else axes or ()) if other != axis) or None


def check_divides(config: ModelConfig, mesh: Mesh) -> None:
    """Whether every weight can be split over the mesh.

    Raises:
      ValueError: one cannot; the message names both numbers.
    """
    for name, axis in (("width", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp_width", "tensor")):
        size, parts = getattr(config, name), math.prod(mesh.shape[part] for part in (FSDP if axis == "fsdp" else (axis,)))
        if size % parts:
            raise ValueError(f"model.{name} ({size}) does not divide over mesh.{axis} ({parts}); change one of them")


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_parts(batch_size: int, rows_per_device: int | None, mesh: Mesh | AbstractMesh) -> int:
    """Parts that a batch is computed in, one after the other, so that a device has `rows_per_device` rows at a time.

    Raises:
      ValueError: the rows do not divide; the message names the numbers.
    """
    shards = batch_shards(mesh)
    rows = shards * (rows_per_device or 1)
    if batch_size % rows:
        each = f" x optim.rows_per_device ({rows_per_device})" if rows_per_device else ""
        raise ValueError(
            f"data.batch_size ({batch_size}) must be a multiple of the {shards} devices of mesh.data and mesh.fsdp{each}"
        )
    return batch_size // rows if rows_per_device else 1
