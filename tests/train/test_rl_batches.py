"""Groups dealt to updates: what filters leave, rows, and updates that nothing is left for."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.update import PROMPT_LEN, sample_group
from tests.test_laws import GRAPHDEF, PARAMS
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.rl_batches import make_scorer, micro_batches
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.state import init_train_state
from tw_jax.train.update import MemoryConfig, make_update

CONFIG = RLConfig(
    prompts=4,
    group_size=2,
    updates_per_step=2,
    row_len=1024,
    rows=1,
    objective=ObjectiveConfig(ratio="detached"),
)
ADVANTAGES = np.array([[0.5, -0.5], [0.0, 0.0], [0.2, -0.2], [0.3, -0.3]], np.float32)


@pytest.fixture(scope="module")
def case(tokenizer, schema):
    """Eight rollouts of at most 753 tokens (all of one prompt, which nothing here minds)."""
    rollouts = sample_group(schema, tokenizer, 500)
    return SimpleNamespace(graphdef=GRAPHDEF, schema=schema), rollouts


@pytest.fixture(scope="module")
def longer(case, tokenizer):
    """Eight of more than 1000 tokens, of the same prompt."""
    model, rollouts = case
    prompt = rollouts[0].trajectory.tokens[:PROMPT_LEN]

    def moved(rollout):
        tokens = np.concatenate([prompt, rollout.trajectory.tokens[PROMPT_LEN:]])
        trajectory = dataclasses.replace(rollout.trajectory, tokens=tokens)
        return dataclasses.replace(rollout, trajectory=trajectory)

    return [moved(rollout) for rollout in sample_group(model.schema, tokenizer, 800)]


def ids_of(batches):
    return [
        sorted({int(i) for b in update for i in np.unique(b.rollout_id)} - {-1})
        for update in batches
    ]


def carried(updates, index):
    """Advantage and log-probability of a rollout's tokens, in any order."""
    return sorted(
        (float(advantage), float(logprob))
        for update in updates
        for batch in update
        for advantage, logprob in zip(
            batch.advantage[batch.rollout_id == index],
            batch.sampler_logprob[batch.rollout_id == index],
            strict=True,
        )
    )


def step_of(case, kept, config=CONFIG):
    model, rollouts = case
    return micro_batches(config, model, rollouts, ADVANTAGES, np.array(kept, bool))


def batches_of(case, kept):
    return step_of(case, kept).updates


def test_groups_are_dealt_in_order(case):
    updates = batches_of(case, np.ones((4, 2)))
    assert ids_of(updates) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for batch in (b for update in updates for b in update):
        for rollout in set(np.unique(batch.rollout_id)) - {-1}:
            mine = batch.rollout_id == rollout
            assert (batch.advantage[mine] == ADVANTAGES.reshape(-1)[rollout]).all()


def test_what_is_left_out_takes_no_room_and_the_rest_is_dealt_evenly(case):
    updates = batches_of(case, [[1, 0], [0, 0], [1, 1], [0, 1]])
    assert ids_of(updates) == [[0, 4, 5], [7]]
    model, rollouts = case
    sampled = sum(len(unit.completion) for i in (0, 4, 5, 7) for unit in rollouts[i].units)
    assert sum(int((b.loss_weight > 0).sum()) for update in updates for b in update) == sampled


def test_a_group_longer_than_a_row_takes_as_few_as_hold_it(case):
    model, rollouts = case
    config = dataclasses.replace(CONFIG, prompts=1, group_size=8, updates_per_step=1, row_len=2048)
    advantages, kept = np.ones((1, 8), np.float32), np.ones((1, 8), bool)
    (batches,) = micro_batches(config, model, rollouts, advantages, kept).updates
    alone = [len(model.schema.forest([r.trajectory])) for r in rollouts]
    shared = sum(alone) - 7 * 150
    assert ids_of([batches]) == [list(range(8))]
    assert len(batches) == -(-shared // 2048)
    for rollout in range(8):
        assert sum((b.rollout_id == rollout).any() for b in batches) == 1, (
            "a rollout is never split"
        )


def test_a_rollout_that_fits_into_no_row_is_left_out_and_counted(case, longer):
    """The others of its group keep their advantages."""
    model, rollouts = case
    mixed = [longer[i] if i in (0, 1, 4) else rollouts[i] for i in range(8)]
    tokens = [len(model.schema.forest([rollout.trajectory])) for rollout in mixed]
    step, whole = (
        step_of((model, mixed), np.ones((4, 2)), dataclasses.replace(CONFIG, row_len=row_len))
        for row_len in (800, 2048)
    )
    assert sorted(step.too_long_tokens) == sorted(tokens[i] for i in (0, 1, 4))
    assert step.packed == 5
    assert (whole.packed, whole.too_long_tokens) == (8, ())
    for index in range(8):
        expected = [] if index in (0, 1, 4) else carried(whole.updates, index)
        assert carried(step.updates, index) == expected
    # The first group is out altogether: the three that are left are dealt evenly.
    assert ids_of(step.updates) == [[2, 3, 5], [6, 7]]
    assert ids_of(whole.updates) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_nothing_that_fits_leaves_empty_updates(case):
    step = step_of(case, np.ones((4, 2)), dataclasses.replace(CONFIG, row_len=128))
    assert ids_of(step.updates) == [[], []]
    assert all(len(batches) == 1 for batches in step.updates)
    assert (step.packed, len(step.too_long_tokens)) == (0, 8)


def test_an_update_that_nothing_is_left_for_changes_nothing_and_is_no_fault(case):
    step = step_of(case, [[1, 0], [0, 0], [0, 0], [0, 0]])
    updates = step.updates
    assert ids_of(updates) == [[0], []]
    assert step.packed == 1
    assert all(len(batches) == 1 for batches in updates)
    objective = ObjectiveConfig()
    loss = policy_sum(GRAPHDEF, objective, MemoryConfig(), rollouts=8)
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    update = make_update(loss, optimizer)
    state = init_train_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
    state, sums = update(state, updates[1])
    assert (float(sums["update_skipped"]), float(sums["tokens"])) == (0, 0)
    assert all(np.isfinite(float(value)) for value in sums.values())
    assert (int(state.step), int(state.skipped_updates)) == (1, 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)


def test_scores_that_are_needed_are_added_and_equal_ones_once(case):
    model, _ = case
    ((batch,), _) = batches_of(case, [[1, 0], [0, 0], [0, 0], [0, 1]])
    on_policy = dataclasses.replace(CONFIG, updates_per_step=1, objective=ObjectiveConfig())
    bare = make_scorer(on_policy, model, None)(PARAMS, None, None, batch)
    assert bare.old_logprob is bare.reference_logprob is bare.start_logprob is None
    other = jax.tree.map(lambda x: x * 1.1, PARAMS)
    scored = make_scorer(CONFIG, model, None)(PARAMS, other, other, batch)
    assert scored.reference_logprob is scored.start_logprob
    mine = batch.loss_weight > 0
    assert np.abs(scored.old_logprob - scored.start_logprob)[mine].max() > 1e-3
    apart = make_scorer(CONFIG, model, None)(PARAMS, PARAMS, other, batch)
    np.testing.assert_allclose(apart.reference_logprob, apart.old_logprob, rtol=1e-6)
