"""The programs of a run, traced with abstract arguments: exactly the functions that runs call.

SFT and RL lower the pieces of `tw_jax.train.update.make_update`, decoding lowers the rollout
engine's `advance`. Arguments are shapes with shardings; no array is ever made.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.errors import UserError
from tw_jax.kernels.grouped_matmul import SCOPE, tile_rows
from tw_jax.kernels.tile_sizes import tile_sizes
from tw_jax.models import graphdef
from tw_jax.models.config import Qwen3Config, preset
from tw_jax.models.qwen3 import abstract_params, param_axes
from tw_jax.parallel.attention import backend_on
from tw_jax.parallel.layout import Layout
from tw_jax.parallel.mesh import ParallelConfig
from tw_jax.planning.config import PlanConfig
from tw_jax.planning.hlo_cost import RAGGED_DOT
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.network import Weights
from tw_jax.rollout.placement import engine_placement
from tw_jax.rollout.state import new_state
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.placement import abstract_state, place_run
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.update import make_update, nll_sum
from tw_jax.trajectory.schemas import make_schema

ATTENTION = "tree_attention"


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a step.

    Attributes:
      name: what it does.
      runs: how often a step runs it.
      traced: the traced function; lower and compile it, or count its work.
      scopes: trips of its data-dependent loops on one device.
      arguments: bytes per device of what it is given, by category.
      resident: bytes per device that lie in memory meanwhile, by category.
      attention: backend of tree attention; "" where there is none.
      attention_imbalance: attention of the busiest device over the mean of all.
    """

    name: str
    runs: int
    traced: jax.stages.Traced
    scopes: Mapping[str, float]
    arguments: Mapping[str, int]
    resident: Mapping[str, int]
    attention: str = ""
    attention_imbalance: float = 1.0


def model_of(config: PlanConfig) -> Qwen3Config:
    """The model that is planned.

    Raises:
      UserError: no such preset, or a dtype that it cannot have.
    """
    try:
        return preset(
            config.model, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype
        )
    except ValueError as error:
        raise UserError(f"model={config.model!r}: {error}") from error


def rows_of(config: PlanConfig, sizes: Mapping[str, int]) -> int:
    """Rows per micro-batch: those asked for, or one per device that holds rows."""
    if config.rows is not None:
        return config.rows
    return math.prod(sizes[axis] for axis in ParallelConfig().rules().batch)


