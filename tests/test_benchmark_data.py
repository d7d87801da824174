"""The data benchmark's trajectories have the published shape."""

import numpy as np
import pytest

from benchmarks import data
from tw_jax.data.records import Record
from tw_jax.data.tokenizer import open_tokenizer


def test_lengths_have_the_published_mean_and_fit():
    drawn = np.array(data.lengths(np.random.default_rng(0), 4000, most=40_000))
    assert drawn.mean() == pytest.approx(data.MEAN_TOKENS, rel=0.03)
    assert drawn.std() == pytest.approx(data.MEAN_TOKENS / 2, rel=0.1)
    assert drawn.max() < 40_000


def test_trajectories_have_four_blocks_and_plain_text_between():
    # The shipped tokenizer has one token per character, and knows ASCII only.
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    fields = data.text_of(np.random.default_rng(0), data.MEAN_TOKENS)
    fields = {name: text.encode("ascii", "replace").decode() for name, text in fields.items()}
    trajectory = data.encoded_record(Record("test", 1, fields), schema, tokenizer)
    assert [len(block.threads) for block in trajectory.blocks] == list(data.THREADS)
    assert not schema.validate(trajectory)
    characters = [thread.end - thread.body for b in trajectory.blocks for thread in b.threads]
    expected = data.THREAD_TOKENS * data.CHARACTERS_PER_TOKEN
    assert np.mean(characters) == pytest.approx(expected, rel=0.02)


def test_efficiency_counts_every_trie_once():
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    fields = {"prompt": "1=", "response": "2" * 50}
    one = data.encoded_record(Record("test", 1, fields), schema, tokenizer)
    found = data.efficiency([one], schema)
    assert found["trie_tokens_per_token"] == 1.0
    assert 0.9 < found["one_window_efficiency"] < found["packing_efficiency"] <= 1.0
