"""Rules on a vocabulary of five, and the loop against the model without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, model

from jpeglm_jax import sharding
from jpeglm_jax.config import MeshConfig
from jpeglm_jax.model import Llama
from jpeglm_jax.sampling.generate import generate
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.tokenizer import BOS, EOS

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.25, 0.2]))
KEYS = jax.random.split(jax.random.key(0), 4000)


def frequencies(sampler):
    drawn = jax.vmap(sampler, (None, 0))(LOGITS, KEYS)
    return np.bincount(drawn, minlength=5) / len(KEYS)


def test_no_rule_draws_by_probability():
    np.testing.assert_allclose(frequencies(Sampler()), [0.05, 0.4, 0.1, 0.25, 0.2], atol=0.03)


def test_temperature_sharpens():
    np.testing.assert_allclose(frequencies(Sampler(0.5)), np.square([0.05, 0.4, 0.1, 0.25, 0.2]) / 0.275, atol=0.03)


def test_temperature_zero_takes_the_most_probable():
    assert frequencies(Sampler(0.0)).tolist() == [0, 1, 0, 0, 0]


def test_top_k_keeps_k():
    np.testing.assert_allclose(frequencies(Sampler(top_k=2)), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], atol=0.03)


def test_top_p_keeps_what_reaches_it():
    np.testing.assert_allclose(frequencies(Sampler(top_p=0.6)), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], atol=0.03)


def test_top_p_always_keeps_one():
    assert frequencies(Sampler(top_p=1e-6)).tolist() == [0, 1, 0, 0, 0]


def test_top_p_is_of_what_top_k_leaves():
    # Of the three that top-k leaves, 0.4 / 0.85 = 0.47 reaches 0.45 alone; of all five it would not.
    assert frequencies(Sampler(top_k=3, top_p=0.45)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [((-1.0,), "temperature"), ((1.0, 0), "top-k"), ((1.0, None, 0.0), "top-p"), ((1.0, None, 1.5), "top-p")],
)
def test_rules_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)


def prompts():
    rng = np.random.default_rng(0)
    return [np.array([BOS, *rng.integers(3, MODEL.vocab_size, length)], np.int32) for length in (5, 2, 7, 0)]


def test_cached_greedy_decoding_is_decoding_without_a_cache(one_device):
    llama = model(qk_norm=True)
    forward = jax.jit(lambda llama, tokens: llama(tokens))
    for prompt, written in zip(prompts(), generate(llama, prompts(), range(4), Sampler(0.0), 23)):
        sequence = list(prompt)
        while len(sequence) < 23 and sequence[-1] != EOS:
            padded = np.zeros((1, 23), np.int32)
            padded[0, : len(sequence)] = sequence
            sequence.append(int(forward(llama, padded)[0, len(sequence) - 1].argmax()))
        assert written.tolist() == sequence


def test_cached_logits_are_those_without_a_cache(one_device):
    llama = model()
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab_size, (2, 9)).astype(np.int32)

    def put(rows):
        return jax.device_put(rows, jax.NamedSharding(one_device, jax.P(sharding.BATCH)))

    whole = jax.jit(lambda llama, tokens: llama(tokens))(llama, tokens)
    logits, cache = jax.jit(Llama.prefill, static_argnums=3)(llama, put(tokens[:, :4]), put(np.array([4, 4])), 9)
    np.testing.assert_allclose(logits, whole[:, 3], rtol=1e-4, atol=1e-5)
    decode = jax.jit(Llama.decode)
    for position in range(4, 9):
        logits, cache = decode(llama, put(tokens[:, position]), put(np.array([position] * 2)), cache)
        np.testing.assert_allclose(logits, whole[:, position], rtol=1e-4, atol=1e-5)


def test_a_sample_depends_on_its_prompt_and_seed_alone(one_device):
    llama = model()
    together = generate(llama, prompts(), [3, 1, 4, 1], Sampler(), 31)
    alone = generate(llama, prompts()[2:3], [4], Sampler(), 31)
    assert together[2].tolist() == alone[0].tolist()
    other_seed = generate(llama, prompts()[2:3], [5], Sampler(), 31)
    assert together[2].tolist() != other_seed[0].tolist()


def test_eight_devices_write_what_one_writes(one_device):
    one = generate(model(), prompts(), range(4), Sampler(), 19)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        eight = generate(model(), prompts(), range(4), Sampler(), 19)
    assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in eight]


def test_a_prompt_that_fills_the_budget_is_refused(one_device):
    with pytest.raises(ValueError, match="8 tokens and max_tokens is 8"):
        generate(model(), prompts(), range(4), Sampler(), 8)
