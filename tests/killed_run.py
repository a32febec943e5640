"""Trains a run in a process that kills itself: `killed_run.py CONFIG.json STEP MOMENT`, no STEP to train to the end.

MOMENT says when the process gets SIGKILL: "step" as soon as step STEP runs, "save" as soon as the save of step STEP has begun.
"""

import os
import signal
import sys
from pathlib import Path

from jpeglm_jax import config as configs
from jpeglm_jax.checkpoints import Checkpoints
from jpeglm_jax.metrics import Recorder
from jpeglm_jax.train import train


def kill_after(owner, method, step):
    original = getattr(owner, method)

    def killing(self, at, *arguments):
        result = original(self, at, *arguments)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method, killing)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        step, moment = int(sys.argv[2]), sys.argv[3]
        kill_after(*{"step": (Recorder, "step"), "save": (Checkpoints, "save")}[moment], step)
    train(configs.from_json(Path(sys.argv[1]).read_text()))
