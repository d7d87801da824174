"""One P-GRPO update of a group as one forest, against one row per model call, in one run.

Rollouts have the shape of the paper's: four blocks of 2.46 threads on average and a
self-parallelism of 1.25, behind a prompt of 150 tokens, in a group of eight. At the paper's 11,200
tokens both ways are counted; at about 1,000 tokens both are run, in turns, with the same model,
kernels, rows and optimizer. The reference's way (threadweaver.md 5.1) is a row of context and
completion per call, without padding: here calls are packed into rows as tightly as forests are, so
that the ratio is that of the two ways alone.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.scripted import Plot, scripted_trajectory
from benchmarks.shapes import TINY
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import PolicyTokens, WeightedTrie, best_fit_rows, pack_rows
from tw_jax.models import graphdef, init_params
from tw_jax.rollout.rollout import Rollout, RolloutUnit
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.group_forest import group_forests
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.state import init_train_state
from tw_jax.train.update import MemoryConfig, Update, make_update
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema
from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.trie import TokenKind, Trie

GROUP, PROMPT_LEN, BLOCKS = 8, 150, 4
BLOCKS_OF_THREE = 15  # of the group's 32 blocks; the others have two threads: 2.47 on average
SELF_PARALLELISM = 1.25
PAPER_TOKENS, SCALED_TOKENS = 11_200, 1_000
PAPER_ROW_LEN = 40_960
ROW_LEN, ROWS = 4096, 1  # of the update that is run
REPEATS = 3
OBJECTIVE = ObjectiveConfig()
MODEL = dataclasses.replace(
    TINY,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Sides(NamedTuple):
    """What the update reads, either way.

    Attributes:
      forests: the group as one forest, or as many as rows of that length need.
      calls: one chain per model call.
    """

    forests: list[WeightedTrie]
    calls: list[WeightedTrie]

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens through the update: forests, calls."""
        return sum(len(f.trie) for f in self.forests), sum(len(c.trie) for c in self.calls)


def plots(tokens: int) -> list[Plot]:
    """The group's courses, each of about so many tokens behind the prompt."""
    widths = np.full(GROUP * BLOCKS, 2)
    widths[np.linspace(0, len(widths) - 1, BLOCKS_OF_THREE).astype(int)] = 3
    saved = tokens * (1 - 1 / SELF_PARALLELISM)  # by running threads at the same time
    body = round(saved / (BLOCKS * (widths.mean() - 1))) - 5  # a thread's header and line break
    made = []
    for own in widths.reshape(GROUP, BLOCKS):
        # Tags, plans and headers: 10 tokens per block, 17 per thread.
        wrapped = sum(10 + width * (17 + body) for width in own)
        segment = round((tokens - wrapped) / (BLOCKS + 1))
        made.append(Plot(tuple((body,) * width for width in own), segment))
    return made


def as_rollout(schema: Schema, trajectory: Trajectory, rng: np.random.Generator) -> Rollout:
    """The trajectory as if the engine had sampled it, with made-up log-probabilities."""
    units = []
    for unit in schema.units(trajectory):
        start = trajectory.response_start
        if unit.kind == "thread":
            start = trajectory.blocks[unit.block].threads[unit.thread - 1].body
        elif unit.block:
            start = trajectory.blocks[unit.block - 1].join_end
        count = len(unit.completion)
        logprobs = -rng.random(count).astype(np.float32)
        place = (len(unit.context), start, unit.completion, logprobs)
        units.append(RolloutUnit(unit.kind, -1, unit.block, unit.thread, *place, "eos", 0, 0, 0))
    total = len(trajectory.tokens) - trajectory.prompt_len
    return Rollout(trajectory, tuple(units), "eos", schema.critical_path(trajectory), total)


def sample_group(schema: Schema, tokenizer: Any, tokens: int) -> list[Rollout]:
    """Eight rollouts of one prompt."""
    rng = np.random.default_rng(0)
    drawn = [
        scripted_trajectory(plot, schema, tokenizer, seed, prompt_len=PROMPT_LEN)
        for seed, plot in enumerate(plots(tokens))
    ]
    prompt = drawn[0].tokens[:PROMPT_LEN]
    group = []
    for trajectory in drawn:
        tokens_of = np.concatenate([prompt, trajectory.tokens[PROMPT_LEN:]])
        parsed = schema.parse(tokens_of, PROMPT_LEN)
        assert isinstance(parsed, Trajectory), parsed
        group.append(as_rollout(schema, parsed, rng))
    return group


def sides_of(schema: Schema, rollouts: Sequence[Rollout], row_len: int) -> Sides:
    """The group as forests, and as one chain per call, with the same advantages."""
    advantages = np.linspace(-1, 1, len(rollouts)).tolist()
    ids = list(range(len(rollouts)))
    forests = group_forests(schema, rollouts, advantages, ids, OBJECTIVE, row_len).forests
    calls = [
        _chain(context, unit.completion, unit.logprobs, advantage, index)
        for index, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True))
        for unit, context in zip(
            rollout.units, [u.context for u in schema.units(rollout.trajectory)], strict=True
        )
    ]
    return Sides(list(forests), calls)


