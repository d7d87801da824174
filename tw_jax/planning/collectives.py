"""The communication of a compiled program: which collective moves how much over which mesh axes.

The TPU compiler has many spellings for the same few operations; all are read into one `kind`:

- `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`, plain or as a
  `-start` / `-done` pair;
- a reduce-scatter is a fusion that calls a computation `all-reduce-scatter`, in which an
  all-reduce is followed by a slice;
- an asynchronous fusion repeats its collective, with one channel, in the fusions that start it,
  overlap it and end it: the start counts;
- an overlapped matrix product is a small loop of permutes (its counter advances by 2).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from tw_jax.planning.hlo import Computation, Instruction, Module, parse_hlo
from tw_jax.planning.hlo_cost import ProgramCost

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_SCATTERING_NAME = "all-reduce-scatter"
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a program that are alike.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of the whole array, as one device would hold it: the gathered result of an
        all-gather, the input of a reduce-scatter, all-reduce or all-to-all, the message of a
        permute; per execution.
      group_size: devices that take part together.
      axes: mesh axes along which the devices of a group differ.
      count: executions per run of the program, loops multiplied in.
    """

    kind: str
    bytes: int
    group_size: int
    axes: tuple[str, ...]
    count: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in all executions, by a ring algorithm."""
        others = (self.group_size - 1) / self.group_size
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.bytes * share * self.count


def collectives(
    hlo_text: str,
    mesh_shape: Mapping[str, int] | None = None,
    scopes: Mapping[str, float] | None = None,
) -> list[Collective]:
    """Lists the collectives of a compiled program, those that are alike added up.

    Args:
      hlo_text: `jax.stages.Compiled.as_text()`.
      mesh_shape: sizes of the mesh axes in order (`mesh.shape`); without it `axes` stays empty.
      scopes: trips of data-dependent loops by a part of their `op_name`.

    Returns:
      Collectives, most traffic first.

    Raises:
      ValueError: a collective lies in a loop whose trip count is not known, or its groups cannot
        be read.
    """
    return module_collectives(ProgramCost(parse_hlo(hlo_text), scopes), mesh_shape)


def module_collectives(
    cost: ProgramCost, mesh_shape: Mapping[str, int] | None = None
) -> list[Collective]:
    """`collectives` of a program that has been parsed already."""
    module = cost.module
    started = _started_channels(module)
    counts: dict[Collective, float] = {}
    for name, times in cost.executions.items():
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            kind = _kind(computation, instruction)
            if kind is None or _is_echo(computation, instruction, started):
                continue
            if math.isnan(times):
                raise ValueError(
                    f"{instruction.name} ({instruction.op_name}) lies in a loop whose trip count "
                    "is data: give it in `scopes`"
                )
            groups = device_groups(instruction, module.partitions)
            size = max((len(group) for group in groups), default=1)
            if size > 1:
                axes = spanned_axes(groups, mesh_shape or {})
                payload = _payload(computation, instruction, size)
                alike = Collective(kind, payload, size, axes, 0.0)
                counts[alike] = counts.get(alike, 0.0) + times
    found = [dataclasses.replace(alike, count=count) for alike, count in counts.items()]
    return sorted(found, key=lambda c: (-c.wire_bytes, c.kind, c.axes))


def _kind(computation: Computation, instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.name.startswith(_SCATTERING_NAME):
        return "reduce-scatter"
    return kind if kind in KINDS else None


def _started_channels(module: Module) -> frozenset[str]:
    """Channels of the collectives that an asynchronous fusion starts."""
    return frozenset(
        channel
        for computation in module.computations.values()
        if _starts(computation)
        for instruction in computation.instructions.values()
        if (channel := instruction.attribute("channel_id")) is not None
    )


def _starts(computation: Computation) -> bool:
    return any(
        instruction.opcode == "custom-call" and _ASYNC_START in instruction.attributes
        for instruction in computation.instructions.values()
    )


def _is_echo(computation: Computation, instruction: Instruction, started: frozenset[str]) -> bool:
    """Whether this only repeats a collective that was started elsewhere."""
    return instruction.attribute("channel_id") in started and not _starts(computation)


def _payload(computation: Computation, instruction: Instruction, group_size: int) -> int:
    operands = computation.operands(instruction)
    if instruction.opcode.startswith("collective-permute"):
        operands = operands[:1]  # further ones are buffers and offsets of an in-place permute
    size = sum(array.bytes for operand in operands for array in operand.types)
    return size * group_size if instruction.opcode.startswith("all-gather") else size


def device_groups(instruction: Instruction, partitions: int) -> Groups:
    """The groups of devices that communicate, as positions in the flattened mesh.

    Raises:
      ValueError: they are written in a way that is not known here.
    """
    text = instruction.attributes
    if "source_target_pairs=" in text:
        pairs = _braced(text.partition("source_target_pairs=")[2])
        return _connected(pairs)
    _, found, text = text.partition("replica_groups=")
    if not found or text.startswith("{}"):
        return (tuple(range(partitions)),)
    if text.startswith("{"):
        return _braced(text)
    if text.startswith("mesh["):
        return _mesh_groups(text)
    iota = re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota is None:
        raise ValueError(f"{instruction.name}: cannot read replica_groups={text[:80]}")
    ids = _iota(iota.group(3)).reshape(int(iota.group(1)), int(iota.group(2)))
    return tuple(tuple(group) for group in ids.tolist())


def _braced(text: str) -> Groups:
    """`{{0,1},{2,3}}`."""
    inner = text[1 : text.index("}}") + 1]
    groups = re.findall(r"\{([\d, ]*)\}", inner)
    return tuple(tuple(int(i) for i in group.split(",") if i.strip()) for group in groups)


def _iota(text: str) -> np.ndarray:
    """`[16,4]T(1,0)`: 0, 1, 2, ... in that shape, transposed."""
    dims, _, order = text.partition("T")
    sizes = [int(size) for size in dims.strip("[]").split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in order.strip("()").split(",")]) if order else ids


def _mesh_groups(text: str) -> Groups:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`; part of an axis is `'a':(2)2`."""
    found = re.match(
        r"mesh\[(?P<axes>[^\]]*)\](?:,? device_ids=\((?P<ids>[^{]*)\))?\s*\{(?P<over>[^}]*)\}", text
    )
    if found is None:
        raise ValueError(f"cannot read replica_groups={text[:80]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found["axes"])}
    ids = np.arange(math.prod(sizes.values()))
    if found["ids"] and found["ids"].startswith("["):
        ids = _iota(found["ids"])
    elif found["ids"]:
        ids = np.array([int(i) for i in found["ids"].split(",")])
    # Every axis in three parts: before, within and behind the part that is communicated over.
    parts = {name: (1, 1, size) for name, size in sizes.items()}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found["over"]):
        whole = sizes[name]
        first, within = (int(before), int(size)) if before else (1, whole)
        parts[name] = (first, within, whole // (first * within))
    ids = ids.reshape([part for three in parts.values() for part in three])
    moved = [3 * i + 1 for i in range(len(parts))]
    kept = [axis for axis in range(3 * len(parts)) if axis not in moved]
    size = math.prod(ids.shape[axis] for axis in moved)
    return tuple(tuple(g) for g in ids.transpose(kept + moved).reshape(-1, size).tolist())


def _connected(pairs: Iterable[tuple[int, ...]]) -> Groups:
    """Devices that a permute's messages connect."""
    group_of: dict[int, set[int]] = {}
    for source, target in pairs:
        merged = group_of.get(source, {source}) | group_of.get(target, {target})
        for device in merged:
            group_of[device] = merged
    return tuple({tuple(sorted(group)) for group in group_of.values()})


def spanned_axes(groups: Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ, in the order of the mesh."""
    if not mesh_shape:
        return ()
    sizes = tuple(mesh_shape.values())
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.array(group), sizes))
        differs |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(itertools.compress(mesh_shape, differs))
