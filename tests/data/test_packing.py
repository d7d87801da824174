"""Best-fit rows and the layout of packed batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.data.packing import LossWeights, WeightedTrie, best_fit_rows, pack_rows


@given(lengths=st.lists(st.integers(1, 50), max_size=40))
def test_every_item_lands_in_one_row_that_holds_it(lengths):
    rows = best_fit_rows(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    # Best-fit decreasing never leaves two rows that would fit into one.
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > 50


def test_items_longer_than_a_row_are_refused():
    with pytest.raises(ValueError, match="51 tokens; a row holds 50"):
        best_fit_rows([10, 51], 50)


def test_tries_lie_one_after_another_and_padding_sees_itself_only(tokenizer, schema):
    texts = ["12+", "123=45"]
    tries = []
    for text in texts:
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
        trie = schema.forest([schema.parse(ids, 1)])
        tries.append(WeightedTrie(trie, LossWeights().of(trie)))
    batch = pack_rows([tries, []], 12)
    assert batch.tokens.shape == (2, 12)
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 0, 0])
    np.testing.assert_array_equal(batch.parent[0], [0, 0, 1, 3, 3, 4, 5, 6, 7, 9, 10, 11])
    np.testing.assert_array_equal(batch.visible_end[0], [3] * 3 + [9] * 6 + [10, 11, 12])
    np.testing.assert_array_equal(batch.loss_weight[0], [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.visible_end[1], np.arange(1, 13))
    assert batch.advantage is None and batch.rollout_id is None
