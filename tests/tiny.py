"""A small config of unlike dims, and how to make its model."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from jpeglm_jax.config import Config, DataConfig, JpegConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from jpeglm_jax.data.flags import flag
from jpeglm_jax.model import Llama

MODEL = ModelConfig(
    vocab_size=13,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=22,
    dtype="float32",
    remat="none",
    attention="reference",
)


def model(**changes) -> Llama:
    """Of `MODEL` with changes, on the mesh that is set; weights by numpy, which need no compilation."""
    config = dataclasses.replace(MODEL, **changes)
    mesh, rng = jax.sharding.get_mesh(), np.random.default_rng(0)

    def draw(weight):
        spec = weight.sharding.spec if weight.sharding else jax.P()
        return jax.device_put(rng.normal(0, 0.3, weight.shape).astype(np.float32), jax.NamedSharding(mesh, spec))

    return jax.tree.map(draw, jax.eval_shape(lambda: Llama(config, nnx.Rngs(0))))


def config(run, **changes) -> Config:
    """A run that trains in seconds, on flags in a folder beside it."""
    folder = Path(run).parent / "flags"
    if not folder.exists():
        folder.mkdir(parents=True)
        for index in range(60):
            Image.fromarray(flag(index, 48)).save(folder / f"{index:02}.png")
    return Config(
        run=str(run),
        codec=JpegConfig(size=48),
        data=DataConfig(path=str(folder), packing="chunks", sequence_length=67, batch_size=8, holdout=11),
        model=dataclasses.replace(MODEL, vocab_size=None),
        optim=OptimConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=3),
        mesh=MeshConfig(),
        train=TrainConfig(steps=7, log_every=2, eval_every=4, eval_batches=2, sample_every=0, save_every=3),
        **changes,
    )
