"""Units, tries and metrics of the ThreadWeaver schema."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.random_trajectories import canonical_block, random_trajectories
from tw_jax.trajectory.metrics import acceleration_ratio, self_parallelism, total_tokens
from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.trie import TokenKind


def paths_of(trie):
    """Every node's tokens from its root, by following parents only."""
    paths = []
    for i, parent in enumerate(trie.parent):
        prefix = [] if parent == i else paths[parent]
        paths.append([*prefix, int(trie.tokens[i])])
    return paths


@given(data=st.data())
def test_trie_is_a_preorder_whose_visible_sets_are_paths(data, tokenizer, schema):
    trajectory = data.draw(random_trajectories(tokenizer, schema))
    trie = schema.forest([trajectory])
    index = np.arange(len(trie))
    roots = trie.parent == index
    assert (trie.parent[~roots] < index[~roots]).all()
    assert roots.sum() == 1 and roots[0]
    ancestors = [set()]
    for i in index[1:]:
        ancestors.append(ancestors[trie.parent[i]] | {int(trie.parent[i])})
    for i in index:
        visible = {int(j) for j in index if j <= i < trie.visible_end[j]}
        assert visible == ancestors[i] | {int(i)}
        assert trie.positions[i] == len(ancestors[i])


@given(data=st.data())
def test_every_unit_lies_on_one_path_and_carries_loss_once(data, tokenizer, schema):
    trajectory = data.draw(random_trajectories(tokenizer, schema))
    trie = schema.forest([trajectory])
    paths = paths_of(trie)
    ends = {tuple(path): i for i, path in enumerate(paths)}
    sampled = 0
    for unit in schema.units(trajectory):
        path = tuple(np.concatenate([unit.context, unit.completion]).tolist())
        node = ends[path]
        for _ in range(len(unit.completion)):
            assert trie.kind[node] == TokenKind.SAMPLED
            node = trie.parent[node]
            sampled += 1
    assert sampled == (trie.kind == TokenKind.SAMPLED).sum()


@given(data=st.data())
def test_the_joined_text_is_one_path_of_the_trie(data, tokenizer, schema):
    trajectory = data.draw(random_trajectories(tokenizer, schema))
    trie = schema.forest([trajectory])
    n = len(trajectory.tokens)
    np.testing.assert_array_equal(trie.tokens[:n], trajectory.tokens)
    np.testing.assert_array_equal(trie.source[:n], np.arange(n))
    extra = sum(
        thread.sampled_end - thread.start - 2 + len(thread.replaced)
        for block in trajectory.blocks
        for thread in block.threads[1:]
    ) + sum(len(block.threads[0].replaced) for block in trajectory.blocks)
    assert len(trie) == n + extra


def test_published_example_of_the_reference(tokenizer, schema):
    """Order of branches in the reference's flattening: the last block's threads come first."""
    text = "q" + canonical_block((("p", "a"), ("p", "b"))) + "z"
    text += canonical_block((("p", "c"), ("p", "d"), ("p", "e")))
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    trie = schema.forest([schema.parse(ids, 1)])
    tail = tokenizer.decode(trie.tokens[len(ids) :], skip_special_tokens=False)
    assert tail == "2: d\n</Thread>3: e\n</Thread>2: b\n</Thread>"


def test_threads_ten_to_nineteen_share_the_digit_with_thread_one(tokenizer, schema):
    text = "q" + canonical_block(tuple(("p", "x") for _ in range(12)))
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    trie = schema.forest([schema.parse(ids, 1)])
    paths = {tuple(path) for path in paths_of(trie)}
    assert len(paths) == len(trie), "two nodes of a trie spell the same path"


@given(data=st.data())
def test_group_forest_holds_every_rollout_and_shares_the_prompt(data, tokenizer, schema):
    first = data.draw(random_trajectories(tokenizer, schema, max_blocks=2))
    others = [data.draw(random_trajectories(tokenizer, schema, max_blocks=2)) for _ in range(2)]
    prompt = first.tokens[: first.prompt_len]
    group = [first]
    for other in others:
        response = other.tokens[other.prompt_len :]
        parsed = schema.parse(np.concatenate([prompt, response]), len(prompt))
        group.append(parsed)
    forest = schema.forest(group)
    alone = [schema.forest([trajectory]) for trajectory in group]
    assert len(forest) == sum(map(len, alone)) - 2 * len(prompt)
    for index, trie in enumerate(alone):
        mine = forest.rollout == index
        np.testing.assert_array_equal(forest.tokens[mine], trie.tokens[len(prompt) :])
        np.testing.assert_array_equal(forest.positions[mine], trie.positions[len(prompt) :])
        np.testing.assert_array_equal(forest.kind[mine], trie.kind[len(prompt) :])


def test_forest_refuses_different_prompts(tokenizer, schema):
    a, b = (Trajectory(np.array([2, i], np.int32), 1) for i in (20, 21))
    other = Trajectory(np.array([3, 20], np.int32), 1)
    schema.forest([a, b])
    with pytest.raises(ValueError, match="another prompt"):
        schema.forest([a, other])
    with pytest.raises(ValueError, match="prompt token"):
        schema.forest([Trajectory(np.array([3, 20], np.int32), 0)])


def test_critical_path_counts_outlines_wrappers_and_the_longest_thread(tokenizer, schema):
    block = canonical_block((("a", "x" * 10), ("b", "y" * 6)))
    ids = np.array(tokenizer("q" + block + "zz", add_special_tokens=False).input_ids, np.int32)
    trajectory = schema.parse(ids, 1)
    # The shorter thread, its header and line breaks included, is what parallel execution saves.
    shorter = len("\n2: " + "y" * 6 + "\n")
    assert total_tokens(trajectory) == len(ids) - 1
    assert schema.critical_path(trajectory) == len(ids) - 1 - shorter


def test_ratios():
    assert acceleration_ratio(46, 40) == pytest.approx(6 / 46)
    assert acceleration_ratio(0, 0) == 0
    assert self_parallelism(46, 40) == pytest.approx(1.15)
    assert self_parallelism(0, 0) == 1
