"""Eight virtual devices, and no silent rank promotion, for every test."""

import os

# Before JAX is imported: also for the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jpeglm_jax import sharding  # noqa: E402
from jpeglm_jax.config import MeshConfig  # noqa: E402


@pytest.fixture
def one_device():
    """A mesh of one device, set for the test."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
