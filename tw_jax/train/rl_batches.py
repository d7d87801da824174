"""What an RL step trains on: groups as forests, packed into the rows of every update."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import WeightedTrie, best_fit_rows, pack_rows
from tw_jax.errors import UserError
from tw_jax.parallel.layout import Layout
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.group_forest import group_forest
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.run_dir import LoadedModel
from tw_jax.train.scoring import token_logprobs


def micro_batches(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
) -> list[list[PackedBatch]]:
    """Micro-batches of every update; groups are dealt to updates in order."""
    groups = np.array_split(np.arange(config.prompts), config.updates_per_step)
    updates = []
    for members in groups:
        forests = [
            f for p in members for f in _forests(config, model, rollouts, advantages, int(p))
        ]
        rows = best_fit_rows([len(forest.trie) for forest in forests], config.row_len)
        rows += [[] for _ in range(-len(rows) % config.rows)]
        updates.append(
            [
                pack_rows(
                    [[forests[i] for i in row] for row in rows[start : start + config.rows]],
                    config.row_len,
                )
                for start in range(0, len(rows), config.rows)
            ]
        )
    return updates


def _forests(
    config: RLConfig,
    model: LoadedModel,
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    prompt: int,
) -> list[WeightedTrie]:
    """The group of one prompt as one forest, or several where it is longer than a row."""
    ids = list(range(prompt * config.group_size, (prompt + 1) * config.group_size))

    def build(members: list[int]) -> list[WeightedTrie]:
        forest = group_forest(
            model.schema,
            [rollouts[i] for i in members],
            [float(advantages.reshape(-1)[i]) for i in members],
            members,
            config.objective.aggregation,
        )
        if len(forest.trie) <= config.row_len:
            return [forest]
        if len(members) == 1:
            raise UserError(
                f"row_len={config.row_len} is too short: one rollout has {len(forest.trie)} trie "
                "tokens; raise row_len or lower sampling.max_response_tokens"
            )
        half = len(members) // 2
        return build(members[:half]) + build(members[half:])

    return build(ids)


def make_scorer(
    config: RLConfig, model: LoadedModel, layout: Layout | None
) -> Callable[[Any, Any, PackedBatch], PackedBatch]:
    """Adds log-probabilities of the policy before the update, and of the reference if any."""

    @jax.jit
    def logprobs(params: Any, batch: PackedBatch):
        return token_logprobs(
            model.graphdef,
            params,
            batch,
            head_chunk=config.memory.head_chunk,
            remat=config.memory.remat,
            attention=config.memory.attention,
            layout=layout,
        )

    def score(params: Any, reference: Any, batch: PackedBatch) -> PackedBatch:
        if config.objective.ratio != "on_policy":
            batch = dataclasses.replace(batch, old_logprob=logprobs(params, batch))
        if reference is not None:
            batch = dataclasses.replace(batch, reference_logprob=logprobs(reference, batch))
        return batch

    return score
