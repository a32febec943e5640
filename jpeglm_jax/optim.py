"""AdamW as in the paper: warm-up and cosine decay, global-norm clipping, weight decay on matrices only."""

import jax
import optax

from jpeglm_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then a cosine down to `final_learning_rate` at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, steps - 1),
        decay_steps=steps,
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The transformation of gradients into updates; its state has the layout of the model."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps), config.b1, config.b2, weight_decay=config.weight_decay, mask=_decayed
        ),
    )


def _decayed(model):
    # By name: the stacked scales of the norms have two dims, as a matrix has.
    return jax.tree.map_with_path(lambda path, _: "scale" not in jax.tree_util.keystr(path), model)
