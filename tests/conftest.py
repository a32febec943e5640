"""Eight virtual devices, and no silent rank promotion, for every test."""

import os

# Before JAX is imported: also for the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """A directory of compiled programs for the tests of a file, most of which compile the same."""
    directory = str(tmp_path_factory.mktemp("compilations"))
    ours = {"jax_compilation_cache_dir": directory, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in ours}
    for values in (ours, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks once where it is
        if values is ours:
            yield directory
