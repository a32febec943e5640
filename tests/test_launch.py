"""The launchers: what they run, what they say when something is wrong, and that a training survives under them.

Nothing here ran on a real cloud: gcloud, xpk, kubectl, uv and sleep are stand-ins that record what they are called with (see
fake_cloud.py). The commands that they carry to workers do run, on this machine; so does supervise.sh, with small programs in
the place of `jpeglm`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHERS = ("tpu_vm.sh", "gke.sh", "supervise.sh", "worker.sh")

AT = ("--zone", "somewhere-a", "--project", "ours")
RUN = ("configs/quickstart.py", "--run", "gs://bucket/runs/a")
NASTY = ["two words", "it's", 'a "b"', "$(touch hacked) `touch hacked` $HOME", "*", "back\\slash", "two\nlines", "ü~!#;&|", ""]
"""Arguments that a shell would change, if it were let."""

# Programs in the place of `jpeglm`. They record their arguments, as the stand-ins do.
RECORDS = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path

def record(*call):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(call) + "\\n")

"""
ENDS = RECORDS + "record('jpeglm', *sys.argv[1:])\n"
FAILS = ENDS + "sys.exit(9)\n"
STOPS_ON_SIGTERM = (
    RECORDS
    + """
def save(*_):
    time.sleep(0.2)
    record("saved")
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
record("jpeglm", *sys.argv[1:])
while True:
    time.sleep(0.02)
"""
)

# In the place of setup.sh, for workers. They have no bucket, so no checkpoints to find there.
SETS_UP = """#!/usr/bin/env bash
echo "extras $1, python ${PYTHON:-}"
mkdir -p .venv/bin
cp launch/jpeglm .venv/bin/jpeglm
printf '#!/bin/sh\\necho 0\\n' >.venv/bin/python
chmod +x .venv/bin/python
touch ".venv/installed-$1"
"""


