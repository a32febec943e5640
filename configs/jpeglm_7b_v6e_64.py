"""The 7B of jpeglm_7b.py on a v6e-64: of each layer is kept for the backward pass what the memory allows.

    jpeglm train configs/jpeglm_7b_v6e_64.py --data.path ... --run gs://BUCKET/runs/7b     # on every host; or this, on none:
    launch/tpu_vm.sh supervise jpeglm-7b --type v6e-64 configs/jpeglm_7b_v6e_64.py --data.path ... --run gs://BUCKET/runs/7b

Kept of each layer: its input, queries, keys and values, what attention gave, and the sum after it. Holding the scheduler to a
part of the HBM, as the presets of v5e do, makes the compiler's estimate 3 % worse here. Preflight (libtpu 0.0.42.1): 21.8 of
31.25 GiB, MFU at most 51 %, 6,855 chip-hours at 50 %: 4.5 days.
"""

import dataclasses
import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("jpeglm_7b.py")))["config"]
config = dataclasses.replace(
    base,
    run="runs/jpeglm_7b_v6e_64",
    model=dataclasses.replace(base.model, remat="qkv"),
)
