"""Compiles the decoding of the 7B, bfloat16, batch 8 of 12,288 positions, for v5e:2x4, heads over the tensor axis.

Prints GiB a chip as JSON: the cache, and the temporary memory of a chunk and of a refill. Needs libtpu, and no TPU.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

from jpeglm_jax import grammar, sharding
from jpeglm_jax.codecs import jpeg
from jpeglm_jax.config import JpegConfig, MeshConfig, ModelConfig
from jpeglm_jax.model import Llama, in_dtype
from jpeglm_jax.sampling import generate
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.tokenizer import EOS, Symbols

BATCH, LENGTH, PROMPT = 8, 12288, 2560
GIB = 2**30

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=8), list(topology.devices))


def abstract(array, spec=None):
    spec = spec or (array.sharding.spec if getattr(array, "sharding", None) else jax.P())
    return jax.ShapeDtypeStruct(np.shape(array), jnp.result_type(array), sharding=jax.NamedSharding(mesh, spec))


def temporary(function, *arguments) -> float:
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / GIB


with jax.set_mesh(mesh):
    config = ModelConfig(vocab_size=Symbols(256).vocab_size)
    model = jax.tree.map(abstract, jax.eval_shape(lambda: in_dtype(Llama(config, nnx.Rngs(0)))))
    slots = jax.tree.map(abstract, jax.eval_shape(lambda: generate.empty_slots(model, BATCH, LENGTH)))
    codec = jpeg.Codec(JpegConfig())
    tables = jax.tree.map(abstract, grammar.make(codec, Symbols(256).spellings, EOS).tables)
    by_row = [abstract(np.zeros((1, PROMPT), np.int32), sharding.BT)]
    dtypes = ["int32"] * 4 + ["uint32"] + ["int32"] * 2
    by_row += [abstract(np.zeros(1, dtype), jax.P(sharding.BATCH)) for dtype in dtypes]
    print(json.dumps({
        "cache": sum(array.size * array.dtype.itemsize for array in slots.cache) / 8 / GIB,
        "chunk": temporary(generate.run_chunk, model, tables, Sampler(1.0, 40, 0.9), slots, np.int32(1), np.int32(128)),
        "refill": temporary(generate._admit, model, tables, Sampler(), slots, tuple(by_row)),
    }))
