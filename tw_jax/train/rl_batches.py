"""What an RL step trains on: groups as forests, packed into the rows of every update."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import WeightedTrie, best_fit_rows, pack_rows
from tw_jax.models.qwen3 import Params
from tw_jax.parallel.layout import Layout
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.group_forest import GroupForests, group_forests
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.run_dir import LoadedModel
from tw_jax.train.scoring import token_logprobs


@dataclasses.dataclass(frozen=True)
class StepBatches:
    """What the updates of one step train on.

    Attributes:
      updates: micro-batches of every update, in order; each pass over the step makes them all.
      packed: rollouts that are in them.
      too_long_tokens: trie tokens of each rollout that was to be in them, but fits into no row.
    """

    updates: list[list[PackedBatch]]
    packed: int
    too_long_tokens: tuple[int, ...]


def micro_batches(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    advantages: Float[np.ndarray, "prompts group_size"],
    kept: Bool[np.ndarray, "prompts group_size"],
) -> StepBatches:
    """Micro-batches of every update; groups are dealt to updates in order.

    A rollout that is longer than a row is left out: it neither ends the run nor changes what the
    others of its group are worth.

    Args:
      config: sizes and objective.
      model: whose schema the rollouts are in.
      rollouts: prompt by prompt.
      advantages: of every rollout.
      kept: which rollouts the updates take (`tw_jax.train.advantages.kept_rollouts`). An update
        that none is left for gets one batch without weights, and changes nothing.
    """
    groups: list[GroupForests] = []
    for prompt in np.flatnonzero(kept.any(axis=1)):
        members = np.flatnonzero(kept[prompt])
        ids = prompt * config.group_size + members
        groups.append(
            group_forests(
                model.schema,
                [rollouts[i] for i in ids],
                advantages[prompt, members].tolist(),
                ids.tolist(),
                config.policy_objective,
                config.row_len,
            )
        )
    too_long_tokens = tuple(tokens for group in groups for tokens in group.too_long_tokens)
    taken = [group.forests for group in groups if group.forests]
    dealt = np.array_split(np.arange(len(taken)), config.updates_per_step)
    return StepBatches(
        updates=[
            _rows_of_forests(config, [forest for g in part for forest in taken[g]])
            for part in dealt
        ],
        packed=int(kept.sum()) - len(too_long_tokens),
        too_long_tokens=too_long_tokens,
    )


def _rows_of_forests(config: RLConfig, forests: Sequence[WeightedTrie]) -> list[PackedBatch]:
    """One update's forests in full micro-batches; at least one of them."""
    rows = best_fit_rows([len(forest.trie) for forest in forests], config.row_len) or [[]]
    rows += [[] for _ in range(-len(rows) % config.rows)]
    return [
        pack_rows(
            [[forests[i] for i in row] for row in rows[start : start + config.rows]],
            config.row_len,
            policy=True,
        )
        for start in range(0, len(rows), config.rows)
    ]


# (policy, reference, start, batch) -> the batch with log-probabilities under each of them.
BatchScorer = Callable[[Params, Params | None, Params | None, PackedBatch], PackedBatch]


def make_scorer(config: RLConfig, model: LoadedModel, layout: Layout | None) -> BatchScorer:
    """Adds log-probabilities of the policy before the update where the objective needs them.

    And those of the reference and of the start of the run, where there are such; if both are the
    same parameters, they are scored once.
    """

    @jax.jit
    def logprobs(params: Params, batch: PackedBatch):
        return token_logprobs(
            model.graphdef,
            params,
            batch,
            head_chunk=config.memory.head_chunk,
            remat=config.memory.remat,
            attention=config.memory.attention,
            layout=layout,
        )

    def score(
        policy: Params, reference: Params | None, start: Params | None, batch: PackedBatch
    ) -> PackedBatch:
        scored: dict[str, Any] = {}
        if config.policy_objective.ratio != "on_policy":
            scored["old_logprob"] = logprobs(policy, batch)
        if start is not None:
            scored["start_logprob"] = logprobs(start, batch)
        if reference is not None:
            same = reference is start
            scored["reference_logprob"] = (
                scored["start_logprob"] if same else logprobs(reference, batch)
            )
        return dataclasses.replace(batch, **scored)

    return score
