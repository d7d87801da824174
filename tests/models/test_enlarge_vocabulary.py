"""New tokens get the mean of their pieces; all other rows stay, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.qwen3_reference import SMALL, seeded_params
from tw_jax.models.enlarge_vocabulary import enlarge_vocabulary

UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False)
NEW = {59: (3, 4, 5), 61: (7,), 62: (8, 60)}  # the vocabulary has 61 rows: one is padding


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_rows_are_means_of_pieces(param_dtype: str) -> None:
    config = dataclasses.replace(UNTIED, param_dtype=param_dtype)
    before = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), seeded_params(config))
    after, larger = enlarge_vocabulary(before, config, 64, NEW)
    assert larger == dataclasses.replace(config, vocab_size=64)
    jax.tree.map(np.testing.assert_array_equal, after["layers"], before["layers"])
    for old, new in (
        (before["embed_tokens"]["embedding"], after["embed_tokens"]["embedding"]),
        (before["lm_head"]["kernel"].T, after["lm_head"]["kernel"].T),
    ):
        assert new.shape == (64, config.hidden_size)
        assert new.dtype == old.dtype
        kept = [row for row in range(61) if row not in NEW]
        np.testing.assert_array_equal(new[np.array(kept)], old[np.array(kept)])
        wide = np.asarray(old, np.float64)
        step = 2**-8 if param_dtype == "bfloat16" else 1e-6
        for row, pieces in NEW.items():
            expected = wide[list(pieces)].mean(0)
            np.testing.assert_allclose(np.asarray(new[row], np.float64), expected, step, step)
        padding = np.asarray(new[63], np.float64)
        np.testing.assert_allclose(padding, wide.mean(0), step, step)


def test_a_tied_model_has_no_head_and_needs_no_new_rows() -> None:
    before = jax.tree.map(jnp.asarray, seeded_params(SMALL))
    after, config = enlarge_vocabulary(before, SMALL, 61, {60: (1, 2)})
    assert config == SMALL
    assert "lm_head" not in after
    row = after["embed_tokens"]["embedding"][60]
    expected = np.asarray(before["embed_tokens"]["embedding"])[[1, 2]].mean(0)
    np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_a_vocabulary_never_shrinks() -> None:
    with pytest.raises(ValueError, match="the vocabulary of 61 must not shrink"):
        enlarge_vocabulary(seeded_params(SMALL), SMALL, 60, {})


def test_greedy_decoding_never_chooses_a_row_that_no_token_has() -> None:
    """The padding rows' logit is the mean of the others, for any hidden state."""
    before = jax.tree.map(jnp.asarray, seeded_params(UNTIED))
    after, _ = enlarge_vocabulary(before, UNTIED, 128, {})
    hidden = np.random.default_rng(0).standard_normal((500, UNTIED.hidden_size))
    logits = hidden @ np.asarray(after["lm_head"]["kernel"], np.float64)
    np.testing.assert_allclose(
        logits[:, 61:], logits[:, :61].mean(1)[:, None].repeat(67, 1), atol=1e-5
    )
    assert (logits.argmax(1) < 61).all()
