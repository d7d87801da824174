"""A group of rollouts as one forest: the prompt once, every sampled token once.

The update on the forest equals the reference's update with one row per model call, in value and
gradient, at a fraction of the tokens: every sampled token stands in exactly the context in which
it was sampled, and carries its rollout's advantage.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tw_jax.data.packing import PolicyTokens, WeightedTrie, best_fit_rows
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.token_regions import source_regions
from tw_jax.train.token_weights import token_weights
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trie import TokenKind


@dataclasses.dataclass(frozen=True)
class GroupForests:
    """The rollouts of one prompt in forests that fit into rows.

    Attributes:
      forests: as few as hold the rollouts.
      too_long_tokens: trie tokens of each rollout that fits into no row, and is in no forest.
    """

    forests: tuple[WeightedTrie, ...]
    too_long_tokens: tuple[int, ...]


def group_forests(
    schema: Schema,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    rollout_ids: Sequence[int],
    objective: ObjectiveConfig,
    row_len: int,
) -> GroupForests:
    """The rollouts of one prompt as one forest, or as few as fit into rows.

    A rollout is never split: ratios of whole sequences need all its tokens in one batch. One that
    is longer than a row is left out. See `group_forest` for the arguments.
    """

    def forest(members: Sequence[int]) -> WeightedTrie:
        return group_forest(
            schema,
            [rollouts[i] for i in members],
            [advantages[i] for i in members],
            [rollout_ids[i] for i in members],
            objective,
        )

    whole = forest(range(len(rollouts)))
    if len(whole.trie) <= row_len:
        return GroupForests((whole,), ())
    # A forest is as long as its prompt and what each rollout adds.
    alone = [len(schema.forest([rollout.trajectory])) for rollout in rollouts]
    prompt = (sum(alone) - len(whole.trie)) // max(len(rollouts) - 1, 1)
    fitting = [i for i, length in enumerate(alone) if length <= row_len]
    parts = best_fit_rows([alone[i] - prompt for i in fitting], row_len - prompt)
    return GroupForests(
        tuple(forest(sorted(fitting[i] for i in part)) for part in parts),
        tuple(length for length in alone if length > row_len),
    )


def group_forest(
    schema: Schema,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    rollout_ids: Sequence[int],
    objective: ObjectiveConfig,
) -> WeightedTrie:
    """The rollouts of one prompt as a forest with what the policy gradient needs per token.

    Args:
      schema: of the rollouts.
      rollouts: all of one prompt.
      advantages: one per rollout.
      rollout_ids: one per rollout, unique in the step.
      objective: whose aggregation decides the tokens' weights.
    """
    trie = schema.forest([rollout.trajectory for rollout in rollouts])
    weight = np.zeros(len(trie), np.float32)
    policy = PolicyTokens.blank(weight.shape)
    sampled = trie.kind == TokenKind.SAMPLED
    for index, rollout in enumerate(rollouts):
        mine = np.flatnonzero(sampled & (trie.rollout == index))
        source = trie.source[mine]
        table = _by_source(rollout, objective)[:, source]
        weight[mine], policy.kl_weight[mine], policy.denominator[mine] = table[:3]
        policy.sampler_logprob[mine] = table[3]
        policy.region[mine] = source_regions(rollout.trajectory, schema.tag_ids)[source]
        policy.advantage[mine] = advantages[index]
        policy.rollout_id[mine] = rollout_ids[index]
        if rollout.policy_version is not None:
            policy.policy_version[mine] = rollout.policy_version
    return WeightedTrie(trie, weight, policy)


def _by_source(rollout: Rollout, objective: ObjectiveConfig) -> Float32[np.ndarray, "4 source"]:
    """The three token weights and the sampler log-probability of every `Trie.source`."""
    joined = len(rollout.trajectory.tokens)
    replaced = sum(len(t.replaced) for b in rollout.trajectory.blocks for t in b.threads)
    table = np.zeros((4, joined + replaced), np.float32)
    weights = token_weights([len(unit.completion) for unit in rollout.units], objective)
    spans = {(u.block, u.thread): (u, w) for u, w in zip(rollout.units, weights, strict=True)}
    next_replaced = joined
    for (block, thread), (unit, unit_weights) in spans.items():
        kept = len(unit.completion)
        if thread:
            kept -= len(rollout.trajectory.blocks[block].threads[thread - 1].replaced)
        span = slice(unit.start, unit.start + kept)
        table[:3, span], table[3, span] = np.array(unit_weights)[:, None], unit.logprobs[:kept]
    for block, spans_of_block in enumerate(rollout.trajectory.blocks):
        for ordinal, thread in enumerate(spans_of_block.threads, start=1):
            if not thread.replaced:
                continue
            unit, unit_weights = spans[block, ordinal]
            span = slice(next_replaced, next_replaced + len(thread.replaced))
            table[:3, span] = np.array(unit_weights)[:, None]
            table[3, span] = unit.logprobs[len(unit.completion) - len(thread.replaced) :]
            next_replaced = span.stop
    return table
