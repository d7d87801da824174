"""Units: the (context, completion) pairs that inference meets."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Unit:
    """One sequential segment or one thread.

    Attributes:
      kind: segment or thread.
      block: blocks before this unit (threads: index of their own block).
      thread: 0 for segments, else 1, 2, ... in join order.
      context: ids the model conditions on, forced header included.
      completion: ids the model wrote, stop token included.
    """

    kind: Literal["segment", "thread"]
    block: int
    thread: int
    context: Int32[np.ndarray, "context"]
    completion: Int32[np.ndarray, "completion"]


def units_of_whole_prefix(trajectory: Trajectory) -> tuple[Unit, ...]:
    """Units of a schema whose threads see all text before the fork, and whose later text sees all.

    The contexts are the ids that the model conditions on, in text order; which of them see each
    other, and at which positions, is the schema's mask and position rule.
    """
    tokens, units = trajectory.tokens, []
    start = trajectory.response_start
    for index, block in enumerate(trajectory.blocks):
        units.append(Unit("segment", index, 0, tokens[:start], tokens[start : block.outlines_end]))
        shared = tokens[: block.threads[0].start] if block.threads else tokens[:0]
        for ordinal, thread in enumerate(block.threads, start=1):
            context = np.concatenate([shared, tokens[thread.start : thread.body]])
            completion = np.concatenate(
                [tokens[thread.body : thread.sampled_end], np.array(thread.replaced, np.int32)]
            )
            units.append(Unit("thread", index, ordinal, context, completion))
        start = block.join_end
    if start < len(tokens):
        units.append(Unit("segment", len(trajectory.blocks), 0, tokens[:start], tokens[start:]))
    return tuple(units)
