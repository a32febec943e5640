"""The 7B of jpeglm_7b.py on a v5e-64: of each layer is kept for the backward pass what the memory allows.

    jpeglm train configs/jpeglm_7b_v5e_64.py --data.path ... --run gs://BUCKET/runs/7b     # on every host; or this, on none:
    launch/tpu_vm.sh supervise jpeglm-7b --type v5e-64 configs/jpeglm_7b_v5e_64.py --data.path ... --run gs://BUCKET/runs/7b

Kept of each layer: its input, what attention gave, and the sum after it, so that attention runs once. The scheduler is held to
70 % of the HBM (`xla_tpu_scheduler_percent_shared_memory_limit`): at 80 % it runs more side by side and leaves 4 % free.
Preflight (libtpu 0.0.42.1): 12.4 of 15.75 GiB, MFU at most 61 %, 31,900 chip-hours at 50 %: 21
days.
"""

import dataclasses
import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("jpeglm_7b.py")))["config"]
config = dataclasses.replace(
    base,
    run="runs/jpeglm_7b_v5e_64",
    model=dataclasses.replace(base.model, remat="residual"),
    train=dataclasses.replace(base.train, compiler_options="xla_tpu_scheduler_percent_shared_memory_limit=70"),
)
