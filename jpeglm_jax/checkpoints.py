"""Checkpoints in a run directory: model, optimizer, place in the data and config of a step, in one directory. Orbax only here.

    RUN/checkpoints/STEP/model      parameters, by name
    RUN/checkpoints/STEP/optimizer  its state, by name
    RUN/checkpoints/STEP/progress   JSON: number of the next batch, identity of the data, config, what bad steps left

Saves are asynchronous and become visible whole or not at all.
"""

import dataclasses
import json
from typing import Any, Callable

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import checkpoint_managers as policies

from jpeglm_jax import config as configs
from jpeglm_jax.config import Config, TrainConfig

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides arrays."""

    config: Config
    next_batch: int
    """Number of the first batch that the model has not seen."""
    identity: dict[str, str]
    """What decides which tokens stand where in the data."""
    rollbacks: int = 0
    """Bad steps that the run has gone back from."""
    typical: float | None = None
    """Running mean of bits per byte, by which the next bad step is known."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one line."""


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, run: epath.PathLike, config: TrainConfig | None = None):
        """To read; with a config, to write and to delete those that it does not keep."""
        self.directory = epath.Path(run).resolve() / "checkpoints"  # Orbax wants it absolute
        # Kept are the newest, and the best of those that were evaluated.
        preserved = config and policies.AnyPreservationPolicy([
            policies.LatestN(config.keep_last),
            policies.BestN(
                get_metric_fn=lambda metrics: metrics["bits_per_byte"],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            ),
        ])
        options = ocp.CheckpointManagerOptions(
            create=config is not None,
            read_only=config is None,
            preservation_policy=preserved,
            cleanup_tmp_directories=config is not None,
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.manager.close()

    def latest(self) -> int | None:
        """The newest step that was saved whole."""
        return self.manager.latest_step()

    def save(
        self, step: int, model: PyTree, optimizer: PyTree, progress: Progress, metrics: dict[str, float] | None
    ) -> None:
        """Begins to save a step, after the one before is on disk.

        Raises:
          CheckpointError: the step before could not be written.
        """
        values = dataclasses.asdict(progress)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(_named(model)),
            optimizer=ocp.args.StandardSave(_named(optimizer)),
            progress=ocp.args.JsonSave(values),
        )
        self._write(lambda: self.manager.save(step, args=items, metrics=metrics, force=True))

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        self._write(self.manager.wait_until_finished)

    def progress(self, step: int) -> Progress:
        """What step `step` holds besides arrays.

        Raises:
          CheckpointError: it is damaged, or written by another version of this package.
        """
        values = self._read(step, progress=ocp.args.JsonRestore())["progress"]
        try:
            config = configs.from_json(json.dumps(values.pop("config")))
        except ValueError as error:
            raise CheckpointError(f"the config in {self.directory / str(step)} cannot be used: {error}") from error
        return Progress(config, **values)

    def model(self, step: int, abstract: PyTree, mesh: Mesh) -> PyTree:
        """The model of a step, each array read straight onto its shards; `abstract` gives shapes, dtypes and layouts."""
        return self._arrays(step, mesh, model=abstract)["model"]

    def model_and_optimizer(self, step: int, model: PyTree, optimizer: PyTree, mesh: Mesh) -> tuple[PyTree, PyTree]:
        """Both, likewise."""
        restored = self._arrays(step, mesh, model=model, optimizer=optimizer)
        return restored["model"], restored["optimizer"]

    def _arrays(self, step: int, mesh: Mesh, **abstract: PyTree) -> dict[str, PyTree]:
        def placed(leaf):
            spec = leaf.sharding.spec if leaf.sharding else P()  # a scalar made outside the mesh has none
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        targets = {item: _named(jax.tree.map(placed, tree)) for item, tree in abstract.items()}
        restored = self._read(step, **{item: ocp.args.StandardRestore(target) for item, target in targets.items()})
        return {
            item: jax.tree.unflatten(jax.tree.structure(tree), [restored[item][name] for name in targets[item]])
            for item, tree in abstract.items()
        }

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and tensorstore raise many types
            raise CheckpointError(f"cannot read {self.directory / str(step)}: {_one_line(error)}") from error

    def _write(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # Orbax and tensorstore raise many types
            whole = [step for step in self.manager.all_steps(read=True)]
            raise CheckpointError(
                f"cannot write to {self.directory}: {_one_line(error)}; "
                + (f"steps {', '.join(map(str, whole))} are whole" if whole else "no step was saved before")
                + ": make room and start again to go on from there"
            ) from error


def _named(tree: PyTree) -> dict[str, Any]:
    """Leaves by the names of their attributes: `blocks/attention/q_DNH`."""
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    assert len(set(names)) == len(names)
    return dict(zip(names, (leaf for _, leaf in leaves)))


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
