"""The paper's JPEG-LM: Llama-2 7B (6,478,893,056 parameters) from scratch, 23M pictures, two epochs.

    jpeglm tokenizer configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --out tokenizer.model
    jpeglm index configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --run gs://BUCKET/runs/7b
    jpeglm train configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --run gs://BUCKET/runs/7b

From the paper: the model, quality 25, BPE of 320 entries from 10K pictures, chunks of 12288 tokens (9.5M an epoch, 114B
tokens), maximum learning rate 3e-4. The paper does not name its batch size: 256 chunks, 3.1M tokens, are ours, and so 74,200
steps make two epochs. Not run: there was no TPU to run it on.

`jpeglm preflight` (libtpu 0.0.42.1), full remat, one row a chip at a time, days and chip-hours at an MFU of 50 %:

    slice     chips   GiB a chip       days   chip-hours
    v5e-64       64    7.4 of 15.75    20.8       31,943
    v5e-256     256    5.7 of 15.75     5.2       31,943
    v6e-64       64    7.2 of 31.25     4.5        6,855
    v5p-64       32    9.0 of 95.74    17.9       13,710

jpeglm_7b_v5e_64.py and its siblings keep more of each layer, as the memory of their slice allows, and so compute less.
"""

from jpeglm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    run="runs/jpeglm_7b",
    tokenizer="tokenizer.model",
    data=DataConfig(path="pictures/*.array_record", batch_size=256, threads=8, workers=16),
    model=ModelConfig(vocab_size=320),
    optim=OptimConfig(z_loss=1e-4, rows_per_device=1),
    train=TrainConfig(steps=74_200, spike=0.5, rollbacks=10),
)
