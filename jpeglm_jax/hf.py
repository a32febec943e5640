"""Llama checkpoints of Hugging Face: import into a run, export from one.

Both follow `TABLE`. Neither holds a model: an import takes one stacked parameter after the other out of memory-mapped
files and writes it into the run's first checkpoint; an export reads, from a checkpoint alone, the layers of one file at a time.
"""

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from jpeglm_jax import checkpoints, codecs, runs, sharding, tokenizer
from jpeglm_jax import config as configs
from jpeglm_jax.checkpoints import Checkpoints, Parameter, Progress
from jpeglm_jax.config import Config, JpegConfig, MeshConfig, ModelConfig
from jpeglm_jax.model import Llama

Dtype = Literal["float32", "bfloat16", "float16"]

FILE_BYTES = 10**9
"""Of an exported file, at most, unless one tensor is larger. A host holds a file at a time."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, here and there."""

    ours: str
    """Its name in a checkpoint. In `blocks` it is stacked: the first dim is the layer, which the name there contains."""
    theirs: str
    inputs: int = 0
    """Dims of ours, after the layer, that are summed over. There a matrix is (outputs, inputs), each one dim; 0: no matrix."""

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of a layer that here has the shape `ours`."""
        return (math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])) if self.inputs else ours

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """A view of a layer."""
        return ours.reshape(self.shape(ours.shape)[::-1]).T if self.inputs else ours

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A view of a layer, that here has the shape `shape`."""
        return theirs.T.reshape(shape) if self.inputs else theirs


LAYER = "model.layers.{layer}."
TABLE = (
    Weight("embed_VD", "model.embed_tokens.weight"),
    Weight("blocks/attention_norm/scale", LAYER + "input_layernorm.weight"),
    # Rotary pairs are half-split on both sides: no head is permuted.
    Weight("blocks/attention/q_DNH", LAYER + "self_attn.q_proj.weight", inputs=1),
    Weight("blocks/attention/k_DKH", LAYER + "self_attn.k_proj.weight", inputs=1),
    Weight("blocks/attention/v_DKH", LAYER + "self_attn.v_proj.weight", inputs=1),
    Weight("blocks/attention/o_NHD", LAYER + "self_attn.o_proj.weight", inputs=2),
    Weight("blocks/mlp_norm/scale", LAYER + "post_attention_layernorm.weight"),
    Weight("blocks/mlp/gate_DF", LAYER + "mlp.gate_proj.weight", inputs=1),
    Weight("blocks/mlp/up_DF", LAYER + "mlp.up_proj.weight", inputs=1),
    Weight("blocks/mlp/down_FD", LAYER + "mlp.down_proj.weight", inputs=1),
    Weight("norm/scale", "model.norm.weight"),
    Weight("head_DV", "lm_head.weight", inputs=1),
)
HEAD, EMBEDDING = TABLE[-1].theirs, TABLE[0].theirs

FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Fields of `ModelConfig`, and their names in config.json."""

SUPPORTED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rope_scaling": None,
    "bos_token_id": tokenizer.BOS,
    "eos_token_id": tokenizer.EOS,
}
"""Other fields of config.json with their only value that this model has; a field that is left out has it."""

INERT = (
    "_name_or_path", "dtype", "initializer_range", "jpeglm", "max_position_embeddings", "pad_token_id", "pretraining_tp",
    "rope_parameters", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Fields of config.json that change no number, or that are read apart."""

SETTINGS = "jpeglm"
"""The field of config.json that is ours: codec, packing, length, type of activations."""


