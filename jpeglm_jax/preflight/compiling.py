"""Compiles a run's programs for a slice that is not there; run as a process of its own by `report.py`, one for each program.

The compiler prints to stderr whatever happens, and takes the process with it when it fails badly.
"""

import dataclasses
import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jpeglm_jax import codecs, grammar, sharding, tokenizer
from jpeglm_jax import config as configs
from jpeglm_jax.config import Config
from jpeglm_jax.model import Llama, in_dtype
from jpeglm_jax.preflight import programs
from jpeglm_jax.preflight.slices import GENERATIONS, Topology, topology
from jpeglm_jax.sampling import generate
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.train import jit_step, make_state

DECODED = 8
"""Pictures that a copy of the model writes at a time."""


def devices(where: Topology) -> list[jax.Device]:
    """Devices of the slice, good for compiling only."""
    slices = {"num_slices": where.count} if where.count > 1 else {}
    name = f"{where.generation}:{where.shape}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)


def train_step(config: Config, where: Topology) -> dict[str, Any]:
    """Figures of the training step.

    Raises:
      ValueError: the mesh, the model or the batch does not divide over the slice.
    """
    chips = devices(where)
    mesh = sharding.make_mesh(config.mesh, chips)
    sharding.check_divides(config.model, mesh)
    data = config.data
    parts = sharding.batch_parts(data.batch_size, config.optim.rows_per_device, mesh)
    with jax.set_mesh(mesh):
        state = _placed(jax.eval_shape(lambda: make_state(config)), mesh)
        tokens = jax.ShapeDtypeStruct(
            (data.batch_size, data.sequence_length), np.int32, sharding=NamedSharding(mesh, sharding.BT)
        )
        lowered = jit_step(config, np.ones(config.model.vocab_size)).lower(state, {"inputs": tokens, "targets": tokens})
        return _compiled(lowered, config.model.layers, parts) | {
            "hosts": len({chip.process_index for chip in chips}),
            "device": chips[0].device_kind,
            "parts": parts,
            "state": sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)) / 2**30,
        }


def decode_step(config: Config, where: Topology) -> dict[str, Any]:
    """Figures of the sampling loop: `DECODED` pictures at a time for each copy of the model, heads over the chips."""
    mesh = sharding.make_mesh(sharding.decode_mesh(config.model, where.chips), devices(where))
    codec = codecs.make(config.codec)
    spell = tokenizer.load(config.tokenizer, codec.alphabet_size)
    with jax.set_mesh(mesh):
        model = _placed(jax.eval_shape(lambda: in_dtype(Llama(config.model, nnx.Rngs(0)))), mesh)
        tables = grammar.make(codec, spell.spellings, tokenizer.EOS).tables
        batch = DECODED * sharding.batch_shards(mesh)
        slots = _placed(jax.eval_shape(lambda: generate.empty_slots(model, batch, config.data.sequence_length)), mesh)
        lowered = generate.run_chunk.lower(
            model, _placed(tables, mesh), Sampler(), slots, np.int32(1), np.int32(generate.CHUNK)
        )
        return _compiled(lowered, config.model.layers, 1) | {"batch": batch, "tensor": mesh.shape["tensor"]}


def _placed(tree: Any, mesh: Mesh) -> Any:
    def placed(array):
        spec = array.sharding.spec if getattr(array, "sharding", None) else jax.P()
        return jax.ShapeDtypeStruct(np.shape(array), jax.numpy.result_type(array), sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)


def _compiled(lowered: jax.stages.Lowered, layers: int, parts: int) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        excess = programs.excess(error)
        if excess is None:
            raise
        return {"excess": excess, "compile_seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    return dataclasses.asdict(programs.read(compiled, layers, parts)) | {"excess": None, "compile_seconds": seconds}


PROGRAMS = {"train": train_step, "decode": decode_step}

if __name__ == "__main__":
    request = json.load(sys.stdin)
    try:
        figures = PROGRAMS[request["program"]](configs.from_json(request["config"]), topology(request["topology"]))
    except ValueError as error:
        figures = {"error": str(error)}
    json.dump(figures, sys.stdout)
