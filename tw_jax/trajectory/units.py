"""Units: the (context, completion) pairs that inference meets."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32


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
