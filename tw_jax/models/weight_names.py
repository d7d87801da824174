"""One table: which tensors of a published checkpoint make up each of our parameters.

Import and export both read it. Ours differ from the published tensors in three ways: matrices are
stored `[in, out]`, layers are stacked on axis 0, experts on axis 1. Mixtures of experts are
published with one tensor per expert, which is also how they are written; transformers 5 holds
them fused in memory, and files with its fused tensors are read too.
"""

import dataclasses
import itertools
from collections.abc import Collection

_LAYER = "model.layers.{layer}"


@dataclasses.dataclass(frozen=True)
class Fused:
    """A tensor in which all experts of a layer lie, `[experts, parts * rows, columns]`.

    Attributes:
      name: its name, with a place for the layer.
      part: which of the parts stacked on the rows is meant.
      parts: how many there are.
    """

    name: str
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is published.

    Attributes:
      path: the parameter.
      name: its tensors; places for layer and expert are the parameter's stacked axes.
      transpose: the published matrix is ours transposed.
      fused: the other form in which it is met.
    """

    path: str
    name: str
    transpose: bool = False
    fused: Fused | None = None

    @property
    def stacked_axes(self) -> int:
        """How many leading axes of the parameter are spread over tensors."""
        return self.name.count("{")


def _kernel(path: str, name: str, fused: Fused | None = None) -> Rule:
    return Rule(f"{path}/kernel", f"{name}.weight", transpose=True, fused=fused)


_EXPERTS = f"{_LAYER}.mlp.experts"
_EXPERT = f"{_EXPERTS}.{{expert}}"
_GATE_UP = f"{_EXPERTS}.gate_up_proj"

RULES: dict[str, Rule] = {
    rule.path: rule
    for rule in (
        Rule("embed_tokens/embedding", "model.embed_tokens.weight"),
        Rule("layers/input_layernorm/scale", f"{_LAYER}.input_layernorm.weight"),
        _kernel("layers/self_attn/q_proj", f"{_LAYER}.self_attn.q_proj"),
        _kernel("layers/self_attn/k_proj", f"{_LAYER}.self_attn.k_proj"),
        _kernel("layers/self_attn/v_proj", f"{_LAYER}.self_attn.v_proj"),
        _kernel("layers/self_attn/o_proj", f"{_LAYER}.self_attn.o_proj"),
        Rule("layers/self_attn/q_norm/scale", f"{_LAYER}.self_attn.q_norm.weight"),
        Rule("layers/self_attn/k_norm/scale", f"{_LAYER}.self_attn.k_norm.weight"),
        Rule("layers/post_attention_layernorm/scale", f"{_LAYER}.post_attention_layernorm.weight"),
        _kernel("layers/mlp/gate_proj", f"{_LAYER}.mlp.gate_proj"),
        _kernel("layers/mlp/up_proj", f"{_LAYER}.mlp.up_proj"),
        _kernel("layers/mlp/down_proj", f"{_LAYER}.mlp.down_proj"),
        _kernel("layers/mlp/router", f"{_LAYER}.mlp.gate"),
        _kernel("layers/mlp/experts/gate_proj", f"{_EXPERT}.gate_proj", Fused(_GATE_UP, 0, 2)),
        _kernel("layers/mlp/experts/up_proj", f"{_EXPERT}.up_proj", Fused(_GATE_UP, 1, 2)),
        _kernel(
            "layers/mlp/experts/down_proj", f"{_EXPERT}.down_proj", Fused(f"{_EXPERTS}.down_proj")
        ),
        Rule("norm/scale", "model.norm.weight"),
        _kernel("lm_head", "lm_head"),
    )
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One matrix (or vector) of a parameter and where it is published.

    Attributes:
      stack: its place on the parameter's stacked axes: (), (layer,) or (layer, expert).
      tensor: name of the tensor.
      tensor_shape: the whole tensor's shape.
      first_row: the matrix's first row, the tensor's leading axes counted as rows.
      rows: its number of rows, as published.
      transpose: the published matrix is ours transposed.
    """

    stack: tuple[int, ...]
    tensor: str
    tensor_shape: tuple[int, ...]
    first_row: int
    rows: int
    transpose: bool

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one published row: (columns,), or () for a vector."""
        return self.tensor_shape[-1:] if len(self.tensor_shape) > 1 else ()


def pieces_of(path: str, shape: tuple[int, ...], present: Collection[str] = ()) -> list[Piece]:
    """Where the matrices of a parameter are published, in the order of its stacked axes.

    Args:
      path: the parameter, e.g. `layers/mlp/up_proj/kernel`.
      shape: its shape.
      present: the tensors there are; where they hold the fused form, that is used.

    Raises:
      KeyError: the table has no such parameter.
    """
    rule = RULES[path]
    matrix = shape[rule.stacked_axes :]
    matrix = matrix[::-1] if rule.transpose else matrix
    found = []
    for stack in itertools.product(*map(range, shape[: rule.stacked_axes])):
        places = dict(zip(("layer", "expert"), stack, strict=False))
        tensor, tensor_shape, first_row = rule.name.format(**places), matrix, 0
        if rule.fused and (fused := rule.fused.name.format(**places)) in present:
            rows = matrix[0] * rule.fused.parts
            tensor, tensor_shape = fused, (shape[1], rows, *matrix[1:])
            first_row = stack[1] * rows + rule.fused.part * matrix[0]
        piece = Piece(stack, tensor, tensor_shape, first_row, matrix[0], rule.transpose)
        found.append(piece)
    return found