def _chain(
    context: np.ndarray,
    completion: np.ndarray,
    logprobs: np.ndarray,
    advantage: float,
    rollout: int,
) -> WeightedTrie:
    """One call as a plain causal row."""
    n = len(context) + len(completion)
    index = np.arange(n, dtype=np.int32)
    written = index >= len(context)
    nothing = np.zeros((0, n), np.int32)
    kind = np.where(written, TokenKind.SAMPLED, TokenKind.PROMPT).astype(np.int8)
    ids = np.concatenate([context, completion])
    trie = Trie(
        tokens=ids,
        positions=index,
        parent=np.maximum(index - 1, 0),
        visible_end=np.full(n, n, np.int32),
        hidden_start=nothing,
        hidden_end=nothing,
        kind=kind,
        source=index,
        rollout=np.zeros(n, np.int32),
    )
    weight = written.astype(np.float32)
    sampler = np.concatenate([np.zeros(len(context), np.float32), logprobs])
    number = np.where(written, rollout, -1).astype(np.int32)
    region = np.where(written, 0, -1).astype(np.int32)
    policy = PolicyTokens(
        kl_weight=weight,
        denominator=weight,
        advantage=advantage * weight,
        sampler_logprob=sampler,
        rollout_id=number,
        region=region,
        policy_version=number * 0,
    )
    return WeightedTrie(trie, weight, policy)


def micro_batches(items: Sequence[WeightedTrie], row_len: int) -> list[PackedBatch]:
    """All items, packed into rows and these into micro-batches."""
    rows = best_fit_rows([len(item.trie) for item in items], row_len)
    rows += [[] for _ in range(-len(rows) % ROWS)]
    return [
        pack_rows([[items[i] for i in row] for row in rows[start : start + ROWS]], row_len)
        for start in range(0, len(rows), ROWS)
    ]


def timed_update(update: Update, params: Any, batches: list[PackedBatch]) -> tuple[float, Any, Any]:
    """Seconds of one update of fresh parameters, its gradient, its sums."""
    state = jax.jit(lambda p: init_train_state(p, gradient_keeper()))(params)
    jax.block_until_ready(state)
    began = time.perf_counter()
    state, sums = update(state, batches)
    jax.block_until_ready((state, sums))
    return time.perf_counter() - began, state.opt_state[0].trace, sums


def gradient_keeper() -> optax.GradientTransformation:
    """An optimizer whose state after one step is the mean gradient."""
    return optax.chain(optax.trace(0.0), optax.sgd(1e-3))


def run() -> dict[str, Any]:
    """Counts at the paper's lengths; time and gradients at a tenth of them."""
    tokenizer = load_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    paper = sample_group(schema, tokenizer, PAPER_TOKENS)
    counted = sides_of(schema, paper, PAPER_ROW_LEN)

    rollouts = sample_group(schema, tokenizer, SCALED_TOKENS)
    scaled = sides_of(schema, rollouts, ROW_LEN)
    batches = [micro_batches(items, ROW_LEN) for items in (scaled.forests, scaled.calls)]
    loss = policy_sum(graphdef(MODEL), OBJECTIVE, MemoryConfig(head_chunk=1024))
    update = make_update(loss, gradient_keeper())
    params = jax.tree.map(np.asarray, init_params(MODEL, 0))
    results: list[list[Any]] = [[], []]
    for repeat in range(REPEATS + 1):
        for side in (0, 1) if repeat % 2 else (1, 0):
            result = timed_update(update, params, batches[side])
            if repeat:  # the first one compiles
                results[side].append(result)
    ours, theirs = ([seconds for seconds, _, _ in side] for side in results)
    (_, our_gradient, our_sums), (_, their_gradient, their_sums) = results[0][0], results[1][0]
    return {
        "token_ratio": counted.tokens[1] / counted.tokens[0],
        "time_ratio": statistics.median(theirs) / statistics.median(ours),
        "gradient_rel_error": relative(our_gradient, their_gradient),
        "loss_abs_diff": abs(mean_loss(our_sums) - mean_loss(their_sums)),
        "paper": facts(paper, counted),
        "scaled": facts(rollouts, scaled)
        | {"rows": [len(b) * ROWS for b in batches], "row_len": ROW_LEN},
        "update_s": {"forest": ours, "one_row_per_call": theirs},
    }


def facts(rollouts: Sequence[Rollout], sides: Sides) -> dict[str, Any]:
    """What was compared, and how many tokens either way takes."""
    threads = [len(block.threads) for r in rollouts for block in r.trajectory.blocks]
    return {
        "tokens_per_rollout": float(np.mean([r.total_tokens for r in rollouts])),
        "self_parallelism": float(np.mean([r.total_tokens / r.critical_path for r in rollouts])),
        "threads_per_block": float(np.mean(threads)),
        "calls": len(sides.calls),
        "forest_tokens": sides.tokens[0],
        "one_row_per_call_tokens": sides.tokens[1],
    }


def mean_loss(sums: Any) -> float:
    """The loss of an update."""
    return float(sums["loss"] / sums["weight"])


def relative(actual: Any, expected: Any) -> float:
    """Norm of the difference of two gradients over that of the expected one."""
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, actual, expected))
    return float(apart / optax.tree.norm(expected))
