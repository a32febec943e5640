"""Trains a run as one process of it, and writes down its batches: `logged_run.py CONFIG.json BATCHES.txt [stop]`.

BATCHES.txt gets a line for each global batch, a hash of what lies on the devices of all processes; lines are appended.
With `stop`, the first process sends itself SIGTERM in its second step.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from jpeglm_jax import distributed

FIRST = distributed.initialize()

from jax.experimental import multihost_utils  # noqa: E402

from jpeglm_jax import config as configs  # noqa: E402
from jpeglm_jax.evaluation import likelihood  # noqa: E402
from jpeglm_jax.metrics import Recorder  # noqa: E402
from jpeglm_jax.train import train  # noqa: E402


def log_batches(path):
    place = likelihood.place

    def placed(element):
        batch = place(element)
        digest = hashlib.sha256()
        for name in ("inputs", "targets"):
            digest.update(multihost_utils.process_allgather(batch[name], tiled=True).tobytes())
        if FIRST:
            with path.open("a") as file:
                file.write(digest.hexdigest() + "\n")
        return batch

    likelihood.place = placed


def stop_soon():
    step, seen = Recorder.step, []

    def stopping(self, at, *arguments):
        step(self, at, *arguments)
        seen.append(at)
        if len(seen) == 2 and FIRST:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # JAX looks for signals once a second

    Recorder.step = stopping


if __name__ == "__main__":
    log_batches(Path(sys.argv[2]))
    if len(sys.argv) > 3:
        stop_soon()
    train(configs.from_json(Path(sys.argv[1]).read_text()))
