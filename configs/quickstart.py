"""A first run on a laptop: 857,984 parameters on 50,000 invented flags of 48x48 pixels, every byte a token.

    jpeglm train configs/quickstart.py

About four minutes on two CPU cores, to 0.15 bits a byte on held-out flags (a model of byte frequencies alone needs 6.0);
every sampled file opens, and most show stripes, crosses, cantons and emblems.
"""

from jpeglm_jax.config import Config, DataConfig, JpegConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    run="runs/quickstart",
    codec=JpegConfig(size=48),
    data=DataConfig(path="builtin:flags", packing="rows", sequence_length=None, batch_size=8),
    # On CPU float32 is faster than bfloat16, and to compute activations again is faster than to keep them.
    model=ModelConfig(
        width=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp_width=344, dtype="float32", remat="full"
    ),
    optim=OptimConfig(learning_rate=2e-3, final_learning_rate=5e-5, warmup_steps=50),
    train=TrainConfig(steps=1100, eval_every=550, sample_every=550, save_every=550),
)
