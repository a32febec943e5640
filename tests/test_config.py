"""Settings: what is wrong with them is said at once, and the config files are right."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from jpeglm_jax import config as configs
from jpeglm_jax.config import Config, DataConfig, JpegConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from jpeglm_jax.model import parameter_count

FILES = sorted(Path(__file__).parents[1].glob("configs/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_file_says_how_to_run_it(path, one_device):
    module = runpy.run_path(path)
    assert f"jpeglm train configs/{path.name}" in module["__doc__"]
    settings = module["config"]
    assert settings.run == f"runs/{path.stem}"
    assert settings.tokenizer == "" or settings.model.vocab_size == 320
    # The number of parameters that the docstring names.
    model = dataclasses.replace(settings.model, vocab_size=settings.model.vocab_size or 259)
    count = parameter_count(model)
    if named := re.search(r"([\d,]+) parameters", module["__doc__"].replace("(", "")):
        assert named[1] == f"{count:,}"
    elif named := re.match(r"([\d.]+)([MB]) parameters", module["__doc__"]):
        assert float(named[1]) == pytest.approx(count / {"M": 1e6, "B": 1e9}[named[2]], rel=0.02)


def test_the_7b_has_the_settings_of_the_paper():
    settings = runpy.run_path(next(path for path in FILES if path.stem == "jpeglm_7b"))["config"]
    model, codec, data, optim = settings.model, settings.codec, settings.data, settings.optim
    assert (model.layers, model.width, model.heads, model.kv_heads, model.head_dim) == (32, 4096, 32, 32, 128)
    assert (model.mlp_width, model.norm_eps, model.rope_theta, model.tied) == (11008, 1e-5, 10000, False)
    assert (codec.size, codec.quality, codec.subsampling, codec.restart) == (256, 25, "4:2:0", True)
    assert (data.packing, data.sequence_length, optim.learning_rate) == ("chunks", 12288, 3e-4)
    assert settings.train.steps * data.batch_size == pytest.approx(2 * 9.5e6, rel=0.01)  # two epochs of chunks


def test_a_config_comes_back_from_json():
    changed = Config(run="a", data=DataConfig(path="b", workers=3), model=ModelConfig(vocab_size=7, tied=True))
    assert configs.from_json(configs.to_json(changed)) == changed
    assert configs.from_json(configs.to_json(Config())) == Config()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"widht": 3}}, "no field model.widht .there are: vocab_size, width, "),
        ({"model": {"width": "3"}}, "model.width must be int, not '3'"),
        ({"model": {"width": True}}, "model.width must be int, not True"),
        ({"codec": {"subsampling": "4:1:1"}}, "codec.subsampling must be one of '4:2:0', '4:2:2', '4:4:4', 'gray'"),
        ({"data": 3}, "data must be an object"),
        ({"train": {"steps": 0}}, "steps must be above 0, not 0"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_field(change, message):
    with pytest.raises(ValueError, match=message):
        configs.from_json(json.dumps(change))


def test_all_mismatches_are_named_at_once():
    with pytest.raises(ValueError, match="no field a.*optim.b1 must be float.*no field train.b"):
        configs.from_json(json.dumps({"a": 1, "train": {"b": 2}, "optim": {"b1": None}}))
    with pytest.raises(ValueError, match="not a JSON file"):
        configs.from_json("{")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: JpegConfig(size=0), "size must be from 1 to 65500"),
        (lambda: JpegConfig(quality=101), "quality must be from 1 to 100, not 101"),
        (lambda: ModelConfig(heads=6, kv_heads=4), "heads .6. must be a multiple of kv_heads .4."),
        (lambda: ModelConfig(head_dim=5), "head_dim must be even"),
        (lambda: ModelConfig(layers=0), "layers must be above 0, not 0"),
        (lambda: DataConfig(workers=-1), "workers must be 0 or more, not -1"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (lambda: OptimConfig(rows_per_device=0), "rows_per_device must be above 0"),
        (lambda: TrainConfig(save_every=0), "save_every must be above 0"),
    ],
)
def test_values_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
