"""1.0B parameters at the paper's picture size and context: 256x256, BPE of 320 entries, chunks of 12288 tokens.

    jpeglm tokenizer configs/jpeglm_1b.py --data.path 'pictures/*.array_record' --out tokenizer.model
    jpeglm train configs/jpeglm_1b.py --data.path 'pictures/*.array_record'

Records are picture files. Meant for one card of 80 GB or a TPU v5e-16; not run to its end yet.
"""

from jpeglm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    run="runs/jpeglm_1b",
    tokenizer="tokenizer.model",
    data=DataConfig(path="pictures/*.array_record", batch_size=64, threads=8, workers=8),
    model=ModelConfig(vocab_size=320, width=2048, layers=20, heads=16, kv_heads=16, mlp_width=5504),
    optim=OptimConfig(),
    train=TrainConfig(steps=100_000),
)
