"""A run is the same on any hosts and devices, goes on after whatever stops it, and keeps no bad step."""

import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import assert_equal, final
from tiny import config

from jpeglm_jax import config as configs
from jpeglm_jax import distributed, files, metrics, runs, sharding
from jpeglm_jax import train as training
from jpeglm_jax.checkpoints import Checkpoints
from jpeglm_jax.config import MeshConfig, OptimConfig
from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.train import Preempted, train

LOGGED_RUN = Path(__file__).with_name("logged_run.py")


pytestmark = pytest.mark.usefixtures("compilations")


@dataclasses.dataclass
class Launcher:
    """Starts the processes of runs, in a directory."""

    directory: Path
    compilations: str

    def settings(self, name: str, mesh: MeshConfig, **changes):
        """The config of a run that evaluates at its end only, so that all batches before are those of training."""
        settings = config(self.directory / name)
        changes = {"steps": 10, "log_every": 1, "eval_every": 1000, "save_every": 4} | changes
        return dataclasses.replace(settings, mesh=mesh, train=dataclasses.replace(settings.train, **changes))

    def start(self, settings, processes: int, devices: int, stops: bool = False) -> list[subprocess.Popen]:
        name = Path(settings.run).name
        (self.directory / f"{name}.json").write_text(configs.to_json(settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        cache = {"JAX_COMPILATION_CACHE_DIR": self.compilations, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        started = []
        for number in range(processes):
            env = os.environ | cache | {"JAX_NUM_CPU_DEVICES": str(devices)}
            if processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(number),
                }
            command = [sys.executable, LOGGED_RUN, f"{name}.json", f"{name}.txt", *["stop"] * stops]
            with (self.directory / f"{name}.{number}.log").open("a") as log:
                started.append(subprocess.Popen(command, cwd=self.directory, env=env, stdout=log, stderr=log))
        return started

    def end(self, settings, started: list[subprocess.Popen], status: int = 0) -> None:
        for process in started:
            process.wait()
        logs = [path.read_text()[-3000:] for path in sorted(self.directory.glob(f"{Path(settings.run).name}.*.log"))]
        assert [process.returncode for process in started] == [status] * len(started), "\n\n".join(logs)

    def batches(self, settings) -> list[str]:
        return (self.directory / f"{Path(settings.run).name}.txt").read_text().splitlines()


def losses(settings):
    return [line["train/loss"] for line in metrics.read(settings.run) if "train/loss" in line]


def assert_same_run(launcher, ours, theirs):
    """The same batches exactly; losses and weights up to the order of sums."""
    assert launcher.batches(ours) == launcher.batches(theirs)
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-5)
    (our_state, our_step), (their_state, their_step) = final(ours.run), final(theirs.run)
    assert our_step == their_step
    for a, b in zip(jax.tree.leaves(our_state), jax.tree.leaves(their_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_two_processes_of_four_devices_train_as_one_of_eight(tmp_path, compilations):
    launcher, mesh = Launcher(tmp_path, compilations), MeshConfig(data=2, fsdp=4)
    one, two = (launcher.settings(name, mesh, steps=6) for name in ("one", "two"))
    ends = launcher.start(two, 2, 4)
    launcher.end(one, launcher.start(one, 1, 8))
    launcher.end(two, ends)
    assert_same_run(launcher, two, one)
    # Progress and messages are the first process's.
    second = (tmp_path / "two.1.log").read_text().splitlines()
    assert not [line for line in second if not line.startswith("[Gloo]")]
    assert len(list(Path(two.run).glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
def test_a_run_goes_on_on_any_devices_and_hosts(tmp_path, compilations):
    launcher = Launcher(tmp_path, compilations)
    whole = launcher.settings("whole", MeshConfig(fsdp=8), steps=30)
    launcher.end(whole, launcher.start(whole, 1, 8))
    layouts = [
        (MeshConfig(data=2, fsdp=4), 1, 8),
        (MeshConfig(fsdp=4, tensor=2), 2, 4),
        (MeshConfig(fsdp=2, tensor=2), 1, 4),
        (MeshConfig(fsdp=2), 2, 1),
        (MeshConfig(fsdp=1, tensor=2), 2, 1),  # both processes need all rows
        (MeshConfig(fsdp=1), 1, 1),
    ]
    for stops, (mesh, processes, devices) in zip([True] * 5 + [False], layouts):
        moved = launcher.settings("moved", mesh, steps=30)
        launcher.end(moved, launcher.start(moved, processes, devices, stops), 75 if stops else 0)
    assert_same_run(launcher, moved, whole)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "need all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "0"}, "need all of"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "they are 'host:1', 'two', '0'",
        ),
    ],
)
def test_half_an_address_of_the_other_processes_is_refused(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


@pytest.mark.parametrize("variables, known", [
    ({}, None),
    ({"JAX_NUM_PROCESSES": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
    ({"SLURM_NTASKS": "2"}, None),  # in `salloc`, not under `srun`
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {}),
    (
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"num_processes": 2, "process_id": 0},
    ),
])  # fmt: skip
def test_a_process_looks_for_others_only_where_there_are_some(variables, known, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    assert distributed.initialize()
    assert calls == ([] if known is None else [known])


@dataclasses.dataclass(frozen=True)
class Device:
    """What a sharding asks of a device, of any process."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    client: None = None


def mesh_of(processes, shape):
    """A mesh whose devices belong to these processes, in its order."""
    devices = np.array([Device(*pair) for pair in enumerate(processes)]).reshape(shape)
    data, fsdp, tensor = devices.shape
    axes = ("data", *sharding.FSDP, "tensor")
    return jax.sharding.Mesh(devices.reshape(data, fsdp, 1, 1, tensor), axes, (jax.sharding.AxisType.Explicit,) * len(axes))


@pytest.mark.parametrize(
    "processes, shape, expected",
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], (2, 4, 1), [range(0, 8)]),
        ([0, 0, 1, 1, 0, 0, 1, 1], (1, 8, 1), [range(0, 4), range(8, 12)]),  # as a host's chips lie in a torus
        ([0, 1, 0, 1, 0, 1, 0, 1], (1, 4, 2), [range(0, 16)]),  # tensor goes across the hosts
        ([0, 0, 1, 1, 0, 0, 1, 1], (1, 2, 4), [range(0, 16)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], (1, 2, 4), [range(0, 8)]),
    ],
)
def test_a_process_makes_the_rows_that_its_devices_hold(processes, shape, expected):
    assert distributed.rows(mesh_of(processes, shape), 16) == expected


def test_processes_that_share_a_part_of_their_rows_are_refused():
    with pytest.raises(ValueError, match=r"mesh.tensor \(2\) splits the rows of process 0 and process 1 unevenly"):
        distributed.rows(mesh_of([0, 0, 0, 1, 1, 1, 0, 1], (1, 4, 2)), 16)


def short(tmp_path, name="run", **changes):
    """A run of seven steps that saves at 3, 6 and 7."""
    settings = config(tmp_path / name)
    changes = {"log_every": 1, "eval_every": 1000, "save_every": 3} | changes
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **changes))


BAD = 4
"""Number of the batch that is spoilt."""


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """`spoil(what)` adds `what` to the loss of batch BAD of a run, and to all weights that come of it."""

    def spoil(what):
        data = Data(short(tmp_path))
        batches = data.batches(data.train, tmp_path / "lengths.npz")
        sums = [int(batches[number]["inputs"].sum()) for number in range(12)]
        assert sums.count(sums[BAD]) == 1

        def make_step(*arguments):
            step = original(*arguments)

            def spoilt(state, batch):
                state, totals = step(state, batch)
                added = jnp.where(jnp.sum(batch["inputs"]) == sums[BAD], what, 0.0)
                totals["nll"] += added * totals["tokens"]
                return jax.tree.map(lambda leaf: leaf + added.astype(leaf.dtype), state), totals

            return spoilt

        original = training.make_step
        monkeypatch.setattr(training, "make_step", make_step)

    return spoil


@pytest.mark.parametrize(
    "what, spike, message",
    [(np.nan, None, "the loss is nan bits per byte"), (9.0, 5.0, "more than train.spike (5.0) above the mean of 8.6")],
)
def test_a_bad_step_sends_the_run_back_and_past_its_batch(tmp_path, spoil, what, spike, message, caplog):
    spoil(what)
    train(short(tmp_path, spike=spike, rollbacks=1))
    assert message in caplog.text
    assert "at step 5, batch 4: back to step 3, batches 3 to 4 are left out" in caplog.text
    assert [line["step"] for line in metrics.read(tmp_path / "run") if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    progress = Checkpoints(tmp_path / "run").progress(7)
    assert (progress.next_batch, progress.rollbacks) == (9, 1)
    state, _ = final(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_without_a_rollback_left_a_bad_step_stops_the_run_and_names_the_batch(tmp_path, spoil):
    spoil(np.nan)
    # Step 5 is the last before a save: what it leaves must not be saved.
    with pytest.raises(metrics.TrainingError, match="the loss is nan .* at step 5, batch 4; checkpoints are of earlier steps"):
        train(short(tmp_path, save_every=5))
    assert Checkpoints(tmp_path / "run").latest() is None


def stop_at(monkeypatch, stops, action):
    """At the steps in `stops`, once each, right after they began."""
    step, left = metrics.Recorder.step, list(stops)

    def stopping(self, at, *arguments):
        step(self, at, *arguments)
        if at in left:
            left.remove(at)
            action()

    monkeypatch.setattr(metrics.Recorder, "step", stopping)


def test_a_run_that_is_stopped_after_it_went_back_ends_as_one_that_is_not(tmp_path, spoil, monkeypatch):
    spoil(9.0)
    changes = {"spike": 5.0, "rollbacks": 1}
    train(short(tmp_path, "whole", **changes))

    def stop():
        raise KeyboardInterrupt

    stop_at(monkeypatch, [2, 6, 7], stop)  # 6 comes after going back, before the next save; 7 after it
    stopped = short(tmp_path, "stopped", **changes)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    train(stopped)
    assert_equal(final(stopped.run), final(tmp_path / "whole"))
    progress, other = (dataclasses.asdict(Checkpoints(tmp_path / name).progress(7)) for name in ("stopped", "whole"))
    assert progress | {"config": None} == other | {"config": None} and progress["typical"] > 1


def test_sigterm_saves_at_the_next_step_and_the_run_goes_on_exactly(tmp_path, monkeypatch, caplog):
    before = signal.getsignal(signal.SIGTERM)
    whole, stopped = short(tmp_path, "whole"), short(tmp_path, "stopped")
    train(whole)
    stop_at(monkeypatch, [2, 6], lambda: os.kill(os.getpid(), signal.SIGTERM))
    for step in (2, 6):
        with pytest.raises(Preempted) as caught:
            train(stopped)
        assert caught.value.code == 75
        assert Checkpoints(stopped.run).latest() == step
    train(stopped)
    assert signal.getsignal(signal.SIGTERM) == before
    assert_equal(final(stopped.run), final(whole.run))
    np.testing.assert_array_equal(losses(stopped), losses(whole))


KILLS = 24


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_never_killed(tmp_path, compilations):
    launcher, random = Launcher(tmp_path, compilations), Random(0)
    # A save at every second step, so that most moments are in one.
    whole, killed = (launcher.settings(name, MeshConfig(fsdp=1), steps=400, save_every=2) for name in ("whole", "killed"))
    launcher.end(whole, launcher.start(whole, 1, 1))

    def saved():
        directory = Path(killed.run) / "checkpoints"
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
        cut = any("tmp" in name for name in names)
        return max((int(name) for name in names if name.isdecimal()), default=0), cut

    statuses, cuts, newest = [], 0, [0]
    for kill in range(KILLS):
        (process,) = launcher.start(killed, 1, 1)
        if kill % 6 == 5:  # while it starts
            time.sleep(random.uniform(0, 8))
        else:
            enough = newest[-1] + random.randint(1, 12)
            while saved()[0] < enough:
                assert process.poll() is None, (tmp_path / "killed.0.log").read_text()[-3000:]
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.3))
        process.send_signal(random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        statuses.append(process.wait())
        step, cut = saved()
        cuts += cut
        assert step >= newest[-1]  # nothing that was whole is lost
        newest.append(step)
    # SIGTERM before there is anything to save ends the process like any other.
    assert set(statuses) <= {-signal.SIGKILL, -signal.SIGTERM, 75} and statuses.count(-signal.SIGKILL) > KILLS / 3
    assert 75 in statuses and cuts > 2 and 20 < newest[-1] < 400
    launcher.end(killed, launcher.start(killed, 1, 1))
    assert_equal(final(killed.run), final(whole.run))
    assert losses(killed) == losses(whole)
    print(f"{statuses}, saves cut: {cuts}, newest checkpoint after each: {newest}")


@pytest.mark.slow
def test_when_one_process_dies_the_others_end_and_the_run_goes_on(tmp_path, compilations):
    launcher, mesh = Launcher(tmp_path, compilations), MeshConfig(fsdp=2)
    whole, killed = (launcher.settings(name, mesh, steps=40) for name in ("whole", "killed"))
    launcher.end(whole, launcher.start(whole, 2, 1))
    processes = launcher.start(killed, 2, 1)
    while not list((Path(killed.run) / "checkpoints").glob("[0-9]*[0-9]")):
        time.sleep(0.01)
    processes[0].kill()
    assert [process.wait() for process in processes] == [-signal.SIGKILL, -signal.SIGABRT]
    launcher.end(killed, launcher.start(killed, 2, 1))
    assert_equal(final(killed.run), final(whole.run))


@pytest.fixture
def nothing_expensive(monkeypatch):
    def fail(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(Data, "measure", fail)
    monkeypatch.setattr(training, "make_state", fail)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh": MeshConfig(data=3)}, "data=3 x fsdp=2 x tensor=1 does not fit 8 devices"),
        ({"mesh": MeshConfig(tensor=4)}, r"model.kv_heads \(2\) does not divide over mesh.tensor \(4\)"),
        ({"optim": OptimConfig(rows_per_device=2)}, r"data.batch_size \(8\) must be a multiple of the 8 devices .* \(2\)"),
        ({"run": "/proc/runs/1"}, "cannot write to /proc/runs/1: No such file or directory; --run chooses another"),
        ({"run": "/dev/null/run"}, "cannot write to /dev/null/run: Not a directory; --run chooses another"),
    ],
)
def test_what_cannot_work_is_said_before_anything_expensive(tmp_path, nothing_expensive, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(short(tmp_path), **changes))


def test_a_checkpoint_of_another_architecture_is_refused_before_anything_expensive(tmp_path, request):
    settings = short(tmp_path, steps=3)
    train(settings)
    (tmp_path / "run" / "lengths.npz").unlink()
    request.getfixturevalue("nothing_expensive")
    stored = runs.read(settings.run)
    other = dataclasses.replace(stored, model=dataclasses.replace(stored.model, layers=2))
    (tmp_path / "run" / runs.CONFIG).write_text(configs.to_json(other))
    with pytest.raises(ValueError, match=r"was begun with other settings \(model.layers is 2, was 3\)"):
        train(other)


def test_a_run_whose_making_was_cut_is_made_anew(tmp_path):
    settings = short(tmp_path, steps=1)
    for name in ("lengths.npz.part", "tokenizer.model", "config.json.part"):
        files.write(tmp_path / "run" / name, b"half")
    train(settings)
    assert runs.read(settings.run).train == settings.train


def test_a_file_whose_writing_is_cut_stays_what_it_was(tmp_path):
    path = tmp_path / "new" / "file"
    files.write(path, b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError):
            files.write(path, bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b"before"
