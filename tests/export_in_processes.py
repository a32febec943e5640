"""One of two processes that export a run together: RUN DIRECTORY FILE_BYTES PORT INDEX. Prints the names of the weights it wrote."""

import contextlib
import json
import sys
from pathlib import Path

import jax
from etils import epath

jax.config.update("jax_cpu_collectives_implementation", "gloo")
run, directory, size, port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))

from jpeglm_jax import cli, hf  # noqa: E402

hf.FILE_BYTES = int(size)
written = []
write_bytes = type(epath.Path(directory)).write_bytes


def noted(path, data):
    written.append(path.name)
    return write_bytes(path, data)


type(epath.Path(directory)).write_bytes = noted
with contextlib.redirect_stdout(sys.stderr):
    cli.main(["export", run, directory])
print(json.dumps([name for name in written if Path(name).suffix == ".safetensors"]))