def import_run(source: str, run: str, codec: JpegConfig) -> dict[str, Any]:
    """Makes a run of a Hugging Face Llama, to be sampled, evaluated and trained on.

    Its checkpoint, of step 0, has the dtype of the files (where they differ, one that holds all values exactly). Nothing is
    written before everything was compared. If the import fails, what it wrote is removed.

    Args:
      source: a directory with config.json, tokenizer.model and model.safetensors or pytorch_model.bin, both also sharded; or
        the name of one on the Hugging Face hub.
      run: directory of the run, which must not exist or be empty. May be gs://.
      codec: of the pictures, where the source does not say.

    Returns:
      What was read and assumed, by name.

    Raises:
      ValueError: no such source, one that is no Llama of pictures (all mismatches in one line), or a run that exists.
      CheckpointError: the checkpoint cannot be written.
    """
    if jax.process_count() > 1:
        raise ValueError("an import is the work of one process, but there are several: run it on one host, before the others")
    directory = epath.Path(run)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{run} exists; choose another directory, or remove it if it is left of an import that was stopped")
    folder = _folder(source)
    problems: list[str] = []
    config, assumed = _read_config(folder, codec, problems)
    model, files = _read_tokenizer(folder, config, problems), _open_weights(folder, problems)
    if config and files:
        problems += _compare(config.model, files)
    if problems:
        raise ValueError(f"{source} cannot be imported: {'; '.join(problems)}")
    config = dataclasses.replace(config, run=run, tokenizer=runs.TOKENIZER if model else "")
    try:
        with tqdm.tqdm(total=len(_tensors(config.model)), desc="importing", unit=" tensors", dynamic_ncols=True) as bar:
            checkpoints.save_model(run, _parameters(config.model, files, bar), Progress(config, 0, {}))
        if model:
            (directory / runs.TOKENIZER).write_bytes(model)
        # Last: without it, the directory is no run.
        (directory / runs.CONFIG).write_text(configs.to_json(config))
    except BaseException:
        directory.rmtree(missing_ok=True)
        raise
    return {
        "parameters": sum(math.prod(shape) for shape in _shapes(config.model).values()),
        "dtype of the weights": str(_dtype(files, EMBEDDING)),
        "vocabulary": f"{config.model.vocab_size}, {'SentencePiece' if model else 'bytes'}",
        "codec": codecs.make(config.codec).describe() + (" (assumed)" if assumed else ""),
        "sequence length": config.data.sequence_length,
        "run": run,
    }


