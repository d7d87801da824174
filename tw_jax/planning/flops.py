"""Floating-point work of a program as JAX traced it: no compiler, no device, any mesh.

The count is global: the work of all devices together, none of it replicated. A compiled program
that does more, device by device, repeats work somewhere; `tw_jax.planning` compares the two.

Only matrix products and convolutions are counted, at 2 operations per multiply-add. Those of a
Pallas kernel count once per point of its grid.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from tw_jax.planning.hlo_cost import RAGGED_DOT, valid_positions

_TRANSFORM = re.compile(r"^(jvp|transpose|vmap|remat)\((.*)\)$")
_RECOMPUTED = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Work of a program.

    Attributes:
      by_scope: operations by the path of named scopes, such as `attention/qkv`; forward,
        recomputed and backward work of a scope are one entry. What loops of unknown length do is
        NaN.
      recomputed: the part of it that `jax.checkpoint` repeats.
    """

    by_scope: Mapping[str, float]
    recomputed: float

    @property
    def total(self) -> float:
        """All operations."""
        return sum(self.by_scope.values())

    def within(self, scope: str) -> float:
        """Operations below any scope whose path has this component."""
        return sum(work for path, work in self.by_scope.items() if scope in path.split("/"))


def count_flops(
    jaxpr: ClosedJaxpr, scopes: Mapping[str, float] | None = None, platform: str = "cpu"
) -> FlopCount:
    """Counts the operations of a traced program.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)` or the `jaxpr` of `jax.jit(f).trace(...)`.
      scopes: trips of data-dependent loops (`while`, or a dynamic bound of a kernel's grid) by a
        part of their named scope, as in `tw_jax.planning.hlo_cost`; under the key of
        `RAGGED_DOT`, the share of a ragged product's rows that belong to any of its groups.
      platform: what the program is for, where it has a branch for each.
    """
    by_scope: dict[str, float] = {}
    recomputed = 0.0
    # Tracing keeps what nobody reads; every compiler drops it, inside branches and loops too.
    for path, work in _walk(_live(jaxpr.jaxpr), "", 1.0, dict(scopes or {}), platform):
        scope = clean_scope(path)
        by_scope[scope] = by_scope.get(scope, 0.0) + work
        if _RECOMPUTED in path:
            recomputed += work
    return FlopCount(by_scope, recomputed)


def clean_scope(path: str) -> str:
    """Named scopes of a name stack, without what transformations wrapped around them."""
    parts = []
    for part in path.split("/"):
        while found := _TRANSFORM.match(part):
            part = found.group(2)
        if part and part not in (_RECOMPUTED, "checkpoint"):
            parts.append(part)
    return "/".join(parts)


def _live(jaxpr: Jaxpr) -> Jaxpr:
    """What a compiler keeps. JAX itself never drops a Pallas kernel; compilers drop unread ones."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    atoms = [atom for eqn in live.eqns for atom in eqn.invars] + list(live.outvars)
    read = {id(atom) for atom in atoms}

    def is_read(eqn: JaxprEqn) -> bool:
        return bool(eqn.effects) or any(id(result) in read for result in eqn.outvars)

    kernels = "pallas_call"
    return live.replace(
        eqns=[eqn for eqn in live.eqns if eqn.primitive.name != kernels or is_read(eqn)]
    )


def _walk(
    jaxpr: Jaxpr, prefix: str, times: float, scopes: Mapping[str, float], platform: str
) -> Iterator[tuple[str, float]]:
    """(name stack, operations) of every product."""
    for eqn in jaxpr.eqns:
        path = f"{prefix}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        own = _own_flops(eqn)
        if own:
            share = scopes.get(RAGGED_DOT, 1.0) if name == RAGGED_DOT else 1.0
            yield path, times * own * share
        elif name == "cond":
            branches = [
                list(_walk(b, path, times, scopes, platform)) for b in _taken(eqn, platform)
            ]
            yield from max(branches, key=lambda found: sum(work for _, work in found))
        else:
            inner = times * _repeats(eqn, path, scopes)
            for sub in _inner(eqn):
                yield from _walk(sub, path, inner, scopes, platform)


def _taken(cond: JaxprEqn, platform: str) -> list[Jaxpr]:
    """The branches that may run: where they are made for platforms, the one for this platform."""
    branches = list(_inner(cond))
    for platforms, branch in zip(
        cond.params.get("branches_platforms") or (), branches, strict=False
    ):
        if platforms is None or platform in platforms:
            return [branch]
    return branches


def _repeats(eqn: JaxprEqn, path: str, scopes: Mapping[str, float]) -> float:
    """How often an equation runs the programs inside it, over all devices."""
    name = eqn.primitive.name
    if name == "scan":
        return eqn.params["length"]
    given = next((count for scope, count in scopes.items() if scope in path), math.nan)
    if name == "while":
        return given
    if name == "pallas_call":
        grid = eqn.params["grid_mapping"].grid
        return math.prod(size if isinstance(size, int) else given for size in grid)
    if name == "shard_map":
        # Inside, shapes are one device's along the manual axes and whole along the others.
        sizes = eqn.params["mesh"].shape
        return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    return 1


def _inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    name = eqn.primitive.name
    if name == "pallas_call":
        yield eqn.params["jaxpr"]  # it has no results: what it computes, it writes
        return
    values = eqn.params["body_jaxpr"] if name == "while" else eqn.params.values()
    for value in (values,) if isinstance(values, ClosedJaxpr) else values:
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield _live(item.jaxpr)
            elif isinstance(item, Jaxpr):
                yield _live(item)


def _own_flops(eqn: JaxprEqn) -> int:
    """Work of one matrix product or convolution; 0 for anything else."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = _shape(eqn.invars[0])
        return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[d] for d in contracted)
    if name == RAGGED_DOT:
        # Groups share one dimension between them, so the number of groups does not multiply.
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        skipped = {*contracted, *batch, *numbers.rhs_group_dimensions}
        rhs = _shape(eqn.invars[1])
        free = math.prod(size for dim, size in enumerate(rhs) if dim not in skipped)
        return 2 * math.prod(_shape(eqn.invars[0])) * free
    if name == "conv_general_dilated":
        return _convolution_flops(eqn)
    return 0


def _convolution_flops(eqn: JaxprEqn) -> int:
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    image, kernel = _shape(eqn.invars[0]), _shape(eqn.invars[1])
    out = _shape(eqn.outvars[0])
    positions = 1
    for dim in range(len(out) - 2):
        positions *= valid_positions(
            image=image[numbers.lhs_spec[2 + dim]],
            kernel=kernel[numbers.rhs_spec[2 + dim]],
            out=out[numbers.out_spec[2 + dim]],
            stride=params["window_strides"][dim],
            spread=params["lhs_dilation"][dim],
            reach=params["rhs_dilation"][dim],
            low=params["padding"][dim][0],
        )
    pairs = kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]
    batch = image[numbers.lhs_spec[0]] // params["batch_group_count"]
    return 2 * positions * pairs * batch


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
