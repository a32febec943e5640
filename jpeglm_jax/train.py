"""The training step, a pure function, and the loop around it.

The loop keeps one order: evaluate, sample, save, next batch, step. So the checkpoint of step n holds the model after n batches
and n, the number of the next one, and nothing that a resumed run computes depends on where the run before it was stopped.
"""

import dataclasses
import logging
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from jpeglm_jax import loss, metrics, optim, runs, sharding
from jpeglm_jax.checkpoints import Checkpoints, Progress
from jpeglm_jax.config import Config
from jpeglm_jax.data.packing import Batches
from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.evaluation import likelihood
from jpeglm_jax.grammar import Grammar
from jpeglm_jax.loss import Batch, Sums
from jpeglm_jax.model import Llama
from jpeglm_jax.sampling import complete, sheets
from jpeglm_jax.sampling.rules import Sampler

log = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    model: Llama
    optimizer: optax.OptState


def make_step(config: Config, lengths_V: np.ndarray) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The training step: a pure function of state and batch, to be jitted inside the mesh."""
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    parts = config.optim.accumulation

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        # Parts are sums over the tokens of the whole batch, so they add up to the same gradient however it is cut.
        tokens = jnp.maximum(jnp.sum(batch["targets"] != loss.PAD), 1).astype(jnp.float32)

        def part_loss(model, part):
            totals, z = loss.sums(model(part["inputs"]), part["targets"], lengths_V)
            return (totals["nll"] + config.optim.z_loss * z) / tokens, totals

        def add_part(carry, part):
            return jax.tree.map(jnp.add, carry, jax.grad(part_loss, has_aux=True)(state.model, part)), None

        if parts == 1:
            gradients, totals = jax.grad(part_loss, has_aux=True)(state.model, batch)
        else:
            # Every parts-th row, so that each device keeps the rows it has.
            cut = {
                name: jnp.reshape(x_BT, (-1, parts, x_BT.shape[1]), out_sharding=sharding.BTD).swapaxes(0, 1)
                for name, x_BT in batch.items()
            }
            first, rest = ({name: x[part] for name, x in cut.items()} for part in (0, slice(1, None)))
            carry, _ = jax.lax.scan(add_part, jax.grad(part_loss, has_aux=True)(state.model, first), rest)
            gradients, totals = carry
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
        totals["grad_norm"] = optax.global_norm(gradients)
        return TrainState(optax.apply_updates(state.model, updates), optimizer_state), totals

    return train_step


def make_state(config: Config) -> TrainState:
    """The state before the first step, made inside the mesh; `jax.eval_shape` gives its shapes and layouts."""
    model = Llama(config.model, nnx.Rngs(config.train.seed))
    return TrainState(model, optim.make_optimizer(config.optim, config.train.steps).init(model))


def train(config: Config) -> None:
    """Begins the run in `config.run`, or continues it from its newest checkpoint.

    Raises:
      ValueError: a setting that cannot work, no data, or a config or data that do not fit the run.
      metrics.TrainingError: a loss that is not finite.
      CheckpointError: a checkpoint that cannot be read or written; the earlier ones stay as they are.
    """
    data = Data(config)
    config = runs.open_or_create(dataclasses.replace(config, data=data.config), data.tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config.model, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulation
    if config.data.batch_size % rows:
        raise ValueError(
            f"data.batch_size ({config.data.batch_size}) must be a multiple of mesh.data x mesh.fsdp x optim.accumulation "
            f"({mesh.shape['data']} x {mesh.shape['fsdp']} x {config.optim.accumulation})"
        )
    host = (jax.process_index(), jax.process_count())
    lengths_path = epath.Path(config.run) / runs.LENGTHS
    train_batches = data.batches(data.train, lengths_path, *host)
    held_out_batches = data.batches(data.held_out, lengths_path, *host)
    with Checkpoints(config.run, config.train) as checkpoints, jax.set_mesh(mesh):
        first = checkpoints.latest() or 0
        if first:
            state = _restore(checkpoints, first, config, data, mesh)
        else:
            state = jax.jit(lambda: make_state(config))()
        _loop(config, data, train_batches, held_out_batches, checkpoints, first, state)


def _restore(checkpoints: Checkpoints, step: int, config: Config, data: Data, mesh: Mesh) -> TrainState:
    progress = checkpoints.progress(step)
    runs.check_fits(config, progress.config)
    changed = [name for name, value in data.identity().items() if progress.identity.get(name) != value]
    if changed:
        raise ValueError(f"{config.run} was trained on another {', '.join(changed)}; continue on the same, or begin a new run")
    log.info("continuing %s at step %d", config.run, step)
    return TrainState(*checkpoints.model_and_optimizer(step, *jax.eval_shape(lambda: make_state(config)), mesh))


def _loop(
    config: Config,
    data: Data,
    train_batches: Batches,
    held_out_batches: Batches,
    checkpoints: Checkpoints,
    first: int,
    state: TrainState,
) -> None:
    steps, every = config.train.steps, config.train
    lengths_V, grammar = data.tokenizer.lengths, complete.of(data.codec, data.tokenizer)
    train_step = jax.jit(make_step(config, lengths_V), donate_argnums=0)
    evaluate = likelihood.make_evaluate(lengths_V, grammar.tables)
    batches = iter(data.iterate(train_batches, start=first))
    with metrics.Recorder(config, first) as recorder:
        for step in range(first, steps + 1):

            def due(interval: int) -> bool:
                return interval > 0 and step > first and (step % interval == 0 or step == steps)

            evaluation = None
            if due(every.eval_every) or due(every.sample_every) or due(every.save_every):
                recorder.finish()
            if due(every.eval_every):
                evaluation = evaluate(state.model, held_out_batches, every.eval_batches)
                recorder.evaluation(step, evaluation)
            if due(every.sample_every):
                recorder.picture(step, "samples", _sheet(state.model, data, grammar))
            if due(every.save_every):
                recorder.flush()
                progress = Progress(config, next_batch=step, identity=data.identity())
                checkpoints.save(step, state.model, state.optimizer, progress, evaluation)
            if step == steps:
                break
            element = next(batches)
            batch = likelihood.place(element)
            # Metrics are fetched one step late and by `device_get`: nothing else may make the device wait.
            with jax.transfer_guard("disallow"):
                state, totals = train_step(state, batch)
            recorder.step(step + 1, totals, element["skipped"])
        checkpoints.wait()


def _sheet(model: Llama, data: Data, grammar: Grammar) -> np.ndarray:
    """Four held-out pictures, completed from half, and as many from nothing."""
    samples = sheets.held_out_samples(model, data, grammar, True, 4, 0.5, Sampler())
    return sheets.sheet({"real pictures": samples.real} | samples.rows())
