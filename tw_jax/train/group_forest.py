"""A group of rollouts as one forest: the prompt once, every sampled token once.

The update on the forest equals the reference's update with one row per model call, in value and
gradient, at a fraction of the tokens: every sampled token stands in exactly the context in which
it was sampled, and carries its rollout's advantage.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tw_jax.data.packing import WeightedTrie
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.objective import Aggregation, token_weights
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trie import TokenKind


def group_forest(
    schema: Schema,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    rollout_ids: Sequence[int],
    aggregation: Aggregation,
) -> WeightedTrie:
    """The rollouts of one prompt as a forest with what the policy gradient needs per token.

    Args:
      schema: of the rollouts.
      rollouts: all of one prompt.
      advantages: one per rollout.
      rollout_ids: one per rollout, unique in the batch.
      aggregation: decides the tokens' weights.
    """
    trie = schema.forest([rollout.trajectory for rollout in rollouts])
    n = len(trie)
    weight, advantage, logprob = (np.zeros(n, np.float32) for _ in range(3))
    rollout_id = np.full(n, -1, np.int32)
    sampled = trie.kind == TokenKind.SAMPLED
    for index, rollout in enumerate(rollouts):
        mine = np.flatnonzero(sampled & (trie.rollout == index))
        by_source = _by_source(rollout, aggregation)
        weight[mine] = by_source[0, trie.source[mine]]
        logprob[mine] = by_source[1, trie.source[mine]]
        advantage[mine] = advantages[index]
        rollout_id[mine] = rollout_ids[index]
    return WeightedTrie(trie, weight, advantage, logprob, rollout_id)


def _by_source(rollout: Rollout, aggregation: Aggregation) -> Float32[np.ndarray, "2 source"]:
    """Weight and sampler log-probability of every `Trie.source` of one rollout."""
    joined = len(rollout.trajectory.tokens)
    replaced = sum(len(t.replaced) for b in rollout.trajectory.blocks for t in b.threads)
    table = np.zeros((2, joined + replaced), np.float32)
    weights = token_weights([len(unit.completion) for unit in rollout.units], aggregation)
    spans = {(u.block, u.thread): (u, w) for u, w in zip(rollout.units, weights, strict=True)}
    next_replaced = joined
    for (block, thread), (unit, unit_weight) in spans.items():
        kept = len(unit.completion)
        if thread:
            kept -= len(rollout.trajectory.blocks[block].threads[thread - 1].replaced)
        span = slice(unit.start, unit.start + kept)
        table[0, span], table[1, span] = unit_weight, unit.logprobs[:kept]
    for block, spans_of_block in enumerate(rollout.trajectory.blocks):
        for ordinal, thread in enumerate(spans_of_block.threads, start=1):
            if not thread.replaced:
                continue
            unit, unit_weight = spans[block, ordinal]
            span = slice(next_replaced, next_replaced + len(thread.replaced))
            table[0, span] = unit_weight
            table[1, span] = unit.logprobs[len(unit.completion) - len(thread.replaced) :]
            next_replaced = span.stop
    return table
