"""The directory of a run: what is in it, opening it, and whether a config may continue it.

    RUN/config.json      every setting, the vocabulary filled in
    RUN/tokenizer.model  a copy of the tokenizer, unless every byte is a token
    RUN/lengths.npz      tokens of each picture, where they are cut in chunks
    RUN/checkpoints      see checkpoints.py
    RUN/metrics.jsonl    see metrics.py, as of the newest checkpoint; beside it TensorBoard's files
"""

import dataclasses

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from jpeglm_jax import config as configs
from jpeglm_jax import files, sharding
from jpeglm_jax.checkpoints import Checkpoints
from jpeglm_jax.config import Config
from jpeglm_jax.model import Llama, in_dtype
from jpeglm_jax.tokenizer import Bpe, Symbols

CONFIG, TOKENIZER, LENGTHS = "config.json", "tokenizer.model", "lengths.npz"

CHANGEABLE = (
    "run", "tokenizer", "mesh.", "train.", "data.threads", "data.workers", "data.max_unreadable", "model.remat",
    "model.attention", "optim.rows_per_device",
)  # fmt: skip
"""Fields, and groups of them, that may differ when a run is continued: they decide how and how long, not what. (That the
tokenizer is the same is checked by its content.)"""

OPEN = ("data.", "optim.", "model.dtype")
"""Fields that may differ too as long as an imported model was not trained on."""


def read(run: epath.PathLike) -> Config:
    """The config of a run, its paths those of where the run is now.

    Raises:
      ValueError: the directory is no run, or the config cannot be read.
    """
    run = epath.Path(run)
    if not (run / CONFIG).exists():
        raise ValueError(f"{run} is no run: it has no {CONFIG}")
    try:
        config = configs.from_json((run / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{run / CONFIG} cannot be used: {error}") from error
    tokenizer = str(run / TOKENIZER) if config.tokenizer else ""
    return dataclasses.replace(config, run=str(run), tokenizer=tokenizer)


def fill_in(config: Config, tokenizer: Symbols | Bpe) -> Config:
    """`config` with the vocabulary of its tokenizer.

    Raises:
      ValueError: it asks for another one.
    """
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size}; leave it out to take the tokenizer's"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def open_or_create(config: Config, tokenizer: Symbols | Bpe) -> Config:
    """Makes the directory of a run, or checks that it is one that `config` can continue; returns the config filled in.

    Raises:
      ValueError: a directory that cannot be written, or has other things in it, or a run with other settings; the message
        names the fields.
    """
    config = fill_in(config, tokenizer)
    run = epath.Path(config.run)
    try:
        if (run / CONFIG).exists():
            check_fits(config, read(run))
        elif run.exists() and not (run.is_dir() and all(_begins(path.name) for path in run.iterdir())):
            raise ValueError(f"{run} exists and is no run; choose another directory with --run, or empty it")
        if config.tokenizer:
            tokenizer.save(run / TOKENIZER)
        # Last, because it is what makes a directory a run.
        files.write(run / CONFIG, configs.to_json(config).encode())
    except ValueError:
        raise
    except Exception as error:  # the file systems of buckets raise types of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot write to {run}: {reason}; --run chooses another directory") from error
    return config


def _begins(name: str) -> bool:
    """Whether it is a file that may stand in a directory which is not yet a run; the making of one may have been cut."""
    return name.removesuffix(".part") in (CONFIG, TOKENIZER, LENGTHS)


def check_fits(config: Config, stored: Config) -> None:
    """Whether `config` may continue what `stored` began.

    Raises:
      ValueError: it may not; the message names the fields that differ.
    """
    changeable = CHANGEABLE + OPEN if _untrained(stored.run) else CHANGEABLE
    differing = {
        name: values for name, values in configs.differences(config, stored).items() if not name.startswith(changeable)
    }
    if differing:
        fields = "; ".join(f"{name} is {ours!r}, was {theirs!r}" for name, (ours, theirs) in differing.items())
        raise ValueError(f"{config.run} was begun with other settings ({fields}): begin a new run with --run, or set them back")


def _untrained(run: epath.PathLike) -> bool:
    """Whether a run has no other checkpoint than the one that it was imported as."""
    checkpoints = epath.Path(run) / "checkpoints"
    return any(checkpoints.glob("*/model")) and not any(checkpoints.glob("*/optimizer"))


def of_checkpoint(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """The run and the step that RUN/checkpoints/STEP names; of every other path the path itself and None."""
    path = epath.Path(path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def load_model(run: epath.PathLike) -> tuple[Config, Llama, Mesh, int]:
    """The newest model of a run, on all devices, its config, mesh and step, its matrices in the type that they are used in.

    Args:
      run: or one of its checkpoints, RUN/checkpoints/STEP, whose model is then meant.

    Raises:
      ValueError: no run, or one without a checkpoint.
      CheckpointError: the checkpoint cannot be read.
    """
    run, step = of_checkpoint(run)
    config = read(run)
    checkpoints = Checkpoints(run)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise ValueError(f"{run} has no checkpoint yet; `jpeglm train {run}` makes them")
    # Not the mesh of the training: what writes one token at a time wants its weights where they are used.
    mesh = sharding.make_mesh(sharding.decode_mesh(config.model, jax.device_count()))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: in_dtype(Llama(config.model, nnx.Rngs(0))))
        return config, checkpoints.model(step, abstract, mesh), mesh, step
