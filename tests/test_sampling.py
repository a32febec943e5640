"""Rules on a vocabulary of five, and the loop against the model without a cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_preflight import has_compiler
from tiny import MODEL, model

from jpeglm_jax import sharding
from jpeglm_jax.config import MeshConfig
from jpeglm_jax.model import Llama, in_dtype
from jpeglm_jax.sampling.generate import Request, generate, write
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


def written(llama, limit, prompts=prompts(), seeds=range(9), sampler=Sampler(), slots=4):
    """Token ids that `generate` gives without a grammar."""
    limits = np.broadcast_to(limit, len(prompts)).tolist()
    requests = [Request(*each) for each in zip(prompts, seeds, limits)]
    pictures = generate(llama, requests, sampler, None, slots)
    assert all(picture.done and picture.removed == 0 for picture in pictures)
    return [picture.tokens.tolist() for picture in pictures]


def test_cached_greedy_decoding_is_decoding_without_a_cache(one_device):
    llama = model(qk_norm=True)
    forward = jax.jit(lambda llama, tokens: llama(tokens))
    for prompt, tokens in zip(prompts(), written(llama, 23, sampler=Sampler(0.0), slots=2)):
        sequence = list(prompt)
        while len(sequence) < 23 and sequence[-1] != EOS:
            padded = np.zeros((1, 23), np.int32)
            padded[0, : len(sequence)] = sequence
            sequence.append(int(forward(llama, padded)[0, len(sequence) - 1].argmax()))
        assert tokens == sequence


def test_cached_logits_are_those_without_a_cache(one_device):
    llama = model()
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab_size, (2, 9)).astype(np.int32)

    def put(rows):
        return jax.device_put(rows, jax.NamedSharding(one_device, jax.P(sharding.BATCH)))

    whole = jax.jit(lambda llama, tokens: llama(tokens))(llama, tokens)
    logits, cache = jax.jit(Llama.prefill)(llama, put(np.pad(tokens[:, :4], ((0, 0), (0, 5)))), put(np.array([4, 4])))
    np.testing.assert_allclose(logits, whole[:, 3], rtol=1e-4, atol=1e-5)
    decode = jax.jit(Llama.decode)
    for position in range(4, 9):
        logits, cache = decode(llama, put(tokens[:, position]), put(np.array([position] * 2)), cache)
        np.testing.assert_allclose(logits, whole[:, position], rtol=1e-4, atol=1e-5)


def test_matrices_in_the_type_of_the_products_give_the_same_logits(one_device):
    llama = model(dtype="bfloat16", qk_norm=True, tied=True)
    ours = in_dtype(llama)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.blocks.mlp)} == {jnp.dtype("bfloat16")}
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    forward = jax.jit(lambda llama: llama(tokens))
    np.testing.assert_array_equal(forward(ours), forward(llama))


def test_a_sample_depends_on_its_prompt_and_seed_alone(one_device):
    """Not on its slot, nor on what stands beside it or stood there before it, nor on where chunks end."""
    llama, rng = model(), np.random.default_rng(5)
    many = [prompts()[number] for number in rng.integers(0, 4, 23)]
    seeds, limits = range(23), rng.integers(140, 192, 23)
    together = written(llama, limits, many, seeds, slots=5)
    assert together == written(llama, limits, many, seeds, slots=23)
    for number in (0, 11, 22):
        assert [together[number]] == written(llama, limits[number], many[number : number + 1], [seeds[number]])
    assert [together[11]] != written(llama, limits[11], many[11:12], [99])
    for tokens, prompt, limit in zip(together, many, limits):
        assert tokens[: len(prompt)] == prompt.tolist()
        assert len(tokens) == limit or tokens[-1] == EOS
        assert EOS not in tokens[:-1]


def test_eight_devices_write_what_one_writes(one_device):
    many, limits = prompts() * 3, [19, 150, 191] * 4
    one = written(model(), limits, many, range(12))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert written(model(), limits, many, range(12), slots=8) == one


def test_the_host_sees_pictures_grow(one_device):
    requests = [Request(prompt, 0, 300) for prompt in prompts()]
    seen = [prompt.tolist() for prompt in prompts()]
    for changed in write(model(), requests, Sampler(), None, 4):
        for number, picture in changed.items():
            tokens = picture.tokens.tolist()
            assert tokens[: len(seen[number])] == seen[number] and len(tokens) > len(seen[number])
            seen[number] = tokens
    assert seen == written(model(), 300, seeds=[0] * 4)


def test_a_prompt_that_fills_the_budget_is_refused(one_device):
    with pytest.raises(ValueError, match="8 tokens, .* max_tokens must be at least 9, not 8"):
        written(model(), 8)


@pytest.mark.slow
@has_compiler
def test_no_second_copy_of_the_cache_on_tpu():
    """By the TPU's compiler, for the 7B: temporary memory of the loop and of a refill, well below one cache."""
    script = Path(__file__).with_name("compile_for_tpu.py")
    # One plug-in a machine, unless told otherwise; no TPU to be looked for.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, script], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["cache"] == pytest.approx(6.0)
    assert memory["chunk"] < 1.5 and memory["refill"] < 0.5, memory
