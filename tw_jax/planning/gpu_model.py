"""A step on GPUs by formula: its work is traced, its memory and traffic are estimated.

No GPU compiler runs without a GPU, so what a TPU plan reads from the compiled program is a model
here: weights are gathered layer by layer and again for the backward pass, gradients are scattered
in the compute dtype (those of the vocabulary's tables in float32), and activations are kept as the
remat policy says.
"""

import dataclasses
import math

from tw_jax.models.config import Qwen3Config
from tw_jax.parallel.layout import Layout
from tw_jax.planning.chips import Topology
from tw_jax.planning.collectives import Collective
from tw_jax.planning.config import PlanConfig
from tw_jax.planning.facts import ProgramFacts
from tw_jax.planning.links import gpu_bandwidth
from tw_jax.planning.programs import model_of, rows_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CODE = 64 * 2**20
_F32 = 4


def modelled(
    config: PlanConfig,
    program: ProgramFacts,
    topology: Topology,
    layout: Layout,
) -> ProgramFacts:
    """Adds what only a compiler would know to the facts of a traced program."""
    model = model_of(config)
    sizes = dict(layout.mesh.shape)
    takes_gradient = "batch" in program.arguments
    tokens = _local_tokens(config, layout) if takes_gradient else 0
    talk = _collectives(config, model, layout, tokens) if takes_gradient else ()
    parameters = program.arguments.get("params", 0)
    temporaries = parameters  # gradients, or updates
    moved = 3.0 * sum(program.arguments.values())
    if takes_gradient:
        temporaries += _activations(config, model, layout, tokens)
        moved += _layer_traffic(config, model, layout, tokens)
    if config.program == "decode":
        temporaries, moved = _logits(config, model, layout), float(sum(program.arguments.values()))
        talk = _decode_collectives(config, model, layout)
    groups = {c.axes for c in talk}
    return dataclasses.replace(
        program,
        temporaries=int(temporaries),
        code=_CODE,
        memory_bytes=moved,
        collectives=talk,
        bandwidths=tuple((axes, gpu_bandwidth(topology, sizes, axes)) for axes in groups),
    )


def _local_tokens(config: PlanConfig, layout: Layout) -> int:
    rows = rows_of(config, dict(layout.mesh.shape))
    return rows * config.row_len // (layout.size("batch") * layout.size("length"))


def _widths(model: Qwen3Config, layout: Layout) -> tuple[float, float]:
    """Elements per token that a layer makes: inside attention and inside the feed-forward part."""
    split = layout.size("heads")
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    inner = model.intermediate_size
    if model.moe is not None:
        inner = model.moe.num_experts_per_tok * model.moe.moe_intermediate_size
    attention = (heads + model.num_attention_heads) * model.head_dim / split
    return attention, 3 * inner / layout.size("mlp")


def _activations(config: PlanConfig, model: Qwen3Config, layout: Layout, tokens: int) -> float:
    """Kept activations of all layers, the working set of one, and a chunk of logits."""
    item = _BYTES[config.compute_dtype]
    width = model.hidden_size * layout.size("length") / layout.size("residual_length")
    attention, inner = _widths(model, layout)
    output = model.num_attention_heads * model.head_dim / layout.size("heads")
    kept = {
        "none": 4 * width + 2 * attention + 2 * inner,
        "dots": 2 * width + attention + inner,
        "block": width + output,
        "full": width,
        "offload": 0.0,
    }[config.memory.remat]
    layer = _layer_parameters(model) / layout.size("heads")
    working = tokens * (4 * width + 2 * attention + 2 * inner) * item + 2 * layer * item
    layers = model.num_hidden_layers * tokens * kept * item
    return layers + working + _logits(config, model, layout)


def _logits(config: PlanConfig, model: Qwen3Config, layout: Layout) -> float:
    """Two float32 copies of a chunk's logits on one device."""
    tokens = config.decode_rows
    if config.program != "decode":
        tokens = min(config.memory.head_chunk, _local_tokens(config, layout))
    return 2 * _F32 * tokens * model.vocab_size / layout.size("vocab")


def _layer_traffic(config: PlanConfig, model: Qwen3Config, layout: Layout, tokens: int) -> float:
    """Bytes of activations: every product's inputs and outputs, forward, again, and backward."""
    attention, inner = _widths(model, layout)
    per_token = (6 * model.hidden_size + 2 * attention + 2 * inner) * _BYTES[config.compute_dtype]
    return 4 * model.num_hidden_layers * tokens * per_token


def _layer_parameters(model: Qwen3Config) -> float:
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    inner = 3 * model.hidden_size * model.intermediate_size
    if model.moe is not None:
        experts = model.moe.num_experts * model.moe.moe_intermediate_size
        inner = 3 * model.hidden_size * experts
    return model.hidden_size * heads * model.head_dim + inner


def _used(layout: Layout, name: str) -> tuple[str, ...]:
    axes = getattr(layout.rules, name)
    return tuple(axis for axis in layout.mesh.shape if axis in axes and layout.mesh.shape[axis] > 1)


def _collectives(
    config: PlanConfig, model: Qwen3Config, layout: Layout, tokens: int
) -> tuple[Collective, ...]:
    item = _BYTES[config.compute_dtype]
    layers = model.num_hidden_layers
    again = config.memory.remat in ("block", "full", "offload")
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    tables /= layout.size("vocab")
    matrices = layers * _layer_parameters(model) / layout.size("heads")
    gradients = matrices * item + tables * _F32
    shards = _used(layout, "embed")
    found = []

    def add(kind: str, size: float, axes: tuple[str, ...], count: float) -> None:
        group = math.prod(layout.mesh.shape[axis] for axis in axes)
        if group > 1:
            found.append(Collective(kind, int(size), group, axes, count))

    add("all-gather", (matrices + tables) * item, shards, 2)
    add("reduce-scatter", gradients, shards, 1)
    share = math.prod(layout.mesh.shape[axis] for axis in shards)
    data = tuple(axis for axis in ("data",) if layout.mesh.shape[axis] > 1)
    add("all-reduce", gradients / share, data, 1)
    # Two sums of partial products per layer forward and two backward; recomputation needs only that
    # behind attention.
    residual = tokens * model.hidden_size * item
    add("all-reduce", residual, _used(layout, "heads"), layers * (4 + again))
    keys = tokens * layout.size("length") * model.num_key_value_heads * model.head_dim
    keys = 2 * keys * item / layout.size("kv_heads")
    add("all-gather", keys, _used(layout, "length"), layers * (1 + again))
    add("reduce-scatter", keys, _used(layout, "length"), layers)
    return tuple(found)


def _decode_collectives(
    config: PlanConfig, model: Qwen3Config, layout: Layout
) -> tuple[Collective, ...]:
    axes = _used(layout, "heads")
    group = math.prod(layout.mesh.shape[axis] for axis in axes)
    if group == 1:
        return ()
    residual = config.decode_rows * model.hidden_size * _BYTES[config.compute_dtype]
    return (Collective("all-reduce", residual, group, axes, 2.0 * model.num_hidden_layers),)
