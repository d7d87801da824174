"""Best-fit rows and the layout of packed batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.data.packing import LossWeights, WeightedTrie, best_fit_rows, pack_rows, row_starts
from tw_jax.kernels import plan_tiles


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


@pytest.mark.parametrize(
    "lengths, row_len, starts",
    [
        ([130, 100, 20], 512, [0, 256, 384]),  # room for all
        ([130, 128, 20], 404, [0, 256, 384]),  # just enough
        ([130, 128, 20], 403, [0, 130, 258]),  # one short: the first gap does not fit ...
        ([130, 120, 20], 300, [0, 130, 256]),  # ... but a later, smaller one may
        ([256, 128, 128], 512, [0, 256, 384]),  # at multiples by themselves
        ([], 512, []),
    ],
)
def test_items_begin_at_multiples_where_there_is_room(lengths, row_len, starts):
    assert row_starts(lengths, row_len) == starts


@given(data=st.data())
def test_starts_keep_order_and_capacity_and_use_free_tokens(data):
    lengths = data.draw(st.lists(st.integers(1, 60), max_size=12))
    free = data.draw(st.integers(0, 200))
    multiple = data.draw(st.integers(1, 40))
    row_len = sum(lengths) + free
    starts = row_starts(lengths, row_len, multiple)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    gaps = [start - end for start, end in zip(starts, [0, *ends], strict=False)]
    assert len(starts) == len(lengths)
    assert all(gap >= 0 for gap in gaps)
    assert not ends or ends[-1] <= row_len
    for i, start in enumerate(starts):
        # A start elsewhere has had no room: its gap would have been wider than what was left.
        assert start % multiple == 0 or -start % multiple > free - sum(gaps[:i])
    if free >= len(lengths) * (multiple - 1):
        assert all(start % multiple == 0 for start in starts)


def test_padding_between_tries_sees_itself_only(tokenizer, schema):
    """The same tries, shifted; what lies between them is what lies behind them."""
    texts, row_len = ["12+", "123=45"], 160
    tries = []
    for text in texts:
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
        trie = schema.forest([schema.parse(ids, 1)])
        tries.append(WeightedTrie(trie, LossWeights().of(trie)))
    batch = pack_rows([tries], row_len)
    own = np.arange(row_len)
    used = np.zeros(row_len, bool)
    for start, item in zip((0, 128), tries, strict=True):
        span = slice(start, start + len(item.trie))
        used[span] = True
        np.testing.assert_array_equal(batch.tokens[0, span], item.trie.tokens)
        np.testing.assert_array_equal(batch.parent[0, span], item.trie.parent + start)
        np.testing.assert_array_equal(batch.visible_end[0, span], item.trie.visible_end + start)
        np.testing.assert_array_equal(batch.loss_weight[0, span], item.loss_weight)
    np.testing.assert_array_equal(batch.parent[0, ~used], own[~used])
    np.testing.assert_array_equal(batch.visible_end[0, ~used], own[~used] + 1)
    assert not batch.loss_weight[0, ~used].any() and not batch.positions[0, ~used].any()


def test_starts_at_multiples_leave_fewer_live_tiles():
    """Ten causal trees of 300 tokens in 4,096: three tiles of 128 along each edge, not four."""
    lengths, row_len = [300] * 10, 4096

    def live(starts):
        end = np.arange(1, row_len + 1, dtype=np.int32)
        for start, length in zip(starts, lengths, strict=True):
            end[start : start + length] = start + length
        return int(plan_tiles(end[None], q_tile=128, k_tile=128).count)

    assert live(row_starts(lengths, row_len)) == 10 * 6 + 2
    assert live(np.arange(10) * 300) > 70
