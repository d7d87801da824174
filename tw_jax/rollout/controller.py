"""Row controllers: a caller's rule that watches every sampled token, inside the jitted loop.

    def stop_when_unsure(view: RowView) -> RowActions:
        return RowActions(view.token, stop=view.logprob < -10.0)

    engine = RolloutEngine(graphdef, schema, config, controller=stop_when_unsure)

It prunes threads (a stopped thread is closed, and joins as it is), stops rollouts (a stopped
segment ends its rollout) and swaps tokens. It is traced once, like the rest of the loop, and must
look at each row by itself if rollouts are to stay independent of their neighbours.
"""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowView:
    """What a controller sees of the rows, in every step.

    Attributes:
      sampled: the row has just sampled a token; the other fields mean nothing where it has not.
      token: that token.
      logprob: its log-probability under the model's own logits.
      logits: the model's own.
      count: tokens that the unit has sampled, this one included.
      request: request slot.
      block: blocks before the unit; the block of a thread.
      thread: ordinal of the thread, 0 for a segment.
    """

    sampled: Bool[Array, "rows"]
    token: Int32[Array, "rows"]
    logprob: Float32[Array, "rows"]
    logits: Float32[Array, "rows vocab"]
    count: Int32[Array, "rows"]
    request: Int32[Array, "rows"]
    block: Int32[Array, "rows"]
    thread: Int32[Array, "rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowActions:
    """What a controller decides.

    Attributes:
      token: the token to write: the sampled one, or another in its place.
      stop: the unit ends behind this token, with the finish reason "controller".
    """

    token: Int32[Array, "rows"]
    stop: Bool[Array, "rows"]


RowController = Callable[[RowView], RowActions]