def export_run(run: str, directory: str, dtype: Dtype | None) -> dict[str, Any]:
    """Writes a Hugging Face Llama that transformers and vLLM load: sharded safetensors, config, tokenizer, model card.

    Where several processes call it, each writes files of its own. config.json is written last: without it, a directory is
    not loaded by anything.

    Args:
      run: directory of a run, whose newest checkpoint is meant, or of one of its checkpoints, RUN/checkpoints/STEP.
      directory: to be written; must not exist or be empty. May be gs://.
      dtype: of the files; None is that of the checkpoint.

    Returns:
      What was written, by name.

    Raises:
      ValueError: no run or checkpoint, a model that Llama is not, values that the dtype does not hold, or a directory with
        something in it.
      CheckpointError: the checkpoint cannot be read.
    """
    path, step = runs.of_checkpoint(run)
    config = runs.read(path)
    if config.model.qk_norm:
        raise ValueError("model.qk_norm has no counterpart in the Llama of transformers: such a run cannot be exported")
    codec = codecs.make(config.codec)
    vocabulary = tokenizer.load(config.tokenizer, codec.alphabet_size)
    out = epath.Path(directory)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{directory} exists; choose another directory, or empty it")
    with Checkpoints(path) as stored:
        step = stored.latest() if step is None else step
        if step is None:
            raise ValueError(f"{path} has no checkpoint yet; `jpeglm train {path}` makes them")
        progress, arrays = stored.progress(step), stored.arrays(step, _shapes(config.model))
    _wait_for_all("the directory was looked at")
    out.mkdir(parents=True, exist_ok=True)
    dtypes = {name: np.dtype(dtype or array.dtype.numpy_dtype) for name, array in arrays.items()}
    tensors = _tensors(config.model)
    split = _library("huggingface_hub").split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * dtypes[tensor.weight.ours].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=FILE_BYTES,
    )
    mine = sorted(split.filename_to_tensors.items())[jax.process_index() :: jax.process_count()]
    with tqdm.tqdm(total=sum(len(names) for _, names in mine), desc="exporting", unit=" tensors", dynamic_ncols=True) as bar:
        for file, names in mine:
            _write_weights(out / file, {name: tensors[name] for name in names}, arrays, dtypes, bar)
    _wait_for_all("the weights are written")
    if jax.process_index() == 0:
        (out / runs.TOKENIZER).write_bytes(vocabulary.published())
        (out / "README.md").write_text(_card(config, progress, step, out.name))
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        ends = {"bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.EOS}
        others = {
            "tokenizer_config.json": _tokenizer_config(vocabulary),
            "generation_config.json": ends | {"do_sample": True, "top_k": 0},
            **({"model.safetensors.index.json": index} if split.is_sharded else {}),
            "config.json": _to_hf(config, str(dtypes[TABLE[0].ours])),
        }
        for name, values in others.items():
            (out / name).write_text(json.dumps(values, indent=2) + "\n")
    _wait_for_all("the export is whole")
    files, size = len(split.filename_to_tensors), split.metadata["total_size"]
    return {"step": step, "files of weights": files, "gigabytes": size / 1e9, "directory": directory}


def to_transformers(model: Llama):
    """A `transformers.LlamaForCausalLM` with the same weights, on the CPU, in the type of the model's activations.

    Raises:
      ValueError: query and key norms, which that architecture does not have.
    """
    import torch
    import transformers

    if model.config.qk_norm:
        raise ValueError("model.qk_norm has no counterpart in transformers' Llama: take a config without it")
    settings = _to_hf(Config(model=model.config), model.config.dtype)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
    theirs = theirs.to(getattr(torch, model.config.dtype))
    ours = checkpoints.named(model)
    with torch.no_grad():
        for name, tensor in _tensors(model.config).items():
            layer = ours[tensor.weight.ours] if tensor.layer is None else ours[tensor.weight.ours][tensor.layer]
            weight = tensor.weight.to_theirs(np.asarray(layer, np.float32))
            theirs.get_parameter(name).copy_(torch.from_numpy(weight.copy()))
    return theirs


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of the tensors of a Hugging Face checkpoint."""

    weight: Weight
    layer: int | None
    """None: its parameter is not stacked."""
    shape: tuple[int, ...]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by their names in a checkpoint."""
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])):
        abstract = jax.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    return {name: leaf.shape for name, leaf in checkpoints.named(abstract).items()}