def live_tiles(config: PlanConfig, rows: int, tile: tuple[int, int]) -> float:
    """Attention tiles of `(queries, keys)` that are visited for so many whole rows."""
    q_tile, k_tile = tile
    padded_len = -(-config.row_len // max(tile)) * max(tile)
    q_ends = np.arange(q_tile, padded_len + 1, q_tile)
    causal = int(np.sum(-(-q_ends // k_tile)))
    return rows * max(len(q_ends), config.visible * causal)


def _tile_of(config: PlanConfig, model: Qwen3Config, layout: Layout, backend: str):
    """`(queries, keys)` of a tile of training's attention."""
    parts = layout.size("length")
    return tile_sizes(
        backend,
        row_len=config.row_len,
        q_len=config.row_len // parts if parts > 1 else None,
        group=model.num_attention_heads // model.num_key_value_heads,
    )


def attention_imbalance(layout: Layout) -> float:
    """Attention of the busiest device over the mean, for causal rows cut into equal parts.

    Later queries see more keys: of `n` parts the last one holds `2n - 1` of `n * n` shares.
    """
    parts = layout.size("length")
    return (2 * parts - 1) / parts


def programs(config: PlanConfig, layout: Layout) -> list[Program]:
    """Traces the programs of one step.

    Raises:
      UserError: model, rows and mesh do not fit each other.
    """
    if config.program == "decode":
        return [_decode(config, layout)]
    return _update(config, layout)


def _update(config: PlanConfig, layout: Layout) -> list[Program]:
    model = model_of(config)
    rows = rows_of(config, layout.mesh.shape)
    layout.check_rows(rows, config.row_len)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 1000)
    shapes = abstract_params(model)
    places = place_run(layout, model, optimizer).state
    assert places is not None  # there is a layout
    rl = config.program == "rl"
    if not rl:
        loss = nll_sum(graphdef(model), config.memory, layout)
    else:
        run = RLConfig()
        loss = policy_sum(
            graphdef(model),
            run.policy_objective,
            config.memory,
            layout,
            rollouts=run.most_rollouts,
            measure_entropy=run.measure_entropy,
        )
    update = make_update(loss, optimizer, places)

    state = _placed(abstract_state(shapes, optimizer), places)
    batch = _abstract_batch(layout, rows, config.row_len, rl=rl)
    params, moments = {"params": _size(state.params)}, {"optimizer": _size(state.opt_state)}
    inputs = {"batch": _size(batch)}
    # RL measures how far the policy is from its start, whose parameters stay.
    start = {"params of the start": _size(state.params)} if rl else {}
    local_rows = rows // layout.size("batch")
    backend = backend_on(layout, config.memory.attention)
    tile = _tile_of(config, model, layout, backend)
    scopes = {ATTENTION: live_tiles(config, local_rows, tile) / layout.size("length")}
    local_tokens = local_rows * config.row_len // layout.size("length")
    scopes |= _expert_scopes(model, layout, local_tokens)
    skew = attention_imbalance(layout)

    if config.micro_batches == 1:
        with jax.set_mesh(layout.mesh):
            whole = update.whole.trace(state, batch)
        taken = params | moments | inputs
        return [Program("update", 1, whole, scopes, taken, start, backend, skew)]
    grads = {"gradients": _size(state.params)}
    with jax.set_mesh(layout.mesh):
        first = update.first.trace(state.params, batch)
        total = _placed(first.out_info, (places.params, None), layout)
        accumulate = update.accumulate.trace(state.params, total, batch)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.replicated())
        apply = update.apply.trace(state, total[0], scalar)
    further, taken, given = config.micro_batches - 1, params | grads | inputs, params | inputs
    beside = moments | start
    return [
        Program("first micro-batch", 1, first, scopes, given, beside, backend, skew),
        Program("further micro-batch", further, accumulate, scopes, taken, beside, backend, skew),
        Program("optimizer", 1, apply, {}, params | moments | grads, inputs | start),
    ]


def _expert_scopes(model: Qwen3Config, layout: Layout, local_tokens: int) -> dict[str, float]:
    """Trips of the loop over tiles of an expert's rows, and the rows that belong to one here.

    Taken for balanced: every device of an expert axis gets as many rows as it has tokens to send,
    and the last tile of every expert is half full.
    """
    if model.moe is None:
        return {}
    devices = layout.size("experts")
    own_rows = local_tokens * model.moe.num_experts_per_tok
    groups = model.moe.num_experts // devices
    tiles = own_rows / tile_rows(own_rows * devices, groups) + groups / 2
    return {SCOPE: tiles, RAGGED_DOT: 1 / devices}


def _decode(config: PlanConfig, layout: Layout) -> Program:
    model = dataclasses.replace(model_of(config), param_dtype=config.compute_dtype)
    schema = make_schema("threadweaver", load_tokenizer())
    requests = max(1, config.decode_rows * 3 // 4)
    sizes = EngineConfig(
        context_len=config.context_len,
        rows=config.decode_rows,
        requests=requests,
        prefill_rows=min(4, config.decode_rows),
        prefill_chunk=min(256, config.context_len),
    )
    engine = RolloutEngine(graphdef(model), schema, sizes, layout)
    shapes = abstract_params(model)
    places = layout.param_shardings(param_axes(model), shapes)
    weights = _placed(jax.eval_shape(engine.weights, shapes), _weight_places(model, places))
    placement = engine_placement(layout, engine.program)
    state = _placed(jax.eval_shape(lambda: new_state(engine.program)), placement.state)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.everywhere)
    with jax.set_mesh(layout.mesh):
        traced = engine.advance.trace(weights, state, count, count)
    kv = _size(state.cache)
    sizes_by = {"params": _size(weights), "kv cache": kv, "engine state": _size(state) - kv}
    # One step is planned, with nothing to prefill; other loops are rare.
    scopes = _expert_scopes(model, layout, config.decode_rows) | {"prefill_lane": 0.0, "": 1.0}
    return Program("decode step", 1, traced, scopes, sizes_by, {})


def _weight_places(model: Qwen3Config, places: Any) -> Weights:
    """Shardings of the engine's weights, from those of the parameters they are made of."""

    def reduced(sharding: NamedSharding, axes: slice) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[axes]))

    layer = jax.tree.map(lambda sharding: reduced(sharding, slice(1, None)), places["layers"])
    if model.tie_word_embeddings:
        head = reduced(places["embed_tokens"]["embedding"], slice(None, None, -1))
    else:
        head = places["lm_head"]["kernel"]
    return Weights(places, (layer,) * model.num_hidden_layers, head)


def _abstract_batch(layout: Layout, rows: int, row_len: int, *, rl: bool) -> PackedBatch:
    """Shapes of what an update is given."""

    def array(dtype: Any, *leading: int) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding((*[None] * len(leading), "batch", "length"))
        return jax.ShapeDtypeStruct((*leading, rows, row_len), dtype, sharding=sharding)

    batch = PackedBatch(
        tokens=array(jnp.int32),
        positions=array(jnp.int32),
        parent=array(jnp.int32),
        visible_end=array(jnp.int32),
        hidden_start=array(jnp.int32, 0),
        hidden_end=array(jnp.int32, 0),
        loss_weight=array(jnp.float32),
    )
    if not rl:
        return batch
    # What the batches of a run of P-GRPO with default settings hold (`tw_jax.train.rl_batches`).
    return dataclasses.replace(
        batch,
        kl_weight=array(jnp.float32),
        denominator=array(jnp.float32),
        advantage=array(jnp.float32),
        sampler_logprob=array(jnp.float32),
        start_logprob=array(jnp.float32),
        rollout_id=array(jnp.int32),
        region=array(jnp.int32),
        policy_version=array(jnp.int32),
    )


def _placed(shapes: Any, shardings: Any, layout: Layout | None = None) -> Any:
    """Shapes with shardings; a missing one (None) lies everywhere."""

    def place(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        if sharding is None and layout is not None:
            sharding = layout.replicated()
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    if isinstance(shardings, tuple) and None in shardings:
        return tuple(
            jax.tree.map(lambda s: place(s, None), part) if where is None else _placed(part, where)
            for part, where in zip(shapes, shardings, strict=True)
        )
    return jax.tree.map(place, shapes, shardings)


def _size(tree: Any) -> int:
    """Bytes per device of arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
