"""The paper's JPEG-LM: Llama-2 7B (6,478,893,056 parameters) from scratch, 23M pictures, two epochs.

    jpeglm tokenizer configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --out tokenizer.model
    jpeglm index configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --run gs://BUCKET/runs/7b
    jpeglm train configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --run gs://BUCKET/runs/7b

From the paper: the model, quality 25, BPE of 320 entries from 10K pictures, chunks of 12288 tokens (9.5M an epoch, 114B
tokens), maximum learning rate 3e-4. The paper does not name its batch size: 256 chunks, 3.1M tokens, are ours, and so 74,200
steps make two epochs. Not run: there was no TPU to run it on.
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