def _tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors that a Llama of this config has there, by name; layer by layer."""
    shapes = _shapes(config)
    weights = [weight for weight in TABLE if weight.ours in shapes]
    assert len(weights) == len(shapes)
    stacked = [weight for weight in weights if "{layer}" in weight.theirs]
    first, *last = [weight for weight in weights if weight not in stacked]
    order = [(first, None), *((weight, layer) for layer in range(config.layers) for weight in stacked)]
    return {
        weight.theirs.format(layer=layer): Tensor(weight, layer, weight.shape(shapes[weight.ours][layer is not None :]))
        for weight, layer in [*order, *((weight, None) for weight in last)]
    }


# Import


def _folder(source: str) -> Path:
    """A local directory, downloaded if it is none."""
    if Path(source).is_dir():
        return Path(source)
    hub = _library("huggingface_hub")
    _library("huggingface_hub.utils.logging").set_verbosity_error()  # or it says twice each time that it tries again
    try:
        names = hub.list_repo_files(source)
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"
        return Path(hub.snapshot_download(source, allow_patterns=["*.json", "tokenizer.model", weights]))
    except Exception as error:  # many types, of the network and of names
        raise ValueError(f"{source} is no directory, and not to be had from the Hugging Face hub: {_line(error)}") from error


def _read_config(folder: Path, codec: JpegConfig, problems: list[str]) -> tuple[Config | None, bool]:
    """The config of the run, unless there are problems, and whether the codec was assumed."""
    values = _read_json(folder / "config.json", problems)
    if values is None:
        return None, True
    if misfits := _misfits(values):
        problems += misfits
        return None, True
    given = {name: value for name, value in values.items() if value is not None}
    heads = given["num_attention_heads"]
    # What transformers takes for fields that are left out.
    defaults = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}
    defaults |= {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // max(heads, 1)}
    given = defaults | given.get("rope_parameters", {}) | given
    precise = "float32" in (given.get("dtype"), given.get("torch_dtype"))
    ours = {
        "codec": dataclasses.asdict(codec),
        "data": {"sequence_length": given["max_position_embeddings"]},
        "model": {"dtype": "float32" if precise else "bfloat16"},
    }
    stored = given.get(SETTINGS, {})
    for group, fields in stored.items():
        ours[group] = ours.get(group, {}) | fields
    ours["model"] |= {name: given[field] for name, field in FIELDS.items()}
    try:
        config = configs.from_json(json.dumps(ours))
    except ValueError as error:
        problems.append(f"config.json: {error}")
        return None, True
    if "codec" in stored and codec not in (JpegConfig(), config.codec):
        problems.append("its codec stands in config.json: leave the --codec flags out")
    return config, "codec" not in stored


def _misfits(values: dict[str, Any]) -> list[str]:
    """What of a config.json is not of this model."""
    known = {*FIELDS.values(), *SUPPORTED, *INERT}
    unknown = {name: value for name, value in values.items() if name not in known}
    # Of transformers 5; others have rope_theta alone, and rope_scaling.
    rope = {"rope_type": "default", "rope_theta": None} | (values.get("rope_parameters") or {})
    unknown |= {f"rope_parameters.{name}": value for name, value in rope.items() if name not in ("rope_type", "rope_theta")}
    supported = {name: (values.get(name, value), value) for name, value in SUPPORTED.items()}
    supported |= {"rope_parameters.rope_type": (rope["rope_type"], "default")}
    integers = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    stored = values.get(SETTINGS, {})
    whole = isinstance(stored, Mapping) and all(isinstance(fields, Mapping) for fields in stored.values())
    return [
        *(f"{name} is {value!r}, supported is {only!r}" for name, (value, only) in supported.items() if value != only),
        *(f"{name} {value!r} is not supported" for name, value in unknown.items()),
        *(f"{name} must be an integer, not {values.get(name)!r}" for name in integers if type(values.get(name)) is not int),
        *([] if whole else [f"{SETTINGS} must be an object of objects"]),
    ]


def _read_tokenizer(folder: Path, config: Config | None, problems: list[str]) -> bytes | None:
    """The SentencePiece model, as it is; None where every byte is a token."""
    path = folder / runs.TOKENIZER
    if not path.exists():
        problems.append(f"there is no {runs.TOKENIZER}: put the SentencePiece model of the vocabulary there")
        return None
    model = path.read_bytes()
    plain = tokenizer.Symbols(256)
    try:
        vocabulary = plain if model == plain.published() else tokenizer.Bpe(model)
    except ValueError as error:
        problems.append(f"{runs.TOKENIZER} is {error}")
        return None
    if config and vocabulary.vocab_size != config.model.vocab_size:
        problems.append(f"config.json has a vocabulary of {config.model.vocab_size}, {path.name} of {vocabulary.vocab_size}")
    return None if vocabulary is plain else model


@dataclasses.dataclass(frozen=True)
class _Safetensors:
    """Tensors in files of safetensors, by name."""

    files: Mapping[str, Any]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "_Safetensors":
        library = _library("safetensors")
        files = {}
        for path in paths:
            try:
                file = library.safe_open(path, framework="np")
            except library.SafetensorError as error:
                raise ValueError(f"{path.name} is damaged: {error}") from error
            files |= dict.fromkeys(file.keys(), file)
        return cls(files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        dtype = self.files[name].get_slice(name).get_dtype()
        return names.get(dtype, dtype)

    def read(self, name: str) -> np.ndarray:
        return self.files[name].get_tensor(name)


@dataclasses.dataclass(frozen=True)
class _Pickled:
    """Tensors in files that PyTorch wrote, by name; they are mapped into memory, and code in them is not run."""

    files: Mapping[str, Any]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "_Pickled":
        torch = _library("torch")
        tensors = {}
        for path in paths:
            try:
                stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # UnpicklingError, RuntimeError, and what broken pickles raise
                refused = "Weights only load failed" in str(error)
                reason = "holds other things than tensors, which were not run" if refused else f"is damaged: {_line(error)}"
                raise ValueError(f"{path.name} {reason}") from error
            if not (isinstance(stored, Mapping) and all(isinstance(value, torch.Tensor) for value in stored.values())):
                raise ValueError(f"{path.name} holds no tensors by name")
            tensors |= stored
        return cls(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].shape)

    def dtype(self, name: str) -> str:
        return str(self.files[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> np.ndarray:
        tensor, dtype = self.files[name].detach(), self.dtype(name)
        if dtype == "bfloat16":  # which NumPy does not have
            return tensor.view(_library("torch").int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


def _open_weights(folder: Path, problems: list[str]) -> _Safetensors | _Pickled | None:
    for kind, name in ((_Safetensors, "model.safetensors"), (_Pickled, "pytorch_model.bin")):
        index = folder / f"{name}.index.json"
        if index.exists():
            values = _read_json(index, problems)
            names = sorted(set((values or {}).get("weight_map", {}).values()))
        elif (folder / name).exists():
            names = [name]
        else:
            continue
        problems += [f"{name} is missing, which {index.name} names" for name in names if not (folder / name).exists()]
        try:
            return kind.open([folder / name for name in names if (folder / name).exists()])
        except ValueError as error:
            problems.append(str(error))
            return None
    problems.append("there is no model.safetensors and no pytorch_model.bin, whole or sharded")
    return None


def _compare(config: ModelConfig, files: _Safetensors | _Pickled) -> list[str]:
    """What of the files does not fit the config."""
    tensors = _tensors(config)
    # Old versions of transformers wrote their tables of frequencies too.
    there = {name for name in files.files if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and {HEAD, EMBEDDING} <= there and np.array_equal(files.read(HEAD), files.read(EMBEDDING)):
        there.remove(HEAD)
    common = [name for name in tensors if name in there]
    wrong = [name for name in common if files.shape(name) != tensors[name].shape]
    strange = [name for name in common if files.dtype(name) not in get_args(Dtype)]
    return [
        *_several("missing", [name for name in tensors if name not in there]),
        *_several("of no use here", sorted(there - tensors.keys())),
        *_several("of another shape", [f"{name} {files.shape(name)}, not {tensors[name].shape}" for name in wrong]),
        *_several("of a dtype that is not supported", [f"{name} {files.dtype(name)}" for name in strange]),
    ]


def _several(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {', '.join(names[:3])}{more}"


def _parameters(config: ModelConfig, files: _Safetensors | _Pickled, bar: tqdm.tqdm) -> dict[str, Parameter]:
    tensors = _tensors(config)

    def parameter(name: str, shape: tuple[int, ...]) -> Parameter:
        parts = {there: tensor for there, tensor in tensors.items() if tensor.weight.ours == name}
        dtype = np.dtype(functools.reduce(jnp.promote_types, (_dtype(files, there) for there in parts)))

        def fill(whole: np.ndarray) -> None:
            for there, tensor in parts.items():
                part = whole if tensor.layer is None else whole[tensor.layer]
                part[...] = tensor.weight.to_ours(files.read(there), part.shape)
                bar.update()

        return Parameter(shape, dtype, fill)

    return {name: parameter(name, shape) for name, shape in _shapes(config).items()}


def _dtype(files: _Safetensors | _Pickled, name: str) -> np.dtype:
    return np.dtype(files.dtype(name))  # JAX has made NumPy know bfloat16


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except OSError:
        problems.append(f"there is no {path.name}")
    except ValueError as error:
        problems.append(f"{path.name} is no JSON ({error})")
    else:
        if isinstance(values, dict):
            return values
        problems.append(f"{path.name} is no object")
    return None


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is needed, and not installed: pip install 'jpeglm_jax[hf]'") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# Export


def _to_hf(config: Config, dtype: str) -> dict[str, Any]:
    """config.json."""
    fields = {field: getattr(config.model, name) for name, field in FIELDS.items()}
    settings = {
        "codec": dataclasses.asdict(config.codec),
        "data": {"packing": config.data.packing, "sequence_length": config.data.sequence_length},
        "model": {"dtype": config.model.dtype},
    }
    positions = {"max_position_embeddings": config.data.sequence_length}
    return SUPPORTED | fields | positions | {"torch_dtype": dtype, SETTINGS: settings}


def _write_weights(
    path: epath.Path, tensors: Mapping[str, Tensor], arrays: Mapping[str, Any], dtypes: Mapping[str, np.dtype], bar: tqdm.tqdm
) -> None:
    held = {}
    for name, tensor in tensors.items():
        array, dtype = arrays[tensor.weight.ours], dtypes[tensor.weight.ours]
        layer = (array if tensor.layer is None else array[tensor.layer]).read().result()
        with np.errstate(over="ignore"):
            cast = layer.astype(dtype, copy=False)
        if cast is not layer and not np.isfinite(cast).all() and np.isfinite(layer).all():
            raise ValueError(f"{name} has values that {dtype} does not hold: export it as bfloat16 or float32")
        held[name] = np.ascontiguousarray(tensor.weight.to_theirs(cast))  # safetensors writes the memory as it lies
        bar.update()
    path.write_bytes(_library("safetensors.numpy").save(held, metadata={"format": "pt"}))


def _tokenizer_config(vocabulary: tokenizer.Symbols | tokenizer.Bpe) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": isinstance(vocabulary, tokenizer.Bpe),
    }


def _wait_for_all(reached: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reached)


CARD = """---
library_name: transformers
pipeline_tag: unconditional-image-generation
tags: [jpeg-lm, llama, jax]
---
# {name}

