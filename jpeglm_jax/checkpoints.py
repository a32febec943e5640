"""Checkpoints in a run directory: model, optimizer, place in the data and config of a step, in one directory. Orbax only here.

    RUN/checkpoints/STEP/model      parameters, by name; stacked ones in chunks of one layer
    RUN/checkpoints/STEP/optimizer  its state, by name; none in the checkpoint that an import begins with
    RUN/checkpoints/STEP/progress   JSON: number of the next batch, identity of the data, config, what bad steps left

Saves are asynchronous and become visible whole or not at all.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
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
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(named(model), save_args=_in_layers(named(model))),
            optimizer=ocp.args.StandardSave(named(optimizer)),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
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
        """The model of a step, each array read straight onto its shards; `abstract` gives shapes, dtypes and layouts.

        What was saved in another dtype is cast. The host holds about one of the largest arrays at a time.
        """
        targets = _targets(abstract, mesh)
        # The limit must be above what the largest array takes, or Orbax refuses to read it.
        gigabytes = 1 + max(leaf.size * leaf.dtype.itemsize for leaf in targets.values()) // 10**9
        path = self.directory / str(step) / "model"
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes)) as reader:
                restored = reader.restore(path, args=ocp.args.StandardRestore(targets))
        except Exception as error:  # Orbax and tensorstore raise many types
            raise CheckpointError(f"cannot read {path}: {_one_line(error)}") from error
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in targets])

    def model_and_optimizer(self, step: int, model: PyTree, optimizer: PyTree, mesh: Mesh) -> tuple[PyTree, PyTree]:
        """Both, likewise."""
        restored = self._arrays(step, mesh, model=model, optimizer=optimizer)
        return restored["model"], restored["optimizer"]

    def arrays(self, step: int, names: Iterable[str]) -> dict[str, tensorstore.TensorStore]:
        """The parameters of a step, opened and not read: `array[3].read().result()` reads one layer.

        Raises:
          CheckpointError: there is no such step, or it has no parameter of a name.
        """
        path = self.directory / str(step) / "model"
        opened = {}
        for name in names:
            spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{_url(path)}/", "path": f"{name}/"}}
            try:
                opened[name] = tensorstore.open(spec, open=True, read=True).result()
            except Exception as error:  # tensorstore raises many types
                raise CheckpointError(f"cannot read {name} of {path}: {_one_line(error)}") from error
        return opened

    def _arrays(self, step: int, mesh: Mesh, **abstract: PyTree) -> dict[str, PyTree]:
        targets = {item: _targets(tree, mesh) for item, tree in abstract.items()}
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


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array whose values are asked for when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[np.ndarray], None]
    """Writes them into an array of that shape and dtype."""


def save_model(run: epath.PathLike, parameters: Mapping[str, Parameter], progress: Progress) -> None:
    """Writes step 0 of a run, without an optimizer; one parameter after the other is filled, written and forgotten.

    Args:
      parameters: by the names that the leaves of the model have.

    Raises:
      CheckpointError: it could not be written; no step is visible then.
    """
    directory = epath.Path(run).resolve() / "checkpoints"
    registry = ocp.type_handlers.create_type_handler_registry((Parameter, _OneAtATime()))
    handlers = {
        # Weights hardly shrink, and each device that reads a part of a layer would decompress the whole of it.
        "model": ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
        "progress": ocp.JsonCheckpointHandler(),
    }
    items = ocp.args.Composite(
        model=ocp.args.PyTreeSave(dict(parameters), save_args=_in_layers(parameters)),
        progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
    )
    try:
        with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
            manager.save(0, args=items)
            manager.wait_until_finished()
    except Exception as error:  # Orbax and tensorstore raise many types
        raise CheckpointError(f"cannot write to {directory}: {_one_line(error)}") from error


class _OneAtATime(ocp.type_handlers.ArrayHandler):
    """Saves each `Parameter` like the array that it fills; a host holds that array and, while it is written, a copy."""

    def __init__(self):
        super().__init__(enable_write_sharding_file=False)

    async def serialize(self, values, infos, args=None):
        save = super().serialize

        async def write_one(value, info, arg):
            whole = _aligned(value.shape, value.dtype)
            value.fill(whole)
            array = jax.device_put(whole, _host(), may_alias=True)
            for written in await save([array], [info], [arg]):
                written.result()

        async def write():
            for value, info, arg in zip(values, infos, args, strict=True):
                await write_one(value, info, arg)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="one_at_a_time")]

    def memory_size(self, values):
        return [(0, 0)] * len(values)  # only logged


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # left out by JAX_PLATFORMS
        return jax.local_devices()[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX takes as it is, since it begins at a multiple of 64 bytes; other is copied."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _in_layers(parameters: Mapping[str, Any]) -> dict[str, ocp.SaveArgs]:
    """Storage by which one layer of a stack can be read without the others."""
    layers = ocp.SaveArgs(shard_axes=(0,))
    return {name: layers if name.startswith("blocks/") else ocp.SaveArgs() for name in parameters}


def _targets(abstract: PyTree, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    def placed(leaf):
        spec = leaf.sharding.spec if leaf.sharding else P()  # a scalar made outside the mesh has none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return named(jax.tree.map(placed, abstract))


def _url(path: epath.Path) -> str:
    return str(path) if "://" in str(path) else f"file://{path}"


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by the names of their attributes: `blocks/attention/q_DNH`."""
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    assert len(set(names)) == len(names)
    return dict(zip(names, (leaf for _, leaf in leaves)))


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
