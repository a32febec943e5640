"""Loads the model of a run in float16 on a mesh of eight devices, and saves it from there as another run: RUN OTHER."""

import dataclasses
import sys

import jax
import numpy as np
from etils import epath
from flax import nnx

jax.config.update("jax_num_cpu_devices", 8)

from jpeglm_jax import config as configs  # noqa: E402
from jpeglm_jax import runs, sharding  # noqa: E402
from jpeglm_jax.checkpoints import Checkpoints, Progress  # noqa: E402
from jpeglm_jax.model import Llama  # noqa: E402

run, other = sys.argv[1:]
config = dataclasses.replace(runs.read(run), run=other)
mesh = sharding.make_mesh(config.mesh)
with jax.set_mesh(mesh), Checkpoints(other, config.train) as stored:
    abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype("float16"), Llama(config.model, nnx.Rngs(0))))
    model = Checkpoints(run).model(0, abstract, mesh)
    stored.save(1, model, {"count": np.zeros(3)}, Progress(config, 1, {}), None)
    stored.wait()
(epath.Path(other) / runs.TOKENIZER).write_bytes((epath.Path(run) / runs.TOKENIZER).read_bytes())
(epath.Path(other) / runs.CONFIG).write_text(configs.to_json(config))
