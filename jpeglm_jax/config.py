"""Every setting of a run, as frozen dataclasses that are checked when they are made.

`configs/*.py` each define one `config = Config(...)`; the command line changes single fields of it; a run directory
keeps the result as `config.json`. A parameter that stands here has no default anywhere else.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Literal, Mapping

Subsampling = Literal["4:2:0", "4:2:2", "4:4:4", "gray"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{name} must be above 0, not {value}")


@dataclasses.dataclass(frozen=True)
class JpegConfig:
    """How a picture becomes bytes: an abbreviated JPEG stream (paper, section 3)."""

    name: Literal["jpeg"] = "jpeg"
    size: int = 256
    """Width and height in pixels; pictures are cropped to their centre square and resized to it."""
    quality: int = 25
    """libjpeg quality, 1 to 100."""
    subsampling: Subsampling = "4:2:0"
    restart: bool = True
    """A restart marker after every MCU, so that errors cannot spread and a prompt can be cut at a marker."""

    def __post_init__(self):
        _require(1 <= self.size <= 65500, f"size must be from 1 to 65500 pixels (libjpeg's limit), not {self.size}")
        _require(1 <= self.quality <= 100, f"quality must be from 1 to 100, not {self.quality}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pictures, and how their tokens become batches."""

    path: str = "builtin:flags"
    """A folder of pictures (searched recursively), `*.array_record` files of picture files, `tfds:NAME`, or `builtin:flags`."""
    split: str = "train"
    """The split of a TFDS data set; other sources have none."""
    holdout: int = 256
    """Pictures kept out of training for evaluation, drawn by the seed; at most a tenth of the source."""
    packing: Literal["chunks", "rows"] = "chunks"
    """`chunks`: all pictures concatenated and cut every `sequence_length` tokens (the paper's); `rows`: one picture a row."""
    sequence_length: int | None = 12288
    """Tokens in a row of the batch; with `rows`, None takes what the pictures need."""
    batch_size: int = 32
    """Rows in a global batch, over all hosts."""
    seed: int = 0
    """Orders the pictures of each epoch and draws the held-out ones."""
    threads: int = 2
    """Batches made at the same time by each worker."""
    workers: int = 0
    """Worker processes a host; 0 makes batches in the training process."""
    max_unreadable: float = 0.1
    """Part of the pictures that may be unreadable, of each thousand that a host reads; above it the run stops."""

    def __post_init__(self):
        _positive(self, "batch_size", "threads", "holdout")
        if self.sequence_length is None:
            _require(self.packing == "rows", "sequence_length must be set where pictures are cut in chunks")
        else:
            _positive(self, "sequence_length")
        _require(self.workers >= 0, f"workers must be 0 or more, not {self.workers}")
        _require(0 <= self.max_unreadable <= 1, f"max_unreadable must be from 0 to 1, not {self.max_unreadable}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Llama-2 decoder (Touvron et al. 2023); the defaults are the paper's 7B."""

    vocab_size: int | None = None
    """Embedding rows; None takes the tokenizer's."""
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    head_dim: int = 128
    mlp_width: int = 11008
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    """The output head is the transposed embedding."""
    qk_norm: bool = False
    """RMSNorm of queries and keys per head (Wortsman et al. 2023): holds attention logits down at high learning rates."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matrix products; parameters are always float32."""
    remat: Literal["full", "attention", "residual", "qkv", "dots", "none"] = "full"
    """What is kept of a layer for the backward pass, which recomputes the rest: its input only; also what attention gave;
    also the sum after it; also queries, keys and values; all results of matrix products; everything."""
    attention: Literal["auto", "reference", "splash", "cudnn"] = "auto"
    """Attention kernel; `auto` takes splash on TPU, cuDNN's on GPU in bfloat16, and the reference elsewhere."""

    def __post_init__(self):
        _positive(self, "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "rope_theta", "norm_eps")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even (rotary pairs), not {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, cosine decay and global-norm clipping."""

    learning_rate: float = 3e-4
    """The maximum (paper, section 4)."""
    final_learning_rate: float = 3e-5
    """At the last step."""
    warmup_steps: int = 2000
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    """On matrices only; norms are not decayed."""
    clip_norm: float = 1.0
    rows_per_device: int | None = None
    """Rows of the batch that a device computes at a time, the others one after the other, their gradients added up; None
    computes all at once. The same step on any number of devices."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition (Wortsman et al. 2023); 1e-4 is usual."""

    def __post_init__(self):
        _positive(self, "learning_rate", "clip_norm")
        if self.rows_per_device is not None:
            _positive(self, "rows_per_device")
        _require(self.warmup_steps >= 0, f"warmup_steps must be 0 or more, not {self.warmup_steps}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1: all that are left."""

    data: int = 1
    """Copies of the model."""
    fsdp: int = -1
    """Shards of every weight, gathered layer by layer."""
    tensor: int = 1
    """Shards of heads and MLP columns."""

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        _require(
            all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be above 0, with at most one -1, not {sizes}",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what happens along it."""

    steps: int = 1000
    seed: int = 0
    """Initialises the parameters."""
    compiler_options: str = ""
    """XLA options for the training step, `name=value` apart by spaces; the presets for TPU slices set them."""
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int = 16
    """Batches of held-out pictures in an evaluation."""
    sample_every: int = 1000
    """Steps between sheets of samples in TensorBoard; 0 writes none."""
    save_every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    """Checkpoints kept for the lowest held-out bits per byte."""
    spike: float | None = None
    """Bits per byte above the running mean of the steps before (of about 100) that make a step bad. A loss or a gradient
    that is not finite always does."""
    rollbacks: int = 0
    """Times that a bad step sends the run back to its newest checkpoint, from where it goes on with the batch after the bad
    one. At the next bad step it stops."""

    def __post_init__(self):
        _positive(self, "steps", "log_every", "eval_every", "eval_batches", "save_every", "keep_last")
        _require(self.sample_every >= 0, f"sample_every must be 0 or more, not {self.sample_every}")
        _require(self.keep_best >= 0, f"keep_best must be 0 or more, not {self.keep_best}")
        _require(self.spike is None or self.spike > 0, f"spike must be above 0, not {self.spike}")
        _require(self.rollbacks >= 0, f"rollbacks must be 0 or more, not {self.rollbacks}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    run: str = "runs/default"
    """Directory of the run: config, checkpoints, curves. May be a gs:// path."""
    tokenizer: str = ""
    """A SentencePiece model written by `jpeglm tokenizer`; empty: every byte is a token."""
    codec: JpegConfig = JpegConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.

    Raises:
      ValueError: not JSON, a field that does not exist, or a value of another type; every mismatch is named at once.
    """
    problems: list[str] = []
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from error
    config = _build(Config, values, "", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _build(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'the config'} must be an object")
        return None
    hints = typing.get_type_hints(cls)
    problems.extend(f"no field {prefix}{name} (there are: {', '.join(hints)})" for name in values if name not in hints)
    arguments = {}
    for name, hint in hints.items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(hint):
            arguments[name] = _build(hint, values[name], f"{prefix}{name}.", problems)
        elif _fits(values[name], hint):
            arguments[name] = values[name]
        else:
            problems.append(f"{prefix}{name} must be {_spell(hint)}, not {values[name]!r}")
    return None if problems else cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, as `{"model.width": (ours, theirs)}`."""
    flat_ours, flat_theirs = _flatten(ours), _flatten(theirs)
    return {name: (flat_ours[name], flat_theirs[name]) for name in flat_ours if flat_ours[name] != flat_theirs[name]}


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(_flatten(value, f"{prefix}{field.name}."))
        else:
            flat[prefix + field.name] = value
    return flat
