"""Training: the step is the one that was meant, and a run that is stopped anywhere ends as one that never was."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny import MODEL, config, model

from jpeglm_jax import config as configs
from jpeglm_jax import metrics, optim, runs, sharding
from jpeglm_jax.checkpoints import CheckpointError, Checkpoints
from jpeglm_jax.config import Config, MeshConfig, ModelConfig, OptimConfig
from jpeglm_jax.evaluation.likelihood import order_0, place
from jpeglm_jax.train import TrainState, make_state, make_step, train

pytestmark = pytest.mark.usefixtures("compilations")

LENGTHS = np.ones(MODEL.vocab_size, np.int32)


def batch(rows=8, length=9):
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, MODEL.vocab_size, (2, rows, length)).astype(np.int32)
    targets[: rows // 3, length // 2 :] = 0  # rows of different lengths
    return place({"inputs": inputs, "targets": targets})


def one_step(mesh=MeshConfig(fsdp=1), devices=1, **changes):
    """The gradient of one step, from the first moment of Adam, which is a tenth of it, and its sums."""
    settings = Config(model=MODEL, optim=OptimConfig(b1=0.9, clip_norm=1e9, **changes))
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:devices])):
        llama = model()
        optimizer = optim.make_optimizer(settings.optim, settings.train.steps)
        state = TrainState(llama, jax.jit(optimizer.init)(llama))
        state, totals = jax.jit(make_step(settings, LENGTHS))(state, batch())
        return jax.device_get((optax.tree.get(state.optimizer, "mu"), totals))


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_accumulation_is_the_gradient_of_the_whole_batch():
    assert_close(one_step(rows_per_device=2), one_step())


def test_eight_devices_take_the_step_of_one():
    assert_close(one_step(MeshConfig(data=2, fsdp=2, tensor=2), devices=8, rows_per_device=1), one_step())


def test_z_loss_pulls_the_log_partition_to_zero():
    plain, pulled = one_step()[0], one_step(z_loss=0.1)[0]
    assert not np.allclose(plain.head_DV[...], pulled.head_DV[...])
    assert_close(one_step(z_loss=1e-12)[0], plain)


def test_norms_are_not_decayed(one_device):
    settings = OptimConfig(weight_decay=0.5, learning_rate=1.0, warmup_steps=0)
    llama = model()
    optimizer = optim.make_optimizer(settings, 100)
    zeros = jax.tree.map(np.zeros_like, llama)
    updates, _ = optimizer.update(zeros, optimizer.init(llama), llama)
    for (path, update), weight in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(llama)):
        expected = 0 if "scale" in jax.tree_util.keystr(path) else -0.5 * weight
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_learning_rate_warms_up_to_the_maximum_and_ends_at_the_minimum():
    rate = optim.learning_rate(OptimConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10), 100)
    assert [float(rate(step)) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 0.1])


def test_a_fresh_model_knows_nothing_and_its_weights_have_their_scale(one_device):
    settings = Config(model=dataclasses.replace(MODEL, width=256, layers=2))
    state = jax.jit(lambda: make_state(settings))()
    assert float(state.model.blocks.mlp.up_DF[...].std()) == pytest.approx(0.88 * 256**-0.5, rel=0.05)
    first, second = state.model.blocks.mlp.up_DF[...]
    assert not np.array_equal(first, second)


def test_flops_of_the_7b_are_six_a_parameter_and_token_and_attention():
    seven_b = ModelConfig(vocab_size=320)
    products = 6_478_893_056 - 320 * 4096 - 65 * 4096  # without embedding and norms
    attention = 6 * 12288 * 32 * 32 * 128  # half of 12 a token pair, head and its size
    assert metrics.train_flops(seven_b, 1, 12288) == 6 * products + attention


def test_order_0_is_the_entropy_of_the_training_bytes():
    train_stream = np.repeat(np.arange(4), [4 * 10**6, 2 * 10**6, 10**6, 10**6])
    assert order_0([train_stream], [np.array([0, 0, 0, 0, 1, 1, 2, 3])], 256) == pytest.approx(1.75, rel=1e-3)


def final(run):
    """Arrays of the newest checkpoint of a run, and its step."""
    checkpoints = Checkpoints(run)
    step = checkpoints.latest()
    settings, mesh = checkpoints.progress(step).config, sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: make_state(settings))
        return jax.device_get(checkpoints.model_and_optimizer(step, *abstract, mesh)), step


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_never_killed(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(name, *kill):
        path = tmp_path / f"{name}.json"
        path.write_text(configs.to_json(config(tmp_path / name)))
        script = Path(__file__).with_name("killed_run.py")
        done = subprocess.run(
            [sys.executable, script, path, *map(str, kill)],
            env=os.environ | cache | {"JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-2000:]

    run("whole")
    run("killed", 2, "step")  # before anything is saved
    run("killed", 3, "save")  # while the first checkpoint is written
    run("killed", 5, "step")
    run("killed", 7, "save")  # while the last one is written
    run("killed")
    (whole, step), (killed, killed_step) = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert step == killed_step == 7
    assert_equal(killed, whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compilations):
    """A run of seven steps."""
    settings = config(tmp_path_factory.mktemp("trained") / "run")
    train(settings)
    return settings


def test_training_lowers_the_loss_and_writes_what_people_look_at(trained):
    lines = metrics.read(trained.run)
    rows = [line["train/bits_per_byte"] for line in lines if "train/bits_per_byte" in line]
    assert rows[-1] < rows[0]
    assert [line["step"] for line in lines if "held_out/bits_per_byte" in line] == [4, 7]
    assert list(Path(trained.run).glob("events.out.tfevents.*"))


def test_the_last_and_the_best_checkpoints_are_kept(trained):
    assert sorted(int(path.name) for path in (Path(trained.run) / "checkpoints").iterdir()) == [6, 7]


def test_another_mesh_continues_a_run(trained, tmp_path):
    other = MeshConfig(data=2, fsdp=1, tensor=2)
    with pytest.raises(ValueError, match="data=2 x fsdp=1 x tensor=2 does not fit 8 devices"):
        train(dataclasses.replace(trained, mesh=other))
    longer = dataclasses.replace(trained.train, steps=9)
    train(dataclasses.replace(trained, mesh=MeshConfig(data=2, fsdp=2, tensor=2), train=longer))
    assert Checkpoints(trained.run).latest() == 9


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, width=24)), "model.width is 24, was 16"),
        (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, seed=1)), "data.seed is 1, was 0"),
        (lambda c: dataclasses.replace(c, codec=dataclasses.replace(c.codec, quality=30)), "codec.quality is 30, was 25"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(trained, change, field):
    with pytest.raises(ValueError, match=field):
        train(change(trained))


def test_a_directory_of_other_things_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="exists and is no run"):
        train(config(tmp_path))
    with pytest.raises(ValueError, match="is no run: it has no config.json"):
        runs.read(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = config(tmp_path / "run")
    hot = dataclasses.replace(settings, optim=OptimConfig(learning_rate=1e30, warmup_steps=0))
    with pytest.raises(metrics.TrainingError, match=r"gradient nan at step \d, batch \d; checkpoints are of earlier"):
        train(hot)


def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(tmp_path):
    settings = config(tmp_path / "run")
    train(dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=3)))
    before, _ = final(settings.run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond: what a full disk looks like
    try:
        with pytest.raises(CheckpointError, match="cannot write to .*; steps 3 are whole"):
            train(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after, step = final(settings.run)
    assert step == 3
    assert_equal(after, before)
    train(settings)  # with room again
    assert Checkpoints(settings.run).latest() == 7
