"""The decoder: what each part must do, and that ways of computing it agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, model

from jpeglm_jax import attention, sharding
from jpeglm_jax.config import MeshConfig, ModelConfig
from jpeglm_jax.model import REMAT_POLICIES, parameter_count, rotary, rotate

TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (8, 11)).astype(np.int32)


def logits(llama):
    return jax.jit(lambda llama, tokens: llama(tokens))(llama, TOKENS)


def test_7b_has_the_published_number_of_parameters(one_device):
    assert parameter_count(ModelConfig(vocab_size=320)) == 6_478_893_056


def test_no_position_sees_a_later_token(one_device):
    llama = model()

    def from_one_hot(one_hot_BTV, position):
        embedded = jnp.einsum("BTV,VD->BTD", one_hot_BTV, llama.embed_VD[...], out_sharding=sharding.BTD)
        rotation = rotary(jnp.arange(11)[None], MODEL)
        x, _ = jax.lax.scan(lambda x, block: (block(x, rotation)[0], None), embedded, llama.blocks)
        return (llama.logits(x) * (jnp.arange(11) == position)[None, :, None]).sum()

    one_hot = jax.nn.one_hot(TOKENS[:1], MODEL.vocab_size)
    for position in (0, 4, 10):
        influence_T = jnp.abs(jax.grad(from_one_hot)(one_hot, position)).sum((0, 2))
        assert (influence_T[: position + 1] > 0).all() and (influence_T[position + 1 :] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 17},
        {"width": 24},
        {"layers": 2},
        {"heads": 2},
        {"kv_heads": 4},
        {"head_dim": 8},
        {"mlp_width": 26},
        {"rope_theta": 100.0},
        {"norm_eps": 1e-2},
        {"tied": True},
        {"qk_norm": True},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_output(one_device, change):
    changed = logits(model(**change))
    plain = logits(model())
    assert changed.shape != plain.shape or not np.array_equal(changed, plain)


def test_the_fields_above_are_all_fields():
    covered = set(test_every_field_changes_the_output.pytestmark[0].args[1][i].copy().popitem()[0] for i in range(12))
    # remat and attention decide how the same numbers are computed; tests below hold them to it.
    assert covered | {"remat", "attention"} == {field.name for field in dataclasses.fields(ModelConfig)}


def test_remat_changes_no_gradient(one_device):
    def gradient(remat):
        llama = model(remat=remat)
        return jax.jit(jax.grad(lambda llama: (llama(TOKENS) ** 2).mean()))(llama)

    plain = jax.tree.leaves(gradient("none"))
    for remat in REMAT_POLICIES:
        for ours, theirs in zip(jax.tree.leaves(gradient(remat)), plain):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


def test_scan_is_a_loop_over_layers(one_device):
    llama = model()
    x_BTD = llama.embed(TOKENS)
    for layer in range(MODEL.layers):
        block = jax.tree.map(lambda stacked, layer=layer: stacked[layer], llama.blocks)
        x_BTD, _ = block(x_BTD, rotary(jnp.arange(11)[None], MODEL))
    np.testing.assert_allclose(llama.logits(x_BTD), logits(llama), rtol=1e-5, atol=1e-6)


def test_attention_weighs_values_by_softmax_of_scores():
    q, k, v = np.random.default_rng(1).normal(size=(3, 2, 4, 5, 6)).astype(np.float32)
    k, v = k[:, :2], v[:, :2]  # two queries to a key
    expected = np.zeros_like(q)
    for b, n, t in np.ndindex(2, 4, 5):
        scores = k[b, n // 2, : t + 1] @ q[b, n, t] / np.sqrt(6)
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, n, t] = weights @ v[b, n // 2, : t + 1]
    np.testing.assert_allclose(attention.causal(q, k, v, "reference"), expected, rtol=1e-4, atol=1e-5)


def test_splash_is_the_reference(one_device):
    # Interpreted: the kernel itself is compiled where TPU programs are, in tests/test_preflight.py.
    def draw(seed, heads):
        numbers = np.random.default_rng(seed).normal(size=(1, heads, 256, 128)).astype(np.float32)
        return jax.device_put(numbers, jax.NamedSharding(one_device, sharding.BNTH))

    q, k, v, cotangent = draw(0, 4), draw(1, 2), draw(2, 2), draw(3, 4)

    def results(kernel):
        out, backward = jax.vjp(kernel, q, k, v)
        return out, *backward(cotangent)

    ours = results(functools.partial(attention._splash, interpret=True))
    for splash, reference in zip(ours, results(attention._reference), strict=True):
        np.testing.assert_allclose(splash, reference, rtol=1e-4, atol=1e-4)


def test_splash_says_which_lengths_it_takes(one_device):
    x = jnp.zeros((1, 2, 200, 128))
    with pytest.raises(ValueError, match="a multiple of 128 tokens in a row, not 200; set data.sequence_length"):
        attention.causal(x, x, x, "splash")


def test_unknown_attention_kernel_is_named_with_those_there_are():
    x = jnp.zeros((1, 2, 1, 2))
    with pytest.raises(ValueError, match="'flesh'; there are: auto, reference, splash, cudnn"):
        attention.causal(x, x, x, "flesh")


def test_rotation_depends_on_distance_only(one_device):
    q, k = np.random.default_rng(2).normal(size=(2, 1, 1, 1, 6)).astype(np.float32)

    def score(at, of):
        def turned(x, position):
            return rotate(x, rotary(jnp.array([[position]]), MODEL))

        return float((turned(q, at) * turned(k, of)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_meshes_of_eight_devices_give_the_gradients_of_one(sizes):
    def gradient(mesh):
        with jax.set_mesh(mesh):
            llama = model()
            tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, sharding.BT))
            loss, gradients = jax.jit(jax.value_and_grad(lambda llama, tokens: (llama(tokens) ** 2).mean()))(llama, tokens)
            return jax.device_get((loss, jax.tree.leaves(gradients)))

    loss_1, one = gradient(sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    loss_8, eight = gradient(sharding.make_mesh(MeshConfig(*sizes)))
    assert loss_8 == pytest.approx(loss_1, rel=1e-5)
    for ours, theirs in zip(eight, one):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_weights_are_split_as_declared():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        weight = model().blocks.mlp.up_DF[...]
    assert weight.sharding.spec == jax.P(None, sharding.FSDP, "tensor")
    assert weight.addressable_shards[0].data.size * 4 == weight.size


def test_a_mesh_that_does_not_fit_names_the_numbers():
    with pytest.raises(ValueError, match="data=3 x fsdp=1 x tensor=1 does not fit 8 devices"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=1))


def test_a_model_that_does_not_divide_names_the_numbers():
    with pytest.raises(ValueError, match=r"model.kv_heads \(2\) does not divide over mesh.tensor \(4\)"):
        sharding.check_divides(MODEL, sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=4)))
