"""The 7B of jpeglm_7b.py on a v5p-64: of each layer is kept for the backward pass what the memory allows.

    jpeglm train configs/jpeglm_7b_v5p_64.py --data.path ... --run gs://BUCKET/runs/7b     # on every host; or this, on none:
    launch/tpu_vm.sh supervise jpeglm-7b --type v5p-64 configs/jpeglm_7b_v5p_64.py --data.path ... --run gs://BUCKET/runs/7b

Kept of each layer: the results of all matrix products, and what attention gave. The scheduler is held to 40 % of the HBM (`xla_tpu_scheduler_percent_shared_memory_limit`).
Preflight (libtpu 0.0.42.1): 45.3 of 95.74 GiB, MFU at most 65 %, 13,700 chip-hours at 50 %: 18 days.
"""

import dataclasses
import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("jpeglm_7b.py")))["config"]
config = dataclasses.replace(
    base,
    run="runs/jpeglm_7b_v5p_64",
    model=dataclasses.replace(base.model, remat="dots"),
    train=dataclasses.replace(base.train, compiler_options="xla_tpu_scheduler_percent_shared_memory_limit=40"),
)
