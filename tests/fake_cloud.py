#!/usr/bin/env python3
"""Stand-in for gcloud, xpk, kubectl, uv and sleep, by whose names test_launch.py puts it on the PATH. No cloud is behind it.

It writes its arguments to $CALLS, a line of JSON for each call, and answers as a cloud would that has one slice of one
worker, whose disk is the directory $WORKER. The lines of $STATES are the states that the slice is seen in, one look after the
other. If $SAY is set, workers do nothing and say that they are what it says.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def on_worker(command: str) -> int:
    return subprocess.run(["bash", "-c", command], cwd=worker, env=os.environ | {"HOME": str(worker)}).returncode


program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
worker, states = Path(os.environ["WORKER"]), Path(os.environ["STATES"])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([program, *arguments]) + "\n")

if program == "sleep":
    time.sleep(0.05)
elif program == "uv" and arguments[:2] == ["python", "find"]:
    print("/python/of/uv")
elif arguments[:2] == ["config", "get-value"]:
    print(os.environ.get("CONFIGURED", "configured"))
elif arguments[:3] == ["compute", "tpus", "queued-resources"]:
    verb, *arguments = arguments[3:]
    if verb == "list":
        now, *later = states.read_text().split("\n")
        states.write_text("\n".join(later or [now]))
        if now == "ERROR":
            sys.exit("ERROR: there is no network")
        print(now)
    elif verb == "scp":
        shutil.copy(arguments[0], worker / arguments[1].partition(":")[2])
    elif verb == "ssh":
        command = next(x for x in arguments if x.startswith("--command=")).removeprefix("--command=")
        if "SAY" in os.environ:
            print(os.environ["SAY"] if "status" in command else "")
        else:
            sys.exit(on_worker(command))
    elif verb == "delete":  # and with the slice what is on its disk
        on_worker("! [ -x jpeglm_jax/launch/worker.sh ] || jpeglm_jax/launch/worker.sh stop >&2")
        for directory in ("jpeglm_jax", ".jpeglm"):
            shutil.rmtree(worker / directory, ignore_errors=True)
