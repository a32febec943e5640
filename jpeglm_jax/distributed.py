"""Several processes, one run: joining them, what each has of a batch, agreeing, and the notice of preemption.

Everything here is the obvious thing, without any communication, where there is one process.
"""

import atexit
import contextlib
import glob
import hashlib
import importlib.util
import logging
import os
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jpeglm_jax import sharding


def initialize() -> bool:
    """Joins the processes of a run, before anything touches a device; returns whether this is the first, or only, of them.

    JAX finds the others itself on TPU hosts and under Slurm. Elsewhere three variables say where they are:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without any of this, and with
    JAX_NUM_PROCESSES=1, the process is alone. Processes other than the first log warnings only, and show no progress.

    Raises:
      ValueError: some of the three variables without the others, or one that is no number.
      RuntimeError: the other processes do not come within five minutes.
    """
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    address, *numbers = (os.environ.get(name, "") for name in names)
    if numbers[0] == "1":
        return True
    known = {}
    if address or any(numbers):
        if not (address and all(number.isdecimal() for number in numbers)):
            raise ValueError(
                f"several processes need all of {', '.join(names)}, the last two as numbers; they are "
                + ", ".join(repr(value) for value in (address, *numbers))
            )
        known = {"num_processes": int(numbers[0]), "process_id": int(numbers[1])}  # JAX reads the address itself
    elif not (_on_tpu_host() or _in_slurm_job()):
        return True
    jax.distributed.initialize(**known)
    if number := jax.process_index():
        os.environ["TQDM_DISABLE"] = "1"  # which is read when tqdm is imported
        root = logging.getLogger()
        root.setLevel(logging.WARNING)
        for handler in root.handlers:
            handler.setFormatter(logging.Formatter(f"process {number}: %(message)s"))
    return not number


def _on_tpu_host() -> bool:
    """One host or many: JAX asks Google's metadata server, or the variables that GKE sets."""
    wanted = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None


def _in_slurm_job() -> bool:
    """Started by `srun` as one of several tasks."""
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def rows(mesh: Mesh, batch_size: int) -> list[range]:
    """The rows of a global batch that the devices of this process hold, in order.

    Hosts whose devices are copies of each other's rows, because `tensor` goes across them, hold the same rows.

    Args:
      batch_size: rows of the global batch, a multiple of data x fsdp.

    Raises:
      ValueError: two processes share a part of their rows only.
    """
    held: dict[int, set[tuple[int, int]]] = {}
    for device, (index, _) in NamedSharding(mesh, sharding.BT).devices_indices_map((batch_size, 1)).items():
        held.setdefault(device.process_index, set()).add(index.indices(batch_size)[:2])
    ours = held[jax.process_index()]
    for process, theirs in held.items():
        if ours & theirs not in (set(), ours) or len(theirs) != len(ours):
            raise ValueError(
                f"mesh.tensor ({mesh.shape['tensor']}) splits the rows of process {jax.process_index()} and process {process} "
                "unevenly; let it divide the devices of a process, or be a multiple of them"
            )
    merged: list[range] = []
    for start, stop in sorted(ours):
        if merged and merged[-1].stop == start:
            start = merged.pop().start
        merged.append(range(start, stop))
    return merged


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Processes leave this block together, and an error in one of them is an error in all: none waits for one that stopped.

    Raises:
      RuntimeError: another process failed in the block; its own message says why.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = gather(np.array(failure is not None)).nonzero()[0]
    if failure:
        raise failure
    if failed.size:
        raise RuntimeError(f"process {failed[0]} stopped; its own message says why")


@contextlib.contextmanager
def alone(unless: type[Exception]) -> Iterator[None]:
    """After an error in this block the process ends without waiting for the others, as processes otherwise do.

    They wait for its part of a step, and JAX ends them (SIGABRT) when it misses its heartbeat, after 100 seconds at most.

    Args:
      unless: an error that all processes come upon at the same step.
    """
    try:
        yield
    except unless:
        raise
    except Exception:
        if jax.process_count() > 1:
            atexit.register(os._exit, 1)  # comes before JAX's own
        raise


def check_same(values: dict[str, str]) -> None:
    """Whether all processes have the same.

    Raises:
      ValueError: they do not; the message names what differs, on every process.
    """
    digests = np.array([list(hashlib.sha256(value.encode()).digest()) for value in values.values()], np.uint8)
    differing = (gather(digests) != digests).any(axis=(0, 2))
    if differing.any():
        names = ", ".join(name for name, differs in zip(values, differing) if differs)
        raise ValueError(
            f"the processes of this run have another {names} each; start all with the same command, on the same data"
        )


def gather(values: np.ndarray) -> np.ndarray:
    """`values` of every process, stacked; all of one shape and dtype."""
    return np.asarray(multihost_utils.process_allgather(values)) if jax.process_count() > 1 else values[None]


class Preemption:
    """Listens for SIGTERM, which announces preemption."""

    def __enter__(self) -> "Preemption":
        self.noticed = False
        # Several processes must stop at the same step: JAX listens then, and agrees on one.
        self.listening = not jax.distributed.is_initialized()
        if self.listening:
            self.before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_) -> None:
        if self.listening:
            signal.signal(signal.SIGTERM, self.before)

    def reached(self, step: int) -> bool:
        """Whether to stop before step number `step`; asked by all processes, at every step."""
        return self.noticed or multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, *_) -> None:
        self.noticed = True
