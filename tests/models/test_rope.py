"""Rotary frequencies against transformers, and that scaling does what it is for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.qwen3_reference import CASES
from tw_jax.models import PRESETS, RopeScaling, config_to_hf
from tw_jax.models.rope import attention_factor, frequencies, rotary_angles, rotate

YARN = RopeScaling("yarn", 4.0, 32_768, 32.0, 1.0, None, None, None, True)
QWEN = PRESETS["qwen3-8b"]
CONFIGS = {
    "plain": QWEN,
    "linear": dataclasses.replace(QWEN, rope_scaling=RopeScaling("linear", 3.0, *[None] * 7)),
    "yarn of 8B": dataclasses.replace(QWEN, rope_scaling=YARN),
    "not truncated": dataclasses.replace(
        QWEN, rope_scaling=dataclasses.replace(YARN, truncate=False)
    ),
    "mscales": dataclasses.replace(
        QWEN, rope_scaling=dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5)
    ),
    "one mscale": dataclasses.replace(QWEN, rope_scaling=dataclasses.replace(YARN, mscale=1.0)),
    "attention factor": dataclasses.replace(
        QWEN, rope_scaling=dataclasses.replace(YARN, attention_factor=1.5)
    ),
    "a step, no ramp": dataclasses.replace(
        QWEN, rope_scaling=dataclasses.replace(YARN, original_max_position_embeddings=6)
    ),
    "factor one": dataclasses.replace(QWEN, rope_scaling=dataclasses.replace(YARN, factor=1.0)),
    **CASES,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = dataclasses.replace(CONFIGS[name], moe=None)
    module = Qwen3RotaryEmbedding(transformers.Qwen3Config.from_dict(config_to_hf(config)))
    ours, factor = frequencies(config)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, module.inv_freq.numpy(), rtol=3e-7, atol=0)
    assert factor == module.attention_scaling
    # Near positions, where float32 angles are exact enough to compare.
    positions = np.arange(64, dtype=np.int32)[None]
    cos, sin = rotary_angles(positions, config)
    theirs = module(torch.zeros(()), torch.from_numpy(positions))
    half = config.head_dim // 2
    np.testing.assert_allclose(cos[:, :, 0], theirs[0][..., :half].numpy(), atol=2e-5)
    np.testing.assert_allclose(sin[:, :, 0], theirs[1][..., :half].numpy(), atol=2e-5)


def test_yarn_keeps_fast_frequencies_and_slows_slow_ones():
    plain, _ = frequencies(QWEN)
    scaled, factor = frequencies(CONFIGS["yarn of 8B"])
    ratio = plain / scaled
    turns = 32_768 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.7], 4, rtol=1e-6)
    assert np.all(np.diff(ratio) >= -1e-6)
    assert factor == pytest.approx(0.1 * np.log(4) + 1)


def test_the_golden_cases_mix_kept_and_slowed_frequencies():
    plain, _ = frequencies(dataclasses.replace(CASES["yarn"], rope_scaling=None))
    ratio = plain / frequencies(CASES["yarn"])[0]
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(4)
    assert np.any((ratio > 1.1) & (ratio < 3.9))


def test_derived_attention_factors():
    assert attention_factor(dataclasses.replace(YARN, attention_factor=0.5)) == 0.5
    assert attention_factor(dataclasses.replace(YARN, factor=1.0)) == 1.0
    both = dataclasses.replace(YARN, mscale=2.0, mscale_all_dim=1.0)
    assert attention_factor(both) == pytest.approx((0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1))


def test_rotation_is_float32_inside():
    """At position 30,000 bfloat16 angles would be off by whole turns."""
    x = jnp.ones((1, 2, 1, 128), jnp.bfloat16)
    positions = jnp.array([[0, 30_001]])
    rotated = rotate(x, *rotary_angles(positions, QWEN))
    assert rotated.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), *rotary_angles(positions, QWEN))
    np.testing.assert_allclose(rotated.astype(jnp.float32), exact, atol=0.01)
