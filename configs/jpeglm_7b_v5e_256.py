"""The 7B of jpeglm_7b.py on a v5e-256 (256 chips): what its memory allows is kept for the backward pass.

    launch/tpu_vm.sh supervise jpeglm-7b --type v5e-256 configs/jpeglm_7b_v5e_256.py --data.path ... --run gs://BUCKET/runs/7b

TEXT
"""

import dataclasses
import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("jpeglm_7b.py")))["config"]
config = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, remat="residual"),
    train=dataclasses.replace(base.train, compiler_options="xla_tpu_scheduler_percent_shared_memory_limit=65"),
)
