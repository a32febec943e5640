"""`jpeglm bench decode` measures what it says, against the same model in `transformers`."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import MODEL, config, model

from jpeglm_jax.benchmarks.decode import bench_decode
from jpeglm_jax.hf import to_transformers


def test_rows_for_each_batch(tmp_path):
    settings = dataclasses.replace(config(tmp_path / "run"), model=dataclasses.replace(MODEL, vocab_size=None, layers=1))
    rows = bench_decode(settings, [1, 3], length=64, steps=4, rounds=1)
    live = 3 * 2 * 64 // 2 * MODEL.kv_heads * MODEL.head_dim * 4  # 3 rows of keys and values in half of 64 positions
    assert rows["live_cache_gib_at_3"] == pytest.approx(live / 2**30)
    assert rows["step_ms_at_3"] == pytest.approx(3e3 / rows["tokens_per_second_at_3"])
    assert all(rows[f"{name}_at_1"] > 0 for name in ("masked_over_unmasked", "fraction_of_bandwidth"))


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"steps": 0}, {"steps": 129}, {"batches": []}, {"length": 7}])
def test_counts_that_cannot_be_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="must be 1 or more, steps .* from 1 to 128"):
        bench_decode(config(tmp_path / "run"), **{"batches": [1], "length": 512, "steps": 4, "rounds": 1} | changes)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_the_same_in_transformers(one_device, tied):
    torch = pytest.importorskip("torch")
    llama = model(tied=tied)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 9)).astype(np.int32)
    theirs = to_transformers(llama)(torch.from_numpy(tokens).long()).logits.detach().numpy()
    np.testing.assert_allclose(jax.jit(lambda llama: llama(tokens))(llama), theirs, atol=1e-5)
