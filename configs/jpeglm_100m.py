"""85M parameters on your own photos at 128x128: a day on one GPU, or a first run on one TPU host.

    jpeglm train configs/jpeglm_100m.py --data.path photos/

The paper's recipe made smaller: every byte a token, pictures cut in chunks of 4096 tokens (two or three pictures each). Not run
to its end yet; `jpeglm bench train configs/jpeglm_100m.py` tells the hours on your machine.
"""

from jpeglm_jax.config import Config, DataConfig, JpegConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    run="runs/jpeglm_100m",
    codec=JpegConfig(size=128),
    data=DataConfig(path="photos", sequence_length=4096, batch_size=64, threads=8),
    model=ModelConfig(width=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp_width=2048),
    optim=OptimConfig(learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=1000),
    train=TrainConfig(steps=50_000),
)
