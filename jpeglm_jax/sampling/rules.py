"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Temperature, then top-k, then top-p of what is left, then a draw: the order of Hugging Face and vLLM."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens; the paper takes 40 or 80."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability; the paper takes 0.9 or 1."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (the most probable token) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be 1 or more, not {self.top_k}; leave it out to allow every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1, not {self.top_p}")

    def __call__(self, logits_V: Array, key: Array) -> Array:
        """One token, int32 ()."""
        if self.temperature == 0:
            return jnp.argmax(logits_V).astype(jnp.int32)
        logits_V = logits_V / self.temperature
        if self.top_k is not None and self.top_k < logits_V.size:
            logits_V = at_least(logits_V, jax.lax.top_k(logits_V, self.top_k)[0][-1])
        if self.top_p < 1:
            descending_V = jnp.sort(logits_V, descending=True)
            probability_V = jax.nn.softmax(descending_V)
            before_V = jnp.cumsum(probability_V) - probability_V
            # A token is kept if those before it do not reach top_p yet; the first always is.
            logits_V = at_least(logits_V, jnp.min(jnp.where(before_V < self.top_p, descending_V, jnp.inf)))
        return jax.random.categorical(key, logits_V).astype(jnp.int32)


def at_least(logits_V: Array, threshold: Array) -> Array:
    """Makes every token below the threshold impossible."""
    return jnp.where(logits_V < threshold, -jnp.inf, logits_V)
