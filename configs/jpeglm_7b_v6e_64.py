"""The 7B of jpeglm_7b.py on a v6e-64: of each layer is kept for the backward pass what the memory allows.

    jpeglm train configs/jpeglm_7b_v6e_64.py --data.path ... --run gs://BUCKET/runs/7b     # on every host; or this, on none:
    launch/tpu_vm.sh supervise jpeglm-7b --type v6e-64 configs/jpeglm_7b_v6e_64.py --data.path ... --run gs://BUCKET/runs/7b

Kept of each layer: its input, queries, keys and values, what attention gave, and the sum after it. The scheduler is held to 55 %
of the HBM (`xla_tpu_scheduler_percent_shared_memory_limit`). Preflight (libtpu 0.0.42.1): V6E
"""

import dataclasses
import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("jpeglm_7b.py")))["config"]
config = dataclasses.replace(
    base,
    run="runs/jpeglm_7b_v6e_64",
    model=dataclasses.replace(base.model, remat="qkv"),
    train=dataclasses.replace(base.train, compiler_options="xla_tpu_scheduler_percent_shared_memory_limit=55"),
)
