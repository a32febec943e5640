"""The training step, a pure function, and the loop around it.

The loop keeps one order: evaluate, sample, save, stop if preempted, next batch, step. So the checkpoint of step n holds the
model after n batches and the number of the next one, and nothing that a resumed run computes depends on where the run before
it was stopped, or on how many hosts and devices.
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

from jpeglm_jax import config as configs
from jpeglm_jax import distributed, loss, metrics, optim, runs, sharding
from jpeglm_jax.checkpoints import Checkpoints, Progress
from jpeglm_jax.config import Config
from jpeglm_jax.data.packing import Batches, Unreadable
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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        rows, mesh = len(batch["inputs"]), jax.sharding.get_abstract_mesh()
        parts = sharding.batch_parts(rows, config.optim.rows_per_device, mesh)
        # Parts are sums over the tokens of the whole batch, so they add up to the same gradient however it is cut.
        tokens = jnp.maximum(jnp.sum(batch["targets"] != loss.PAD), 1).astype(jnp.float32)

        def part_loss(model, part):
            totals, z = loss.sums(model(part["inputs"]), part["targets"], lengths_V)
            return (totals["nll"] + config.optim.z_loss * z) / tokens, totals

        differentiate = jax.grad(part_loss, has_aux=True)
        if parts == 1:
            gradients, totals = differentiate(state.model, batch)
        else:
            # Every parts-th row, so that each device keeps the rows it has.
            cut = {
                name: jnp.reshape(x_BT, (-1, parts, x_BT.shape[1]), out_sharding=sharding.BTD).swapaxes(0, 1)
                for name, x_BT in batch.items()
            }

            def add_part(sums, part):
                return jax.tree.map(jnp.add, sums, differentiate(state.model, part)), None

            none = (jax.tree.map(jnp.zeros_like, state.model), {name: jnp.zeros(()) for name in loss.TOTALS})
            (gradients, totals), _ = jax.lax.scan(add_part, none, cut)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
        totals["grad_norm"] = optax.global_norm(gradients)
        return TrainState(optax.apply_updates(state.model, updates), optimizer_state), totals

    return train_step


def jit_step(config: Config, lengths_V: np.ndarray) -> jax.stages.Wrapped:
    """The training step as it runs and as `jpeglm preflight` compiles it: the state is given away."""
    on_tpu = jax.sharding.get_mesh().devices.flat[0].platform == "tpu"
    options = dict(option.split("=", 1) for option in config.train.compiler_options.split()) if on_tpu else None
    return jax.jit(make_step(config, lengths_V), donate_argnums=0, compiler_options=options)


def make_state(config: Config) -> TrainState:
    """The state before the first step, made inside the mesh; `jax.eval_shape` gives its shapes and layouts."""
    model = Llama(config.model, nnx.Rngs(config.train.seed))
    return TrainState(model, optim.make_optimizer(config.optim, config.train.steps).init(model))


def train(config: Config) -> None:
    """Begins the run in `config.run`, or continues it from its newest checkpoint, alone or as one of several processes.

    A bad step (`TrainConfig.spike`) never reaches a checkpoint. It stops the run, or, `TrainConfig.rollbacks` times, sends it
    back to its newest checkpoint (or the beginning) and on with the batch after the bad one: what came between is left out.

    Raises:
      ValueError: a setting that cannot work, no data, or a config or data that do not fit the run.
      Preempted: SIGTERM came; the run is saved.
      metrics.TrainingError: a bad step, and no rollback left.
      RuntimeError: too many unreadable pictures, or another process stopped.
      CheckpointError: a checkpoint that cannot be read or written; the earlier ones stay as they are.
    """
    with distributed.together():
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_divides(config.model, mesh)
        sharding.batch_parts(config.data.batch_size, config.optim.rows_per_device, mesh)
        share = distributed.rows(mesh, config.data.batch_size)
        data = Data(config)
        config = runs.fill_in(dataclasses.replace(config, data=data.config), data.tokenizer)
    distributed.check_same({"config": configs.to_json(config)} | data.identity())
    with distributed.together():
        if jax.process_index() == 0:
            runs.open_or_create(config, data.tokenizer)
    with distributed.together():
        if not (epath.Path(config.run) / runs.CONFIG).exists():
            raise ValueError(f"{config.run} must be where all hosts of the run see the same files, like gs:// or NFS")
    with Checkpoints(config.run, config.train) as checkpoints, jax.set_mesh(mesh):
        with distributed.together():
            first, progress = _newest(checkpoints, config, data)
        distributed.check_same({"newest checkpoint": str(first)})
        lengths_path = epath.Path(config.run) / runs.LENGTHS
        _measure(data, lengths_path)
        with distributed.together():
            batches = [data.batches(selection, lengths_path, share) for selection in (data.train, data.held_out)]
        with distributed.Preemption() as preemption:
            while True:
                if first:
                    log.info("continuing %s at step %d", config.run, first)
                    abstract = jax.eval_shape(lambda: make_state(config))
                    state = TrainState(*checkpoints.model_and_optimizer(first, *abstract, mesh))
                else:
                    state = _begin(checkpoints, config, mesh)
                try:
                    with distributed.alone(unless=metrics.BadStep):
                        return _loop(config, data, *batches, checkpoints, preemption, first, progress, state)
                except metrics.BadStep as bad:
                    if progress.rollbacks >= config.train.rollbacks:
                        raise metrics.TrainingError(
                            f"{bad}; checkpoints are of earlier steps. A lower optim.learning-rate, a longer "
                            "optim.warmup-steps, model.qk-norm or optim.z-loss make training more stable"
                        ) from bad
                    checkpoints.wait()
                    first, stored = _newest(checkpoints, config, data)
                    log.warning("%s: back to step %d, batches %d to %d are left out", bad, first, stored.next_batch, bad.batch)
                    progress = dataclasses.replace(stored, next_batch=bad.batch + 1, rollbacks=progress.rollbacks + 1)


class Preempted(SystemExit):
    """SIGTERM came, and the run is saved: the same command continues it.

    The exit status is 75 (EX_TEMPFAIL of sysexits.h, "try again"), which is neither that of an error (1) nor that of a process
    which SIGTERM ended before it could save (143).
    """

    def __init__(self):
        super().__init__(75)


def _newest(checkpoints: Checkpoints, config: Config, data: Data) -> tuple[int, Progress]:
    """Step of the newest checkpoint and what it holds besides arrays, or those of the beginning."""
    step = checkpoints.latest()
    if not step:  # an imported model is step 0, of no batch
        return 0, Progress(config, next_batch=0, identity=data.identity())
    progress = checkpoints.progress(step)
    runs.check_fits(config, progress.config)
    changed = [name for name, value in data.identity().items() if progress.identity.get(name) != value]
    if changed:
        raise ValueError(f"{config.run} was trained on another {', '.join(changed)}; continue on the same, or begin a new run")
    return step, dataclasses.replace(progress, config=config)


def _measure(data: Data, path: epath.Path) -> None:
    """Makes the length index where it is needed and missing, each process a share of it."""
    with distributed.together():
        missing = data.config.packing == "chunks" and not path.exists()
    if not missing:
        return
    count, size = len(data.source), -(-len(data.source) // jax.process_count())
    start = jax.process_index() * size
    lengths = np.zeros(size, np.int32)
    with distributed.together():
        if start < count:
            measured = data.measure(start, min(start + size, count))
            lengths[: len(measured)] = measured
    every = distributed.gather(lengths).ravel()[:count]
    with distributed.together():
        if jax.process_index() == 0:
            data.save_lengths(path, every)


def _begin(checkpoints: Checkpoints, config: Config, mesh: Mesh) -> TrainState:
    """The state before the first step; an imported model is the checkpoint of step 0, without an optimizer."""
    if checkpoints.latest() is None:
        return jax.jit(lambda: make_state(config))()
    log.info("%s begins with the model that was imported", config.run)
    model = checkpoints.model(0, jax.eval_shape(lambda: make_state(config)).model, mesh)
    return TrainState(model, jax.jit(optim.make_optimizer(config.optim, config.train.steps).init)(model))


def _loop(
    config: Config,
    data: Data,
    train_batches: Batches,
    held_out_batches: Batches,
    checkpoints: Checkpoints,
    preemption: distributed.Preemption,
    first: int,
    progress: Progress,
    state: TrainState,
) -> None:
    steps, every = config.train.steps, config.train
    lengths_V, grammar = data.tokenizer.lengths, complete.of(data.codec, data.tokenizer)
    train_step = jit_step(config, lengths_V)
    evaluate = likelihood.make_evaluate(lengths_V, grammar.tables)
    ahead = progress.next_batch - first  # by the batches that were left out
    batches = iter(data.iterate(train_batches, start=progress.next_batch))
    unreadable = Unreadable(config.data.max_unreadable)
    with metrics.Recorder(config, first, progress.typical) as recorder:
        for step in range(first, steps + 1):

            def due(interval: int) -> bool:
                return interval > 0 and step > first and (step % interval == 0 or step == steps)

            evaluation, preempted = None, preemption.reached(step)
            saving = due(every.save_every) or preempted and step > first
            if due(every.eval_every) or due(every.sample_every) or saving:
                recorder.finish()
            if due(every.eval_every):
                evaluation = evaluate(state.model, held_out_batches, every.eval_batches)
                recorder.evaluation(step, evaluation)
            if due(every.sample_every):
                recorder.picture(step, "samples", _sheet(state.model, data, grammar))
            if saving:
                recorder.flush()
                progress = dataclasses.replace(progress, next_batch=step + ahead, typical=recorder.typical)
                checkpoints.save(step, state.model, state.optimizer, progress, evaluation)
            if step == steps:
                break
            if preempted:
                checkpoints.wait()
                log.info("SIGTERM: %s stopped at step %d, saved; the same command continues it", config.run, step)
                raise Preempted
            element = next(batches)
            unreadable.add(element["pictures"], element["skipped"])
            batch = likelihood.place(element)
            # Metrics are fetched one step late and by `device_get`: nothing else may make the device wait.
            with jax.transfer_guard("disallow"):
                state, totals = train_step(state, batch)
            recorder.step(step + 1, step + ahead, totals, element["skipped"])
        checkpoints.wait()


def _sheet(model: Llama, data: Data, grammar: Grammar) -> np.ndarray:
    """Four held-out pictures, completed from half, and as many from nothing."""
    samples = sheets.held_out_samples(model, data, grammar, True, 4, 0.5, Sampler())
    return sheets.sheet({"real pictures": samples.real} | samples.rows())