A Llama-2 decoder that writes pictures by writing the bytes of JPEG files ([Han et al. 2024](https://arxiv.org/abs/2408.08459)),
trained and exported by jpeglm_jax.

| | |
|---|---|
| pictures | {codec} |
| vocabulary | {vocabulary} |
| context | {length:,} tokens, {packing} |
| parameters | {parameters:,} |
| trained | {steps:,} steps, {tokens:,} tokens |

## Sampling

With jpeglm_jax every file opens, because it is written under the grammar of the format:

    jpeglm import PATH_OF_THIS_DIRECTORY runs/imported
    jpeglm sample runs/imported --count 4 --out samples

With transformers, as in the paper, without it. The text of a picture has one character for each byte, chr(byte + 10240); the
tables of the file, equal in all, are not in it and are put back:

```python
import io

from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

PATH = "."
model, tokenizer = AutoModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH)
ids = model.generate(**tokenizer("", return_tensors="pt"), max_length={length})[0]
text = tokenizer.decode(ids, skip_special_tokens=True)
stream = bytes(ord(character) - 10240 for character in text if ord(character) >= 10240)

tables = io.BytesIO()
Image.new("{mode}", (16, 16)).save(tables, "JPEG", {options}, streamtype=1)
with open("picture.jpg", "wb") as file:
    file.write(stream[:2] + tables.getvalue()[2:-2] + stream[2:])
```
"""


def _card(config: Config, progress: Progress, step: int, name: str) -> str:
    codec, data = config.codec, config.data
    gray = codec.subsampling == "gray"
    return CARD.format(
        name=name,
        codec=codecs.make(codec).describe(),
        vocabulary=f"{config.model.vocab_size} ids, " + ("byte pairs" if config.tokenizer else "one for each byte"),
        length=data.sequence_length,
        packing="one picture a row" if data.packing == "rows" else "pictures concatenated and cut",
        parameters=sum(math.prod(shape) for shape in _shapes(config.model).values()),
        steps=step,
        tokens=progress.next_batch * data.batch_size * data.sequence_length,
        mode="L" if gray else "RGB",
        options=f"quality={codec.quality}" + ("" if gray else f', subsampling="{codec.subsampling}"'),
    )
