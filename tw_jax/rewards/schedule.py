"""How much of a reward term counts at a step: a pure function of the step."""

import dataclasses
from typing import Literal

from tw_jax.config_checks import require_at_least
from tw_jax.config_fields import SHORTHAND


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a reward term counts.

    Attributes:
      kind: "constant"; "from_step" is nothing before `start` and all from then on; "until_step" the
        other way round; "ramp" grows in a line from nothing at `start` to all `ramp_steps` later;
        "alternate" is nothing for `off_steps`, then all for `on_steps`, over and over.
      start: step that "from_step", "until_step" and "ramp" speak of; the first step is 0.
      ramp_steps: length of a ramp.
      off_steps: steps of each round that an alternating term misses. Parallel-R1 (arXiv 2509.07980)
        rewards accuracy alone in 8 of 10 steps, and parallel blocks too in the other 2.
      on_steps: steps of each round in which it counts.
    """

    kind: Literal["constant", "from_step", "until_step", "ramp", "alternate"] = dataclasses.field(
        default="constant", metadata={SHORTHAND: True}
    )
    start: int = 0
    ramp_steps: int = 100
    off_steps: int = 8
    on_steps: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, start=0, ramp_steps=1, off_steps=0, on_steps=1)


def share_at(schedule: Schedule, step: int) -> float:
    """The share of a term that counts at a step, 0 to 1."""
    if schedule.kind == "from_step":
        return float(step >= schedule.start)
    if schedule.kind == "until_step":
        return float(step < schedule.start)
    if schedule.kind == "ramp":
        return min(max((step - schedule.start) / schedule.ramp_steps, 0.0), 1.0)
    if schedule.kind == "alternate":
        return float(step % (schedule.off_steps + schedule.on_steps) >= schedule.off_steps)
    return 1.0
