"""A first run on a laptop: 50,000 invented flags of 48x48 pixels.

    jpeglm train configs/quickstart.py
"""

from jpeglm_jax.config import Config, DataConfig, JpegConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    run="runs/quickstart",
    codec=JpegConfig(size=48),
    data=DataConfig(path="builtin:flags", packing="rows", sequence_length=None, batch_size=16),
    model=ModelConfig(
        width=128, layers=4, heads=2, kv_heads=2, head_dim=64, mlp_width=344, dtype="float32", remat="full"
    ),
    optim=OptimConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=50),
    train=TrainConfig(steps=700, eval_every=350, eval_batches=8, sample_every=350, save_every=350),
)