class Machine:
    """A user's machine with a checkout, and a cloud of stand-ins."""

    def __init__(self, directory: Path):
        self.checkout, self.worker = directory / "a checkout", directory / "worker"
        self.calls_path, self.states = directory / "calls", directory / "states"
        self.bin = directory / "bin"
        for path in (self.bin, self.worker / ".local/bin", self.checkout / "jpeglm_jax"):
            path.mkdir(parents=True)
        for path in [self.bin / name for name in ("gcloud", "xpk", "kubectl", "sleep")] + [self.worker / ".local/bin/uv"]:
            path.symlink_to(ROOT / "tests/fake_cloud.py")
        for name in ("launch", "configs"):
            shutil.copytree(ROOT / name, self.checkout / name)
        for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
            shutil.copy(ROOT / name, self.checkout)
        self.cloud_has("ACTIVE")
        self.calls_path.touch()
        self.environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(directory),
            "XDG_CACHE_HOME": str(directory / "a cache"),
            "CALLS": str(self.calls_path),
            "WORKER": str(self.worker),
            "STATES": str(self.states),
        }

    def cloud_has(self, *states: str) -> None:
        """The states that the slice is seen in, one after the other; the last one stays."""
        self.states.write_text("\n".join(states))

    def put(self, program: str) -> None:
        """In the place of `jpeglm`, here and, where setup.sh has run, on the worker."""
        executable(self.checkout / ".venv/bin/jpeglm", program)
        executable(self.checkout / ".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        executable(self.checkout / "launch/jpeglm", program)
        executable(self.checkout / "launch/setup.sh", SETS_UP)

    def launch(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [str(self.checkout / "launch" / script), *arguments]
        return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, timeout=60)

    def popen(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        command = [str(self.checkout / "launch" / script), *arguments]
        # Bash cannot trap what it was started with ignoring, as jobs in the background ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(command, env=self.environment | environment, stderr=subprocess.PIPE, text=True)

    def calls(self, *programs: str) -> list[list[str]]:
        """What the stand-ins were called with, since this was asked last; of some programs only, if named."""
        calls = [json.loads(line) for line in self.calls_path.read_text().splitlines()]
        self.calls_path.write_text("")
        return [call for call in calls if not programs or call[0] in programs]

    def wait_for(self, program: str) -> None:
        wait_until(lambda: f'"{program}"' in self.calls_path.read_text())


def executable(path: Path, program: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(program)
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    worker = machine.worker / "jpeglm_jax/launch/worker.sh"
    if worker.exists():
        subprocess.run([worker, "stop"], env=machine.environment | {"HOME": str(machine.worker)}, timeout=60, check=True)


def test_the_scripts_are_clean_for_shellcheck():
    command = [Path(sys.executable).parent / "shellcheck", "--external-sources", "--source-path=launch"]
    result = subprocess.run([*command, *sorted((ROOT / "launch").glob("*.sh"))], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_names_every_command_option_and_variable(machine, script):
    result = machine.launch(script, "--help")
    source = (ROOT / "launch" / script).read_text()
    # Cases of the loop over the options, and of the commands.
    cases = " | ".join(re.findall(r"^ +([a-z-]+(?: \| [a-z-]+)+|--[a-z |-]+)\) ", source, re.M)).split(" | ")
    names = {*cases, *re.findall(r"JPEGLM_[A-Z]+", source)} - {"job"}
    assert result.returncode == 0 and not result.stderr and names
    assert not {name for name in names if name not in result.stdout and name not in ("-h", "--help")}
    assert machine.calls() == []


@pytest.mark.parametrize(
    "states, script, arguments",
    [
        (["ACTIVE"], "tpu_vm.sh", ["create", "a", "--type", "v5p-64", *AT]),
        (["ACTIVE"], "tpu_vm.sh", ["create", "a", "--type", "v5e-16", "--slices", "2", "--capacity", "spot", *AT]),
        (["ACTIVE"], "tpu_vm.sh", ["create", "a", "--type", "v4-8", "--capacity", "reserved", "--runtime", "my os", *AT]),
        (["ACTIVE"], "tpu_vm.sh", ["delete", "a"]),
        (["ACTIVE"], "tpu_vm.sh", ["install", "a", *AT]),
        (["SUSPENDED", "ACTIVE"], "tpu_vm.sh", ["resume", "a", "--type", "v6e-8", *AT, *RUN, *NASTY]),
        (["ACTIVE"], "gke.sh", ["run", "a", "--cluster", "c", "--type", "v5e-16", "--slices", "2", *AT, *RUN, *NASTY]),
        (["ACTIVE"], "gke.sh", ["run", "a", "--cluster", "c", "--type", "v6e-256", "--image", "an/image", *RUN]),
        (["ACTIVE"], "gke.sh", ["status", "a", "--cluster", "c", *AT]),
        (["ACTIVE"], "gke.sh", ["logs", "a", "--cluster", "c", *AT]),
        (["ACTIVE"], "gke.sh", ["delete", "a", "--cluster", "c"]),
    ],
    ids=lambda value: " ".join(value[:7]) if isinstance(value, list) else value,
)
def test_a_dry_run_prints_what_a_run_executes(machine, states, script, arguments):
    """Its output, run as a script, makes the same calls as the run without --dry-run; and it makes none itself."""
    machine.put(ENDS)
    machine.cloud_has(*states)
    dry = machine.launch(script, *arguments[:2], "--dry-run", *arguments[2:])
    assert dry.returncode == 0, dry.stderr
    assert machine.calls() == [] and not Path(machine.environment["XDG_CACHE_HOME"]).exists()

    result = machine.launch(script, *arguments)
    assert result.returncode == 0, result.stderr
    cloud = ("gcloud", "xpk", "kubectl")
    executed = machine.calls(*cloud)
    subprocess.run(["bash", "-c", dry.stdout], env=machine.environment, capture_output=True, timeout=60)
    assert executed == machine.calls(*cloud) != []


def test_the_commands_for_the_cloud(machine):
    machine.launch("tpu_vm.sh", "create", "a", "--type", "v5e-16", "--slices", "2", "--capacity", "spot", *AT)
    machine.launch("tpu_vm.sh", "create", "b", "--type", "v6e-8", *AT)
    queued = ["gcloud", "compute", "tpus", "queued-resources", "create"]
    where = ["--zone=somewhere-a", "--project=ours"]
    assert machine.calls() == [
        [*queued, "a", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
        + ["--node-count=2", "--node-prefix=a", "--spot", *where],
        [*queued, "b", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--node-id=b", *where],
    ]
    machine.launch("gke.sh", "run", "a", "--cluster", "c", "--type", "v5e-16", "--slices", "2", *RUN)
    (create,) = machine.calls()
    assert create[:4] == ["xpk", "workload", "create", "--workload"] and create[-2:] == ["--cluster", "c"]
    assert {"--tpu-type=v5litepod-16", "--num-slices=2", "--base-docker-image=python:3.12"} < set(create)
    assert "--restart-on-exit-codes=75" in create  # and not only what xpk takes for a preemption
    (script_dir,) = [flag.removeprefix("--script-dir=") for flag in create if flag.startswith("--script-dir=")]
    assert (Path(script_dir) / "launch/supervise.sh").stat().st_mode & 0o100


def test_the_environment_gives_what_no_option_does(machine):
    ours = {"JPEGLM_TYPE": "v6e-8", "JPEGLM_SLICES": "3"}
    machine.launch("tpu_vm.sh", "create", "a", "--slices", "2", **ours, JPEGLM_CAPACITY="spot", JPEGLM_RUNTIME="os")
    machine.launch("gke.sh", "run", "a", *RUN, **ours, JPEGLM_CLUSTER="c", JPEGLM_IMAGE="an/image")
    *asked, create, workload = machine.calls()
    assert {tuple(call) for call in asked} == {("gcloud", "config", "get-value", x) for x in ("compute/zone", "core/project")}
    assert {"--accelerator-type=v6e-8", "--node-count=2", "--spot", "--runtime-version=os"} < set(create)
    assert {"--tpu-type=v6e-8", "--num-slices=3", "--base-docker-image=an/image"} < set(workload)


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("tpu_vm.sh", ["craete", "a"], "unknown command 'craete'; there are create, install"),
        ("tpu_vm.sh", ["create"], "the name is missing"),
        ("tpu_vm.sh", ["create", "--type", "v5e-8"], "the name '--type' must be"),
        ("tpu_vm.sh", ["create", "7b", "--type", "v5e-8"], "the name '7b' must be lower-case"),
        ("tpu_vm.sh", ["create", "a"], "the accelerator type is missing: --type v5litepod-64"),
        ("tpu_vm.sh", ["create", "a", "--type", "v9-8"], "unknown accelerator type 'v9-8'; known are v5litepod-N (or v5e-N)"),
        ("tpu_vm.sh", ["create", "a", "--type", "v5e-24"], "unknown accelerator type 'v5e-24'"),
        ("tpu_vm.sh", ["create", "a", "--type", "v5p-4"], "unknown accelerator type 'v5p-4'"),
        ("tpu_vm.sh", ["create", "a", "--type", "v4-08"], "unknown accelerator type 'v4-08'"),
        ("tpu_vm.sh", ["create", "a", "--type", "v5e-8", "--slices", "none"], "--slices must be a whole number"),
        ("tpu_vm.sh", ["create", "a", "--type", "v5e-8", "--capacity", "free"], "--capacity must be on-demand"),
        ("tpu_vm.sh", ["create", "a", "--type"], "--type needs a value"),
        ("tpu_vm.sh", ["create", "a", "--typ", "v5e-8"], "unknown option '--typ'"),
        ("tpu_vm.sh", ["status", "a", "now"], "status takes no 'now'"),
        ("tpu_vm.sh", ["run", "a", *AT], "what to train is missing"),
        ("tpu_vm.sh", ["run", "a", *AT, "configs/quickstart.py"], "name the run directory: configs/quickstart.py --run RUN"),
        ("tpu_vm.sh", ["run", "a", *AT, *RUN[:2], "runs/a"], "the run directory must be gs://BUCKET/..."),
        ("tpu_vm.sh", ["run", "a", *AT, "runs/a"], "the run directory must be gs://BUCKET/..."),
        ("tpu_vm.sh", ["run", "a", *AT, "configs/none.py", *RUN[1:]], "there is no configs/none.py in"),
        ("tpu_vm.sh", ["run", "a", *AT, "/home/me/mine.py", *RUN[1:]], "name a file in it, configs/NAME.py"),
        ("gke.sh", ["run", "a", "--type", "v5e-8", *RUN], "the cluster is missing: --cluster NAME, or JPEGLM_CLUSTER"),
        ("gke.sh", ["run", "a", "--cluster", "c", *RUN], "the accelerator type is missing"),
        ("gke.sh", ["run", "a", "--cluster", "c", "--type", "v5e-8", *RUN[:2], "/disk/a"], "the run directory must be gs://"),
        ("gke.sh", ["stop", "a", "--cluster", "c"], "unknown command 'stop'; there are run, status, logs, delete"),
        ("supervise.sh", [], "what to train is missing"),
        ("supervise.sh", ["configs/quickstart.py"], "name the run directory: configs/quickstart.py --run RUN"),
        ("worker.sh", ["go"], "unknown command 'go'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(machine, script, arguments, says):
    result = machine.launch(script, *arguments)
    assert (result.returncode, result.stdout, machine.calls()) == (2, "", [])
    assert result.stderr.startswith(f"launch/{script}: error: ") and says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("tpu_vm.sh", ["status", "a"], "gcloud is not installed, or not on the PATH: https://cloud.google.com/sdk"),
        ("gke.sh", ["status", "a", "--cluster", "c"], "xpk is not installed, or not on the PATH: pip install xpk"),
        ("supervise.sh", ["runs/a"], "jpeglm is not installed, or not on the PATH: launch/setup.sh"),
    ],
)
def test_a_missing_program_is_named(machine, tmp_path, script, arguments, says):
    (tmp_path / "few").mkdir()
    for tool in ("bash", "dirname", "basename", "sed"):
        (tmp_path / "few" / tool).symlink_to(shutil.which(tool))
    result = machine.launch(script, *arguments, PATH=str(tmp_path / "few"))
    assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1


def test_a_missing_zone_is_named(machine):
    result = machine.launch("tpu_vm.sh", "status", "a", CONFIGURED="")
    assert result.returncode == 2
    assert result.stderr == (
        "launch/tpu_vm.sh: error: the zone is missing: give --zone, or `gcloud config set compute/zone ...`\n"
    )


def test_a_run_on_tpu_vms_from_nothing_to_the_end(machine):
    def tpu_vm(*arguments):
        return machine.launch("tpu_vm.sh", arguments[0], "a", "--type", "v5e-16", *AT, *arguments[1:])

    machine.put(STOPS_ON_SIGTERM)
    machine.cloud_has("", "", "WAITING_FOR_RESOURCES", "ACTIVE")
    assert "not there" in tpu_vm("status").stdout
    assert tpu_vm("run", *RUN).stderr.strip().endswith("`install` comes first")
    machine.calls()

    # From nothing: the slice, the package, and the run with its arguments as they were given.
    result = tpu_vm("resume", *RUN, *NASTY)
    assert result.returncode == 0, result.stderr
    assert "extras tpu,gcs, python /python/of/uv" in result.stdout
    machine.wait_for("jpeglm")
    calls = machine.calls("gcloud", "jpeglm")
    assert [call[4] for call in calls if call[0] == "gcloud"] == ["list", "create", "list", "list", "ssh", "scp", "ssh", "ssh"]
    assert calls[-1] == ["jpeglm", "train", *RUN, *NASTY]
    assert not (machine.worker / "hacked").exists() and not (machine.worker / "jpeglm_jax/hacked").exists()

    # It runs detached; nothing else is started, or installed, beside it.
    assert re.search(r"^a: ACTIVE\nworker \S+: running gs://bucket/runs/a$", tpu_vm("status").stdout, re.M)
    assert tpu_vm("resume", *RUN).returncode == 0
    for refused in (tpu_vm("run", *RUN), tpu_vm("install"), tpu_vm("resume", RUN[0], "--run", "gs://bucket/runs/b")):
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].endswith(("`stop` ends it", "is installed"))
    assert machine.calls("jpeglm") == []

    # SIGTERM reaches the training, which saves; then it can go on.
    assert re.search(r"worker \S+: stopped gs://bucket/runs/a", tpu_vm("stop").stdout)
    assert machine.calls("saved", "jpeglm") == [["saved"]]
    assert tpu_vm("run", *RUN).returncode == 0
    machine.wait_for("jpeglm")
    tpu_vm("stop")
    assert "supervise.sh configs/quickstart.py" in (machine.worker / ".jpeglm/log").read_text()

    # Done is done, with this run only.
    executable(machine.worker / "jpeglm_jax/.venv/bin/jpeglm", ENDS)
    tpu_vm("resume", *RUN)
    machine.wait_for("jpeglm")
    wait_until(lambda: ": done gs://bucket/runs/a" in tpu_vm("status").stdout)
    machine.calls()
    assert tpu_vm("resume", *RUN).returncode == 0
    assert machine.calls("jpeglm") == []
    tpu_vm("resume", RUN[0], "--run", "gs://bucket/runs/b")
    machine.wait_for("jpeglm")


def test_supervise_brings_back_a_preempted_slice_until_the_run_is_done(machine):
    machine.put(STOPS_ON_SIGTERM)
    machine.cloud_has("", *["ACTIVE"] * 3, *["SUSPENDED"] * 2, "CREATING", "ACTIVE")
    supervising = machine.popen("tpu_vm.sh", "supervise", "a", "--type", "v5e-16", *AT, *RUN)
    machine.wait_for("jpeglm")
    machine.put(ENDS)  # what the second slice will be given
    _, said = supervising.communicate(timeout=60)
    assert supervising.returncode == 0, said
    assert "a is SUSPENDED: deleting it and creating it again" in said and "gs://bucket/runs/a is done" in said
    calls = machine.calls()
    assert [call for call in calls if call[0] == "jpeglm"] == [["jpeglm", "train", *RUN]] * 2
    changes = [call[4] for call in calls if call[0] == "gcloud" and call[4] in ("create", "delete", "scp")]
    assert changes == ["create", "scp", "delete", "create", "scp"]
    assert ["sleep", "60"] in calls


def test_supervise_bears_with_a_cloud_that_does_not_answer(machine):
    machine.put(STOPS_ON_SIGTERM)
    machine.cloud_has("ERROR", "ACTIVE", "ERROR", "ACTIVE")
    supervising = machine.popen("tpu_vm.sh", "supervise", "a", "--type", "v5e-16", *AT, *RUN)
    machine.wait_for("jpeglm")
    while "no answer from a" not in (line := supervising.stderr.readline()):
        assert line
    machine.launch("tpu_vm.sh", "stop", "a", *AT)
    _, said = supervising.communicate(timeout=60)
    assert supervising.returncode == 1 and "gs://bucket/runs/a has stopped" in said
    assert len(machine.calls("jpeglm")) == 1


def test_supervise_gives_up_on_a_cloud_that_never_answers(machine):
    machine.cloud_has("ERROR")
    result = machine.launch("tpu_vm.sh", "supervise", "a", "--type", "v5e-16", *AT, *RUN)
    assert result.returncode == 1 and "that has failed 10 times in a row: giving up" in result.stderr


def test_supervise_ends_with_a_run_that_has_failed(machine):
    machine.put(FAILS)
    result = machine.launch("tpu_vm.sh", "supervise", "a", "--type", "v5e-16", *AT, *RUN)
    assert result.returncode == 1 and "gs://bucket/runs/a has failed" in result.stderr
    assert len(machine.calls("jpeglm")) == 5
    assert "(exit status 9, see the log)" in machine.launch("tpu_vm.sh", "status", "a", *AT).stdout


@pytest.mark.parametrize(
    "workers, done",
    [
        (("running", "running"), ""),
        (("running", "done"), ""),
        (("done", "done"), ""),
        (("running", "idle"), "ssh"),  # one was started anew
        (("stopped", "failed"), "ssh"),
        (("running", "absent"), "scp ssh ssh"),
    ],
)
def test_resume_does_what_the_workers_need(machine, workers, done):
    said = "\n".join(f"worker w{number}: {what} gs://bucket/runs/a" for number, what in enumerate(workers))
    machine.launch("tpu_vm.sh", "resume", "a", "--type", "v5e-16", *AT, *RUN, SAY=said)
    assert [call[4] for call in machine.calls()] == ["list", "ssh", *done.split()]


def in_a_pod(machine: Machine, *arguments: str) -> list[str]:
    """A workload's command as xpk 1.16 runs it in each pod: a line in a block of YAML, in a subshell of `bash -c`."""
    machine.launch("gke.sh", "run", "a", "--cluster", "c", "--type", "v5e-16", *arguments)
    (create,) = machine.calls()
    (command,) = [flag.removeprefix("--command=") for flag in create if flag.startswith("--command=")]
    assert "\n" not in command and "$(" not in command  # which would end the block, and which Kubernetes would expand
    (script_dir,) = [flag.removeprefix("--script-dir=") for flag in create if flag.startswith("--script-dir=")]
    (machine.worker / "pod").symlink_to(script_dir)
    terminate = "trap 'kill -TERM $pid' TERM"
    return ["bash", "-c", f"{terminate}; ({command}) & pid=$!; while kill -0 $pid 2>&-; do sleep 5; done; wait $pid"]


def test_arguments_arrive_in_a_pod(machine):
    machine.put(ENDS)
    command = in_a_pod(machine, *RUN, *NASTY)
    subprocess.run(command, cwd=machine.worker / "pod", env=machine.environment, timeout=60, check=True)
    assert machine.calls("jpeglm") == [["jpeglm", "train", *RUN, *NASTY]]


def test_a_pod_that_is_preempted_saves_and_says_so(machine):
    machine.put(STOPS_ON_SIGTERM)
    pod = subprocess.Popen(in_a_pod(machine, *RUN), cwd=machine.worker / "pod", env=machine.environment)
    machine.wait_for("jpeglm")
    pod.terminate()
    assert pod.wait(timeout=60) == 75
    assert machine.calls("saved") == [["saved"]]


def test_supervise_starts_again_with_growing_pauses_and_gives_up(machine, tmp_path):
    machine.put(FAILS)
    arguments = ["configs/a.py", f"--run={tmp_path / 'run'}", *NASTY]
    result = machine.launch("supervise.sh", *arguments)
    assert result.returncode == 9 and "giving up" in result.stderr
    calls = machine.calls()
    assert [call[1] for call in calls if call[0] == "sleep"] == ["10", "20", "40", "80"]
    assert [call for call in calls if call[0] == "jpeglm"] == [["jpeglm", "train", *arguments]] * 5

    machine.launch("supervise.sh", str(tmp_path / "run"), JPEGLM_FAILURES="3", JPEGLM_PAUSE="400")
    assert [call[1] for call in machine.calls("sleep")] == ["400", "600"]


def test_supervise_goes_on_while_checkpoints_are_saved(machine, tmp_path):
    """Preempted and crashed in turn, eight times in all; each second time without a new checkpoint."""
    checkpoints = tmp_path / "run/checkpoints"
    machine.put(
        ENDS
        + f"""
checkpoints = Path({str(checkpoints)!r})
number = len(list(checkpoints.glob("*.end")))
(checkpoints / f"{{number}}.end").mkdir(parents=True)
(checkpoints / str(number // 2 + 1)).mkdir(exist_ok=True)
sys.exit(0 if number == 8 else (75, 1)[number % 2])
"""
    )
    result = machine.launch("supervise.sh", str(tmp_path / "run"), JPEGLM_FAILURES="3")
    assert result.returncode == 0, result.stderr
    calls = machine.calls()
    assert [call[1] for call in calls if call[0] == "sleep"] == ["10", "20"] * 4
    assert result.stderr.count("preempted and saved") == 4 and result.stderr.count("ended with exit status 1") == 4


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_supervise_passes_a_signal_on_and_waits(machine, tmp_path, sent):
    machine.put(STOPS_ON_SIGTERM)
    supervising = machine.popen("supervise.sh", str(tmp_path / "run"))
    machine.wait_for("jpeglm")
    supervising.send_signal(sent)
    assert supervising.wait(timeout=60) == 75
    assert machine.calls("saved", "jpeglm", "sleep")[1:] == [["saved"]]  # before supervise.sh ended; no new start


def test_supervise_ends_when_it_is_stopped_in_a_pause(machine, tmp_path):
    machine.put(FAILS)
    (machine.bin / "sleep").unlink()  # a pause that lasts
    supervising = machine.popen("supervise.sh", str(tmp_path / "run"), JPEGLM_PAUSE="50")
    assert "starting again in 50 s" in supervising.stderr.readline()
    supervising.send_signal(signal.SIGTERM)
    assert supervising.wait(timeout=20) == 75
    assert len(machine.calls("jpeglm")) == 1


def test_a_dry_run_of_supervise_starts_nothing(machine, tmp_path):
    machine.put(ENDS)
    result = machine.launch("supervise.sh", "--dry-run", str(tmp_path / "run"), "two words")
    assert result.stdout == f"jpeglm train {tmp_path / 'run'} two\\ words\n"
    assert machine.calls() == []


def wait_until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
