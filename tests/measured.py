"""Commands as processes whose memory is watched."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def run(*commands: list[str], **environment: str) -> list[float]:
    """Runs commands at the same time; the largest anonymous memory of each, in GiB.

    Pages of files that are mapped or cached are not counted: the system takes them back when it needs them.
    """
    settings = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    processes = [subprocess.Popen([sys.executable, *map(str, command)], env=settings) for command in commands]
    peaks = [0.0] * len(processes)

    def watch():
        while any(process.poll() is None for process in processes):
            for number, process in enumerate(processes):
                peaks[number] = max(peaks[number], _anonymous(process.pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    codes = [process.wait() for process in processes]
    watcher.join()
    assert codes == [0] * len(processes), codes
    return peaks


def _anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    kib = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return kib / 2**20
